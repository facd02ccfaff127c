"""Layers of one size whose clients are added up together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hetlora_agg.streaming.added import ZERO, Added, Arrival
from hetlora_agg.streaming.arriving import Piece, Size
from hetlora_agg.streaming.bounded import Bounded
from hetlora_agg.streaming.plan import Plan

Masses = Callable[[Piece], Tensor]
"""What each component of a piece is multiplied by, ``(n, *layers or ones, r)`` float64."""


@dataclass(eq=False)
class Group:
    """Layers of one size, and the sums over their clients.

    Attributes:
        names: the layers, along the first dimension of the sums.
        size: what they have in common.
        added: the sums.
    """

    names: tuple[str, ...]
    size: Size
    added: Added

    @classmethod
    def empty(
        cls, names: Iterable[str], size: Size, plan: Plan, edges: tuple[int, ...], most: int | None
    ) -> Group:
        """A group that nobody was added to."""
        names = tuple(names)
        shape = (len(names), *size.layers, size.out_features, size.in_features)
        return cls(names, size, Added(plan, shape, edges, most))

    def arrivals(self, pieces: Iterable[Piece], masses: Masses) -> list[Arrival]:
        """One client's components of these layers, ready to be added."""
        own = [piece for piece in pieces if piece.size == self.size]
        ranked = self.added.plan.parts == "rank"
        # Leading slots of several lengths make one batch, padded with zeros.
        alike: dict[object, list[Piece]] = {}
        for piece in own:
            prefix = piece.slots == tuple(range(len(piece.slots))) and not ranked
            alike.setdefault("prefix" if prefix else piece.slots, []).append(piece)
        arrived = []
        for together in alike.values():
            longest = max(together, key=lambda piece: len(piece.slots))
            places = [[self.names.index(name) for name in piece.names] for piece in together]
            mass = self._laid([masses(piece) for piece in together], places, ())
            A = self._laid([piece.A for piece in together], places, (-2,))
            B = self._laid([piece.B for piece in together], places, (-1,))
            key = len(longest.slots) if ranked else 0
            arrival = Arrival(A, B, mass, longest.slots, key)
            arrived.append(arrival)
            if self.added.plan.mass in ("norm", "layer norm") and bool((mass == 0).any()):
                arrived.append(replace(arrival, mass=(mass == 0).double(), key=ZERO))
        return arrived

    def _laid(
        self, pieces: Sequence[Tensor], places: Sequence[Sequence[int]], dims: tuple[int, ...]
    ) -> Tensor:
        """The pieces on the group's first dimension, zeros elsewhere and where they are short."""
        (dim,) = dims or (-1,)
        if len(pieces) == 1 and list(places[0]) == list(range(len(self.names))):
            return pieces[0]
        shape = list(pieces[0].shape)
        shape[0], shape[dim] = len(self.names), max(X.shape[dim] for X in pieces)
        dtype = max((X.dtype for X in pieces), key=lambda d: d.itemsize)
        laid = torch.zeros(shape, dtype=dtype, device=pieces[0].device)
        for X, rows in zip(pieces, places, strict=True):
            part = laid.narrow(dim, 0, X.shape[dim])
            part[torch.tensor(rows, device=X.device)] = X.to(dtype)
        return laid

    def widened(self, names: Sequence[str]) -> Group:
        """The same sums with layers in this order; nothing was added to those that are new."""
        if tuple(names) == self.names:
            return self
        known = {name: i for i, name in enumerate(self.names)}
        new = [i for i, name in enumerate(names) if name in known]
        old = [known[name] for name in names if name in known]

        def wide(X: Tensor) -> Tensor:
            full = X.new_zeros((len(names), *X.shape[1:]))
            full[torch.tensor(new, device=X.device)] = X[torch.tensor(old, device=X.device)]
            return full

        added = self.added
        return Group(
            tuple(names),
            self.size,
            replace(
                added,
                shape=(len(names), *added.shape[1:]),
                products={
                    part: wide(P) if isinstance(P, Tensor) else _each(P, wide)
                    for part, P in added.products.items()
                },
                rows={key: wide(X) for key, X in added.rows.items()},
                columns={key: wide(X) for key, X in added.columns.items()},
                sizes={key: wide(X) for key, X in added.sizes.items()},
                waiting=[
                    replace(a, A=wide(a.A), B=wide(a.B), mass=wide(a.mass)) for a in added.waiting
                ],
            ),
        )

    def cloned(self) -> Group:
        """The same with memory of its own."""
        products = {
            part: P.clone() if isinstance(P, Tensor) else P
            for part, P in self.added.products.items()
        }
        return replace(self, added=replace(self.added, products=products))


def _each(P: Bounded, change: Callable[[Tensor], Tensor]) -> Bounded:
    return Bounded(change(P.A), change(P.B), change(P.tail))


def by_size(sizes: Mapping[str, Size]) -> dict[Size, list[str]]:
    """Layers of equal size, in the order in which they came."""
    alike: dict[Size, list[str]] = {}
    for name, size in sizes.items():
        alike.setdefault(size, []).append(name)
    return alike
