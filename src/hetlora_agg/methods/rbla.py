"""`rbla`: factors averaged slot by slot over their owners."""

from hetlora_agg.checks import fitting_state
from hetlora_agg.claims import GAUGE, OWNER_AVERAGED, SYMMETRIC
from hetlora_agg.combining import average_factors, carry_over_slots
from hetlora_agg.components import Components
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import examples, guarded_share


@method(
    reference="arXiv:2408.08699",
    claims=SYMMETRIC
    | {
        "mixed_ranks": {},
        "consensus": {},
        "statistical_uncorrelated": {},
        "split_client": {},
        "idle_kept": {},
        "bounded_share": {"floor": 1.0},
    },
    fails=dict.fromkeys((*OWNER_AVERAGED, *GAUGE), "owner factor means"),
    sums="factors",
)
def rbla(
    c: Components,
    *,
    floor: float | None = None,
    quorum: int | None = None,
    weight_cap: float | None = None,
    previous: LowRank | AggregationResult | None = None,
) -> AggregationResult:
    """Averages row j of A and column j of B over the clients that own slot j.

    ``A_g[j] = Σ_{k∈S_j} (n_k / N_j) A_k[j]``, ``B_g[:, j]`` likewise: the factor-space twin of
    'rb', with the cross terms ``b_k^j a_l^j`` that come from averaging the factors apart.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        floor: support floor β in (0, 1]: no client gets more than ``p_k / β`` of a slot.
        quorum: slots with fewer owners are left empty and listed in ``.dropped``.
        weight_cap: τ in (0, 1]: no client counts for more than this part of all weight.
        previous: last round's global factors; slots left empty are carried over from them.

    Returns:
        Factors of the largest rank, leading slots for every smaller one.

    Raises:
        InputValueError: an option outside its range, or ``previous`` of another shape.

    Cost: ``(out + in) R n_slots`` multiply-adds.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> small, large = (ones(1, 2), ones(2, 1)), (ones(2, 2), ones(2, 2))
        >>> aggregate([small, large], "rbla").B[0]
        tensor([1., 1.])

    Reference: RBLA, Chen, Tavallaie, Nazemi, Zomaya, arXiv:2408.08699; FediLoRA, arXiv:2509.06984,
    describes the same rule.

    Fidelity: CODE; ``floor``, ``quorum``, ``weight_cap`` and ``previous`` are OURS.

    Deviations: ownership is explicit where the authors mask with NaN, so a diverged client is an
    error and not an absentee.
    """
    previous = fitting_state("previous", previous, c)
    share, dropped = guarded_share(
        c, examples(c), floor=floor, quorum=quorum, weight_cap=weight_cap
    )
    factors = carry_over_slots(average_factors(c, share), c, previous, dropped)
    return result_of(factors, dropped=dropped)
