"""Run a method on one or many batches of layers, one verdict per client over all of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hetlora_agg.checks import check_choice
from hetlora_agg.components import Components
from hetlora_agg.errors import InputValueError
from hetlora_agg.intake import Intake
from hetlora_agg.linalg import exact_arithmetic
from hetlora_agg.registry import MethodEntry
from hetlora_agg.types import AggregationResult, LowRank
from hetlora_agg.weighting import over_all_layers


@dataclass(frozen=True, eq=False)
class Batch:
    """One call of the method: layers of one signature, and the method's options for them."""

    intake: Intake
    options: Mapping[str, Any]


def run(
    entry: MethodEntry, batches: Sequence[Batch], on_bad_client: str
) -> list[AggregationResult]:
    """The method's result for every batch.

    A client is one client in every layer: one that is dropped is dropped from all batches, and the
    method's client statistic is summed over all of them before the first is combined.
    """
    bad = _verdict([batch.intake for batch in batches], on_bad_client)
    results = []
    with exact_arithmetic(batches[0].intake.A.device.type):
        components = [batch.intake.components(frozenset(bad)) for batch in batches]
        for batch, c in zip(batches, _with_statistic(entry, components), strict=True):
            result = batch.intake.finish(entry.run(c, **batch.options), entry.name)
            results.append(replace(result, excluded=tuple(bad.items())))
    return results


def to_numpy(result: AggregationResult) -> AggregationResult:
    """The same result with numpy arrays in it."""

    def array(x: Any) -> Any:
        return None if x is None else x.numpy() if isinstance(x, LowRank) else x.numpy(force=True)

    known = result.certificate
    return replace(
        result,
        certificate=None if known is None else known.map(array),
        factors=array(result.factors),
        residual=array(result.residual),
        singular_values=array(result.singular_values),
        ranks=array(result.ranks),
    )


def _verdict(intakes: Sequence[Intake], on_bad_client: str) -> dict[Hashable, str]:
    """Clients to leave out of every layer, or the error that names the first of them."""
    check_choice("on_bad_client", on_bad_client, ("drop", "error"))
    bad: dict[Hashable, str] = {}
    for intake in intakes:
        bad = {**intake.bad, **bad}
    if bad and on_bad_client == "error":
        raise InputValueError(
            f"{next(iter(bad.values()))}; mend the client, or leave it out with "
            'on_bad_client="drop"'
        )
    return bad


def _with_statistic(entry: MethodEntry, components: list[Components]) -> list[Components]:
    """Each batch with the method's client statistic summed over all batches."""
    if entry.statistic is None:
        return components
    position = {id: i for i, id in enumerate(dict.fromkeys(id for c in components for id in c.ids))}
    parts = [over_all_layers(c, entry.statistic) for c in components]
    places = [
        torch.tensor([position[id] for id in c.ids], device=parts[0].device) for c in components
    ]
    total = parts[0].new_zeros((len(position),) * parts[0].dim())
    for part, at in zip(parts, places, strict=True):
        total[_block(at, part.dim())] += part.to(total.device)
    return [
        replace(c, statistic=total[_block(at, total.dim())].to(c.A.device))
        for c, at in zip(components, places, strict=True)
    ]


def _block(at: torch.Tensor, dims: int) -> tuple[torch.Tensor, ...]:
    """Index of these clients' entries of a vector, or of a matrix of pairs."""
    return (at,) if dims == 1 else (at.unsqueeze(1), at)
