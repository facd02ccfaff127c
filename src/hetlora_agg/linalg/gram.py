"""The Gram driver: two passes over the factors, everything else is R×R."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hetlora_agg.linalg.kernels import ragged_gram, ragged_output, selected
from hetlora_agg.linalg.lapack import psd_eigh
from hetlora_agg.linalg.memory import check_fallback
from hetlora_agg.linalg.qr import qr
from hetlora_agg.linalg.solution import Solution, again, eigenvalue_error, norms, with_notes
from hetlora_agg.linalg.symmetric import congruence, exact_product, gram_matrix

MIN_PIVOT = 1e-5
"""Smallest Cholesky pivot of a unit-diagonal Gram matrix that is trusted: its square, 1e-10, is
far above float64 rounding, so directions it resolves carry six digits."""

MIN_SIGMA = 1e-5
"""Smallest σ_r, relative to ``Σ ‖b_j‖‖a_j‖``, that is read off an eigendecomposition of ``W Wᵀ``:
its square, 1e-10, carries six digits, and so does the orthogonality of its vectors."""

HIDING_TAIL = 1e-3
"""Where truncation discards at least this share of ‖W‖, vectors may be multiplied out in float32:
their rounding, about 1e-7 · growth, then adds its square over twice this share to the error of the
result, under 1e-9."""

MOST_GROWTH = 8.0
"""Largest norm of a column of the small factors, relative to unit columns, for the same."""

FLOAT32_SCALES = 1e25
"""Largest, and inverted the smallest, column norm for the same: nothing leaves float32."""


def gram(B: Tensor, A: Tensor, rank: int) -> Solution:
    """Gram matrices of unit columns, Cholesky of one, one R×R eigendecomposition.

    ``B = B̂ diag(b)``, ``A = diag(a) Â`` with unit columns and rows, ``D = diag(b a)``,
    ``B̂ᵀB̂ = L Lᵀ``, ``(Lᵀ D) Â Âᵀ (Lᵀ D)ᵀ = X S² Xᵀ``, ``U = B̂ L⁻ᵀ X``, ``Vᵀ = S⁻¹ Xᵀ Lᵀ D Â``.

    Members whose Cholesky pivots or wanted singular values are too small for that (duplicated or
    cancelling clients, graded spectra, ``rank`` beyond the numerical rank) are solved by `qr`
    instead, and named. Cost ``(out + in)(R²/2 + R r)`` multiply-adds plus one R×R
    eigendecomposition. Accuracy for float32 input: below its rounding. For float64 input the
    product keeps its digits, the vectors of small singular values only six: use `qr`.
    """
    left, right = _side(B, -2), _side(A, -1)
    top_B, top_A = _largest(left.norm), _largest(right.norm)
    D = (left.norm / top_B) * (right.norm / top_A)
    # A pair with a zero in it contributes nothing and is left out of everything.
    live = D > 0
    unit_B, unit_A = (torch.where(live, 1 / side.length, 0.0) for side in (left, right))
    size = D.sum(-1)

    G = left.gram * (unit_B.unsqueeze(-1) * unit_B.unsqueeze(-2))
    # Exactly 1, for pairs that were left out too: it keeps Cholesky regular.
    G.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    L, info = torch.linalg.cholesky_ex(G)
    # Whoever failed here is solved again below; zeros keep its rows from spoiling the batch.
    L = torch.where((info == 0)[:, None, None], L, 0.0)
    core = L.mT * (D * unit_A).unsqueeze(-2)
    values, vectors, notes = psd_eigh(congruence(core, right.gram))
    S, X = values.flip(-1).clamp_min(0).sqrt(), vectors[..., -rank:].flip(-1)
    M = torch.linalg.solve_triangular(L.mT, X, upper=True)
    N = (core.mT @ X) / S[..., None, :rank]

    pivot = L.diagonal(dim1=-2, dim2=-1).amin(-1)
    fast = (pivot > MIN_PIVOT) & (S[..., rank - 1] > MIN_SIGMA * size)
    growth = torch.maximum(_longest(M), _longest(N * right.length.unsqueeze(-1)))
    scales = torch.stack([top_B[..., 0], top_A[..., 0], unit_B.amax(-1), unit_A.amax(-1)])
    narrow = _float32_will_do(B, S, rank, growth, scales.amax(0))
    # The one read of the host of its own accord; LAPACK's error checks read too.
    is_fast, is_narrow = torch.stack([fast, narrow]).tolist()
    U = _vectors(left, M * unit_B.unsqueeze(-1), is_narrow)
    Vh = _vectors(right, N, is_narrow).mT
    # Roundings of R independent terms add up like √R, in each of the two products.
    roundings = torch.where(narrow, 2 * D.shape[-1] ** 0.5 * growth, 0.0)
    scale = top_B * top_A
    size = size * scale.squeeze(-1)
    off = eigenvalue_error(max(B.shape[-2], A.shape[-1]), size)
    found = Solution(U, S * scale, Vh, size, pivot, roundings, off, notes)
    slow = [i for i, was in enumerate(is_fast) if not was]
    return _without(slow, found, B, A) if slow else found


def _without(slow: list[int], found: Solution, B: Tensor, A: Tensor) -> Solution:
    """The solution with its slow members solved by `qr`."""
    U, S, Vh, rank = found.U, found.S, found.Vh, found.U.shape[-1]
    check_fallback(len(slow), B, A, rank, ("gram", "qr"), B.dtype)
    own, notes = again(slow, lambda: with_notes(qr(B[slow], A[slow], rank)), "Householder QR")
    # qr knows min(R, out, in) singular values, the Gram matrix R.
    known = torch.nn.functional.pad(own.S, (0, S.shape[-1] - own.S.shape[-1]))
    U[slow], S[slow], Vh[slow] = own.U.to(U), known, own.Vh.to(Vh)
    found.pivot[slow] = 1.0
    found.roundings[slow] = found.square_error[slow] = 0.0
    return found._replace(notes=found.notes + notes)


class _Side(NamedTuple):
    """The vectors along dimension ``dim`` of X, ``vectors = X · norm / length``.

    Attributes:
        X: the factor, or a float64 one with its vectors scaled to norm 1 already.
        dim: −2 for the columns of B, −1 for the rows of A.
        gram: ``(members, R, R)`` Gram matrix of the vectors of X.
        length: ``(members, R)`` norms of the vectors of X, 1 where they are 0.
        norm: ``(members, R)`` norms of the vectors of the factor.
    """

    X: Tensor
    dim: int
    gram: Tensor
    length: Tensor
    norm: Tensor


def _side(X: Tensor, dim: int) -> _Side:
    """The Gram matrix of the vectors along ``dim``, and their norms."""
    if X.dtype == torch.float64:
        # Scaled first: the squares of float64 entries may leave float64.
        norm = norms(X, dim)
        X = X / torch.where(norm > 0, norm, 1.0).unsqueeze(dim)
        return _Side(X, dim, gram_matrix(X, dim), torch.ones_like(norm), norm)
    if selected("ragged_gram", X.device.type):
        G, norm = ragged_gram([X if dim == -2 else X.mT])
        G = G * (norm.unsqueeze(-1) * norm.unsqueeze(-2))
    else:
        G = gram_matrix(X, dim)
        norm = G.diagonal(dim1=-2, dim2=-1).sqrt()
    return _Side(X, dim, G, torch.where(norm > 0, norm, 1.0), norm)


def _float32_will_do(B: Tensor, S: Tensor, rank: int, growth: Tensor, furthest: Tensor) -> Tensor:
    """Members whose vectors may be multiplied out in float32 without a trace in the result."""
    # Where float64 is as fast as float32, as on a data-centre GPU, there is nothing to gain.
    if B.dtype == torch.float64 or B.device.type != "cpu":
        return torch.zeros_like(growth, dtype=torch.bool)
    squares = S.square()
    hidden = squares[..., rank:].sum(-1) >= HIDING_TAIL**2 * squares.sum(-1)
    return hidden & (growth < MOST_GROWTH) & (furthest < FLOAT32_SCALES)


def _vectors(side: _Side, M: Tensor, narrow: list[bool]) -> Tensor:
    """The vectors of X times ``M (members, R, r)``, ``(members, length, r)``.

    In float32 for members that are narrow, in float64 for all others.
    """
    X = side.X
    if selected("ragged_output", X.device.type):
        return ragged_output([X if side.dim == -2 else X.mT], M)
    # The product in the order that leaves it contiguous as it is used.
    P, Q = (X, M) if side.dim == -2 else (M.mT, X)
    if all(narrow):
        product = P.float() @ Q.float()
    else:
        product = exact_product(P, Q)
        # One at a time, where they lie: a batch of some of them would be a copy of their factors.
        for i in (i for i, can in enumerate(narrow) if can):
            product[i] = P[i].float() @ Q[i].float()
    return product if side.dim == -2 else product.mT


def _longest(M: Tensor) -> Tensor:
    """Largest norm of a column of each member."""
    return M.square().sum(-2).amax(-1).sqrt()


def _largest(x: Tensor) -> Tensor:
    """Largest entry per member, 1 where all are zero."""
    top = x.amax(-1, keepdim=True)
    return torch.where(top > 0, top, 1.0)
