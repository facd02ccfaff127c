"""Every property of the tests under thirty seeds that nobody chose for being good.

``python -m benchmarks.bench_seeds`` runs all hypothesis properties, 200 examples each, with the
seeds 1 to 30 and writes ``results/seeds.json``. ``make test`` draws the same examples every time; a
property that only holds for those is found here. A number after it is how many seeds to run at a
time. What failed is mended; ``python -m benchmarks.bench_seeds again`` runs just that once more,
under all thirty seeds, and adds it to the record.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.report import load
from benchmarks.timing import machine, record

PROJECT = Path(__file__).parent.parent
SEEDS = range(1, 31)
EXAMPLES = 200


def run(seed: int, tests: Sequence[str]) -> dict[str, Any]:
    """How many properties held under one seed, and the names of those that did not."""
    call = [sys.executable, "-m", "pytest", *tests, "-q", "-m", "hypothesis", "-p"]
    call += ["no:cacheprovider", f"--hypothesis-seed={seed}"]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "fresh", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, cwd=PROJECT, env=environment)
    counted = dict(map(reversed, re.findall(r"(\d+) (passed|failed|error)", done.stdout)))
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.M)
    if not counted or done.returncode not in (0, 1):
        raise RuntimeError(f"seed {seed}:\n{(done.stdout + done.stderr)[-4000:]}")
    found = {"passed": int(counted.get("passed", 0)), "failed": failed}
    print(f"seed {seed}: {found}", flush=True)
    return found


def every_seed(tests: Sequence[str], workers: int) -> dict[str, Any]:
    """What became of these tests under every seed."""
    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        runs = dict(zip(map(str, SEEDS), pool.map(lambda s: run(s, tests), SEEDS), strict=True))
    return {
        "commit": machine()["commit"],
        "examples": EXAMPLES,
        "properties": max(one["passed"] + len(one["failed"]) for one in runs.values()),
        "seeds": runs,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Run every seed, or what failed once more, and write the record."""
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    workers = numbers[0] if numbers else 1
    if "again" not in sys.argv[1:]:
        # The files that have any: collecting the others takes longer than running these.
        every = sorted((PROJECT / "tests").rglob("*.py"))
        files = [str(path) for path in every if "@given" in path.read_text()]
        record("seeds", every_seed(files, workers))
        return
    found = load("seeds")["results"]
    failed = sorted({name for one in found["seeds"].values() for name in one["failed"]})
    record("seeds", {**found, "again": every_seed(failed, workers)})


if __name__ == "__main__":
    main()
