"""One, two and four processes: clients or layers shared out, merged or reduced.

``python -m benchmarks.bench_distributed`` starts each number of processes with torchrun (gloo, on
this machine, one thread each) and writes ``results/distributed.json``. Clients shared out: wall and
processor seconds of adding, of `merge` and of `result`, and the bytes that went through the
loopback device meanwhile; layers shared out: those of `aggregate_layers`. Wall seconds need a
machine that does nothing else. ``--quick`` takes few clients and small layers, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.bench_scaling import fit
from benchmarks.distributed_process import jobs
from benchmarks.streaming_clients import distance
from benchmarks.timing import record
from hetlora_agg import LowRank

PROCESSES = (1, 2, 4)


def _results(path: Path) -> dict[str, LowRank]:
    tensors = load_file(path)
    names = {key.rpartition("/")[0] for key in tensors}
    return {name: LowRank(tensors[f"{name}/A"], tensors[f"{name}/B"]) for name in names}


def started(processes: int, folder: Path, quick: bool) -> list[list[dict[str, Any]]]:
    """Every job's rows, one of each process, from a job of torchrun."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "benchmarks.distributed_process"]
    command += [str(folder), *["--quick"] * quick]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [
        [json.loads((folder / f"{n}-process-{p}.json").read_text()) for p in range(processes)]
        for n in range(len(jobs(quick)))
    ]


def measure(quick: bool) -> list[dict[str, Any]]:
    """Every job over numbers of processes, each answer next to that of one process."""
    rows: list[dict[str, Any]] = [
        {
            "shared": what,
            "model": model.what,
            "method": method,
            "clients": model.clients,
            "runs": [],
        }
        for what, model, method in jobs(quick).values()
    ]
    with tempfile.TemporaryDirectory() as where:
        for count in PROCESSES:
            folder = Path(where) / str(count)
            for n, found in enumerate(started(count, folder, quick)):
                run = {"processes": count, "each": found, "summary": summary(found)}
                run["distance"] = _distance(Path(where), count, n)
                rows[n]["runs"].append(run)
    for row in rows:
        spent = [(r["processes"], r["summary"]["processor"]) for r in row["runs"]]
        row["fit"] = fit([p for p, _ in spent], [seconds for _, seconds in spent], 1)
    return rows


def summary(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Wall seconds of the slowest process, processor seconds of the busiest and of all together.

    Of the main step, and of every other one its fastest turn with the bytes of all together.
    """
    steps = {
        step: {
            "wall": min(max(turn) for turn in zip(*_column(each, step, "wall"), strict=True)),
            "processor": max(min(turns) for turns in _column(each, step, "processor")),
            "bytes": min(_column(each, step, "bytes")[0]),
        }
        for step in each[0]["steps"]
    }
    if "add" in each[0]:
        spent = [one["add"]["processor"] for one in each]
        wall = max(one["add"]["wall"] for one in each)
    else:
        spent = [min(turns) for turns in _column(each, "aggregate_layers", "processor")]
        wall = steps["aggregate_layers"]["wall"]
    peaks = [max(one["peak"].values()) for one in each if "peak" in one]
    return {
        "wall": wall,
        "processor": max(spent),
        "total": sum(spent),
        "peak": max(peaks, default=None),
        "steps": steps,
    }


def _column(each: list[dict[str, Any]], step: str, key: str) -> list[list[float]]:
    return [[turn[key] for turn in one["steps"][step]] for one in each]


def _distance(where: Path, count: int, number: int) -> float:
    """The largest distance of these processes' answers from that of one."""
    first = _results(where / "1" / f"{number}-0.safetensors")
    paths = sorted((where / str(count)).glob(f"{number}-*.safetensors"))
    return max(distance(_results(path), first) for path in paths)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few clients; writes nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = measure(given.quick)
    results = {"cores": os.cpu_count(), "jobs": rows}
    for row in rows:
        print(row["shared"], row["model"], row["method"], row["fit"]["exponent"])
        for run in row["runs"]:
            print("   ", run["processes"], run["distance"], run["summary"], flush=True)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    if not given.quick:
        print(record("distributed", results))


if __name__ == "__main__":
    main()
