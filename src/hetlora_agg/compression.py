"""Compress: the best low-rank approximation of a low-rank matrix, without its dense form."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from hetlora_agg.checks import as_fraction, as_integer, check_choice
from hetlora_agg.errors import OptionValueError
from hetlora_agg.linalg import SPLITS, SVD, leading_svd
from hetlora_agg.reduction import REDUCTIONS, Offset, as_offsets, drawn
from hetlora_agg.types import Compressed, LowRank

Rank = int | Literal["full"] | None
"""Wanted rank: an integer, "full" for no truncation, None for the method's default."""


def compress(
    low_rank: LowRank,
    rank: Rank = "full",
    *,
    default: int | None = None,
    energy: float | None = None,
    split: str = "balanced",
    driver: str = "auto",
    reduction: str = "truncate",
    u: Offset | None = None,
) -> Compressed:
    """The leading components of the SVD of ``B @ A``, ordered, so that every prefix is the best.

    With ``reduction="unbiased"`` a draw of the rank whose expectation is ``B @ A``, see
    `reduction.unbiased_truncate`: its prefixes are no answer, and its certificate's ``tail`` is the
    distance of this draw from ``B @ A``, not the least of that rank.

    Args:
        low_rank: any factors, ``(*layers, R, in_features)`` and ``(*layers, out_features, R)``.
        rank: an integer is capped at ``min(R, out_features, in_features)``; "full" keeps all.
        default: rank to use for ``rank=None``; with ``energy=`` None means no cap.
        energy: τ in (0, 1]: per layer the smallest rank r >= 1 with ``Σ_{i≤r} σ² ≥ τ Σ σ²``,
            capped by ``rank``. Layers of a batch are cut at their own rank: zeros follow.
        split: "balanced" ``B = U√S, A = √S Vᵀ``; "left" ``B = U S``; "right" ``A = S Vᵀ``.
        driver: see `linalg.svd_product`.
        reduction: "truncate", or "unbiased", which needs a rank and ``u=``.
        u: uniform on [0, 1), for "unbiased" only: a number, or one per layer ``(*layers,)``.

    Returns:
        A `Compressed`: the factors, their singular values ``(*layers, r)`` float64, a certificate
        of the error and, by ``energy``, every layer's own rank.

    Raises:
        InputTypeError: a rank or a u that is no number.
        InputValueError: a rank, energy, split, reduction or u that is none, or those together that
            exclude each other.
        ConvergenceError: no driver took the SVD.

    Cost: one factored SVD of R components, see `linalg.svd_product`.

    Example:
        >>> import torch
        >>> wide = LowRank(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3))
        >>> compress(wide, energy=0.9).singular_values.tolist()
        [3.0, 2.0]

    Reference: Eckart and Young 1936; ``energy=`` is FLoRIST's rule, arXiv:2506.09199; the draw is
    arXiv:2505.09647.

    Fidelity: PAPER for the rule of ``energy=``, OURS for the draw.
    """
    check_choice("split", split, sorted(SPLITS))
    check_choice("reduction", reduction, REDUCTIONS)
    cap = _cap(rank, default, energy)
    if reduction == "unbiased":
        svd = _one_draw(low_rank, cap, energy, u, driver)
    elif u is not None:
        raise OptionValueError("u=: expected None where nothing is drawn; use reduction='unbiased'")
    else:
        svd = leading_svd(low_rank.B, low_rank.A, cap, driver)
    B, A = (factor.to(svd.U.dtype) for factor in SPLITS[split](svd.U, svd.S, svd.Vh))
    whole = Compressed(A, B, singular_values=svd.S, ranks=None, certificate=svd.certificate)
    return whole if energy is None else _cut(whole, _ranks_for(whole, energy))


def _one_draw(
    low_rank: LowRank, rank: int | None, energy: float | None, u: Offset | None, driver: str
) -> SVD:
    """The triplets of one unbiased draw."""
    if energy is not None:
        raise OptionValueError(
            "energy=: expected None by reduction='unbiased', whose draws all have one rank; give "
            "rank= instead"
        )
    if rank is None:
        raise OptionValueError(
            "rank=: expected an integer by reduction='unbiased', got none, so that nothing is "
            "left to draw; give one, or use reduction='truncate'"
        )
    offset = as_offsets(u, low_rank.layers, low_rank.A.device)
    return drawn(leading_svd(low_rank.B, low_rank.A, None, driver), rank, offset)


