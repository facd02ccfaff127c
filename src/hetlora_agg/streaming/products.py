"""Products of clients that came together, added to a float64 sum a few layers at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hetlora_agg.types import LowRank

AT_ONCE = {"cpu": 2**20, "cuda": 2**28}
"""Bytes of factors in float64 at one time: on a processor they stay in its cache, and memory that
the system would take back after every product is never asked for."""


@dataclass(frozen=True, eq=False)
class Product:
    """``Σ m_k B_k A_k`` over components of some clients, not multiplied out yet.

    Attributes:
        A: of each client ``(L, *layers, r_k, in_features)``, in its own dtype.
        B: ``(L, *layers, out_features, r_k)``.
        mass: of all components, ``(L, *layers, Σ r_k)`` float64.
    """

    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    mass: Tensor

    def factors(self) -> LowRank:
        """Both factors in float64, masses in B."""
        A, B = torch.cat(self.A, dim=-2), torch.cat(self.B, dim=-1)
        return LowRank(A.double(), B * self.mass.unsqueeze(-2))

    def adding_to(self, total: Tensor) -> Callable[[], None]:
        """What adds it to the sum in place; all memory that this takes is there beforehand.

        Cost: 2 out·in flops a component. It reads and writes the sum once.
        """
        rank, (out, columns) = self.mass.shape[-1], total.shape[-2:]
        sums = total.view(-1, out, columns)
        mass = self.mass.reshape(len(sums), 1, rank)
        each = 8 * rank * (out + columns)
        step = min(len(sums), max(1, AT_ONCE.get(total.device.type, 2**28) // max(1, each)))
        a, b = total.new_empty(step, rank, columns), total.new_empty(step, out, rank)
        ranks = [A.shape[-2] for A in self.A]
        pieces = [
            (A.flatten(0, -3), own_a, B.flatten(0, -3), own_b)
            for A, own_a, B, own_b in zip(
                self.A,
                torch.split(a, ranks, dim=-2),
                self.B,
                torch.split(b, ranks, dim=-1),
                strict=True,
            )
        ]

        def add() -> None:
            for start in range(0, len(sums), step):
                n = min(step, len(sums) - start)
                some = slice(start, start + n)
                for A, own_a, B, own_b in pieces:
                    own_a[:n].copy_(A[some])
                    own_b[:n].copy_(B[some])
                b[:n].mul_(mass[some])
                sums[some].baddbmm_(b[:n], a[:n])

        return add
