"""Adapters from disk to disk: time and peak memory of a whole process.

``python -m benchmarks.bench_adapters`` makes ten adapters as a fine-tuned Llama-8B has them (bf16,
ranks 4 to 64, q and v of 32 layers) in a temporary folder, aggregates them in a process of its own,
writes the global adapter and every client's next one, and writes ``results/adapters.json``:
seconds, and the high-water mark of resident memory, Python and torch included (Linux only).
``--trial`` keeps to two small layers and records nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import record
from hetlora_agg.adapters import Adapter, write_adapter

PEAK_TARGET = 3e9
"""Bytes of resident memory that a run must stay below."""

METHODS = ("rb", "flexlora", "hetlora", "flora")
"""One slot-wise, one of the mean, one that needs all layers at once, one that stacks."""


@dataclass(frozen=True)
class Model:
    """What is adapted: modules by name with (out, in), and how many layers of them."""

    name: str
    modules: dict[str, tuple[int, int]]
    layers: int
    ranks: tuple[int, ...]

    def paths(self) -> dict[str, tuple[int, int]]:
        """Path -> (out, in)."""
        return {
            f"model.layers.{i}.self_attn.{module}": size
            for i in range(self.layers)
            for module, size in self.modules.items()
        }


LLAMA = Model(
    "Llama-8B, q and v",
    {"q_proj": (4096, 4096), "v_proj": (1024, 4096)},
    32,
    (4, 4, 8, 8, 16, 16, 32, 32, 64, 64),
)
TRIAL = Model("trial", {"q_proj": (64, 48), "v_proj": (16, 48)}, 2, (2, 3, 4))

CHILD = """
import json, sys, time
import torch
from hetlora_agg.adapters import aggregate_adapters
method, out, *paths = sys.argv[1:]
def peak():
    # ru_maxrss would count the parent's memory from before exec.
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
resting, start = peak(), time.perf_counter()
outcome = aggregate_adapters(paths, [100 + k for k in range(len(paths))], method)
aggregated = time.perf_counter()
outcome.write(out + "/global")
written = time.perf_counter()
nested = all(result.nested for result in outcome.results.values())
if nested:
    outcome.write_clients(out + "/clients")
print(json.dumps({
    "aggregate_seconds": aggregated - start,
    "write_seconds": written - aggregated,
    "write_clients_seconds": time.perf_counter() - written if nested else None,
    "peak_bytes": peak(),
    "imported_bytes": resting,
    "threads": torch.get_num_threads(),
}))
"""


def make_clients(model: Model, folder: Path) -> list[Path]:
    """One adapter folder per rank, bf16, random factors."""
    paths = []
    for k, rank in enumerate(model.ranks):
        g = torch.Generator().manual_seed(k)
        factors = {}
        for path, (out, columns) in model.paths().items():
            stem = f"base_model.model.{path}"
            A, B = torch.randn(rank, columns, generator=g), torch.randn(out, rank, generator=g)
            factors[f"{stem}.lora_A.weight"] = (A / columns**0.5).bfloat16()
            factors[f"{stem}.lora_B.weight"] = (B / 100).bfloat16()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "llama",
            "target_modules": list(model.modules),
            "r": rank,
            "lora_alpha": 16,
        }
        adapter = Adapter.from_state_dict(factors, config)
        paths.append(write_adapter(folder / f"client-{k}", adapter))
    return paths


def size_of(folders: Sequence[Path]) -> int:
    """Bytes of all files in the folders."""
    return sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())


def measure(model: Model, methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """Every method's time and peak, each in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        clients = make_clients(model, Path(folder) / "clients")
        rows: dict[str, Any] = {
            "model": model.name,
            "layers": len(model.paths()),
            "ranks": list(model.ranks),
            "dtype": "bfloat16",
            "input_bytes": size_of(clients),
            "peak_target_bytes": PEAK_TARGET,
            "methods": {},
        }
        for method in methods:
            out = Path(folder) / method
            row = _in_a_process(method, out, clients)
            row["output_bytes"] = size_of([out])
            row["met"] = row["peak_bytes"] < PEAK_TARGET
            rows["methods"][method] = row
            print(method, row)
    return rows


def _in_a_process(method: str, out: Path, clients: Sequence[Path]) -> dict[str, Any]:
    source = str(Path(__file__).parents[1] / "src")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, method, str(out), *map(str, clients)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": source},
    )
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trial", action="store_true", help="small, and records nothing")
    options = parser.parse_args(arguments)
    rows = measure(TRIAL if options.trial else LLAMA)
    if not options.trial:
        print(record("adapters", rows))


if __name__ == "__main__":
    main()
