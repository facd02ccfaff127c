"""Go on with one's own factor under a global other one."""

from __future__ import annotations

import torch

from hetlora_agg.checks import as_number
from hetlora_agg.clients.reading import as_factors, as_result
from hetlora_agg.distribute import distribute
from hetlora_agg.errors import InputValueError
from hetlora_agg.linalg import all_finite
from hetlora_agg.types import EXPONENTS, AggregationResult, LowRank


def continue_from(result: AggregationResult, own: LowRank, *, scaling: float = 1.0) -> LowRank:
    """Replaces the client's factors that the method shares by the global ones at its rank.

    ``A ← A_g[:r]`` if ``"A" in result.shared``, ``B ← B_g[:, :r]`` if ``"B" in result.shared``;
    the scaling is divided out of them as `distribute` does, the other factor stays. Where clients
    train A and B in turns the scaling changes places with them, so that ``scaling * B @ A`` stays
    the global update.

    Args:
        result: the round's, from `aggregate` or one layer of `aggregate_layers`.
        own: what the client trained, ``A (*layers, rank, in_features)``,
            ``B (*layers, out_features, rank)``, leading slots.
        scaling: the client's ``lora_alpha / rank``.

    Returns:
        New factors at the client's rank, in its dtype and on its device.

    Raises:
        InputTypeError: no result, or no factors.
        InputValueError: layers of another size, a result that is not nested or of a smaller rank
            than the client's, a scaling that is not finite and > 0, factors beyond the dtype.

    Cost: one copy of the client's factors.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> one = LowRank(torch.ones(1, 2), torch.ones(2, 1))
        >>> other = LowRank(3 * torch.ones(1, 2), torch.ones(2, 1))
        >>> result = aggregate([(one.A, one.B), (other.A, other.B)], "fedsa")
        >>> continue_from(result, one).A, continue_from(result, one).B.equal(one.B)
        (tensor([[2., 2.]]), True)

    Reference: FedSA-LoRA, arXiv:2410.01463; FFA-LoRA, arXiv:2403.12313; RoLoRA, arXiv:2409.02346.

    Fidelity: PAPER for equal ranks, OURS for mixed ranks and scalings.

    Deviations: none known.
    """
    what = "continue_from"
    result = as_result(result, f"{what}: result")
    own = as_factors(own, f"{what}: own")
    scaling = as_number(scaling, f"{what}: scaling", zero=False)
    if own.dense_shape != result.factors.dense_shape:
        raise InputValueError(
            f"{what}: expected own factors of (*layers, out_features, in_features) = "
            f"{result.factors.dense_shape} as the result has, got {own.dense_shape}; pass the "
            "result of this layer"
        )
    if not result.nested:
        raise InputValueError(
            f"{what}: expected a result whose leading slots are the client's, got one that is not "
            "nested; use select_and_fold or merge_and_restart"
        )
    if own.rank > result.rank:
        raise InputValueError(
            f"{what}: expected a result of at least the client's rank {own.rank}, got rank "
            f"{result.rank}; aggregate a client of that rank, or start this one with distribute"
        )
    with torch.no_grad():
        (handed,) = distribute(result, [own.rank], [scaling])
        handed = handed.to(own.A)
        if not all_finite(handed.A, handed.B):
            raise InputValueError(
                f"{what}: the global factors are beyond {own.A.dtype}, the client's dtype; hold "
                "its factors in a wider one"
            )
        taken, left = EXPONENTS[result.unscaled], EXPONENTS[result.next_unscaled]
        # What goes into a factor at the door and comes out of it at the hand-out: 1 as a rule.
        into_A, into_B = (scaling ** (i - o) for i, o in zip(taken, left, strict=True))
        A = handed.A if "A" in result.shared else (into_A * own.A.detach().double()).to(own.A)
        B = handed.B if "B" in result.shared else (into_B * own.B.detach().double()).to(own.B)
    return LowRank(A, B)
