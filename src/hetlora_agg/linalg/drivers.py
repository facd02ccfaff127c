"""The exact drivers: three routes to the leading SVD of ``B @ A``, one signature, all in float64.

Each takes ``B (members, out, R)``, ``A (members, R, in)`` in float32 or float64 and returns a
`Solution`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetlora_agg.linalg.lapack import MemberFailed, Notes, core_svd, psd_eigh

MIN_PIVOT = 1e-5
"""Smallest Cholesky pivot of a unit-diagonal Gram matrix that is trusted: its square, 1e-10, is
far above float64 rounding, so directions it resolves carry six digits."""

MIN_SIGMA = 1e-5
"""Smallest σ_r, relative to ``Σ ‖b_j‖‖a_j‖``, that is read off an eigendecomposition of ``W Wᵀ``:
its square, 1e-10, carries six digits, and so does the orthogonality of its vectors."""


class Solution(NamedTuple):
    """What a driver found, float64.

    ``U (members, out, r)``, ``Vh (members, r, in)``: leading vectors; ``S (members, ≥ r)``: the
    whole spectrum, descending; ``size (members,)``: ``Σ ‖b_j‖‖a_j‖``, what rounding is relative to;
    ``notes``: ``(member, how)`` for members that left the fast path.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    size: Tensor
    notes: Notes


def dense(B: Tensor, A: Tensor, rank: int) -> Solution:
    """Form W in float64, then decompose its smaller side.

    float32 input: ``W Wᵀ = X S² Xᵀ``, ``U = X``, ``Vᵀ = S⁻¹ Xᵀ W`` (transposed where W is tall);
    members whose wanted singular values are too small for that take the SVD of W, and are named.
    float64 input: always the SVD of W. Cost ``out·in·(R + min(out, in))`` multiply-adds and one
    decomposition per member. Accuracy: backward stable to the ε of float64.
    """
    exact, size = B.dtype == torch.float64, (_norm(B, -2) * _norm(A, -1)).sum(-1)
    B, A = B.double(), A.double()
    W = B @ A
    if exact:
        (U, S, Vh), notes = core_svd(W)
    elif W.shape[-2] <= W.shape[-1]:
        U, S, Vh, notes = _wide(W, size, rank)
    else:
        V, S, Uh, notes = _wide(W.mT, size, rank)
        U, Vh = Uh.mT, V.mT
    return Solution(U[..., :rank], S, Vh[..., :rank, :], size, notes)


def _wide(W: Tensor, size: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Notes]:
    """Leading triplets of a batch with no more rows than columns, through ``W Wᵀ``."""
    values, vectors, notes = psd_eigh(W @ W.mT)
    U, S = vectors.flip(-1)[..., :rank], values.flip(-1).clamp_min(0).sqrt()
    Vh = (U.mT @ W) / S[..., :rank, None]
    slow = (~(S[..., rank - 1] > MIN_SIGMA * size)).nonzero().flatten().tolist()
    if slow:
        (U_slow, S[slow], Vh_slow), left = _again(slow, lambda: core_svd(W[slow]), "SVD of W")
        U[slow], Vh[slow] = U_slow[..., :rank], Vh_slow[..., :rank, :]
        notes = notes + left
    return U, S, Vh, notes


def qr(B: Tensor, A: Tensor, rank: int) -> Solution:
    """Householder QR of both factors, then the SVD of the small core.

    ``B = Q_B T_B``, ``Aᵀ = Q_A T_A``, ``T_B T_Aᵀ = X S Yᵀ``, ``U = Q_B X``, ``V = Q_A Y``.
    Cost about ``2 (out + in)(R² + R r)`` multiply-adds per member. Accuracy: backward stable to
    the ε of float64.
    """
    Q_B, T_B = torch.linalg.qr(B.double())
    Q_A, T_A = torch.linalg.qr(A.double().mT)
    (X, S, Yh), notes = core_svd(T_B @ T_A.mT)
    size = (_norm(T_B, -2) * _norm(T_A, -2)).sum(-1)
    return Solution(Q_B @ X[..., :rank], S, Yh[..., :rank, :] @ Q_A.mT, size, notes)