def truncate(low_rank: LowRank, rank: int) -> LowRank:
    """The leading components; the best of that rank if they come from `compress`."""
    return low_rank.select(slice(rank))


def divide(
    whole: Compressed, rank: Rank, *, default: int, energy: float | None = None
) -> tuple[Compressed, LowRank]:
    """A full SVD in two: the components that `compress` would keep, and all the others.

    Together they are the whole, exactly.
    """
    cap = _cap(rank, default, energy) or whole.rank
    if energy is None:
        ranks = torch.full(whole.layers, min(cap, whole.rank), device=whole.B.device)
    else:
        ranks = _ranks_for(whole, energy).clamp_max(cap)
    first = int(ranks.min())
    behind = torch.arange(first, whole.rank, device=ranks.device) >= ranks.unsqueeze(-1)
    rest = whole.select(slice(first, None))
    kept = _cut(whole, ranks)
    if energy is None:
        kept = replace(kept, ranks=None)
    return kept, LowRank(rest.A, rest.B * behind.unsqueeze(-2))


def _cap(rank: Rank, default: int | None, energy: float | None) -> int | None:
    """The rank to solve for; None is no truncation."""
    if energy is not None:
        as_fraction(energy, "energy=")
    return as_rank(rank, default=default if energy is None else None)


def as_rank(rank: Rank, *, default: int | None) -> int | None:
    """The rank as an integer, or None for no truncation."""
    if rank is None:
        return default
    if isinstance(rank, str):
        if rank != "full":
            raise OptionValueError(f"rank=: expected an integer, 'full' or None, got {rank!r}")
        return None
    return as_integer(rank, "rank=", at_least=1)


def _ranks_for(whole: Compressed, energy: float) -> Tensor:
    """Smallest rank per layer whose squared singular values reach the share ``energy``."""
    # Relative to σ_1: nothing depends on the unit, and no square leaves float64. Summed from the
    # small end: what lies beyond each rank, before the large squares could absorb it.
    S = whole.singular_values
    top = torch.where(S[..., :1] > 0, S[..., :1], 1.0)
    squares = (S / top).square()
    beyond = (whole.certificate.tail / top.squeeze(-1)).square().unsqueeze(-1)
    left_out = squares.flip(-1).cumsum(-1).flip(-1) + beyond
    allowed = (1 - float(energy)) * left_out[..., :1]
    # A tie, up to the rounding of a few operations, counts as reached.
    slack = 1 + 8 * torch.finfo(torch.float64).eps
    return (left_out[..., 1:] > slack * allowed).sum(-1) + 1


def _cut(whole: Compressed, ranks: Tensor) -> Compressed:
    """Each layer cut at its own rank: sliced at the widest, zeros beyond a layer's own."""
    width = int(ranks.max())
    kept = torch.arange(whole.rank, device=ranks.device) < ranks.unsqueeze(-1)
    S = whole.singular_values * kept
    gone = torch.where(kept, 0.0, whole.singular_values)
    return Compressed(
        A=whole.A[..., :width, :],
        B=(whole.B * kept.unsqueeze(-2))[..., :width],
        singular_values=S[..., :width],
        ranks=ranks,
        certificate=replace(
            whole.certificate,
            tail=_hypot(whole.certificate.tail, gone),
            kept=torch.minimum(whole.certificate.kept, ranks),
        ),
    )


def _hypot(tail: Tensor, gone: Tensor) -> Tensor:
    """Norm of ``tail (*layers,)`` and ``gone (*layers, r)`` together, in range throughout."""
    top = gone.amax(-1)
    relative = gone / torch.where(top > 0, top, 1.0).unsqueeze(-1)
    return torch.hypot(tail, top * relative.square().sum(-1).sqrt())
