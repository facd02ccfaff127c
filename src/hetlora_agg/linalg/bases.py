"""Orthonormal bases, rotations and small solves for a batch of layers, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.errors import ConvergenceError
from hetlora_agg.linalg.lapack import MemberFailed, core_svd, psd_eigh

EPS = torch.finfo(torch.float64).eps


def orthonormal_columns(X: Tensor) -> tuple[Tensor, Tensor]:
    """Householder QR, ``X = Q T``, in the order of the columns.

    Args:
        X: ``(*layers, rows, columns)``.

    Returns:
        ``Q (*layers, rows, k)`` and ``T (*layers, k, columns)``, ``k = min(rows, columns)``,
        float64. Columns of Q are orthonormal even where those of X depend on each other.
    """
    Q, T = torch.linalg.qr(X.double())
    return Q, T


def row_space(A: Tensor) -> Tensor:
    """Orthonormal rows that span the rows of A, the strongest first; zero where A has no more.

    Args:
        A: ``(*batch, rank, columns)``.

    Returns:
        ``(*batch, k, columns)`` float64, ``k = min(rank, columns)``. Directions under
        ``max(rank, columns) ε`` of the strongest are taken as none.
    """
    U, S = column_space(A.mT)
    return U.mT * (S > 0).unsqueeze(-1)


def column_space(X: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns that span those of X, the strongest first, and their strengths.

    Args:
        X: ``(*batch, rows, columns)``.

    Returns:
        The left singular vectors ``(*batch, rows, k)`` and singular values ``(*batch, k)``,
        ``k = min(rows, columns)``, float64; values under ``max(rows, columns) ε`` of the largest
        are zero.
    """
    rows, columns = X.shape[-2:]
    if rows > columns:
        Q, T = orthonormal_columns(X)
        U, S, _ = _svd(T)
        U = Q @ U
    else:
        # The triangle of Xᵀ has all of X's left side, however long the rows are.
        _, T = orthonormal_columns(X.mT)
        U, S, _ = _svd(T.mT)
    return U, S * _distinct(S, max(rows, columns))


def solve_gram(P: Tensor, G: Tensor, ridge: Tensor) -> Tensor:
    """``P (G + ridge I)⁺`` for positive semidefinite ``G (*layers, n, n)``.

    Eigenvalues under ``n ε`` of the largest count as zero and are left out when ridge is.

    Args:
        P: ``(*layers, rows, n)``.
        G: ``(*layers, n, n)``.
        ridge: ``(*layers,)``, >= 0.
    """
    values, vectors = _eigh(G)
    values = torch.where(_distinct(values, G.shape[-1]), values, 0.0) + ridge.unsqueeze(-1)
    inverse = torch.where(values > 0, 1 / values, 0.0)
    return (P.double() @ vectors) * inverse.unsqueeze(-2) @ vectors.mT


def nearest_isometry(M: Tensor, *, proper: bool = False) -> tuple[Tensor, Tensor]:
    """The polar factor ``U Vᵀ`` of ``M = U S Vᵀ``: rows orthonormal, nearest to M.

    Args:
        M: ``(*batch, r, n)`` with ``r <= n``.
        proper: where M is square allow rotations only, no reflections.

    Returns:
        ``(*batch, r, n)`` float64, and ``(*batch,)`` whether the smallest singular value is
        beyond rounding, so that the factor is unique.
    """
    U, S, Vh = _svd(M.double())
    unique = _distinct(S, max(M.shape[-2:]))[..., -1]
    if proper and M.shape[-2] == M.shape[-1]:
        # The cheapest reflection to undo is that of the weakest direction.
        turned = torch.linalg.det(U @ Vh) < 0
        last = torch.arange(S.shape[-1], device=S.device) == S.shape[-1] - 1
        U = torch.where((turned.unsqueeze(-1) & last).unsqueeze(-2), -U, U)
    return U @ Vh, unique


def _distinct(S: Tensor, size: int) -> Tensor:
    """What is above the rounding of the largest of each member."""
    return S > size * EPS * S.amax(-1, keepdim=True)


def _svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (U, S, Vh), _ = _over_members(core_svd, M)
    batch = M.shape[:-2]
    return tuple(X.reshape(*batch, *X.shape[1:]) for X in (U, S, Vh))


def _eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors, _ = _over_members(psd_eigh, G)
    return values.reshape(G.shape[:-1]), vectors.reshape(G.shape)


def _over_members(decompose: Callable[[Tensor], Any], X: Tensor) -> Any:
    """A decomposition of a flat batch, with the library's error where no driver converges."""
    try:
        return decompose(X.double().reshape(-1, *X.shape[-2:]))
    except MemberFailed as error:
        raise ConvergenceError(
            f"no driver converged on batch member {error.member} of {tuple(X.shape)}; look at that "
            "layer's factors for entries of wildly different size"
        ) from error
