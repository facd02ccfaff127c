"""Small decompositions that survive: a ladder of drivers, each step down reported."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hetlora_agg.errors import ConvergenceError

Triplet = tuple[Tensor, Tensor, Tensor]


def core_svd(M: Tensor) -> tuple[Triplet, list[tuple[int, str]]]:
    """Thin SVD of a batch of small float64 matrices, member by member where the batch fails.

    Args:
        M: ``(members, rows, columns)`` float64, finite.

    Returns:
        ``(U, S, Vh)`` with S descending, and ``(member, how)`` for each that left the first driver.

    Raises:
        ConvergenceError: every step of the ladder failed for some member.
    """
    try:
        return _svd(M), []
    except LinAlgError:
        # One failing member fails the whole batch, so the others are done again on their own.
        solved = [_climb(member, i) for i, member in enumerate(M.cpu())]
    parts = [torch.stack(part).to(M.device) for part in zip(*(s for s, _ in solved), strict=True)]
    return (parts[0], parts[1], parts[2]), [(i, how) for i, (_, how) in enumerate(solved) if how]


def psd_eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors of a batch of positive semidefinite matrices."""
    try:
        values, vectors = torch.linalg.eigh(G)
    except LinAlgError:
        # For a positive semidefinite matrix the SVD is an eigendecomposition in reverse order.
        (vectors, values, _), _ = core_svd(G)
        values, vectors = values.flip(-1), vectors.flip(-1)
    return values, vectors


def _svd(M: Tensor) -> Triplet:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
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
    ("", _svd),
    ("SVD of the transpose", _svd_of_transpose),
    ("SVD after QR", _svd_after_qr),
)


def _climb(M: Tensor, member: int) -> tuple[Triplet, str]:
    for name, driver in _LADDER:
        try:
            triplet = driver(M)
        except LinAlgError:
            continue
        return triplet, f"{name} on the CPU" if name else ""
    raise ConvergenceError(
        f"SVD: no driver converged on batch member {member} ({M.shape[-2]}x{M.shape[-1]}); "
        "look at that layer's factors for entries of wildly different size"
    )
