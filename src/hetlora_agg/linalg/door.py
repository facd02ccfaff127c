"""What `svd_product` refuses, before any arithmetic."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.linalg.drivers import DRIVERS


def check(
    B: Tensor,
    A: Tensor,
    rank: int | None,
    driver: str,
    workers: int | None,
    memory_limit: int | None,
) -> None:
    """Everything `svd_product` refuses."""
    _check_factors(B, A)
    counts = {"rank": rank, "workers": workers, "memory_limit": memory_limit}
    for name, count in counts.items():
        if count is not None and (
            isinstance(count, bool) or not isinstance(count, int) or count < 1
        ):
            raise InputValueError(
                f"svd_product: {name} must be an integer of at least 1, got {count!r}"
            )
    if driver != "auto" and driver not in DRIVERS:
        raise InputValueError(
            f"svd_product: unknown driver {driver!r}; known: {sorted(['auto', *DRIVERS])}"
        )
    for name, X in (("B", B), ("A", A)):
        if not all_finite(X):
            where = (~torch.isfinite(X)).nonzero()[0].tolist()
            raise InputValueError(f"svd_product: {name} has NaN or Inf, first at {where}")


def _check_factors(B: Tensor, A: Tensor) -> None:
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


def all_finite(*tensors: Tensor) -> bool:
    """Whether every entry of all of them is finite; one pass and one read in the usual case."""
    # A finite sum proves it; an infinite one may be overflow, so then the extremes are looked at.
    wide = ((X.detach(), torch.promote_types(X.dtype, torch.float32)) for X in tensors)
    total = sum(X.sum(dtype=dtype) for X, dtype in wide)
    if math.isfinite(total):
        return True
    ends = (end for X in tensors for end in (X.amin(), X.amax()))
    return all(bool(torch.isfinite(end)) for end in ends)
