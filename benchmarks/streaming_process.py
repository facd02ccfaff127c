"""A measurement in a process of its own, by its processor time and its high-water mark."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a fresh process on one thread; its error is raised here."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, function, arguments), daemon=True)
    process.start()
    there.close()
    try:
        what, value = here.recv()
    except EOFError:
        what, value = "failed", "its process died, most likely out of memory"
    finally:
        process.join()
    if what == "failed":
        raise RuntimeError(f"{function.__name__}{arguments}: {value}")
    return value


def _child(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(("done", function(*arguments)))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))


def every(parts: Mapping[str, tuple[Any, ...]], so_far: Path | None) -> dict[str, Any]:
    """Every part's result, each in a process of its own and written at once.

    Args:
        parts: name -> function and its arguments.
        so_far: where results are written as they are there; what it has is not run again.
    """
    found = json.loads(so_far.read_text()) if so_far and so_far.exists() else {}
    for name, (function, *arguments) in parts.items():
        if name in found:
            continue
        start = time.perf_counter()
        found[name] = apart(function, *arguments)
        print(f"{name}: {time.perf_counter() - start:.0f} s", _short(found[name]), flush=True)
        if so_far:
            so_far.write_text(json.dumps(found))
    # As they come back from a file, whether they did or not.
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not isinstance(v, list)}


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a call, and what it returned."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def in_turns(runs: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, dict[str, float]]:
    """Processor seconds of each run, taken in turns: median and fastest."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            took, _ = seconds(run)
            if turn:
                taken[name].append(took)
    return {n: {"median": statistics.median(t), "fastest": min(t)} for n, t in taken.items()}


def forget_peak() -> int:
    """Begin a new high-water mark; what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name: str = "VmHWM") -> int:
    """Bytes of this process as the system has them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
