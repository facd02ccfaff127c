"""`rb`: rank-balanced aggregation, RB-LoRA."""

from collections.abc import Sequence

from hetlora_agg.alignment import align as aligned
from hetlora_agg.checks import fitting_state
from hetlora_agg.claims import OWNER_AVERAGED, SYMMETRIC
from hetlora_agg.combining import carry_over, stack
from hetlora_agg.components import Components
from hetlora_agg.compression import Rank, compress
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import examples, guarded_share


@method(
    reference="acl:2026.findings-eacl.88",
    claims=SYMMETRIC
    | {
        "statistical_uncorrelated": {"rank": "full"},
        "mixed_ranks": {},
        "consensus": {},
        "statistical": {"rank": "full"},
        "split_client": {},
        "gauge": {"align": "svd"},
        "idle_kept": {},
        "cohort": {"rank": "full"},
        "cohort_equal": {"rank": "full"},
        "slot_ratio": {"rank": "full"},
        "bounded_share": {"floor": 1.0},
        "component_scale": {},
        "component_order": {"align": "svd"},
    },
    fails=dict.fromkeys(
        (*OWNER_AVERAGED, "statistical_uncorrelated", "gauge", "component_order"), "cut owner means"
    ),
    sums="products",
)
def rb(
    c: Components,
    *,
    rank: Rank = None,
    energy: float | None = None,
    floor: float | None = None,
    quorum: int | None = None,
    weight_cap: float | None = None,
    totals: Sequence[float] | None = None,
    align: str | None = None,
    previous: LowRank | AggregationResult | None = None,
    split: str = "balanced",
) -> AggregationResult:
    """Averages each rank-1 component over the clients that own its slot, in product space.

    ``ΔW = Σ_j Σ_{k∈S_j} (n_k / N_j) b_k^j a_k^j``, ``N_j = Σ_{k∈S_j} n_k``, then the SVD to the
    wanted rank: data share times rank rarity, no cross terms, no dilution of the high ranks.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        rank: None for the largest participating rank, or the highest slot anybody fills (with
            ``previous``: at least its rank), "full" for no truncation, or an integer.
        energy: τ in (0, 1]: smallest rank that keeps this share of Σσ², per layer.
        floor: support floor β in (0, 1]: no client gets more than ``p_k / β`` of a slot.
        quorum: slots with fewer owners are left out and listed in ``.dropped``.
        weight_cap: τ in (0, 1]: no client counts for more than this part of all weight.
        totals: denominators in place of the ``N_j``, one per slot: with those of all clients,
            whoever takes part, and weights ``n_k / π_k`` a cohort's result is unbiased for
            everybody's (Horvitz-Thompson), with ``rank="full"``. Excludes the floor and the cap.
        align: None, or "svd" for each client's own thin SVD first (invariant to re-mixing within
            clients; consensus then needs orthogonal components ordered alike).
        previous: last round's global factors; slots left empty are carried over from them.
        split: "balanced", "left" (all of S in B) or "right" (all of S in A).

    Returns:
        Nested factors with their singular values.

    Raises:
        InputValueError: an option outside its range, or ``previous`` of another shape.

    Cost: one factored SVD of R components, see `linalg.svd_product`; never out×in.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> A, B = torch.diag(torch.tensor([4.0, 2.0])), torch.eye(2)
        >>> aggregate([(A, B), (A[:1], B[:, :1])], "rb").singular_values
        tensor([4., 2.])

    Reference: RB-LoRA, Ha, Oh, Jeon, Findings of EACL 2026, acl:2026.findings-eacl.88.

    Fidelity: PAPER for ``γ = α_k β_j``, CODE for ``β_j``, OURS for ``α_k = n_k / Σ n`` and for
    averaging in product space. ``floor``, ``quorum``, ``weight_cap``, ``totals``, ``align`` and
    ``previous`` are OURS.

    Deviations: the authors' release averages zero-padded factors and never calls its β; that is
    'zeropad' here. Unbiased before truncation; the truncated result keeps consensus only. A client
    that declares more rank than all others owns its slots alone: see ``floor``, ``quorum`` and
    ``weight_cap``.
    """
    previous = fitting_state("previous", previous, c)
    c = aligned(c, align)
    share, dropped = guarded_share(
        c, examples(c), totals=totals, floor=floor, quorum=quorum, weight_cap=weight_cap
    )
    combined = carry_over(stack(c, share), c, previous, dropped)
    default = max(c.n_slots, previous.rank if previous else 0)
    factors = compress(combined, rank, default=default, energy=energy, split=split)
    return result_of(factors, dropped=dropped)
