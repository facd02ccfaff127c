"""Our drivers against everything a user could run instead, in one process and in turns.

``python -m benchmarks.bench_drivers`` measures every workload of `workloads` and writes
``results/drivers.json``; ``--quick`` keeps to `QUICK` and writes ``results/drivers-quick.json``.
The unit is LB: the two Gram matrices and two output products as plain GEMMs (the product W itself
where R > 0.8 min(out, in)). A run that was interrupted goes on where it stopped if neither the
library nor the benchmark has changed since.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hetlora_agg
from benchmarks import workloads
from benchmarks.contenders import CONTENDERS, SPINNING, as_factors, machine_speed, refusal
from benchmarks.memory import limit_threads, probe
from benchmarks.packages import Problem
from benchmarks.peers import forms_product, gemm_bound
from benchmarks.quality import Reference
from benchmarks.targets import summary, targets
from benchmarks.timing import interleaved, record
from benchmarks.workloads import Workload
from hetlora_agg import linalg

Case = tuple[Workload, torch.dtype]


@dataclass(frozen=True)
class Mode:
    """How much to run.

    Attributes:
        name: "quick", "full" or "trial".
        limit: seconds that one call of a contender may take, or it is skipped.
        turns: most turns per contender.
        budget: seconds per contender and workload; whoever takes longer has one turn.
    """

    name: str
    limit: float
    turns: int
    budget: float


MODES = {
    "quick": Mode("quick", limit=8.0, turns=11, budget=0.7),
    "full": Mode("full", limit=60.0, turns=11, budget=2.5),
    "trial": Mode("trial", limit=0.5, turns=1, budget=0.1),
}


REQUIRED = ("ours", "QR loop")
"""Never skipped: every ratio is against one of these."""

PATIENCE = 300.0
"""Their limit in seconds."""


class Kept:
    """A run that keeps its last result until the next turn."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.result: Any = None

    def __call__(self) -> None:
        """One call."""
        self.result = self.run()

    def reset(self) -> None:
        """Give the last result back, outside the time."""
        self.result = None
        getattr(self.run, "reset", lambda: None)()


def cases(mode: Mode) -> list[Case]:
    """What a mode measures, the quick workloads of either dtype first."""
    todo = [(w, torch.float32) for w in workloads.QUICK]
    todo += [(w, torch.float64) for w in workloads.QUICK_FLOAT64]
    if mode.name == "full":
        todo += [(w, torch.float32) for w in workloads.MORE]
        todo += [(w, torch.float64) for w in workloads.MORE_FLOAT64]
    return todo


def measure(workload: Workload, dtype: torch.dtype, mode: Mode, speed: float) -> dict[str, Any]:
    """Time, quality and memory of every contender on one workload."""
    B, A = workload.factors(dtype=dtype)
    problem = Problem(B, A, workload.ranks, workload.rank)
    found: dict[str, dict[str, Any]] = {}
    for name, contender in CONTENDERS.items():
        if dtype == torch.float64 and not contender.float64:
            continue
        limit = PATIENCE if name in REQUIRED else mode.limit
        reason = refusal(name, workload, dtype, limit, speed)
        found[name] = {"skipped": reason} if reason else probe(name, workload, dtype, limit)
    if missing := {name: found[name] for name in REQUIRED if "skipped" in found[name]}:
        raise RuntimeError(f"{workload.name}: nothing to compare with: {missing}")
    kept = {n: Kept(CONTENDERS[n].prepare(problem)) for n in found if "skipped" not in found[n]}
    runs = {"LB": lambda: gemm_bound(B, A, workload.rank), **kept}
    torch.manual_seed(0)
    seconds = interleaved(runs, mode.turns, mode.budget, SPINNING)
    reference, bound = Reference(B, A), seconds["LB"]["median"]
    for name, run in kept.items():
        s = seconds[name]
        found[name] = {
            "times_LB": s["median"] / bound,
            "spread": s["slowest"] / s["fastest"],
            "turns": s["turns"],
            "against_ours": s["median"] / seconds["ours"]["median"],
            "peak_bytes": found[name]["peak_bytes"],
            **_quality(reference, run.result, CONTENDERS[name].scale(workload), workload.rank),
        }
        run.reset()
    row = {**_sizes(workload, dtype), "LB_ms": 1e3 * bound, "contenders": found}
    return row | _predicted(workload, dtype, found["ours"]["peak_bytes"])


