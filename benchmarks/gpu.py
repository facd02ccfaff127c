"""Agreement of CPU and CUDA, and times on the GPU, in one command.

``python -m benchmarks.gpu`` writes ``results/gpu.json``. Without a CUDA device it says so and
writes nothing. Per workload: the largest difference between the CPU's and the GPU's answer in
units of the stated bound ``20·max(out, in)·ε·S``, time on the GPU next to its floor, and next to
the QR loop moved to the same GPU. Each Triton kernel next to its torch twin: agreement, and which
of the two is ahead; a kernel that wins is entered in ``linalg.kernels.MEASURED_WINS`` by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.peers import qr_loop
from benchmarks.timing import interleaved, record
from benchmarks.workloads import LLAMA_8B, QUICK, TEN_TO_64, TEN_TO_256, Workload
from hetlora_agg import METHODS, ClientUpdate, HetLoRAError, aggregate
from hetlora_agg.linalg import product_norm, svd_product
from hetlora_agg.linalg.kernels import available, jacobi, ragged_gram, ragged_output

ALL_LINEAR_R936 = tuple(
    replace(w, name=f"{w.name}-R936", ranks=TEN_TO_256, rank=256, layers=w.layers // 8)
    for w in LLAMA_8B
)
"""An eighth of the layers: time per layer is what is compared, and all would not fit at once."""


def ceilings() -> dict[str, float]:
    """Measured copy rate in bytes/s, and float64 and float32 GEMM rates in flop/s."""
    elements, n = 1 << 29, 8192
    long = torch.randn(elements, device="cuda")
    rates = {"copy_bytes_per_s": 8 * elements / _median(lambda: long.clone())}
    for dtype in (torch.float64, torch.float32):
        square = torch.randn(n, n, device="cuda", dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        rates[f"{name}_gemm_flops_per_s"] = 2 * n**3 / _median(lambda x=square: x @ x)
    return rates


def _median(run: Callable[[], Any]) -> float:
    return interleaved({"run": run})["run"]["median"]


def agreement(workload: Workload) -> dict[str, Any]:
    """Difference between the answers of both devices, in units of its bound."""
    small = Workload("", 1, workload.out, workload.columns, workload.ranks, workload.rank)
    B, A = small.factors()
    answers = []
    for device in ("cpu", "cuda"):
        svd = svd_product(B.to(device), A.to(device), rank=small.rank)
        answers.append(((svd.U * svd.S[:, None, :]).cpu(), svd.Vh.cpu()))
    (B_1, A_1), (B_2, A_2) = answers
    difference = product_norm(torch.cat([B_1, -B_2], -1), torch.cat([A_1, A_2], -2))
    S = float((B.double().norm(dim=-2) * A.double().norm(dim=-1)).sum())
    bound = 20 * max(small.out, small.columns) * torch.finfo(torch.float32).eps * S
    return {"workload": workload.name, "difference_over_bound": float(difference.max()) / bound}


def method_agreement() -> dict[str, float | str]:
    """The same for every method, on clients of mixed ranks, float64."""
    g = torch.Generator().manual_seed(0)
    clients = [
        (torch.randn(3, r, 96, generator=g).double(), torch.randn(3, 80, r, generator=g).double())
        for r in (2, 4, 8, 8)
    ]
    found: dict[str, float | str] = {}
    for name in sorted(METHODS):
        try:
            cpu = aggregate(clients, name).total()
            gpu = aggregate([ClientUpdate(a.cuda(), b.cuda()) for a, b in clients], name).total()
        except HetLoRAError as error:
            found[name] = str(error)
            continue
        scale = float(product_norm(cpu.B, cpu.A).max())
        difference = (cpu.dense() - gpu.dense().cpu()).norm(dim=(-2, -1)).max()
        found[name] = float(difference) / scale
    return found


def speed(workload: Workload, rates: dict[str, float]) -> dict[str, Any]:
    """Time against the floor and against the QR loop on the same GPU."""
    B, A = workload.factors("cuda")
    r, R = workload.rank, workload.R
    runs = {
        "auto": lambda: svd_product(B, A, rank=r),
        "qr": lambda: svd_product(B, A, rank=r, driver="qr"),
        "peer QR loop": lambda: qr_loop(B, A, r),
    }
    torch.cuda.reset_peak_memory_stats()
    seconds = interleaved(runs, repeats=5, budget=15)
    length = workload.layers * (workload.out + workload.columns)
    floor = max(
        4 * length * (R + r) / rates["copy_bytes_per_s"],
        2 * length * (R * R + R * r) / rates["float64_gemm_flops_per_s"],
    )
    return {
        "workload": workload.name,
        "layers": workload.layers,
        "R": R,
        "rank": r,
        "floor_ms": 1e3 * floor,
        "ms": {name: 1e3 * s["median"] for name, s in seconds.items()},
        "times_floor": seconds["auto"]["median"] / floor,
        "faster_than_qr_loop": seconds["peer QR loop"]["median"] / seconds["auto"]["median"],
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def kernels() -> list[dict[str, Any]]:
    """Each Triton kernel against its torch twin on the GPU: difference, milliseconds, who wins."""
    if not available("cuda"):
        return []
    g = torch.Generator(device="cuda").manual_seed(0)
    rows = []
    for ranks, rank, members in ((TEN_TO_64, 16, 64), (TEN_TO_256, 256, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            blocks = [
                torch.randn(members, 4096, r, device="cuda", generator=g).to(dtype) for r in ranks
            ]
            share = torch.rand(members, sum(ranks), device="cuda", generator=g).double()
            M = torch.randn(members, sum(ranks), rank, device="cuda", generator=g).double()
            size = {"members": members, "R": sum(ranks), "rank": rank, "dtype": str(dtype)}
            gram = _twins(lambda b, x=blocks, s=share: ragged_gram(x, s, backend=b).G)
            output = _twins(lambda b, x=blocks, s=share, m=M: ragged_output(x, m, s, backend=b))
            rows += [
                {"kernel": "ragged_gram", **size, **gram},
                {"kernel": "ragged_output", **size, **output},
            ]
    for R in (8, 16, 32, 48, 64):
        X = torch.randn(256, 2 * R, R, device="cuda", generator=g).double()
        G = X.mT @ X
        times = _twins(lambda b, G=G: jacobi(G, backend=b).values)
        eigh = _median(lambda G=G: torch.linalg.eigh(G))
        rows.append({"kernel": "jacobi", "members": 256, "R": R, **times, "eigh_ms": 1e3 * eigh})
    return rows


def _twins(run: Callable[[str], torch.Tensor]) -> dict[str, float]:
    """Relative difference of the two backends' results, and both times."""
    found = {backend: run(backend).double() for backend in ("triton", "torch")}
    difference = (found["triton"] - found["torch"]).norm() / found["torch"].norm()
    seconds = interleaved({b: lambda b=b: run(b) for b in found}, budget=5)
    return {
        "difference": float(difference),
        **{f"{b}_ms": 1e3 * s["median"] for b, s in seconds.items()},
        "torch_over_triton": seconds["torch"]["median"] / seconds["triton"]["median"],
    }


def main() -> int:
    """Run everything; 1 without a CUDA device."""
    if not torch.cuda.is_available():
        print("no CUDA device here; nothing measured", file=sys.stderr)
        return 1
    rates = ceilings()
    print(rates, flush=True)
    agree, times = [agreement(w) for w in QUICK], []
    print(agree, flush=True)
    methods, twins = method_agreement(), kernels()
    print(methods, twins, flush=True)
    for workload in (*QUICK, *LLAMA_8B, *ALL_LINEAR_R936):
        times.append(speed(workload, rates))
        print(times[-1], flush=True)
        torch.cuda.empty_cache()
    results = {
        "ceilings": rates,
        "agreement": agree,
        "methods": methods,
        "kernels": twins,
        "speed": times,
    }
    print(record("gpu", results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
