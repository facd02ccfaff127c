"""One client at the door of a running aggregate: read, checked, and folded layer batch by batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetlora_agg.adapters import Adapter
from hetlora_agg.alignment import align
from hetlora_agg.checks import check_choice
from hetlora_agg.errors import InputTypeError, InputValueError, shown
from hetlora_agg.intake import Folding, collect
from hetlora_agg.linalg import exact_arithmetic
from hetlora_agg.streaming.besides import NOTHING, Besides
from hetlora_agg.streaming.receipts import Form, Id, Receipt, digest_of
from hetlora_agg.types import ClientUpdate, from_numpy
from hetlora_agg.validation import admit
from hetlora_agg.weighting import client_squared_norms

ONE = ""
"""What the layer is called where clients send one update and not a mapping of layers."""

Updates = dict[str, ClientUpdate]


@dataclass(frozen=True)
class Size:
    """What a layer must be like on every client.

    Attributes:
        layers: leading dimensions of the factors.
        out_features: rows of B.
        in_features: columns of A.
        device: where the factors are.
    """

    layers: tuple[int, ...]
    out_features: int
    in_features: int
    device: torch.device

    @classmethod
    def of(cls, u: ClientUpdate) -> Size:
        """The size of one update."""
        return cls(tuple(u.A.shape[:-2]), u.B.shape[-2], u.A.shape[-1], u.A.device)

    def __str__(self) -> str:
        """As errors say it."""
        return f"{(*self.layers, self.out_features, self.in_features)} on {self.device}"


@dataclass(frozen=True, eq=False)
class Piece:
    """Some layers of one client that are alike in everything but their entries.

    Attributes:
        names: the layers.
        size: their size.
        slots: the slots that they fill.
        A: ``(n, *layers, r, in_features)``, scaling folded in, aligned.
        B: ``(n, *layers, out_features, r)``.
        squares: ``‖ΔW‖²``, ``(n, *layers)`` float64; None where nothing asks.
    """

    names: tuple[str, ...]
    size: Size
    slots: tuple[int, ...]
    A: Tensor
    B: Tensor
    squares: Tensor | None


@dataclass(frozen=True)
class Door:
    """How clients are read.

    Attributes:
        folding: where the method wants the scaling.
        align: the alignment that it asks for.
        norms: whether it weighs by the norms of the updates.
        max_rank: the largest rank a client may declare, as in `aggregate`.
        on_bad_client: "error" or "drop".
    """

    folding: Folding
    align: str | None
    norms: bool
    max_rank: int | Mapping[Hashable, int] | None
    on_bad_client: str


@dataclass(frozen=True, eq=False)
class Arriving:
    """A client that passed every check of its own.

    Attributes:
        updates: layer -> its update, read; of rank 0 where ``max_rank`` refuses it.
        sent: the same as sent.
        pieces: its layers batch by batch; none if it does not count.
        receipt: what is remembered of it.
        numpy: whether it sent arrays.
        besides: what an adapter holds besides its factors.
    """

    updates: Updates
    sent: Updates
    pieces: tuple[Piece, ...]
    receipt: Receipt
    numpy: bool
    besides: Besides = NOTHING


def as_layers(
    given: Any, id: Id, weight: float | None, scaling: Any, config: Any
) -> tuple[Mapping[str, Any], Besides]:
    """What was sent as a mapping of layers, and tensors besides the factors.

    One update without a name is layer ``ONE``.
    """
    at = f"add: client {id!r}"
    if isinstance(given, Mapping) and all(
        isinstance(X, (Tensor, np.ndarray)) for X in given.values()
    ):
        given = Adapter.from_state_dict(given, config, scalings=scaling, name=at)
    elif scaling is not None or config is not None:
        raise InputTypeError(
            f"{at}: scaling= and config= go with a state dict; a ClientUpdate has its own scaling"
        )
    if isinstance(given, Adapter):
        weight = 1.0 if weight is None else weight
        layers = {layer: given.update(layer, weight, id) for layer in given.layers}
        return layers, Besides.of(given)
    if weight is not None:
        raise InputTypeError(
            f"{at}: weight= goes with an Adapter or a state dict; a ClientUpdate has its own"
        )
    if not isinstance(given, Mapping):
        return {ONE: given}, NOTHING
    if odd := [layer for layer in given if not isinstance(layer, str) or not layer]:
        raise InputTypeError(f"{at}: expected layers by name, got {shown(odd[0])}")
    return given, NOTHING


def read_client(
    given: Mapping[str, Any], id: Id, door: Door, besides: Besides = NOTHING
) -> Arriving:
    """Everything about one client that can be wrong by itself.

    Raises:
        InputTypeError, InputValueError: what is wrong, with layer, found, expected and remedy.
    """
    check_choice("on_bad_client", door.on_bad_client, ("drop", "error"))
    updates: Updates = {}
    sent: Updates = {}
    excluded: str | None = None
    numpy = True
    for layer, one in given.items():
        if isinstance(one, (tuple, list)) and 2 <= len(one) <= 4:
            one = ClientUpdate(*one)
        named = replace(one, id=id) if isinstance(one, ClientUpdate) else one
        (u,), arrays, refused = admit([named], layer or None, door.max_rank, door.on_bad_client)
        updates[layer], numpy = u, numpy and arrays
        sent[layer] = as_tensors(named) if refused else u
        excluded = excluded or next(iter(refused.values()), None)
    weights = sorted({u.weight for u in updates.values()})
    if len(weights) != 1:
        raise InputValueError(
            f"add: client {id!r}: expected one weight in all its layers, got {weights or 'none'}"
        )
    pieces, bad = pieces_of(updates, door, weights[0] > 0 and not excluded)
    if not bad and (where := besides.bad()):
        bad = f"client {id!r}: {where}"
    if bad and door.on_bad_client == "error":
        raise InputValueError(f'{bad}; mend the client, or leave it out with on_bad_client="drop"')
    excluded = excluded or bad
    form = Form.of(updates, besides.tensors)
    digest = digest_of(updates, besides.tensors, besides.factors)
    norms = _norms(pieces, form) if not excluded else ()
    receipt = Receipt(digest, weights[0], form, norms, excluded)
    return Arriving(updates, sent, () if excluded else tuple(pieces), receipt, numpy, besides)


def pieces_of(updates: Updates, door: Door, counts: bool) -> tuple[list[Piece], str | None]:
    """A client's layers in batches, and where the first NaN or Inf is."""
    alike: dict[Any, list[str]] = {}
    for layer, u in updates.items():
        kinds = (u.A.shape, u.A.dtype, u.A.device, u.B.shape, u.B.dtype)
        alike.setdefault((*kinds, u.rank, u.scaling, u.slots), []).append(layer)
    pieces: list[Piece] = []
    bad: str | None = None
    for names in alike.values():
        first = updates[names[0]]
        with exact_arithmetic(first.A.device.type):
            batch = replace(
                first,
                A=torch.stack([updates[name].A for name in names]),
                B=torch.stack([updates[name].B for name in names]),
            )
            intake = collect([batch], names, door.folding)
            bad = bad or next(iter(intake.bad.values()), None)
            if counts and not bad:
                pieces.append(_piece(tuple(names), batch, intake.A, intake.B, door))
    return pieces, bad


