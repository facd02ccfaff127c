"""One process of several that share out clients or layers, as `bench_distributed` starts them.

``torchrun -m benchmarks.distributed_process FOLDER`` takes every job with the other processes and
leaves seconds and answers in the folder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from benchmarks.streaming_clients import LLAMA, MINILM, Model, client, tiny
from benchmarks.streaming_process import resident
from hetlora_agg import ClientUpdate, distributed
from hetlora_agg.streaming import RunningAggregate

MODELS = {
    "MiniLM": replace(MINILM, clients=2_000),
    "one layer of Llama-8B": replace(LLAMA, clients=400),
}
"""Whose clients are shared out: so many that four processes all have sums."""

SHARED_OUT = (("MiniLM", "flora"), ("MiniLM", "rbla"), ("one layer of Llama-8B", "flora"))

BY_LAYER = Model("32 layers of 768×768", ((768, 768),) * 32, 24)
"""Whose layers are shared out."""

METHODS = ("hetlora", "flexlora")
"""One whose weights depend on all layers, one whose do not."""

TURNS = 3
"""Merges and results are timed as often; adding once."""

TIMEOUT = timedelta(minutes=5)


class Clock:
    """Seconds of the steps that this process takes together with the others."""

    def __init__(self) -> None:
        """Nothing was timed."""
        self.found: dict[str, list[dict[str, float]]] = {}

    def time(self, step: str, run: Callable[[], Any]) -> Any:
        """One step, begun and ended together; bytes are those of all processes."""
        dist.barrier()
        sent, wall, processor = loopback(), time.perf_counter(), time.process_time()
        value = run()
        row = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        dist.barrier()
        self.found.setdefault(step, []).append(row | {"bytes": loopback() - sent})
        return value


def loopback() -> int:
    """Bytes that the loopback device has sent since the machine started."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


Results = list[Mapping[str, Any]]
"""Layer -> result, once for every way to them."""


def of_clients(model: Model, method: str, clock: Clock) -> tuple[dict[str, Any], Results]:
    """Every process takes its clients; then all merge, and reduce."""
    cost = {k: model.ranks[k % len(model.ranks)] for k in range(model.clients)}
    own = distributed.own(cost, cost)
    running, wall, processor = RunningAggregate(method), 0.0, 0.0
    dist.barrier()
    for k in own:
        update = client(model, k)
        start, started_at = time.process_time(), time.perf_counter()
        running.add(update, id=k)
        wall += time.perf_counter() - started_at
        processor += time.process_time() - start
    results: Mapping[str, Any] = {}
    peak = {"add": resident()}
    for _ in range(TURNS):
        results = clock.time("result", lambda: distributed.result(running))
    peak["result"] = resident()
    for _ in range(TURNS):
        whole = clock.time("merge", lambda: distributed.merge(running))
    alone = clock.time("result of the merged", whole.result)
    peak["merge"] = resident()
    row = {
        "clients": len(own),
        "state": running.state_bytes,
        "add": {"wall": wall, "processor": processor},
        "peak": peak,
    }
    return row, [results, alone]


def of_layers(model: Model, method: str, clock: Clock) -> tuple[dict[str, Any], Results]:
    """Every process takes its layers of all clients."""
    names = [f"layers.{i}" for i in range(len(model.sizes))]
    own = set(distributed.own(names))
    layers: dict[str, list[ClientUpdate]] = {}
    for k in range(model.clients):
        for name, u in client(model, k).items():
            if name in own:
                layers.setdefault(name, []).append(u)
    options: dict[str, Any] = {"rank": max(model.ranks)} if method == "flexlora" else {}
    for _ in range(TURNS):
        found = clock.time(
            "aggregate_layers", lambda: distributed.aggregate_layers(layers, method, **options)
        )
    every = clock.time("gather", lambda: distributed.gather(found))
    return {"layers": len(own)}, [every]


JOBS = {"clients": of_clients, "layers": of_layers}
"""What is shared out -> how."""


def jobs(quick: bool) -> dict[str, tuple[str, Model, str]]:
    """Name -> what is shared out, whose, by which method."""
    todo = [("clients", name, MODELS[name], method) for name, method in SHARED_OUT]
    todo += [("layers", BY_LAYER.what, BY_LAYER, method) for method in METHODS]
    return {
        f"{what}: {name}: {method}": (what, tiny(model) if quick else model, method)
        for what, name, model, method in todo
    }


def worker(folder: Path, quick: bool) -> None:
    """One of the processes: what it found, and on the first the results, as files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank = dist.get_rank()
    for number, (name, (what, model, method)) in enumerate(jobs(quick).items()):
        clock = Clock()
        row, results = JOBS[what](model, method, clock)
        if rank == 0:
            for i, result in enumerate(results):
                save_file(_tensors(result), folder / f"{number}-{i}.safetensors")
            print(f"{dist.get_world_size()} processes: {name}", row, clock.found, flush=True)
        file = folder / f"{number}-process-{rank}.json"
        file.write_text(json.dumps({**row, "steps": clock.found}))
    dist.destroy_process_group()


def _tensors(result: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    pairs = {name: r.factors.torch() for name, r in result.items()}
    tensors = {f"{name}/A": pair.A for name, pair in pairs.items()}
    tensors |= {f"{name}/B": pair.B for name, pair in pairs.items()}
    return {name: X.contiguous() for name, X in tensors.items()}


def main() -> None:
    """Every job, with the other processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    worker(given.folder, given.quick)


if __name__ == "__main__":
    main()
