"""What the constants in ``hetlora_agg.linalg`` were read off.

``python -m benchmarks.bench_kernel`` writes ``results/kernel.json``:
``crossover``, the exact drivers over R and the shape, for ``select.DENSE_FROM``; ``workspace``,
chunks of the batch over their size; ``blocks``, the symmetric products over the width of a block
row and over the size of a cast; ``sampling``, the randomized driver against the exact one over the
share of the directions that it samples; ``threads``, one eigendecomposition on one thread and on
all; ``workers``, batches over the number of workers; ``parts``, what the Gram driver cannot do
without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch

from benchmarks.memory import limit_threads
from benchmarks.peers import gemm_bound
from benchmarks.timing import interleaved, record
from benchmarks.workloads import (
    EIGHT_TO_32,
    LLAMA_Q_R120,
    LLAMA_Q_R936,
    QUICK,
    VIT_R48,
    VIT_R192,
    Workload,
)
from hetlora_agg.linalg import select_driver, svd_product

CONSTANTS = {
    "workspace": ("hetlora_agg.linalg.memory", "WORKSPACE_BYTES"),
    "block": ("hetlora_agg.linalg.symmetric", "BLOCK"),
    "cast": ("hetlora_agg.linalg.symmetric", "CAST_BYTES"),
    "share": ("hetlora_agg.linalg.randomized", "MOST_SHARE"),
    "pool": ("hetlora_agg.linalg.memory", "POOL_WORK"),
    "one_thread": ("hetlora_agg.linalg.lapack", "ONE_THREAD_UP_TO"),
    "oversampling": ("hetlora_agg.linalg.randomized", "OVERSAMPLING"),
}
"""Where each constant lives; the one place to change when it moves."""


@contextmanager
def constant(name: str, value: int) -> Iterator[None]:
    """The library with another value of a constant."""
    where, attribute = CONSTANTS[name]
    module = import_module(where)
    before = getattr(module, attribute)
    setattr(module, attribute, value)
    try:
        yield
    finally:
        setattr(module, attribute, before)


SHARES = (0.25, 0.5, 0.65, 0.8, 0.9, 1.0, 1.25)
CROSSOVERS = (
    *((256, 256, 8, share) for share in SHARES),
    *((512, 512, 4, share) for share in SHARES),
    *((512, 1024, 4, share) for share in (0.65, 0.8, 0.9, 1.0)),
    *((768, 3072, 2, share) for share in (0.65, 0.83, 1.0)),
    *((1024, 4096, 2, share) for share in (0.8, 0.914, 1.0)),
)
"""out, in, layers and R / min(out, in) of the rows of `crossover`."""


def crossover() -> list[dict[str, Any]]:
    """Milliseconds per layer of the three drivers as R approaches and passes min(out, in)."""
    rows = []
    for out, columns, layers, share in CROSSOVERS:
        g = torch.Generator().manual_seed(0)
        R = round(share * min(out, columns))
        B = torch.randn(layers, out, R, generator=g)
        A = torch.randn(layers, R, columns, generator=g)
        seconds = interleaved(
            {d: partial(svd_product, B, A, 32, driver=d) for d in ("gram", "qr", "dense")},
            repeats=3,
        )
        per_layer = {d: 1e3 * s["median"] / layers for d, s in seconds.items()}
        chosen = select_driver(out, columns, R)
        rows.append({"out": out, "in": columns, "R": R, "ms": per_layer, "chosen": chosen})
        print(out, columns, R, chosen, {d: round(ms, 2) for d, ms in per_layer.items()}, flush=True)
    return rows


def workspace() -> list[dict[str, Any]]:
    """Milliseconds per layer of a batch of layers over the size of a chunk's working copies."""
    rows = []
    for shape in (Workload("", 48, 768, 768, EIGHT_TO_32, 32), QUICK[3], LLAMA_Q_R120):
        B, A = replace(shape, layers=max(8, shape.layers)).factors()

        def run(size: int, B: Any = B, A: Any = A, rank: int = shape.rank) -> Any:
            with constant("workspace", size):
                return svd_product(B, A, rank=rank)

        sizes = [1 << power for power in (22, 24, 26, 28)]
        seconds = interleaved({str(size): partial(run, size) for size in sizes}, repeats=3)
        per_layer = {size: 1e3 * s["median"] / len(B) for size, s in seconds.items()}
        rows.append({"out": shape.out, "in": shape.columns, "R": shape.R, "ms": per_layer})
        print("workspace", rows[-1], flush=True)
    return rows


def blocks() -> list[dict[str, Any]]:
    """Milliseconds of one float64 Gram matrix over the width of its block rows and casts."""
    symmetric = import_module(CONSTANTS["block"][0])
    rows = []
    for length, R in ((4096, 936), (4096, 120), (768, 192)):
        X = torch.randn(1, length, R, generator=torch.Generator().manual_seed(0))

        def run(name: str, value: int, X: Any = X) -> Any:
            with constant(name, value):
                return symmetric.gram_matrix(X)

        choices = [("block", w) for w in (50, 100, 200, 1 << 20)]
        choices += [("cast", 1 << power) for power in (20, 22, 24, 26)]
        runs = {f"{name} {value}": partial(run, name, value) for name, value in choices}
        seconds = interleaved(runs, repeats=9, budget=2)
        ms = {name: 1e3 * s["median"] for name, s in seconds.items()}
        rows.append({"length": length, "R": R, "ms": ms})
        print("blocks", rows[-1], flush=True)
    return rows


