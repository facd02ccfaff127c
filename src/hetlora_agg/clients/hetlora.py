"""Rank self-pruning: a penalised tail, and a smaller rank where it faded."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from hetlora_agg.checks import as_fraction, as_integer
from hetlora_agg.clients.reading import as_factors, as_finite_factors
from hetlora_agg.errors import InputValueError
from hetlora_agg.linalg import norms
from hetlora_agg.types import LowRank


def tail_penalty(adapter: LowRank, keep: int) -> Tensor:
    """The size of the components a client may soon do without, to be added to its loss.

    ``‖B[:, keep:]‖_F · ‖A[keep:, :]‖_F``, summed over layers.

    Args:
        adapter: what is trained, ``A (*layers, rank, in_features)``,
            ``B (*layers, out_features, rank)``; gradients flow into both.
        keep: how many leading components are not penalised; `prune` would keep
            ``floor(decay · rank)``.

    Returns:
        A scalar in the adapter's dtype, float32 for half precision. Its gradient is finite
        everywhere: where a tail is exactly zero the norm counts as flat.

    Raises:
        InputTypeError: no factors, or ``keep`` is no integer.
        InputValueError: ``keep`` below 0 or above the rank.

    Cost: ``(out + in)(rank − keep)`` multiply-adds.

    Example:
        >>> import torch
        >>> tail_penalty(LowRank(torch.ones(2, 4), 3 * torch.ones(4, 2)), keep=1)  # 6 · 2
        tensor(12.)

    Reference: HetLoRA, Cho, Liu, Xu, Fahrezi, Joshi, EMNLP 2024, arXiv:2401.06432.

    Fidelity: SECOND for one layer, OURS for the sum over layers.

    Deviations: the factor λ in front is the caller's.
    """
    what = "tail_penalty"
    adapter = as_factors(adapter, f"{what}: adapter")
    keep = as_integer(keep, f"{what}: keep", at_least=0)
    if keep > adapter.rank:
        raise InputValueError(
            f"{what}: keep: expected at most the adapter's rank {adapter.rank}, got {keep}"
        )
    dtype = torch.promote_types(torch.promote_types(adapter.A.dtype, adapter.B.dtype), torch.float)
    return _tail(adapter, keep).to(dtype)


def prune(trained: LowRank, received: LowRank, *, decay: float = 0.99, min_rank: int = 1) -> int:
    """The client's rank for the next round: smaller if training shrank its tail.

    ``keep = max(min_rank, floor(decay · r))`` if the product ``‖B[:, keep:]‖ ‖A[keep:]‖`` of the
    trained factors is below that of the received ones, else r.

    Args:
        trained: after local training, ``A (*layers, rank, in_features)``,
            ``B (*layers, out_features, rank)``.
        received: what it started from, in the same shapes.
        decay: γ in (0, 1], read as the decimal it is written as. Note that ``floor(0.99 r)`` drops
            one slot at every r < 100.
        min_rank: no client goes below.

    Returns:
        The rank to keep. The trained factors at it are ``trained.select(slice(rank))``.

    Raises:
        InputTypeError: no factors, or ``min_rank`` is no integer.
        InputValueError: factors of different shapes, NaN or Inf, a decay outside (0, 1], a
            ``min_rank`` below 1.

    Cost: ``2 (out + in)(r − keep)`` multiply-adds.

    Example:
        >>> import torch
        >>> received = LowRank(torch.ones(4, 2), torch.ones(2, 4))
        >>> trained = LowRank(torch.ones(4, 2), torch.tensor([1.0, 1.0, 1.0, 0.5]).expand(2, 4))
        >>> prune(trained, received), prune(received, received)
        (3, 4)

    Reference: HetLoRA, Cho, Liu, Xu, Fahrezi, Joshi, EMNLP 2024, arXiv:2401.06432.

    Fidelity: SECOND for one layer, OURS for the sum over layers.

    Deviations: a tail that was zero when received, as in a fresh adapter, is never dropped.
    """
    what = "prune"
    trained = as_finite_factors(trained, f"{what}: trained")
    received = as_finite_factors(received, f"{what}: received", like=trained)
    decay = as_fraction(decay, f"{what}: decay")
    min_rank = as_integer(min_rank, f"{what}: min_rank", at_least=1)
    # 0.29 · 100 is 28.999… in floating point.
    keep = max(min_rank, math.floor(Fraction(str(decay)) * trained.rank))
    if keep >= trained.rank:
        return trained.rank
    with torch.no_grad():
        faded = _log_tail(trained, keep) < _log_tail(received, keep)
    return keep if faded else trained.rank


def _log_tail(adapter: LowRank, keep: int) -> float:
    """Logarithm of the product of the tails' norms, summed over layers; −inf for none."""
    # In logarithms: neither the squares nor the product need fit float64.
    B, A = adapter.B[..., keep:].flatten(-2), adapter.A[..., keep:, :].flatten(-2)
    products = norms(B.double(), -1).log() + norms(A.double(), -1).log()
    return float(products.flatten().logsumexp(0))


def _tail(adapter: LowRank, keep: int) -> Tensor:
    """The product of the tails' norms, summed over layers, in float64."""
    # The squares of a fading tail would leave float32 long before the tail does.
    B, A = adapter.B[..., keep:].double(), adapter.A[..., keep:, :].double()
    products: Tensor = B.norm(dim=(-2, -1)) * A.norm(dim=(-2, -1))
    return products.sum()
