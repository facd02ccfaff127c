"""The exact drivers: three routes to the leading SVD of ``B @ A``, one signature.

Each takes ``B (members, out, R)``, ``A (members, R, in)`` in float32 or float64 and returns a
`Solution`: vectors in the compute dtype, everything small in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hetlora_agg.linalg.lapack import core_svd, psd_eigh

MIN_PIVOT = 1e-5
"""Smallest Cholesky pivot of a unit-diagonal Gram matrix that is trusted: its square, 1e-10, is
far above float64 rounding, so directions it resolves carry six digits."""

MIN_SIGMA = 1e-5
"""Smallest σ_r / σ_1 read off an eigendecomposition of W Wᵀ: below it σ² loses half its digits."""


class Solution(NamedTuple):
    """Leading triplets of each member, and the whole spectrum's norm.

    ``U (members, out, r)``, ``S (members, r)`` float64, ``Vh (members, r, in)``; ``norm`` and
    ``tail`` ``(members,)`` float64; ``notes``: ``(member, how)`` for those off the fast path.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    norm: Tensor
    tail: Tensor
    notes: list[tuple[int, str]]


def dense(B: Tensor, A: Tensor, rank: int) -> Solution:
    """Form W in float64, then decompose its smaller side.

    float32 input: ``W Wᵀ = X S² Xᵀ``, ``U = X``, ``Vᵀ = S⁻¹ Xᵀ W`` (transposed where W is tall);
    members whose wanted singular values are too small for that take the SVD of W, and are named.
    float64 input: always the SVD of W, backward stable to the ε of float64.
    Cost ``out·in·(R + min(out, in))`` multiply-adds and one decomposition per member.
    """
    W = B.double() @ A.double()
    if B.dtype == torch.float64:
        (U, S, Vh), notes = core_svd(W)
    elif W.shape[-2] <= W.shape[-1]:
        U, S, Vh, notes = _wide(W, rank)
    else:
        Vh, S, U, notes = _wide(W.mT, rank)
        U, Vh = U.mT, Vh.mT
    norm, tail = _norms(S, rank)
    U, Vh = U[..., :rank].to(B.dtype), Vh[..., :rank, :].to(B.dtype)
    return Solution(U, S[..., :rank], Vh, norm, tail, notes)


def _wide(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, str]]]:
    """Leading triplets of a batch with no more rows than columns, through its row space."""
    values, vectors = psd_eigh(W @ W.mT)
    U, S = vectors.flip(-1)[..., :rank], values.flip(-1).clamp_min(0).sqrt()
    Vh = (U.mT @ W) / S[..., :rank, None]
    slow = (~(S[..., rank - 1] > MIN_SIGMA * S[..., 0])).nonzero().flatten()
    notes: list[tuple[int, str]] = []
    if len(slow):
        (U_slow, S[slow], Vh_slow), climbed = core_svd(W[slow])
        U[slow], Vh[slow] = U_slow[..., :rank], Vh_slow[..., :rank, :]
        notes = _renumbered("SVD of W", slow.tolist(), climbed)
    return U, S, Vh, notes


def qr(B: Tensor, A: Tensor, rank: int) -> Solution:
    """Householder QR of both factors, then the SVD of the small float64 core.

    ``B = Q_B T_B``, ``Aᵀ = Q_A T_A``, ``T_B T_Aᵀ = X S Yᵀ``, ``U = Q_B X``, ``V = Q_A Y``.
    Cost about ``2 (out + in) R² + 2 (out + in) R r`` per member; accurate to the ε of its dtype.
    """
    Q_B, T_B = torch.linalg.qr(B)
    Q_A, T_A = torch.linalg.qr(A.mT)
    (X, S, Yh), notes = core_svd(T_B.double() @ T_A.double().mT)
    norm, tail = _norms(S, rank)
    U = Q_B @ X[..., :rank].to(B.dtype)
    Vh = Yh[..., :rank, :].to(B.dtype) @ Q_A.mT
    return Solution(U, S[..., :rank], Vh, norm, tail, notes)


