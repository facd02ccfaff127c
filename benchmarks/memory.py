"""Peak memory of one call, in a fresh process of its own."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS
from benchmarks.packages import Problem
from benchmarks.workloads import TINY, Workload

TWICE = 0.25
"""Up to this share of the limit a first call only warms up (BLAS buffers alone are 20 MB once), and
the second is measured."""

SETUP_SECONDS = 60.0
"""How long starting a process and making the clients may take."""


def probe(name: str, workload: Workload, dtype: torch.dtype, limit: float) -> dict[str, Any]:
    """Peak bytes and seconds of one call of a contender, or why there are none.

    Returns:
        ``{"seconds": ..., "peak_bytes": ...}`` (None where /proc does not say), or
        ``{"skipped": reason}`` if it fails or one call takes longer than ``limit`` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    preload = ("scipy.sparse.linalg", "sklearn.utils.extmath", "peft", "chorus.server.aggregation")
    there = [m for m in preload if importlib.util.find_spec(m.split(".")[0])]
    context.set_forkserver_preload(["benchmarks.memory", *there])
    here, child = context.Pipe(duplex=False)
    arguments = (child, name, workload, dtype, torch.get_num_threads(), TWICE * limit)
    process = context.Process(target=_child, args=arguments, daemon=True)
    process.start()
    child.close()
    try:
        if not here.poll(SETUP_SECONDS):
            return {"skipped": f"skipped: not set up within {SETUP_SECONDS:g} s"}
        if (message := here.recv()) == "ready":
            if not here.poll(limit + 1):
                return {"skipped": f"skipped: not done within {limit:g} s"}
            message = here.recv()
    except EOFError:
        return {"skipped": "failed: its process died, most likely out of memory"}
    finally:
        process.kill()
        process.join()
    return message


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Bytes that one call needs above what was resident before it, its result included.

    Linux only: the high-water mark of the resident set is reset before the call.
    """
    status, marks = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and os.access(marks, os.W_OK)):
        return None
    gc.collect()
    # What free() has kept for itself would hide as much of the next call's needs.
    ctypes.CDLL(None).malloc_trim(0)
    marks.write_text("5")
    resting = _resident(status, "VmRSS")
    result = run()
    peak = _resident(status, "VmHWM") - resting
    del result
    return max(peak, 0)


def _resident(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _child(
    pipe: Connection,
    name: str,
    workload: Workload,
    dtype: torch.dtype,
    threads: int,
    twice_below: float,
) -> None:
    """Measure and send; every library is loaded by a tiny problem first."""
    # Collecting what the packages have imported would cost half a second each time.
    gc.freeze()
    try:
        limit_threads(threads)
        _prepared(name, TINY, dtype)()
        run = _prepared(name, workload, dtype)
        pipe.send("ready")
        start = time.perf_counter()
        peak = peak_bytes(run)
        seconds = time.perf_counter() - start
        if seconds < twice_below:
            getattr(run, "reset", lambda: None)()
            peak = peak_bytes(run)
        pipe.send({"seconds": seconds, "peak_bytes": peak})
    except Exception as error:
        # Whatever a package raises is a line in the table.
        pipe.send({"skipped": f"failed: {type(error).__name__}: {str(error)[:120]}"})


def _prepared(name: str, workload: Workload, dtype: torch.dtype) -> Callable[[], Any]:
    B, A = workload.factors(dtype=dtype)
    return CONTENDERS[name].prepare(Problem(B, A, workload.ranks, workload.rank))


def limit_threads(threads: int) -> None:
    """The same number of threads for torch and for the BLAS of NumPy and SciPy."""
    torch.set_num_threads(threads)
    if importlib.util.find_spec("threadpoolctl"):
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads)
