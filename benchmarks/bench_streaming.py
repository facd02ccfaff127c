"""Ten thousand clients through a running aggregate: throughput, memory, error, checkpoints.

``python -m benchmarks.bench_streaming`` writes ``results/streaming.json``; ``python -m
benchmarks.plots_streaming`` draws it. Clients of ranks 4 to 64 are made when their turn comes, from
a seed of their own. Seconds are processor time of one thread, so that other processes on the
machine do not count; every part runs in a process of its own. An interrupted run goes on where it
was if neither library nor benchmarks have changed. ``--quick`` takes few clients and small layers,
and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import streaming_costs as costs
from benchmarks.bench_drivers import code_state
from benchmarks.bench_scaling import fit
from benchmarks.streaming_clients import (
    LLAMA,
    MINILM,
    Model,
    Stream,
    Watched,
    client,
    distance,
    tiny,
)
from benchmarks.streaming_process import every, forget_peak, resident, seconds
from benchmarks.timing import record
from hetlora_agg import ClientUpdate, aggregate_layers
from hetlora_agg.streaming import RunningAggregate

MODELS = {"MiniLM": MINILM, "one layer of Llama-8B": LLAMA}

STREAMS = {
    "MiniLM": (
        Stream("flora", watched="products"),
        Stream("flexlora", options={"rank": 64}),
        Stream("rb", "roster"),
        Stream("rb", "levels"),
        Stream("rbla", watched="factors"),
        Stream("hetlora"),
    ),
    "one layer of Llama-8B": (
        Stream("flora", watched="products"),
        Stream("rbla", watched="factors"),
    ),
}
"""Sums of products and of factors, and what a method adds to them."""

SMALL, RECEIPTS = replace(MINILM, what="one layer of 64×64", sizes=((64, 64),)), 20_000
"""A layer so small that what is kept of every client shows beside its sums."""

FEW = 100
"""With how many clients the memory of many is compared."""

ONE_SHOT = 1_000
"""Clients that one call takes at once, for its result to be compared with."""

LAYERS, LAYERS_CLIENTS = (1, 2, 8, 32), 100
"""Layers of Llama-8B, and how many clients: just more than are kept whole."""

TRUNCATED, TRUNCATED_CLIENTS = (2, 4), 160
"""Ranks of truncated states over the largest client's, and how many clients they take."""

MOST_GROWTH, LEAST_RATE, MOST_ERROR = 1.2, 0.6, 1e-10
"""The targets: peak memory of all clients over that of few, rate of adding over the machine's
matrix product, error."""


def marks_of(clients: int) -> list[int]:
    """Numbers of clients at which the clock is read."""
    steps = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
    return [n for n in steps if n < clients] + [clients]


def streamed(model: Model, stream: Stream, few: int | None = None) -> dict[str, Any]:
    """Seconds in `add` and peak of the process by number of clients, error, checkpoint.

    Growth, and the line fitted to the seconds, begin at ``few`` clients; None is `FEW`.
    """
    few = FEW if few is None else few
    small = replace(model, sizes=SMALL.sizes, clients=200)
    _fill(RunningAggregate(stream.method, **stream.settings(small)), small).result()
    running = RunningAggregate(stream.method, **stream.settings(model))
    watched = Watched(model, stream.watched) if stream.watched else None
    marks, taken, points = marks_of(model.clients), 0.0, []
    resting = highest = forget_peak()
    for k in range(model.clients):
        update = client(model, k)
        took, _ = seconds(lambda update=update, k=k: running.add(update, id=k))  # type: ignore
        taken += took
        if watched:
            watched.add(update)
        if k + 1 not in marks:
            continue
        point = {"clients": k + 1, "seconds": taken, "state": running.state_bytes}
        # A roster's result is an error as long as somebody is missing.
        if k + 1 in (few, 1_000, model.clients) and stream.how != "roster":
            point["result"], _ = seconds(running.result)
        # The system's count is a few pages late, so it may seem to fall.
        highest = max(highest, resident())
        points.append(point | {"peak": highest})
        print(stream.label, point, flush=True)
    xs, ys = ([point[key] for point in points] for key in ("clients", "seconds"))
    low, high = (next(p["peak"] for p in points if p["clients"] == n) for n in (few, xs[-1]))
    checkpoint = costs.checkpoint(running)
    return {
        "points": points,
        "fit": fit(xs, ys, few),
        "resting": resting,
        # A few pages of small layers may all have been there before.
        "growth": {
            "peak": high / low,
            "above": (high - resting) / (low - resting) if low > resting else None,
        },
        "error": _error(running, watched) if watched else None,
        "checkpoint": checkpoint,
    }


def _fill(running: RunningAggregate, model: Model) -> RunningAggregate:
    for k in range(model.clients):
        running.add(client(model, k), id=k)
    return running


def _error(running: RunningAggregate, watched: Watched) -> dict[str, float]:
    # In float64, or the cast of the result to the clients' float32 is all that would be seen.
    running._state.dtypes = dict.fromkeys(running._state.dtypes, torch.float64)
    results = running.result()
    scale = watched.size / float(watched.weight[0])
    root = sum(float(bound) ** 2 for bound in running.bound.values()) ** 0.5
    return {"watched": watched.error(results), "bound": root / scale}


def one_shot(model: Model, stream: Stream) -> dict[str, Any]:
    """Distance of the streamed result from that of one call on the same float64 clients."""
    updates: dict[str, list[ClientUpdate]] = {}
    running = RunningAggregate(stream.method, **stream.settings(model))
    for k in range(model.clients):
        one = client(model, k, torch.float64)
        running.add(one, id=k)
        for layer, u in one.items():
            updates.setdefault(layer, []).append(u)
    took, found = seconds(running.result)
    once, exact = seconds(lambda: aggregate_layers(updates, stream.method, **stream.options))
    return {
        "clients": model.clients,
        "error": distance(found, exact),
        "result": took,
        "one_shot": once,
        "peak": resident(),
        "how": running._state.how,
    }


