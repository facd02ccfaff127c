"""Every property of the tests under thirty seeds that nobody chose for being good.

``python -m benchmarks.bench_seeds`` runs all hypothesis properties, 200 examples each, with the
seeds 1 to 30 and writes ``results/seeds.json``. ``make test`` draws the same examples every time; a
property that only holds for those is found here. A number after it is how many seeds to run at a
time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.timing import record

PROJECT = Path(__file__).parent.parent
SEEDS = range(1, 31)
EXAMPLES = 200


def run(seed: int) -> dict[str, Any]:
    """How many properties held under one seed, and the names of those that did not."""
    # The files that have any: collecting the others takes longer than running these.
    files = [str(p) for p in sorted((PROJECT / "tests").rglob("*.py")) if "@given" in p.read_text()]
    call = [sys.executable, "-m", "pytest", *files, "-q", "-m", "hypothesis", "-p"]
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


def main() -> None:
    """Run every seed and write the record."""
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        runs = dict(zip(map(str, SEEDS), pool.map(run, SEEDS), strict=True))
    record(
        "seeds",
        {
            "examples": EXAMPLES,
            "properties": max(one["passed"] + len(one["failed"]) for one in runs.values()),
            "seeds": runs,
            "seconds": time.perf_counter() - began,
        },
    )


if __name__ == "__main__":
    main()
