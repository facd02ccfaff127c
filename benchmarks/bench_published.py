"""Which claims the aggregators that come as packages satisfy.

``python -m benchmarks.bench_published`` puts every one of them through `testing.examine`, on
clients of mixed ranks where it takes them and of equal ones where it does not, and writes
``results/published.json``. To PEFT scalings go as ``lora_alpha / r`` and weights as the shares
``p_k``; chorus-fl knows no scaling, so that its clients send ``s_k B_k``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.timing import record
from hetlora_agg import ClientUpdate, LowRank
from hetlora_agg.testing import examine

RTOL = 1e-4
"""The packages compute in float32."""

EQUAL, MIXED = (3, 3, 3, 3), (1, 3, 2, 3)


def shares(updates: Sequence[ClientUpdate]) -> list[float]:
    """``p_k``."""
    whole = math.fsum(u.weight for u in updates)
    return [u.weight / whole for u in updates]


def largest_rank(updates: Sequence[ClientUpdate]) -> int:
    """Of those who count."""
    return max(u.A.shape[-2] for u in updates if u.weight > 0)


def peft(combination: str) -> Callable[[list[ClientUpdate]], LowRank]:
    """PEFT's ``add_weighted_adapter`` of one linear layer, an adapter for each client."""

    def aggregator(updates: list[ClientUpdate]) -> LowRank:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from peft import LoraConfig, get_peft_model

        model = torch.nn.Module()
        out, columns = updates[0].B.shape[-2], updates[0].A.shape[-1]
        model.layer = torch.nn.Linear(columns, out, bias=False)
        names = [f"client {k}" for k in range(len(updates))]
        configs = [
            LoraConfig(r=rank, lora_alpha=u.scaling * rank, target_modules=["layer"])
            for u, rank in ((u, u.A.shape[-2]) for u in updates)
        ]
        wrapped = get_peft_model(model, configs[0], adapter_name=names[0])
        for name, config in zip(names[1:], configs[1:], strict=True):
            wrapped.add_adapter(name, config)
        layer: Any = wrapped.base_model.model.layer
        for name, u in zip(names, updates, strict=True):
            layer.lora_A[name].weight.data = u.A.float()
            layer.lora_B[name].weight.data = u.B.float()
        options = {"combination_type": combination}
        if combination == "svd":
            options["svd_rank"] = largest_rank(updates)
        wrapped.add_weighted_adapter(names, shares(updates), "merged", **options)
        B = layer.scaling["merged"] * layer.lora_B["merged"].weight.detach()
        return LowRank(layer.lora_A["merged"].weight.detach(), B)

    return aggregator


def chorus(name: str) -> Callable[[list[ClientUpdate]], LowRank]:
    """chorus-fl's aggregation of state dicts; with FedExLoRA the rank of the largest client."""

    def aggregator(updates: list[ClientUpdate]) -> LowRank:
        from chorus.server import aggregation

        rank = largest_rank(updates)
        strategy = (
            aggregation.FedExLoRA(output_rank=rank) if name == "FedExLoRA" else aggregation.FedAvg()
        )
        clients = [
            {
                "layer.lora_A.weight": u.A.float(),
                "layer.lora_B.weight": (u.scaling * u.B).float(),
            }
            for u in updates
        ]
        found = strategy.aggregate(clients, weights=[float(u.weight) for u in updates])
        return LowRank(found["layer.lora_A.weight"], found["layer.lora_B.weight"])

    return aggregator


AGGREGATORS: dict[str, tuple[Callable[[list[ClientUpdate]], LowRank], tuple[int, ...]]] = {
    "peft `add_weighted_adapter`, `cat`": (peft("cat"), MIXED),
    "peft `add_weighted_adapter`, `svd`": (peft("svd"), MIXED),
    "peft `add_weighted_adapter`, `linear`": (peft("linear"), EQUAL),
    "chorus-fl `FedExLoRA`": (chorus("FedExLoRA"), MIXED),
    "chorus-fl `FedAvg`": (chorus("FedAvg"), EQUAL),
}


def verdicts(name: str) -> dict[str, str]:
    """Claim -> what comes of it."""
    aggregator, ranks = AGGREGATORS[name]
    return dict(examine(aggregator, ranks=ranks, rtol=RTOL).verdicts)


def main() -> None:
    """Examine every one and write the record."""
    torch.manual_seed(0)
    record(
        "published",
        {
            name: {"ranks": list(ranks), "verdicts": verdicts(name)}
            for name, (_, ranks) in AGGREGATORS.items()
        },
    )


if __name__ == "__main__":
    main()
