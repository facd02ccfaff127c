"""Clients added up: what is kept of some layers once it is too much to keep everybody."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hetlora_agg.linalg import all_finite, norms
from hetlora_agg.streaming.bounded import Bounded, joined
from hetlora_agg.streaming.plan import Plan
from hetlora_agg.streaming.products import Product

BUFFER = 64
"""Components that are collected before one product: narrower ones leave the matrix units idle."""

USUAL = 1e-15
"""A norm whose square is far from where float32 ends."""

ZERO = -1
"""Key of clients whose mass is zero; they count one each, should everybody's be zero."""

Commit = Callable[[], None]
"""A change that was prepared: it allocates nothing that is not there."""


@dataclass(frozen=True, eq=False)
class Arrival:
    """One client's components of some layers, as they are added.

    Attributes:
        A: ``(L, *layers, r, in_features)``, scaling folded in; r is the largest of its ranks here.
        B: ``(L, *layers, out_features, r)``; components beyond a layer's own rank are zero.
        mass: what each component is multiplied by, ``(L, *layers or ones, r)`` float64.
        slots: the slot of each of the r components.
        key: which factor sums it goes into: its rank where denominators depend on it.
    """

    A: Tensor
    B: Tensor
    mass: Tensor
    slots: tuple[int, ...]
    key: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is held."""
        return [self.A, self.B, self.mass]

    def select(self, layers: Tensor) -> Arrival:
        """Some entries of the first leading dimension; no copy where they are all."""
        if len(layers) == len(self.A):
            return self
        return replace(self, A=self.A[layers], B=self.B[layers], mass=self.mass[layers])


@dataclass
class Added:
    """Sums over clients for a group of layers of one size.

    Masses are taken relative to ``2^exponent``, a power of two at the largest of them, so that
    neither 1e308 nor 5e-324 leaves float64; changing it rounds nothing.

    Attributes:
        plan: what the method needs.
        shape: ``(L, *layers, out_features, in_features)``.
        edges: first slots of the parts that have a denominator of their own, from 0.
        most: largest rank of a truncated state; None keeps dense float64 sums.
        products: part -> ``Σ m_k B_k A_k`` over the slots of the part.
        rows: key -> ``Σ m_k A_k`` by slot, ``(L, *layers, n_slots, in_features)``.
        columns: key -> ``Σ m_k B_k`` by slot, ``(L, *layers, out_features, n_slots)``.
        sizes: what rounding is relative to: ``Σ m_k ‖b‖ ‖a‖`` of a part of the products,
            ``(L, *layers)``; ``Σ m_k ‖·‖`` of every row or column, ``(L, *layers, n_slots)``.
        terms: how many components were added.
        exponent: of the masses; None before the first.
        waiting: clients that came since the last product.
    """

    plan: Plan
    shape: tuple[int, ...]
    edges: tuple[int, ...] = (0,)
    most: int | None = None
    products: dict[int, Tensor | Bounded] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    terms: int = 0
    exponent: int | None = None
    waiting: list[Arrival] = field(default_factory=list)

    def prepared(self, arrivals: Iterable[Arrival], other: Added | None = None) -> Commit:
        """Everything about taking these in that can fail; what is left to do is handed back.

        Args:
            arrivals: clients to take in.
            other: sums of the same layers and plan to add besides.
        """
        waiting = [*self.waiting, *(other.waiting if other else ()), *arrivals]
        enough = sum(len(a.slots) for a in waiting) >= (self.most or BUFFER)
        if not enough and other is None:
            return lambda: vars(self).update(waiting=waiting)
        batch = waiting if enough else []
        exponents = [self.exponent, other.exponent if other else None, *map(exponent_of, batch)]
        exponent = max((e for e in exponents if e is not None), default=None)
        mine, theirs = (
            ratio(self.exponent, exponent),
            ratio(other.exponent if other else None, exponent),
        )
        fresh = replace(
            self, terms=self.terms, exponent=exponent, waiting=[] if enough else waiting
        )
        fresh.terms += (other.terms if other else 0) + sum(len(a.slots) for a in batch)
        more = terms_of(batch, self.plan, self.edges, exponent)
        for name in ("rows", "columns", "sizes"):
            held, added = getattr(self, name), getattr(other, name) if other else {}
            summed = {key: X if mine == 1 else mine * X for key, X in held.items()}
            for pieces, factor in ((added, theirs), (getattr(more, name), 1.0)):
                for key, X in pieces.items():
                    slotted = name != "sizes" or key[0] != "product"
                    dim = SLOT_DIM[name] if slotted else None
                    summed[key] = wider(summed.get(key), X * factor, dim)
            setattr(fresh, name, summed)
        return self._with_products(fresh, more.products, other, mine, theirs)

    def _with_products(
        self,
        fresh: Added,
        more: dict[int, Product],
        other: Added | None,
        mine: float,
        theirs: float,
    ) -> Commit:
        """Truncated sums are made anew; dense ones are added to in place, when it is sure."""
        given = other.products if other else {}
        parts = sorted({*self.products, *given, *more})
        dense: list[tuple[Tensor, Tensor | None, Commit | None]] = []
        products = dict(self.products)
        for part in parts:
            held, added, terms = self.products.get(part), given.get(part), more.get(part)
            if self.most is not None:
                sums = [Bounded.of(terms.factors())] if terms else []
                sums += [held.times(mine)] if isinstance(held, Bounded) else []
                sums += [added.times(theirs)] if isinstance(added, Bounded) else []
                products[part] = joined(sums, self.most)
            else:
                if held is None:
                    like = terms.mass if terms else added
                    assert isinstance(like, Tensor)
                    held = torch.zeros(self.shape, dtype=torch.float64, device=like.device)
                assert isinstance(held, Tensor)
                products[part] = held
                adding = terms.adding_to(held) if terms else None
                dense.append((held, added if isinstance(added, Tensor) else None, adding))
        fresh.products = products

        def commit() -> None:
            for total, addend, adding in dense:
                if mine != 1:
                    total.mul_(mine)
                if addend is not None:
                    total.add_(addend, alpha=theirs)
                if adding is not None:
                    adding()
            vars(self).update(vars(fresh))

        return commit

    def tensors(self) -> list[Tensor]:
        """Everything that is held."""
        held = [*self.rows.values(), *self.columns.values(), *self.sizes.values()]
        for product in self.products.values():
            whole = isinstance(product, Tensor)
            held += [product] if whole else [product.A, product.B, product.tail]  # type: ignore
        return held + [X for a in self.waiting for X in a.tensors]


SLOT_DIM = {"rows": -2, "columns": -1, "sizes": -1}
"""Which dimension of a sum is that of slots."""


@dataclass
class Terms:
    """What some clients add to the sums.

    Attributes:
        products: part -> what is added to its sum.
        rows: see `Added`.
        columns: see `Added`.
        sizes: see `Added`.
    """

    products: dict[int, Product] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[tuple[str, int], Tensor] = field(default_factory=dict)


def terms_of(
    batch: Sequence[Arrival], plan: Plan, edges: Sequence[int], exponent: int | None
) -> Terms:
    """What these clients add to the sums, masses relative to ``2^exponent``."""
    terms = Terms()
    if not batch:
        return terms
    A = torch.cat([a.A for a in batch], dim=-2)
    B = torch.cat([a.B for a in batch], dim=-1)
    leading = A.shape[:-2]
    mass = torch.cat([scaled(a.mass, exponent).expand(*leading, -1) for a in batch], dim=-1)
    slots = [slot for a in batch for slot in a.slots]
    length_A, length_B = _lengths(A, -1), _lengths(B, -2)
    if "stack" in plan.verbs:
        of = [max(i for i, edge in enumerate(edges) if edge <= slot) for slot in slots]
        for part, own in _by(of, A):
            terms.products[part] = Product(own(A, -2), own(B, -1), own(mass, -1))
            terms.sizes["product", part] = own(mass * length_A * length_B, -1).sum(-1)
    if "average_factors" in plan.verbs:
        for key, own in _by([a.key for a in batch for _ in a.slots], A):
            filled = own(torch.tensor(slots, device=A.device), -1)
            slot = torch.arange(1 + int(filled.max()), device=A.device)[:, None] == filled
            weighed = slot * own(mass, -1).unsqueeze(-2)
            terms.rows[key] = weighed @ own(A, -2).double()
            terms.columns[key] = own(B, -1).double() @ weighed.mT
            for name, length in (("rows", length_A), ("columns", length_B)):
                by_slot = weighed @ own(length, -1).unsqueeze(-1)
                terms.sizes[name, key] = by_slot.squeeze(-1)
    return terms


def _lengths(X: Tensor, dim: int) -> Tensor:
    """Euclidean norms in float64; in the factors' own dtype as long as their squares fit it."""
    # Of columns, torch's own norm takes six times as long.
    fast = (X * X).sum(dim).sqrt().double()
    usual = all_finite(fast) and bool(fast.max() > USUAL)
    return fast if usual else norms(X.double(), dim)


