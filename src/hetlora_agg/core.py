"""The core: every client's update as a small matrix in orthonormal bases that all share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hetlora_agg.combining import cast_balanced
from hetlora_agg.components import Components
from hetlora_agg.linalg import column_space, orthonormal_columns
from hetlora_agg.types import LowRank
from hetlora_agg.weighting import normalised

CORE_COPIES = 6
"""Arrays of all clients' cores that live at once while a rule on entries is applied."""


@dataclass(frozen=True, eq=False)
class Core:
    """``ΔW_k = U X_k V`` for every client, without loss.

    U and V are the eigenvectors of ``Σ p ΔW_k ΔW_kᵀ`` and ``Σ p ΔW_kᵀ ΔW_k``, largest eigenvalue
    first: they depend on the updates alone, not on how a client writes its factors, as long as
    the eigenvalues are distinct. Then entries of X_k are determined up to signs common to all
    clients, under which entrywise rules that treat x and −x alike do not change.

    Attributes:
        U: ``(*layers, out_features, m)`` float64, ``m = min(R, out_features)``.
        V: ``(*layers, n, in_features)`` float64, ``n = min(R, in_features)``.
        X: ``(*layers, K, m, n)`` float64.
        inside: ``(*layers, 1, m, n)``, False where an eigenvalue is zero: there X is zero for
            every client.
    """

    U: Tensor
    V: Tensor
    X: Tensor
    inside: Tensor

    def back(self, X: Tensor, like: Tensor) -> LowRank:
        """``U X V`` for one ``X (*layers, m, n)``, as factors of rank at most ``min(m, n)``."""
        if X.shape[-2] <= X.shape[-1]:
            return cast_balanced(LowRank(X @ self.V, self.U), like)
        return cast_balanced(LowRank(self.V, self.U @ X), like)


def core(c: Components, mass: Tensor) -> Core:
    """The clients' updates in bases ordered by how much of the weighted energy they hold.

    Args:
        c: the components.
        mass: ``(K,)``, the weights p of the bases.

    Cost: ``2 (out + in) R²`` multiply-adds, two SVDs of size R, and ``K m n`` numbers per layer.
    """
    A, B = c.A.double(), c.B.double()
    share = normalised(mass).sqrt()[c.client]
    # Σ p ΔW ΔWᵀ = Y Yᵀ for Y = [√p_k B_k T_kᵀ], where A_kᵀ = Q_k T_k: as wide as the stack.
    U, rows = column_space(share * _times_triangle(c, B, A.mT))
    V, columns = column_space(share * _times_triangle(c, A.mT, B))
    inside = ((rows[..., :, None] > 0) & (columns[..., None, :] > 0)).unsqueeze(-3)
    left, right = U.mT @ B, A @ V
    X = B.new_zeros(*c.layers, len(c.ranks), U.shape[-1], V.shape[-1])
    for clients, components in c.rank_groups:
        of_left = left.mT[..., components, :].mT
        X[..., clients, :, :] = of_left @ right[..., components, :]
    return Core(U, V.mT, X.masked_fill_(~inside, 0.0), inside)


def core_bytes(out_features: int, in_features: int, ranks: Sequence[int]) -> int:
    """Bytes per layer of what a method on the core holds besides the factors."""
    R = sum(ranks)
    m, n = min(R, out_features), min(R, in_features)
    bases = 4 * 8 * (out_features + in_features) * R + 6 * 8 * R * R
    return bases + CORE_COPIES * 8 * len(ranks) * m * n


def _times_triangle(c: Components, X: Tensor, other: Tensor) -> Tensor:
    """Columns of X, client by client, times ``T_kᵀ`` of the QR of the client's columns of other."""
    turned = torch.zeros_like(X)
    for _, components in c.rank_groups:
        own, columns = (Y.mT[..., components, :].mT for Y in (X, other))
        _, T = orthonormal_columns(columns)
        product = own @ T.mT
        # More columns than rows: the triangle is as high as the rows, the others stay zero.
        turned.mT[..., components[:, : product.shape[-1]], :] = product.mT
    return turned
