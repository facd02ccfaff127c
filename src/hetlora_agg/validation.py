"""The door: one layer's updates read, checked and put in order before any arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetlora_agg.checks import FLOATS, as_integer, as_list, as_number
from hetlora_agg.errors import InputTypeError, InputValueError, shown
from hetlora_agg.types import ClientUpdate, LowRank, from_numpy

Registered = int | Mapping[Hashable, int] | None


def read_updates(
    updates: Iterable[Any], layer: str | None = None
) -> tuple[list[ClientUpdate], bool]:
    """Every update checked, and whether all were numpy; see `admit`."""
    return admit(updates, layer)[:2]


def admit(
    updates: Iterable[Any],
    layer: str | None = None,
    max_rank: Registered = None,
    on_bad_client: str = "error",
) -> tuple[list[ClientUpdate], bool, dict[Hashable, str]]:
    """Every update as a checked `ClientUpdate` of tensors, with rank, weight and slots filled in.

    Args:
        updates: `ClientUpdate`s or tuples ``(A, B)``, ``(A, B, rank)``, ``(A, B, rank, weight)``.
        layer: the layer's name, for errors.
        max_rank: the largest rank a client may declare, one for all or by id.
        on_bad_client: "drop" lists who is above it, anything else is an error for it.

    Returns:
        The updates in the order given, sorted by id if all have one; whether all were numpy; who is
        above ``max_rank``, with the reason: such a client keeps its place, at rank 0.

    Raises:
        InputTypeError, InputValueError: the first thing wrong: where, found, expected, remedy.
    """
    listed = [_as_update(k, given, layer) for k, given in enumerate(_listed(updates, layer))]
    read = [_read(k, update, layer) for k, update in enumerate(listed)]
    if not read:
        raise InputValueError(f"{_at(layer)}no client updates; pass at least one (A, B)")
    _check_common(read, layer)
    _check_ids(read, layer)
    refused = _above_registered(read, layer, max_rank)
    if refused and str(on_bad_client) != "drop":
        raise InputValueError(next(iter(refused.values())))
    # A client's place is its name; what it sent is not looked at again.
    for k, (name, u) in enumerate(zip(_names(read), read, strict=True)):
        if name in refused:
            read[k] = replace(u, A=u.A[..., :0, :], B=u.B[..., :0], rank=0, slots=())
    _check_slots(read, layer)
    if all(update.id is not None for update in read):
        read.sort(key=id_order)
    return read, all(isinstance(X, np.ndarray) for u in listed for X in (u.A, u.B)), refused


def where(position: int, id: Hashable | None, layer: str | None, factor: str = "") -> str:
    """How errors name the place: client, layer, factor."""
    client = f"client {position}" if id is None else f"client {position} (id {shown(id)})"
    return ", ".join(filter(None, [client, layer and f"layer {layer!r}", factor])) + ": "


def _at(layer: str | None) -> str:
    return f"layer {layer!r}: " if layer else ""


def _listed(updates: Iterable[Any], layer: str | None) -> list[Any]:
    if isinstance(updates, Mapping):
        raise InputTypeError(
            f"{_at(layer)}expected a list of client updates, got a mapping; "
            + (
                "aggregate_layers takes {layer: [update of every client]}, not clients' state dicts"
                if layer
                else "for {layer: [update of every client]} call aggregate_layers"
            )
        )
    single = isinstance(updates, (ClientUpdate, LowRank, Tensor, np.ndarray, str, bytes))
    if single or not isinstance(updates, Iterable):
        raise InputTypeError(
            f"{_at(layer)}expected a list of client updates, [(A, B), …], got "
            f"{type(updates).__name__}"
        )
    return list(updates)


def _as_update(k: int, given: Any, layer: str | None) -> ClientUpdate:
    if isinstance(given, (tuple, list)) and 2 <= len(given) <= 4:
        given = ClientUpdate(*given)
    if not isinstance(given, ClientUpdate):
        size = f" of {len(given)} items" if isinstance(given, (tuple, list)) else ""
        hint = ""
        if isinstance(given, Mapping):
            hint = "; a state dict goes in layer by layer: aggregate_layers({layer: [(A, B), …]})"
        elif isinstance(given, (Tensor, np.ndarray)):
            hint = "; one client goes in a list too: [(A, B)]"
        raise InputTypeError(
            f"{where(k, None, layer)}expected a ClientUpdate, (A, B), (A, B, rank) or "
            f"(A, B, rank, weight), got {type(given).__name__}{size}{hint}"
        )
    return given


def _read(k: int, given: ClientUpdate, layer: str | None) -> ClientUpdate:
    A = _tensor(given.A, where(k, given.id, layer, "lora_A"))
    B = _tensor(given.B, where(k, given.id, layer, "lora_B"))
    here = where(k, given.id, layer)
    _check_shapes(A, B, here)
    rank = _rank(given.rank, A.shape[-2], here)
    return replace(
        given,
        A=A,
        B=B,
        rank=rank,
        weight=as_number(given.weight, f"{here}weight", zero=True),
        scaling=as_number(given.scaling, f"{here}scaling", zero=False),
        slots=_slots(given.slots, rank, here),
    )


def _tensor(X: Any, here: str) -> Tensor:
    if isinstance(X, np.ndarray):
        if X.dtype.kind != "f" or X.dtype.itemsize > 8:
            raise InputTypeError(f"{here}expected float16, float32 or float64, got {X.dtype}")
        return from_numpy(X)
    if not isinstance(X, Tensor):
        raise InputTypeError(
            f"{here}expected a torch tensor or a numpy array, got {type(X).__name__}"
        )
    if X.is_nested or X.layout != torch.strided or X.is_meta:
        kind = "nested" if X.is_nested else "meta" if X.is_meta else f"{X.layout}"
        raise InputTypeError(f"{here}expected a dense tensor with data, got a {kind} one")
    if X.dtype not in FLOATS:
        raise InputTypeError(
            f"{here}expected float16, bfloat16, float32 or float64, got {X.dtype}; convert it "
            "with .float()"
        )
    return X.detach()


def _check_shapes(A: Tensor, B: Tensor, here: str) -> None:
    shapes = f"lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)}"
    for factor, X in (("lora_A", A), ("lora_B", B)):
        if X.dim() < 2 or 0 in X.shape:
            raise InputValueError(
                f"{here}{factor}: expected at least two dimensions, none of them 0, got "
                f"{tuple(X.shape)}"
            )
    if A.shape[:-2] != B.shape[:-2]:
        raise InputValueError(f"{here}leading dimensions (*layers) differ: {shapes}")
    if A.shape[-2] == B.shape[-1]:
        return
    guess = "check which client sent which"
    if A.shape[-1] == B.shape[-2]:
        guess = "the two look swapped: the order is (A, B)"
    elif A.shape[-1] == B.shape[-1]:
        guess = "lora_A looks transposed: pass lora_A.mT"
    elif A.shape[-2] == B.shape[-2]:
        guess = "lora_B looks transposed: pass lora_B.mT"
    raise InputValueError(
        f"{here}expected lora_A (*layers, rank, in_features) and lora_B (*layers, out_features, "
        f"rank) of one rank, got {shapes}; {guess}"
    )


def _rank(declared: Any, rows: int, here: str) -> int:
    if declared is None:
        return rows
    rank = as_integer(declared, f"{here}rank")
    if not 1 <= rank <= rows:
        raise InputValueError(
            f"{here}rank: expected 1 to {rows}, the rows of lora_A, got {rank}; leave rank out to "
            "take it from lora_A (in a tuple the third item is the rank, the fourth the weight)"
        )
    return rank


def _slots(slots: Any, rank: int, here: str) -> tuple[int, ...]:
    if slots is None:
        return tuple(range(rank))
    listed = tuple(
        as_integer(slot, f"{here}slots: expected integers from 0, got {shown(slots)}")
        for slot in as_list(slots, f"{here}slots: expected integers from 0, got {shown(slots)}")
    )
    if len(listed) != rank or len(set(listed)) != rank or min(listed) < 0:
        raise InputValueError(
            f"{here}slots: expected {rank} distinct integers from 0, one for each component, got "
            f"{listed}"
        )
    return listed


def _check_common(updates: list[ClientUpdate], layer: str | None) -> None:
    """Sizes, leading dimensions and device must be those of the others."""

    def sizes(update: ClientUpdate) -> tuple[Any, ...]:
        return (tuple(update.A.shape[:-2]), update.B.shape[-2], update.A.shape[-1])

    # The odd one out is named, not the one that happens to come second.
    usual, _ = Counter(map(sizes, updates)).most_common(1)[0]
    for k, update in enumerate(updates):
        found = sizes(update)
        if found != usual:
            (layers, out, columns), (layers_found, out_found, columns_found) = usual, found
            hint = "all clients of a layer must have its size"
            lone = update.A.shape[-2]
            if (out, columns) == (columns_found, out_found) or lone == out == columns:
                hint = "it looks transposed: the order is (A, B) with A (rank, in_features)"
            if layers != layers_found:
                hint = "leading dimensions (*layers) must be equal on all clients"
            raise InputValueError(
                f"{where(k, update.id, layer)}expected (*layers, out_features, in_features) = "
                f"{(*layers, out, columns)} as the others have, got "
                f"{(*layers_found, out_found, columns_found)}; {hint}"
            )
    devices = Counter(X.device for update in updates for X in (update.A, update.B))
    home = devices.most_common(1)[0][0]
    for k, update in enumerate(updates):
        for factor, X in (("lora_A", update.A), ("lora_B", update.B)):
            if X.device != home:
                raise InputValueError(
                    f"{where(k, update.id, layer, factor)}is on {X.device}, the others are on "
                    f"{home}; move it with .to({str(home)!r})"
                )


def _check_slots(updates: list[ClientUpdate], layer: str | None) -> None:
    """A slot far beyond any rank would cost memory for all the empty ones before it."""
    first = updates[0]
    components = sum(update.A.shape[-2] for update in updates)
    most = max(first.B.shape[-2], first.A.shape[-1], components)
    for k, update in enumerate(updates):
        slot = max(update.slots or (0,))
        if slot >= most:
            raise InputValueError(
                f"{where(k, update.id, layer)}slot {slot} is beyond {most}, more than any global "
                "rank; number slots from 0"
            )


def _check_ids(updates: list[ClientUpdate], layer: str | None) -> None:
    # A client without an id is called by its position, which must not be another client's id.
    try:
        names = Counter(_names(updates))
    except (TypeError, RecursionError) as error:
        raise InputTypeError(f"{_at(layer)}ids must be hashable: {error}") from error
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputValueError(
            f"{_at(layer)}id {shown(twice[0])} is given to more than one client; ids must be unique"
        )


def _above_registered(
    updates: list[ClientUpdate], layer: str | None, max_rank: Registered
) -> dict[Hashable, str]:
    """A rank or a slot above the registered one would be owned by that client alone."""
    if max_rank is None:
        return {}
    names = _names(updates)
    given = max_rank if isinstance(max_rank, Mapping) else dict.fromkeys(names, max_rank)
    at = f"{_at(layer)}max_rank="
    registered = {name: as_integer(most, at, at_least=1) for name, most in given.items()}
    highest = max(registered.values(), default=0)
    refused: dict[Hashable, str] = {}
    for k, (name, update) in enumerate(zip(names, updates, strict=True)):
        rank, most, slot = update.rank or 0, registered.get(name), max(update.slots or (0,))
        if most is None:
            why = f"not in max_rank=; register its rank under {shown(name)}"
        elif rank > most:
            why = f"declares rank {rank}, above the registered {most}; truncate or raise max_rank="
        elif slot >= highest:
            why = f"fills slot {slot} (from 0), above the registered {highest}; raise max_rank="
        else:
            continue
        refused[name] = f"{where(k, update.id, layer)}{why}"
    return refused


def _names(updates: list[ClientUpdate]) -> list[Hashable]:
    """What clients are called: by their id, or their position in the list."""
    return [k if update.id is None else update.id for k, update in enumerate(updates)]


def id_order(update: ClientUpdate) -> tuple[str, Any]:
    """Sort key for ids of any type: numbers first, then by type and value."""
    id = update.id
    number = isinstance(id, (int, float)) and not isinstance(id, bool)
    return ("", id) if number else (type(id).__name__, id if isinstance(id, str) else repr(id))
