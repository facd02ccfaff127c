"""Asking a method what it makes of clients: it runs on slots and weights without entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hetlora_agg.components import Components
from hetlora_agg.errors import HetLoRAError, InputValueError
from hetlora_agg.registry import MethodEntry
from hetlora_agg.types import AggregationResult, LowRank

Mass = Literal["weight", "count", "norm", "layer norm", "own", "share"]

SIZE = 2
"""Rows and columns of the matrices that a method is asked about: its shares know no entries."""


@dataclass
class Recorder:
    """Sums of nothing that remember what they were asked for.

    Attributes:
        rank: components of what is handed back.
        norms: squared norms to answer with, ``(K,)`` or by layer.
        shares: verb -> the share that it was called with.
        align: the alignment that was asked for.
        common_factor: the common factor that was asked for.
        by_layer: whether norms of single layers were asked for.
    """

    rank: int
    norms: Tensor
    shares: dict[str, Tensor] = field(default_factory=dict)
    align: str | None = None
    common_factor: str | None = None
    by_layer: bool = False

    def stack(self, share: Tensor) -> LowRank:
        """Nothing, of the right size."""
        return self._heard("stack", share)

    def average_factors(self, share: Tensor) -> LowRank:
        """Nothing, with as many components as there are slots."""
        return self._heard("average_factors", share)

    def common(self, factor: str) -> Tensor:
        """Nothing, of the size of the common factor."""
        self.common_factor = factor
        nothing = _nothing(self.rank)
        return nothing.A if factor == "A" else nothing.B

    def aligned(self, c: Components, to: str | None) -> Components:
        """The same components."""
        self.align = to
        return c

    def squared_norms(self) -> Tensor:
        """The norms that were given."""
        self.by_layer = True
        return self.norms

    def _heard(self, verb: str, share: Tensor) -> LowRank:
        self.shares[verb] = share
        return _nothing(self.rank)


def _nothing(rank: int) -> LowRank:
    zeros = torch.zeros(rank, SIZE, dtype=torch.float64)
    return LowRank(zeros, zeros.mT)


@dataclass(frozen=True, eq=False)
class Question:
    """Clients that have slots and weights but no entries.

    Attributes:
        slots: of each client.
        weights: of each client.
        norms: of each client's update; None where nothing asks for them.
        ids: of each client; None calls them by number.
    """

    slots: Sequence[Sequence[int]]
    weights: Sequence[float]
    norms: Sequence[float] | None = None
    ids: Sequence[Any] | None = None

    def mass(self, kind: Mass) -> Sequence[float]:
        """Each client's mass of a kind."""
        return {"weight": self.weights, "count": [1.0] * len(self.weights)}.get(
            kind, self.norms or ()
        )


def ask(
    entry: MethodEntry,
    options: Mapping[str, Any],
    asked: Question,
    by_layer: Tensor | None = None,
) -> tuple[Components, Recorder]:
    """Run the method on clients without entries and hear which shares it gives them.

    Args:
        entry: the method.
        options: its options.
        asked: the clients.
        by_layer: their squared norms in each of n layers, ``(n, K)``; then shares are by layer.

    Raises:
        HetLoRAError: whatever the method has against such clients or its options.
    """
    slots = tuple(slot for own in asked.slots for slot in own)
    squares = torch.tensor(list(asked.norms or asked.weights), dtype=torch.float64).square()
    recorder = Recorder(1 + max(slots), squares if by_layer is None else by_layer)
    layers = () if by_layer is None else (len(by_layer),)
    c = Components(
        A=torch.zeros(*layers, 0, SIZE, dtype=torch.float64),
        B=torch.zeros(*layers, SIZE, 0, dtype=torch.float64),
        ranks=tuple(map(len, asked.slots)),
        weight=torch.tensor(list(asked.weights), dtype=torch.float64),
        slots=slots,
        ids=tuple(range(len(asked.slots)) if asked.ids is None else asked.ids),
        statistic=(squares,) if entry.statistic else None,
        sums=recorder,
    )
    try:
        entry.run(c, **{name: _stand_in(value, recorder) for name, value in options.items()})
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, HetLoRAError):
            raise
        raise InputValueError(
            f"method {entry.name!r}: needs the clients' entries under these options ({error}), so "
            "it cannot take clients one by one; collect them for aggregate_layers"
        ) from error
    return c, recorder


def _stand_in(value: Any, recorder: Recorder) -> Any:
    """An option as a question has it: state of the right size, a draw that moves nothing on."""
    if isinstance(value, torch.Generator):
        return torch.Generator()
    if isinstance(value, (LowRank, AggregationResult, Mapping)):
        return _nothing(recorder.rank)
    if isinstance(value, Tensor) and value.dim():
        return value.flatten()[0]
    return value
