"""The randomized drivers: approximate, only ever taken by name, and only if they can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hetlora_agg.linalg.exact import EXACT
from hetlora_agg.linalg.lapack import core_svd
from hetlora_agg.linalg.memory import check_fallback
from hetlora_agg.linalg.select import select_driver
from hetlora_agg.linalg.solution import Solution, again, norms, plain, with_notes
from hetlora_agg.linalg.symmetric import casts

OVERSAMPLING = 16
"""Directions sampled beyond the wanted rank."""

MOST_SHARE = 8
"""Above 1/8 of the directions there are, sampling takes longer than the exact drivers
(``benchmarks/results/kernel.json``)."""

PROBES = 16
"""Gaussian vectors that estimate the tail where W is not formed."""

EXCESS = 1e-4
"""What is accepted: ``(‖W − Ŵ‖ − ‖W − W_r‖) / ‖W‖``, predicted from how the energy converges."""

MOST_ROUNDS = 6
"""Iterations before a member is handed to an exact driver: on a spectrum this flat sampling
does not pay."""


def randomized(B: Tensor, A: Tensor, rank: int) -> Solution:
    """Subspace iteration on a Gaussian sample, applying B and A without forming ``B @ A``.

    ``Q = orth(W Ω)``, then ``P = orth(Wᵀ Q)``, ``Q = orth(W P)``, … until the energy
    ``Σ_{i≤r} σ̂_i²`` tells that the excess error is below 1e-4. Members that do not get there, and
    ranks above an eighth of R, are solved by an exact driver, and named. ``tail`` is estimated
    from 16 fresh Gaussian vectors. Cost ``2 (out + in) R (r + 16)`` multiply-adds per iteration, in
    the dtype of the factors. Halko, Martinsson, Tropp, arXiv:0909.4061.
    """
    if MOST_SHARE * (rank + OVERSAMPLING) > min(B.shape[-1], B.shape[-2], A.shape[-1]):
        return _too_wide(B, A, rank)
    b, a = _peak(B), _peak(A)
    B_1, A_1 = B / b, A / a
    W = _Operator(lambda X: B_1 @ (A_1 @ X), lambda Y: A_1.mT @ (B_1.mT @ Y))
    return _sampled(W, B, A, rank, (b.double() * a.double()).flatten(), None)


def randomized_dense(B: Tensor, A: Tensor, rank: int) -> Solution:
    """`randomized` on W itself, formed once in the dtype of the factors; ``tail`` is measured.

    For R above min(out, in), where the factors are no smaller than W. Cost ``out·in·R`` and then
    ``2 out·in·(r + 16)`` multiply-adds per iteration.
    """
    if MOST_SHARE * (rank + OVERSAMPLING) > min(B.shape[-2], A.shape[-1]):
        return _too_wide(B, A, rank)
    b, a = _peak(B), _peak(A)
    W = (B / b) @ (A / a)
    square = _measured(W).square()
    scale = (b.double() * a.double()).flatten()
    return _sampled(_Operator(W.matmul, W.mT.matmul), B, A, rank, scale, square, W)


class _Operator(NamedTuple):
    """W as two functions: ``W X`` and ``Wᵀ Y``."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]


