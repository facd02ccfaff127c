"""`dare`: drop entries of the shared core at random and rescale, DARE."""

import torch

from hetlora_agg.checks import as_number
from hetlora_agg.claims import ENTRYWISE, GAUGE_FREE, IDLE, SYMMETRIC
from hetlora_agg.components import Components
from hetlora_agg.compression import Rank, compress
from hetlora_agg.core import core, core_bytes
from hetlora_agg.drawing import Generator, uniform
from hetlora_agg.errors import OptionValueError
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, result_of
from hetlora_agg.weighting import examples, normalised


@method(
    reference="arXiv:2311.03099",
    claims={
        k: v
        for k, v in SYMMETRIC.items()
        if k in ("rescaling", "homogeneous", "orthogonal", "absent")
    }
    | GAUGE_FREE
    | {
        "mixed_ranks": {},
    },
    fails=dict.fromkeys(
        (*ENTRYWISE, *IDLE, "order", "split_client", "transpose", "single_client", "layers"),
        "random masks",
    ),
    workspace=core_bytes,
)
def dare(
    c: Components,
    *,
    generator: Generator,
    drop: float = 0.5,
    rank: Rank = None,
    split: str = "balanced",
) -> AggregationResult:
    """Drops entries of every client at random, scales up the others, and averages.

    ``ΔW_k = U X_k Vᵀ`` with U, V the ordered eigenvectors of ``Σ p ΔW_k ΔW_kᵀ`` and
    ``Σ p ΔW_kᵀ ΔW_k``; ``ΔW = U (Σ p_k m_k ∘ X_k / (1 − drop)) Vᵀ`` with masks m_k of independent
    zeros (probability drop) and ones; then the SVD to the wanted rank. Before truncation its
    expectation over the masks is the exact mean.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        generator: draws the masks.
        drop: probability that an entry is dropped, in [0, 1).
        rank: None for the largest participating rank, "full" for no truncation, or an integer.
        split: "balanced", "left" (all of S in B) or "right" (all of S in A).

    Returns:
        Nested factors with their singular values.

    Raises:
        InputValueError: a drop outside [0, 1), a rank or split that is none.

    Cost: ``3 (out + in) R²`` multiply-adds, SVDs of size R, and several times
    ``K min(R, out) min(R, in)`` numbers per layer: it is for tens of clients, not for hundreds.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> g = torch.Generator().manual_seed(0)
        >>> clients = [(torch.ones(1, 1), torch.ones(1, 1))] * 4
        >>> aggregate(clients, "dare", generator=g).factors.dense()  # 3 of 4 kept, and doubled
        tensor([[1.5000]])

    Reference: DARE, Yu, Yu, Yu, Huang, Li, ICML 2024, arXiv:2311.03099; the core after Core Space,
    arXiv:2509.17786.

    Fidelity: PAPER for the rule, OURS for the core's ordered bases.

    Deviations: the published rule drops entries of the weight matrix, up to 0.9 of them and more.
    """
    share = as_number(drop, "drop=", zero=True)
    if share >= 1:
        raise OptionValueError(f"drop=: expected a probability in [0, 1), got {drop!r}")
    p = normalised(examples(c))[:, None, None]
    shared = core(c, examples(c))
    kept = uniform(c, generator, *shared.X.shape[-3:]) >= share
    merged = (p * torch.where(kept, shared.X, 0.0)).sum(-3) / (1 - share)
    return result_of(compress(shared.back(merged, c.A), rank, default=c.max_rank, split=split))
