"""`hafl`: each slot averaged over the clients that updated it, HAFL and HAFLQ."""

from hetlora_agg.checks import fitting_state
from hetlora_agg.claims import GAUGE, OWNER_AVERAGED, SYMMETRIC
from hetlora_agg.combining import average_factors, carry_over_slots
from hetlora_agg.components import Components
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import examples, guarded_share


@method(
    reference="arXiv:2411.06581",
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
    client="freeze",
    sums="factors",
)
def hafl(
    c: Components,
    *,
    floor: float | None = None,
    quorum: int | None = None,
    weight_cap: float | None = None,
    previous: LowRank | AggregationResult | None = None,
) -> AggregationResult:
    """Averages every slot over the clients that updated it; slots all froze stay as they were.

    ``A_g[j] = Σ_{k∈S_j} (n_k / N_j) A_k[j]``, the same for B, with ``S_j`` the clients that did
    not freeze slot j.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``; the
            clients' ``slots`` say which slots they updated.
        floor: support floor β in (0, 1]: no client gets more than ``p_k / β`` of a slot.
        quorum: slots that fewer clients updated count as frozen by all, and are listed in
            ``.dropped``.
        weight_cap: τ in (0, 1]: no client counts for more than this part of all weight.
        previous: last round's global factors, for slots that everybody froze.

    Returns:
        All slots, of equal standing: every client holds all of them. Not nested.

    Raises:
        InputValueError: an option outside its range, or ``previous`` of another shape.

    Cost: ``(out + in) R n_slots`` multiply-adds.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import ClientUpdate, aggregate
        >>> both = ClientUpdate(ones(2, 2), ones(2, 2))
        >>> second = ClientUpdate(ones(1, 2), 5 * ones(2, 1), weight=3, slots=[1])
        >>> aggregate([both, second], "hafl").B[0]  # slot 1: 1/4 · 1 + 3/4 · 5
        tensor([1., 4.])

    Reference: HAFL, Su et al., arXiv:2411.06581 (HAFLQ with quantised uploads).

    Fidelity: PAPER in words for averaging over the clients that updated, OURS for the weights
    ``n_k``, ``floor``, ``quorum``, ``weight_cap`` and ``previous``.

    Deviations: importance, freezing and quantisation are the client's side: see
    `clients.importance`, `clients.important_slots` and `clients.quantise`.
    """
    previous = fitting_state("previous", previous, c)
    share, dropped = guarded_share(
        c, examples(c), floor=floor, quorum=quorum, weight_cap=weight_cap
    )
    factors = carry_over_slots(average_factors(c, share), c, previous, dropped)
    return result_of(factors, nested=False, dropped=dropped)
