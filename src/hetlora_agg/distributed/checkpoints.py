"""Running aggregates of all processes in one folder, a whole round or the one before."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hetlora_agg.checks import as_path
from hetlora_agg.distributed.carrying import at_home
from hetlora_agg.distributed.together import Together, together
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.streaming import RunningAggregate
from hetlora_agg.streaming.checkpoint import restore
from hetlora_agg.streaming.files import read, write

FORMAT = "hetlora_agg.distributed"

INDEX = "checkpoint.safetensors"
"""Names the files that make a checkpoint; what it does not name is not there."""

FILE = re.compile(r"\.?state-\d+-\d+-of-\d+\.safetensors(\.part)?")


def save(running: RunningAggregate, folder: str | os.PathLike[str], *, group: Any = None) -> Path:
    """Writes everybody's running aggregates into one folder, all of them or none.

    Every process writes a file of its own beside those of the last checkpoint; once all are
    complete, process 0 replaces the index that names them. Killed at any moment, any process
    leaves the last checkpoint or this one. No pickle.

    Args:
        running: this process's; see `RunningAggregate.save`.
        folder: one that all processes see; made if it is not there. One group has it to itself.
        group: a process group of ``torch.distributed``; None is everybody.

    Returns:
        The folder.

    Raises:
        InputTypeError, InputValueError: no path; an option that no file can hold.
        ProcessLostError: another process died, fell silent, or could not write.
        OSError: this process could not write.

    Cost: every process's state once through SHA-256 and once onto the disk.

    Example:
        >>> import tempfile, torch, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> running = RunningAggregate("flexlora")
        >>> added = running.add((torch.ones(1, 4), torch.ones(4, 1)), id="phone-1")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load(save(running, folder))
        RunningAggregate('flexlora', 1 clients, kept whole)
        >>> dist.destroy_process_group()

    Fidelity: OURS.
    """
    with together(group, "save") as call:
        target = as_path(folder, "save", "folder")
        if not isinstance(running, RunningAggregate):
            raise InputTypeError(f"save: expected a RunningAggregate, got {type(running).__name__}")
        # By process 0 alone: its answer is everybody's, whoever else sees the folder late.
        numbers = call.hear("folder", _number(target) if call.peers.rank == 0 else None)
        rank, size = call.peers.rank, call.peers.size
        name = f"state-{numbers[0] + 1}-{rank}-of-{size}.safetensors"
        running.save(target / name)
        names = call.hear("files", name)
        if rank == 0:
            index = {"number": numbers[0] + 1, "files": names}
            _check_there(target, names)
            write(target / INDEX, {}, index, FORMAT)
            _clear(target, names)
        return target


def load(folder: str | os.PathLike[str], *, group: Any = None) -> RunningAggregate | None:
    """This process's part of the last checkpoint in a folder, or None where there is none.

    Files are shared out: each to one process, several to one where there are fewer processes than
    wrote, merged then. Where there are more, some get a running aggregate without clients.

    Args:
        folder: the one given to `save`.
        group: a process group of ``torch.distributed``; None is everybody.

    Returns:
        A running aggregate. `receipts` tells who is in any: a client that is added again where its
        receipt is changes nothing; on another process it is an error of `merge` and `result`.

    Raises:
        InputTypeError, InputValueError: no path; a file that is damaged, or that this process does
            not see; of a method that is not registered here.
        ProcessLostError: another process died, fell silent, or could not read.

    Cost: every file once from the disk and through SHA-256.

    Example:
        >>> import tempfile, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load(folder)
        >>> dist.destroy_process_group()

    Fidelity: OURS.
    """
    with together(group, "load") as call:
        source = as_path(folder, "load", "folder")
        names = call.hear("index", _index(source)["files"] if call.peers.rank == 0 else None)[0]
        return _part(call, source, names) if names else None


def _part(call: Together, source: Path, names: list[str]) -> RunningAggregate:
    """The files that fall to this process, merged."""
    _check_there(source, names)
    own = names[call.peers.rank :: call.peers.size]
    # Who has no file has nobody's clients, but everybody's settings.
    running = _loaded(source / (own or names)[0])
    if not own:
        return RunningAggregate._of(running._settings)
    for name in own[1:]:
        running.merge(_loaded(source / name))
    return running


def _loaded(path: Path) -> RunningAggregate:
    """One file, on this process's own card wherever it was written."""
    tensors, data = read(path)
    settings, state = restore(tensors, at_home(data), str(path))
    running = RunningAggregate._of(settings)
    running._state = state
    return running


def _index(folder: Path) -> dict[str, Any]:
    """The last checkpoint's number and files."""
    index = folder / INDEX
    if not os.path.exists(index):
        return {"number": 0, "files": []}
    _, told = read(index, FORMAT)
    found: dict[str, Any] = told
    return found


def _number(folder: Path) -> int:
    """The last checkpoint's number, in a folder that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    return int(_index(folder)["number"])


def _check_there(folder: Path, names: list[str]) -> None:
    """All processes must see the same folder."""
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise InputValueError(
            f"{folder}: {absent[0]} is not there; expected a folder that all processes see, such "
            "as one on a network file system"
        )


def _clear(folder: Path, names: list[str]) -> None:
    """Files of earlier checkpoints, and of ones that broke off."""
    for path in folder.iterdir():
        if FILE.fullmatch(path.name) and path.name not in names:
            path.unlink()
