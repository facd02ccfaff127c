"""Cohorts: who takes part in a round, and what that does to a client's weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hetlora_agg.checks import as_integer, as_list, as_number
from hetlora_agg.errors import InputTypeError, InputValueError, shown

LARGEST_FEDERATION = 1 << 30
"""No federation has more clients: a number above it is a mistake."""


def uniform_inclusion(clients: int, size: int) -> list[float]:
    """Each client's probability of being in a cohort drawn uniformly, ``m / K``.

    Args:
        clients: K, how many there are.
        size: m, how many take part.

    Returns:
        K equal numbers.

    Raises:
        InputTypeError: a number of clients that is no integer.
        InputValueError: fewer than one client, or a size outside 1 to K.

    Cost: K numbers.

    Example:
        >>> uniform_inclusion(4, 3)
        [0.75, 0.75, 0.75, 0.75]

    Reference: simple random sampling; in every textbook of survey sampling.

    Fidelity: SECOND.
    """
    clients = _checked_clients(clients, "uniform_inclusion")
    size = _checked_size(size, clients, "uniform_inclusion")
    return [size / clients] * clients


def midzuno_inclusion(weights: Sequence[float], size: int) -> list[float]:
    """Each client's probability of being in a Midzuno–Sen cohort.

    The first client is drawn in proportion to its weight, the other m − 1 uniformly from the rest:
    ``π_k = p_k + (1 − p_k)(m − 1)/(K − 1)``. A whole cohort is then as probable as
    its weights are large together, which makes its mean ``Σ n_k x_k / Σ n_k`` unbiased for that of
    all clients.

    Args:
        weights: n_k of all K clients, finite and >= 0, not all 0.
        size: m, how many take part.

    Returns:
        K numbers that add up to m.

    Raises:
        InputTypeError: weights or a size that are no numbers.
        InputValueError: a weight that is none, all of them 0, or a size outside 1 to K.

    Cost: K numbers and their sum.

    Example:
        >>> midzuno_inclusion([2.0, 1.0, 1.0], 2)
        [0.75, 0.625, 0.625]

    Reference: Midzuno 1952, Sen 1953; in every textbook of survey sampling.

    Fidelity: SECOND.
    """
    shares = _shares(weights, "midzuno_inclusion")
    clients = len(shares)
    size = _checked_size(size, clients, "midzuno_inclusion")
    rest = (size - 1) / max(clients - 1, 1)
    return [share + (1 - share) * rest for share in shares]


def draw_uniform(clients: int, size: int, generator: torch.Generator) -> tuple[int, ...]:
    """A cohort in which every set of m clients is equally probable.

    Args:
        clients: K, how many there are.
        size: m, how many take part.
        generator: source of the draw; it takes m numbers.

    Returns:
        m client numbers from 0, ascending.

    Raises:
        InputTypeError: a number of clients that is no integer, or no generator.
        InputValueError: fewer than one client, or a size outside 1 to K.

    Cost: a list of K numbers, from which m are taken one by one.

    Example:
        >>> draw_uniform(5, 5, torch.Generator().manual_seed(0))
        (0, 1, 2, 3, 4)

    Reference: simple random sampling; in every textbook of survey sampling.

    Fidelity: SECOND.
    """
    clients = _checked_clients(clients, "draw_uniform")
    size = _checked_size(size, clients, "draw_uniform")
    return uniform_cohort(clients, _uniforms(size, generator, "draw_uniform"))


def draw_midzuno(
    weights: Sequence[float], size: int, generator: torch.Generator
) -> tuple[int, ...]:
    """A Midzuno–Sen cohort: the first client in proportion to its weight, the others uniformly.

    Args:
        weights: n_k of all K clients, finite and >= 0, not all 0.
        size: m, how many take part.
        generator: source of the draw; it takes m numbers.

    Returns:
        m client numbers from 0, ascending.

    Raises:
        InputTypeError: weights or a size that are no numbers, or no generator.
        InputValueError: a weight that is none, all of them 0, or a size outside 1 to K.

    Cost: a list of K numbers, from which m are taken one by one, and K cumulative sums.

    Example:
        >>> draw_midzuno([0.0, 3.0, 0.0], 1, torch.Generator().manual_seed(0))
        (1,)

    Reference: Midzuno 1952, Sen 1953.

    Fidelity: SECOND.
    """
    shares = _shares(weights, "draw_midzuno")
    size = _checked_size(size, len(shares), "draw_midzuno")
    return midzuno_cohort(shares, _uniforms(size, generator, "draw_midzuno"))


def inverse_inclusion(weights: Sequence[float], inclusion: Sequence[float]) -> list[float]:
    """Horvitz–Thompson weights ``n_k / π_k`` of the clients of a cohort.

    With them and a fixed denominator, the sum of *all* clients' n_k (`aggregate`'s ``total=``,
    ``totals=``), the expectation over cohorts is the result of the full cohort. Normalised by their
    own sum, as weights are by default, they are not unbiased.

    Args:
        weights: n_k, finite and >= 0.
        inclusion: π_k of the same clients, in (0, 1].

    Returns:
        One weight per client.

    Raises:
        InputTypeError: what is no number.
        InputValueError: lists of different length, a weight or a probability that is none, or a
            quotient beyond float64.

    Cost: one division per client.

    Example:
        >>> inverse_inclusion([10.0, 30.0], [0.5, 0.75])
        [20.0, 40.0]

    Reference: Horvitz and Thompson 1952.

    Fidelity: SECOND for the weights, OURS for handing the denominator to `aggregate`.
    """
    numbers = _numbers(weights, "inverse_inclusion: weights")
    chances = as_list(inclusion, "inverse_inclusion: inclusion")
    if len(chances) != len(numbers):
        raise InputValueError(
            f"inverse_inclusion: expected one probability per weight, got {len(chances)} for "
            f"{len(numbers)}; pass those of the cohort's clients only"
        )
    inverse = []
    for k, (number, given) in enumerate(zip(numbers, chances, strict=True)):
        chance = as_number(given, f"inverse_inclusion: client {k}: inclusion", zero=True)
        if not 0 < chance <= 1:
            raise InputValueError(
                f"inverse_inclusion: client {k}: expected a probability in (0, 1], got {given!r}; "
                "who can never be drawn cannot be made up for by the others"
            )
        inverse.append(number / chance)
        if not math.isfinite(inverse[-1]):
            raise InputValueError(
                f"inverse_inclusion: client {k}: {number:.3g} / {chance:.3g} is beyond float64; "
                "scale the weights and the totals down"
            )
    return inverse


def uniform_cohort(clients: int, uniforms: Sequence[float]) -> tuple[int, ...]:
    """The cohort that these numbers from [0, 1) choose, one client each, without replacement."""
    return tuple(sorted(_chosen(list(range(clients)), uniforms)))


def midzuno_cohort(shares: Sequence[float], uniforms: Sequence[float]) -> tuple[int, ...]:
    """The Midzuno–Sen cohort of these numbers from [0, 1): the first inverts the shares' sums."""
    first = _inverse(shares, uniforms[0])
    rest = [k for k in range(len(shares)) if k != first]
    return tuple(sorted([first, *_chosen(rest, uniforms[1:])]))


