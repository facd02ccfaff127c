"""``distribute``: a global factorization back to every client's rank and scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hetlora_agg.checks import as_integer, as_list, as_number
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.linalg import all_finite
from hetlora_agg.types import EXPONENTS, AggregationResult, LowRank


def distribute(
    result: AggregationResult,
    ranks: Sequence[int],
    scalings: Sequence[float] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> list[LowRank]:
    """Gives every client the leading components at its rank, its own scaling divided out.

    Client k's effective update ``scalings[k] * B @ A`` is then the global one cut to its rank; a
    factor that takes no scaling (``result.next_unscaled``) is handed out as it is. An
    empty slot, above the global rank or zero in both factors, is filled as PEFT initialises: a
    random row in A, a zero column in B, so that it adds nothing yet and still receives a gradient.
    Slot j is filled alike for all clients, so that they start from one A. The residual, if any, is
    the server's to fold into the base weight.

    Args:
        result: from `aggregate` or one layer of `aggregate_layers`.
        ranks: every client's rank.
        scalings: every client's ``lora_alpha / r``; None means 1 for all.
        generator: for the random rows; None is a fresh one with seed 0 in every call, so that the
            same slot of equal layers is filled alike in every round.

    Returns:
        One `LowRank` per client, copies in the result's dtype and on its device:
        ``A (*layers, rank, in_features)``, ``B (*layers, out_features, rank)``.

    Raises:
        InputTypeError: ``result`` is none, or a rank is no integer.
        InputValueError: a rank below 1, a scaling that is not finite and > 0, lists of different
            length, or a rank below that of a result whose leading components mean nothing.

    Cost: one copy of what is handed out.

    Example:
        >>> from hetlora_agg import aggregate
        >>> result = aggregate([(torch.eye(2), torch.eye(2))], "rb")
        >>> [client.rank for client in distribute(result, [1, 2], scalings=[2.0, 1.0])]
        [1, 2]
    """
    if not isinstance(result, AggregationResult):
        raise InputTypeError(
            f"distribute: expected an AggregationResult, got {type(result).__name__}; a model "
            "goes layer by layer: {name: distribute(r, ranks) for name, r in results.items()}"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputTypeError(
            f"distribute: expected a torch.Generator as generator, got {type(generator).__name__}"
        )
    ranks = [
        as_integer(rank, f"distribute: client {k}: rank", at_least=1)
        for k, rank in enumerate(as_list(ranks, "distribute: ranks"))
    ]
    given = [1.0] * len(ranks) if scalings is None else as_list(scalings, "distribute: scalings")
    if len(given) != len(ranks):
        raise InputValueError(
            f"distribute: expected one scaling per client, got {len(given)} for {len(ranks)}"
        )
    divisors = [
        as_number(scaling, f"distribute: client {k}: scaling", zero=False)
        for k, scaling in enumerate(given)
    ]
    short = [k for k, rank in enumerate(ranks) if rank < result.rank]
    if short and not result.nested:
        raise InputValueError(
            f"distribute: client {short[0]} asks for rank {ranks[short[0]]} of a result of rank "
            f"{result.rank} whose leading components are not an answer; {_remedy(result)}"
        )
    factors = result.factors.torch()
    rank = max(ranks, default=1)
    wide, carries = _filled(factors, rank, generator)
    handed = [
        _cut(wide, carries, k, rank, scaling, result.next_unscaled)
        for k, (rank, scaling) in enumerate(zip(ranks, divisors, strict=True))
    ]
    return handed if isinstance(result.A, Tensor) else [low_rank.numpy() for low_rank in handed]


def _remedy(result: AggregationResult) -> str:
    """What to do with a result that cannot be sliced."""
    if result.slotted:
        return (
            "its slots are of equal standing: hand out a choice of them with "
            "clients.select_and_fold, or give every client all of them"
        )
    return (
        "fold result.total() into the base weight and restart the clients "
        "(clients.merge_and_restart), or aggregate with a nested method such as 'flexlora'"
    )


def _filled(
    factors: LowRank, rank: int, generator: torch.Generator | None
) -> tuple[LowRank, Tensor]:
    """The leading slots, empty ones with a random row, and which of them carry an update."""
    A, B = factors.A[..., :rank, :], factors.B[..., :rank]
    extra = rank - factors.rank
    if extra > 0:
        A = torch.cat([A, A.new_zeros((*factors.layers, extra, factors.in_features))], dim=-2)
        B = torch.cat([B, B.new_zeros((*factors.layers, factors.out_features, extra))], dim=-1)
    carries = (A != 0).any(-1) | (B != 0).any(-2)
    if bool(carries.all()):
        return LowRank(A, B), carries
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    # Slot by slot, so that a slot's row does not depend on how many more are drawn.
    rows = [
        torch.rand(
            (*factors.layers, 1, factors.in_features),
            generator=generator,
            dtype=torch.float64,
            device=generator.device,
        )
        for _ in range(rank)
    ]
    # PEFT's initial A: uniform within ±1/√in_features.
    fresh = (2 * torch.cat(rows, dim=-2) - 1) / math.sqrt(factors.in_features)
    return LowRank(torch.where(carries.unsqueeze(-1), A, fresh.to(A)), B), carries


def _cut(
    wide: LowRank, carries: Tensor, k: int, rank: int, scaling: float, unscaled: str | None
) -> LowRank:
    """The leading components, scaling divided out of those that carry an update."""
    # Division in float64: the root of a scaling may lie outside the dtype.
    from_A, from_B = (
        torch.where(
            carries[..., :rank],
            torch.tensor(scaling**exponent, dtype=torch.float64, device=wide.A.device),
            1.0,
        )
        for exponent in EXPONENTS[unscaled]
    )
    A = (wide.A[..., :rank, :] / from_A.unsqueeze(-1)).to(wide.A.dtype)
    B = (wide.B[..., :rank] / from_B.unsqueeze(-2)).to(wide.B.dtype)
    if not all_finite(A, B):
        raise InputValueError(
            f"distribute: client {k}: its scaling of {scaling:.3g} takes the factors beyond "
            f"{wide.A.dtype}; distribute in a wider dtype"
        )
    return LowRank(A, B)
