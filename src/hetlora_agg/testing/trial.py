"""An aggregator on trial: fixed clients, a dense verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.errors import InputValueError
from hetlora_agg.types import AggregationResult, ClientUpdate, LowRank

Aggregator = Callable[[list[ClientUpdate]], Any]

WEIGHTS = (5.0, 10.0, 15.0, 20.0, 40.0)
SCALINGS = (1.0, 2.0, 0.5, 4.0, 1.0)


class Refuted(AssertionError):
    """A claim does not hold."""

    def __init__(self, claim: str, why: str) -> None:
        super().__init__(f"claim {claim!r} is refuted: {why}")


class Inapplicable(AssertionError):
    """A claim cannot be tried on this aggregator or these clients, so nothing is known of it."""

    def __init__(self, claim: str, why: str) -> None:
        super().__init__(f"claim {claim!r} cannot be tried: {why}")


class Trial:
    """An aggregator and the clients it is tried on.

    Attributes:
        ranks: the clients' ranks, at most five.
        out: rows of the matrices.
        columns: columns of the matrices.
    """

    def __init__(
        self, aggregator: Aggregator, ranks: Sequence[int], out: int, columns: int, rtol: float
    ) -> None:
        if not 1 <= len(ranks) <= len(WEIGHTS) or max(ranks) > min(out, columns):
            raise InputValueError(
                f"check_aggregator: expected 1 to {len(WEIGHTS)} ranks of at most "
                f"{min(out, columns)}, got {list(ranks)}"
            )
        self.aggregator, self.rtol = aggregator, rtol
        self.ranks, self.out, self.columns = list(ranks), out, columns
        self._generator = torch.Generator().manual_seed(20260)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal float64 entries, the same in every run."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def orthogonal(self, size: int) -> Tensor:
        """A random orthogonal matrix, as exp of a skew-symmetric one."""
        X = self.randn(size, size)
        return torch.matrix_exp(X - X.mT)

    def generic(self) -> list[ClientUpdate]:
        """Clients with random factors and different weights and scalings."""
        return [
            ClientUpdate(self.randn(r, self.columns), self.randn(self.out, r), r, n, s)
            for r, n, s in zip(self.ranks, WEIGHTS, SCALINGS, strict=False)
        ]

    def agreeing(self, B: Sequence[Tensor], A: Sequence[Tensor]) -> list[ClientUpdate]:
        """Clients that send the leading columns and rows of their own ``B_k`` and ``A_k``."""
        return [
            ClientUpdate(a[:r], b[:, :r], r, n)
            for b, a, r, n in zip(B, A, self.ranks, WEIGHTS, strict=False)
        ]

    def coverage(self) -> Tensor:
        """``q_j`` of every slot: the part of all weight that owns it."""
        weight = torch.tensor(WEIGHTS[: len(self.ranks)], dtype=torch.float64)
        slots = torch.arange(max(self.ranks))
        owns = slots[:, None] < torch.tensor(self.ranks)
        return (owns * weight).sum(-1) / weight.sum()

    def total(self, updates: list[ClientUpdate]) -> Tensor:
        """What the aggregator makes of these clients, dense, ``(out, columns)`` float64."""
        result = self.aggregator(updates)
        if isinstance(result, AggregationResult):
            result = result.total()
        if isinstance(result, tuple) and len(result) == 2:
            result = LowRank(*result)
        if isinstance(result, LowRank):
            result = result.dense()
        return torch.as_tensor(result).detach().double()

    def expect(
        self, claim: str, case: str, found: Tensor, expected: Tensor, updates: list[ClientUpdate]
    ) -> None:
        """Raise `Refuted` unless found is the expected to within rtol of the clients' scale."""
        if found.shape != expected.shape:
            shapes = f"expected a matrix {tuple(expected.shape)}, got {tuple(found.shape)}"
            raise Refuted(claim, f"{case}: {shapes}")
        whole = math.fsum(u.weight for u in updates)
        scale = math.fsum(
            u.weight / whole * u.scaling * float(u.B.norm()) * float(u.A.norm()) for u in updates
        )
        error = float((found - expected).norm()) / scale
        # Written so that NaN is refuted too.
        if not error <= self.rtol:
            raise Refuted(
                claim,
                f"{case}: off by {error:.3g} of Σ p_k ‖B_k‖‖A_k‖, {self.rtol:.1g} is accepted "
                f"(ranks {[u.rank for u in updates]}, weights {[u.weight for u in updates]})",
            )