def _inverse(shares: Sequence[float], uniform: float) -> int:
    """The first client at whom the cumulative share exceeds the number."""
    reached = 0.0
    for k, share in enumerate(shares):
        reached += share
        if uniform < reached:
            return k
    # The shares' sum may fall short of 1 by rounding: then it is the last who has any.
    return max(k for k, share in enumerate(shares) if share > 0)


def _chosen(left: list[int], uniforms: Sequence[float]) -> list[int]:
    """One of those left for every number, each equally probable."""
    # Below 1 by at least 2⁻⁵³, so that the product never rounds up to the length.
    return [left.pop(int(uniform * len(left))) for uniform in uniforms]


def _uniforms(size: int, generator: Any, what: str) -> list[float]:
    if not isinstance(generator, torch.Generator):
        raise InputTypeError(
            f"{what}: expected a torch.Generator as generator, got {type(generator).__name__}"
        )
    drawn: list[float] = torch.rand(
        size, generator=generator, dtype=torch.float64, device=generator.device
    ).tolist()
    return drawn


def _shares(weights: Any, what: str) -> list[float]:
    """``n_k / Σ n`` of all clients."""
    numbers = _numbers(weights, f"{what}: weights")
    top = max(numbers)
    if top == 0:
        raise InputValueError(f"{what}: expected a weight above 0, got none")
    # Over the largest first, so that 1e308 does not overflow the sum.
    relative = [number / top for number in numbers]
    whole = math.fsum(relative)
    return [number / whole for number in relative]


def _numbers(weights: Any, what: str) -> list[float]:
    """The weights as floats, at least one of them."""
    given = as_list(weights, what)
    if not given:
        raise InputValueError(f"{what}: expected at least one, got none")
    return [as_number(n, f"{what}: client {k}", zero=True) for k, n in enumerate(given)]


def _checked_clients(clients: int, what: str) -> int:
    clients = as_integer(clients, f"{what}: clients", at_least=1)
    if clients > LARGEST_FEDERATION:
        raise InputValueError(
            f"{what}: clients: expected at most {LARGEST_FEDERATION}, got {shown(clients)}"
        )
    return clients


def _checked_size(size: Any, clients: int, what: str) -> int:
    number = as_integer(size, f"{what}: size", at_least=1)
    if number > clients:
        raise InputValueError(
            f"{what}: size: expected at most the number of clients, {clients}, got {number}"
        )
    return number
