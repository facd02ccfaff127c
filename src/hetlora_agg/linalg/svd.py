"""``svd_product``: the leading SVD of ``B @ A`` for a whole batch, formed only if cheapest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hetlora_agg.errors import ConvergenceError, InputTypeError, InputValueError
from hetlora_agg.linalg.drivers import DRIVERS, Solution
from hetlora_agg.linalg.lapack import MemberFailed
from hetlora_agg.linalg.precision import exact_arithmetic
from hetlora_agg.linalg.select import select_driver

SPLITS: Mapping[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "balanced": lambda U, S, Vh: (U * S.sqrt().unsqueeze(-2), S.sqrt().unsqueeze(-1) * Vh),
    "left": lambda U, S, Vh: (U * S.unsqueeze(-2), Vh),
    "right": lambda U, S, Vh: (U, S.unsqueeze(-1) * Vh),
}
"""Where the singular values go: into both factors, into the left, or into the right one."""

WORKSPACE_BYTES = 1 << 25
"""The batch is gone through in chunks whose float64 working copies stay under this many bytes on a
CPU, where what fits the cache is mostly faster than what does not
(``benchmarks/results/drivers.json``, rows ``workspace``); a single member may exceed it."""

DEVICE_WORKSPACE_BYTES = 1 << 32
"""The same on a GPU, where few large calls win; only there to bound memory."""


@dataclass(frozen=True)
class Solve:
    """How one batched SVD was taken: nothing falls back without a word here.

    Attributes:
        driver: the driver that ran, "gram", "qr" or "dense".
        norm: Frobenius norm of the whole matrix, ``(*layers,)`` float64.
        tail: Frobenius norm of what truncation discarded, ``(*layers,)`` float64.
        fallbacks: ``(batch member, how)`` for members that left the fast path; usually empty.
    """

    driver: str
    norm: Tensor
    tail: Tensor
    fallbacks: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, eq=False)
class SVD:
    """``U @ diag(S) @ Vh``, the leading triplets of each batch member.

    Attributes:
        U: ``(*layers, out_features, rank)``, orthonormal columns.
        S: ``(*layers, rank)``, descending; what lies under the rounding of the float64 sums that
            make W, ``max(out, in) ε Σ ‖b_j‖‖a_j‖``, is exactly zero.
        Vh: ``(*layers, rank, in_features)``, orthonormal rows. Where S is zero, so are the
            component's U and Vh.
        solve: driver, norms and fallbacks.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    solve: Solve


def svd_product(B: Tensor, A: Tensor, rank: int | None = None, driver: str = "auto") -> SVD:
    """Leading SVD of ``B @ A`` for every member of a batch.

    Signs are fixed: the entry of largest magnitude in each column of U is positive. float16 and
    bfloat16 factors are computed and returned in float32; R×R work is float64 throughout.

    Args:
        B: ``(*layers, out_features, R)``, floating point.
        A: ``(*layers, R, in_features)``, same dtype, device and leading dimensions.
        rank: number of triplets; None means ``min(R, out_features, in_features)``.
        driver: "auto" (see `select_driver`), "gram", "qr" or "dense".

    Returns:
        An `SVD` with ``rank`` triplets (never more than ``min(R, out_features, in_features)``).

    Raises:
        InputTypeError: not floating-point tensors, or mixed dtypes or devices.
        InputValueError: shapes that do not fit, NaN or Inf, a rank below 1, an unknown driver.
        ConvergenceError: no driver converged, or a singular value leaves the result's dtype.

    Cost: about ``(out + in)(R² + R r)`` multiply-adds and one R×R decomposition per member.

    Example:
        >>> B, A = torch.eye(4)[:, :2], torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 2.0]])
        >>> svd_product(B, A, rank=1).S
        tensor([3.])
    """
    _check(B, A, rank, driver)
    svd = leading_svd(B, A, rank, driver)
    return replace(svd, S=as_dtype(svd.S, svd.U.dtype))


def leading_svd(B: Tensor, A: Tensor, rank: int | None = None, driver: str = "auto") -> SVD:
    """`svd_product` for factors that were checked already, with S left in float64.

    For callers that go on multiplying: what a float32 singular value loses below 1e-38 or cannot
    hold above 1e38, its square root in both factors still carries.
    """
    out, R, columns = B.shape[-2], B.shape[-1], A.shape[-1]
    rank = min(R, out, columns, R if rank is None else rank)
    dtype = B.dtype if B.dtype == torch.float64 else torch.float32
    if driver == "auto":
        driver = select_driver(out, columns, R, rank, dtype, B.device.type)
    parts: list[SVD] = []
    with exact_arithmetic(B.device.type):
        for b, a in _chunks(B.reshape(-1, out, R), A.reshape(-1, R, columns)):
            before = sum(len(part.S) for part in parts)
            try:
                solution = DRIVERS[driver](b.to(dtype), a.to(dtype), rank)
            except MemberFailed as error:
                raise ConvergenceError(
                    f"svd_product: no driver converged on batch member {before + error.member} "
                    f"({out}x{columns}, R = {R}); look at that layer's factors for entries of "
                    "wildly different size"
                ) from error
            parts.append(_finished(solution, rank, dtype, driver, before))
    return _joined(parts, B.shape[:-2])


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