def _piece(names: tuple[str, ...], batch: ClientUpdate, A: Tensor, B: Tensor, door: Door) -> Piece:
    """One batch, folded; in float64 wherever folding or what follows would round."""
    size = replace(Size.of(batch), layers=tuple(batch.A.shape[1:-2]))
    rank, squares = batch.rank or 0, None
    if batch.scaling != 1 or door.align or door.norms:
        exact = replace(batch, A=batch.A.double(), B=batch.B.double())
        c = collect([exact], names, replace(door.folding, common=False)).components()
        c = align(c, door.align)
        if door.norms:
            squares = client_squared_norms(c).squeeze(-1)
        A, B = c.A, c.B
    return Piece(names, size, tuple(batch.slots or ()), A[..., :rank, :], B[..., :rank], squares)


def _norms(pieces: Sequence[Piece], form: Form) -> tuple[tuple[float, ...], ...]:
    """Squared norms by layer, in the form's order."""
    known: dict[str, tuple[float, ...]] = {}
    for piece in pieces:
        if piece.squares is not None:
            rows = piece.squares.reshape(len(piece.names), -1).tolist()
            known.update(zip(piece.names, map(tuple, rows), strict=True))
    return tuple(known[layer] for layer in form.layers) if known else ()


def as_tensors(update: ClientUpdate) -> ClientUpdate:
    """The update with tensors in it."""
    A, B = (X if isinstance(X, Tensor) else from_numpy(X) for X in (update.A, update.B))
    return replace(update, A=A, B=B)


def copied(updates: Updates) -> Updates:
    """The updates in memory of their own: the caller's tensors may change after the call."""
    return {layer: replace(u, A=u.A.clone(), B=u.B.clone()) for layer, u in updates.items()}


def check_sizes(
    updates: Updates, sizes: Mapping[str, Size], id: Id, missing: str
) -> dict[str, Size]:
    """The client's layers against those that are known; all that are known from now on."""
    every = dict(sizes)
    for layer, u in updates.items():
        found, known = Size.of(u), sizes.get(layer)
        at = f"add: client {id!r}" + (f", layer {layer!r}" if layer else "")
        if known is None and sizes and missing == "error":
            raise InputValueError(
                f"{at}: no other client has this layer; say what that means with "
                'missing="zero" or missing="renormalise"'
            )
        if known is not None and found != known:
            raise InputValueError(
                f"{at}: expected (*layers, out_features, in_features) = {known} as the others "
                f"have, got {found}; all clients of a layer must have its size"
            )
        every[layer] = found
    absent = [layer for layer in sizes if layer not in updates]
    if absent and missing == "error":
        raise InputValueError(
            f"add: client {id!r} lacks layer {absent[0]!r}; say what that means with "
            'missing="zero" or missing="renormalise"'
        )
    return every
