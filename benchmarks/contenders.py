"""Everything that is measured: our drivers, the peers, how to start each and what it may cost."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import packages, peers
from benchmarks.packages import Problem
from benchmarks.workloads import Workload
from hetlora_agg.linalg import svd_product

MOST_BYTES = 4 << 30
"""Whoever needs more than this beside the inputs is not run."""

GROUND_MS = 8.0
"""Milliseconds of one 384×384 SVD on the machine that the estimates below were fitted to."""


@dataclass(frozen=True)
class Contender:
    """One way to the leading triplets.

    Attributes:
        note: what it is, for the docs.
        prepare: a `Problem` to a function of no arguments; only that function is timed. Its result
            is read by `as_factors`.
        seconds: rough cost of one call on the machine of `GROUND_MS`.
        needs: the module that has to be there.
        float64: also run on float64 factors.
        scale: what the answer has to be multiplied by to be W.
        working: bytes of dense copies that it is known to hold.
        spins: computes with NumPy's or SciPy's BLAS, whose threads outlast the call.
    """

    note: str
    prepare: Callable[[Problem], Callable[[], Any]]
    seconds: Callable[[Workload], float]
    needs: str = "torch"
    float64: bool = False
    scale: Callable[[Workload], float] = lambda w: 1.0
    working: Callable[[Workload], float] = lambda w: 0.0
    spins: bool = False

    @property
    def installed(self) -> bool:
        """Whether its package can be imported."""
        return importlib.util.find_spec(self.needs) is not None


def _svd(w: Workload) -> float:
    """Seconds of one dense SVD of a layer."""
    small, large = sorted((w.out, w.columns))
    return 1.4e-10 * large * small**2


def _clients(w: Workload) -> float:
    """Seconds to form every client's dense update of a layer once."""
    return 1e-9 * len(w.ranks) * w.out * w.columns


def _factored(w: Workload) -> float:
    """Seconds of a few products with the factors, and an R×R decomposition."""
    core = min(w.R, w.out, w.columns)
    return w.layers * (1e-10 * (w.out + w.columns) * w.R * core + 1e-9 * core**3)


def _sketched(w: Workload, products: float) -> float:
    """Seconds to form W and multiply it by that many times the wanted rank."""
    return w.layers * 2e-11 * w.out * w.columns * (w.R + products * (w.rank + 10))


def _arnoldi(w: Workload) -> float:
    """Seconds of ARPACK: about four steps per wanted triplet, two passes over both factors each."""
    return w.layers * 4 * (w.rank + 8) * 16 * (w.out + w.columns) * w.R / 5e10


def _ours(driver: str, note: str, float64: bool = False) -> Contender:
    def prepare(problem: Problem) -> Callable[[], Any]:
        B, A = problem.B, problem.A
        form = driver == "randomized" and peers.forms_product(B.shape[-2], A.shape[-1], B.shape[-1])
        name = "randomized_dense" if form else driver

        def run() -> peers.Triplets:
            svd = svd_product(B, A, rank=problem.rank, driver=name)
            return svd.U, svd.S, svd.Vh

        return run

    return Contender(note, prepare, _factored, float64=float64)


def _peer(find: Callable[..., Any], **options: Any) -> Callable[[Problem], Callable[[], Any]]:
    """``prepare`` of a function of ``(B, A, rank)``."""
    return lambda problem: partial(find, problem.B, problem.A, problem.rank, **options)


def _per_client(problem: Problem) -> Callable[[], Any]:
    return partial(peers.dense_per_client, problem.clients(), problem.rank)


def _twice(problem: Problem) -> Callable[[], Any]:
    return _peer(peers.svd_lowrank, oversampling=problem.rank)(problem)


def _peft(w: Workload) -> float:
    return w.layers * (_svd(w) + 3 * _clients(w))