def _sampled(
    W: _Operator,
    B: Tensor,
    A: Tensor,
    rank: int,
    scale: Tensor,
    square: Tensor | None,
    formed: Tensor | None = None,
) -> Solution:
    """Subspace iteration of ``scale · W``; whoever has not converged in time is solved exactly.

    ``square (members,)`` is ‖W‖², estimated from the sample where it is None; ``formed`` is W where
    it was formed.
    """
    sample = _gaussian(A, rank + OVERSAMPLING, seed=0)
    image = W.forward(sample)
    if square is None:
        square = torch.linalg.matrix_norm(image.double()).square() / sample.shape[-1]
    Q, P = torch.linalg.qr(image).Q, sample
    energies: list[Tensor] = []
    good = torch.zeros_like(square, dtype=torch.bool)
    for _ in range(MOST_ROUNDS):
        # W is seen from both sides: on span(Q) it is T Pᵀ, on span(P) it is Q T.
        P, T = torch.linalg.qr(W.backward(Q))
        energies.append(_energy(T, rank))
        Q, T = torch.linalg.qr(W.forward(P))
        energies.append(_energy(T, rank))
        good = _converged(energies, square)
        if bool(good.all()):
            break
    (X, S, Yh), notes = core_svd(T.double())
    U, Vh = Q.double() @ X[..., :rank], Yh[..., :rank, :] @ P.double().mT
    S = S[..., :rank]
    if formed is None:
        probes = _gaussian(A, PROBES, seed=1)
        missed = W.forward(probes).double() - (U * S.unsqueeze(-2)) @ (Vh @ probes.double())
        tail = torch.linalg.matrix_norm(missed) / PROBES**0.5
    else:
        # Not by subtraction: squares in the dtype of W cancel.
        tail = _measured(formed, U * S.unsqueeze(-2), Vh)
    size = (norms(B, -2) * norms(A, -1)).sum(-1)
    S, tail = S * scale.unsqueeze(-1), tail * scale
    slow = (~good).nonzero().flatten().tolist()
    if not slow:
        return plain(U, S, Vh, size, notes)._replace(tail=tail)
    how = "exact driver, sampling converges too slowly"
    check_fallback(len(slow), B, A, rank, ("randomized", _exact_name(B, A, rank)), B.dtype)
    own, more = again(slow, lambda: with_notes(_exact(B[slow], A[slow], rank)), how)
    own_tail = torch.linalg.vector_norm(own.S[..., rank:], dim=-1)
    for mine, theirs in ((U, own.U), (S, own.S[..., :rank]), (Vh, own.Vh), (tail, own_tail)):
        mine[slow] = theirs.to(mine)
    return plain(U, S, Vh, size, notes + more)._replace(tail=tail)


def _too_wide(B: Tensor, A: Tensor, rank: int) -> Solution:
    """All members solved exactly, and said to be."""
    solution = _exact(B, A, rank)
    notes = [(i, "exact driver, rank too high to sample") for i in range(len(B))]
    return solution._replace(notes=notes + solution.notes)


def _exact(B: Tensor, A: Tensor, rank: int) -> Solution:
    """The solution of the exact driver for these sizes."""
    return EXACT[_exact_name(B, A, rank)](B, A, rank)


def _exact_name(B: Tensor, A: Tensor, rank: int) -> str:
    """What `select_driver` says."""
    return select_driver(B.shape[-2], A.shape[-1], B.shape[-1], rank, B.dtype, B.device.type)


def _measured(W: Tensor, P: Tensor | None = None, Q: Tensor | None = None) -> Tensor:
    """``‖W − P Q‖_F`` (``‖W‖_F`` without them) in float64, a piece of W at a time."""
    total, start = torch.zeros(len(W), dtype=torch.float64, device=W.device), 0
    for rows in casts(W, -2):
        stop = start + rows.shape[-2]
        rest = rows if P is None or Q is None else rows - P[..., start:stop, :] @ Q
        total += rest.square().sum((-2, -1))
        start = stop
    return total.sqrt()


def _energy(T: Tensor, rank: int) -> Tensor:
    """``Σ_{i≤r} σ_i²`` of the core."""
    energy: Tensor = torch.linalg.svdvals(T.double())[..., :rank].square().sum(-1)
    return energy


def _converged(energies: list[Tensor], square: Tensor) -> Tensor:
    """Members whose energy, growing on at the rate seen last, stays within `EXCESS`."""
    if len(energies) < 3:
        return torch.zeros_like(square, dtype=torch.bool)
    last, before = energies[-1] - energies[-2], energies[-2] - energies[-3]
    rate = torch.where(before > 0, last / before, 0.0).clamp(0.0, 0.95)
    missing = last.clamp_min(0.0) / (1 - rate)
    tail, norm = (square - energies[-1]).clamp_min(0.0).sqrt(), square.sqrt()
    return missing <= EXCESS * norm * (2 * tail + EXCESS * norm)


def _gaussian(A: Tensor, columns: int, seed: int) -> Tensor:
    """The same Gaussian vectors of length in for every member, in the dtype of A."""
    generator = torch.Generator().manual_seed(seed)
    shape = (A.shape[-1], columns)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(A).expand(len(A), -1, -1)


def _peak(X: Tensor) -> Tensor:
    """Largest entry of each member, ``(members, 1, 1)``; 1 where all are zero."""
    peak = X.abs().amax((-2, -1), keepdim=True)
    return torch.where(peak > 0, peak, 1.0)
