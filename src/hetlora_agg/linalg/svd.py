"""``svd_product``: the leading SVD of ``B @ A`` for a whole batch, formed only if cheapest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hetlora_agg.errors import ConvergenceError
from hetlora_agg.linalg.certificate import Certificate, verified
from hetlora_agg.linalg.door import all_finite, check
from hetlora_agg.linalg.drivers import DRIVERS
from hetlora_agg.linalg.execution import limited, resources, run
from hetlora_agg.linalg.lapack import MemberFailed
from hetlora_agg.linalg.memory import check_verifying, flattening_bytes, plan
from hetlora_agg.linalg.precision import exact_arithmetic
from hetlora_agg.linalg.products import column_extremes
from hetlora_agg.linalg.select import select_driver
from hetlora_agg.linalg.solution import Solution, norms

SPLITS: Mapping[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "balanced": lambda U, S, Vh: (U * S.sqrt().unsqueeze(-2), S.sqrt().unsqueeze(-1) * Vh),
    "left": lambda U, S, Vh: (U * S.unsqueeze(-2), Vh),
    "right": lambda U, S, Vh: (U, S.unsqueeze(-1) * Vh),
}
"""Where the singular values go: into both factors, into the left, or into the right one."""


PAD_TO: Mapping[str, int] = {"cuda": 16}
"""By device, what R is padded to a multiple of for the Gram driver: matrix units like whole tiles.
A pair of zeros is left out there of everything but the shape."""

LAPACK_STOPS = 50
"""ε of the norm that an SVD may be off whatever its size: LAPACK's iteration for singular values
stops at ``eps**(-1/8)`` = 98.7 roundings, ε/2 each, and small matrices do reach that."""


@dataclass(frozen=True, eq=False)
class SVD:
    """``U @ diag(S) @ Vh``, the leading triplets of each batch member.

    Attributes:
        U: ``(*layers, out_features, rank)``, orthonormal columns.
        S: ``(*layers, rank)``, descending; what lies under the rounding of the float64 sums that
            make W, ``max(out, in) ε Σ ‖b_j‖‖a_j‖``, is exactly zero.
        Vh: ``(*layers, rank, in_features)``, orthonormal rows. Where S is zero, so are the
            component's U and Vh.
        certificate: driver, norms, error bound and fallbacks.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    certificate: Certificate


def svd_product(
    B: Tensor,
    A: Tensor,
    rank: int | None = None,
    driver: str = "auto",
    *,
    verify: bool = False,
    workers: int | None = None,
    memory_limit: int | None = None,
) -> SVD:
    """Leading SVD of ``B @ A`` for every member of a batch.

    Signs are fixed: the entry of largest magnitude in each column of U is positive. float16 and
    bfloat16 factors are computed and returned in float32; R×R work is float64 throughout.

    Args:
        B: ``(*layers, out_features, R)``, floating point.
        A: ``(*layers, R, in_features)``, same dtype, device and leading dimensions.
        rank: number of triplets; None means ``min(R, out_features, in_features)``.
        driver: "auto" (see `select_driver`), one of the exact "gram", "qr", "dense", or one of the
            approximate "randomized" (through the factors) and "randomized_dense" (forms W).
        verify: measure the error of what is returned as well; about as much work again.
        workers: chunks of layers solved at a time on a CPU, each with its share of torch's threads,
            which are restored afterwards (but a thread that uses torch for the first time
            meanwhile keeps the smaller count). None is one per thread, fewer for little work.
        memory_limit: bytes that the call may allocate, result included. Chunks shrink to fit.

    Returns:
        An `SVD` with ``rank`` triplets (never more than ``min(R, out_features, in_features)``).

    Raises:
        InputTypeError: not floating-point tensors, or mixed dtypes or devices.
        InputValueError: shapes that do not fit, NaN or Inf, a rank below 1, an unknown driver.
        MemoryLimitError: one member alone would exceed ``memory_limit``. Members that must leave
            the fast path are checked when they turn up, before they are solved.
        ConvergenceError: no driver converged, or a singular value leaves the result's dtype.

    Cost: about ``(out + in)(R²/2 + R r)`` multiply-adds and one R×R decomposition per member.

    Example:
        >>> B, A = torch.eye(4)[:, :2], torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 2.0]])
        >>> svd = svd_product(B, A, rank=1, verify=True)
        >>> svd.S, svd.certificate.error, svd.certificate.tail
        (tensor([3.]), tensor(2., dtype=torch.float64), tensor(2., dtype=torch.float64))
    """
    check(B, A, rank, driver, workers, memory_limit)
    if verify and memory_limit is not None:
        check_verifying(B, A, rank, memory_limit)
    with limited(workers, memory_limit):
        svd = _narrowed(leading_svd(B, A, rank, driver))
        if not verify:
            return svd
        with exact_arithmetic(B.device.type):
            known = verified(svd.certificate, B, A, (svd.U, svd.S, svd.Vh))
        return replace(svd, certificate=known)


