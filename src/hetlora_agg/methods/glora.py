"""`glora`: updates read in a consensus of the clients' row spaces."""

import torch

from hetlora_agg.claims import GAUGE_FREE, STACKED, SYMMETRIC, TRUNCATED
from hetlora_agg.combining import cast_balanced, stack
from hetlora_agg.components import Components
from hetlora_agg.compression import Rank, as_rank, compress
from hetlora_agg.linalg import column_space, row_space
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import Weighting, weighted_share


@method(
    reference="arXiv:2605.06733",
    claims={k: v for k, v in SYMMETRIC.items() if k != "transpose"}
    | GAUGE_FREE
    | {
        "mixed_ranks": {},
        "exact": {"rank": "full"},
        "split_client": {},
        "zero_component": {"rank": "full"},
        "idle_coverage": {},
        "cohort_equal": {"rank": "full"},
        "cohort_ratio": {"rank": "full"},
        "bounded_share": {},
    },
    fails=dict.fromkeys((*STACKED, *TRUNCATED, "transpose"), "agreed rows"),
)
def glora(
    c: Components,
    *,
    rank: Rank = None,
    weighting: Weighting = "examples",
    split: str = "balanced",
) -> AggregationResult:
    """Takes the mean of the updates within the r input directions that the clients agree on most.

    ``M = Σ p_k A_kᵀ (A_k A_kᵀ)⁺ A_k``, the mean of the projections onto the clients' row spaces;
    V its top r eigenvectors; ``ΔW = (Σ p_k B_k (A_k V)) Vᵀ``.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        rank: r; None for the largest participating rank, "full" for no truncation, or an integer.
        weighting: "examples" for ``p_k = n_k / Σ n``, "uniform" for ``1 / K``, or a function that
            returns the clients' coefficients, such as `robustness.geomed`.
        split: "balanced", "left" (all of S in B) or "right" (all of S in A).

    Returns:
        Nested factors with their singular values.

    Raises:
        InputValueError: a rank or split that is none.

    Cost: the QR of every A_k and of the stack of them, and one factored SVD of r components.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> row, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> clients = [(row, torch.ones(2, 1), 1, 3.0), (other, torch.ones(2, 1), 1, 1.0)]
        >>> aggregate(clients, "glora").factors.dense()  # the second row space has a quarter
        tensor([[0.7500, 0.0000],
                [0.7500, 0.0000]])

    Reference: GLoRA, arXiv:2605.06733.

    Fidelity: OURS, a reading of the published idea through the stacked factors; so is
    ``weighting=``.

    Deviations: V does not depend on the size of the updates, only on where they look. Exact iff r
    reaches the dimension of the joint row space. Equal eigenvalues at the cut leave V open.
    """
    share = weighted_share(c, weighting)
    rows = torch.zeros_like(c.A, dtype=torch.float64)
    for _, components in c.rank_groups:
        basis = row_space(c.of_clients(components)[0])
        # A client's rank may exceed in_features: there are no more directions than that.
        rows[..., components[:, : basis.shape[-2]], :] = basis
    wanted = as_rank(rank, default=c.max_rank)
    # The right singular vectors of the stacked √p_k bases are the eigenvectors of M.
    V = column_space((share.sqrt().unsqueeze(-1) * rows).mT)[0][..., :wanted]
    mean = stack(c, share)
    seen = mean.B.double() @ (mean.A.double() @ V)
    agreed = cast_balanced(LowRank(V.mT, seen), c.A)
    return result_of(compress(agreed, wanted, split=split))
