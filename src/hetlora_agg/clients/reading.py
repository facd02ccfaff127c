"""Reading of what the clients' functions take: factors, weights, slots, generators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.checks import as_integer, as_list, no_data
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.linalg import all_finite
from hetlora_agg.types import AggregationResult, LowRank


def as_factors(value: Any, what: str, like: LowRank | None = None) -> LowRank:
    """A `LowRank` of floating tensors, in the shapes of ``like`` if that is given."""
    if not isinstance(value, LowRank) or any(map(_odd, (value.A, value.B))):
        found = type(value).__name__
        if isinstance(value, LowRank):
            kinds = (_odd(X) or str(X.dtype) for X in (value.A, value.B))
            found = "one of " + " and ".join(kinds)
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
    if found := _odd(value):
        raise InputTypeError(f"{what}: expected a floating torch tensor {shape}, got {found}")
    if value.dim() < 2 or 0 in value.shape:
        raise InputValueError(f"{what}: expected {shape}, got {tuple(value.shape)}")
    matrix: Tensor = value
    return matrix


def as_scores(value: Any, what: str) -> Tensor:
    """A finite floating tensor ``(*layers, rank)``."""
    if found := _odd(value):
        raise InputTypeError(f"{what}: scores: expected a floating torch tensor, got {found}")
    if value.dim() < 1 or 0 in value.shape:
        raise InputValueError(f"{what}: scores: expected (*layers, rank), got {tuple(value.shape)}")
    scores: Tensor = value
    if not all_finite(scores):
        raise InputValueError(
            f"{what}: scores: NaN or Inf; start again with earlier=None after a bad step"
        )
    return scores


def check_reach(factors: LowRank, what: str) -> LowRank:
    """The factors, refused where the arithmetic has left their dtype."""
    if not all_finite(factors.A, factors.B):
        raise InputValueError(
            f"{what}: the result has entries beyond {factors.A.dtype}; take larger steps, or pass "
            "the factors in a wider dtype"
        )
    return factors


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


def _odd(value: Any) -> str:
    """What makes of a value no floating tensor with data, in words; nothing if it is one."""
    return no_data(value) if isinstance(value, Tensor) else type(value).__name__


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)
