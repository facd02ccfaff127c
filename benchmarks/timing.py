"""Interleaved timing, and a record of what it was measured on."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int = 5, budget: float = 20.0
) -> dict[str, dict[str, float]]:
    """Seconds of each run, taken in turns so that noise falls on all of them alike.

    Args:
        runs: name -> function. On CUDA the device is synchronised around each call.
        repeats: turns; fewer for whoever has used up ``budget`` seconds of its own.
        budget: seconds per run.

    Returns:
        name -> median, fastest, slowest and number of turns.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        # One warm-up for everyone who can afford a second turn.
        if time.perf_counter() - start > budget:
            taken[name].append(time.perf_counter() - start)
    for _ in range(repeats):
        for name, run in runs.items():
            if sum(taken[name]) > budget:
                continue
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            taken[name].append(time.perf_counter() - start)
    return {
        name: {
            "median": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
            "turns": len(times),
        }
        for name, times in taken.items()
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def record(name: str, results: Any) -> Path:
    """Write results with machine, versions and commit to ``results/name.json``."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    document = {
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "commit": commit,
        },
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
