"""Reduce the rank without bias: a draw of rank r whose expectation is the whole matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetlora_agg.checks import as_integer
from hetlora_agg.errors import (
    ConvergenceError,
    InputTypeError,
    InputValueError,
    OptionValueError,
    shown,
)
from hetlora_agg.linalg import SPLITS, SVD, all_finite, exact_arithmetic, leading_svd, norms
from hetlora_agg.types import LowRank, from_numpy

REDUCTIONS = ("truncate", "unbiased")
"""How a rank is reduced: to the best matrix of that rank, or to a draw of it."""

Offset = float | Tensor
"""Where a draw starts: a number in [0, 1) for all layers, or one for each."""


def unbiased_truncate(low_rank: LowRank, rank: int, u: Offset) -> LowRank:
    """Draws a matrix of rank at most r whose expectation over u is ``P = B @ A`` itself.

    With ``P = Σ σ_i u_i v_iᵀ`` and k heads, ``τ = Σ_{i>k} σ_i / (r − k)``:
    ``Q = Σ_{i≤k} σ_i u_i v_iᵀ + Σ_picked τ u_i v_iᵀ``. A head is kept surely: k grows from 0 while
    ``k < r − 1`` and ``σ_{k+1} ≥ Σ_{i>k} σ_i / (r − k)``. Of the tail exactly r − k are picked,
    each with probability ``p_i = σ_i / τ``, by systematic sampling: those for which
    ``(C_{i−1}, C_i]`` holds an integer + u, C the cumulative sums of p. Factors of at most r
    components come back as they are.

    ``E‖Q − P‖_F² = (Σ_tail σ)² / (r − k) − Σ_tail σ²``, the least of any unbiased draw of rank r,
    and ``‖Q‖_F`` is the same for every u. One draw is farther from P than `compress` is: draw
    where many are averaged.

    Args:
        low_rank: any factors, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        rank: r, capped at ``min(R, out_features, in_features)``.
        u: uniform on [0, 1), drawn anew for every call: a number, or one per layer, ``(*layers,)``.

    Returns:
        A balanced `LowRank` of r components in the dtype of the input (float16 and bfloat16 are
        computed in float32), heads first; the input itself where R ≤ r. Leading components are no
        draw of lower rank.

    Raises:
        InputTypeError: ``low_rank`` is none, or not of one floating dtype and device.
        InputValueError: a rank below 1; u of another shape, outside [0, 1) or NaN; NaN or Inf in
            the factors.
        ConvergenceError: no driver took the SVD, or the draw has entries beyond its dtype.

    Cost: one factored SVD of R components, see `linalg.svd_product`; never out×in.

    Example:
        >>> import torch
        >>> from hetlora_agg import LowRank, unbiased_truncate
        >>> P = LowRank(torch.diag(torch.tensor([3.0, 1.5, 0.5])), torch.eye(3))
        >>> [unbiased_truncate(P, 2, u).dense().diagonal().round() for u in (0.25, 0.85)]
        [tensor([3., 2., 0.]), tensor([3., 0., 2.])]

    Reference: arXiv:2505.09647 for the draw; its error is the bound of arXiv:1902.03993.

    Fidelity: OURS; neither paper comes with code.

    Deviations: systematic sampling, where any sampling of fixed size with these p_i would do: it
    makes the expectation a finite sum, and offsets spread over [0, 1) spread the draws.
    """
    whole = _checked(low_rank)
    rank = as_integer(rank, "unbiased_truncate: rank", at_least=1)
    offset = as_offsets(u, whole.layers, whole.A.device)
    if whole.rank <= rank:
        return low_rank
    with exact_arithmetic(whole.A.device.type):
        svd = drawn(leading_svd(whole.B, whole.A), rank, offset)
        B, A = (X.to(whole.A) for X in SPLITS["balanced"](svd.U, svd.S, svd.Vh))
    if not all_finite(A, B):
        raise ConvergenceError(
            f"unbiased_truncate: the draw has entries beyond {torch.finfo(A.dtype).max:.3g}, the "
            f"largest {A.dtype}; pass the factors in a wider dtype"
        )
    return LowRank(A, B) if isinstance(low_rank.A, Tensor) else LowRank(A, B).numpy()


def drawn(svd: SVD, rank: int, u: Tensor) -> SVD:
    """The triplets of one draw from a full SVD, heads first; S are its singular values.

    Args:
        svd: all triplets, S in float64.
        rank: r >= 1.
        u: ``(*layers,)`` float64 in [0, 1), from `as_offsets`; further dimensions before those of
            the layers make as many draws.

    Returns:
        An `SVD` of ``min(rank, q)`` triplets. Its certificate's ``tail`` is the distance of this
        draw from the whole, no longer the least of any matrix of that rank.
    """
    index, S = picked(svd.S, rank, u)
    at = index.unsqueeze(-2)
    batch, (out, q), columns = u.shape, svd.U.shape[-2:], svd.Vh.shape[-1]
    U = svd.U.expand(*batch, out, q).gather(-1, at.expand(*batch, out, at.shape[-1]))
    Vh = svd.Vh.expand(*batch, q, columns).gather(-2, at.mT.expand(*batch, at.shape[-1], columns))
    known = svd.certificate
    placed = torch.zeros_like(svd.S).expand(*batch, q).scatter(-1, index, S)
    tail, size = norms(svd.S - placed, -1), norms(S, -1)
    # The vectors' errors weigh as much as what they are multiplied by.
    more = torch.where(known.norm > 0, (size + tail) / known.norm, 0.0)
    return SVD(
        U,
        S,
        Vh,
        replace(known, tail=tail, rounding=known.rounding * (1 + more), kept=(S > 0).sum(-1)),
    )


def picked(S: Tensor, rank: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """Which components a draw takes, distinct and ascending, and the singular value of each.

    Args:
        S: ``(*layers, q)`` float64, descending, at least 0.
        rank: r >= 1.
        u: ``(*draws, *layers)`` float64 in [0, 1).

    Returns:
        Two tensors ``(*draws, *layers, min(r, q))``: positions in S, int64, and values, float64.
    """
    q = S.shape[-1]
    place = torch.arange(min(rank, q), device=S.device)
    shape = (*u.shape, len(place))
    if q <= rank:
        return place.expand(shape), S.expand(shape)
    # Relative to σ_1: no sum overflows, and no ratio depends on the unit.
    top = torch.where(S[..., :1] > 0, S[..., :1], 1.0)
    sigma = S / top
    heads, tau = _heads(sigma, rank)
    # In whole units of 2^-bits: sums are exact, so that no interval is wider than the step between
    # two points and every point falls into one. A double has no finer steps where C is near r.
    unit = 2 ** (62 - rank.bit_length())
    in_tail = torch.arange(q, device=S.device) >= heads
    p = torch.where(in_tail & (tau > 0), sigma / torch.where(tau > 0, tau, 1.0), 0.0)
    goal = (rank - heads) * unit
    C = torch.minimum((p.clamp_max(1.0) * unit).round().long().cumsum(-1), goal)
    # What rounding left over or took is the last one's.
    last = torch.arange(q, device=S.device) >= (sigma > 0).sum(-1, keepdim=True) - 1
    C = torch.where(last, goal, C)
    # The integers + 0 are 1 … r−k: an interval is open on its left.
    start = (u * unit).long()
    start = torch.where(start > 0, start, unit).unsqueeze(-1)
    points = start + (place - heads).clamp_min(0) * unit
    found = torch.searchsorted(C.expand(*u.shape, q).contiguous(), points.contiguous())
    sure = (place < heads) | (sigma[..., rank : rank + 1] == 0)
    index = torch.where(sure, place, found)
    value = torch.where(sure, S[..., : len(place)], tau * top)
    return index, value.expand(shape)


def _heads(sigma: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """How many components are kept surely, and τ of the others; both ``(*layers, 1)``."""
    # Summed from the small end, before the large values could absorb it.
    left = sigma.flip(-1).cumsum(-1).flip(-1)
    places = rank - torch.arange(rank, device=sigma.device)
    # Where it fails it fails from there on: what is left is then worth more than its places.
    large = sigma[..., : rank - 1] * places[:-1] >= left[..., : rank - 1]
    heads = large.sum(-1, keepdim=True)
    tau = left.gather(-1, heads) / (rank - heads)
    # A head is never below τ but by rounding.
    least = sigma.gather(-1, (heads - 1).clamp_min(0))
    return heads, torch.where(heads > 0, torch.minimum(tau, least), tau)


def stratified(u: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Each client's offset: those of equal rank spread evenly over the circle from u on.

    Client number j of the n of its rank gets ``(u + j/n) mod 1``, so each offset alone is as
    uniform as u is, and the mean over the n draws errs far less than that of n independent ones.

    Args:
        u: ``(*layers,)`` in [0, 1), from `as_offsets`.
        ranks: of all clients.

    Returns:
        One ``(*layers,)`` per client.
    """
    sizes, numbers = Counter(ranks), {rank: count() for rank in ranks}
    offsets = (u + next(numbers[rank]) / sizes[rank] for rank in ranks)
    return [torch.where(offset >= 1, offset - 1, offset) for offset in offsets]


