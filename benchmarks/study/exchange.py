"""Clients and server that exchange PEFT folders: every adapter is written and read back.

An upload and what a client starts from go through ``adapter_config.json`` and
``adapter_model.safetensors``, with the adapter's own r and alpha. Weights, ids and slot numbers,
for which a folder has no place, go beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hetlora_agg import ClientUpdate, LowRank
from hetlora_agg.adapters import Adapter, read_adapter, write_adapter
from hetlora_agg.adapters.config import resized
from hetlora_agg.simulate.federation import Server
from hetlora_agg.simulate.local import Adapter as Factors
from hetlora_agg.simulate.local import Start
from hetlora_agg.simulate.sides import Slice

ALPHAS = (1.0, 0.5)
"""Clients' alphas, in turn, as shares of the federation's."""


def through_files(side: type[Slice]) -> type[Slice]:
    """Adapters travel as PEFT folders, down and up."""

    class ThroughFiles(side):  # type: ignore[misc, valid-type]
        def starts(self, server: Server, cohort: Sequence[int], number: int) -> list[Start]:
            """As handed out, read from files."""
            handed = super().starts(server, cohort, number)
            return [
                replace(start, adapter=adapter, scaling=scaling)
                for start in handed
                for adapter, scaling in [written_and_read(start.adapter, start.scaling)]
            ]

        def send(
            self, client: int, start: Start, trained: Factors, number: int
        ) -> dict[str, ClientUpdate]:
            """As sent, read from files."""
            sent = super().send(client, start, trained, number)
            factors, scaling = written_and_read(
                {name: LowRank(own.A, own.B) for name, own in sent.items()},
                {name: own.scaling for name, own in sent.items()},
            )
            return {
                name: replace(own, A=factors[name].A, B=factors[name].B, scaling=scaling[name])
                for name, own in sent.items()
            }

    return ThroughFiles


def own_alphas(side: type[Slice]) -> type[Slice]:
    """Every client has its own alpha, where the method leaves the scaling to its clients."""
    if side.scaling is not Slice.scaling:
        return side

    class OwnAlphas(side):  # type: ignore[misc, valid-type]
        def scaling(self, client: int) -> dict[str, float]:
            """The client's share of the federation's alpha over its rank, by layer."""
            share = ALPHAS[client % len(ALPHAS)]
            return {name: share * own for name, own in super().scaling(client).items()}

    return OwnAlphas


def written_and_read(
    factors: Factors, scaling: Mapping[str, float]
) -> tuple[dict[str, LowRank], dict[str, float]]:
    """Factors and scalings as they come out of a folder they were written to."""
    with tempfile.TemporaryDirectory() as folder:
        found = read_adapter(write(Path(folder) / "adapter", factors, scaling))
        names = list(factors)
        return {n: found.factors(n) for n in names}, {n: found.scaling(n) for n in names}


def write(folder: Path, factors: Factors, scaling: Mapping[str, float]) -> Path:
    """A folder for ``PeftModel.from_pretrained``: r and `lora_alpha = scaling * r`, by layer.

    Args:
        folder: to be made.
        factors: by the path of the layer in the model.
        scaling: by layer; for factors of a result, which have it in them, 1.
    """
    from peft import LoraConfig

    tensors = {
        f"{name}.lora_{factor}.weight": getattr(own, factor)
        for name, own in factors.items()
        for factor in ("A", "B")
    }
    ranks = {name: own.rank for name, own in factors.items()}
    alphas = {name: scaling[name] * rank for name, rank in ranks.items()}
    plain = LoraConfig(target_modules=list(factors), inference_mode=True).to_dict()
    return write_adapter(folder, Adapter.from_state_dict(tensors, resized(plain, ranks, alphas)))
