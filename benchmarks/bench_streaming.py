"""Ten thousand clients through a running aggregate: throughput, memory, error.

``python -m benchmarks.bench_streaming`` writes ``results/streaming.json`` and
``docs/img/streaming.png``. Clients of ranks 4 to 64 are made when their turn comes, from a seed of
their own. ``clients``: for every model and method, seconds by number of clients with a fitted power
law, the error of the sum against long doubles, and the peak of processes that take few and many
clients; ``products``: adding buffered components to the dense sum next to the bare product of that
shape. ``--quick`` takes few clients and small layers, and writes nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench_scaling import fit
from benchmarks.memory import limit_threads
from benchmarks.plots import COLOURS, IMAGES, MARKERS
from benchmarks.timing import interleaved, record
from hetlora_agg import ClientUpdate
from hetlora_agg.streaming import RunningAggregate
from hetlora_agg.streaming.added import Added, Arrival, accumulate
from hetlora_agg.streaming.plan import Plan
from hetlora_agg.types import LowRank

RANKS = tuple(range(4, 65, 4))
"""Ranks of the clients, in turns."""

SAMPLED = 24
"""Rows and columns of every layer that are followed in long doubles."""

MOST_GROWTH, LEAST_RATE, MOST_ERROR = 1.2, 0.6, 1e-10
"""The targets: peak memory of many clients over that of few, rate of products over the bare
product's, error over Σ p_k ‖B_k‖ ‖A_k‖."""


@dataclass(frozen=True)
class Model:
    """What is adapted.

    Attributes:
        what: in words.
        sizes: (out_features, in_features) of every layer.
        clients: how many.
        few: with how many their memory is compared.
    """

    what: str
    sizes: tuple[tuple[int, int], ...]
    clients: int
    few: int = 100


MODELS = {
    "MiniLM": Model("6 layers, q and v, 384×384", ((384, 384),) * 12, 10_000),
    "one layer of Llama-8B": Model(
        "1 of 32 layers, q 4096×4096 and v 1024×4096", ((4096, 4096), (1024, 4096)), 1_000
    ),
}

RUNS = (
    ("MiniLM", "flora"),
    ("MiniLM", "rbla"),
    ("one layer of Llama-8B", "flora"),
)
"""Products and factors; the sums of flora are those of flexlora and, by level, of rb."""


def quick(model: Model) -> Model:
    """The same with layers of at most 512 and few clients."""
    sizes = tuple((min(out, 512), min(columns, 512)) for out, columns in model.sizes)
    return replace(model, sizes=sizes, clients=400)


def client(model: Model, k: int) -> dict[str, ClientUpdate]:
    """Client number k, the same whenever it is asked for."""
    g = torch.Generator().manual_seed(k)
    r = RANKS[k % len(RANKS)]
    return {
        f"layers.{i}": ClientUpdate(
            torch.randn(r, columns, generator=g) / columns**0.5,
            torch.randn(out, r, generator=g) / r**0.5,
            weight=1 + k % 97,
            scaling=1.0,
        )
        for i, (out, columns) in enumerate(model.sizes)
    }


class Watched:
    """Some rows and columns of every layer's sum, in long doubles.

    Attributes:
        products: whether the products are summed, or the factors by slot.
    """

    def __init__(self, model: Model, products: bool) -> None:
        """Nothing was added yet."""
        self.products, self.size = products, 0.0
        self.sums: dict[str, Any] = {f"layers.{i}": 0.0 for i in range(len(model.sizes))}
        self.weight = np.zeros(max(RANKS), dtype=np.longdouble)

    def add(self, update: Mapping[str, ClientUpdate]) -> None:
        """One client, weights as they are."""
        for name, u in update.items():
            B, A = u.B[:SAMPLED].numpy(), u.A[:, :SAMPLED].numpy()
            B, A = (X.astype(np.longdouble) for X in (B, A))
            if self.products:
                self.sums[name] = self.sums[name] + u.weight * (B @ A)
            else:
                wide = np.zeros((2, max(RANKS), SAMPLED), dtype=np.longdouble)
                wide[0, : A.shape[0]], wide[1, : A.shape[0]] = u.weight * A, u.weight * B.T
                self.sums[name] = self.sums[name] + wide
            self.size += float(u.weight * np.linalg.norm(u.B) * np.linalg.norm(u.A))
        self.weight[: u.A.shape[0]] += u.weight

    def error(self, results: Mapping[str, Any]) -> float:
        """Frobenius distance of what was watched from the result, over the size of everything."""
        square = 0.0
        for name, result in results.items():
            A, B = (X.double().numpy() for X in (result.A, result.B))
            found = B[:SAMPLED] @ A[:, :SAMPLED]
            if self.products:
                exact = self.sums[name] / self.weight[0]
            else:
                rows, columns = self.sums[name] / self.weight[None, :, None]
                exact = columns.T @ rows
            square += float(np.square(found - exact).sum())
        return square**0.5 / (self.size / float(self.weight[0]))


def marks_of(clients: int) -> list[int]:
    """Numbers of clients at which the clock is read."""
    steps = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
    return [n for n in steps if n < clients] + [clients]


