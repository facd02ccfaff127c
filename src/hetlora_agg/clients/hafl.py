"""HAFL's client: how much each component matters, which to train, how finely to send them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from hetlora_agg.checks import as_fraction, as_integer, as_list, as_number
from hetlora_agg.clients.reading import as_finite_factors, as_scores, wide
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.types import LowRank


def importance(
    weights: LowRank,
    gradients: LowRank,
    earlier: Tensor | None = None,
    *,
    decay: float = 0.85,
) -> Tensor:
    """How much the loss leans on each component: a moving average of weight times gradient.

    ``I_j = Σ |a_j ∂a_j| + Σ |b_j ∂b_j|``, ``decay · earlier + (1 − decay) · I``; the first is I.

    Args:
        weights: the factors, ``A (*layers, rank, in_features)``, ``B (*layers, out, rank)``.
        gradients: of the loss with respect to them, in the same shapes.
        earlier: what the call after the last step returned; None after the first step.
        decay: share of ``earlier``, in (0, 1].

    Returns:
        ``(*layers, rank)`` in the weights' dtype, float32 for half precision.

    Raises:
        InputTypeError: no factors, or ``earlier`` is no tensor.
        InputValueError: gradients or ``earlier`` of another shape, a decay outside (0, 1].

    Cost: ``2 (out + in) rank`` multiply-adds.

    Example:
        >>> import torch
        >>> weights = LowRank(torch.tensor([[1.0], [2.0]]), torch.ones(1, 2))
        >>> gradients = LowRank(torch.ones(2, 1), torch.tensor([[-1.0, 0.0]]))
        >>> first = importance(weights, gradients)
        >>> first, importance(weights, LowRank(0 * weights.A, 0 * weights.B), first, decay=0.5)
        (tensor([2., 2.]), tensor([1., 1.]))

    Reference: HAFL, Su et al., arXiv:2411.06581, with AdaLoRA's importance, arXiv:2303.10512.

    Fidelity: SECOND.

    Deviations: the average starts at the first value, where AdaLoRA's starts at zero.
    """
    what = "importance"
    weights = as_finite_factors(weights, f"{what}: weights")
    gradients = as_finite_factors(gradients, f"{what}: gradients", like=weights)
    decay = as_fraction(decay, f"{what}: decay")
    with torch.no_grad():
        dtype = wide(weights.A.dtype)
        in_A = (weights.A.to(dtype) * gradients.A.to(dtype)).abs().sum(-1)
        in_B = (weights.B.to(dtype) * gradients.B.to(dtype)).abs().sum(-2)
        now = in_A + in_B
        if earlier is None:
            return now
        if not isinstance(earlier, Tensor):
            raise InputTypeError(
                f"{what}: earlier: expected a tensor or None, got {type(earlier).__name__}"
            )
        if earlier.shape != now.shape:
            raise InputValueError(
                f"{what}: earlier: expected (*layers, rank) = {tuple(now.shape)}, got "
                f"{tuple(earlier.shape)}; start again with None when the rank changes"
            )
        return decay * earlier.to(now) + (1 - decay) * now


def important_slots(scores: Tensor, count: int) -> tuple[int, ...]:
    """The slots to train: those of the highest scores, the others stay frozen.

    Args:
        scores: ``(*layers, rank)``, from `importance`; summed over layers, which have one choice.
        count: how many.

    Returns:
        The slots, ascending; of equal scores the lower slot comes first. They go into
        ``ClientUpdate(slots=)`` with the factors' components of these slots.

    Raises:
        InputTypeError: no floating tensor, a count that is no integer.
        InputValueError: a count below 1 or above the rank, NaN or Inf.

    Cost: one sort.

    Example:
        >>> import torch
        >>> important_slots(torch.tensor([1.0, 5.0, 5.0, 7.0]), 2)
        (1, 3)

    Reference: HAFL, Su et al., arXiv:2411.06581.

    Fidelity: PAPER in words, OURS for ties and for the sum over layers.

    Deviations: none known.
    """
    what = "important_slots"
    order = _ranking(scores, what)
    count = as_integer(count, f"{what}: count", at_least=1)
    if count > len(order):
        raise InputValueError(
            f"{what}: count: expected at most the {len(order)} slots that have a score, got {count}"
        )
    return tuple(sorted(order[:count]))


def allot_bits(
    scores: Tensor, budget: float, choices: Sequence[int] = (2, 4, 8)
) -> tuple[int, ...]:
    """How many bits each component is sent with: more for the more important.

    Every component has the smallest choice. Then, from the most important to the least, each takes
    the largest choice that leaves the sum at most ``budget · rank``, those after it at the
    smallest. So a component never has fewer bits than a less important one.

    Args:
        scores: ``(*layers, rank)``, from `importance`; summed over layers, which share the bits.
        budget: mean bits per entry at most, read as the decimal it is written as.
        choices: allowed bits, each 1 to 16.

    Returns:
        One number of bits per component, in the order of the slots; of equal scores the lower slot
        is served first.

    Raises:
        InputTypeError: no floating tensor, choices that are no integers, a budget that is none.
        InputValueError: a budget below the smallest choice, no choices, NaN or Inf.

    Cost: one sort.

    Example:
        >>> import torch
        >>> allot_bits(torch.tensor([1.0, 9.0, 5.0, 0.0]), budget=4)  # 8 + 4 + 2 + 2 = 4 · 4
        (2, 8, 4, 2)

    Reference: HAFLQ, Su et al., arXiv:2411.06581.

    Fidelity: OURS; the paper gives more bits to the more important.

    Deviations: none known.
    """
    what = "allot_bits"
    order = _ranking(scores, what)
    budget = as_number(budget, f"{what}: budget", zero=False)
    allowed = sorted({as_bits(b, f"{what}: choices") for b in as_list(choices, f"{what}: choices")})
    if not allowed or budget < allowed[0]:
        raise InputValueError(
            f"{what}: budget: expected at least the smallest of choices {allowed}, got {budget}; "
            "raise the budget or allow fewer bits"
        )
    # Whole bits beyond the smallest choice; 2.28 · 25 is 57 as a decimal, 56.99… in binary.
    left = math.floor(Fraction(str(budget)) * len(order)) - allowed[0] * len(order)
    bits = [allowed[0]] * len(order)
    for slot in order:
        bits[slot] = max(b for b in allowed if b - allowed[0] <= left)
        left -= bits[slot] - allowed[0]
    return tuple(bits)


def as_bits(value: object, what: str) -> int:
    """A number of bits per entry."""
    bits = as_integer(value, what, at_least=1)
    if bits > 16:
        raise InputValueError(f"{what}: expected 1 to 16 bits, got {bits}")
    return bits


def _ranking(scores: Tensor, what: str) -> list[int]:
    """The slots from the most important to the least, of equal ones the lower first."""
    scores = as_scores(scores, what)
    summed = scores.detach().double().reshape(-1, scores.shape[-1]).sum(0)
    order: list[int] = summed.argsort(descending=True, stable=True).tolist()
    return order
