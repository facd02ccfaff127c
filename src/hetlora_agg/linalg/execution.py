"""Batches in chunks, chunks over a pool of workers, each with its share of the LAPACK threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
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
        workers: chunks of layers solved at a time on a CPU; None is one per thread of torch, fewer
            for little work.
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

    The first piece that fails, in order, raises, once no other is running any more.
    """
    workers = min(workers, len(pieces))
    if workers <= 1:
        return [solve(piece) for piece in pieces]
    limits, threads = resources(), max(1, torch.get_num_threads() // workers)

    def on_worker(piece: Piece) -> Done:
        # Thread count, grad mode and limits belong to a thread; gradients are on in a new one.
        torch.set_num_threads(threads)
        with torch.no_grad(), limited(limits.workers, limits.memory_limit):
            return solve(piece)

    with _POOLS.of(workers) as pool:
        futures = [pool.submit(on_worker, piece) for piece in pieces]
        _, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        wait(futures)
        # Pieces start in order, so whatever was cancelled comes after the one that failed.
        return [future.result() for future in futures]


@contextmanager
def one_lapack_thread(wanted: bool) -> Iterator[None]:
    """LAPACK on one thread inside, where that is wanted: a small core only waits for the others."""
    before = torch.get_num_threads()
    if not wanted or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Pools:
    """Worker threads that stay, since what a thread allocates first is slow.

    Each thread has its own count of torch threads, but a worker that sets its own changes the one
    that MKL and new threads go by too. The last of concurrent callers to finish puts it back; a
    thread whose first use of torch falls into a call keeps the smaller count.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._running = 0

    @contextmanager
    def of(self, workers: int) -> Iterator[ThreadPoolExecutor]:
        """A pool of so many workers, who may set their thread counts."""
        with self._lock:
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
                    torch.set_num_threads(torch.get_num_threads())


_POOLS = _Pools()


def _after_fork() -> None:
    """A forked process has the pools' memory but none of their threads."""
    global _POOLS
    _POOLS = _Pools()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
