"""``distribute``: a global factorization back to every client's rank and scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hetlora_agg.checks import as_integer, as_list, as_number, check_choice
from hetlora_agg.errors import InputTypeError, InputValueError, OptionValueError, shown
from hetlora_agg.linalg import SPLITS, all_finite, exact_arithmetic, leading_svd
from hetlora_agg.reduction import REDUCTIONS, Offset, as_offsets, drawn, stratified
from hetlora_agg.types import BOTH, EXPONENTS, AggregationResult, LowRank

Filled = tuple[LowRank, Tensor]
"""Slots, empty ones with a random row, and which of them carry an update."""

LARGEST_RANK = 1 << 16
"""No layer of a model has more features; above it, and above the result's, a rank is a mistake."""


def distribute(
    result: AggregationResult,
    ranks: Sequence[int],
    scalings: Sequence[float] | None = None,
    *,
    generator: torch.Generator | None = None,
    reduction: str = "truncate",
    u: Offset | None = None,
) -> list[LowRank]:
    """Gives every client the leading components at its rank, its own scaling divided out.

    Client k's effective update ``scalings[k] * B @ A`` is then the global one cut to its rank; a
    factor that takes no scaling (``result.next_unscaled``) is handed out as it is. An
    empty slot, above the global rank or zero in both factors, is filled as PEFT initialises: a
    random row in A, a zero column in B, so that it adds nothing yet and still receives a gradient.
    Slot j is filled alike for all clients, so that they start from one A. The residual, if any, is
    the server's to fold into the base weight.

    With ``reduction="unbiased"`` every client gets a draw of its own, see `unbiased_truncate`:
    each is the whole result in expectation, and their mean is far nearer to it than any one of
    them. Client number j of the n of equal rank starts at ``(u + j/n) mod 1``: among equal ranks
    the offsets are spread evenly, other ranks begin at the same u.

    Args:
        result: from `aggregate` or one layer of `aggregate_layers`.
        ranks: every client's rank.
        scalings: every client's ``lora_alpha / r``; None means 1 for all.
        generator: for the random rows; None is a fresh one with seed 0 in every call, so that the
            same slot of equal layers is filled alike in every round. With ``reduction="unbiased"``
            and no ``u`` it draws u first, one per layer, and must be given.
        reduction: "truncate", or "unbiased", which needs a result from which nothing was cut
            (``rank="full"``) and of which no slot has a meaning of its own.
        u: uniform on [0, 1), drawn anew every round, for "unbiased" only: a number, or one per
            layer ``(*layers,)``.

    Returns:
        One `LowRank` per client, copies in the result's dtype and on its device:
        ``A (*layers, rank, in_features)``, ``B (*layers, out_features, rank)``.

    Raises:
        InputTypeError: ``result`` is none, or a rank is no integer.
        InputValueError: a rank below 1, or above 65536 and the result's; a scaling that is not
            finite and > 0, lists of different length, or a rank below that of a result whose
            leading components mean nothing; a reduction or u that is none, or a draw from a result
            that was cut (``certificate.tail`` above 0), lives on slots or shares one factor only.

    Cost: one copy of what is handed out; for draws also one factored SVD.

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
    _check_ranks(ranks, result)
    given = [1.0] * len(ranks) if scalings is None else as_list(scalings, "distribute: scalings")
    if len(given) != len(ranks):
        raise InputValueError(
            f"distribute: expected one scaling per client, got {len(given)} for {len(ranks)}"
        )
    divisors = [
        as_number(scaling, f"distribute: client {k}: scaling", zero=False)
        for k, scaling in enumerate(given)
    ]
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "unbiased":
        filled = _draws(result, ranks, u, generator)
    else:
        filled = _slices(result, ranks, u, generator)
    handed = [
        _cut(*slots, k, rank, scaling, result.next_unscaled)
        for k, (slots, rank, scaling) in enumerate(zip(filled, ranks, divisors, strict=True))
    ]
    return handed if isinstance(result.A, Tensor) else [low_rank.numpy() for low_rank in handed]


def _check_ranks(ranks: Sequence[int], result: AggregationResult) -> None:
    """A mistyped rank would cost memory for all its empty slots."""
    most = max(result.rank, LARGEST_RANK)
    for k, rank in enumerate(ranks):
        if rank > most:
            raise InputValueError(
                f"distribute: client {k}: rank: expected at most {most}, got {shown(rank)}"
            )


def _slices(
    result: AggregationResult,
    ranks: list[int],
    u: Offset | None,
    generator: torch.Generator | None,
) -> list[Filled]:
    """The leading slots, the same for every client."""
    if u is not None:
        raise OptionValueError("u=: expected None where nothing is drawn; use reduction='unbiased'")
    short = [k for k, rank in enumerate(ranks) if rank < result.rank]
    if short and not result.nested:
        raise InputValueError(
            f"distribute: client {short[0]} asks for rank {ranks[short[0]]} of a result of rank "
            f"{result.rank} whose leading components are not an answer; {_remedy(result)}"
        )
    leading = _padded(result.factors.torch(), max(ranks, default=1))
    return _filled([leading], leading.layers, generator) * len(ranks)


def _draws(
    result: AggregationResult,
    ranks: list[int],
    u: Offset | None,
    generator: torch.Generator | None,
) -> list[Filled]:
    """A draw of its own for every client, those of equal rank in one batch."""
    _check_drawable(result)
    factors = result.factors.torch()
    if u is None and generator is not None:
        u = torch.rand(
            factors.layers, generator=generator, dtype=torch.float64, device=generator.device
        )
    offsets = stratified(as_offsets(u, factors.layers, factors.A.device), ranks)
    groups = [[k for k, own in enumerate(ranks) if own == rank] for rank in sorted(set(ranks))]
    batches = []
    with exact_arithmetic(factors.A.device.type):
        svd = leading_svd(factors.B, factors.A)
        for members in groups:
            rank = ranks[members[0]]
            some = drawn(svd, rank, torch.stack([offsets[k] for k in members]))
            B, A = (X.to(factors.A) for X in SPLITS["balanced"](some.U, some.S, some.Vh))
            batches.append(_padded(LowRank(A, B), rank))
    own: dict[int, Filled] = {}
    for members, (batch, carries) in zip(
        groups, _filled(batches, factors.layers, generator), strict=True
    ):
        for i, k in enumerate(members):
            own[k] = LowRank(batch.A[i], batch.B[i]), carries[i]
    return [own[k] for k in range(len(ranks))]


def _check_drawable(result: AggregationResult) -> None:
    """Refuse results of which an unbiased draw would not be what its name says."""
    found = "distribute: reduction='unbiased'"
    if result.certificate is not None and bool((result.certificate.tail > 0).any()):
        raise InputValueError(
            f"{found}: expected a result from which nothing was cut, got one of rank {result.rank} "
            "with a discarded tail (certificate.tail), whose draws would be unbiased for the rest "
            "only; aggregate with rank='full'"
        )
    if result.slotted:
        raise InputValueError(
            f"{found}: expected a result without slots, got one of a method that averages slot by "
            "slot, and a draw puts other components into a client's slots; aggregate with such as "
            "'flexlora', or distribute with reduction='truncate'"
        )
    if result.shared != BOTH:
        raise InputValueError(
            f"{found}: expected a result that shares both factors, got shared = "
            f"{sorted(result.shared)}: the other factor stays with the clients and would no longer "
            "fit; distribute with reduction='truncate'"
        )


def _remedy(result: AggregationResult) -> str:
    """What to do with a result that cannot be sliced."""
    if result.slotted:
        return (
            "its slots are of equal standing: hand out a choice of them with "
            "clients.select_and_fold, or give every client all of them"
        )
    if result.certificate is not None and bool(torch.as_tensor(result.certificate.tail > 0).any()):
        return (
            "it was drawn at its rank: give every client all of it, or aggregate with rank='full' "
            "and draw for every client here, with reduction='unbiased'"
        )
    return (
        "fold result.total() into the base weight and restart the clients "
        "(clients.merge_and_restart), aggregate with a nested method such as 'flexlora', or give "
        "every client a draw of the whole with reduction='unbiased'"
    )


def _padded(factors: LowRank, rank: int) -> LowRank:
    """The leading slots, zeros where there are none."""
    A, B = factors.A[..., :rank, :], factors.B[..., :rank]
    extra = rank - factors.rank
    if extra > 0:
        A = torch.cat([A, A.new_zeros((*factors.layers, extra, factors.in_features))], dim=-2)
        B = torch.cat([B, B.new_zeros((*factors.layers, factors.out_features, extra))], dim=-1)
    return LowRank(A, B)


def _filled(
    batches: list[LowRank], layers: tuple[int, ...], generator: torch.Generator | None
) -> list[Filled]:
    """Empty slots with a random row, slot j with the same one in every batch ``(…, *layers)``."""
    carries = [(batch.A != 0).any(-1) | (batch.B != 0).any(-2) for batch in batches]
    if all(bool(own.all()) for own in carries):
        return list(zip(batches, carries, strict=True))
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    in_features = batches[0].in_features
    # Slot by slot, so that a slot's row does not depend on how many more are drawn.
    rows = [
        torch.rand(
            (*layers, 1, in_features),
            generator=generator,
            dtype=torch.float64,
            device=generator.device,
        )
        for _ in range(max(batch.rank for batch in batches))
    ]
    # PEFT's initial A: uniform within ±1/√in_features.
    fresh = (2 * torch.cat(rows, dim=-2) - 1) / math.sqrt(in_features)
    filled = []
    for batch, own in zip(batches, carries, strict=True):
        A = torch.where(own.unsqueeze(-1), batch.A, fresh[..., : batch.rank, :].to(batch.A))
        filled.append((LowRank(A, batch.B), own))
    return filled


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
