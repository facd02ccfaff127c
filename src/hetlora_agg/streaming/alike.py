"""Sums over clients as a method sees them: everybody in some layers, without entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.components import Components
from hetlora_agg.errors import InputValueError
from hetlora_agg.intake import Folding, Intake
from hetlora_agg.registry import MethodEntry
from hetlora_agg.streaming.group import Group
from hetlora_agg.streaming.plan import Plan
from hetlora_agg.streaming.receipts import Id, Receipt, Standing, standing
from hetlora_agg.streaming.shares import Shares, everybody

AT_ONCE = 2**28
"""Bytes of sums that are worked on together: what a result takes beside them and the results."""

BY_LAYER = ("u",)
"""Options that may have one entry for each layer."""


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


@dataclass(frozen=True, eq=False)
class Alike:
    """Layers of one size in which the same clients stand in the same slots.

    Attributes:
        group: their sums, perhaps among others.
        layers: their names.
        dtype: of their results.
        c: everybody who was added, without entries.
        squares: ``‖ΔW_k‖²`` by layer, ``(n, *layers, K)``; None where nothing asks for it.
        mass: what each component was multiplied by, ``(R,)`` or ``(n, *layers, R)``; None where
            that was its share.
        first: the factor that all clients share, where there is one, by layer.
    """

    group: Group
    layers: list[str]
    dtype: torch.dtype
    c: Components
    squares: Tensor | None
    mass: Tensor | None
    first: Mapping[str, Tensor]

    def steps(self) -> Iterator[slice]:
        """Some layers at a time: as many as have `AT_ONCE` bytes of sums."""
        held = sum(X.numel() * X.element_size() for X in self.group.added.tensors())
        step = max(1, round(AT_ONCE * len(self.group.names) / max(1, held)))
        for start in range(0, len(self.layers), step):
            yield slice(start, start + step)

    def told(self, option: str, value: Any, at: slice) -> Any:
        """What some layers are told: their own of an option that has one for each."""
        each = option in BY_LAYER and isinstance(value, Tensor) and value.dim() > 0
        return value[at] if each and len(value) == len(self.layers) else value

    def at(self, at: slice, folding: Folding) -> Summed:
        """These of the layers as the method sees them."""
        layers, size, c = self.layers[at], self.group.size, self.c
        squares = None if self.squares is None else self.squares[at]
        c = c.also(A=c.A[at], B=c.B[at])
        if squares is not None:
            c = c.also(statistic=(squares.reshape(-1, len(c.ids)).sum(0),))
        first = [self.first[name] for name in layers if name in self.first]
        places = [self.group.names.index(name) for name in layers]
        shares = Shares(
            self.group.added,
            torch.tensor(places, device=size.device),
            c,
            self.mass if self.mass is None or self.mass.dim() == 1 else self.mass[at],
            squares,
            torch.stack(first) if len(first) == len(layers) else None,
        )
        least = min(size.out_features, size.in_features)
        notes = tuple(
            f"client {id!r}: rank {rank} is above min(out, in) = {least}"
            for id, rank in zip(c.ids, c.ranks, strict=True)
            if rank > least
        )
        c = c.also(sums=shares)
        return Summed((), c.A, c.B, self.dtype, {}, notes, folding, c)


def alike(sums: Sums, state: Mapping[str, Mapping[str, Any]]) -> Iterator[Alike]:
    """All layers, those together that differ in their sums only."""
    forms = {receipt.form: None for receipt in sums.receipts.values() if receipt.counts}
    for group in sums.groups:
        together: dict[Any, list[str]] = {}
        for name in group.names:
            kept = tuple((s[name].rank, s[name].A.dtype) for s in state.values())
            slots = tuple(form.at(name) for form in forms)
            together.setdefault((sums.dtypes[name], kept, slots), []).append(name)
        for layers in together.values():
            yield _everybody(sums, group, layers)


def _everybody(sums: Sums, group: Group, layers: list[str]) -> Alike:
    """Who was added in these layers."""
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
    squares = _squares(sums, there, layers, lead)
    c = Components(A, B, tuple(map(len, there.slots)), weight, slots, there.ids)
    total, apart = (
        (weight, weight) if squares is None else (totals_of(sums, there.ids).sqrt(), squares.sqrt())
    )
    mass = everybody(sums.plan, weight, total, apart)
    # Here once, and not for every few layers: they are handed on.
    client, _ = c.client, c.slot_index
    return Alike(
        group,
        layers,
        sums.dtypes[layers[0]],
        c,
        squares,
        None if mass is None else mass[..., client],
        sums.first,
    )


def _squares(
    sums: Sums, there: Standing, layers: Sequence[str], lead: tuple[int, ...]
) -> Tensor | None:
    """``‖ΔW_k‖²`` by layer, ``(n, *layers, K)``; None where nothing asks for it."""
    if not sums.entry.statistic:
        return None
    count = prod(lead[1:])
    rows = []
    for id in there.ids:
        receipt = sums.receipts[id]
        at = receipt.form.position
        rows.append([receipt.norms[at[n]] if n in at else (0.0,) * count for n in layers])
    squares = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), *lead)
    return squares.movedim(0, -1)


def totals_of(sums: Sums, ids: Sequence[Any]) -> Tensor:
    """``‖ΔW_k‖²`` over all layers, as it was known when the client came."""
    return torch.tensor(
        [total_of(sums.receipts[id]) for id in ids],
        dtype=torch.float64,
    )


def total_of(receipt: Receipt) -> float:
    """``‖ΔW‖²`` over all layers of one client."""
    return sum(square for layer in receipt.norms for square in layer)
