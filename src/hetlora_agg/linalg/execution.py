"""Batches in chunks, chunks over a pool of workers, each with its share of the LAPACK threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Resources:
    """What the kernel may use.

    Attributes:
        workers: chunks of layers solved at a time on a CPU; None is one per thread of torch.
        memory_limit: bytes that one call may allocate; None is no limit.
    """

    workers: int | None = None
    memory_limit: int | None = None


_UNLIMITED = Resources()
_RESOURCES: ContextVar[Resources] = ContextVar("hetlora_agg_resources", default=_UNLIMITED)


def resources() -> Resources:
    """What the call in progress may use."""
    return _RESOURCES.get()


@contextmanager
def limited(workers: int | None, memory_limit: int | None) -> Iterator[None]:
    """Every decomposition inside keeps to these resources; what is None stays as it was."""
    now = resources()
    token = _RESOURCES.set(
        Resources(
            now.workers if workers is None else workers,
            now.memory_limit if memory_limit is None else memory_limit,
        )
    )
    try:
        yield
    finally:
        _RESOURCES.reset(token)


def run(solve: Callable[[Piece], Done], pieces: Sequence[Piece], workers: int) -> list[Done]:
    """``solve`` of every piece, in order, on up to ``workers`` threads.

    The first piece that fails, in order, raises.
    """
    workers = min(workers, len(pieces))
    if workers <= 1:
        return [solve(piece) for piece in pieces]

    limits = resources()

    def on_worker(piece: Piece) -> Done:
        # Grad mode and limits belong to the thread; a new one starts with gradients on.
        with torch.no_grad(), limited(limits.workers, limits.memory_limit):
            return solve(piece)

    with _POOL.of(workers) as pool:
        return list(pool.map(on_worker, pieces))


class _Pool:
    """Worker threads that stay, since what a thread allocates first is slow, and their settings.

    torch's thread count is one number per process. It is divided while pools run and put back when
    the last has finished: the first caller divides it, whoever comes meanwhile finds it divided.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._running = 0
        self._before = 0

    @contextmanager
    def of(self, workers: int) -> Iterator[ThreadPoolExecutor]:
        """``workers`` threads that may call LAPACK at once inside."""
        with self._lock:
            if self._running == 0:
                self._before = torch.get_num_threads()
                torch.set_num_threads(max(1, self._before // workers))
            self._running += 1
            if workers not in self._pools:
                self._pools[workers] = ThreadPoolExecutor(workers, "hetlora_agg")
            pool = self._pools[workers]
        try:
            yield pool
        finally:
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    torch.set_num_threads(self._before)


_POOL = _Pool()


def _after_fork() -> None:
    """A forked process has the pool's memory but none of its threads."""
    global _POOL
    _POOL = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
