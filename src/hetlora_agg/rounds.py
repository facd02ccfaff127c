"""``align_rounds``: this round's factors written as much like last round's as may be."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hetlora_agg.checks import as_state, check_choice
from hetlora_agg.errors import InputTypeError, OptionValueError
from hetlora_agg.linalg import exact_arithmetic, nearest_isometry
from hetlora_agg.types import BOTH, AggregationResult, LowRank


def align_rounds(
    result: AggregationResult, previous: LowRank | AggregationResult, by: str = "rotation"
) -> AggregationResult:
    """Rewrites a result's factors to be as near to last round's as its product allows.

    ``(B Q, Qᵀ A)`` with the orthogonal Q that minimises ``‖B Q − B_prev‖² + ‖Qᵀ A − A_prev‖²``,
    ``Q = U Vᵀ`` from ``BᵀB_prev + A A_prevᵀ = U S Vᵀ``; or with a diagonal Q of signs. An
    optimiser that keeps its moments between rounds then finds its coordinates where they were.

    Args:
        result: one layer's, from `aggregate` or `aggregate_layers`; torch tensors.
        previous: last round's factors, or the result they came from; of any rank, cut or padded
            with zeros to this one's.
        by: "rotation", any orthogonal Q, for methods that do not live on slots: the leading
            components then mean nothing by themselves, ``nested`` is given up. "signs": order and
            nesting stay.

    Returns:
        The same result in other factors; product unchanged up to rounding.

    Raises:
        InputTypeError: ``result`` is none, or ``previous`` is no factors.
        InputValueError: ``previous`` of another shape, another ``by``; or a rotation of a result
            whose slots the next round depends on (``result.slotted``); a result of which clients
            take one factor only (``result.shared``).

    Cost: ``2 (out + in) r²`` multiply-adds and one SVD of size r.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import LowRank, aggregate
        >>> result = aggregate([(ones(1, 2), ones(2, 1))], "flexlora")
        >>> last = LowRank(-result.A, -result.B)
        >>> bool((align_rounds(result, last).A == last.A).all())
        True

    Reference: FLoRG, arXiv:2602.17095, for the orthogonal Procrustes problem between rounds.

    Fidelity: SECOND for the idea, OURS for both factors at once.

    Deviations: none known.
    """
    if not isinstance(result, AggregationResult):
        raise InputTypeError(
            f"align_rounds: expected an AggregationResult, got {type(result).__name__}; a model "
            "goes layer by layer"
        )
    check_choice("by", by, ("rotation", "signs"))
    if by == "rotation" and result.slotted:
        raise OptionValueError(
            "by='rotation': the next round averages slot by slot, and a rotation changes what a "
            "slot means; use by='signs'"
        )
    if result.shared != BOTH:
        raise OptionValueError(
            "align_rounds: one factor of this result stays with the clients (result.shared = "
            f"{sorted(result.shared)}), and would no longer fit the other; hand it out as it is"
        )
    now = result.factors.torch()
    last = as_state(previous, "previous=", now.dense_shape, "as the result has")
    with exact_arithmetic(now.A.device.type):
        A, B = now.A.double(), now.B.double()
        A_last, B_last = (_fitted(X.to(A), now.rank) for X in (last.A, last.B.mT))
        if by == "signs":
            agreement = (B.mT * B_last).sum(-1) + (A * A_last).sum(-1)
            sign = torch.where(agreement < 0, -1.0, 1.0).to(now.A)
            turned = LowRank(sign.unsqueeze(-1) * now.A, sign.unsqueeze(-2) * now.B)
        else:
            Q, _ = nearest_isometry(B.mT @ B_last.mT + A @ A_last.mT)
            turned = LowRank((Q.mT @ A).to(now.A), (B @ Q).to(now.B))
    if not isinstance(result.A, Tensor):
        turned = turned.numpy()
    nested = result.nested and by == "signs"
    S = result.singular_values if nested else None
    return replace(result, factors=turned, nested=nested, singular_values=S)


def _fitted(X: Tensor, rank: int) -> Tensor:
    """The leading rows of ``X (*layers, r, n)``, with rows of zeros if there are too few."""
    missing = max(0, rank - X.shape[-2])
    return torch.nn.functional.pad(X[..., :rank, :], (0, 0, 0, missing))
