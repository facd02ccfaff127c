"""`replicate`: short clients padded with the high-rank clients' own slots."""

from hetlora_agg.checks import fitting_state
from hetlora_agg.claims import GAUGE, OWNER_AVERAGED, SYMMETRIC
from hetlora_agg.combining import average_factors, carry_over_slots
from hetlora_agg.components import Components
from hetlora_agg.errors import InputValueError
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import client_share, coverage, examples, top_share


@method(
    reference="arXiv:2406.17477",
    claims=SYMMETRIC
    | {
        "mixed_ranks": {},
        "consensus": {},
        "statistical_uncorrelated": {},
        "split_client": {},
        "idle_kept": {},
    },
    fails=dict.fromkeys((*OWNER_AVERAGED, *GAUGE), "padded factor means"),
    sums="factors",
)
def replicate(
    c: Components, *, previous: LowRank | AggregationResult | None = None
) -> AggregationResult:
    """Averages factors padded with the mean of the highest-rank clients instead of zeros.

    ``A_g[j] = Σ_{k∈S_j} p_k A_k[j] + (1 − q_j) D_A[j]``, the same for B, where ``D`` is the
    data-weighted mean of the clients of the largest rank and ``q_j`` the part of the data whose
    clients own slot j.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        previous: last round's global factors; slots nobody owns this round are taken from them.

    Returns:
        Factors of the largest rank, leading slots for every smaller one.

    Raises:
        InputValueError: ``previous`` of another shape, or a client of the largest rank that
            leaves a slot empty which others fill: there is nothing to replicate.

    Cost: ``(out + in) R n_slots`` multiply-adds.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> small, large = (ones(1, 2), ones(2, 1)), (ones(2, 2), ones(2, 2))
        >>> aggregate([small, large], "replicate").B[0]  # slot 1 is not diluted
        tensor([1., 1.])

    Reference: Byun & Lee, NAACL 2025, arXiv:2406.17477.

    Fidelity: SECOND for the padding, OURS for the closed form and for ``previous``.

    Deviations: none known. Against a client that declares more rank than all others it has no
    option, since the clients of the largest rank pad all others by construction: whoever inflates
    becomes the donor of every slot, and a floor or quorum would leave nothing to pad with. Refuse
    or drop such a client with ``max_rank=``, or take 'rbla', which is bounded slot by slot.
    """
    _check_donors(c)
    previous = fitting_state("previous", previous, c)
    mass = examples(c)
    share = client_share(c, mass) + (1 - coverage(c, mass)) * top_share(c, mass)
    return result_of(carry_over_slots(average_factors(c, share), c, previous))


def _check_donors(c: Components) -> None:
    for id, rank, slots in zip(c.ids, c.ranks, c.slots_by_client, strict=True):
        if rank == c.max_rank and c.n_slots > rank:
            empty = min(set(range(c.n_slots)) - set(slots))
            raise InputValueError(
                f"replicate: client {id!r} has the largest rank and does not fill slot {empty}, so "
                "it cannot pad the others there; use 'rbla' for slots that are no prefix"
            )
