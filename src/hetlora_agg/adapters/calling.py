"""Calling the roll: every folder by its header, half-written ones and duplicates by policy."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hetlora_agg.adapters.combining import by_client, ranks_of, weights_of
from hetlora_agg.adapters.roll import (
    LEFTOVERS,
    Roll,
    Row,
    data_digest,
    data_mark,
    try_header,
)
from hetlora_agg.checks import as_list, as_path, check_choice
from hetlora_agg.errors import InputValueError

BAD_FOLDER = ("error", "skip")
"""What becomes of folders that are not whole."""

DUPLICATE = ("error", "skip", "keep")
"""What becomes of clients that came twice; "keep" takes equal tensors under different names."""

Progress = Callable[[str, int, int], None]


@dataclass(eq=False)
class Calling:
    """A roll while it is called.

    Attributes:
        on_bad_folder: policy.
        on_duplicate: policy.
        named: how many folders have an id.
        roll: who is there so far.
        real: real path -> who has it.
        marks: ends of the tensors -> the first client with them, until another has them too.
        digests: digest of the tensors -> the first client with them, where ends were equal.
    """

    on_bad_folder: str
    on_duplicate: str
    named: Counter[Hashable]
    roll: Roll = field(default_factory=Roll)
    real: dict[str, Hashable] = field(default_factory=dict)
    marks: dict[bytes, Hashable] = field(default_factory=dict)
    digests: dict[bytes, Hashable] = field(default_factory=dict)

    def call(self, id: Hashable, folder: Path, weight: float, wanted: int | None) -> None:
        """One folder: taken, skipped or refused."""
        roll, where = self.roll, os.path.realpath(folder)
        if where in self.real:
            self._twice(
                f"{folder} is given twice, for {self.real[where]!r} and {id!r}; give every client "
                "its own folder, once",
                f"{folder}: given twice, counted once",
            )
            return
        self.real[where] = id
        found = try_header(folder, self.on_bad_folder)
        if isinstance(found, str):
            # Its name may be another folder's too, which is whole.
            roll.excluded[id if self.named[id] == 1 else str(folder)] = found
            return
        adapter, kind, stamp = found
        row = Row(str(folder), weight, wanted, kind, stamp)
        if id in roll:
            self._namesake(id, row)
            return
        if other := self._same_tensors(id, row):
            self._twice(
                f"clients {other[0]!r} and {id!r} have the same tensors, byte for byte, in "
                f"{roll.rows[other[0]].folder} and {folder}; a client that sent twice counts once: "
                'leave one out with on_duplicate="skip", or take both for two clients that '
                'trained nothing with on_duplicate="keep"',
                None,
            )
            roll.excluded[id] = f"{folder}: its tensors are those of client {other[0]!r}"
            return
        roll.take(id, row, adapter)

    def _twice(self, refusal: str, note: str | None) -> None:
        if self.on_duplicate != "skip":
            raise InputValueError(f"paths: {refusal}")
        if note is not None:
            self.roll.notes.append(note)

    def _namesake(self, id: Hashable, row: Row) -> None:
        """Another folder of the same name: the same content is a duplicate, other is a riddle."""
        known = self.roll.rows[id]
        if known.kind == row.kind and data_digest(known.folder) == data_digest(row.folder):
            self._twice(
                f"{known.folder} and {row.folder} are both called {id!r} and have the same "
                'tensors; leave one out, or say on_duplicate="skip"',
                f"{row.folder}: the same as {known.folder}, counted once",
            )
            return
        raise InputValueError(
            f"paths: {known.folder} and {row.folder} are both called {id!r} and differ; which one "
            "is the client's nobody can tell. Leave one out, or pass a mapping of ids to folders: "
            "{'phone': …, 'tablet': …}"
        )

    def _same_tensors(self, id: Hashable, row: Row) -> tuple[Hashable] | None:
        """The client whose tensors are the same, if there is one."""
        if self.on_duplicate == "keep":
            return None
        mark = data_mark(row.folder)
        first = self.marks.setdefault(mark, id)
        if first is id:
            return None
        # Only now all of it: ten thousand files are not read twice to find that none is a copy.
        self.digests.setdefault(data_digest(self.roll.rows[first].folder), first)
        other = self.digests.setdefault(data_digest(row.folder), id)
        return None if other is id else (other,)


def call_roll(
    paths: Any,
    weights: Any,
    ranks: Any,
    on_bad_folder: str,
    on_duplicate: str,
    progress: Progress | None,
) -> Roll:
    """Every folder's header, one at a time.

    Args:
        paths: folders, whose names become ids; a mapping of ids to folders; or a folder of folders.
        weights: by position or by id, those of skipped folders included; None is 1 for all.
        ranks: what clients want back, likewise; None is what they sent.
        on_bad_folder: one of ``BAD_FOLDER``.
        on_duplicate: one of ``DUPLICATE``.
        progress: called with "folders", folders done and folders in all.

    Raises:
        InputTypeError, InputValueError: what is wrong, by folder.
    """
    check_choice("on_bad_folder", on_bad_folder, BAD_FOLDER)
    check_choice("on_duplicate", on_duplicate, DUPLICATE)
    entries = _entries(paths)
    if not entries:
        raise InputValueError("paths: no client adapters; pass at least one folder")
    own_weights = _by_entry(weights, [id for id, _ in entries], "weights", weights_of)
    own_ranks = _by_entry(ranks, [id for id, _ in entries], "ranks", ranks_of)
    calling = Calling(on_bad_folder, on_duplicate, Counter(id for id, _ in entries))
    for i, (id, folder) in enumerate(entries):
        weight = 1.0 if own_weights is None else own_weights[i]
        calling.call(id, folder, weight, None if own_ranks is None else own_ranks[i])
        if progress is not None:
            progress("folders", i + 1, len(entries))
    roll = calling.roll
    if not roll:
        why = next(iter(roll.excluded.values()))
        raise InputValueError(f"paths: none of {len(entries)} folders is whole; the first: {why}")
    return roll


def subfolders(directory: Path) -> list[Path]:
    """The clients' folders in a directory, by name; what is left of transfers among them.

    Hidden entries and plain files are no clients, unless their names say that they were to be. A
    link to nothing is one: its target may only be out of reach.
    """
    found = []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        hidden = entry.name.startswith(".")
        if _is_folder(entry):
            taken = not hidden or entry.name.endswith(LEFTOVERS)
        else:
            # A hidden file is a checkpoint's that was being written, or another program's.
            taken = not hidden and (entry.name.endswith(LEFTOVERS) or not os.path.exists(entry))
        if taken:
            found.append(Path(entry.path))
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder; what cannot be looked at is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _entries(paths: Any) -> list[tuple[Hashable, Path]]:
    """Ids and folders, as given."""
    if isinstance(paths, (str, bytes, os.PathLike)):
        directory = as_path(paths, "paths", "folder")
        if not os.path.isdir(directory):
            raise InputValueError(f"paths: {directory}: no such folder of clients' folders")
        paths = subfolders(directory)
    if isinstance(paths, Mapping):
        return [(id, _as_path(path, f"client {id!r}")) for id, path in paths.items()]
    listed = [_as_path(path, "paths") for path in as_list(paths, "paths")]
    return [(name_of(folder), folder) for folder in listed]


def _as_path(path: Any, what: str) -> Path:
    """The path as a `Path` that a system could take."""
    folder = as_path(path, what, "folder")
    if "\0" in str(folder):
        raise InputValueError(f"{what}: {str(folder)!r}: expected a path, got a NUL in it")
    return folder


def name_of(folder: Path) -> str:
    """What a folder is called where it is named: a link by its own name.

    "." and "x/.." have a name of their own only when resolved.
    """
    if folder.name in ("", ".."):
        return os.path.basename(os.path.realpath(folder))
    return folder.name


def _by_entry(given: Any, ids: list[Hashable], what: str, read: Any) -> list[Any] | None:
    """One value for each folder; two folders of one name share theirs."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        by_id = by_client(given, list(dict.fromkeys(ids)), what)
        return [read({id: by_id[id]}, [id])[id] for id in ids]
    values = by_client(given, list(range(len(ids))), what)
    return [read([values[i]], [id])[id] for i, id in enumerate(ids)]