def _finished(solution: Solution, rank: int, dtype: torch.dtype, driver: str, before: int) -> SVD:
    """One chunk with what is rounding cut, signs fixed and vectors cast."""
    U, S, Vh, size, notes = solution
    # Under the rounding of the sums that make W a singular value is noise of dependent or
    # cancelling columns; relative to the size of the terms, since W itself may cancel.
    noise = max(U.shape[-2], Vh.shape[-1]) * torch.finfo(torch.float64).eps * size
    S = torch.where(S > noise.unsqueeze(-1), S, 0.0)
    # Relative to σ_1, so that no square leaves float64.
    top = S[..., :1]
    relative = torch.where(top > 0, S / top, 0.0)
    norm = torch.linalg.vector_norm(relative, dim=-1) * top.squeeze(-1)
    tail = torch.linalg.vector_norm(relative[..., rank:], dim=-1) * top.squeeze(-1)
    S = S[..., :rank]
    peak = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    alive = (S > 0).unsqueeze(-2)
    sign = torch.where(peak < 0, -1.0, 1.0).to(U)
    # where, not a product: a dead component may hold anything.
    U = torch.where(alive, U * sign, 0.0).to(dtype)
    Vh = torch.where(alive.mT, Vh * sign.mT, 0.0).to(dtype)
    fallbacks = tuple((before + i, how) for i, how in notes)
    return SVD(U, S, Vh, Solve(driver, norm, tail, fallbacks))


def _joined(parts: list[SVD], layers: torch.Size) -> SVD:
    """The chunks as one, with the leading dimensions given back."""

    def cat(pieces: list[Tensor]) -> Tensor:
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole.reshape((*layers, *whole.shape[1:]))

    solve = Solve(
        parts[0].solve.driver,
        cat([part.solve.norm for part in parts]),
        cat([part.solve.tail for part in parts]),
        tuple(note for part in parts for note in part.solve.fallbacks),
    )
    U, S, Vh = (cat([getattr(part, name) for part in parts]) for name in ("U", "S", "Vh"))
    return SVD(U, S, Vh, solve)


def _chunks(B: Tensor, A: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The batch in pieces whose float64 copies fit the workspace."""
    # Two float64 copies of each factor are alive at once in the gram driver, W in the dense one.
    _, out, R = B.shape
    per_member = 16 * (out + A.shape[-1]) * R + 24 * R * R
    workspace = WORKSPACE_BYTES if B.device.type == "cpu" else DEVICE_WORKSPACE_BYTES
    size = max(1, workspace // max(1, per_member))
    return list(zip(torch.split(B, size), torch.split(A, size), strict=True))


def _check(B: Tensor, A: Tensor, rank: int | None, driver: str) -> None:
    """Everything svd_product refuses."""
    for name, X in (("B", B), ("A", A)):
        if not isinstance(X, Tensor) or not X.is_floating_point() or X.dtype.itemsize < 2:
            kind = X.dtype if isinstance(X, Tensor) else type(X).__name__
            raise InputTypeError(
                f"svd_product: {name} must be a float16, bfloat16, float32 or float64 tensor, "
                f"got {kind}"
            )
        if X.dim() < 2 or 0 in X.shape:
            raise InputValueError(
                f"svd_product: {name} must be (*layers, rows, columns), none of them 0, got "
                f"{tuple(X.shape)}"
            )
    if B.dtype != A.dtype or B.device != A.device:
        raise InputTypeError(
            f"svd_product: B is {B.dtype} on {B.device}, A is {A.dtype} on {A.device}; "
            "bring both to one dtype and device"
        )
    if B.shape[-1] != A.shape[-2] or B.shape[:-2] != A.shape[:-2]:
        raise InputValueError(
            f"svd_product: expected B (*layers, out, R) and A (*layers, R, in), got "
            f"{tuple(B.shape)} and {tuple(A.shape)}"
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise InputValueError(f"svd_product: rank must be an integer of at least 1, got {rank!r}")
    if driver != "auto" and driver not in DRIVERS:
        raise InputValueError(
            f"svd_product: unknown driver {driver!r}; known: {sorted(['auto', *DRIVERS])}"
        )
    for name, X in (("B", B), ("A", A)):
        if not all_finite(X):
            where = (~torch.isfinite(X)).nonzero()[0].tolist()
            raise InputValueError(f"svd_product: {name} has NaN or Inf, first at {where}")


def all_finite(*tensors: Tensor) -> bool:
    """Whether every entry of all of them is finite; one pass and one read in the usual case."""
    # A finite sum proves it; an infinite one may be overflow, so then every entry is looked at.
    total = sum(X.sum(dtype=torch.float64) for X in tensors)
    if bool(torch.isfinite(torch.as_tensor(total))):
        return True
    return all(bool(torch.isfinite(X).all()) for X in tensors)
