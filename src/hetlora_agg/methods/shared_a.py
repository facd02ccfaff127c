"""`shared_a`: slot-wise mean of B under one common A, the nearest piece to AFLoRA."""

from hetlora_agg.checks import fitting_state
from hetlora_agg.claims import IDLE, SYMMETRIC
from hetlora_agg.combining import average_factors, carry_over_slots, common_rows
from hetlora_agg.components import Components
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import examples, guarded_share


@method(
    reference="arXiv:2505.24773",
    claims={k: v for k, v in SYMMETRIC.items() if k != "transpose"}
    | {
        "mixed_ranks": {},
        "consensus": {},
        "statistical": {},
        "statistical_uncorrelated": {},
        "split_client": {},
        "idle_kept": {},
        "cohort_equal": {},
        "slot_ratio": {},
        "bounded_share": {"floor": 1.0},
    },
    fails=dict.fromkeys(
        (*IDLE[1:], "exact", "cohort", "cohort_ratio", "bounded_share", "zero_component"),
        "owner means",
    ),
    client="train_B",
    unscaled="A",
    common=True,
    sums="factors",
)
def shared_a(
    c: Components,
    *,
    floor: float | None = None,
    quorum: int | None = None,
    weight_cap: float | None = None,
    previous: LowRank | AggregationResult | None = None,
) -> AggregationResult:
    """Averages the columns of B over the owners of their slot, under an A common to all clients.

    ``B_g[:, j] = Σ_{k∈S_j} (n_k / N_j) B_k[:, j]``, A as it is: no cross terms, since nothing is
    averaged against anything.

    Args:
        c: clients with one A, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``; a
            client's diagonal Λ_k goes into its B, ``B_k diag(Λ_k)``.
        floor: support floor β in (0, 1]: no client gets more than ``p_k / β`` of a slot.
        quorum: columns of B with fewer owners are left empty and listed in ``.dropped``.
        weight_cap: τ in (0, 1]: no client counts for more than this part of all weight.
        previous: last round's global factors, for slots nobody owns this round.

    Returns:
        The common A and the averaged B, leading slots for every smaller rank.

    Raises:
        InputValueError: A's of a slot that differ, an option outside its range, or ``previous`` of
            another shape.

    Cost: ``out R n_slots`` multiply-adds.

    Example:
        >>> from torch import eye, ones
        >>> from hetlora_agg import aggregate
        >>> small, large = (eye(2)[:1], ones(2, 1)), (eye(2), 3 * ones(2, 2))
        >>> aggregate([small, large], "shared_a").B[0]
        tensor([2., 3.])

    Reference: the nearest piece to AFLoRA, Zhou, Pang, Wang, arXiv:2505.24773.

    Fidelity: OURS, options included. AFLoRA's formulas are not public in any text found, so no
    method has its name.

    Deviations: pruning by ``|Λ_jj|`` is the client's. The product equals that of 'rb' on the same
    clients, and the exact mean where every slot is owned by all.
    """
    previous = fitting_state("previous", previous, c)
    share, dropped = guarded_share(
        c, examples(c), floor=floor, quorum=quorum, weight_cap=weight_cap
    )
    A, B = common_rows(c), average_factors(c, share).B
    if previous is not None:
        # The rows of dropped slots come back with what is carried over.
        A = A * A.new_tensor([slot not in dropped for slot in range(c.n_slots)]).unsqueeze(-1)
    return result_of(carry_over_slots(LowRank(A, B), c, previous, dropped), dropped=dropped)
