"""Checks of options, one line each at the place that uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hetlora_agg.components import Components
from hetlora_agg.errors import InputTypeError, InputValueError, unknown_name
from hetlora_agg.types import AggregationResult, LowRank


def check_fraction(name: str, value: float) -> None:
    """Refuse what is not in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise InputValueError(f"{name}=: expected a number in (0, 1], got {value!r}")


def check_count(name: str, value: int) -> None:
    """Refuse what is not an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputValueError(f"{name}=: expected an integer of at least 1, got {value!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse what is not among the choices, naming the nearest."""
    if value not in choices:
        raise InputValueError(unknown_name(f"{name}=", value, choices))


def fitting_state(name: str, state: Any, c: Components) -> LowRank | None:
    """A global update of an earlier round, checked against the clients' and in their dtype.

    Args:
        name: the option's name, for the error.
        state: None, a `LowRank`, or the `AggregationResult` of an earlier round.
        c: this round's components.
    """
    if state is None:
        return None
    if isinstance(state, AggregationResult):
        if not state.nested:
            raise InputValueError(
                f"{name}=: that result is not nested, so its components are not slots; "
                "pass the factors that were distributed"
            )
        state = state.factors
    if not isinstance(state, LowRank):
        raise InputTypeError(
            f"{name}=: expected a LowRank or an AggregationResult, got {type(state).__name__}"
        )
    expected = (*c.layers, c.B.shape[-2], c.A.shape[-1])
    if state.dense_shape != expected:
        raise InputValueError(
            f"{name}=: expected (*layers, out_features, in_features) = {expected} as the clients "
            f"have, got {state.dense_shape}"
        )
    return state.to(c.A)
