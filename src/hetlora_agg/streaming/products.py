"""Products of clients that came together, added to a float64 sum a few layers at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hetlora_agg.types import LowRank

FACTOR_BYTES = {"cpu": 2**21}
"""Bytes of one product's factors in float64 at one time. On a processor they stay in its cache, and
are too few for the system to take them back after every product."""

ELSEWHERE = 2**28
"""The same on other devices."""


@dataclass(frozen=True, eq=False)
class Product:
    """``Σ_j m_j b_j a_j`` over components of some clients, not multiplied out yet.

    Attributes:
        A: ``(L, *layers, R, in_features)``, as it came.
        B: ``(L, *layers, out_features, R)``.
        mass: ``(L, *layers, R)`` float64.
    """

    A: Tensor
    B: Tensor
    mass: Tensor

    def factors(self) -> LowRank:
        """Both factors in float64, masses in B."""
        return LowRank(self.A.double(), self.B * self.mass.unsqueeze(-2))

    def adding_to(self, total: Tensor) -> Callable[[], None]:
        """What adds it to the sum in place; torch's memory for that is there beforehand.

        Cost: 2 out·in flops a component. It reads and writes the sum once.
        """
        (out, columns), rank = total.shape[-2:], self.mass.shape[-1]
        sums = total.view(-1, out, columns)
        A, B = self.A.reshape(-1, rank, columns), self.B.reshape(-1, out, rank)
        mass = self.mass.reshape(-1, 1, rank)
        together = FACTOR_BYTES.get(total.device.type, ELSEWHERE)
        step = min(len(sums), max(1, together // (8 * rank * (out + columns))))
        a, b = total.new_empty(step, rank, columns), total.new_empty(step, out, rank)

        def add() -> None:
            for start in range(0, len(sums), step):
                some = slice(start, start + step)
                n = len(sums[some])
                a[:n].copy_(A[some])
                b[:n].copy_(B[some]).mul_(mass[some])
                sums[some].baddbmm_(b[:n], a[:n])

        return add
