"""`ties`: trim, elect signs and merge in the shared core, TIES-Merging."""

import torch
from torch import Tensor

from hetlora_agg.checks import as_fraction
from hetlora_agg.claims import ENTRYWISE, GAUGE_FREE, IDLE, SYMMETRIC
from hetlora_agg.components import Components
from hetlora_agg.compression import Rank, compress
from hetlora_agg.core import core, core_bytes
from hetlora_agg.linalg import norms
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, result_of
from hetlora_agg.weighting import examples, normalised


@method(
    reference="arXiv:2306.01708",
    claims=SYMMETRIC
    | GAUGE_FREE
    | {
        "mixed_ranks": {},
        "split_client": {},
        "zero_component": {"rank": "full"},
        "idle_kept": {},
    },
    fails=dict.fromkeys((*ENTRYWISE, *IDLE[1:]), "elected signs"),
    workspace=core_bytes,
)
def ties(
    c: Components, *, density: float = 0.5, rank: Rank = None, split: str = "balanced"
) -> AggregationResult:
    """Keeps each client's largest entries, elects a sign, averages those that agree with it.

    ``ΔW_k = U X_k Vᵀ`` with U, V the ordered eigenvectors of ``Σ p ΔW_k ΔW_kᵀ`` and
    ``Σ p ΔW_kᵀ ΔW_k``. Trim: ``X̂_k`` is X_k with all but the share ``density`` of its entries,
    the largest, put to zero. Elect: ``γ = sign(Σ p_k X̂_k)``. Merge: the mean, weighted by p_k, of
    the ``X̂_k`` of sign γ. Then the SVD to the wanted rank.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        density: share of a client's entries that is kept, in (0, 1], of those in directions where
            anybody has something.
        rank: None for the largest participating rank, "full" for no truncation, or an integer.
        split: "balanced", "left" (all of S in B) or "right" (all of S in A).

    Returns:
        Nested factors with their singular values.

    Raises:
        InputValueError: a density outside (0, 1], a rank or split that is none.

    Cost: ``3 (out + in) R²`` multiply-adds, SVDs of size R, and several times
    ``K min(R, out) min(R, in)`` numbers per layer: it is for tens of clients, not for hundreds.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> clients = [(ones(1, 1), size * ones(1, 1)) for size in (-1.0, 2.0, 4.0)]
        >>> aggregate(clients, "ties").factors.dense()  # the sign is +, and -1 does not count
        tensor([[3.]])

    Reference: TIES-Merging, Yadav, Tam, Choshen, Raffel, Bansal, NeurIPS 2023, arXiv:2306.01708;
    the core after Core Space, arXiv:2509.17786.

    Fidelity: PAPER for the rule, OURS for the weights p_k and for the core's ordered bases.

    Deviations: the published rule works on the entries of the weight matrix, and its default
    density is 0.2 of them; a core has far fewer entries and most of them matter. Entries below the
    rounding of a client's factors count as zero.
    """
    share = as_fraction(density, "density=")
    p = normalised(examples(c))[:, None, None]
    shared = core(c, examples(c))
    X = _largest(_without_rounding(shared.X, c.A.dtype), shared.inside, share)
    agree = X.sign() == (p * X).sum(-3, keepdim=True).sign()
    weight = p * (agree & (X != 0))
    total = weight.sum(-3)
    merged = torch.where(total > 0, (weight * X).sum(-3) / total, 0.0)
    return result_of(compress(shared.back(merged, c.A), rank, default=c.max_rank, split=split))


def _without_rounding(X: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries below the rounding of a client's factors as zero: rounding has no vote."""
    size = norms(X.flatten(-2), -1)[..., None, None]
    noise = max(X.shape[-2:]) * torch.finfo(dtype).eps * size
    return torch.where(X.abs() > noise, X, 0.0)


def _largest(X: Tensor, inside: Tensor, share: float) -> Tensor:
    """Each client's entries but the smallest put to zero, counted among those of the core."""
    sizes = X.abs().flatten(-2).sort(-1, descending=True).values
    counted = share * inside.flatten(-2).sum(-1, keepdim=True).double()
    # 0.55 of 100 is 55, though not in binary.
    keep = counted.mul(1 - 1e-12).ceil().long().clamp_min(1)
    smallest = sizes.gather(-1, (keep - 1).expand(*sizes.shape[:-1], 1))
    return torch.where(X.abs() >= smallest.unsqueeze(-1), X, 0.0)
