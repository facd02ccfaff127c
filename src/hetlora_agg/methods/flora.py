"""`flora`: stacking, exact."""

from hetlora_agg.claims import GAUGE_FREE, SYMMETRIC
from hetlora_agg.combining import stack
from hetlora_agg.components import Components
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, result_of
from hetlora_agg.weighting import Weighting, weighted_share


@method(
    reference="arXiv:2409.05976",
    claims=SYMMETRIC
    | GAUGE_FREE
    | {
        "mixed_ranks": {},
        "exact": {},
        "split_client": {},
        "zero_component": {},
        "cohort": {},
        "cohort_equal": {},
        "cohort_ratio": {},
        "bounded_share": {},
    },
    fails=dict.fromkeys(
        ("consensus", "statistical", "statistical_uncorrelated", "slot_ratio"), "stack"
    ),
    client="restart",
    sums="products",
)
def flora(
    c: Components, *, weighting: Weighting = "examples", total: float | None = None
) -> AggregationResult:
    """Stacks all clients' components: the exact mean of the updates, at rank ``Σ r_k``.

    ``A_g = [p_1 A_1; …; p_K A_K]``, ``B_g = [B_1 … B_K]``, so ``B_g A_g = Σ p_k ΔW_k``.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        weighting: "examples" for ``p_k = n_k / Σ n``, "uniform" for ``1 / K``, or a function that
            returns the clients' coefficients, such as `robustness.geomed`.
        total: the denominator of "examples" in place of ``Σ n``: with the weight of all clients,
            whoever takes part, and weights ``n_k / π_k`` a cohort's result is unbiased for
            everybody's (Horvitz-Thompson).

    Returns:
        Factors of rank R, not nested: fold them into the base weight and let the clients draw a
        fresh LoRA init, or use 'flexlora' for factors that slice.

    Cost: ``R in`` multiplications.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> small, large = (ones(1, 2), ones(2, 1)), (ones(2, 2), ones(2, 2))
        >>> aggregate([small, large], "flora")
        AggregationResult(2x2, rank 3, not nested)

    Reference: FLoRA, Wang et al., NeurIPS 2024, arXiv:2409.05976.

    Fidelity: CODE, OURS for ``weighting=`` and ``total=``.

    Deviations: none.
    """
    return result_of(stack(c, weighted_share(c, weighting, total)), nested=False)
