"""Where folders were left off: a running state, which folders are in it, and when to save it."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hetlora_agg.adapters.roll import Roll, Stamp
from hetlora_agg.errors import InputValueError
from hetlora_agg.streaming import files
from hetlora_agg.streaming.checkpoint import differences, dump, restore
from hetlora_agg.streaming.receipts import Id, absent
from hetlora_agg.streaming.running import RunningAggregate

SHARE = 0.05
"""Largest share of the time that goes into saving."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What ends a run."""

FOLDERS = "folders"
"""Name of the tensor that says which folders were added, and how they looked."""


@dataclass(eq=False)
class Checkpoint:
    """A file that a run over folders can be taken up from.

    Attributes:
        path: of the file; None saves nothing.
        every: seconds between saves, at least.
        stamps: client's id -> sizes and times of its files when it was added.
        saved: clients in the file.
        ended: when the last save ended.
        cost: seconds that it took.
    """

    path: Path | None
    every: float
    stamps: dict[Id, Stamp] = field(default_factory=dict)
    saved: int = 0
    ended: float = field(default_factory=lambda: time.monotonic())
    cost: float = 0.0

    def resumed(self, fresh: RunningAggregate, roll: Roll) -> RunningAggregate:
        """What the file holds, if there is one and it is of this run; else the fresh one.

        Raises:
            InputValueError: damaged; of other settings; with clients that are not on the roll, or
                are there with another weight.
        """
        if self.path is None:
            return fresh
        if not self.path.parent.is_dir():
            raise InputValueError(f"checkpoint: {self.path.parent}: no such folder; make it first")
        if self.path.is_dir():
            raise InputValueError(f"checkpoint: {self.path}: is a folder; name a file")
        self._try()
        if not self.path.exists():
            return fresh
        tensors, data = files.read(self.path)
        other = f"checkpoint: {self.path}: of another run:"
        remedy = "remove it, choose another file, or go on with what it was begun with"
        if FOLDERS not in tensors:
            raise InputValueError(f"{other} no run over folders has written it; {remedy}")
        settings, state = restore(tensors, data, str(self.path))
        if odd := differences(fresh._settings, settings):
            raise InputValueError(f"{other} {', '.join(odd)} differ; {remedy}")
        running = RunningAggregate._of(settings)
        running._state = state
        if gone := absent(running.receipts, roll.rows):
            raise InputValueError(f"{other} it has {gone}, not among these folders; {remedy}")
        for id, receipt in running.receipts.items():
            if receipt.weight != roll.rows[id].weight:
                raise InputValueError(
                    f"{other} client {id!r} has weight {receipt.weight:g} in it and "
                    f"{roll.rows[id].weight:g} now; {remedy}"
                )
        told = json.loads(bytes(tensors[FOLDERS].numpy()))
        self.stamps = {id: tuple(stamp) for id, stamp in told}
        self.saved = len(running.receipts)
        return running

    def _try(self) -> None:
        """Raises OSError now rather than after hours where no file can be made."""
        assert self.path is not None
        part = self.path.with_name(f".{self.path.name}.part")
        part.touch()
        part.unlink()

    def due(self) -> bool:
        """Whether a save now is neither too early nor too much of the time."""
        since = time.monotonic() - self.ended
        return self.path is not None and since >= max(self.every, self.cost * (1 / SHARE - 1))

    def save(self, running: RunningAggregate) -> None:
        """Write everything, unless nothing is new."""
        if self.path is None or len(running.receipts) == self.saved:
            return
        begun = time.monotonic()
        tensors, data = dump(running._settings, running._whole())
        text = json.dumps(list(self.stamps.items())).encode()
        tensors[FOLDERS] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        files.write(self.path, tensors, data)
        self.saved = len(running.receipts)
        self.ended = time.monotonic()
        self.cost = self.ended - begun

    @contextmanager
    def guarding(self, running: RunningAggregate) -> Iterator[Callable[[], None]]:
        """Saves however the block is left; yields what raises an interrupt that came meanwhile."""
        with _deferred(self.path is not None) as check:
            try:
                yield check
            except BaseException:
                # What broke off in the middle of a change is not worth keeping: the last file is.
                if running._broken is None:
                    self.save(running)
                raise
            self.save(running)


@contextmanager
def _deferred(active: bool) -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the end of a step, unless it comes twice; threads have no say in it.

    So does every signal of ``SIGNALS`` that somebody handles; what is ignored stays so.
    """
    if not active or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {int(n): own for n in SIGNALS if callable(own := signal.getsignal(n))}
    came: list[int] = []
    waiting: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            before[number](number, frame)
        else:
            waiting.append(number)

    def check() -> None:
        while waiting:
            number = waiting.pop()
            before[number](number, None)

    for number in before:
        signal.signal(number, note)
    try:
        yield check
    finally:
        for number, own in before.items():
            signal.signal(number, own)


def unchanged(stamps: Mapping[Id, Stamp], roll: Roll, id: Id) -> bool:
    """Whether a folder's files have the sizes and times they had when the client was added."""
    return stamps.get(id) == roll.rows[id].stamp
