"""``AggregatedAdapters``: a round's result as adapters, the global one and every client's."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hetlora_agg.adapters.adapter import Adapter
from hetlora_agg.adapters.extras import Extra
from hetlora_agg.adapters.files import RESIDUAL, check_target, save, staged
from hetlora_agg.adapters.handing import (
    check_cut,
    client_adapter,
    global_adapter,
    residual_adapter,
)
from hetlora_agg.adapters.roll import folders_of, headers_of, one_of_each
from hetlora_agg.checks import as_path
from hetlora_agg.errors import InputValueError
from hetlora_agg.types import AggregationResult

LISTED = 16
"""Clients whose ranks a table names one by one."""


@dataclass(frozen=True, eq=False, repr=False)
class AggregatedAdapters:
    """What `aggregate_adapters` and `aggregate_state_dicts` return.

    Only the global factors are held; a client's adapter is made when it is asked for.

    Attributes:
        results: layer -> `AggregationResult`, in units of ΔW.
        clients: client's id -> the `Adapter` it sent; of many folders, read when asked for.
        extras: tensors besides the factors, by their key in files.
        wanted: client's id -> the rank it wants back, or None for what it sent.
        excluded: clients left out by ``on_bad_client="drop"`` or with their folder, and why.
        notes: what was accepted but is worth knowing.
    """

    results: Mapping[str, AggregationResult]
    clients: Mapping[Hashable, Adapter]
    extras: Mapping[str, tuple[Extra, Tensor]]
    wanted: Mapping[Hashable, int] | None
    excluded: tuple[tuple[Hashable, str], ...]
    notes: tuple[str, ...]

    @property
    def adapter(self) -> Adapter:
        """The global adapter: every layer at the result's rank, its scaling 1."""
        factors = {layer: result.factors for layer, result in self.results.items()}
        return global_adapter(one_of_each(self.clients), factors, self.extras)

    @property
    def residual(self) -> Adapter | None:
        """What the method leaves to the base weights, as an adapter to be merged; or None."""
        rest = {k: r.residual for k, r in self.results.items() if r.residual is not None}
        return residual_adapter(one_of_each(self.clients), rest) if rest else None

    def client(self, id: Hashable) -> Adapter:
        """What that client starts the next round from, with the keys and in the style it sent.

        Its own layers at the ranks it wants, its own scaling divided out: it needs a new config
        only if its ranks change, and then alpha follows, so that its scalings stay. A factor that
        the method does not share stays its own.

        Raises:
            InputValueError: no such client, a result with a residual, or one that cannot be cut to
                its rank; each says what to do instead.
        """
        if id not in self.clients:
            raise InputValueError(f"no client {id!r}; there are {sorted(map(str, self.clients))}")
        return client_adapter(self.clients[id], self.results, self.extras, self._rank(id))

    def state_dict(self) -> Any:
        """The global adapter as the first client sent its own: keys, list or dict, numpy or not.

        Its scaling is 1: load it with ``r = lora_alpha``, and ``rank_pattern`` where ranks differ
        (``.adapter.config``).
        """
        return self.adapter.state_dict()

    def state_dicts(self) -> list[Any]:
        """Every client's next adapter as it sent its own, in the order of the clients."""
        return [self.client(id).state_dict() for id in self.clients]

    def write(self, out: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Writes the global adapter as a folder that PEFT loads, whole or not at all.

        A residual goes into ``out/residual``, an adapter of its own: load it first, call
        ``merge_and_unload()``, then load ``out`` on the base model that has taken it.

        Args:
            out: the folder.
            force: replace an adapter that is there.

        Raises:
            InputValueError: the folder is there or an input's, or no config is known.
        """
        target = as_path(out, "write", "folder")
        with staged(target, force=force, inputs=folders_of(self.clients)) as folder:
            save(folder, self.adapter)
            if (residual := self.residual) is not None:
                save(folder / RESIDUAL, residual)
        return target

    def write_clients(self, folder: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
        """Writes every client's next adapter to ``folder/<id>``, one at a time, all or none.

        Args:
            folder: the folder of folders.
            force: replace adapters that are there; other clients' stay.

        Raises:
            InputValueError: as `client`; the folder is there, or one in it is an input's; an id
                that is no name for a folder, or two of one name.
        """
        out = as_path(folder, "write_clients", "folder")
        real = {os.path.realpath(path): path for path in folders_of(self.clients)}
        targets = {id: out / name for id, name in _folder_names(self.clients).items()}
        for id, own in headers_of(self.clients).items():
            check_cut(own, self.results, self._rank(id))
            # Only who is in the way: everybody against everybody else would be quadratic.
            place = real.get(os.path.realpath(targets[id]))
            check_target(targets[id], force, [place] if place else ())
        there = os.path.lexists(out)
        if there and not force:
            raise InputValueError(f"{out}: is there already; set force to replace adapters in it")
        with ExitStack() as stack:
            if there:
                staging = {
                    id: stack.enter_context(staged(target, force=True))
                    for id, target in targets.items()
                }
            else:
                root = stack.enter_context(staged(out))
                staging = {id: root / target.name for id, target in targets.items()}
            for id, place in staging.items():
                save(place, self.client(id))
        return list(targets.values())

    def summary(self) -> str:
        """A table: each layer's size, ranks sent, rank of the result, energy left out."""
        rows = [("layer", "out x in", "ranks", "rank", "left out")]
        for row in self.to_dict()["layers"]:
            left = "" if row["left_out"] is None else f"{row['left_out']:.2%}"
            ranks = _told(row["ranks"])
            size = "x".join(map(str, row["size"]))
            rows.append((row["layer"], size, ranks, str(row["rank"]), left))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        notes = [f"note: {note}" for note in self.notes]
        notes += [f"excluded {client!r}: {why}" for client, why in self.excluded]
        return "\n".join([line.rstrip() for line in lines] + notes)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings only: layers, extras, clients, notes."""
        headers = list(headers_of(self.clients).values())
        layers = [
            {
                "layer": name,
                "size": list(result.factors.dense_shape),
                "ranks": [a.rank(name) for a in headers if name in a.layers],
                "rank": result.rank,
                "residual_rank": None if result.residual is None else result.residual.rank,
                "left_out": _left_out(result),
            }
            for name, result in self.results.items()
        ]
        return {
            "layers": layers,
            "extras": list(self.extras),
            "clients": list(self.clients),
            "excluded": [list(pair) for pair in self.excluded],
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        """One line: layers, clients, ranks."""
        ranks = sorted({result.rank for result in self.results.values()})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"
        rest = any(result.residual is not None for result in self.results.values())
        return (
            f"AggregatedAdapters({len(self.results)} layers, {len(self.clients)} clients, "
            f"rank {span}{', with a residual' * rest})"
        )

    def _rank(self, id: Hashable) -> int | None:
        return None if self.wanted is None else self.wanted[id]


def _told(ranks: Sequence[int]) -> str:
    """Ranks one by one, or how many clients have each where they are many."""
    if len(ranks) <= LISTED:
        return ", ".join(map(str, ranks))
    return ", ".join(f"{count}x{rank}" for rank, count in sorted(Counter(ranks).items()))


def _left_out(result: AggregationResult) -> float | None:
    """The share of the squared norm that truncation discarded, where an SVD was taken."""
    known = result.certificate
    if known is None or result.residual is not None:
        return None
    tail, norm = float(known.tail), float(known.norm)
    return (tail / norm) ** 2 if norm > 0 else 0.0


def _folder_names(ids: Iterable[Hashable]) -> dict[Hashable, str]:
    """Every client's folder; 1 and "1" cannot both have one."""
    owners: dict[str, Hashable] = {}
    for id in ids:
        other = owners.setdefault(_folder_name(id), id)
        if other is not id:
            raise InputValueError(
                f"clients {other!r} and {id!r}: both have the folder {str(id)!r}; give them other "
                "ids, or write each with write_adapter(path, outcome.client(id))"
            )
    return {id: name for name, id in owners.items()}


def _folder_name(id: Hashable) -> str:
    """A client's id as the name of a folder; nothing that leads elsewhere."""
    name = str(id)
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0")):
        raise InputValueError(
            f"client {id!r}: no name for a folder; write its adapter with "
            "write_adapter(path, outcome.client(id))"
        )
    return name
