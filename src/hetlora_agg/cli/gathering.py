"""Clients by the thousand on a command line: folders and weights from files."""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hetlora_agg import InputValueError
from hetlora_agg.adapters.calling import subfolders
from hetlora_agg.cli.adapters import numbers

FILES = (".json", ".csv")
"""Names of files with weights end so."""


def add_clients(parser: argparse.ArgumentParser) -> None:
    """The clients' folders and what each counts for, however many."""
    add = parser.add_argument
    add("folders", nargs="*", type=Path, metavar="ADAPTER", help="a client's PEFT adapter folder")
    add(
        "--from",
        dest="source",
        type=Path,
        metavar="PATH",
        help="a directory of such folders, or a file with one per line, for thousands of them",
    )
    add(
        "--weights",
        type=weights,
        metavar="N,N,…|FILE",
        help="one per client, or a .json or .csv of names and weights; default all alike",
    )


def folders_of(arguments: argparse.Namespace) -> list[Path]:
    """The folders that were named, in the order given; of a directory, in the order of names."""
    named: list[Path] = arguments.folders
    source: Path | None = arguments.source
    if (source is None) == (not named):
        raise InputValueError(
            "ADAPTER …, --from: expected folders or --from PATH, got "
            + ("both" if named else "neither")
        )
    if source is None:
        return named
    if os.path.isdir(source):
        return subfolders(source)
    if not os.path.isfile(source):
        raise InputValueError(f"--from: {source}: expected a directory or a file, found neither")
    try:
        # A byte order mark is no part of a name; other separators than \n may be.
        lines = [line.strip() for line in source.read_text(encoding="utf-8-sig").split("\n")]
    except ValueError as error:
        raise InputValueError(f"--from: {source}: expected a text in UTF-8: {error}") from None
    if odd := [i for i, line in enumerate(lines, 1) if "\0" in line]:
        raise InputValueError(f"--from: {source}, line {odd[0]}: expected a path, got a NUL in it")
    return [Path(line) for line in lines if line]


def weights(text: str) -> Any:
    """Numbers separated by commas, or a file's mapping of names to numbers."""
    path = Path(text)
    if path.suffix not in FILES:
        return numbers(text)
    try:
        content = path.read_text(encoding="utf-8-sig")
        pairs = _json_pairs(content) if path.suffix == ".json" else _csv_pairs(content)
        found: dict[str, float] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name!r} is there twice")
            found[name] = float(value)
    except (OSError, ValueError, TypeError, RecursionError, OverflowError, csv.Error) as error:
        raise argparse.ArgumentTypeError(
            f'{path}: expected {{"name": weight, …}}, or lines name,weight: {error}'
        ) from None
    return found


def _json_pairs(content: str) -> list[tuple[str, Any]]:
    """Names and values of an object, every one of them."""
    pairs = json.loads(content, object_pairs_hook=list)
    if not isinstance(pairs, list) or not all(
        isinstance(pair, tuple) and not isinstance(pair[1], (bool, list, str)) for pair in pairs
    ):
        raise ValueError("no object of numbers")
    return pairs


def _csv_pairs(content: str) -> Iterable[tuple[str, str]]:
    """Names and values line by line, without a heading."""
    rows = [row for row in csv.reader(content.splitlines()) if row]
    if odd := next((row for row in rows if len(row) != 2), None):
        raise ValueError(f"{len(odd)} columns in {','.join(odd)[:80]!r}")
    if rows and not _is_number(rows[0][1]):
        rows = rows[1:]
    return [(name.strip(), value) for name, value in rows]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