def gram(B: Tensor, A: Tensor, rank: int) -> Solution:
    """Gram matrices of unit columns: two passes over the factors, the rest is R×R.

    ``B = B̂ diag(b)``, ``A = diag(a) Â`` with unit columns and rows, ``D = diag(b a)``,
    ``B̂ᵀB̂ = L Lᵀ``, ``(Lᵀ D) Â Âᵀ (Lᵀ D)ᵀ = X S² Xᵀ``, ``U = B̂ L⁻ᵀ X``, ``Vᵀ = S⁻¹ Xᵀ Lᵀ D Â``.

    Members whose Cholesky pivots or wanted singular values are too small for that (duplicated or
    cancelling clients, graded spectra, ``rank`` beyond the numerical rank) are solved by `qr`
    instead, and named. Cost ``(out + in)(R² + R r)`` multiply-adds plus one R×R
    eigendecomposition. Accuracy for float32 input: below its rounding. For float64 input the
    product keeps its digits, the vectors of small singular values only six: use `qr`.
    """
    b, a = _norm(B, -2), _norm(A, -1)
    scale = _largest(a) * _largest(b)
    D = (a / _largest(a)) * (b / _largest(b))
    # A column whose partner is zero contributes nothing: 1 on the diagonal keeps Cholesky regular.
    live = D > 0
    B_hat = B / torch.where(live, b, math.inf).unsqueeze(-2)
    A_hat = A / torch.where(live, a, math.inf).unsqueeze(-1)
    G_B = B_hat.mT @ B_hat + torch.diag_embed((~live).double())
    G_A = A_hat @ A_hat.mT

    L, info = torch.linalg.cholesky_ex(G_B)
    # Whoever failed here is solved again below; zeros keep its rows from spoiling the batch.
    L = torch.where((info == 0)[:, None, None], L, 0.0)
    core = L.mT * D.unsqueeze(-2)
    values, vectors, notes = psd_eigh(core @ G_A @ core.mT)
    S, X = values.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)[..., :rank]
    pivot = L.diagonal(dim1=-2, dim2=-1).amin(-1)
    fast = (pivot > MIN_PIVOT) & (S[..., rank - 1] > MIN_SIGMA * D.sum(-1))
    U = B_hat @ torch.linalg.solve_triangular(L.mT, X, upper=True)
    Vh = (X.mT @ core / S[..., :rank, None]) @ A_hat

    slow = (~fast).nonzero().flatten().tolist()
    if slow:
        own, left = _again(slow, lambda: _with_notes(qr(B[slow], A[slow], rank)), "Householder QR")
        # qr knows min(R, out, in) singular values, the Gram matrix R.
        known = torch.nn.functional.pad(own.S, (0, S.shape[-1] - own.S.shape[-1]))
        U[slow], S[slow], Vh[slow] = own.U, known / scale[slow], own.Vh
        notes = notes + left
    return Solution(U, S * scale, Vh, (D * scale).sum(-1), notes)


def _norm(X: Tensor, dim: int) -> Tensor:
    """Euclidean norms along a dimension in float64, right where squares leave it."""
    norm: Tensor
    if X.dtype != torch.float64:
        norm = torch.linalg.vector_norm(X, dim=dim, dtype=torch.float64)
        return norm
    # Two steps, so that squares neither overflow nor vanish.
    peak = torch.linalg.vector_norm(X, float("inf"), dim=dim, keepdim=True)
    norm = torch.linalg.vector_norm(X / torch.where(peak > 0, peak, 1.0), dim=dim)
    norm = norm * peak.squeeze(dim)
    return norm


def _largest(x: Tensor) -> Tensor:
    """Largest entry per member, 1 where all are zero."""
    top = x.amax(-1, keepdim=True)
    return torch.where(top > 0, top, 1.0)


def _with_notes(solution: Solution) -> tuple[Solution, Notes]:
    return solution, solution.notes


def _again(slow: list[int], solve: Callable[[], tuple[Any, Notes]], how: str) -> tuple[Any, Notes]:
    """The slow few solved another way; their notes, and a failure, name them in the whole batch."""
    try:
        solved, further = solve()
    except MemberFailed as error:
        raise MemberFailed(slow[error.member]) from error
    return solved, [(m, how) for m in slow] + [(slow[i], more) for i, more in further]


DRIVERS: Mapping[str, Callable[[Tensor, Tensor, int], Solution]] = {
    "gram": gram,
    "qr": qr,
    "dense": dense,
}
