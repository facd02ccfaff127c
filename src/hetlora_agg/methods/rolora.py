"""`rolora`: alternating rounds of B and of A, the other frozen and common, RoLoRA."""

from hetlora_agg.checks import as_integer
from hetlora_agg.claims import STACKED, SYMMETRIC
from hetlora_agg.combining import average_factors, common_columns, common_rows
from hetlora_agg.components import Components
from hetlora_agg.registry import Factor, method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import Weighting, weighted_share


def frozen(round: int) -> Factor:
    """The factor nobody trains: A in odd rounds, B in even ones."""
    return "A" if as_integer(round, "round=", at_least=1) % 2 else "B"


@method(
    reference="arXiv:2409.02346",
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
    client="alternate",
    unscaled=frozen,
    common=True,
    sums="factors",
)
def rolora(c: Components, *, round: int, weighting: Weighting = "examples") -> AggregationResult:
    """Averages B in odd rounds and A in even ones, the other factor frozen and common.

    Odd: ``B_g = Σ p_k pad(B_k)``, ``A_g = A``. Even: ``A_g = Σ p_k pad(A_k)``, ``B_g = B``.
    Either way ``B_g A_g = Σ p_k B_k A_k`` exactly.

    Args:
        c: clients with one common factor, ``A (*layers, R, in_features)``,
            ``B (*layers, out_features, R)``.
        round: number of this round, from 1: B first, since an A under B = 0 gets no gradient.
        weighting: "examples" for ``p_k = n_k / Σ n``, "uniform" for ``1 / K``, or a function that
            returns the clients' coefficients, such as `robustness.geomed`.

    Returns:
        The common factor and the averaged one; ``shared`` names the averaged one. `distribute`
        leaves unscaled what the next round freezes.

    Raises:
        InputValueError: the frozen factors differ, or a round below 1.

    Cost: ``(out or in) R n_slots`` multiply-adds.

    Example:
        >>> from torch import eye, ones
        >>> from hetlora_agg import aggregate
        >>> one, three = (ones(2, 2), eye(2)), (3 * ones(2, 2), eye(2))
        >>> aggregate([one, three], "rolora", round=2).A[0]
        tensor([2., 2.])

    Reference: RoLoRA, Chen, Guo, Ju, Dalal, Yaghmaie, Khisti, arXiv:2409.02346.

    Fidelity: PAPER for alternating, OURS for mixed ranks (zero-padding), B first and
    ``weighting=``.

    Deviations: weighted by examples unless ``weighting=`` says otherwise. With mixed ranks an even
    round finds common B's only where the clients train the leading slots of one global B.
    """
    averaged = average_factors(c, weighted_share(c, weighting))
    if frozen(round) == "A":
        return result_of(LowRank(common_rows(c), averaged.B), shared=frozenset("B"))
    return result_of(LowRank(averaged.A, common_columns(c)), shared=frozenset("A"))
