"""Roster: everybody's id, rank, weight and slots, which are public where updates are not."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.checks import as_integer, as_list
from hetlora_agg.components import Components
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.intake import collect
from hetlora_agg.linalg import exact_arithmetic
from hetlora_agg.registry import METHODS, MethodEntry
from hetlora_agg.types import AggregationResult, ClientUpdate, LowRank
from hetlora_agg.validation import read_updates

STATE = (LowRank, AggregationResult, torch.Generator)
"""Options of these types decide nobody's share."""


MOST_SLOTS = 4096
"""Slots that a roster may name: more than any adapter has."""


@dataclass(frozen=True, eq=False)
class Roster:
    """Who takes part, without what they send.

    Attributes:
        updates: the clients of positive weight, in order, with factors of ones, one entry wide.
        components: the same side by side.
    """

    updates: Sequence[ClientUpdate]
    components: Components

    @property
    def ids(self) -> list[Hashable]:
        """The clients' ids."""
        return [update.id for update in self.updates]

    def position(self, id: Hashable, what: str) -> int:
        """Where a client stands."""
        if id not in self.ids:
            raise InputValueError(
                f"{what}: client {id!r} is not in the roster, or has weight 0 there; it counts for "
                "nothing and sends nothing"
            )
        return self.ids.index(id)

    def only(self, present: Iterable[Hashable]) -> Roster:
        """The roster of these clients alone."""
        there = as_list(present, "present=")
        positions = sorted({self.position(id, "present=") for id in there})
        if not positions:
            raise InputValueError("present=: nobody is; there is no sum")
        return _of([self.updates[k] for k in positions])

    def shares(self, entry: MethodEntry, options: Mapping[str, Any]) -> Tensor:
        """What the method multiplies each client's component in each slot by, ``(K, slots)``.

        Read off the method itself: run on factors one entry wide, client after client, all ones
        where the client has a component and zero where others have theirs.
        """
        result = self._one_by_one(entry, options)
        return result.A[..., 0] if frozen_factor(entry, options) == "B" else result.B[..., 0, :]

    def fractions(self, entry: MethodEntry, options: Mapping[str, Any]) -> Tensor:
        """What the method multiplies each client's whole update by, ``(K,)``; read off likewise."""
        # The product of a client's ones with its ones is its rank.
        ranks = torch.tensor(self.components.ranks, dtype=torch.float64)
        return self._one_by_one(entry, options).total().dense()[..., 0, 0] / ranks

    def _one_by_one(self, entry: MethodEntry, options: Mapping[str, Any]) -> AggregationResult:
        c = self.components
        own = (c.client == torch.arange(len(c.ranks))[:, None]).to(torch.float64)
        alone = c.with_factors(own.unsqueeze(-1), own.unsqueeze(-2))
        kept = {k: v for k, v in options.items() if not isinstance(v, STATE)}
        with exact_arithmetic("cpu"):
            return entry.run(alone, **kept)


def read_roster(roster: Any) -> Roster:
    """The checked roster of ``(id, rank, weight)`` or ``(id, rank, weight, slots)``."""
    listed = as_list(roster, "roster: expected [(id, rank, weight), …]")
    updates = []
    # A layer is as large as its slots: the roster does not know its size.
    named = [s for line in listed for s in _named_slots(line) if isinstance(s, int)]
    width = 1 + min(max(named, default=0), MOST_SLOTS)
    for line in listed:
        if not isinstance(line, (tuple, list)) or len(line) not in (3, 4) or line[0] is None:
            raise InputTypeError(
                f"roster: expected (id, rank, weight) or (id, rank, weight, slots), got {line!r}"
            )
        id, rank, weight, slots = (*line, None)[:4]
        rank = as_integer(rank, f"roster: rank of client {id!r}", at_least=1)
        wide = torch.ones(rank, 1, dtype=torch.float64)
        updates.append(
            ClientUpdate(wide.expand(rank, width), wide.mT, rank, weight, slots=slots, id=id)
        )
    read, _ = read_updates(updates, "the roster")
    return _of([update for update in read if update.weight > 0])


def _named_slots(line: Any) -> Iterable[Any]:
    """The slots in a line of a roster, if it has any."""
    slots = line[3] if isinstance(line, (tuple, list)) and len(line) == 4 else ()
    return slots if isinstance(slots, (tuple, list)) else ()


def _of(updates: list[ClientUpdate]) -> Roster:
    if not updates:
        raise InputValueError("roster: every client has weight 0")
    return Roster(updates, collect(updates).components())


def summing(entry: MethodEntry, options: Mapping[str, Any], what: str) -> str:
    """What the method's clients can send into a sum, a name from ``SUMS``."""
    able = [name for name, e in METHODS.items() if e.sums not in (None, "products")]
    if computed := sorted(name for name, value in options.items() if callable(value)):
        raise InputValueError(
            f"{what}: {computed[0]}= is a function of the updates, which nobody sees; name a "
            "weighting that the roster decides"
        )
    if entry.sums not in (None, "products"):
        return str(entry.sums)
    why = {
        "products": "the sum of its clients' updates is a dense matrix and neither of its factors "
        "is a sum",
        None: "its result is no sum over clients, whatever is public",
    }[entry.sums]
    raise InputValueError(
        f"{what}: method {entry.name!r} does not qualify: {why}; those that do: {sorted(able)}"
    )


def frozen_factor(entry: MethodEntry, options: Mapping[str, Any]) -> str | None:
    """The factor that all clients have in common and nobody sends."""
    return entry.unscaled_factor(options) if entry.common else None
