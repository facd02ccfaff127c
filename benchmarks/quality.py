"""How good an answer is, against one float64 reference per workload."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layer(NamedTuple):
    """``W = Q_B core Q_Aᵀ`` of one layer, and its singular values."""

    Q_B: Tensor
    Q_A: Tensor
    core: Tensor
    S: Tensor


class Reference:
    """The SVD of ``B @ A`` in float64, layer by layer, through the QR of both factors.

    Args:
        B: ``(layers, out, R)``.
        A: ``(layers, R, in)``.
    """

    def __init__(self, B: Tensor, A: Tensor) -> None:
        self.layers = []
        for b, a in zip(B.double().cpu(), A.double().cpu(), strict=True):
            Q_B, T_B = torch.linalg.qr(b)
            Q_A, T_A = torch.linalg.qr(a.mT)
            core = T_B @ T_A.mT
            self.layers.append(Layer(Q_B, Q_A, core, torch.linalg.svdvals(core)))

    def excess(self, B: Tensor, A: Tensor) -> float:
        """Worst over layers of ``(‖W − Ŵ‖ − ‖W − W_r‖) / ‖W‖`` for ``Ŵ = B @ A``.

        r is the inner dimension of B and A. The found factors are split into their part inside the
        spaces of W's own and the rest, so that no difference of large squares is taken.
        """
        worst = -float("inf")
        for layer, b, a in zip(self.layers, B.double().cpu(), A.double().cpu(), strict=True):
            E_B, E_A = _split(layer.Q_B, b), _split(layer.Q_A, a.mT)
            rows, columns = layer.core.shape
            found = E_B @ E_A.mT
            found[:rows, :columns] -= layer.core
            optimum = torch.linalg.vector_norm(layer.S[b.shape[1] :])
            excess = (torch.linalg.matrix_norm(found) - optimum) / torch.linalg.vector_norm(layer.S)
            worst = max(worst, float(excess))
        return worst

    def sigma_error(self, B: Tensor, A: Tensor) -> float:
        """Worst relative error of the singular values of ``B @ A`` against W's leading ones.

        What is below 1e-12 of the largest is not compared: float64 does not determine it.
        """
        worst = 0.0
        for layer, b, a in zip(self.layers, B.double().cpu(), A.double().cpu(), strict=True):
            T_B, T_A = (torch.linalg.qr(x, mode="r").R for x in (b, a.mT))
            S = layer.S[: b.shape[1]]
            found = torch.linalg.svdvals(T_B @ T_A.mT)[: len(S)]
            error = ((found - S).abs() / S)[S > 1e-12 * S[0]]
            worst = max(worst, float(error.max()))
        return worst


def _split(Q: Tensor, X: Tensor) -> Tensor:
    """Coordinates of the columns of X in the basis Q, and below them those in a basis of the rest.

    Projected twice: once leaves rounding of X's size along Q in the rest.
    """
    inside = Q.mT @ X
    rest = X - Q @ inside
    again = Q.mT @ rest
    return torch.cat([inside + again, torch.linalg.qr(rest - Q @ again, mode="r").R])
