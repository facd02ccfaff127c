"""Interleaved timing, and a record of what it was measured on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

RESULTS = Path(__file__).parent / "results"

PEERS = ("scipy", "scikit-learn", "peft", "transformers", "chorus_fl")
"""Packages whose versions belong to a measurement."""


SETTLE_SECONDS = 0.04
"""OpenBLAS's threads spin for about 30 ms after a call and take the cores from torch's."""

CHEAP_SECONDS = 0.05
"""Below this a call is timed right after one that is not, as in a loop: caches and threads warm."""


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    budget: float = 20.0,
    spinning: Container[str] = (),
) -> dict[str, dict[str, float]]:
    """Seconds of each run, taken in turns so that noise falls on all of them alike.

    Args:
        runs: name -> function. On CUDA the device is synchronised around each call. One that has a
            ``reset`` has it called before each turn, outside the time.
        repeats: turns; fewer for whoever has used up ``budget`` seconds of its own.
        budget: seconds per run. Whoever takes longer than that once has no warm-up.
        spinning: names after which the next one waits until foreign threads have gone to sleep.

    Returns:
        name -> median, fastest, slowest and number of turns.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    first = {}
    for name, run in runs.items():
        first[name] = _seconds(run)
        if first[name] > budget:
            taken[name].append(first[name])
    for _ in range(repeats):
        for name, run in runs.items():
            if sum(taken[name]) > budget:
                continue
            if first[name] < CHEAP_SECONDS:
                _seconds(run)
            taken[name].append(_seconds(run))
            if name in spinning:
                time.sleep(SETTLE_SECONDS)
    return {
        name: {
            "median": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
            "turns": len(times),
        }
        for name, times in taken.items()
    }


def _seconds(run: Callable[[], Any]) -> float:
    getattr(run, "reset", lambda: None)()
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def record(name: str, results: Any) -> Path:
    """Write results with machine, versions and commit to ``results/name.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return path


def machine() -> dict[str, Any]:
    """Processor, threads, versions and commit; a package that is not there is None."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "commit": _commit(),
        **{package: _version(package) for package in PEERS},
    }


def _commit() -> str:
    """The commit that was measured; what a benchmark has just written does not make it dirty."""

    def git(*arguments: str) -> str:
        call = ["git", *arguments]
        return subprocess.run(
            call, capture_output=True, text=True, cwd=RESULTS.parent.parent
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
    return git("describe", "--always") + "-dirty" * bool(changed)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
