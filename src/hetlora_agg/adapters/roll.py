"""A round's folders by headers alone: who is there, who is not whole, who came twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hetlora_agg.adapters.adapter import Adapter
from hetlora_agg.adapters.files import CONFIG, WEIGHTS, read_adapter
from hetlora_agg.errors import HetLoRAError, InputValueError

ENDS = 1 << 16
"""Bytes at either end of a file's tensors that are compared before all of them are."""

LEFTOVERS = (".part", ".partial", ".tmp", ".temp", ".incomplete", ".download", ".crdownload", "~")
"""How the names of transfers end that did not; our own writer's is ``.name.….part``."""

PRIVATE = ("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "task_type")
"""Fields of a config that change nothing about the tensors and may differ from client to client."""

TOLD = ("base_model_name_or_path", "task_type", "fan_in_fan_out")
"""Fields that are worth a note where they differ."""

Stamp = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """What is kept of one folder.

    Attributes:
        folder: where it is.
        weight: the client's weight.
        wanted: the rank it wants back; None for what it sent.
        kind: which of the roll's kinds of adapters it is.
        stamp: sizes and times of its two files, as they were when the header was read.
    """

    folder: str
    weight: float
    wanted: int | None
    kind: bytes
    stamp: Stamp


@dataclass(eq=False, repr=False)
class Roll(Mapping[Hashable, Adapter]):
    """Clients by id, an adapter only while somebody looks at it.

    Ten thousand open adapters would take more than their sum. Clients whose configs and shapes are
    alike share one header; everything else is read again when it is asked for.

    Attributes:
        rows: client's id -> its folder.
        kinds: kind -> the first adapter of that kind.
        first: kind -> the id of that one.
        told: fields that are worth a note, every combination once.
        excluded: client's id -> why it was skipped.
        notes: what else was skipped.
    """

    rows: dict[Hashable, Row] = field(default_factory=dict)
    kinds: dict[bytes, Adapter] = field(default_factory=dict)
    first: dict[bytes, Hashable] = field(default_factory=dict)
    told: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    excluded: dict[Hashable, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, id: Hashable) -> Adapter:
        """The client's adapter, read now and as it was."""
        row = self.rows[id]
        adapter, kind, stamp = read_header(row.folder)
        if (kind, stamp) != (row.kind, row.stamp):
            raise InputValueError(
                f"{row.folder}: changed while the clients were being aggregated; let its client "
                "finish sending it, then start again"
            )
        return adapter

    def __iter__(self) -> Iterator[Hashable]:
        """Ids, in the order given."""
        return iter(self.rows)

    def __len__(self) -> int:
        """How many clients there are."""
        return len(self.rows)

    def __contains__(self, id: object) -> bool:
        """Whether the client is there; nothing is read."""
        return id in self.rows

    def take(self, id: Hashable, row: Row, adapter: Adapter) -> None:
        """One more client."""
        self.rows[id] = row
        if row.kind not in self.kinds:
            self.kinds[row.kind], self.first[row.kind] = adapter, id
        config = adapter.config or {}
        told = {name: config.get(name) for name in TOLD}
        self.told.setdefault(tuple(map(str, told.values())), told)

    def leave_out(self, id: Hashable) -> None:
        """One client fewer; its header may still stand for others of its kind."""
        kind = self.rows.pop(id).kind
        if self.first[kind] == id:
            heirs = (other for other, row in self.rows.items() if row.kind == kind)
            self.first[kind] = next(heirs, id)

    def header(self, id: Hashable) -> Adapter:
        """An adapter with the client's layers, ranks, scalings and shapes; nothing is read."""
        return self.kinds[self.rows[id].kind]


def one_of_each(clients: Mapping[Hashable, Adapter]) -> Mapping[Hashable, Adapter]:
    """The first client and one of every other kind: all that a global adapter depends on."""
    if not isinstance(clients, Roll):
        return clients
    there = {row.kind for row in clients.rows.values()}
    return {clients.first[kind]: own for kind, own in clients.kinds.items() if kind in there}


def headers_of(clients: Mapping[Hashable, Adapter]) -> Mapping[Hashable, Adapter]:
    """Every client's layers, ranks and scalings; nothing is read."""
    if not isinstance(clients, Roll):
        return clients
    return {id: clients.kinds[row.kind] for id, row in clients.rows.items()}


def folders_of(clients: Mapping[Hashable, Adapter]) -> list[Path]:
    """The folders that clients were read from."""
    if isinstance(clients, Roll):
        return [Path(row.folder) for row in clients.rows.values()]
    return [a.folder for a in clients.values() if a.folder is not None]


def read_header(folder: str | os.PathLike[str]) -> tuple[Adapter, bytes, Stamp]:
    """An adapter, what it has in common with all that are alike, and the times of its files.

    Raises:
        HetLoRAError: the folder is not whole.
    """
    name = os.path.basename(os.path.realpath(folder))
    if name.endswith(LEFTOVERS):
        raise InputValueError(
            f"{folder}: its name is that of a transfer that did not end; send it again, or remove "
            "what is left of it"
        )
    stamp = stamp_of(folder)
    adapter = read_adapter(folder)
    config = {k: v for k, v in (adapter.config or {}).items() if k not in PRIVATE}
    sha = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    sha.update(repr([(key, *adapter.info(key)) for key in adapter.keys]).encode())
    return adapter, sha.digest(), stamp


def stamp_of(folder: str | os.PathLike[str]) -> Stamp:
    """Sizes and times of an adapter's two files; zeros for one that is not there."""
    stamp: list[int] = []
    for name in (WEIGHTS, CONFIG):
        try:
            found = os.stat(os.path.join(folder, name))
        except (OSError, ValueError):
            stamp += [0, 0]
        else:
            stamp += [found.st_size, found.st_mtime_ns]
    return tuple(stamp)


def try_header(folder: str | os.PathLike[str], policy: str) -> tuple[Adapter, bytes, Stamp] | str:
    """As `read_header`; what is wrong in words where that is to be skipped."""
    try:
        return read_header(folder)
    except (HetLoRAError, OSError) as error:
        if policy == "error":
            raise
        return str(error)


def data_mark(folder: str | os.PathLike[str]) -> bytes:
    """Length and ends of what follows a file's header: equal for equal tensors."""
    with open(os.path.join(folder, WEIGHTS), "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        end = file.seek(0, os.SEEK_END)
        sha = hashlib.sha256(f"{end - start}".encode())
        for place in (start, max(start, end - ENDS)):
            file.seek(place)
            sha.update(file.read(ENDS))
    return sha.digest()


def data_digest(folder: str | os.PathLike[str]) -> bytes:
    """SHA-256 of all that follows a file's header."""
    sha = hashlib.sha256()
    with open(os.path.join(folder, WEIGHTS), "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.digest()
