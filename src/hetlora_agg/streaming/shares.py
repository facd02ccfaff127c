"""Sums as a method sees them: the answers to the verbs that combine clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hetlora_agg.components import BLOCK, Components
from hetlora_agg.errors import InputValueError
from hetlora_agg.linalg import norms
from hetlora_agg.streaming.added import (
    ZERO,
    Added,
    exponent_of,
    ratio,
    scaled,
    terms_of,
    wider,
)
from hetlora_agg.streaming.bounded import Bounded
from hetlora_agg.streaming.plan import Plan
from hetlora_agg.types import LowRank

AGREEMENT = 1e-11
"""Largest difference of a share from its sum's, relative to the largest share."""

LEAST_MASS = 2.0**-400
"""Of the largest in the group: far below, a layer's sum would leave float64."""

UNIT = 2.0**-53
"""Largest relative error of one rounding in float64."""

ROUNDINGS = 16
"""Roundings of a term apart from adding it up: fold, mass, products, ratio."""


@dataclass
class Shares:
    """Some layers' sums, the method's shares applied.

    Attributes:
        added: the sums.
        layers: which of its layers, ``(n,)``.
        c: everybody who was added, as components without entries.
        mass: what each component was multiplied by, ``(R,)`` or ``(n, *layers, R)``; None where
            that was its share itself.
        squares: squared norm of each client's update by layer, for methods that ask.
        first: the factor that all clients share, for methods that ask.
        error: bound on ``‖Σ − exact Σ‖`` of what was handed out, ``(n, *layers)``.
    """

    added: Added
    layers: Tensor
    c: Components
    mass: Tensor | None
    squares: Tensor | None = None
    first: Tensor | None = None
    error: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Bring held and waiting sums to one exponent."""
        waiting = [a.select(self.layers) for a in self.added.waiting]
        exponents = [self.added.exponent, *map(exponent_of, waiting)]
        self.exponent = max((e for e in exponents if e is not None), default=None)
        self.held = ratio(self.added.exponent, self.exponent)
        self.more = terms_of(waiting, self.added.plan, self.added.edges, self.exponent)
        self.terms = self.added.terms + sum(len(a.slots) for a in waiting) + ROUNDINGS
        if self.mass is not None and self.mass.dim() > 1:
            largest = self.mass.amax(-1)
            if bool(((largest > 0) & (scaled(largest, self.exponent) < LEAST_MASS)).any()):
                raise InputValueError(
                    f"layers of {self.added.shape[-2]}×{self.added.shape[-1]}: the norms of one "
                    "layer's updates are less than 1e-120 of another's, and sums of layers of one "
                    "size share an exponent; add the one layer to a running aggregate of its own"
                )

    @property
    def lead(self) -> tuple[int, ...]:
        """``(n, *layers)``."""
        return (len(self.layers), *self.added.shape[1:-2])

    def stack(self, share: Tensor) -> LowRank:
        """``Σ_parts d_part Σ m_k B_k A_k``, d the method's share per mass."""
        edges = torch.tensor(self.added.edges)
        part = torch.bucketize(self.c.slot_index.cpu(), edges, right=True) - 1
        d = self._ratios(share, part, len(edges))
        error = d.new_zeros(())
        factors: list[LowRank] = []
        total: Tensor | None = None
        for p in sorted({*self.added.products, *self.more.products}):
            factor = d[..., p]
            error = error + factor * self._rounding("product", p)
            held, waiting = self.added.products.get(p), self.more.products.get(p)
            if waiting is not None:
                weighed = waiting.factors()
                factors.append(LowRank(weighed.A, factor[..., None, None] * weighed.B))
            if isinstance(held, Bounded):
                known = held.select(self.layers).times(self.held)
                error = error + factor * known.tail
                factors.append(LowRank(known.A, factor[..., None, None] * known.B))
            elif held is not None:
                addend = (self.held * factor)[..., None, None] * self._of(held)
                total = addend if total is None else total.add_(addend)
        self.error["stack"] = error
        return self._as_factors(total, factors)

    def average_factors(self, share: Tensor) -> LowRank:
        """``Σ_keys d_key,slot Σ m_k A_k[slot]``, B likewise."""
        keys = sorted({*self.added.rows, *self.more.rows, ZERO, 0})
        label, width = self._labels(keys), self.c.n_slots
        cells = label * width + self.c.slot_index.cpu()
        d = self._ratios(share, cells, len(keys) * width)
        d = d.reshape(*d.shape[:-1], len(keys), width)
        A: Tensor | None = None
        B: Tensor | None = None
        size_A: Tensor | None = None
        size_B: Tensor | None = None
        for i, key in enumerate(keys):
            if key not in self.added.rows and key not in self.more.rows:
                continue
            # A group is as wide as its widest layer, or as a client of weight 0.
            rows = self._sum("rows", key, -2)[..., :width, :]
            columns = self._sum("columns", key, -1)[..., :width]
            factor = d[..., i, : rows.shape[-2]]
            A = wider(A, factor.unsqueeze(-1) * rows, -2)
            B = wider(B, factor.unsqueeze(-2) * columns, -1)
            size_A = wider(size_A, factor * self._size("rows", key)[..., :width], -1)
            size_B = wider(size_B, factor * self._size("columns", key)[..., :width], -1)
        if A is None or B is None or size_A is None or size_B is None:
            raise InputValueError("no client is left; pass at least one with a positive weight")
        if self.first is not None:
            # Taken whole, not averaged: its rows are longer than their mean over all clients.
            whole = norms(self.first[..., :width, :], -1)
            size_A, size_B = torch.maximum(size_A, whole), torch.maximum(size_B, whole)
        self.error["average_factors"] = 2 * UNIT * self.terms * (size_A * size_B).sum(-1)
        missing = width - A.shape[-2]
        if missing > 0:
            A = torch.nn.functional.pad(A, (0, 0, 0, missing))
            B = torch.nn.functional.pad(B, (0, missing))
        return LowRank(A, B)

    def common(self, factor: str) -> Tensor:
        """The factor of the first client in each slot."""
        assert self.first is not None
        rows = self.first[..., : self.c.n_slots, :]
        return rows if factor == "A" else rows.mT

    def aligned(self, c: Components, to: str | None) -> Components:
        """The same: clients were aligned as they came."""
        return c

    def squared_norms(self) -> Tensor:
        """Those of the receipts."""
        assert self.squares is not None
        return self.squares

    def _labels(self, keys: Sequence[int]) -> Tensor:
        """Which of the keys each component went under."""
        if self.added.plan.parts == "rank":
            places = {key: i for i, key in enumerate(keys)}
            own = torch.tensor([places.get(rank, 0) for rank in self.c.ranks])
            return own[self.c.client.cpu()]
        usual, zero = keys.index(0), keys.index(ZERO)
        if self.mass is None:
            return torch.full((len(self.c.slots),), usual)
        return torch.where(self.mass.cpu() > 0, usual, zero)

    def _ratios(self, share: Tensor, label: Tensor, labels: int) -> Tensor:
        """Share per mass, one number for everything that was added up together."""
        share = share.cpu()
        mass = share if self.mass is None else self.mass.cpu()
        shape = max((share.shape, mass.shape, label.shape), key=len)
        share, mass, label = share.expand(shape), mass.expand(shape), label.expand(shape)
        tops, sums = torch.zeros(2, *shape[:-1], labels, dtype=torch.float64)
        # Block by block: of ten thousand clients every whole array is some megabytes.
        blocks = [torch.split(X, BLOCK, -1) for X in (share, mass, label)]
        for own, m, of in zip(*blocks, strict=True):
            counted = self._counted(m)
            tops.scatter_add_(-1, of, torch.where(counted > 0, own, 0.0))
            sums.scatter_add_(-1, of, counted)
        d = torch.where(sums > 0, tops / sums, 0.0)
        most = AGREEMENT * share.abs().amax(-1, keepdim=True)
        for own, m, of in zip(*blocks, strict=True):
            if bool(((own - d.gather(-1, of) * self._counted(m)).abs() > most).any()):
                raise InputValueError(
                    "result: what a client counts for depends on the others in a way that was not "
                    "known when they were added; give every client's rank and weight beforehand "
                    "with roster="
                )
        device = self.layers.device
        return d.to(device)

    def _counted(self, mass: Tensor) -> Tensor:
        """What components were multiplied by, relative to ``2^exponent``; 1 where that is 0."""
        counted = scaled(mass, self.exponent)
        if self.mass is not None and self.added.plan.mass in ("norm", "layer norm"):
            one = scaled(torch.ones((), dtype=torch.float64), self.exponent)
            counted = torch.where(mass > 0, counted, one)
        return counted

    def _of(self, X: Tensor) -> Tensor:
        """These layers' entries; no copy where they are all."""
        return X if len(self.layers) == len(X) else X[self.layers]

    def _sum(self, name: str, key: int, dim: int) -> Tensor:
        """Held and waiting together."""
        held, more = getattr(self.added, name).get(key), getattr(self.more, name).get(key)
        parts = [self.held * self._of(held)] if held is not None else []
        parts += [more] if more is not None else []
        return parts[0] if len(parts) == 1 else wider(parts[0], parts[1], dim)

    def _size(self, name: str, key: int) -> Tensor:
        held, more = self.added.sizes.get((name, key)), self.more.sizes.get((name, key))
        parts = [self.held * self._of(held)] if held is not None else []
        parts += [more] if more is not None else []
        if len(parts) == 1:
            return parts[0]
        return wider(parts[0], parts[1], None if name == "product" else -1)

    def _rounding(self, name: str, key: int) -> Tensor:
        return UNIT * self.terms * self._size(name, key)

    def _as_factors(self, total: Tensor | None, factors: list[LowRank]) -> LowRank:
        """A dense sum takes the rest in and stands beside a unit matrix."""
        if total is None:
            if not factors:
                raise InputValueError("no client is left; pass at least one with a positive weight")
            return LowRank(
                torch.cat([f.A for f in factors], -2), torch.cat([f.B for f in factors], -1)
            )
        for one in factors:
            flat = total.view(-1, *total.shape[-2:])
            flat.baddbmm_(one.B.flatten(0, -3), one.A.flatten(0, -3))
        out, columns = total.shape[-2:]
        eye = torch.eye(min(out, columns), dtype=total.dtype, device=total.device)
        eye = eye.expand(*total.shape[:-2], *eye.shape)
        return LowRank(total, eye) if out <= columns else LowRank(eye, total)


def everybody(plan: Plan, weights: Tensor, norms: Tensor, by_layer: Tensor) -> Tensor | None:
    """What every client was multiplied by, ``(K,)`` or ``(n, *layers, K)``."""
    return {
        "weight": weights,
        "count": torch.ones_like(weights),
        "norm": norms,
        "layer norm": by_layer,
    }.get(plan.mass)