CONTENDERS: Mapping[str, Contender] = {
    "ours": _ours("auto", '`svd_product`, driver "auto"', float64=True),
    "ours, qr": _ours("qr", '`svd_product`, driver "qr"'),
    "ours, randomized": _ours(
        "randomized",
        '`svd_product`, driver "randomized" ("randomized_dense" where LB is the time to form W): '
        "approximate, and exact where it tells that sampling does not pay",
    ),
    "QR loop": Contender(
        "QR of both stacks, SVD of the R×R core, a loop over layers",
        _peer(peers.qr_loop),
        _factored,
        float64=True,
    ),
    "dense SVD": Contender(
        "W formed, one `torch.linalg.svd` per layer",
        _peer(peers.dense_loop),
        lambda w: w.layers * _svd(w),
        float64=True,
    ),
    "dense SVD per client": Contender(
        "a dense SVD of every client's own update, rebuilt and summed, and one of the sum",
        _per_client,
        lambda w: w.layers * (_svd(w) * (1 + len(w.ranks)) + _clients(w)),
    ),
    "randomized": Contender(
        "Halko, Martinsson and Tropp on the factors, never W: niter 2, rank + 10",
        _peer(peers.randomized_factors),
        _factored,
    ),
    "svd_lowrank": Contender(
        "`torch.svd_lowrank` of W (it takes tensors only): niter 2, rank + 10",
        _peer(peers.svd_lowrank),
        partial(_sketched, products=10),
    ),
    "svd_lowrank 2r": Contender(
        "the same, oversampled to twice the rank",
        _twice,
        partial(_sketched, products=20),
    ),
    "svds": Contender(
        "`scipy.sparse.linalg.svds` on a LinearOperator of the factors, ARPACK, tolerance 0",
        packages.scipy_svds,
        _arnoldi,
        needs="scipy",
        spins=True,
    ),
    "randomized_svd": Contender(
        "scikit-learn's `randomized_svd` of W, its defaults",
        packages.sklearn_randomized,
        partial(_sketched, products=30),
        needs="sklearn",
        spins=True,
    ),
    "PEFT svd": Contender(
        '`add_weighted_adapter(combination_type="svd", svd_full_matrices=False)`, weights 1, '
        "scaling 1",
        lambda problem: packages.PeftMerge(problem, "svd"),
        _peft,
        needs="peft",
        working=lambda w: 8.0 * len(w.ranks) * w.out * w.columns,
    ),
    "PEFT cat": Contender(
        '`add_weighted_adapter(combination_type="cat")`: keeps rank R, truncates nothing',
        lambda problem: packages.PeftMerge(problem, "cat"),
        lambda w: w.layers * 1e-9 * (w.out + w.columns) * w.R,
        needs="peft",
    ),
    "chorus-fl": Contender(
        "its FedExLoRA: dense mean of the products, one SVD per layer, dense residual",
        packages.chorus_fedex,
        lambda w: w.layers * (_svd(w) + _clients(w)),
        needs="chorus",
        scale=lambda w: len(w.ranks),
    ),
}
"""Name -> contender, in the order of the tables."""


SPINNING = frozenset(name for name, contender in CONTENDERS.items() if contender.spins)
"""Contenders that the next one has to wait for (`timing.interleaved`)."""


def refusal(
    name: str, workload: Workload, dtype: torch.dtype, limit: float, speed: float = 1.0
) -> str | None:
    """Why a contender is not run on a workload; None if it is.

    Args:
        name: of the contender.
        workload: the sizes.
        dtype: of the factors.
        limit: seconds that one call may take.
        speed: how many times slower than the machine of the estimates this one is.
    """
    contender = CONTENDERS[name]
    if not contender.installed:
        return "not installed"
    seconds = contender.seconds(workload) * speed * (2 if dtype == torch.float64 else 1)
    if seconds > limit:
        return f"skipped: an estimated {seconds:.2g} s against a limit of {limit:g} s"
    size = contender.working(workload)
    if size > MOST_BYTES:
        return f"skipped: {size / 2**30:.0f} GiB of dense client updates"
    return None


def machine_speed() -> float:
    """How many times slower one small dense SVD is here than where the estimates come from."""
    W = torch.randn(384, 384, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.linalg.svd(W)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times) / GROUND_MS


def as_factors(result: Any, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """What any contender returns, as float64 ``B (layers, out, r)``, ``A (layers, r, in)``."""
    if isinstance(result, tuple):
        U, S, Vh = (x.double() for x in result)
        return U * (scale * S).unsqueeze(-2), Vh
    B, A = (torch.stack([x.double() for x in part]) for part in zip(*result, strict=True))
    return scale * B, A
