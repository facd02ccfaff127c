"""Reading of single values and options, one line each at the place that uses them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.components import Components
from hetlora_agg.errors import (
    InputTypeError,
    InputValueError,
    OptionValueError,
    shown,
    unknown_name,
)
from hetlora_agg.linalg import all_finite
from hetlora_agg.types import AggregationResult, LowRank

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What factors may be; float8 is for storage, torch does not add it up."""


def as_integer(value: Any, what: str, at_least: int | None = None) -> int:
    """The value as a Python int; numpy integers and one-element integer tensors are integers."""
    expected = "an integer" if at_least is None else f"an integer of at least {at_least}"
    try:
        if _is_bool(value):
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise InputTypeError(f"{what}: expected {expected}, got {shown(value)}") from error
    if at_least is not None and number < at_least:
        raise _refusal(what, f"expected {expected}, got {shown(value)}")
    return number


def as_number(value: Any, what: str, *, zero: bool) -> float:
    """The value as a finite float, above zero or, with ``zero``, not below it."""
    expected = f"a finite number {'>= 0' if zero else '> 0'}"
    kind = getattr(getattr(value, "dtype", None), "kind", "f")
    if _is_bool(value) or isinstance(value, (str, bytes)) or kind not in "iuf":
        raise InputTypeError(f"{what}: expected {expected}, got {shown(value)}")
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"{what}: expected {expected}, got {shown(value)}") from error
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise _refusal(what, f"expected {expected}, got {shown(value)}")
    return number


def as_fraction(value: Any, what: str) -> float:
    """The value as a float in (0, 1]."""
    try:
        number = as_number(value, what, zero=False)
    except InputValueError:
        number = math.nan
    if not number <= 1:
        raise _refusal(what, f"expected a number in (0, 1], got {shown(value)}")
    return number


def as_path(path: Any, what: str, kind: str) -> Path:
    """A `Path` to a "file" or "folder", for the argument or call ``what``."""
    try:
        return Path(path)
    except TypeError as error:
        raise InputTypeError(
            f"{what}: expected the path of a {kind}, got {type(path).__name__}"
        ) from error


def as_list(values: Any, what: str) -> list[Any]:
    """The values as a list; a string or a single number is none, a set has no order."""
    unordered = isinstance(values, (set, frozenset))
    if unordered or isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InputTypeError(f"{what}: expected a list, got {shown(values)}")
    try:
        return list(values)
    except TypeError as error:
        raise InputTypeError(f"{what}: expected a list, got {shown(values)}") from error


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse what is not among the choices, naming the nearest."""
    # An array among the values would be compared entry by entry.
    if not isinstance(value, str) or value not in choices:
        raise OptionValueError(unknown_name(f"{name}=", value, choices))


def _is_bool(value: Any) -> bool:
    """A truth value, also as a scalar or 0-d array of numpy and as a tensor."""
    dtype = getattr(value, "dtype", None)
    kind = getattr(dtype, "kind", None)
    return isinstance(value, bool) or dtype is torch.bool or kind == "b"


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise InputTypeError(f"{name}=: expected True or False, got {shown(value)}")


def _refusal(what: str, why: str) -> InputValueError:
    """The error for a wrong value; options are those whose name ends in "="."""
    kind = OptionValueError if what.endswith("=") else InputValueError
    return kind(f"{what}: {why}")


def no_data(X: Tensor) -> str:
    """What keeps a tensor from being computed with, in words; nothing if nothing does."""
    if X.is_meta:
        return "a meta tensor"
    if X.is_nested or X.layout != torch.strided:
        return "a nested one" if X.is_nested else f"a {X.layout} one"
    return "" if X.dtype in FLOATS else str(X.dtype)


def fitting_state(name: str, state: Any, c: Components) -> LowRank | None:
    """A global update of an earlier round, checked against the clients' and in their dtype.

    Args:
        name: the option's name, for the error.
        state: None, a `LowRank`, or the `AggregationResult` of an earlier round.
        c: this round's components.
    """
    if state is None:
        return None
    return as_state(state, f"{name}=", (*c.layers, c.B.shape[-2], c.A.shape[-1])).to(c.A)


def as_state(
    state: Any, what: str, shape: tuple[int, ...], who: str = "as the clients have"
) -> LowRank:
    """A `LowRank`, or a nested result's factors, of the given dense shape and finite."""
    if isinstance(state, AggregationResult):
        if not state.nested and not state.slotted:
            raise OptionValueError(
                f"{what}: that result is not nested, so its components are not slots; pass the "
                "factors that were distributed"
            )
        state = state.factors
    if not isinstance(state, LowRank):
        raise InputTypeError(
            f"{what}: expected a LowRank or an AggregationResult, got {type(state).__name__}"
        )
    if state.dense_shape != shape:
        raise OptionValueError(
            f"{what}: expected (*layers, out_features, in_features) = {shape} {who}, got "
            f"{state.dense_shape}"
        )
    factors: LowRank = state.torch()
    for X in (factors.A, factors.B):
        if odd := no_data(X):
            raise InputTypeError(f"{what}: expected factors of floating dtype, got {odd}")
    if not all_finite(factors.A, factors.B):
        raise OptionValueError(f"{what}: NaN or Inf in the factors; pass the last good round's")
    return factors
