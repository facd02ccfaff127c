"""`flexlora`: the best low-rank approximation of the exact mean."""

from hetlora_agg.combining import stack
from hetlora_agg.components import Components
from hetlora_agg.compression import Rank, compress, divide
from hetlora_agg.registry import SYMMETRIC, method
from hetlora_agg.types import AggregationResult, result_of
from hetlora_agg.weighting import Weighting, weighted_share


@method(
    reference="arXiv:2402.11505",
    claims=SYMMETRIC
    | {
        "mixed_ranks": {},
        "exact": {"rank": "full"},
        "split_client": {},
        "gauge": {},
        "zero_component": {"rank": "full"},
        "idle_coverage": {},
    },
)
def flexlora(
    c: Components,
    *,
    rank: Rank = None,
    energy: float | None = None,
    fold_rest: bool = False,
    weighting: Weighting = "examples",
    split: str = "balanced",
) -> AggregationResult:
    """Takes the exact mean of the updates and its best approximation of the wanted rank.

    ``ΔW* = Σ p_k s_k B_k A_k = U S Vᵀ``, factors ``U_r √S_r`` and ``√S_r V_rᵀ``.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        rank: None for the largest participating rank, "full" for no truncation, or an integer.
        energy: τ in (0, 1]: the smallest rank whose squared singular values reach the share τ, per
            layer; ``rank`` caps it if given.
        fold_rest: hand all discarded components back as ``residual``: then the total is exact.
        weighting: "examples" for ``p_k = n_k / Σ n``, "uniform" for ``1 / K``, or a function that
            returns the clients' coefficients, such as `robustness.geomed`.
        split: "balanced", "left" (all of S in B) or "right" (all of S in A).

    Returns:
        Nested factors with their singular values.

    Raises:
        InputValueError: a rank, energy or split that is none.

    Cost: one factored SVD of R components, see `linalg.svd_product`; never out×in.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> A, B = torch.diag(torch.tensor([4.0, 2.0])), torch.eye(2)
        >>> aggregate([(A, B), (A[:1], B[:, :1])], "flexlora").singular_values
        tensor([4., 1.])

    Reference: FlexLoRA, Bai et al., NeurIPS 2024, arXiv:2402.11505; the same estimator is HLoRA,
    arXiv:2503.00813. ``energy=`` is FLoRIST's rule, arXiv:2506.09199.

    Fidelity: CODE for the estimator, OURS for ``fold_rest`` (after FedMomentum's idea).

    Deviations: none in exact arithmetic; the dense matrix is not formed.
    """
    mean = stack(c, weighted_share(c, weighting))
    if not fold_rest:
        return result_of(compress(mean, rank, default=c.max_rank, energy=energy, split=split))
    whole = compress(mean, "full", split=split)
    factors, residual = divide(whole, rank, default=c.max_rank, energy=energy)
    return result_of(factors, residual=residual)
