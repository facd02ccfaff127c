"""Drivers against each other and against what a user could write instead, in one run.

``python -m benchmarks.bench_drivers`` takes about three minutes on two cores and writes
``results/drivers.json``: every workload of ``workloads.QUICK`` as multiples of LB (the two Gram
matrices and two output products as plain float32 GEMMs), and the crossover of the drivers over
R / min(out, in) that ``linalg.select.DENSE_FROM`` was read off.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.peers import dense_loop, excess, gemm_bound, qr_loop
from benchmarks.timing import interleaved, record
from benchmarks.workloads import EIGHT_TO_32, QUICK, Workload
from hetlora_agg.linalg import svd, svd_product

DENSE_LIMIT = 1024
"""Largest min(out, in) at which one dense SVD per layer is timed: 4096 takes minutes a layer."""


def measure(workload: Workload) -> dict[str, Any]:
    """Time every driver and peer on one workload, and their excess error over the optimum."""
    B, A = workload.factors()
    r = workload.rank

    def ours(driver: str) -> Callable[[], Any]:
        return lambda: svd_product(B, A, rank=r, driver=driver)

    runs: dict[str, Callable[[], Any]] = {
        "LB": lambda: gemm_bound(B, A, r),
        "auto": ours("auto"),
        "qr": ours("qr"),
        "peer QR loop": lambda: qr_loop(B, A, r),
    }
    if min(workload.out, workload.columns) <= DENSE_LIMIT:
        runs["dense"] = ours("dense")
        runs["peer dense loop"] = lambda: dense_loop(B, A, r)
    seconds = interleaved(runs)
    bound = seconds["LB"]["median"]
    svd = svd_product(B, A, rank=r)
    root = svd.S.sqrt()
    peer_B, peer_A = qr_loop(B, A, r)
    return {
        "workload": workload.name,
        "layers": workload.layers,
        "out": workload.out,
        "in": workload.columns,
        "R": workload.R,
        "rank": r,
        "driver": svd.solve.driver,
        "LB_ms": 1e3 * bound,
        "times_LB": {name: s["median"] / bound for name, s in seconds.items()},
        "spread": {name: s["slowest"] / s["fastest"] for name, s in seconds.items()},
        "faster_than_qr_loop": seconds["peer QR loop"]["median"] / seconds["auto"]["median"],
        "excess": excess(B, A, svd.U * root[:, None, :], root[..., None] * svd.Vh, r),
        "excess_qr_loop": excess(B, A, peer_B, peer_A, r),
    }


def crossover() -> list[dict[str, Any]]:
    """Milliseconds per layer of the three drivers as R approaches and passes min(out, in)."""
    rows = []
    for size, layers in ((256, 8), (512, 4)):
        for share in (0.25, 0.5, 0.65, 0.8, 0.9, 1.0, 1.25):
            g = torch.Generator().manual_seed(0)
            R = round(share * size)
            B = torch.randn(layers, size, R, generator=g)
            A = torch.randn(layers, R, size, generator=g)
            seconds = interleaved(
                {
                    d: lambda d=d, B=B, A=A: svd_product(B, A, rank=32, driver=d)
                    for d in ("gram", "qr", "dense")
                },
                repeats=3,
            )
            per_layer = {d: 1e3 * s["median"] / layers for d, s in seconds.items()}
            rows.append({"size": size, "R/size": share, "ms": per_layer})
            print(size, share, {d: round(ms, 2) for d, ms in per_layer.items()}, flush=True)
    return rows


def workspace() -> list[dict[str, Any]]:
    """Milliseconds per layer of a batch of layers over the size of a chunk's working copies."""
    rows = []
    before = svd.WORKSPACE_BYTES
    for shape in (Workload("", 48, 768, 768, EIGHT_TO_32, 32), QUICK[3], QUICK[4]):
        B, A = replace(shape, layers=max(8, shape.layers)).factors()

        def run(size: int, B: Any = B, A: Any = A, rank: int = shape.rank) -> Any:
            svd.WORKSPACE_BYTES = size
            return svd_product(B, A, rank=rank)

        sizes = [1 << power for power in (23, 25, 27, 29)]
        seconds = interleaved({str(size): partial(run, size) for size in sizes}, repeats=3)
        per_layer = {size: 1e3 * s["median"] / len(B) for size, s in seconds.items()}
        rows.append({"out": shape.out, "in": shape.columns, "R": shape.R, "ms": per_layer})
        print("workspace", rows[-1], flush=True)
    svd.WORKSPACE_BYTES = before
    return rows


def main() -> None:
    """Run everything, print as it goes, write the JSON."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    rows = []
    for workload in QUICK:
        row = measure(workload)
        rows.append(row)
        multiples = {name: round(x, 1) for name, x in row["times_LB"].items()}
        print(f"{workload.name}: {multiples}, excess {row['excess']:.1e}", flush=True)
    results = {"workloads": rows, "crossover": crossover(), "workspace": workspace()}
    print(record("drivers", results))


if __name__ == "__main__":
    main()
