"""The dense driver: W itself, where the factors are no smaller."""

from __future__ import annotations

import torch
from torch import Tensor

from hetlora_agg.linalg.gram import MIN_SIGMA
from hetlora_agg.linalg.lapack import Notes, core_svd, psd_eigh
from hetlora_agg.linalg.memory import check_fallback
from hetlora_agg.linalg.solution import Solution, again, eigenvalue_error, norms, plain
from hetlora_agg.linalg.symmetric import CAST_BYTES, LEAST_ROWS, gram_matrix

SLOW = "SVD of W"
"""How members are noted whose eigenvalues do not tell enough."""


def dense(B: Tensor, A: Tensor, rank: int) -> Solution:
    """Form W in float64, then decompose its smaller side.

    float32 input: ``W Wᵀ = X S² Xᵀ``, ``U = X``, ``Vᵀ = S⁻¹ Xᵀ W`` (transposed where W is tall);
    members whose wanted singular values are too small for that take the SVD of W, and are named.
    float64 input: always the SVD of W. Cost ``out·in·(R + min(out, in) / 2)`` multiply-adds and one
    decomposition per member. Accuracy: backward stable to the ε of float64.
    """
    W, size = _accumulated(B, A)
    # Beyond R there is nothing, whatever an eigendecomposition says.
    most = B.shape[-1]
    if B.dtype == torch.float64:
        (U, S, Vh), notes = core_svd(W)
        return plain(U[..., :rank], S[..., :most], Vh[..., :rank, :], size, notes)
    if W.shape[-2] <= W.shape[-1]:
        U, S, Vh, notes = _wide(W, size, rank)
    else:
        V, S, Uh, notes = _wide(W.mT, size, rank)
        U, Vh = Uh.mT, V.mT
    off = eigenvalue_error(max(W.shape[-2:]), size)
    off[[i for i, how in notes if how == SLOW]] = 0.0
    return plain(U[..., :rank], S[..., :most], Vh[..., :rank, :], size, notes)._replace(
        square_error=off
    )


def _accumulated(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """``B @ A (members, out, in)`` and ``Σ ‖b_j‖‖a_j‖``, float64, over chunks of components."""
    members, out, R = B.shape
    W = B.new_zeros(members, out, A.shape[-1], dtype=torch.float64)
    size = W.new_zeros(members)
    per_component = 8 * members * (out + A.shape[-1])
    step = R if B.device.type != "cpu" else max(LEAST_ROWS, CAST_BYTES // per_component)
    for start in range(0, R, step):
        some = slice(start, start + step)
        b, a = B[..., some].double(), A[..., some, :].double()
        W.baddbmm_(b, a)
        size += (norms(b, -2) * norms(a, -1)).sum(-1)
    return W, size


def _wide(W: Tensor, size: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Notes]:
    """Leading triplets of a batch with no more rows than columns, through ``W Wᵀ``."""
    values, vectors, notes = psd_eigh(gram_matrix(W, -1))
    U, S = vectors.flip(-1)[..., :rank], values.flip(-1).clamp_min(0).sqrt()
    Vh = (U.mT @ W) / S[..., :rank, None]
    slow = (~(S[..., rank - 1] > MIN_SIGMA * size)).nonzero().flatten().tolist()
    if slow:
        check_fallback(len(slow), U, W, rank, ("dense", "dense"), torch.float64)
        (U_slow, S[slow], Vh_slow), left = again(slow, lambda: core_svd(W[slow]), SLOW)
        U[slow], Vh[slow] = U_slow[..., :rank], Vh_slow[..., :rank, :]
        notes = notes + left
    return U, S, Vh, notes
