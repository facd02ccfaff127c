"""Results from sums: the registered method itself, run on everybody who was added."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.components import Components
from hetlora_agg.errors import InputValueError
from hetlora_agg.intake import Folding, Intake
from hetlora_agg.layers import layer_state, layer_streams, stack_layers, take_apart
from hetlora_agg.registry import MethodEntry
from hetlora_agg.running import ALONE, Batch, Others, folding_of, run
from hetlora_agg.streaming.asking import Question, ask
from hetlora_agg.streaming.group import Group
from hetlora_agg.streaming.plan import Plan
from hetlora_agg.streaming.receipts import Id, Receipt, Standing, standing
from hetlora_agg.streaming.shares import Shares, everybody
from hetlora_agg.types import AggregationResult, ClientUpdate

AT_ONCE = 2**28
"""Bytes of sums that are worked on together: what a result takes beside them and the results."""


@dataclass(frozen=True, eq=False)
class Summed(Intake):
    """Clients that are gone: their components come without entries but with sums.

    Attributes:
        c: everybody who was added.
    """

    c: Components

    def components(self, without: frozenset[Any] = frozenset()) -> Components:
        """Everybody who was added; who is left out never was."""
        return self.c


@dataclass(frozen=True, eq=False)
class Sums:
    """Everything that results are made of.

    Attributes:
        entry: the method.
        options: its options; state by layer name.
        plan: how clients were added up.
        missing: what a client counts for in a layer that it lacks.
        receipts: everybody who came.
        groups: the sums.
        dtypes: layer -> dtype of its result.
        first: layer -> the factor that all clients share, where there is one.
    """

    entry: MethodEntry
    options: Mapping[str, Any]
    plan: Plan
    missing: str
    receipts: Mapping[Id, Receipt]
    groups: Sequence[Group]
    dtypes: Mapping[str, torch.dtype]
    first: Mapping[str, Tensor]


def results_of(
    sums: Sums, order: Sequence[str], others: Others = ALONE
) -> dict[str, AggregationResult]:
    """Layer -> the method's result, in the given order of layers; others may have further ones.

    Raises:
        InputValueError: whatever the method has against these clients.
    """
    read = {layer: [_nobody(sums, layer)] for layer in order}
    options = sums.options
    state = {k: layer_state(k, v, read) for k, v in options.items() if isinstance(v, Mapping)}
    streams = {
        k: layer_streams(v, read) for k, v in options.items() if isinstance(v, torch.Generator)
    }
    plain = {k: v for k, v in options.items() if k not in state and k not in streams}
    folding = folding_of(sums.entry, options)
    names: list[list[str]] = []
    batches: list[Batch] = []
    for group, layers in _batches(sums, state):
        own = {k: stack_layers([s[name] for name in layers]) for k, s in state.items()}
        drawn = {k: [g for name in layers for g in s[name]] for k, s in streams.items()}
        names.append(layers)
        batches.append(Batch(_summed(sums, group, layers, folding), {**plain, **own, **drawn}))
    refused: dict[Hashable, str] = {id: r.excluded for id, r in sums.receipts.items() if r.excluded}
    results: dict[str, AggregationResult] = {}
    ran = run(sums.entry, batches, "error", refused, others)
    for layers, batch, result in zip(names, batches, ran, strict=True):
        assert isinstance(batch.intake, Summed)
        error = lost(batch.intake.c.sums, result)
        known = result.certificate
        if known is not None:
            result = replace(result, certificate=replace(known, rounding=known.rounding + error))
        apart = zip(layers, error, take_apart(result, len(layers)), strict=True)
        results.update({name: _noted(one, e, sums) for name, e, one in apart})
    return {layer: results[layer] for layer in order}


def bounds_of(sums: Sums, order: Sequence[str]) -> dict[str, Tensor]:
    """Layer -> bound on what adding up lost of the sum that the method combines."""
    bounds: dict[str, Tensor] = {}
    for group, layers in _batches(sums, {}):
        shares = _summed(sums, group, layers, folding_of(sums.entry, sums.options)).c.sums
        assert isinstance(shares, Shares)
        c = shares.c
        by_layer = (
            shares.squares if shares.squares is None else shares.squares.reshape(-1, len(c.ids))
        )
        asked = Question(
            c.slots_by_client,
            c.weight.tolist(),
            None if c.statistic is None else _total(sums, c.ids).sqrt().tolist(),
            c.ids,
        )
        _, heard = ask(sums.entry, sums.options, asked, by_layer)
        for verb, share in heard.shares.items():
            own = share if share.dim() == 1 else share.reshape(*shares.lead, -1)
            getattr(shares, verb)(own)
        error = lost(shares)
        bounds.update(zip(layers, error, strict=True))
    return {layer: bounds[layer] for layer in order}


def lost(shares: Any, result: AggregationResult | None = None) -> Tensor:
    """What was lost in the sums that a method asked for, ``(n, *layers)``."""
    assert isinstance(shares, Shares)
    error = torch.stack([e.expand(shares.lead) for e in shares.error.values()]).sum(0)
    return error if result is None else error.to(result.A.device)


def _noted(result: AggregationResult, error: Tensor, sums: Sums) -> AggregationResult:
    """The result, with a word on what truncating its sum lost."""
    if all(group.added.most is None for group in sums.groups):
        return result
    note = (
        "memory_limit=: the sum was truncated as clients came; its Frobenius distance from the "
        f"exact one is at most {float(error.max()):.3g}"
    )
    return replace(result, notes=(*result.notes, note))


def _nobody(sums: Sums, layer: str) -> ClientUpdate:
    """An update without components, for its sizes."""
    size = next(group.size for group in sums.groups if layer in group.names)
    kind = {"dtype": sums.dtypes[layer], "device": size.device}
    A = torch.zeros(*size.layers, 0, size.in_features, **kind)  # type: ignore[call-overload]
    B = torch.zeros(*size.layers, size.out_features, 0, **kind)  # type: ignore[call-overload]
    return ClientUpdate(A, B)


def _batches(
    sums: Sums, state: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[Group, list[str]]]:
    """Layers of a group in which the same clients stand in the same slots, some at a time."""
    forms = {receipt.form: None for receipt in sums.receipts.values() if receipt.counts}
    for group in sums.groups:
        alike: dict[Any, list[str]] = {}
        for name in group.names:
            kept = tuple((s[name].rank, s[name].A.dtype) for s in state.values())
            slots = tuple(form.at(name) for form in forms)
            alike.setdefault((sums.dtypes[name], kept, slots), []).append(name)
        held = sum(X.numel() * X.element_size() for X in group.added.tensors())
        step = max(1, AT_ONCE * len(group.names) // max(1, held))
        for layers in alike.values():
            yield from ((group, layers[i : i + step]) for i in range(0, len(layers), step))


def _summed(sums: Sums, group: Group, layers: list[str], folding: Folding) -> Summed:
    """These layers as the method sees them."""
    there = standing(sums.receipts, layers[0], sums.missing)
    if not any(there.slots):
        raise InputValueError(
            f"layer {layers[0]!r}: no client is left: every one has weight 0, was left out or "
            "lacks the layer; add at least one with a positive weight"
        )
    size, device = group.size, group.size.device
    lead = (len(layers), *size.layers)
    A = torch.zeros(*lead, 0, size.in_features, dtype=torch.float64, device=device)
    B = torch.zeros(*lead, size.out_features, 0, dtype=torch.float64, device=device)
    slots = tuple(slot for own in there.slots for slot in own)
    weight = torch.tensor(there.weights, dtype=torch.float64, device=device)
    by_layer = _squares(sums, there, layers, lead)
    c = Components(A, B, tuple(map(len, there.slots)), weight, slots, there.ids)
    if by_layer is not None:
        c = replace(c, statistic=(by_layer.reshape(-1, len(there.ids)).sum(0),))
    total = _total(sums, there.ids).sqrt() if by_layer is not None else weight
    apart = by_layer.sqrt() if by_layer is not None else weight
    mass = everybody(sums.plan, weight, total, apart)
    places = torch.tensor([group.names.index(name) for name in layers], device=device)
    first = [sums.first[name] for name in layers if name in sums.first]
    shares = Shares(
        group.added,
        places,
        c,
        None if mass is None else mass[..., c.client],
        by_layer,
        torch.stack(first) if len(first) == len(layers) else None,
    )
    c = replace(c, sums=shares)
    notes = tuple(
        f"client {id!r}: rank {len(own)} is above min(out, in) = "
        f"{min(size.out_features, size.in_features)}"
        for id, own in zip(there.ids, there.slots, strict=True)
        if len(own) > min(size.out_features, size.in_features)
    )
    return Summed((), A, B, sums.dtypes[layers[0]], {}, notes, folding, c)


def _squares(
    sums: Sums, there: Standing, layers: Sequence[str], lead: tuple[int, ...]
) -> Tensor | None:
    """``‖ΔW_k‖²`` by layer, ``(n, *layers, K)``; None where nothing asks for it."""
    if not sums.entry.statistic:
        return None
    numbers = lead[1:]
    count = 1
    for n in numbers:
        count *= n
    rows = []
    for id in there.ids:
        receipt = sums.receipts[id]
        at = receipt.form.position
        rows.append([receipt.norms[at[n]] if n in at else (0.0,) * count for n in layers])
    squares = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), *lead)
    return squares.movedim(0, -1)


def _total(sums: Sums, ids: Sequence[Any]) -> Tensor:
    """``‖ΔW_k‖²`` over all layers, as it was known when the client came."""
    return torch.tensor(
        [total_of(sums.receipts[id]) for id in ids],
        dtype=torch.float64,
    )


def total_of(receipt: Receipt) -> float:
    """``‖ΔW‖²`` over all layers of one client."""
    return sum(square for layer in receipt.norms for square in layer)