def _sizes(workload: Workload, dtype: torch.dtype) -> dict[str, Any]:
    out, columns, R = workload.out, workload.columns, workload.R
    return {
        "workload": workload.name,
        "layers": workload.layers,
        "out": out,
        "in": columns,
        "R": R,
        "rank": workload.rank,
        "clients": len(workload.ranks),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "driver": linalg.select_driver(out, columns, R, workload.rank, dtype),
        "LB_of": "W" if forms_product(out, columns, R) else "Grams",
    }


def _quality(reference: Reference, result: Any, scale: float, rank: int) -> dict[str, Any]:
    B, A = as_factors(result, scale)
    if B.shape[-1] != rank:
        # Not a truncation to this rank, so there is no optimum to compare with.
        return {"rank": B.shape[-1], "excess": None, "sigma_error": None}
    return {
        "rank": rank,
        "excess": reference.excess(B, A),
        "sigma_error": reference.sigma_error(B, A),
    }


def _predicted(workload: Workload, dtype: torch.dtype, peak: int | None) -> dict[str, Any]:
    """The library's own prediction of its peak next to the measured one."""
    predict = getattr(linalg, "predicted_bytes", None)
    if predict is None:
        return {"predicted_bytes": None, "memory_ratio": None}
    predicted = predict(
        workload.out,
        workload.columns,
        workload.R,
        rank=workload.rank,
        layers=workload.layers,
        dtype=dtype,
    )
    ratio = None if peak is None else peak / predicted
    return {"predicted_bytes": predicted, "memory_ratio": ratio}


def code_state() -> str:
    """A hash of library and benchmark, by which an interrupted run knows that it may go on."""
    state = hashlib.sha256(torch.__version__.encode())
    for folder in (Path(hetlora_agg.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            state.update(path.read_bytes())
    return state.hexdigest()[:16]


def run_all(
    todo: Sequence[Case], mode: Mode, so_far: Path, minutes: float = math.inf
) -> list[dict[str, Any]]:
    """Every case, each written to ``so_far`` at once; none is begun after ``minutes``."""
    start = time.perf_counter()
    rows = json.loads(so_far.read_text()) if so_far.exists() else []
    done = {(row["workload"], row["dtype"]) for row in rows}
    speed = machine_speed()
    for workload, dtype in progress(todo):
        if (workload.name, str(dtype).removeprefix("torch.")) in done:
            continue
        if time.perf_counter() - start > 60 * minutes:
            continue
        row = measure(workload, dtype, mode, speed)
        rows.append(row)
        so_far.write_text(json.dumps(rows))
        gc.collect()
        ours, loop = row["contenders"]["ours"], row["contenders"]["QR loop"]
        print(
            f"{row['workload']} {row['dtype']}: LB {row['LB_ms']:.2f} ms, ours "
            f"{ours['times_LB']:.2f} LB, QR loop {loop['against_ours']:.2f} times that, excess "
            f"{ours['excess']:.1e}, memory {row['memory_ratio'] or 0:.2f} of what is predicted",
            flush=True,
        )
    return rows


def progress(todo: Sequence[Any]) -> Any:
    """A progress bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return todo
    return tqdm(todo, disable=None)


def main() -> None:
    """Run everything, print as it goes, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mode", choices=MODES, default="full")
    parser.add_argument("--quick", dest="mode", action="store_const", const="quick")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no workload later")
    given = parser.parse_args()
    mode = MODES[given.mode]
    limit_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    key = f"{mode.name}-{torch.get_num_threads()}-{code_state()}"
    so_far = Path(tempfile.gettempdir()) / f"hetlora_agg-drivers-{key}.json"
    start = time.perf_counter()
    rows = run_all(cases(mode), mode, so_far, given.minutes)
    measured = {(row["workload"], row["dtype"]) for row in rows}
    every = [(w.name, str(dtype).removeprefix("torch.")) for w, dtype in cases(mode)]
    results = {
        "mode": dataclasses.asdict(mode),
        # Of this process only: what an interrupted run has measured before is not counted.
        "minutes": (time.perf_counter() - start) / 60,
        "contenders": {name: contender.note for name, contender in CONTENDERS.items()},
        "workloads": rows,
        "left_out": [" ".join(case) for case in every if case not in measured],
        "summary": summary(rows),
        "targets": targets(rows),
    }
    for target in results["targets"]:
        verdict = "absent" if target["measured"] is None else "met" if target["met"] else "MISSED"
        print(f"{verdict:6}", target["name"], target["target"], target["measured"])
    print(record("drivers-quick" if mode.name == "quick" else "drivers", results))
    so_far.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
