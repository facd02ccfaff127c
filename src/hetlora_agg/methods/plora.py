"""`plora`: each one-rank module averaged over the clients that trained it, Fed-PLoRA."""

from hetlora_agg.checks import check_choice, fitting_state
from hetlora_agg.claims import GAUGE, OWNER_AVERAGED, SYMMETRIC
from hetlora_agg.combining import average_factors, carry_over_slots
from hetlora_agg.components import Components
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import WEIGHTINGS, guarded_share


@method(
    reference="arXiv:2602.16936",
    claims=SYMMETRIC
    | {
        "mixed_ranks": {},
        "consensus": {},
        "statistical_uncorrelated": {},
        "split_client": {"weighting": "examples"},
        "idle_kept": {},
        "bounded_share": {"weighting": "examples", "floor": 1.0},
    },
    fails=dict.fromkeys((*OWNER_AVERAGED, *GAUGE), "equal owner factor means")
    | {"split_client": "doubled mass"},
    client="select",
    sums="factors",
)
def plora(
    c: Components,
    *,
    weighting: str = "uniform",
    floor: float | None = None,
    quorum: int | None = None,
    weight_cap: float | None = None,
    previous: LowRank | AggregationResult | None = None,
) -> AggregationResult:
    """Averages every one-rank module over the clients that trained it; others stay as they were.

    ``A_g[j] = mean_{k∈S_j} A_k[j]``, ``B_g[:, j] = mean_{k∈S_j} B_k[:, j]``, with ``S_j`` the
    clients that selected module j; a module that nobody selected keeps its previous value.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``; the
            clients' ``slots`` say which modules they trained.
        weighting: "uniform", or "examples" for ``n_k / N_j``.
        floor: support floor β in (0, 1]: no client gets more than ``p_k / β`` of a module.
        quorum: modules that fewer clients trained count as trained by nobody, and are listed in
            ``.dropped``.
        weight_cap: τ in (0, 1]: no client counts for more than this part of all weight.
        previous: last round's global modules.

    Returns:
        All modules, of equal standing: not nested. Clients get a choice of them from
        `clients.select_and_fold`.

    Raises:
        InputValueError: a weighting that is none, an option outside its range, ``previous`` of
            another shape.

    Cost: ``(out + in) R n_slots`` multiply-adds.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import ClientUpdate, LowRank, aggregate
        >>> trained_0 = ClientUpdate(ones(1, 3), ones(3, 1), slots=[0])
        >>> trained_2 = ClientUpdate(ones(1, 3), 3 * ones(3, 1), slots=[2])
        >>> last = LowRank(ones(3, 3), 2 * ones(3, 3))
        >>> aggregate([trained_0, trained_2], "plora", previous=last).B[0]
        tensor([1., 2., 3.])

    Reference: Fed-PLoRA, Zhang, Hu, Xu, ICLR 2026, arXiv:2602.16936.

    Fidelity: SECOND. OURS: ``weighting="examples"``, ``floor``, ``quorum``, ``weight_cap``.

    Deviations: the published bound on the noise of a module, a sum of deviations, does not hold;
    the noise is ``mean_k (B_k − B̄)(A_k − Ā)``, bounded by the mean of products of deviations.
    """
    check_choice("weighting", weighting, sorted(WEIGHTINGS))
    previous = fitting_state("previous", previous, c)
    share, dropped = guarded_share(
        c, WEIGHTINGS[weighting](c), floor=floor, quorum=quorum, weight_cap=weight_cap
    )
    factors = carry_over_slots(average_factors(c, share), c, previous, dropped)
    return result_of(factors, nested=False, dropped=dropped)
