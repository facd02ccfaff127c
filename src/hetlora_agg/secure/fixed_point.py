"""Fixed point: messages as integers mod 2⁶⁴, whose sum does not depend on the order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from hetlora_agg.checks import as_integer, as_number
from hetlora_agg.errors import InputTypeError, InputValueError, OptionValueError
from hetlora_agg.linalg import all_finite

HALF_RANGE = 2**63
"""Sums below it in magnitude are read back as they are."""


def most_bits(clients: int, largest: float) -> int:
    """The finest grid on which no sum of that many messages can overflow.

    The largest b with ``K (c 2^b + ½) < 2^63``.

    Args:
        clients: K, the most messages that are added.
        largest: c > 0, the largest magnitude of an entry of any message; a clip of its norm is one.

    Returns:
        Fractional bits; negative where entries are that large.

    Raises:
        InputTypeError, InputValueError: no number of clients, no magnitude, or so many clients that
            no grid is left.

    Cost: none.

    Example:
        >>> most_bits(clients=100, largest=1.0)
        56

    Reference: secure aggregation, Bonawitz et al., arXiv:1611.04482.

    Fidelity: OURS.

    Deviations: none.
    """
    clients = as_integer(clients, "clients=", at_least=1)
    largest = as_number(largest, "largest=", zero=False)
    if clients >= HALF_RANGE:
        raise OptionValueError(f"clients=: {clients} messages leave no room in 64 bits")
    room = Fraction(HALF_RANGE, clients) - Fraction(1, 2)
    exact = room / Fraction(largest)
    bits = exact.numerator.bit_length() - exact.denominator.bit_length() + 1
    while Fraction(largest) * Fraction(2) ** bits >= room:
        bits -= 1
    return bits


def to_fixed(
    message: Mapping[str, Tensor], *, bits: int, clients: int, largest: float
) -> dict[str, Tensor]:
    """The message on a grid of ``2^-bits``, as integers that a secure sum adds mod 2⁶⁴.

    ``z = round(x 2^b)``, halves to even. Added in any order, and with masks that cancel mod 2⁶⁴,
    they give the same sum bit for bit.

    Args:
        message: name -> floating tensor, from `linear_message`, clipped or not.
        bits: b, the same on all clients; `most_bits` gives the most there can be.
        clients: K, the most messages that are added.
        largest: the largest magnitude of an entry of any message, the same on all clients.

    Returns:
        Name -> int64 tensor of the same shape.

    Raises:
        InputTypeError: no floating tensors, or bits that are no integer.
        InputValueError: NaN or Inf, an entry above ``largest``, or a sum of K such messages that
            could overflow; raised before anything is encoded.

    Cost: two passes over the message.

    Example:
        >>> import torch
        >>> to_fixed({"A": torch.tensor([[0.75, -0.1]])}, bits=4, clients=3, largest=1.0)
        {'A': tensor([[12, -2]])}

    Reference: secure aggregation, Bonawitz et al., arXiv:1611.04482.

    Fidelity: OURS for the grid.

    Deviations: rounding moves a message by up to half a step per entry: ``√d 2^-(b+1)`` for d
    entries, which belongs to a sensitivity that is meant to the last digit.
    """
    bits = as_integer(bits, "bits=")
    if bits > (most := most_bits(clients, largest)):
        raise OptionValueError(
            f"bits=: {clients} messages with entries up to {largest:g} overflow 64 bits at {bits}; "
            f"expected at most {most}"
        )
    if not isinstance(message, Mapping) or not all(
        isinstance(X, Tensor) and X.is_floating_point() for X in message.values()
    ):
        raise InputTypeError("to_fixed: expected {name: floating tensor}")
    if not all_finite(*message.values()):
        raise InputValueError("to_fixed: NaN or Inf; leave this client out of the round")
    for name, X in message.items():
        if X.numel() and float(X.detach().abs().max()) > largest:
            raise InputValueError(
                f"to_fixed: {name} has an entry above largest = {largest:g}; clip the message first"
            )
    return {name: _times_power(X.detach(), bits).round().long() for name, X in message.items()}


def from_fixed(
    total: Mapping[str, Tensor], *, bits: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The sum of messages that `to_fixed` made, as floating numbers.

    ``x = z 2^-b``, z read as a signed integer. Off the sum of the messages by at most
    ``K 2^-(b+1)`` per entry, and by the rounding of z to ``dtype``.

    Args:
        total: name -> int64 tensor, added mod 2⁶⁴.
        bits: b, as on the clients.
        dtype: of the numbers; for `from_sum` that of the wanted result.

    Returns:
        Name -> floating tensor of the same shape.

    Raises:
        InputTypeError: no int64 tensors, bits that are no integer, a dtype that is not floating.

    Cost: one pass.

    Example:
        >>> import torch
        >>> from_fixed({"A": torch.tensor([[12, -2]])}, bits=4)
        {'A': tensor([[ 0.7500, -0.1250]], dtype=torch.float64)}

    Reference: secure aggregation, Bonawitz et al., arXiv:1611.04482.

    Fidelity: OURS.

    Deviations: none.
    """
    bits = as_integer(bits, "bits=")
    if not isinstance(total, Mapping) or not all(
        isinstance(X, Tensor) and X.dtype == torch.int64 for X in total.values()
    ):
        raise InputTypeError("from_fixed: expected {name: int64 tensor}, as `to_fixed` makes them")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputTypeError(f"from_fixed: dtype=: expected a floating dtype, got {dtype!r}")
    return {name: _times_power(X, -bits).to(dtype) for name, X in total.items()}


def _times_power(X: Tensor, exponent: int) -> Tensor:
    """``X 2^exponent`` in float64, in two steps: the power itself may leave float64."""
    half = exponent // 2
    return X.to(torch.float64) * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)
