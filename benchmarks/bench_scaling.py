"""How cost grows, and what accuracy costs.

``python -m benchmarks.bench_scaling`` writes ``results/scaling.json``: time of ours and of the QR
loop over R, over the number of layers and over out + in, each with the exponent of a power law
fitted to part of the range; and for two workloads every contender, the approximate ones at several
settings, as a point of excess error against time. ``--trial`` keeps to small sizes and one turn.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import packages, peers
from benchmarks.bench_drivers import Kept, progress
from benchmarks.contenders import CONTENDERS, SPINNING, as_factors, machine_speed, refusal
from benchmarks.memory import limit_threads
from benchmarks.packages import Problem
from benchmarks.quality import Reference
from benchmarks.timing import interleaved, record
from benchmarks.workloads import FIVE_TO_64, TEN_TO_64, Workload

COMPARED = ("ours", "QR loop")

SIZE, R_FITTED_FROM = 4096, 128
RS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 3200)
LAYERS = (1, 2, 4, 8, 16, 32, 64, 128)
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
TRIAL_MOST_R, TRIAL_MOST_LAYERS, TRIAL_MOST_SIZE = 512, 32, 4096

MOST_EXPONENT = {"R": 2, "layers": 1, "out + in": 1}
"""The targets: cost is linear in layers and in out + in, and grows no faster than R²."""


def sweeps(trial: bool = False) -> dict[str, tuple[str, float, list[tuple[int, Workload]]]]:
    """Name -> what is held fixed, from where on the power law is fitted, and (x, workload)s.

    Small sizes are left out of the fits: there the calls cost more than the arithmetic. R stays
    below 0.8 min(out, in), where W is not formed.
    """
    Rs = [R for R in RS if not trial or R <= TRIAL_MOST_R]
    layers = [n for n in LAYERS if not trial or n <= TRIAL_MOST_LAYERS]
    sizes = [n for n in SIZES if not trial or n <= TRIAL_MOST_SIZE]
    return {
        "R": (
            f"one layer of {SIZE}×{SIZE}, r = min(R, 16)",
            R_FITTED_FROM,
            [(R, Workload("", 1, SIZE, SIZE, (R,), min(R, 16))) for R in Rs],
        ),
        "layers": (
            "768×768, R = 48, r = 16",
            4,
            [(n, Workload("", n, 768, 768, (16,) * 3, 16)) for n in layers],
        ),
        "out + in": (
            "one layer, out = in, R = 96, r = 16",
            4096,
            [(2 * n, Workload("", 1, n, n, (32,) * 3, 16)) for n in sizes],
        ),
    }


def fit(x: Sequence[float], y: Sequence[float], low: float) -> dict[str, float]:
    """Least squares of ``y = factor · x^exponent`` in logarithms, over ``x ≥ low``.

    Returns:
        exponent, factor, the range that was fitted (``from``, ``to``, ``points``) and ``worst``,
        the largest factor by which a fitted point lies off the line.
    """
    u, v = (np.log([b for a, b in zip(x, part, strict=True) if a >= low]) for part in (x, y))
    slope, intercept = np.polyfit(u, v, 1)
    off = np.abs(v - (slope * u + intercept)).max()
    return {
        "exponent": float(slope),
        "factor": float(np.exp(intercept)),
        "from": float(np.exp(u.min())),
        "to": float(np.exp(u.max())),
        "points": len(u),
        "worst": float(np.exp(off)),
    }


def sweep(name: str, trial: bool) -> dict[str, Any]:
    """Seconds of the compared contenders along one axis."""
    fixed, low, workloads = sweeps(trial)[name]
    points = []
    for x, workload in progress(workloads):
        B, A = workload.factors()
        problem = Problem(B, A, workload.ranks, workload.rank)
        runs = {c: CONTENDERS[c].prepare(problem) for c in COMPARED}
        seconds = interleaved(runs, 1 if trial else 7, 0.5 if trial else 4.0)
        points.append({"x": x, "seconds": {c: s["median"] for c, s in seconds.items()}})
        print(name, points[-1], flush=True)
    xs = [point["x"] for point in points]
    fits = {c: fit(xs, [point["seconds"][c] for point in points], low) for c in COMPARED}
    return {"fixed": fixed, "most": MOST_EXPONENT[name], "points": points, "fits": fits}


def settings(problem: Problem) -> dict[str, Mapping[str, Callable[[], Any]]]:
    """Approximate contender -> setting -> run: more iterations cost more and err less."""
    B, A, _, rank = problem
    return {
        "randomized": {
            f"niter {n}": partial(peers.randomized_factors, B, A, rank, niter=n)
            for n in (0, 1, 2, 4, 8)
        },
        "svd_lowrank": {
            f"niter {n}": partial(peers.svd_lowrank, B, A, rank, niter=n) for n in (0, 1, 2, 4, 8)
        },
        "svd_lowrank 2r": {
            f"niter {n}": partial(peers.svd_lowrank, B, A, rank, niter=n, oversampling=rank)
            for n in (0, 1, 2, 4)
        },
        "randomized_svd": {
            f"n_iter {n}": packages.sklearn_randomized(problem, n_iter=n) for n in (0, 2, 4, 7)
        },
        "svds": {f"tol {t:g}": packages.scipy_svds(problem, tol=t) for t in (0.3, 1e-1, 1e-2, 0.0)},
    }


def works(key: tuple[str, str], run: Callable[[], Any]) -> bool:
    """Whether a call goes through; what it raises is printed, and the point left out."""
    try:
        run()
    except Exception as error:
        print(*key, f"failed: {error}", flush=True)
        return False
    return True


def accuracy(workload: Workload, trial: bool) -> dict[str, Any]:
    """Excess error against time in LB of every contender that truncates to the wanted rank."""
    B, A = workload.factors()
    problem = Problem(B, A, workload.ranks, workload.rank)
    reference, limit, speed = Reference(B, A), 0.3 if trial else 20.0, machine_speed()
    some = [
        c
        for c in CONTENDERS
        if c != "PEFT cat" and not refusal(c, workload, torch.float32, limit, speed)
    ]
    several = {c: runs for c, runs in settings(problem).items() if c in some}
    runs = {(c, how): Kept(run) for c, of in several.items() for how, run in of.items()}
    runs |= {(c, ""): Kept(CONTENDERS[c].prepare(problem)) for c in some if c not in several}
    runs = {key: run for key, run in runs.items() if works(key, run)}
    named = {" | ".join(key): run for key, run in runs.items()}
    torch.manual_seed(0)
    seconds = interleaved(
        {"LB": lambda: peers.gemm_bound(B, A, workload.rank), **named},
        1 if trial else 5,
        0.2 if trial else 2.0,
        {name for (c, _), name in zip(runs, named, strict=True) if c in SPINNING},
    )
    points = []
    for (contender, how), key in zip(runs, named, strict=True):
        factors = as_factors(named[key].result, CONTENDERS[contender].scale(workload))
        points.append(
            {
                "contender": contender,
                "setting": how,
                "times_LB": seconds[key]["median"] / seconds["LB"]["median"],
                "excess": reference.excess(*factors),
                "sigma_error": reference.sigma_error(*factors),
            }
        )
        print(points[-1], flush=True)
    sizes = f"{workload.layers} × {workload.out}×{workload.columns}"
    title = f"{sizes}, R = {workload.R}, r = {workload.rank}"
    return {"workload": title, "points": points}


def main() -> None:
    """Run everything, print as it goes, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trial", action="store_true")
    trial = parser.parse_args().trial
    limit_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    results = {
        "mode": "trial" if trial else "full",
        "sweeps": {name: sweep(name, trial) for name in sweeps()},
        "accuracy": [
            accuracy(Workload("", 1 if trial else 8, 768, 768, FIVE_TO_64, 32), trial),
            accuracy(Workload("", 1, 1024, 4096, TEN_TO_64, 16), trial),
        ],
    }
    print(record("scaling", results))


if __name__ == "__main__":
    main()
