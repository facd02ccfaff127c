"""Run a method on one or many batches of layers, one verdict per client over all of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch

from hetlora_agg.checks import check_choice
from hetlora_agg.components import Components
from hetlora_agg.errors import InputValueError
from hetlora_agg.intake import Folding, Intake
from hetlora_agg.linalg import exact_arithmetic
from hetlora_agg.registry import MethodEntry, named_in
from hetlora_agg.types import AggregationResult, LowRank
from hetlora_agg.weighting import over_all_layers


class Others(Protocol):
    """Those who hold the other layers of the same model: what spans layers is agreed on here."""

    def hear(self, step: str, own: Any) -> list[Any]:
        """What everybody says, in one order for all; plain data."""

    def add_up(self, step: str, own: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's; as many dimensions and entries on all."""


class Alone:
    """Nobody else: all layers are here."""

    def hear(self, step: str, own: Any) -> list[Any]:
        """One's own."""
        return [own]

    def add_up(self, step: str, own: torch.Tensor) -> torch.Tensor:
        """One's own."""
        return own


ALONE = Alone()


@dataclass(frozen=True, eq=False)
class Batch:
    """One call of the method: layers of one signature, and the method's options for them."""

    intake: Intake
    options: Mapping[str, Any]


def run(
    entry: MethodEntry,
    batches: Sequence[Batch],
    on_bad_client: str,
    refused: Mapping[Hashable, str] = MappingProxyType({}),
    others: Others = ALONE,
) -> list[AggregationResult]:
    """The method's result for every batch.

    A client is one client in every layer: one that is dropped is dropped from all batches, and the
    method's client statistic is summed over all of them before the first is combined.

    Args:
        entry: the method.
        batches: what the clients sent, and the method's options; none where others hold all layers.
        on_bad_client: "drop" or "error".
        refused: clients to leave out for what they declare, with the reason.
        others: who holds the model's other layers.
    """
    own = {**_verdict([batch.intake for batch in batches], on_bad_client), **refused}
    bad: dict[Hashable, str] = {}
    for told in others.hear("clients left out", [list(pair) for pair in own.items()]):
        bad = {**dict(told), **bad}
    results = []
    with exact_arithmetic(batches[0].intake.A.device.type if batches else "cpu"):
        components = [batch.intake.components(frozenset(bad)) for batch in batches]
        ready = _with_statistic(entry, components, [batch.options for batch in batches], others)
        for batch, c in zip(batches, ready, strict=True):
            result = batch.intake.finish(entry.run(c, **batch.options), entry.name)
            notes = (*result.notes, *_unbounded(entry, batch.options))
            results.append(
                replace(
                    result,
                    notes=notes,
                    excluded=tuple(bad.items()),
                    slotted=not entry.holds("gauge", batch.options),
                    unscaled=batch.intake.folding.unscaled,
                    next_unscaled=entry.unscaled_factor(_next_round(batch.options)),
                )
            )
    return results


def folding_of(entry: MethodEntry, options: Mapping[str, Any]) -> Folding:
    """Where the method wants the scaling."""
    return Folding(entry.unscaled_factor(options), entry.common, entry.name)


def _next_round(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options as they will be when the clients come back with what they are handed now."""
    return {**options, "round": int(options["round"]) + 1} if "round" in options else options


def _unbounded(entry: MethodEntry, options: Mapping[str, Any]) -> tuple[str, ...]:
    """A rule that judges products says nothing of factors that are averaged apart."""
    judged = hasattr(options.get("weighting"), "statistic")
    if not judged or not entry.claims or "exact" in entry.claims:
        return ()
    return (
        f"weighting: the rule bounds Σ α_k ΔW_k, and {entry.name!r} averages A's and B's apart: a "
        "client that writes its product in factors of any size is not held; use 'flexlora'",
    )


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


def _with_statistic(
    entry: MethodEntry,
    components: list[Components],
    options: Sequence[Mapping[str, Any]],
    others: Others,
) -> list[Components]:
    """Each batch with the method's client statistics summed over all batches, others' included."""
    statistic = entry.statistic_for(options[0]) if options else None
    parts: list[tuple[torch.Tensor, ...]] = []
    own: list[Any] = [[], []]
    if statistic is not None:
        parts = [
            over_all_layers(c, partial(statistic, **named_in(statistic, told)))
            for c, told in zip(components, options, strict=True)
        ]
        ids = dict.fromkeys(id for c in components for id in c.ids)
        own = [list(ids), [part.dim() for part in parts[0]]]
    heard = others.hear("client statistic", own)
    # Who holds no layer has none of its own, and helps to add up the others'.
    dims = max((dims for _, dims in heard), key=len)
    if not dims:
        return components
    everybody = dict.fromkeys(id for ids, _ in heard for id in ids)
    position = {id: i for i, id in enumerate(everybody)}
    _check_pairs(dims, components, list(position))
    places = [torch.tensor([position[id] for id in c.ids], device=c.A.device) for c in components]
    totals = [
        others.add_up(
            "client statistic", _total([p[i] for p in parts], places, [len(position)] * dim)
        )
        for i, dim in enumerate(dims)
    ]
    return [
        c.also(
            statistic=tuple(total.to(c.A.device)[_block(at, total.dim())] for total in totals),
        )
        for c, at in zip(components, places, strict=True)
    ]


def _check_pairs(
    dims: Sequence[int], components: Sequence[Components], everybody: Sequence[Hashable]
) -> None:
    """What is known of a pair of clients must be known of it in every layer."""
    if all(dim == 1 for dim in dims):
        return
    for c in components:
        if absent := [id for id in everybody if id not in set(c.ids)]:
            raise InputValueError(
                f"weighting=: client {absent[0]!r} lacks a layer that others have, and distances "
                "between clients need every client in every layer; let it count as zero there with "
                'missing="zero"'
            )


def _total(
    parts: Sequence[torch.Tensor], places: Sequence[torch.Tensor], shape: Sequence[int]
) -> torch.Tensor:
    """A statistic added up over batches, each of which may lack some clients."""
    total = parts[0].new_zeros(shape) if parts else torch.zeros(shape, dtype=torch.float64)
    for part, at in zip(parts, places, strict=True):
        total[_block(at.to(total.device), part.dim())] += part.to(total.device)
    return total


def _block(at: torch.Tensor, dims: int) -> tuple[torch.Tensor, ...]:
    """Index of these clients' entries of a vector, or of a matrix of pairs."""
    return (at,) if dims == 1 else (at.unsqueeze(1), at)
