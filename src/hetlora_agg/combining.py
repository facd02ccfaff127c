"""Combine: from shared components to one low-rank matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from hetlora_agg.components import Components
from hetlora_agg.errors import InputValueError
from hetlora_agg.types import LowRank


def stack(c: Components, share: Tensor) -> LowRank:
    """Mean of products, ``Σ share_j b_j a_j``: components side by side, exact, rank R."""
    share = _checked(c, share)
    if c.sums is not None:
        return c.sums.stack(share)
    return LowRank(share.to(c.A.dtype).unsqueeze(-1) * c.A, c.B)


def average_factors(c: Components, share: Tensor) -> LowRank:
    """Product of means: A's and B's of each slot are averaged apart, rank ``n_slots``.

    Against the mean of products it errs by the cross terms,
    ``½ Σ_ij g_i g_j (B_i − B_j)(A_i − A_j)`` for client shares g that sum to 1.
    """
    share = _checked(c, share)
    if c.sums is not None:
        return c.sums.average_factors(share)
    slot, share = c.slot.to(c.A.dtype), share.to(c.A.dtype)
    return LowRank(slot @ (share.unsqueeze(-1) * c.A), (share.unsqueeze(-2) * c.B) @ slot.mT)


def cast_balanced(low_rank: LowRank, like: Tensor) -> LowRank:
    """The same matrix in the dtype of ``like``, both factors brought to one size first.

    Of a product that fits the dtype one factor by itself need not.
    """
    A, B = low_rank.A, low_rank.B
    size_A, size_B = (X.abs().amax((-2, -1), keepdim=True) for X in (A, B))
    known = (size_A > 0) & (size_B > 0)
    # A power of two, so that nothing is rounded.
    ratio = torch.where(known, size_B.log2() - size_A.log2(), 0.0)
    factor = torch.exp2((ratio / 2).round())
    return LowRank((A * factor).to(like), (B / factor).to(like))


def common_rows(c: Components) -> Tensor:
    """The A that all clients share, ``(*layers, n_slots, in)``, bit for bit; 0 in empty slots."""
    return _first_of_slot(c) @ c.A if c.sums is None else c.sums.common("A")


def common_columns(c: Components) -> Tensor:
    """The B that all clients share, ``(*layers, out, n_slots)``, bit for bit; 0 in empty slots."""
    return c.B @ _first_of_slot(c).mT if c.sums is None else c.sums.common("B")


def _first_of_slot(c: Components) -> Tensor:
    """One-hot map from components to slots that takes the first client's only."""
    return (c.slot * (c.slot.cumsum(-1) == 1)).to(c.A.dtype)


def carry_over(
    combined: LowRank, c: Components, previous: LowRank | None, dropped: tuple[int, ...] = ()
) -> LowRank:
    """A stack with the slots nobody filled this round added as components of ``previous``."""
    empty = _empty_slots(c, previous, dropped)
    return combined if previous is None or not empty else combined.plus(previous.select(empty))


def carry_over_slots(
    averaged: LowRank, c: Components, previous: LowRank | None, dropped: tuple[int, ...] = ()
) -> LowRank:
    """Averaged factors with the slots nobody filled this round taken from ``previous``."""
    empty = _empty_slots(c, previous, dropped)
    if previous is None or not empty:
        return averaged
    width = max(averaged.rank, previous.rank)
    every = torch.arange(width, device=c.A.device)
    old = (every[:, None] == torch.tensor(empty, device=c.A.device)).to(c.A.dtype)
    new = (every[:, None] == every[: averaged.rank]).to(c.A.dtype)
    carried = previous.select(empty)
    return LowRank(new @ averaged.A + old @ carried.A, averaged.B @ new.mT + carried.B @ old.mT)


def _checked(c: Components, share: Tensor) -> Tensor:
    """The share, one number per component; a mass, one per client, is none."""
    expected = len(c.slots)
    if not isinstance(share, Tensor) or share.dim() == 0 or share.shape[-1] != expected:
        found = tuple(share.shape) if isinstance(share, Tensor) else type(share).__name__
        raise InputValueError(
            f"share: expected a tensor (*layers, R) with R = {expected} components, got {found}; "
            "client_share and slot_share make one of a mass"
        )
    return share


def _empty_slots(c: Components, previous: LowRank | None, dropped: tuple[int, ...]) -> list[int]:
    filled = set(c.slots) - set(dropped)
    return [] if previous is None else [j for j in range(previous.rank) if j not in filled]
