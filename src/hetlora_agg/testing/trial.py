"""An aggregator on trial: fixed clients, a dense verdict."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.aggregate import aggregate
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.registry import resolve
from hetlora_agg.types import AggregationResult, ClientUpdate, LowRank

Aggregator = Callable[..., Any]

RTOL = 1e-9
"""Largest accepted error relative to ``Σ p_k ‖B_k‖‖A_k‖``. Float64 rounding, even through an SVD
cut where the spectrum has a gap of one part in 10⁴, stays far below; a wrong formula far above."""

WEIGHTS = (5.0, 10.0, 15.0, 20.0, 40.0)
SCALINGS = (1.0, 2.0, 0.5, 4.0, 1.0)


def mean_of(updates: Sequence[ClientUpdate]) -> Tensor:
    """``Σ p_k s_k B_k A_k``, densely and without the library."""
    whole = math.fsum(u.weight for u in updates)
    return torch.stack([u.weight / whole * u.scaling * (u.B @ u.A) for u in updates]).sum(0)


class Refuted(AssertionError):
    """A claim does not hold."""

    def __init__(self, claim: str, why: str) -> None:
        super().__init__(f"claim {claim!r} is refuted: {why}")
        self.why = why


class Inapplicable(AssertionError):
    """A claim cannot be tried on this aggregator or these clients, so nothing is known of it."""

    def __init__(self, claim: str, why: str) -> None:
        super().__init__(f"claim {claim!r} cannot be tried: {why}")
        self.why = why


class Trial:
    """An aggregator and the clients it is tried on.

    Attributes:
        ranks: the clients' ranks, at most five.
        out: rows of the matrices.
        columns: columns of the matrices.
        common: the factor that is one and the same on all clients, "A", "B" or None.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        ranks: Sequence[int],
        out: int,
        columns: int,
        rtol: float,
        common: str | None = None,
    ) -> None:
        if not 1 <= len(ranks) <= len(WEIGHTS) or max(ranks) > min(out, columns):
            raise InputValueError(
                f"ranks: expected 1 to {len(WEIGHTS)} ranks of at most "
                f"{min(out, columns)}, got {list(ranks)}"
            )
        if common not in (None, "A", "B"):
            raise InputValueError(f"common: expected 'A' or 'B', got {common!r}")
        self.aggregator, self.rtol, self.common = aggregator, rtol, common
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
        return self.sharing(
            [
                ClientUpdate(self.randn(r, self.columns), self.randn(self.out, r), r, n, s)
                for r, n, s in zip(self.ranks, WEIGHTS, SCALINGS, strict=False)
            ]
        )

    def sharing(self, updates: list[ClientUpdate]) -> list[ClientUpdate]:
        """The clients with the leading slots of one common factor, that of the largest."""
        largest = self.largest(updates)
        if self.common == "A":
            return [replace(u, A=largest.A[: u.rank]) for u in updates]
        if self.common == "B":
            return [replace(u, B=largest.B[:, : u.rank]) for u in updates]
        return updates

    def largest(self, updates: list[ClientUpdate]) -> ClientUpdate:
        """The first client of the largest rank."""
        return max(updates, key=lambda u: u.rank or 0)

    def agreeing(self, B: Sequence[Tensor], A: Sequence[Tensor]) -> list[ClientUpdate]:
        """Clients that send the leading columns and rows of their own ``B_k`` and ``A_k``."""
        return [
            ClientUpdate(a[:r], b[:, :r], r, n)
            for b, a, r, n in zip(B, A, self.ranks, WEIGHTS, strict=False)
        ]

    def noisy(self, X: Tensor, noise: Tensor, factor: str) -> Tensor:
        """``X + noise``, or X itself where the factor is common: a frozen factor has no noise."""
        return X if factor == self.common else X + noise

    def coverage(self) -> Tensor:
        """``q_j`` of every slot: the part of all weight that owns it."""
        weight = torch.tensor(WEIGHTS[: len(self.ranks)], dtype=torch.float64)
        slots = torch.arange(max(self.ranks))
        owns = slots[:, None] < torch.tensor(self.ranks)
        return (owns * weight).sum(-1) / weight.sum()

    def total(self, updates: list[ClientUpdate], **known: Any) -> Tensor:
        """What the aggregator makes of these clients, dense, ``(*layers, out, columns)`` float64.

        Args:
            updates: the clients.
            known: what `run` hands on.
        """
        result = self.run(updates, **known)
        if isinstance(result, AggregationResult):
            result = result.total()
        if isinstance(result, LowRank):
            result = result.dense()
        try:
            dense = torch.as_tensor(result).detach().double()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputTypeError(
                "aggregator: expected it to return an AggregationResult, a LowRank, (A, B) or a "
                f"matrix, got {type(result).__name__}"
            ) from error
        size = (updates[0].B.shape[-2], updates[0].A.shape[-1])
        if dense.shape[-2:] != size:
            raise InputValueError(
                f"aggregator: expected a matrix {size}, got one of shape {tuple(dense.shape)}"
            )
        return dense

    def run(self, updates: list[ClientUpdate], **known: Any) -> Any:
        """What the aggregator returns.

        Args:
            updates: the clients.
            known: ``previous`` (the last result), ``total`` (the weight of all clients, whoever
                takes part), ``totals`` (that of the owners of every slot). Each is handed to an
                aggregator that has a parameter of that name.
        """
        taken = {*inspect.signature(self.aggregator).parameters, *self._options()}
        result = self.aggregator(updates, **{k: v for k, v in known.items() if k in taken})
        return LowRank(*result) if isinstance(result, tuple) and len(result) == 2 else result

    def _options(self) -> set[str]:
        """What a method takes, where the aggregator is `aggregate` with a method."""
        if getattr(self.aggregator, "func", None) is not aggregate:
            return set()
        own = {"method": "rb", **self.aggregator.keywords}  # type: ignore[attr-defined]
        return set(resolve(own["method"]).options) - own.keys()

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
