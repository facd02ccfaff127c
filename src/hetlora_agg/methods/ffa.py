"""`ffa`: mean of B under a frozen, common A, FFA-LoRA."""

from hetlora_agg.claims import STACKED, SYMMETRIC
from hetlora_agg.combining import average_factors, common_rows
from hetlora_agg.components import Components
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import Weighting, weighted_share


@method(
    reference="arXiv:2403.12313",
    claims={k: v for k, v in SYMMETRIC.items() if k != "transpose"}
    | {
        "mixed_ranks": {},
        "exact": {},
        "split_client": {},
        "zero_component": {},
        "idle_coverage": {},
        "cohort_equal": {},
        "cohort_ratio": {},
        "bounded_share": {},
    },
    fails=dict.fromkeys(STACKED, "stack") | {"cohort": "own total"},
    client="train_B",
    unscaled="A",
    common=True,
    sums="factors",
)
def ffa(c: Components, *, weighting: Weighting = "examples") -> AggregationResult:
    """Averages zero-padded B's under an A that is common to all clients and never trained.

    ``B_g = Σ p_k pad(B_k)``, ``A_g = A``: then ``B_g A = Σ p_k B_k A_k`` exactly.

    Args:
        c: clients with one A, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        weighting: "examples" for ``p_k = n_k / Σ n``, "uniform" for ``1 / K``, or a function that
            returns the clients' coefficients, such as `robustness.geomed`.

    Returns:
        The common A and the averaged B; only B replaces the clients' (``shared == {"B"}``).

    Raises:
        InputValueError: A's of a slot that differ.

    Cost: ``out R n_slots`` multiply-adds.

    Example:
        >>> from torch import eye, ones
        >>> from hetlora_agg import aggregate
        >>> small, large = (eye(2)[:1], ones(2, 1)), (eye(2), 3 * ones(2, 2))
        >>> aggregate([small, large], "ffa").B[0]
        tensor([2.0000, 1.5000])

    Reference: FFA-LoRA, Sun, Li, Li, Ding, ICLR 2024, arXiv:2403.12313.

    Fidelity: PAPER for equal ranks; OURS for mixed ranks (zero-padding) and for ``weighting=``.

    Deviations: weighted by examples unless ``weighting=`` says otherwise. The scaling goes whole
    into B, or A would not be common.
    """
    B = average_factors(c, weighted_share(c, weighting)).B
    return result_of(LowRank(common_rows(c), B), shared=frozenset("B"))