def by_layers(model: Model, layers: int) -> dict[str, Any]:
    """All of a model's layers: seconds, state, peak and checkpoint."""
    resting = forget_peak()
    running = RunningAggregate("flora")
    whole, taken = replace(model, sizes=model.sizes * layers), 0.0
    for k in range(model.clients):
        update = client(whole, k)
        took, _ = seconds(lambda update=update, k=k: running.add(update, id=k))  # type: ignore
        taken += took
    del update
    return {
        "layers": layers,
        "seconds": taken,
        "state": running.state_bytes,
        "peak": resident(),
        "resting": resting,
        "how": running._state.how,
        "checkpoint": costs.checkpoint(running),
    }


def truncated(model: Model, times: int) -> dict[str, Any]:
    """A truncated sum next to the exact one: true error, its bound, seconds."""
    rank = times * max(model.ranks)
    numbers = sum(out + columns + 1 for out, columns in model.sizes)
    limit = 16 * rank * numbers + 16 * len(model.sizes)
    exact, small = (RunningAggregate("flora", memory_limit=m) for m in (None, limit))
    spent = {"exact": 0.0, "truncated": 0.0}
    for k in range(model.clients):
        update = client(model, k, torch.float64)
        for name, running in (("exact", exact), ("truncated", small)):
            took, _ = seconds(lambda r=running, u=update, k=k: r.add(u, id=k))  # type: ignore
            spent[name] += took
    results, found = exact.result(), small.result()
    norm = sum(float((r.B @ r.A).norm()) ** 2 for r in results.values()) ** 0.5
    bound = sum(float(b) ** 2 for b in small.bound.values()) ** 0.5
    return {
        "rank": small._state.most,
        "clients": model.clients,
        "limit": limit,
        "state": {"exact": exact.state_bytes, "truncated": small.state_bytes},
        "seconds": spent,
        "error": distance(found, results),
        "bound": bound / norm,
        "checkpoint": costs.checkpoint(small),
    }


def parts(quick: bool) -> dict[str, tuple[Any, ...]]:
    """Name -> function and arguments of everything that is measured."""
    models = {name: tiny(model) if quick else model for name, model in MODELS.items()}
    todo: dict[str, tuple[Any, ...]] = {
        "product": (costs.matrix_product, 512 if quick else 4096),
        "receipts": (costs.receipts, replace(SMALL, clients=1_000 if quick else RECEIPTS)),
    }
    for name, model in models.items():
        todo[f"products: {name}"] = (costs.products, model)
        todo[f"products: {name}, ranks 4"] = (costs.products, model, (4,) * 16)
        for stream in STREAMS[name]:
            todo[f"stream: {name}: {stream.label}"] = (streamed, model, stream)
    for stream in STREAMS["MiniLM"]:
        fewer = replace(models["MiniLM"], clients=40 if quick else ONE_SHOT)
        todo[f"one shot: {stream.label}"] = (one_shot, fewer, stream)
    llama = models["one layer of Llama-8B"]
    several = replace(llama, clients=150 if quick else LAYERS_CLIENTS)
    for layers in LAYERS[:2] if quick else LAYERS:
        todo[f"layers: {layers}"] = (by_layers, several, layers)
    for times in TRUNCATED:
        fewer = replace(llama, clients=40 if quick else TRUNCATED_CLIENTS)
        todo[f"truncated: {times}"] = (truncated, fewer, times)
    for size in (64, 128) if quick else costs.SIZES:
        todo[f"result: {size}"] = (costs.decomposition, size)
    return todo


def assembled(found: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """What was found, by kind, with fits and targets."""
    models = {name: tiny(model) if quick else model for name, model in MODELS.items()}

    def rows(kind: str) -> list[Any]:
        return [row for name, row in found.items() if name.partition(": ")[0] == kind]

    layers, results, of = rows("layers"), rows("result"), "products: "
    return {
        "models": {name: asdict(model) for name, model in models.items()},
        "clients": [
            {
                "model": name,
                "method": stream.label,
                "flops": model.flops if stream.watched != "factors" else None,
                **found[f"stream: {name}: {stream.label}"],
            }
            for name, model in models.items()
            for stream in STREAMS[name]
        ],
        "one_shot": [
            {"method": stream.label, **found[f"one shot: {stream.label}"]}
            for stream in STREAMS["MiniLM"]
        ],
        "product": found["product"],
        "products": {
            name.removeprefix(of): row for name, row in found.items() if name.startswith(of)
        },
        "layers": layers,
        "layers_fit": fit([r["layers"] for r in layers], [r["seconds"] for r in layers], 1),
        "truncated": rows("truncated"),
        "decomposition": results,
        "decomposition_fit": fit(
            [r["size"] for r in results], [r["seconds"] for r in results], results[-2]["size"]
        ),
        "receipts": found["receipts"],
        "targets": {"growth": MOST_GROWTH, "rate": LEAST_RATE, "error": MOST_ERROR},
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few clients; writes nothing")
    quick = parser.parse_args().quick
    # Before any process starts: BLAS reads it when it is loaded.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    so_far = Path(tempfile.gettempdir()) / f"hetlora_agg-streaming-{code_state()}.json"
    start = time.perf_counter()
    results = assembled(every(parts(quick), None if quick else so_far), quick)
    print(f"{(time.perf_counter() - start) / 60:.0f} minutes")
    if not quick:
        print(record("streaming", results))
        so_far.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
