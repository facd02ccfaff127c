"""`hetlora-agg inspect`: what is in adapter folders, and which are nearly the same."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from hetlora_agg.adapters import Adapter
from hetlora_agg.cli.adapters import emit, read_all, table
from hetlora_agg.linalg import component_inner_products, svd_product

NEARLY_THE_SAME = 0.99
"""Cosine of two clients' updates, over all layers that both have, from which they are named."""


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="ADAPTER", help="a PEFT adapter folder")
    add("--duplicates", type=float, default=NEARLY_THE_SAME, metavar="COSINE", help="from where on")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    """Print shapes, ranks, scalings and spectra of every folder, and near-duplicates."""
    adapters = read_all(arguments.folders)
    found = {
        "adapters": {name: _described(adapter) for name, adapter in adapters.items()},
        "nearly_the_same": [
            {"clients": pair, "cosine": cosine}
            for pair, cosine in _cosines(adapters).items()
            if abs(cosine) >= arguments.duplicates
        ],
    }
    emit(found, lambda: _text(found), arguments.json)


def _described(adapter: Adapter) -> dict[str, Any]:
    layers = []
    for name, layer in adapter.layers.items():
        factors = adapter.factors(name)
        S = layer.scaling * svd_product(factors.B.double(), factors.A.double()).S
        norm = float(S.square().sum().sqrt())
        share = (S.square() / S.square().sum()).tolist() if norm else []
        entropy = -math.fsum(p * math.log(p) for p in share if p > 0)
        layers.append(
            {
                "layer": name,
                "size": list(layer.size),
                "rank": layer.rank,
                "scaling": layer.scaling,
                "dtype": str(factors.A.dtype).removeprefix("torch."),
                "norm": norm,
                "effective_rank": math.exp(entropy) if share else 0.0,
                "singular_values": S.tolist(),
            }
        )
    return {"layers": layers, "other_tensors": sorted(adapter.extras)}


def _cosines(adapters: Mapping[str, Adapter]) -> dict[tuple[str, str], float]:
    """Cosine of every two clients' updates over the layers that both have."""
    found = {}
    for one, other in combinations(adapters, 2):
        first, second = adapters[one], adapters[other]
        shared = [
            name
            for name in first.layers
            if name in second.layers and first.layers[name].size == second.layers[name].size
        ]
        inner = [
            math.fsum(_inner(x, y, name) for name in shared)
            for x, y in ((first, second), (first, first), (second, second))
        ]
        size = math.sqrt(inner[1] * inner[2])
        found[one, other] = inner[0] / size if size else 0.0
    return found


def _inner(one: Adapter, other: Adapter, layer: str) -> float:
    """``⟨ΔW, ΔW'⟩`` through the factors."""
    x, y = one.factors(layer), other.factors(layer)
    scale = one.scaling(layer) * other.scaling(layer)
    return scale * float(component_inner_products(x.B, x.A, y.B, y.A).sum())


def _text(found: dict[str, Any]) -> str:
    parts = []
    for name, adapter in found["adapters"].items():
        rows = [
            [
                row["layer"],
                "x".join(map(str, row["size"])),
                str(row["rank"]),
                f"{row['scaling']:g}",
                row["dtype"],
                f"{row['norm']:.3g}",
                f"{row['effective_rank']:.1f}",
                " ".join(f"{s:.2g}" for s in row["singular_values"][:4]),
            ]
            for row in adapter["layers"]
        ]
        head = ["layer", "out x in", "rank", "scaling", "dtype", "norm", "effective", "largest σ"]
        parts.append(f"{name}\n{table(head, rows)}")
        if adapter["other_tensors"]:
            parts.append(f"besides: {', '.join(adapter['other_tensors'])}")
    for pair in found["nearly_the_same"]:
        one, other = pair["clients"]
        parts.append(f"nearly the same: {one} and {other}, cosine {pair['cosine']:.4f}")
    return "\n\n".join(parts)