def leading_svd(B: Tensor, A: Tensor, rank: int | None = None, driver: str = "auto") -> SVD:
    """`svd_product` for factors that were checked already, with S left in float64.

    For callers that go on multiplying: what a float32 singular value loses below 1e-38 or cannot
    hold above 1e38, its square root in both factors still carries.
    """
    layers, (out, R), columns = B.shape[:-2], B.shape[-2:], A.shape[-1]
    rank = min(R, out, columns, R if rank is None else rank)
    dtype = B.dtype if B.dtype == torch.float64 else torch.float32
    if driver == "auto":
        driver = select_driver(out, columns, R, rank, dtype, B.device.type)
    allowed, shape = resources(), (layers.numel(), out, columns, R, rank)
    planned = plan(shape, B.dtype, driver, B.device.type, allowed, flattening_bytes(B, A))
    chunk, each = planned.chunk, planned.each(allowed.memory_limit)
    B, A = B.reshape(-1, out, R), A.reshape(-1, R, columns)
    # Ordinary tensors: what is made in inference mode, workers outside of it may not write to.
    with torch.inference_mode(False):
        U = torch.empty(len(B), out, rank, dtype=dtype, device=B.device)
        Vh = torch.empty(len(B), rank, columns, dtype=dtype, device=B.device)

    extra = -R % PAD_TO.get(B.device.type, 1) if driver == "gram" else 0

    def solve(start: int) -> tuple[Tensor, Certificate]:
        some = slice(start, start + chunk)
        try:
            with limited(None, each):
                b, a = B[some].to(dtype), A[some].to(dtype)
                if extra:
                    b, a = pad(b, (0, extra)), pad(a, (0, 0, 0, extra))
                solution = DRIVERS[driver](b, a, rank)
                solution = solution._replace(S=solution.S[..., :R])
        except MemberFailed as error:
            raise ConvergenceError(
                f"svd_product: no driver converged on batch member {start + error.member} "
                f"({out}x{columns}, R = {R}); look at that layer's factors for entries of "
                "wildly different size"
            ) from error
        return _finished(solution, U[some], Vh[some], driver, start)

    with exact_arithmetic(B.device.type):
        parts = run(solve, range(0, len(B), chunk), planned.workers)
    S, certificate = _joined(parts)
    return SVD(
        U.reshape(*layers, out, rank),
        S.reshape(*layers, rank),
        Vh.reshape(*layers, rank, columns),
        certificate.map(lambda x: x.reshape(layers)),
    )


def _narrowed(svd: SVD) -> SVD:
    """With S in the dtype of U; what underflows there leaves no component."""
    S = as_dtype(svd.S, svd.U.dtype)
    if S.dtype == torch.float64 or not bool(((svd.S > 0) & (S < torch.finfo(S.dtype).tiny)).any()):
        return replace(svd, S=S)
    dead, known = (S == 0).unsqueeze(-2), svd.certificate
    lost = torch.linalg.vector_norm(svd.S - S, dim=-1)
    known = replace(known, kept=(S > 0).sum(-1), rounding=known.rounding + lost)
    # In place: they were made by this call.
    return SVD(svd.U.masked_fill_(dead, 0.0), S, svd.Vh.masked_fill_(dead.mT, 0.0), known)


