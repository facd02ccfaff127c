"""Where results go: nothing that is read, and no place twice, known before anything is computed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from hetlora_agg import InputValueError
from hetlora_agg.adapters.files import check_target


def check_targets(arguments: argparse.Namespace, folders: Sequence[Path]) -> None:
    """Refuse targets that would be found only after hours to be in somebody's way.

    Args:
        arguments: the command's.
        folders: the clients'.

    Raises:
        InputValueError: a target is an input's or would be taken for a client the next time; it
            is no folder; two targets are in each other's way.
    """
    named = {
        "--out": arguments.out,
        "--per-client-out": arguments.per_client_out,
        "--checkpoint": arguments.checkpoint,
    }
    places = {option: os.path.realpath(path) for option, path in named.items() if path is not None}
    _check_apart(places)
    inputs = {os.path.realpath(folder): folder for folder in folders}
    if (own := inputs.get(places["--out"])) is not None:
        raise InputValueError(
            f"--out: {arguments.out}: is the folder of an input, {own}; choose another one"
        )
    around = {os.path.dirname(place): folder for place, folder in inputs.items()}
    around |= {os.path.realpath(folder.parent): folder for folder in folders}
    if (own := around.get(places.get("--per-client-out", ""))) is not None:
        raise InputValueError(
            f"--per-client-out: {arguments.per_client_out}: holds the folder of an input, {own}, "
            "which would be replaced; choose another one"
        )
    for option in ("--out", "--per-client-out"):
        path = named[option]
        if path is None:
            continue
        if os.path.lexists(path) and not os.path.isdir(path):
            raise InputValueError(f"{option}: {path}: is there and no folder; choose another path")
        if arguments.source is not None and _is_found_in(places[option], arguments.source):
            raise InputValueError(
                f"{option}: {path}: is in the directory of --from, {arguments.source}, and would "
                "count as a client the next time; choose a place beside it"
            )
    if arguments.force:
        check_target(arguments.out, force=True)


def _check_apart(places: dict[str, str]) -> None:
    """No target in another, but for a checkpoint in the folder that results replace or join."""
    for option, place in places.items():
        for other, outer in places.items():
            if other == option or (option == "--checkpoint" and place != outer):
                continue
            if place == outer or Path(outer) in Path(place).parents:
                raise InputValueError(
                    f"{option}: {place}: is {'in ' * (place != outer)}what {other} writes; choose "
                    "a place of its own"
                )


def _is_found_in(place: str, source: Path) -> bool:
    """Whether a directory of clients would hold it, hidden ones not counted."""
    root = Path(os.path.realpath(source))
    if not root.is_dir() or root not in Path(place).parents:
        return False
    return not Path(place).relative_to(root).parts[0].startswith(".")
