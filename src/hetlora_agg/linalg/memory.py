"""How much memory a decomposition takes, known before it starts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hetlora_agg.errors import InputValueError, MemoryLimitError, unknown_name
from hetlora_agg.linalg.execution import Resources, resources
from hetlora_agg.linalg.select import select_driver
from hetlora_agg.linalg.symmetric import LEAST_ROWS

WORKSPACE_BYTES = 1 << 24
"""A worker's chunk of the batch has working copies of about this many bytes on a CPU, where what
fits the cache is faster than what does not (``benchmarks/results/kernel.json``, rows
``workspace``); a single member may exceed it."""

DEVICE_WORKSPACE_BYTES = 1 << 32
"""The same on a GPU, where few large calls win; only there to bound memory."""


POOL_WORK = 5 * 10**8
"""Multiply-adds that a worker must have to do: starting one, and threads of torch that still spin,
cost milliseconds (``benchmarks/results/kernel.json``, rows ``workers``)."""

CORE_WORK = 9
"""Multiply-adds of an R×R eigendecomposition, in R³."""


ROUNDED_UP = 1 << 18
"""Bytes that allocators round up to in a call, whatever its size."""

NAMES = ("dense", "gram", "qr", "randomized", "randomized_dense")
"""The drivers that are priced here."""


class Plan(NamedTuple):
    """Members per chunk, chunks at a time, the bytes that takes, and those that results take."""

    chunk: int
    workers: int
    bytes: int
    result: int

    def each(self, limit: int | None) -> int | None:
        """What a limit leaves for each worker."""
        return None if limit is None else (limit - self.result) // self.workers


def predicted_bytes(
    out_features: int,
    in_features: int,
    R: int,
    rank: int | None = None,
    layers: int = 1,
    dtype: torch.dtype = torch.float32,
    driver: str = "auto",
    workers: int | None = None,
    device_type: str = "cpu",
    verify: bool = False,
) -> int:
    """Peak bytes that `svd_product` allocates, its result included and its arguments not.

    ``results + workers · chunk · (working copies of one member)``: never less than what lives at
    once (``docs/performance.md`` has the ratios; workers seldom peak together); an allocator may
    hold on to more. Two things are not in it: what a process allocates once (BLAS buffers, 4 MiB of
    scratch per thread), and members that leave the fast path, whose needs are checked against
    ``memory_limit`` before they are solved.

    Args:
        out_features: rows of B.
        in_features: columns of A.
        R: columns of B, rows of A.
        rank: wanted rank; None means ``min(R, out_features, in_features)``.
        layers: members of the batch.
        dtype: dtype of the factors.
        driver: see `svd_product`.
        workers: chunks at a time; None is one per thread of torch, fewer for little work.
        device_type: "cpu" or "cuda".
        verify: count the measuring of the error too.

    Raises:
        InputValueError: a size below 1.

    Example:
        >>> predicted_bytes(4096, 4096, 120, rank=16, workers=1) < 20e6
        True
    """
    sizes = {"out_features": out_features, "in_features": in_features, "R": R, "layers": layers}
    for name, size in {**sizes, "rank": rank, "workers": workers}.items():
        optional = name in ("rank", "workers") and size is None
        if not optional and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise InputValueError(
                f"predicted_bytes: {name} must be an integer of at least 1, got {size!r}"
            )
    if driver not in ("auto", *NAMES):
        raise InputValueError(
            f"predicted_bytes: {unknown_name('driver', driver, ('auto', *NAMES))}"
        )
    thin = min(out_features, in_features, R)
    shape = (layers, out_features, in_features, R, min(thin, rank or thin))
    if driver == "auto":
        driver = select_driver(out_features, in_features, R, dtype=dtype, device_type=device_type)
    solving = plan(shape, dtype, driver, device_type, Resources(workers))
    measuring = solving.result + verifying_bytes(*shape[1:], dtype) if verify else 0
    return max(solving.bytes, measuring)


def plan(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    driver: str,
    device_type: str,
    allowed: Resources,
    copies: int = 0,
) -> Plan:
    """How to go through a batch of ``shape = (members, out, in, R, rank)``.

    ``copies`` are bytes that have to be there besides.

    Raises:
        MemoryLimitError: not even one member at a time fits ``allowed.memory_limit``.
    """
    members, out, columns, R, rank = shape
    on_cpu = device_type == "cpu"
    each = working_bytes(out, columns, R, rank, dtype, driver)
    workers = (allowed.workers or _worth(shape)) if on_cpu else 1
    workspace = WORKSPACE_BYTES if on_cpu else DEVICE_WORKSPACE_BYTES
    chunk = max(1, min(workspace // each, -(-members // workers)))
    # As many chunks for each worker: one that has a chunk more is waited for by all others.
    rounds = -(-members // (chunk * workers))
    chunk = -(-members // (rounds * workers))
    workers = min(workers, -(-members // chunk))
    itemsize = 8 if dtype == torch.float64 else 4
    result = ROUNDED_UP + copies + members * rank * (itemsize * (out + columns) + 8)
    limit = allowed.memory_limit
    if limit is not None and result + workers * chunk * each > limit:
        room = (limit - result) // each
        if room < 1:
            raise MemoryLimitError(
                f"{members} x ({out}x{columns}), R = {R}, rank {rank} needs {result + each:.3g} "
                f"bytes, {result:.3g} of them for the result and {each:.3g} to solve one member "
                f"with driver {driver!r}; memory_limit= allows {limit:.3g}. Raise it, ask for a "
                "lower rank, or pass fewer layers at a time"
            )
        workers = min(workers, room)
        chunk = min(chunk, room // workers)
    return Plan(chunk, workers, result + workers * chunk * each, result)


def _worth(shape: tuple[int, int, int, int, int]) -> int:
    """Workers that have enough to do each."""
    return max(1, min(torch.get_num_threads(), work(shape) // POOL_WORK))


def work(shape: tuple[int, int, int, int, int]) -> int:
    """Multiply-adds of the factored route for ``(members, out, in, R, rank)``, roughly."""
    members, out, columns, R, rank = shape
    core = min(R, out, columns)
    return members * ((out + columns) * R * (R // 2 + rank) + CORE_WORK * core**3)


def working_bytes(
    out: int, columns: int, R: int, rank: int, dtype: torch.dtype, driver: str
) -> int:
    """Bytes alive at once while a driver solves one member, its own vectors among them.

    The numbers of R×R and thin×thin arrays are counts of what lives through the decomposition,
    LAPACK's workspace included.
    """
    exact, both, thin = dtype == torch.float64, out + columns, min(out, columns)
    factors, vectors = 8 * both * R, 8 * both * rank
    # float16 and bfloat16 are computed in float32.
    copy = 4 * both * R if dtype.itemsize < 4 else 0
    square, core = 8 * R * R, 8 * min(R, thin) * R
    W, side = 8 * out * columns, 8 * thin * thin
    cast = 8 * both * min(R, LEAST_ROWS)
    needs = {
        "gram": exact * factors + max(10 * square, 6 * square + vectors + 18 * R * rank),
        "qr": factors + max(21 * core // 2, 3 * vectors, (not exact) * factors // 2),
        "dense": 3 * W + 9 * side // 2 if exact else W + max(28 * side // 5, cast) + vectors,
    }
    if driver in needs:
        return copy + needs[driver]
    # Scaled copies and the sampled vectors, W where it is formed, and the exact driver for members
    # that are handed over to it.
    itemsize = max(4, dtype.itemsize)
    formed = itemsize * out * columns if driver == "randomized_dense" else 0
    sampled = 3 * itemsize * both * R + 3 * vectors + formed
    return copy + sampled + needs[select_driver(out, columns, R, rank, dtype)]


def verifying_bytes(out: int, columns: int, R: int, rank: int, dtype: torch.dtype) -> int:
    """Bytes alive at once while the error of one member is measured, see `certificate`."""
    both, wide = out + columns, R + rank
    copies = 5 if dtype == torch.float64 else 4
    return 8 * copies * both * wide + 3 * 8 * wide * wide


def check_verifying(B: Tensor, A: Tensor, rank: int | None, limit: int) -> None:
    """Refuse to measure an error where that does not fit the limit.

    Raises:
        MemoryLimitError: ``verify=True`` takes more than the limit.
    """
    out, columns, R = B.shape[-2], A.shape[-1], B.shape[-1]
    rank = min(R, out, columns, rank or R)
    result = B.shape[:-2].numel() * rank * (out + columns) * max(4, B.dtype.itemsize)
    needed = result + flattening_bytes(B, A) + verifying_bytes(out, columns, R, rank, B.dtype)
    if needed > limit:
        raise MemoryLimitError(
            f"verify=True for {out}x{columns}, R = {R}, rank {rank} needs {needed:.3g} bytes, "
            f"memory_limit= allows {limit:.3g}; raise it, or leave the error unmeasured"
        )


def flattening_bytes(*factors: Tensor) -> int:
    """Bytes of copies that are made where leading dimensions do not merge into one."""
    return sum(X.numel() * X.element_size() for X in factors if not _merges(X))


def _merges(X: Tensor) -> bool:
    try:
        X.view(-1, *X.shape[-2:])
    except RuntimeError:
        return False
    return True


def check_fallback(
    slow: int, B: Tensor, A: Tensor, rank: int, drivers: tuple[str, str], dtype: torch.dtype
) -> None:
    """Refuse to solve some members of a chunk another way where that does not fit the limit.

    Args:
        slow: how many.
        B: ``(members, out, R)``, the whole chunk.
        A: ``(members, R, in)``.
        rank: wanted rank.
        drivers: the one that has run, whose arrays are still there, and the one that is to run.
        dtype: what that one computes in.

    Raises:
        MemoryLimitError: both together take more than is left to this worker.
    """
    left = resources().memory_limit
    out, columns, R = B.shape[-2], A.shape[-1], B.shape[-1]
    first, second = drivers
    held = len(B) * working_bytes(out, columns, R, rank, B.dtype, first)
    copies = slow * B.dtype.itemsize * (out + columns) * R
    needed = held + copies + slow * working_bytes(out, columns, R, rank, dtype, second)
    if left is not None and needed > left:
        raise MemoryLimitError(
            f"{slow} x ({out}x{columns}), R = {R}, must be solved with driver {second!r} in "
            f"{dtype}, since clients duplicate or cancel; that needs {needed:.3g} bytes; "
            f"memory_limit= allows {left:.3g} here; raise it, or pass fewer layers at a time"
        )
