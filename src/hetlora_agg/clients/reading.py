"""Reading of what the clients' functions take: factors, weights, slots, generators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.checks import as_integer, as_list
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.linalg import all_finite
from hetlora_agg.types import AggregationResult, LowRank


def as_factors(value: Any, what: str, like: LowRank | None = None) -> LowRank:
    """A `LowRank` of floating tensors, in the shapes of ``like`` if that is given."""
    if not isinstance(value, LowRank) or not all(
        isinstance(X, Tensor) and X.is_floating_point() for X in (value.A, value.B)
    ):
        found = type(value).__name__
        if isinstance(value, LowRank):
            kinds = (getattr(X, "dtype", type(X).__name__) for X in (value.A, value.B))
            found = "one of " + " and ".join(map(str, kinds))
        raise InputTypeError(f"{what}: expected a LowRank of floating torch tensors, got {found}")
    if like is not None and (value.A.shape, value.B.shape) != (like.A.shape, like.B.shape):
        raise InputValueError(
            f"{what}: expected A {tuple(like.A.shape)} and B {tuple(like.B.shape)}, got "
            f"{tuple(value.A.shape)} and {tuple(value.B.shape)}; pass factors of one client and "
            "layer at one rank"
        )
    return value


def as_finite_factors(value: Any, what: str, like: LowRank | None = None) -> LowRank:
    """The same, without NaN and Inf."""
    factors = as_factors(value, what, like)
    if not all_finite(factors.A, factors.B):
        raise InputValueError(
            f"{what}: NaN or Inf in the factors; lower the learning rate, or go on from the last "
            "good round's"
        )
    return factors


def as_result(value: Any, what: str) -> AggregationResult:
    """An `AggregationResult`."""
    if not isinstance(value, AggregationResult):
        raise InputTypeError(
            f"{what}: expected an AggregationResult, got {type(value).__name__}; a model goes "
            "layer by layer"
        )
    return value


def as_matrix(value: Any, what: str, shape: str) -> Tensor:
    """A floating tensor of at least two dimensions, none of them 0."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise InputTypeError(f"{what}: expected a floating torch tensor {shape}, got {found}")
    if value.dim() < 2 or 0 in value.shape:
        raise InputValueError(f"{what}: expected {shape}, got {tuple(value.shape)}")
    return value


def as_generator(value: Any, what: str) -> torch.Generator:
    """A `torch.Generator`."""
    if not isinstance(value, torch.Generator):
        raise InputTypeError(
            f"{what}: generator: expected a torch.Generator, got {type(value).__name__}; make one "
            "with torch.Generator().manual_seed(seed)"
        )
    return value


def as_slots(slots: Sequence[int] | None, rank: int, width: int, what: str) -> list[int]:
    """Distinct slots under ``width``, one for each of ``rank`` components; None is the leading."""
    read = (
        list(range(rank))
        if slots is None
        else [as_integer(slot, f"{what}: slot") for slot in as_list(slots, f"{what}: slots")]
    )
    if len(read) != rank or len(set(read)) != rank or not set(read) <= set(range(width)):
        raise InputValueError(
            f"{what}: slots: expected {rank} distinct slots under {width}, one for each "
            f"component, got {read}"
        )
    return read


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)
