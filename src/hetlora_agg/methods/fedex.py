"""`fedex`: factor averages plus the exact residual."""

from hetlora_agg.claims import GAUGE_FREE, STACKED, SYMMETRIC
from hetlora_agg.combining import average_factors, stack
from hetlora_agg.components import Components
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, result_of
from hetlora_agg.weighting import Weighting, weighted_share


@method(
    reference="arXiv:2410.09432",
    claims=SYMMETRIC
    | GAUGE_FREE
    | {
        "mixed_ranks": {},
        "exact": {},
        "split_client": {},
        "zero_component": {},
        "idle_coverage": {},
        "cohort": {},
        "cohort_equal": {},
        "cohort_ratio": {},
        "bounded_share": {},
    },
    fails=dict.fromkeys(STACKED, "stack"),
    sums="products",
)
def fedex(
    c: Components, *, weighting: Weighting = "examples", total: float | None = None
) -> AggregationResult:
    """Averages the factors apart and returns the error of doing so, for the base weight.

    ``A_g = Σ p_k pad(A_k)``, ``B_g = Σ p_k pad(B_k)``, residual ``Σ p_k ΔW_k − B_g A_g``: factors
    and residual together are exact.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        weighting: "examples" for ``p_k = n_k / Σ n``, "uniform" for ``1 / K``, or a function that
            returns the clients' coefficients, such as `robustness.geomed`: they bound the total,
            not the factors apart.
        total: the denominator of "examples" in place of ``Σ n``: with the weight of all clients,
            whoever takes part, and weights ``n_k / π_k`` a cohort's result is unbiased for
            everybody's (Horvitz-Thompson).

    Returns:
        Factors of the largest rank, and the residual as factors of rank at most ``R + r_max``.

    Cost: ``(out + in) R n_slots`` multiply-adds.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> pair = [(torch.ones(1, 2), torch.ones(2, 1)), (-torch.ones(1, 2), -torch.ones(2, 1))]
        >>> result = aggregate(pair, "fedex")   # one update, written with opposite signs
        >>> result.factors.dense().abs().max().item(), result.residual.dense()[0, 0].item()
        (0.0, 1.0)

    Reference: FedEx-LoRA, Singhal, Ponkshe, Vepakomma, arXiv:2410.09432.

    Fidelity: PAPER for equal ranks; OURS for mixed ranks (zero-padding), for the factored form,
    ``weighting=`` and ``total=``.

    Deviations: exact to rounding of the factors' product, not of the total: a client that sends
    ``10⁸ A`` and ``10⁻⁸ B`` costs eight digits. The residual is never formed densely.
    Weighted by examples unless ``weighting=`` says otherwise.
    """
    share = weighted_share(c, weighting, total)
    factors = average_factors(c, share)
    return result_of(factors, residual=stack(c, share).minus(factors))
