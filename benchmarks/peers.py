"""The alternatives a user has, each written from its formula.

All take stacked factors ``B (layers, out, R)``, ``A (layers, R, in)`` and return the leading
triplets ``U (layers, out, rank)``, ``S (layers, rank)``, ``Vh (layers, rank, in)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Triplets = tuple[Tensor, Tensor, Tensor]

FORM_FROM = 0.8
"""R / min(out, in) above which LB is the time to form W: the factors are no smaller than W then."""


def forms_product(out: int, columns: int, R: int) -> bool:
    """Whether LB is the one product ``B @ A`` rather than Gram matrices and outputs."""
    return FORM_FROM * min(out, columns) < R


def gemm_bound(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, ...]:
    """LB: the two Gram matrices and the two output products as plain GEMMs, and nothing else.

    Where R is above 0.8 min(out, in) it is the product ``B @ A`` instead.
    """
    if forms_product(B.shape[-2], A.shape[-1], B.shape[-1]):
        return (B @ A,)
    X = B.new_ones(B.shape[0], B.shape[-1], rank)
    return B.mT @ B, A @ A.mT, B @ X, X.mT @ A


def qr_loop(B: Tensor, A: Tensor, rank: int) -> Triplets:
    """QR of both factors and SVD of the core, layer by layer in the input dtype."""
    found = []
    for b, a in zip(B, A, strict=True):
        Q_B, T_B = torch.linalg.qr(b)
        Q_A, T_A = torch.linalg.qr(a.mT)
        X, S, Yh = torch.linalg.svd(T_B @ T_A.mT, full_matrices=False)
        found.append((Q_B @ X[:, :rank], S[:rank], Yh[:rank] @ Q_A.mT))
    return stacked(found)


def dense_loop(B: Tensor, A: Tensor, rank: int) -> Triplets:
    """One dense SVD per layer in the input dtype."""
    return stacked([_leading(b @ a, rank) for b, a in zip(B, A, strict=True)])


def dense_per_client(clients: Sequence[tuple[Tensor, Tensor]], rank: int) -> Triplets:
    """Every client's dense update through its own SVD, summed, then an SVD of the sum.

    Args:
        clients: ``B_k (layers, out, r_k)`` and ``A_k (layers, r_k, in)``, one pair per client.
        rank: wanted rank.
    """
    found = []
    for layer in range(len(clients[0][0])):
        W: Tensor | None = None
        for B, A in clients:
            U, S, Vh = _leading(B[layer] @ A[layer], B.shape[-1])
            update = (U * S) @ Vh
            W = update if W is None else W + update
        found.append(_leading(W, rank))
    return stacked(found)


def randomized_factors(
    B: Tensor, A: Tensor, rank: int, niter: int = 2, oversampling: int = 10
) -> Triplets:
    """Randomized SVD (Halko, Martinsson and Tropp, algorithms 4.4 and 5.1) that never forms W.

    The steps are those of `torch.svd_lowrank`, with W applied as ``B @ (A @ X)``.
    """
    q = min(rank + oversampling, B.shape[-1], B.shape[-2], A.shape[-1])
    X = torch.randn(B.shape[0], A.shape[-1], q, dtype=B.dtype, device=B.device)
    Q = torch.linalg.qr(B @ (A @ X)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(A.mT @ (B.mT @ Q)).Q
        Q = torch.linalg.qr(B @ (A @ Q)).Q
    U, S, Vh = torch.linalg.svd((Q.mT @ B) @ A, full_matrices=False)
    return Q @ U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def svd_lowrank(
    B: Tensor, A: Tensor, rank: int, niter: int = 2, oversampling: int = 10
) -> Triplets:
    """`torch.svd_lowrank` of the dense W, all layers in one call.

    It takes tensors only, dense or sparse, so W is formed.
    """
    q = min(rank + oversampling, B.shape[-2], A.shape[-1])
    U, S, V = torch.svd_lowrank(B @ A, q=q, niter=niter)
    return U[..., :rank], S[..., :rank], V[..., :rank].mT


def stacked(layers: Sequence[Triplets]) -> Triplets:
    """The triplets of all layers as one batch."""
    U, S, Vh = (torch.stack(part) for part in zip(*layers, strict=True))
    return U, S, Vh


def _leading(W: Tensor, rank: int) -> Triplets:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]
