"""A sum of low-rank matrices in bounded memory, with a bound on what it lost on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hetlora_agg.linalg import leading_svd
from hetlora_agg.types import LowRank


@dataclass(frozen=True, eq=False)
class Bounded:
    """The leading components of a running sum and a bound on everything that was cut off.

    Attributes:
        A: ``(*layers, m, in_features)`` float64, m at most the largest rank kept.
        B: ``(*layers, out_features, m)`` float64.
        tail: ``(*layers,)`` float64: the sum of the norms of all that was cut and of the rounding
            of cutting it, a bound on the error.
    """

    A: Tensor
    B: Tensor
    tail: Tensor

    @classmethod
    def of(cls, terms: LowRank) -> Bounded:
        """A sum of which nothing was cut."""
        A, B = terms.A.double(), terms.B.double()
        return cls(A, B, B.new_zeros(terms.layers))

    def times(self, factor: float) -> Bounded:
        """The sum multiplied by a number above zero."""
        return replace(self, B=self.B * factor, tail=self.tail * factor)

    def select(self, layers: Tensor) -> Bounded:
        """Some entries of the first leading dimension."""
        return Bounded(self.A[layers], self.B[layers], self.tail[layers])


def joined(sums: Sequence[Bounded], most: int) -> Bounded:
    """The sum of sums: exact, then cut to a rank; bounds add up.

    ``‖Σ X_i − [Σ X̂_i]_m‖ ≤ Σ ‖X_i − X̂_i‖ + ‖Σ X̂_i − [Σ X̂_i]_m‖``.

    Cost: one factored SVD of the ranks together where they exceed ``most``.
    """
    A = torch.cat([one.A for one in sums], dim=-2)
    B = torch.cat([one.B for one in sums], dim=-1)
    tail = torch.stack([one.tail for one in sums]).sum(0)
    if A.shape[-2] <= most:
        return Bounded(A, B, tail)
    svd = leading_svd(B, A, most)
    return Bounded(svd.Vh, svd.U * svd.S.unsqueeze(-2), tail + svd.certificate.bound)
