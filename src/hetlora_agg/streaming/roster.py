"""Who will come, known beforehand: every share is then known when its client arrives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.checks import as_integer, as_list, as_number
from hetlora_agg.errors import InputTypeError, InputValueError, shown
from hetlora_agg.registry import MethodEntry
from hetlora_agg.streaming.asking import Question, ask
from hetlora_agg.streaming.receipts import Form, Id, checked_id, in_order

Ranks = int | dict[str, int]
"""One rank for every layer, or one by layer; a layer that is not named is one the client lacks."""


@dataclass(eq=False)
class Roster:
    """The clients of a round, with rank and weight.

    Attributes:
        ranks: id -> its rank, or its ranks by layer.
        weights: id -> its weight.
        known: ranks of everybody in a layer -> their shares, kept for the next client.
        column: layer -> its key in ``known``.
    """

    ranks: dict[Id, Ranks]
    weights: dict[Id, float]
    known: dict[tuple[int, ...], dict[Id, Tensor]] = field(default_factory=dict)
    column: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """What every client would ask again, found once."""
        self._by_layer = any(isinstance(ranks, dict) for ranks in self.ranks.values())
        self._largest = max(map(self.announced, self.ranks), default=0)

    @classmethod
    def read(cls, rows: Iterable[Sequence[Any]]) -> Roster:
        """A roster from ``(id, rank, weight)``; rank may be a mapping by layer.

        Raises:
            InputTypeError, InputValueError: no such rows, an id twice, a rank or weight that is
                none, nobody of positive weight.
        """
        ranks: dict[Id, Ranks] = {}
        weights: dict[Id, float] = {}
        for row in as_list(rows, "roster="):
            if not isinstance(row, (tuple, list)) or len(row) != 3:
                raise InputTypeError(f"roster=: expected (id, rank, weight), got {shown(row)}")
            id = checked_id(row[0])
            if id in ranks:
                raise InputValueError(f"roster=: client {id!r} is there twice; give it one row")
            at = f"roster=: client {id!r}"
            ranks[id] = (
                {str(k): as_integer(r, f"{at}, layer {k!r}", at_least=1) for k, r in row[1].items()}
                if isinstance(row[1], Mapping)
                else as_integer(row[1], at, at_least=1)
            )
            weights[id] = as_number(row[2], f"{at}: weight", zero=True)
        if not any(weights.values()):
            raise InputValueError("roster=: expected a client of positive weight, got none")
        return cls(ranks, weights)

    def check(self, id: Id, form: Form, weight: float) -> None:
        """Refuse a client that is not what it was announced to be."""
        if id not in self.ranks:
            raise InputValueError(f"add: client {id!r} is not on the roster; leave it out")
        if weight != self.weights[id]:
            raise InputValueError(
                f"add: client {id!r}: weight {weight:g}, on the roster {self.weights[id]:g}; every "
                "share was computed with the roster's"
            )
        announced = self.ranks[id]
        wanted = announced if isinstance(announced, dict) else dict.fromkeys(form.layers, announced)
        if set(wanted) != set(form.layers):
            layer = min(set(wanted) ^ set(form.layers))
            raise InputValueError(
                f"add: client {id!r}: layer {layer!r} is "
                + ("missing" if layer in wanted else "not on its roster row")
                + "; the roster names every layer that a client sends"
            )
        for layer, slots in zip(form.layers, form.slots, strict=True):
            if slots != tuple(range(wanted[layer])):
                raise InputValueError(
                    f"add: client {id!r}"
                    + (f", layer {layer!r}" if layer else "")
                    + f": rank {len(slots)} in slots {_brief(slots)}, on the roster rank "
                    f"{wanted[layer]} in slots 0 to {wanted[layer] - 1}; every share was computed "
                    "with the roster's"
                )

    def rank(self, id: Id, layer: str) -> int:
        """A client's rank in a layer, 0 where it lacks it."""
        announced = self.ranks[id]
        return announced.get(layer, 0) if isinstance(announced, dict) else announced

    def announced(self, id: Id) -> int:
        """A client's largest rank."""
        ranks = self.ranks[id]
        return max(ranks.values(), default=0) if isinstance(ranks, dict) else ranks

    def largest(self) -> int:
        """The largest rank that will come."""
        return self._largest

    def shares(
        self, entry: MethodEntry, options: Mapping[str, Any], layer: str, missing: str
    ) -> dict[Id, Tensor]:
        """Every client's shares in a layer, ``(r,)`` float64: what the method says of them all."""
        name = layer if self._by_layer else ""
        if name not in self.column:
            self.column[name] = tuple(self.rank(id, layer) for id in self.ranks)
        column = self.column[name]
        if column not in self.known:
            ids = [id for id in in_order(self.ranks) if self.weights[id] > 0]
            if missing != "zero":
                ids = [id for id in ids if self.rank(id, layer)]
            ranks = [self.rank(id, layer) for id in ids]
            asked = Question([range(r) for r in ranks], [self.weights[id] for id in ids], ids=ids)
            _, heard = ask(entry, options, asked)
            first, *others = heard.shares.values()
            assert all(bool((first == other).all()) for other in others)
            self.known[column] = dict(zip(ids, torch.split(first, ranks), strict=True))
        return self.known[column]

    def without(self, ids: Iterable[Id]) -> list[tuple[Id, Ranks, float]]:
        """The rows of everybody else."""
        gone = set(ids)
        return [(id, self.ranks[id], self.weights[id]) for id in self.ranks if id not in gone]


def _brief(slots: Sequence[int]) -> str:
    return f"0 to {len(slots) - 1}" if list(slots) == list(range(len(slots))) else str(list(slots))
