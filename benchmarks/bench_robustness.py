"""What a fifth of the clients can do to every rule, and what distances cost.

``python -m benchmarks.bench_robustness`` writes ``results/robustness.json`` and
``docs/img/robustness.png``: ``errors``, the distance of the aggregate from the truth relative to
that of the honest clients' mean, for every federation, rule and attack; ``times``, distances
through the factors against those of the dense matrices.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from benchmarks.attacks import ATTACKS, Federation, attacked, dense
from benchmarks.plots import COLOURS, IMAGES, MARKERS
from benchmarks.timing import interleaved, record
from hetlora_agg import ClientUpdate, aggregate
from hetlora_agg.intake import collect
from hetlora_agg.robustness import (
    centered_clip,
    geomed,
    multi_krum,
    nnm,
    norm_clip,
    squared_distances,
)
from hetlora_agg.validation import read_updates

SEEDS = tuple(range(12))

FEDERATIONS = {
    "6 of 30": Federation(),
    "2 of 10": Federation(clients=10, attackers=2),
    "6 of 30, noisy": Federation(noise=1.0),
}

BOUND = 1.5
"""Of `norm_clip`: about the norm of an honest update of the federations above."""

EDGE = 20.0
"""Errors beyond this are drawn here."""

Options = dict[str, Any]

RULES: Mapping[str, Callable[[int], tuple[str, Options]]] = {
    "mean": lambda f: ("flora", {}),
    "norm_clip": lambda f: ("flora", {"weighting": norm_clip(BOUND)}),
    "krum": lambda f: ("flora", {"weighting": multi_krum(f, keep=1)}),
    "multi_krum": lambda f: ("flora", {"weighting": multi_krum(f)}),
    "geomed": lambda f: ("flora", {"weighting": geomed(f)}),
    "centered_clip": lambda f: ("flora", {"weighting": centered_clip(f=f)}),
    "nnm, geomed": lambda f: ("flora", {"weighting": nnm(f).then(geomed(f))}),
    "nnm, multi_krum": lambda f: ("flora", {"weighting": nnm(f).then(multi_krum(f))}),
    "nnm, centered_clip": lambda f: ("flora", {"weighting": nnm(f).then(centered_clip(f=f))}),
    "trimmed_mean": lambda f: ("trimmed_mean", {"f": f, "rank": "full"}),
    "median": lambda f: ("median", {"rank": "full"}),
}
"""Label -> number of attackers -> method and options."""

SIZES = {
    "30 clients of ranks 4–16, 2048×2048": (2048, 2048, (4, 8, 12, 16) * 7 + (4, 16), 1),
    "30 clients of rank 64, 2048×2048": (2048, 2048, (64,) * 30, 1),
    "100 clients of rank 8, 12 layers of 768×768": (768, 768, (8,) * 100, 12),
    "10 clients of ranks 4–16, 24 layers of 1024×1024": (1024, 1024, (4, 8, 16) * 3 + (4,), 24),
}
"""Label -> rows, columns, ranks, layers."""


def ratio(federation: Federation, rule: str, attack: str | None, seed: int) -> float:
    """Distance of the aggregate from the truth, relative to that of the honest clients' mean."""
    updates, truth = attacked(federation, attack, seed)
    clean = dense(updates[: federation.clients - federation.attackers]).mean(0) - truth
    method, options = RULES[rule](federation.attackers)
    result = aggregate(updates, method, on_bad_client="drop", **options)
    return float((result.factors.dense() - truth).norm() / clean.norm())


def errors() -> dict[str, Any]:
    """Federation -> rule -> attack -> mean and largest ratio over the seeds."""
    found: dict[str, Any] = {}
    for label, federation in FEDERATIONS.items():
        found[label] = {}
        for rule in RULES:
            rows = {
                attack or "none": [ratio(federation, rule, attack, seed) for seed in SEEDS]
                for attack in (None, *ATTACKS)
            }
            found[label][rule] = {
                attack: {"mean": statistics.fmean(values), "max": max(values)}
                for attack, values in rows.items()
            }
        print(label, flush=True)
    return found


def dense_distances(updates: Sequence[ClientUpdate]) -> Tensor:
    """``(K, K)`` squared distances of all layers, by the matrices themselves, in float32."""
    W = torch.stack([(u.B @ u.A).flatten() for u in updates])
    G = W @ W.mT
    own = G.diagonal()
    return own[:, None] + own - 2 * G


def times() -> list[dict[str, Any]]:
    """Distances through the factors and densely, next to an aggregation without any."""
    rows = []
    for label, (out, columns, ranks, layers) in SIZES.items():
        g = torch.Generator().manual_seed(0)
        updates = [
            ClientUpdate(
                torch.randn(layers, r, columns, generator=g),
                torch.randn(layers, out, r, generator=g),
                id=k,
            )
            for k, r in enumerate(ranks)
        ]
        c = collect(read_updates(updates)[0]).components()
        runs = interleaved(
            {
                "factors": lambda c=c: squared_distances(c),
                "dense": lambda updates=updates: dense_distances(updates),
                "flexlora": lambda updates=updates: aggregate(updates, "flexlora"),
                "flexlora, nnm, geomed": lambda updates=updates: aggregate(
                    updates, "flexlora", weighting=nnm(2).then(geomed(2))
                ),
            },
            repeats=3,
            budget=4.0,
        )
        rows.append(
            {
                "size": label,
                "R": sum(ranks),
                "seconds": {name: run["median"] for name, run in runs.items()},
                "dense_bytes": 4 * len(ranks) * layers * out * columns,
                "factor_bytes": 4 * layers * sum(ranks) * (out + columns),
            }
        )
        print(label, flush=True)
    return rows


def draw(found: Mapping[str, Any]) -> Figure:
    """Every rule a line, every attack a marker."""
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    rules = list(RULES)
    for number, attack in enumerate(("none", *ATTACKS)):
        axes.plot(
            [min(found[rule][attack]["mean"], EDGE) for rule in rules],
            range(len(rules)),
            MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            fillstyle="none" if number >= len(COLOURS) else "full",
            label=attack,
        )
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.set(
        xscale="log",
        xlim=(0.8, 1.1 * EDGE),
        xlabel=f"error over that of the honest clients' mean; {EDGE:g} and more at the edge",
    )
    ticks = (1, 2, 5, 10, 20)
    axes.set_xticks(ticks, map(str, ticks))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(rules)), rules)
    axes.invert_yaxis()
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, title="attack")
    return figure


def main() -> None:
    """Run, write, draw."""
    found = errors()
    results = {
        "seeds": SEEDS,
        "federations": {label: asdict(federation) for label, federation in FEDERATIONS.items()},
        "bound": BOUND,
        "errors": found,
        "times": times(),
    }
    print(record("robustness", results))
    IMAGES.mkdir(parents=True, exist_ok=True)
    draw(found["6 of 30"]).savefig(IMAGES / "robustness.png")
    print(IMAGES / "robustness.png")


if __name__ == "__main__":
    main()