def stream(model: Model, method: str) -> dict[str, Any]:
    """Seconds by number of clients, of `add` alone, and the error of the result."""
    running, watched = RunningAggregate(method), Watched(model, method == "flora")
    marks, seconds, points = marks_of(model.clients), 0.0, []
    for k in range(model.clients):
        update = client(model, k)
        start = time.perf_counter()
        running.add(update, id=k)
        seconds += time.perf_counter() - start
        watched.add(update)
        if k + 1 in marks:
            points.append({"clients": k + 1, "seconds": seconds, "state": running.state_bytes})
    # In float64, or the cast of the result to the clients' float32 is all that would be seen.
    running._state.dtypes = dict.fromkeys(running._state.dtypes, torch.float64)
    start = time.perf_counter()
    results = running.result()
    taken = time.perf_counter() - start
    xs, ys = ([point[key] for point in points] for key in ("clients", "seconds"))
    return {
        "points": points,
        "fit": fit(xs, ys, min(100, model.clients / 4)),
        "result_seconds": taken,
        "error": watched.error(results),
        "bound": max(float(bound) for bound in running.bound.values()),
    }


def peak(model: Model, method: str, clients: int) -> dict[str, int]:
    """Peak of a process of its own that takes that many clients: in all, and above the start."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    arguments = (there, model, method, clients, torch.get_num_threads())
    process = context.Process(target=_peak, args=arguments, daemon=True)
    process.start()
    there.close()
    try:
        found: dict[str, int] = here.recv()
    finally:
        process.join()
    return found


def _peak(pipe: Connection, model: Model, method: str, clients: int, threads: int) -> None:
    limit_threads(threads)
    small = replace(model, sizes=((64, 64),))
    # Every library's own buffers are there before it counts.
    for one, count in ((small, 200), (model, clients)):
        if one is model:
            Path("/proc/self/clear_refs").write_text("5")
            resting = _resident("VmRSS")
        running = RunningAggregate(method)
        for k in range(count):
            running.add(client(one, k), id=k)
        running.result()
    whole = _resident("VmHWM")
    pipe.send({"peak": whole, "above": whole - resting})


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def products(model: Model, budget: float) -> dict[str, Any]:
    """Adding clients of 64 components together to the dense sum, next to the bare product."""
    out, columns = model.sizes[0]
    layers = sum(size == model.sizes[0] for size in model.sizes)
    ranks, g = (8, 16, 40), torch.Generator().manual_seed(0)
    shape = (layers, out, columns)
    added = Added(Plan(frozenset({"stack"}), "weight", "all"), shape)
    arrivals = [
        Arrival(
            torch.randn(layers, r, columns, generator=g),
            torch.randn(layers, out, r, generator=g),
            torch.full((layers, r), 3.0, dtype=torch.float64),
            tuple(range(r)),
        )
        for r in ranks
    ]
    total = torch.zeros(shape, dtype=torch.float64)
    A = torch.cat([a.A for a in arrivals], -2).double()
    B = torch.cat([a.B for a in arrivals], -1).double()
    runs = {
        "added": lambda: added.prepared(arrivals)(),
        "product": lambda: accumulate(total, LowRank(A, B)),
    }
    seconds = interleaved(runs, 15, budget)
    flops = 2 * layers * out * columns * sum(ranks)
    return {
        "shape": [layers, out, columns, sum(ranks)],
        "seconds": seconds,
        "gflops": {name: flops / s["median"] / 1e9 for name, s in seconds.items()},
        "rate": seconds["product"]["median"] / seconds["added"]["median"],
    }


def draw(results: Mapping[str, Any]) -> Any:
    """Seconds and peak memory against the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, row in enumerate(results["clients"]):
        label = f"{row['model']}, {row['method']}"
        x = [point["clients"] for point in row["points"]]
        y = [point["seconds"] for point in row["points"]]
        exponent = row["fit"]["exponent"]
        style = {"color": COLOURS[i], "marker": MARKERS[i]}
        left.plot(x, y, label=f"{label}: exponent {exponent:.2f}", **style)
        ends = sorted(row["peak"], key=int)
        peaks = [row["peak"][n]["peak"] / 1e6 for n in ends]
        right.plot([int(n) for n in ends], peaks, label=label, **style)
    for axes, what in ((left, "seconds in add"), (right, "peak of the process, MB")):
        axes.set(xscale="log", yscale="log", xlabel="clients", ylabel=what)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def measure(short: bool) -> dict[str, Any]:
    """Everything."""
    models = {name: quick(model) if short else model for name, model in MODELS.items()}
    rows = []
    for name, method in RUNS:
        model = models[name]
        row = {"model": name, "method": method, **stream(model, method)}
        row["peak"] = {n: peak(model, method, n) for n in (model.few, model.clients)}
        few, many = (row["peak"][n] for n in (model.few, model.clients))
        row["growth"] = {key: many[key] / few[key] for key in few}
        rows.append(row)
        print(name, method, {k: v for k, v in row.items() if k != "points"}, flush=True)
    rates = {name: products(model, 2.0 if short else 20.0) for name, model in models.items()}
    print(rates, flush=True)
    return {
        "models": {name: asdict(model) for name, model in models.items()},
        "clients": rows,
        "products": rates,
        "targets": {"growth": MOST_GROWTH, "rate": LEAST_RATE, "error": MOST_ERROR},
    }


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few clients; writes nothing")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    limit_threads(given.threads)
    results = measure(given.quick)
    if not given.quick:
        record("streaming", results)
        draw(results).savefig(IMAGES / "streaming.png")


if __name__ == "__main__":
    main()
