"""What single steps of streaming cost: products, results, checkpoints, receipts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.streaming_clients import Model, client
from benchmarks.streaming_process import forget_peak, in_turns, resident, seconds
from hetlora_agg.streaming import RunningAggregate
from hetlora_agg.streaming.added import Added, Arrival
from hetlora_agg.streaming.files import read
from hetlora_agg.streaming.plan import Plan

SIZES = (512, 1024, 2048, 4096)
"""Rows and columns of the sums that are decomposed."""

KEPT = 64
"""Rank of those results."""

TURNS = 15


def matrix_product(size: int) -> dict[str, Any]:
    """The machine's rate: a large float64 matrix product on one thread."""
    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(size, size, generator=g, dtype=torch.float64) for _ in range(2))
    out = torch.empty_like(A)
    found = in_turns({"product": lambda: torch.mm(A, B, out=out)}, TURNS)["product"]
    return {"size": size, "gflops": 2 * size**3 / found["fastest"] / 1e9, **found}


def products(model: Model, ranks: Sequence[int] = (8, 16, 40)) -> dict[str, Any]:
    """Adding clients of these ranks together to the dense sum, next to bare products.

    Rates are those of the fastest turn: what else the machine does only slows down.
    """
    out, columns = model.sizes[0]
    layers = sum(size == model.sizes[0] for size in model.sizes)
    g = torch.Generator().manual_seed(0)
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
    square = min(2048, 4 * out)
    X, Y = (torch.randn(square, square, generator=g, dtype=torch.float64) for _ in range(2))
    Z = torch.empty_like(X)
    runs = {
        "added": lambda: added.prepared(arrivals)(),
        "same shape": lambda: total.baddbmm_(B, A),
        "machine": lambda: torch.mm(X, Y, out=Z),
    }
    taken = in_turns(runs, TURNS)
    flops = dict.fromkeys(runs, 2 * layers * out * columns * sum(ranks)) | {
        "machine": 2 * square**3
    }
    gflops = {name: flops[name] / s["fastest"] / 1e9 for name, s in taken.items()}
    return {
        "shape": [layers, out, columns, sum(ranks)],
        "machine": square,
        "seconds": taken,
        "gflops": gflops,
        "rate": {name: gflops["added"] / gflops[name] for name in ("same shape", "machine")},
    }


def checkpoint(running: RunningAggregate) -> dict[str, Any]:
    """Bytes of a state on disk, and seconds to save and load it, disk and processor."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        start = time.perf_counter()
        save, _ = seconds(lambda: running.save(path))
        saved = time.perf_counter()
        size = path.stat().st_size
        # Not bound to a name: a large state would be in memory twice longer than it must.
        load, clients = seconds(lambda: len(RunningAggregate.load(path).receipts))
        loaded = time.perf_counter()
    return {
        "bytes": size,
        "clients": clients,
        "save": {"processor": save, "wall": saved - start},
        "load": {"processor": load, "wall": loaded - saved},
    }


def decomposition(size: int) -> dict[str, Any]:
    """Seconds of the result of a full-rank sum over one square layer."""
    g = torch.Generator().manual_seed(0)
    running, most = RunningAggregate("flexlora", rank=min(KEPT, size // 2)), 0
    while running._state.kept is not None or most < 2:
        r = size // 2
        A, B = torch.randn(r, size, generator=g), torch.randn(size, r, generator=g)
        running.add({"layer": (A, B / size, r)}, id=most)
        most += 1
    took, _ = seconds(running.result)
    return {"size": size, "rank": min(KEPT, size // 2), "seconds": took}


def receipts(model: Model) -> dict[str, Any]:
    """Bytes of a client beside its sums: in memory, on disk, and while a result is computed."""
    warm, running = (RunningAggregate("rbla") for _ in range(2))
    for k in range(200):
        warm.add(client(model, k), id=f"client-{k:07d}")
    warm.result()
    added, resting = 0.0, forget_peak()
    for k in range(model.clients):
        update = client(model, k)
        took, _ = seconds(lambda update=update, k=k: running.add(update, id=f"client-{k:07d}"))  # type: ignore
        added += took
    held = forget_peak() - resting
    before = resident()
    took, _ = seconds(running.result)
    passing = resident() - before
    with tempfile.TemporaryDirectory() as folder:
        tensors, _ = read(running.save(Path(folder) / "state.safetensors"))
    clients = model.clients
    return {
        "clients": clients,
        "memory": held / clients,
        "file": tensors["receipts"].numel() / clients,
        "add": added / clients,
        "result": {"seconds": took / clients, "memory": passing / clients},
    }
