"""Norms and inner products of ``B @ A`` through the factors, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from hetlora_agg.linalg.solution import norms


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """Frobenius norm of ``B @ A``, ``(*layers,)`` float64.

    ``‖B A‖_F = ‖T_B T_Aᵀ‖_F`` with the triangles of ``B = Q_B T_B`` and ``Aᵀ = Q_A T_A``. Not
    through Gram matrices: a difference of two equal products comes out as rounding, not as its
    square root.

    Args:
        B: ``(*layers, out_features, R)``, of any floating dtype.
        A: ``(*layers, R, in_features)``.

    Returns:
        ``(*layers,)`` float64; NaN or Inf where the factors hold any.

    Raises:
        RuntimeError: shapes that do not fit, from torch; nothing is checked here.

    Cost: ``2 (out + in) R²`` multiply-adds; never out×in.

    Example:
        >>> A, B = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.eye(2)
        >>> product_norm(B, A)
        tensor(5., dtype=torch.float64)

    Reference: none; the QR decomposition is textbook.

    Fidelity: OURS.
    """
    T_B, T_A = _triangle(B.double()), _triangle(A.double().mT)
    return norms((T_B @ T_A.mT).flatten(-2), -1)


def component_inner_products(B: Tensor, A: Tensor, B_other: Tensor, A_other: Tensor) -> Tensor:
    """``⟨b_j a_j, W_other⟩`` for every component j, ``(*layers, R)`` float64."""
    left = B.double().mT @ B_other.double()
    right = A.double() @ A_other.double().mT
    return (left * right).sum(-1)


def squared_norms(B: Tensor, A: Tensor) -> Tensor:
    """``‖B A‖_F² = tr((BᵀB)(A Aᵀ))``, ``(*batch,)`` float64, clamped at zero."""
    # Else a tiny b_j beside a huge a_j has a square of 0, whatever the size of b_j a_j.
    B, A = balanced(B, A) if B.dtype == torch.float64 else (B.double(), A.double())
    return ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp_min(0)


def balanced(E: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from pairs of columns and rows of one size, by powers of two."""
    ratio = norms(E, -2).log2() - norms(F, -1).log2()
    power = torch.where(torch.isfinite(ratio), (ratio / 2).round(), 0.0)
    # Halved, since a power of two itself may leave float64.
    low = (power / 2).floor()
    for part in (low, power - low):
        E = E * torch.exp2(-part).unsqueeze(-2)
        F = F * torch.exp2(part).unsqueeze(-1)
    return E, F


def component_peaks(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude of each column of B and each row of A, ``(*layers, R)`` each.

    NaN and Inf come through, so these small tensors tell whether the factors are finite.
    """
    # Not the max-norm: torch reduces with that an order of magnitude more slowly.
    return (
        torch.maximum(B.amax(-2), -B.amin(-2)),
        torch.maximum(A.amax(-1), -A.amin(-1)),
    )


def cast_error(B: Tensor, A: Tensor, B_cast: Tensor, A_cast: Tensor) -> Tensor:
    """Bound ``Σ_j ‖δb_j‖‖a_j‖ + ‖b_j + δb_j‖‖δa_j‖`` on what a cast changes, ``(*layers,)``."""
    off_B, off_A = norms(B_cast.double() - B.double(), -2), norms(A_cast.double() - A.double(), -1)
    return (off_B * norms(A, -1) + norms(B_cast, -2) * off_A).sum(-1)


def column_extremes(X: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest entry of each column, ``(members, columns)``."""
    members, rows, columns = X.shape
    # A reduction over rows is fast only where a row is long: short ones are taken several at once.
    fold = next((k for k in (1, 2, 4, 8, 16, 32) if k * columns >= 32 and rows % k == 0), 1)
    wide = X.reshape(members, rows // fold, fold * columns)
    high, low = (part.view(members, fold, columns) for part in (wide.amax(-2), wide.amin(-2)))
    return high.amax(-2), low.amin(-2)


def _triangle(X: Tensor) -> Tensor:
    """R of the QR decomposition, or X itself when it is wide already."""
    if X.shape[-2] <= X.shape[-1]:
        return X
    triangle: Tensor = torch.linalg.qr(X, mode="r").R
    return triangle
