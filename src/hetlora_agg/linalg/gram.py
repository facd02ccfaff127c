"""The Gram driver: two passes over the factors, everything else is R×R."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hetlora_agg.linalg.kernels import ragged_gram, ragged_output, selected
from hetlora_agg.linalg.lapack import Notes, psd_eigh
from hetlora_agg.linalg.memory import check_fallback
from hetlora_agg.linalg.qr import qr
from hetlora_agg.linalg.solution import Solution, again, norms, with_notes
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
    left, right = _unit_vectors(B, -2), _unit_vectors(A, -1)
    scale = _largest(left.norm) * _largest(right.norm)
    D = (left.norm / _largest(left.norm)) * (right.norm / _largest(right.norm))
    size = D.sum(-1)
    S, M, N, pivot, notes = _core(left.gram, right.gram, D, rank)

    growth = torch.maximum(M.norm(dim=-2).amax(-1), N.norm(dim=-2).amax(-1))
    fast = (pivot > MIN_PIVOT) & (S[..., rank - 1] > MIN_SIGMA * size)
    narrow = _float32_will_do(B, S, rank, growth, torch.cat([left.norm, right.norm], -1), D)
    # The one place where the host waits for the numbers.
    is_fast, is_narrow = torch.stack([fast, narrow]).tolist()
    live = (D > 0).unsqueeze(-1)
    U = _vectors(left, torch.where(live, M * left.to_unit, 0.0), is_narrow)
    Vh = _vectors(right, torch.where(live, N * right.to_unit, 0.0), is_narrow).mT

    slow = [i for i, was in enumerate(is_fast) if not was]
    if slow:
        check_fallback(len(slow), B, A, rank, B.dtype, "qr")
        own, more = again(slow, lambda: with_notes(qr(B[slow], A[slow], rank)), "Householder QR")
        # qr knows min(R, out, in) singular values, the Gram matrix R.
        known = torch.nn.functional.pad(own.S, (0, S.shape[-1] - own.S.shape[-1]))
        U[slow], S[slow], Vh[slow] = own.U.to(U), known / scale[slow], own.Vh.to(Vh)
        pivot[slow] = 1.0
        notes = notes + more
    # Roundings of R independent terms add up like √R, in each of the two products.
    roundings = torch.where(narrow, 2 * D.shape[-1] ** 0.5 * growth, 0.0)
    return Solution(U, S * scale, Vh, size * scale.squeeze(-1), pivot, roundings, notes)


class _Units(NamedTuple):
    """Vectors along dimension ``dim`` of X; ``to_unit`` times them has norm 1 (0 for zero ones)."""

    X: Tensor
    dim: int
    to_unit: Tensor
    gram: Tensor
    norm: Tensor


def _unit_vectors(X: Tensor, dim: int) -> _Units:
    """The Gram matrix of the vectors along ``dim`` scaled to norm 1, and how to scale them."""
    if X.dtype == torch.float64:
        # Scaled first: the squares of float64 entries may leave float64.
        norm = norms(X, dim)
        X = X / torch.where(norm > 0, norm, 1.0).unsqueeze(dim)
        return _Units(X, dim, torch.ones_like(norm).unsqueeze(-1), gram_matrix(X, dim), norm)
    if selected("ragged_gram", X.device.type):
        G, norm = ragged_gram([X if dim == -2 else X.mT])
        return _Units(X, dim, 1 / torch.where(norm > 0, norm, 1.0).unsqueeze(-1), G, norm)
    G = gram_matrix(X, dim)
    norm = G.diagonal(dim1=-2, dim2=-1).sqrt()
    to_unit = 1 / torch.where(norm > 0, norm, 1.0)
    G = G * to_unit.unsqueeze(-1) * to_unit.unsqueeze(-2)
    return _Units(X, dim, to_unit.unsqueeze(-1), G, norm)


def _core(
    G_B: Tensor, G_A: Tensor, D: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Notes]:
    """Spectrum, small factors of U and V on unit columns (both ``(members, R, r)``), pivot, notes.

    ``M = L⁻ᵀ X``, ``N = D L X S⁻¹``.
    """
    # A column whose partner is zero contributes nothing (D is zero there): a row of the identity
    # keeps Cholesky regular.
    live = D > 0
    G_B = torch.where(live.unsqueeze(-1) & live.unsqueeze(-2), G_B, 0.0)
    G_B.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    L, info = torch.linalg.cholesky_ex(G_B)
    # Whoever failed here is solved again; zeros keep its rows from spoiling the batch.
    L = torch.where((info == 0)[:, None, None], L, 0.0)
    core = L.mT * D.unsqueeze(-2)
    values, vectors, notes = psd_eigh(congruence(core, G_A))
    S, X = values.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)[..., :rank]
    M = torch.linalg.solve_triangular(L.mT, X, upper=True)
    N = (core.mT @ X) / S[..., None, :rank]
    return S, M, N, L.diagonal(dim1=-2, dim2=-1).amin(-1), notes


def _float32_will_do(
    B: Tensor, S: Tensor, rank: int, growth: Tensor, scales: Tensor, D: Tensor
) -> Tensor:
    """Members whose vectors may be multiplied out in float32 without a trace in the result."""
    # Where float64 is as fast as float32, as on a data-centre GPU, there is nothing to gain.
    if B.dtype == torch.float64 or B.device.type != "cpu":
        return torch.zeros_like(growth, dtype=torch.bool)
    squares = S.square()
    tail, norm = squares[..., rank:].sum(-1), squares.sum(-1)
    used = torch.where(torch.cat([D, D], -1) > 0, scales, 1.0)
    in_range = (used < FLOAT32_SCALES) & (used > 1 / FLOAT32_SCALES)
    return (tail >= HIDING_TAIL**2 * norm) & (growth < MOST_GROWTH) & in_range.all(-1)


def _vectors(side: _Units, M: Tensor, narrow: list[bool]) -> Tensor:
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
        some = [i for i, can in enumerate(narrow) if can]
        product[some] = (P[some].float() @ Q[some].float()).double()
    return product if side.dim == -2 else product.mT


def _largest(x: Tensor) -> Tensor:
    """Largest entry per member, 1 where all are zero."""
    top = x.amax(-1, keepdim=True)
    return torch.where(top > 0, top, 1.0)
