"""Small decompositions that survive: a ladder of drivers, each step down reported."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hetlora_agg.linalg.execution import one_lapack_thread
from hetlora_agg.linalg.kernels import jacobi, selected
from hetlora_agg.linalg.kernels.jacobi import MAX_SIZE

Triplet = tuple[Tensor, Tensor, Tensor]

Notes = list[tuple[int, str]]
"""``(member, how)`` for members of a batch that did not take the first route."""


ONE_THREAD_UP_TO = 256
"""Largest matrix whose eigendecomposition is faster on one thread than on several
(``benchmarks/results/kernel.json``, rows ``threads``)."""


class MemberFailed(Exception):
    """No driver converged on one member of the batch."""

    def __init__(self, member: int) -> None:
        super().__init__(member)
        self.member = member


def core_svd(M: Tensor) -> tuple[Triplet, Notes]:
    """Thin SVD of a batch of float64 matrices, member by member where the batch fails.

    Args:
        M: ``(members, rows, columns)`` float64, finite.

    Returns:
        ``(U, S, Vh)`` with S descending, and notes.

    Raises:
        MemberFailed: every step of the ladder failed for some member.
    """
    try:
        return _svd(M), []
    except LinAlgError:
        # One failing member fails the whole batch, so the others are done again on their own.
        solved = [_climb(member, i) for i, member in enumerate(M.cpu())]
    parts = [torch.stack(part).to(M.device) for part in zip(*(s for s, _ in solved), strict=True)]
    return (parts[0], parts[1], parts[2]), [(i, how) for i, (_, how) in enumerate(solved)]


def psd_eigh(G: Tensor) -> tuple[Tensor, Tensor, Notes]:
    """Eigenvalues (ascending) and eigenvectors of a batch of positive semidefinite matrices.

    Only the upper triangle of G is read.

    Raises:
        MemberFailed: neither eigh nor any SVD converged for some member.
    """
    left: list[int] = []
    if selected("jacobi", G.device.type) and G.shape[-1] <= MAX_SIZE:
        found = jacobi(G.mT)
        left = [i for i, done in enumerate(found.converged.tolist()) if not done]
        if not left:
            return found.values, found.vectors, []
    try:
        with one_lapack_thread(G.device.type == "cpu" and G.shape[-1] <= ONE_THREAD_UP_TO):
            values, vectors = torch.linalg.eigh(G, UPLO="U")
    except LinAlgError:
        # For a positive semidefinite matrix the SVD is an eigendecomposition in reverse order.
        (vectors, values, _), further = core_svd(G.triu() + G.triu(1).mT)
        notes = [(i, "SVD in place of eigh") for i in range(len(G))]
        return values.flip(-1), vectors.flip(-1), notes + further
    return values, vectors, [(i, "eigh, Jacobi did not converge") for i in left]


def _svd(M: Tensor) -> Triplet:
    # CUDA's default tries one driver and, unseen, another; this one needs no second try.
    driver = "gesvd" if M.is_cuda else None
    U, S, Vh = torch.linalg.svd(M, full_matrices=False, driver=driver)
    return U, S, Vh


def _svd_of_transpose(M: Tensor) -> Triplet:
    U, S, Vh = _svd(M.mT)
    return Vh.mT, S, U.mT


def _svd_after_qr(M: Tensor) -> Triplet:
    tall = M if M.shape[-2] >= M.shape[-1] else M.mT
    Q, T = torch.linalg.qr(tall)
    U, S, Vh = _svd(T)
    return (Q @ U, S, Vh) if tall is M else (Vh.mT, S, (Q @ U).mT)


_LADDER: tuple[tuple[str, Callable[[Tensor], Triplet]], ...] = (
    ("SVD by itself on the CPU", _svd),
    ("SVD of the transpose on the CPU", _svd_of_transpose),
    ("SVD after QR on the CPU", _svd_after_qr),
)


def _climb(M: Tensor, member: int) -> tuple[Triplet, str]:
    for name, driver in _LADDER:
        try:
            triplet = driver(M)
        except LinAlgError:
            continue
        return triplet, name
    raise MemberFailed(member)
