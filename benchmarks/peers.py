"""The alternatives a user has, each written from its formula."""

from __future__ import annotations

import torch
from torch import Tensor


def gemm_bound(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, ...]:
    """LB: the two Gram matrices and the two output products as plain GEMMs, and nothing else."""
    X = B.new_ones(B.shape[0], B.shape[-1], rank)
    return B.mT @ B, A @ A.mT, B @ X, X.mT @ A


def qr_loop(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """QR of both factors and SVD of the core, layer by layer in the input dtype."""
    out = []
    for b, a in zip(B, A, strict=True):
        Q_B, T_B = torch.linalg.qr(b)
        Q_A, T_A = torch.linalg.qr(a.mT)
        X, S, Yh = torch.linalg.svd(T_B @ T_A.mT)
        root = S[:rank].sqrt()
        out.append((Q_B @ (X[:, :rank] * root), (root[:, None] * Yh[:rank]) @ Q_A.mT))
    return torch.stack([b for b, _ in out]), torch.stack([a for _, a in out])


def dense_loop(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """One dense SVD per layer in the input dtype."""
    out = []
    for b, a in zip(B, A, strict=True):
        U, S, Vh = torch.linalg.svd(b @ a, full_matrices=False)
        root = S[:rank].sqrt()
        out.append((U[:, :rank] * root, root[:, None] * Vh[:rank]))
    return torch.stack([b for b, _ in out]), torch.stack([a for _, a in out])


def excess(B: Tensor, A: Tensor, found_B: Tensor, found_A: Tensor, rank: int) -> float:
    """Worst over layers of ``(‖W − Ŵ‖ − ‖W − W_r‖) / ‖W‖``, in float64 through the factors.

    Done through the QR of both stacks with the found factors appended, so that a difference at
    rounding level is not lost in a difference of large squares.
    """
    worst = 0.0
    for b, a, fb, fa in zip(B, A, found_B, found_A, strict=True):
        b, a, fb, fa = (x.double().cpu() for x in (b, a, fb, fa))
        T_B = torch.linalg.qr(torch.cat([b, fb], 1), mode="r").R
        T_A = torch.linalg.qr(torch.cat([a, fa], 0).mT, mode="r").R
        R = b.shape[1]
        core = T_B[:, :R] @ T_A[:, :R].mT
        S = torch.linalg.svdvals(core)
        optimum = torch.linalg.vector_norm(S[rank:])
        error = torch.linalg.matrix_norm(core - T_B[:, R:] @ T_A[:, R:].mT)
        worst = max(worst, float((error - optimum) / torch.linalg.vector_norm(S)))
    return worst