def gram(B: Tensor, A: Tensor, rank: int) -> Solution:
    """Float64 Gram matrices of unit columns: two GEMM passes over the factors, the rest is R×R.

    ``B = B̂ diag(b)``, ``A = diag(a) Â`` with unit columns and rows, ``D = diag(b a)``,
    ``B̂ᵀB̂ = L Lᵀ``, ``(Lᵀ D) Â Âᵀ (Lᵀ D)ᵀ = X S² Xᵀ``, ``U = B̂ L⁻ᵀ X``, ``Vᵀ = S⁻¹ Xᵀ Lᵀ D Â``.

    Members whose Cholesky pivots or wanted singular values are too small for that (shared A,
    duplicated clients, graded spectra, ``rank`` beyond the numerical rank) take the rank-revealing
    route `_revealing` instead, and are named. Cost ``(out + in)(R² + R r)`` multiply-adds plus one
    R×R eigendecomposition. Accuracy for float32 input: below its rounding. For float64 input the
    product keeps its digits, the vectors of small singular values do not: use `qr`.
    """
    B_hat, b = _unit(B.double(), dim=-2)
    A_hat, a = _unit(A.double(), dim=-1)
    scale = _largest(a) * _largest(b)
    D = (a / _largest(a)) * (b / _largest(b))
    # A column whose partner is zero contributes nothing: 1 on the diagonal keeps Cholesky regular.
    live = (D > 0).double()
    B_hat, A_hat = B_hat * live.unsqueeze(-2), A_hat * live.unsqueeze(-1)
    G_B = B_hat.mT @ B_hat + torch.diag_embed(1 - live)
    G_A = A_hat @ A_hat.mT

    L, info = torch.linalg.cholesky_ex(G_B)
    core = L.mT * D.unsqueeze(-2)
    H = core @ G_A @ core.mT
    values, vectors = psd_eigh(torch.where(torch.isfinite(H), H, 0.0))
    S = values.flip(-1).clamp_min(0).sqrt()
    X = vectors.flip(-1)[..., :rank]
    pivot = L.diagonal(dim1=-2, dim2=-1).amin(-1)
    fast = (info == 0) & (pivot > MIN_PIVOT) & (S[..., rank - 1] > MIN_SIGMA * S[..., 0])

    W_B = torch.linalg.solve_triangular(L.mT, X, upper=True)
    W_A = (X.mT @ core) / S[..., :rank, None]
    U, Vh = B_hat @ W_B, W_A @ A_hat
    norm, tail = _norms(S, rank)
    notes: list[tuple[int, str]] = []
    slow = (~fast).nonzero().flatten()
    if len(slow):
        own = _revealing(B_hat[slow], A_hat[slow], G_B[slow], G_A[slow], D[slow], rank)
        U[slow], S[slow, :rank], Vh[slow], norm[slow], tail[slow] = own[:5]
        notes = _renumbered("rank-revealing eigendecomposition", slow.tolist(), own.notes)
    scale = scale.squeeze(-1)
    return Solution(
        U.to(B.dtype),
        S[..., :rank] * scale[..., None],
        Vh.to(B.dtype),
        norm * scale,
        tail * scale,
        notes,
    )


def _revealing(
    B_hat: Tensor, A_hat: Tensor, G_B: Tensor, G_A: Tensor, D: Tensor, rank: int
) -> Solution:
    """The same through orthonormal bases of the numerical ranges of ``B̂`` and ``Âᵀ``."""
    T_B, T_B_inv = _root(G_B)
    T_A, T_A_inv = _root(G_A)
    (X, S, Yh), notes = core_svd(T_B @ (D.unsqueeze(-1) * T_A.mT))
    # Singular values under the rounding of the core are noise of cancelling or dependent columns.
    noise = D.shape[-1] * torch.finfo(torch.float64).eps
    S = torch.where(S > noise, S, 0.0)
    norm, tail = _norms(S, rank)
    S = S[..., :rank]
    U = B_hat @ (T_B_inv @ X[..., :rank])
    V = A_hat.mT @ (T_A_inv @ Yh[..., :rank, :].mT)
    alive = (S > 0).double().unsqueeze(-2)
    return Solution(
        _reorthogonalise(U * alive), S, _reorthogonalise(V * alive).mT, norm, tail, notes
    )


def _root(G: Tensor) -> tuple[Tensor, Tensor]:
    """``T`` with ``G = TᵀT`` up to rounding, and the right inverse that maps columns to a basis."""
    values, vectors = psd_eigh(G)
    cut = G.shape[-1] * torch.finfo(torch.float64).eps * values[..., -1:]
    kept = values > cut
    root = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, values, 1.0).rsqrt() * kept
    return root.unsqueeze(-1) * vectors.mT, vectors * inverse.unsqueeze(-2)


def _reorthogonalise(U: Tensor) -> Tensor:
    """Orthonormal columns in the order given; a zero column stays zero.

    Columns of tiny singular values come out of the Gram route only roughly orthogonal. Going
    through them in order leaves the leading ones as they are.
    """
    Q, T = torch.linalg.qr(U)
    diagonal = T.diagonal(dim1=-2, dim2=-1)
    ordered: Tensor = Q * diagonal.sign().unsqueeze(-2)
    return ordered


def _unit(X: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Columns (dim -2) or rows (dim -1) over their norm, and the norms; zeros stay zero."""
    # Two steps, so that squares neither overflow nor vanish.
    peak = X.abs().amax(dim, keepdim=True)
    X = X / torch.where(peak > 0, peak, 1.0)
    size = torch.linalg.vector_norm(X, dim=dim, keepdim=True)
    return X / torch.where(size > 0, size, 1.0), (peak * size).squeeze(dim)


def _largest(x: Tensor) -> Tensor:
    """Largest entry per member, 1 where all are zero."""
    top = x.amax(-1, keepdim=True)
    return torch.where(top > 0, top, 1.0)


def _renumbered(
    how: str, members: list[int], deeper: list[tuple[int, str]]
) -> list[tuple[int, str]]:
    """Notes of the members that left the fast path, and of those that had to go on from there."""
    return [(m, how) for m in members] + [(members[i], further) for i, further in deeper]


def _norms(S: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Frobenius norms of everything and of what lies beyond the rank."""
    return torch.linalg.vector_norm(S, dim=-1), torch.linalg.vector_norm(S[..., rank:], dim=-1)


DRIVERS: Mapping[str, Callable[[Tensor, Tensor, int], Solution]] = {
    "gram": gram,
    "qr": qr,
    "dense": dense,
}