def as_dtype(S: Tensor, dtype: torch.dtype) -> Tensor:
    """Singular values in a narrower dtype; an error rather than Inf."""
    cast = S.to(dtype)
    if not all_finite(cast):
        raise ConvergenceError(
            f"svd_product: a singular value of {float(S.max()):.3g} is beyond "
            f"{torch.finfo(dtype).max:.3g}, the largest {dtype}; scale the factors down or pass "
            "them as float64"
        )
    return cast


def _finished(
    solution: Solution, U_out: Tensor, Vh_out: Tensor, driver: str, before: int
) -> tuple[Tensor, Certificate]:
    """One chunk with what is rounding cut, signs fixed, vectors cast into their place."""
    U, S, Vh, size, pivot, roundings, square_error, notes, tail = solution
    rank, spectrum = U.shape[-1], S.shape[-1]
    if U_out.dtype == torch.float64 and not all_finite(S, size):
        raise ConvergenceError(
            "svd_product: a product of these float64 factors is beyond "
            f"{torch.finfo(torch.float64).max:.3g}, the largest float64; scale the factors down"
        )
    noise_share = max(U.shape[-2], Vh.shape[-1]) * torch.finfo(torch.float64).eps
    # Under the rounding of the sums that make W a singular value is noise of dependent or
    # cancelling columns; relative to the size of the terms, since W itself may cancel.
    alive = S > (noise_share * size).unsqueeze(-1)
    cut = _length(torch.where(alive, 0.0, S), U_out.dtype)
    S = torch.where(alive, S, 0.0)
    norm = _length(S, U_out.dtype)
    if tail is None:
        tail = _length(S[..., rank:], U_out.dtype)
    else:
        norm = torch.hypot(norm, tail)
    S = S[..., :rank]
    high, low = column_extremes(U)
    sign = torch.where(high < -low, -1.0, 1.0).to(U).unsqueeze(-2)
    torch.mul(U, sign, out=U_out)
    torch.mul(Vh, sign.mT, out=Vh_out)
    dead = (S == 0).unsqueeze(-2)
    # On a GPU it costs less to fill than to ask.
    if U.device.type != "cpu" or bool(dead.any()):
        # Not by a product: a dead component may hold anything.
        U_out.masked_fill_(dead, 0.0)
        Vh_out.masked_fill_(dead.mT, 0.0)
    # Eight more: casts of both vectors and of S, and a split of S into the factors.
    unit = torch.finfo(U_out.dtype).eps / 2
    summed = 10 * noise_share + LAPACK_STOPS * torch.finfo(torch.float64).eps
    rounding = (8 + roundings) * unit * norm + summed * size / pivot + cut
    if rank < spectrum:
        # Of a sum of squares: a large tail hardly notices, one of zero has its square root.
        blur = square_error / torch.maximum(tail, square_error.sqrt())
        rounding += torch.where(square_error > 0, blur, 0.0)
    fallbacks = tuple((before + i, how) for i, how in notes)
    kept = (S > 0).sum(-1)
    return S, Certificate(driver, norm, tail, rounding, size, pivot, kept, fallbacks)


def _length(S: Tensor, dtype: torch.dtype) -> Tensor:
    """Euclidean norm of what are singular values of factors of a dtype."""
    # Only those of float64 factors have squares that leave float64.
    return norms(S, -1) if dtype == torch.float64 else S.square().sum(-1).sqrt()


def _joined(parts: list[tuple[Tensor, Certificate]]) -> tuple[Tensor, Certificate]:
    """The chunks' singular values and certificates as one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0][1]
    S = torch.cat([part for part, _ in parts])
    fallbacks = tuple(note for _, certificate in parts for note in certificate.fallbacks)
    columns = zip(*(certificate.tensors().items() for _, certificate in parts), strict=True)
    joined: dict[str, Any] = {
        column[0][0]: torch.cat([tensor for _, tensor in column]) for column in columns
    }
    return S, replace(first, **joined, fallbacks=fallbacks)
