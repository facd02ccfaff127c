"""`fedit`: plain averages of the factors."""

from hetlora_agg.claims import COHORTS, GAUGE, SYMMETRIC
from hetlora_agg.combining import average_factors
from hetlora_agg.components import Components
from hetlora_agg.errors import InputValueError
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, result_of
from hetlora_agg.weighting import Weighting, weighted_share


@method(
    reference="arXiv:2305.05644",
    claims=SYMMETRIC
    | {
        "consensus": {},
        "statistical_uncorrelated": {},
        "idle_kept": {},
        "split_client": {},
        "bounded_share": {},
    },
    fails=dict.fromkeys(("mixed_ranks", "zero_component"), "refusal")
    | dict.fromkeys((*COHORTS, *GAUGE, "exact", "statistical"), "factor means"),
    sums="factors",
)
def fedit(c: Components, *, weighting: Weighting = "examples") -> AggregationResult:
    """Averages the A's and the B's apart; equal ranks only.

    ``A_g = Σ p_k A_k``, ``B_g = Σ p_k B_k``, ``p_k = n_k / Σ n``.

    Args:
        c: clients of one rank, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        weighting: "examples" for ``p_k = n_k / Σ n``, "uniform" for ``1 / K``, or a function that
            returns the clients' coefficients. A rule against bad clients bounds nothing here: it
            sees ``B_k A_k``, which a client can write in factors of any size.

    Returns:
        Factors of the clients' rank; slicing them is the method's own answer for fewer slots.

    Raises:
        InputValueError: the clients' ranks or slots differ.

    Cost: ``(out + in) R`` multiply-adds.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> pair = [(torch.ones(1, 2), torch.ones(2, 1)), (torch.ones(1, 2), -torch.ones(2, 1))]
        >>> aggregate(pair, "fedit").B.abs().max().item()
        0.0

    Reference: FedIT, Zhang et al., arXiv:2305.05644.

    Fidelity: PAPER, OURS for ``weighting=``.

    Deviations: none. The cross terms ``B_k A_l`` are the method's, not ours: two clients with the
    same update written with opposite signs average to something else altogether.
    """
    # A client that lacks the layer counts as a zero update there, and has no rank to differ.
    if len(set(c.ranks) - {0}) > 1 or c.n_slots > c.max_rank:
        raise InputValueError(
            f"fedit: expected clients of equal rank in the same slots, got ranks {c.ranks} in "
            f"{c.n_slots} slots; use 'zeropad' "
            "for the same average with zero-padding, or 'rb' to leave high ranks undiluted"
        )
    return result_of(average_factors(c, weighted_share(c, weighting)))
