"""The core: every client's update as a small matrix in orthonormal bases that all share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hetlora_agg.components import Components
from hetlora_agg.linalg import column_space, orthonormal_columns
from hetlora_agg.types import LowRank
from hetlora_agg.weighting import normalised


@dataclass(frozen=True, eq=False)
class Core:
    """``ΔW_k = U X_k V`` for every client, without loss.

    U and V are the eigenvectors of ``Σ p ΔW_k ΔW_kᵀ`` and ``Σ p ΔW_kᵀ ΔW_k``, largest eigenvalue
    first: they depend on the updates alone, not on how a client writes its factors, as long as
    the eigenvalues are distinct. Then entries of X_k are determined up to signs common to all
    clients, under which entrywise rules that treat x and −x alike do not change.

    Attributes:
        U: ``(*layers, out_features, m)`` float64.
        V: ``(*layers, n, in_features)`` float64.
        X: ``(*layers, K, m, n)`` float64.
        inside: ``(*layers, 1, m, n)``, False where an eigenvalue is zero: there X is zero for
            every client.
    """

    U: Tensor
    V: Tensor
    X: Tensor
    inside: Tensor

    def back(self, X: Tensor) -> LowRank:
        """``U X V`` for one ``X (*layers, m, n)``, as factors of rank at most ``min(m, n)``."""
        if X.shape[-2] <= X.shape[-1]:
            return LowRank(X @ self.V, self.U)
        return LowRank(self.V, self.U @ X)


def core(c: Components, mass: Tensor) -> Core:
    """The clients' updates in bases ordered by how much of the weighted energy they hold.

    Args:
        c: the components.
        mass: ``(K,)``, the weights p of the bases.

    Cost: ``(out + in) R²`` multiply-adds and ``K min(R, out) min(R, in)`` numbers per layer.
    """
    Q_B, T_B = orthonormal_columns(c.B)
    Q_A, T_A = orthonormal_columns(c.A.mT)
    owner = torch.arange(len(c.ranks), device=c.A.device)[:, None] == c.client
    # T_B with all columns but client k's put to zero, times T_Aᵀ: client k in the QR bases.
    X = (T_B.unsqueeze(-3) * owner.unsqueeze(-2)) @ T_A.mT.unsqueeze(-3)
    weighted = normalised(mass).sqrt()[..., None, None] * X
    # Clients side by side: W Wᵀ is the sum over clients, and is not formed.
    left, rows = column_space(weighted.transpose(-3, -2).flatten(-2))
    right, columns = column_space(weighted.permute(*range(X.dim() - 3), -1, -3, -2).flatten(-2))
    inside = ((rows[..., :, None] > 0) & (columns[..., None, :] > 0)).unsqueeze(-3)
    X = torch.where(inside, left.mT.unsqueeze(-3) @ X @ right.unsqueeze(-3), 0.0)
    return Core(Q_B @ left, (Q_A @ right).mT, X, inside)
