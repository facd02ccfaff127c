"""Peak memory of calls, for a process of its own: ``python tests/peak_memory.py kernel|methods``.

Prints ``{name: [measured bytes, predicted or allowed bytes]}``. Linux only.
"""

import ctypes
import gc
import json
import sys
from functools import partial
from pathlib import Path

import torch

from hetlora_agg import METHODS, HetLoRAError, aggregate_layers
from hetlora_agg.budget import budget, copy_bytes
from hetlora_agg.linalg import predicted_bytes, svd_product
from hetlora_agg.validation import read_updates
from states import fitting, run_layers, state_for


def resident(field):
    """VmRSS or VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(field)


def peak_of(call):
    """Bytes that a call touches on top of what lives already, its result included."""
    gc.collect()
    # What earlier calls have freed must not be there for this one to reuse unseen.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    kept = call()
    peak = resident("VmHWM") - before
    del kept
    return peak


def factors(layers, out, columns, R, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    B = torch.randn(layers, out, R, generator=g, dtype=dtype)
    return B, torch.randn(layers, R, columns, generator=g, dtype=dtype)


CASES = {
    "gram, one large": (1, 4096, 4096, 936, 256, "gram", torch.float32),
    "gram, R = 120": (4, 4096, 4096, 120, 16, "gram", torch.float32),
    "gram, many layers": (32, 768, 768, 192, 32, "gram", torch.float32),
    "gram, float64": (2, 2048, 2048, 400, 64, "gram", torch.float64),
    "qr, float64": (2, 2048, 2048, 400, 64, "qr", torch.float64),
    "qr, float32": (2, 2048, 2048, 400, 64, "qr", torch.float32),
    "dense": (2, 1024, 1024, 1000, 64, "dense", torch.float32),
    "dense, many clients": (2, 768, 768, 8000, 64, "dense", torch.float32),
    "dense, float64": (2, 768, 1024, 900, 64, "dense", torch.float64),
}


def kernel():
    """Each driver's peak next to what `predicted_bytes` says."""
    found = {}
    for name, (layers, out, columns, R, rank, driver, dtype) in CASES.items():
        B, A = factors(layers, out, columns, R, dtype)
        svd_product(B[:1, :8], A[..., :1, :, :8], rank=1)
        peak = peak_of(lambda B=B, A=A, r=rank, d=driver: svd_product(B, A, rank=r, driver=d))
        predicted = predicted_bytes(out, columns, R, rank, layers, dtype, driver)
        found[name] = [peak, predicted]
    return found


def methods():
    """Each method's peak in the least memory that `budget` allows."""
    g = torch.Generator().manual_seed(0)
    size, ranks = 768, (8, 8, 16, 32)

    def client(r):
        return torch.randn(r, size, generator=g), torch.randn(size, r, generator=g)

    layers = {str(i): [client(r) for r in ranks] for i in range(6)}
    read = {name: read_updates(updates, name)[0] for name, updates in layers.items()}
    copy = copy_bytes(read["0"])
    found = {}
    for name, entry in METHODS.items():
        try:
            run_layers({"0": layers["0"]}, name)
        except HetLoRAError:
            continue  # equal ranks only
        steps = range(copy, 1000 * copy, copy // 4)
        limit = next(n for n in steps if _fits(n, read, entry.workspace))
        given = {n: fitting(name, u) for n, u in layers.items()}
        options = state_for(name)
        call = partial(aggregate_layers, given, name, memory_limit=limit, **options)
        found[name] = [peak_of(call), limit]
    return found


def _fits(limit, read, workspace):
    try:
        budget(limit, read, None, workspace)
    except HetLoRAError:
        return False
    return True


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps({"kernel": kernel, "methods": methods}[sys.argv[1]]()))