def sampling() -> list[dict[str, Any]]:
    """Milliseconds of the randomized driver, kept from giving up, and of the exact one."""
    rows = []
    where, attribute = CONSTANTS["oversampling"]
    extra = getattr(import_module(where), attribute)
    for share in (32, 16, 8, 4):
        workload = replace(LLAMA_Q_R936, rank=LLAMA_Q_R936.R // share - extra)
        B, A = workload.factors()

        def sampled(B: Any = B, A: Any = A, rank: int = workload.rank) -> Any:
            # No share is too large for a limit of 1/0.
            with constant("share", 0):
                return svd_product(B, A, rank=rank, driver="randomized")

        runs = {"exact": partial(svd_product, B, A, workload.rank), "sampling": sampled}
        seconds = interleaved(runs, repeats=3, budget=3)
        row = {"out": workload.out, "in": workload.columns, "R": workload.R}
        row |= {"rank": workload.rank, "share": (workload.rank + extra) / workload.R}
        rows.append({**row, "ms": {name: 1e3 * s["median"] for name, s in seconds.items()}})
        print("sampling", rows[-1], flush=True)
    return rows


def threads() -> list[dict[str, Any]]:
    """Milliseconds of one R×R float64 eigendecomposition on one thread and on all."""
    rows, every = [], torch.get_num_threads()
    for R in (32, 64, 128, 256, 512, 936):
        X = torch.randn(2 * R, R, generator=torch.Generator().manual_seed(0)).double()
        G = X.mT @ X

        def run(count: int, G: Any = G) -> Any:
            torch.set_num_threads(count)
            found = torch.linalg.eigh(G)
            torch.set_num_threads(every)
            return found

        seconds = interleaved({str(n): partial(run, n) for n in (1, every)}, repeats=9, budget=2)
        rows.append({"R": R, "ms": {n: 1e3 * s["median"] for n, s in seconds.items()}})
        print("threads", rows[-1], flush=True)
    return rows


def workers() -> list[dict[str, Any]]:
    """Milliseconds of a whole batch over the number of workers, and the work there is."""
    work, rows = import_module(CONSTANTS["pool"][0]).work, []
    for shape in QUICK:
        if shape.layers == 1:
            continue
        B, A = shape.factors()
        runs = {
            str(n): partial(svd_product, B, A, rank=shape.rank, workers=n)
            for n in (1, torch.get_num_threads())
        }
        seconds = interleaved(runs, repeats=9, budget=3)
        sizes = (shape.layers, shape.out, shape.columns, shape.R, shape.rank)
        row = {"workload": shape.name, "multiply_adds": work(sizes)}
        rows.append({**row, "ms": {n: 1e3 * s["median"] for n, s in seconds.items()}})
        print("workers", rows[-1], flush=True)
    return rows


def parts() -> list[dict[str, Any]]:
    """What the Gram driver cannot do without, in LB, for the workloads that have a target.

    Its two float64 Gram matrices, one R×R eigendecomposition and two float32 output products. Of
    one layer on all threads; of many on one thread, divided by the threads, as if nothing were lost
    by sharing out.
    """
    rows = [parts_of(shape) for shape in (LLAMA_Q_R936, LLAMA_Q_R120, VIT_R192, VIT_R48)]
    for row in rows:
        print("parts", row, flush=True)
    return rows


def parts_of(shape: Workload) -> dict[str, Any]:
    """One row of `parts`."""
    symmetric, every = import_module(CONSTANTS["block"][0]), torch.get_num_threads()
    B, A = shape.factors()
    G, X = symmetric.gram_matrix(B), B.new_ones(shape.layers, shape.R, shape.rank)
    few = every if shape.layers == 1 else 1
    small = shape.R <= import_module(CONSTANTS["one_thread"][0]).ONE_THREAD_UP_TO

    def on(threads: int, run: Callable[[], Any]) -> Callable[[], None]:
        def counted() -> None:
            torch.set_num_threads(threads)
            run()
            torch.set_num_threads(every)

        return counted

    grams = on(few, lambda: (symmetric.gram_matrix(B), symmetric.gram_matrix(A, -1)))
    runs = {
        "LB": partial(gemm_bound, B, A, shape.rank),
        "Gram matrices": grams,
        "eigendecomposition": on(1 if small else few, lambda: torch.linalg.eigh(G)),
        "output products": on(few, lambda: (B @ X, X.mT @ A)),
    }
    seconds = interleaved(runs, repeats=9, budget=4)
    bound = seconds.pop("LB")["median"]
    shared = bound * (1 if shape.layers == 1 else every)
    found = {name: s["median"] / shared for name, s in seconds.items()}
    return {"workload": shape.name, "LB_ms": 1e3 * bound, "times_LB": found}


def main() -> None:
    """Run everything, print as it goes, write the JSON."""
    limit_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    results = {
        "blocks": blocks(),
        "sampling": sampling(),
        "workspace": workspace(),
        "crossover": crossover(),
        "threads": threads(),
        "workers": workers(),
        "parts": parts(),
    }
    print(record("kernel", results))


if __name__ == "__main__":
    main()
