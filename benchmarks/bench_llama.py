"""Ten thousand clients through a running aggregate of all layers of Llama-8B's q and v.

``python -m benchmarks.bench_llama`` writes ``results/llama.json``; it takes an hour or two on one
thread, 16 GB of memory and 6 GB of disk. What is measured is what `bench_streaming` measures on one
layer, with half of the clients at the smallest rank, as where weak devices are common; so their
number is larger before sums take less than what they sent.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace

import torch

from benchmarks.bench_streaming import streamed
from benchmarks.streaming_clients import LLAMA, Stream
from benchmarks.streaming_process import apart
from benchmarks.timing import record

LAYERS = 32

FEW = 500
"""With how many clients memory and time of all are compared: some 260 are kept whole."""

WHOLE = replace(
    LLAMA,
    what="all 32 layers, q 4096×4096 and v 1024×4096",
    sizes=LLAMA.sizes * LAYERS,
    ranks=(4, 8, 4, 16, 4, 8, 4, 32, 4, 8, 4, 16, 4, 8, 4, 64),
)

STREAM = Stream("flora", watched="products")
"""Sums of products: those of factors take a 25th of the memory."""


def main() -> None:
    """Measure and write."""
    # Before any process starts: BLAS reads it when it is loaded.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    found = apart(streamed, WHOLE, STREAM, FEW)
    row = {"model": "Llama-8B", "method": STREAM.label, "flops": WHOLE.flops, **found}
    print(record("llama", {"model": asdict(WHOLE), "clients": [row]}))


if __name__ == "__main__":
    main()