def _by(labels: Sequence[int], like: Tensor) -> Iterator[tuple[int, Callable[..., Tensor]]]:
    """Each label, and what picks the components that have it; all of them without a copy."""
    names = sorted(set(labels))
    if len(names) == 1:
        yield names[0], lambda X, dim: X
        return
    for name in names:
        places = [i for i, label in enumerate(labels) if label == name]
        index = torch.tensor(places, device=like.device)
        yield name, lambda X, dim, index=index: X.index_select(dim, index)


def exponent_of(arrival: Arrival) -> int | None:
    """The power of two above the largest mass; None if all are zero."""
    top = float(arrival.mass.max()) if arrival.mass.numel() else 0.0
    return math.frexp(top)[1] if top > 0 else None


def ratio(before: int | None, after: int | None) -> float:
    """What sums are multiplied by when their exponent grows; a power of two."""
    return 1.0 if before is None or after is None else 2.0 ** (before - after)


def scaled(mass: Tensor, exponent: int | None) -> Tensor:
    """``mass / 2^exponent``; in two steps, since the power itself may leave float64."""
    half = -(exponent or 0) // 2
    return mass * 2.0**half * 2.0 ** (-(exponent or 0) - half)


def wider(total: Tensor | None, more: Tensor, dim: int | None) -> Tensor:
    """The sum, in the width of the wider along a dimension."""
    if total is None or dim is None:
        return more if total is None else total + more
    narrow, wide = sorted((total, more), key=lambda X: X.shape[dim])
    wide = wide.clone()
    wide.narrow(dim, 0, narrow.shape[dim]).add_(narrow)
    return wide