def as_offsets(u: Any, layers: tuple[int, ...], device: torch.device) -> Tensor:
    """The u of a draw as ``(*layers,)`` float64; one for each layer, or one for all."""
    expected = "expected a number in [0, 1)" + f", or a tensor {layers} of them" * bool(layers)
    if u is None:
        raise OptionValueError(
            f"u=: reduction='unbiased' {expected}, uniform and drawn anew for every call, such as "
            "torch.rand((), generator=generator).item(); got None"
        )
    try:
        # By way of numpy: torch would round a Python float to float32, and 1 − 2⁻⁵³ to 1.
        given = u.detach() if isinstance(u, Tensor) else from_numpy(np.asarray(u))
        if given.is_complex() or given.dtype == torch.bool:
            raise TypeError
        offset = given.to(device, torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"u=: {expected}, got {shown(u)}") from error
    if offset.shape not in (torch.Size(), torch.Size(layers)):
        raise OptionValueError(f"u=: {expected}, got one of shape {tuple(offset.shape)}")
    # Written so that NaN is refused too.
    if not bool(((offset >= 0) & (offset < 1)).all()):
        raise OptionValueError(f"u=: {expected}, got {u!r}")
    return offset.expand(layers)


def _checked(low_rank: Any) -> LowRank:
    """The factors as tensors, fit for an SVD."""
    if not isinstance(low_rank, LowRank):
        raise InputTypeError(
            f"unbiased_truncate: expected a LowRank, got {type(low_rank).__name__}; of a result "
            "pass .factors, of an update pass LowRank(update.A, update.B)"
        )
    factors = low_rank.torch()
    A, B = factors.A, factors.B
    if not A.is_floating_point() or A.dtype != B.dtype or A.device != B.device or A.is_meta:
        raise InputTypeError(
            "unbiased_truncate: expected A and B of one floating dtype on one device, got "
            f"{A.dtype} on {A.device} and {B.dtype} on {B.device}"
        )
    if 0 in A.shape or 0 in B.shape:
        raise InputValueError(
            f"unbiased_truncate: expected factors without a dimension of 0, got A {tuple(A.shape)} "
            f"and B {tuple(B.shape)}"
        )
    if not all_finite(A, B):
        raise InputValueError("unbiased_truncate: NaN or Inf in the factors; mend or drop them")
    return factors
