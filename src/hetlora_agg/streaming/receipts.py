"""Who was added: one receipt per client, enough to tell duplicates, impostors and absentees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.errors import InputTypeError, InputValueError, shown
from hetlora_agg.types import ClientUpdate
from hetlora_agg.validation import id_order

Id = str | int
"""What a client is called: it has to survive a checkpoint."""


@dataclass(frozen=True)
class Form:
    """The layers, ranks and slots of a client; one object for all clients that are alike.

    Attributes:
        layers: names, in the order sent.
        ranks: the rank in each.
        slots: the slots in each.
        extras: tensors besides the factors, by their key in files.
    """

    layers: tuple[str, ...]
    ranks: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...]
    extras: tuple[str, ...] = ()

    @classmethod
    def of(cls, updates: Mapping[str, ClientUpdate], extras: Iterable[str] = ()) -> Form:
        """The form of one client's updates."""
        return cls(
            tuple(updates),
            tuple(u.rank or 0 for u in updates.values()),
            tuple(tuple(u.slots or ()) for u in updates.values()),
            tuple(extras),
        )

    @cached_property
    def position(self) -> dict[str, int]:
        """Layer -> where it stands."""
        return {layer: i for i, layer in enumerate(self.layers)}

    def at(self, layer: str) -> tuple[int, ...] | None:
        """The slots in a layer, None where the client lacks it."""
        i = self.position.get(layer)
        return None if i is None else self.slots[i]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is remembered of one client.

    Attributes:
        digest: SHA-256 of everything it sent: entries, ranks, weight, scalings, slots.
        weight: its weight; 0 was validated and counts as absent.
        form: its layers, ranks and slots.
        norms: the squared norm of its update, entry by entry of each layer in turn, for methods
            that weigh by it.
        excluded: why it was left out, or None.
    """

    digest: str
    weight: float
    form: Form
    norms: tuple[tuple[float, ...], ...] = ()
    excluded: str | None = None

    @property
    def counts(self) -> bool:
        """Whether anything of the client is in the sums."""
        return self.excluded is None and self.weight > 0


@dataclass(frozen=True, eq=False)
class Standing:
    """Who stands in one layer, in the order of ids.

    Attributes:
        ids: the clients.
        weights: their weights.
        slots: their slots; none where a client lacks the layer and counts as zero.
    """

    ids: tuple[Id, ...]
    weights: tuple[float, ...]
    slots: tuple[tuple[int, ...], ...]


def standing(receipts: Mapping[Id, Receipt], layer: str, missing: str) -> Standing:
    """Who counts in a layer under the policy for clients that lack it."""
    rows = []
    for id in in_order(receipts):
        receipt = receipts[id]
        slots = receipt.form.at(layer)
        if receipt.counts and (slots is not None or missing == "zero"):
            rows.append((id, receipt.weight, slots or ()))
    return Standing(
        tuple(id for id, _, _ in rows),
        tuple(weight for _, weight, _ in rows),
        tuple(slots for _, _, slots in rows),
    )


def in_order(ids: Iterable[Id]) -> list[Id]:
    """Ids in the order in which `aggregate` takes them."""
    return sorted(ids, key=lambda id: id_order(ClientUpdate(None, None, id=id)))


def digest_of(
    updates: Mapping[str, ClientUpdate],
    extras: Mapping[str, Tensor] = MappingProxyType({}),
    factors: Mapping[str, float] = MappingProxyType({}),
) -> str:
    """SHA-256 of one client's updates; equal for equal bits, whatever strides and layer order.

    Args:
        updates: layer -> its update.
        extras: tensors besides the factors.
        factors: what each of those is multiplied by.
    """
    sha = hashlib.sha256()
    for name, X in sorted(extras.items()):
        sha.update(repr(("extra", name, factors[name].hex())).encode())
        sha.update(f"{X.dtype}{tuple(X.shape)}".encode())
        sha.update(raw(X))
    for layer, u in sorted(updates.items()):
        head = (layer, u.rank, float(u.weight).hex(), float(u.scaling).hex(), u.slots)
        sha.update(repr(head).encode())
        for X in (u.A, u.B):
            sha.update(f"{X.dtype}{tuple(X.shape)}".encode())
            sha.update(raw(X))
    return sha.hexdigest()


def digest_of_tensor(X: Tensor) -> str:
    """SHA-256 of one tensor's dtype, shape and entries."""
    return hashlib.sha256(f"{X.dtype}{tuple(X.shape)}".encode() + raw(X)).hexdigest()


def raw(X: Tensor) -> memoryview:
    """A tensor's bytes, row by row; a view where it can be one."""
    flat = X.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def checked_id(id: Hashable | None) -> Id:
    """The id; a string or an integer, since it has to survive a checkpoint."""
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise InputTypeError(
            f"add: id: expected a string or an integer, got {shown(id)}; without one a client "
            "that is sent twice would count twice"
        )
    return id


def absent(wanted: Iterable[Id], there: Container[Any]) -> str:
    """The ids that are not there, up to five by name; "" if none."""
    missing = in_order(id for id in wanted if id not in there)
    return _named(missing)


def _named(ids: Sequence[Id]) -> str:
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return ", ".join(map(shown, ids[:5])) + more


def pairs_of(
    source: Mapping[Any, Any] | Iterable[tuple[Any, Any]] | Callable[[Any], Any],
    wanted: Iterable[Id],
) -> Iterator[tuple[Id, Any]]:
    """The wanted clients' updates from a mapping, from pairs, or from a function of the id."""
    every = set(wanted)
    if callable(source):
        yield from ((id, source(id)) for id in in_order(every))
        return
    pairs = source.items() if isinstance(source, Mapping) else source
    yield from ((id, update) for id, update in pairs if id in every)


def split(
    ids: Iterable[Hashable], receipts: Mapping[Id, Receipt]
) -> tuple[set[Id], dict[Id, Receipt]]:
    """Who is to be left out, and the receipts of everybody else."""
    gone = {checked_id(id) for id in ids}
    if unknown := absent(gone, receipts):
        raise InputValueError(f"without: never added: {unknown}")
    return gone, {id: r for id, r in receipts.items() if id not in gone}


def check_nobody_lacks(wanted: Iterable[Id], there: Mapping[Id, Any]) -> None:
    """A source must have everybody who was added."""
    if missing := absent(wanted, there):
        raise InputValueError(f"without: the source lacks {missing}, who were added")


def check_late(id: Id, round: int, current: int | None, stale: str) -> None:
    """A client of another round: refused unless it is to be left out."""
    if stale == "error":
        raise InputValueError(
            f"add: client {id!r} trained in round {round}, this is round {current}; leave it "
            'out with stale="skip", or let it start again from the last result'
        )


def check_content(id: Id, wanted: Receipt, found: Receipt) -> None:
    """What was sent again must be what was sent before."""
    if found.digest != wanted.digest:
        raise InputValueError(
            f"without: client {id!r}: the source has other content than was added; find the update "
            "that was, or start again"
        )


def was_added(id: Id, found: Receipt, receipts: Mapping[Id, Receipt]) -> bool:
    """Whether the client is there with this content; an error if with other content."""
    if id not in receipts:
        return False
    if receipts[id].digest != found.digest:
        raise InputValueError(
            f"add: client {id!r} was added before with other content; a client counts once a "
            "round. To replace it, rebuild without it and add the new one"
        )
    return True
