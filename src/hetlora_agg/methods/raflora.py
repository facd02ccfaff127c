"""`raflora`: rank-partitioned aggregation over the configured rank levels."""

from collections.abc import Sequence

from hetlora_agg.checks import as_integer, as_list, fitting_state
from hetlora_agg.claims import OWNER_AVERAGED, SYMMETRIC
from hetlora_agg.combining import carry_over, stack
from hetlora_agg.components import Components
from hetlora_agg.compression import Rank, compress
from hetlora_agg.errors import InputValueError
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import examples, guarded_share


@method(
    reference="arXiv:2602.13486",
    claims=SYMMETRIC
    | {
        "statistical_uncorrelated": {"rank": "full"},
        "mixed_ranks": {},
        "consensus": {},
        "statistical": {"rank": "full"},
        "split_client": {},
        "idle_kept": {},
        "cohort_equal": {"rank": "full"},
        "slot_ratio": {"rank": "full"},
        "bounded_share": {"floor": 1.0},
        "component_scale": {},
    },
    fails=dict.fromkeys(
        (*OWNER_AVERAGED, "statistical_uncorrelated", "gauge", "component_order"), "cut owner means"
    ),
    sums="products",
)
def raflora(
    c: Components,
    *,
    levels: Sequence[int] | None = None,
    rank: Rank = None,
    floor: float | None = None,
    quorum: int | None = None,
    weight_cap: float | None = None,
    previous: LowRank | AggregationResult | None = None,
    split: str = "balanced",
) -> AggregationResult:
    """Averages each partition of slots over the clients that reach it, then takes the SVD.

    Levels ``R_1 < … < R_M`` cut the slots into partitions h = ``(R_{h−1}, R_h]``;
    ``ΔW = Σ_h Σ_{k: r_k ≥ R_h} (n_k / N_h) B_k[:, h] A_k[h, :]``, cut to rank ``R_M``.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        levels: the configured ranks, whoever takes part this round; None takes the participants'.
        rank: None for ``R_M``, "full" for no truncation, or an integer.
        floor: support floor β in (0, 1]: no client gets more than ``p_k / β`` of a partition.
        quorum: partitions that fewer clients reach are left out, their slots listed in
            ``.dropped``.
        weight_cap: τ in (0, 1]: no client counts for more than this part of all weight.
        previous: last round's global factors: partitions nobody reached are carried over from
            them. Needs ``levels``.
        split: "balanced", "left" (all of S in B) or "right" (all of S in A).

    Returns:
        Nested factors with their singular values.

    Raises:
        InputValueError: a client's rank is not a level, its slots are no prefix, ``previous``
            without levels or of another shape, levels that are no ranks.

    Cost: one factored SVD of R components, see `linalg.svd_product`; never out×in.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> A, B = torch.diag(torch.tensor([4.0, 2.0])), torch.eye(2)
        >>> clients = [(A, B), (A[:1], B[:, :1])]
        >>> aggregate(clients, "raflora", levels=[1, 2]).singular_values
        tensor([4., 2.])

    Reference: raFLoRA, Wu, Hu, Min, Wang, arXiv:2602.13486.

    Fidelity: PAPER for weighting by effective contributions, SECOND for the partitions, OURS for
    the carry-over, ``floor``, ``quorum`` and ``weight_cap``.

    Deviations: none known. On the same clients it equals 'rb' at the same rank; the two differ in
    what rounds with absent clients keep, since ``levels`` are the configured ranks. Without
    ``levels=`` the result's rank follows the participants, and shrinks for good once the top
    clients stay away.
    """
    _check_prefix(c)
    levels = _checked_levels(c, levels, previous is not None)
    previous = fitting_state("previous", previous, c)
    share, dropped = guarded_share(
        c, examples(c), floor=floor, quorum=quorum, weight_cap=weight_cap
    )
    combined = carry_over(stack(c, share), c, previous, dropped)
    factors = compress(combined, rank, default=max(levels), split=split)
    return result_of(factors, dropped=dropped)


def _checked_levels(
    c: Components, levels: Sequence[int] | None, has_previous: bool
) -> Sequence[int]:
    if levels is None:
        if has_previous:
            raise InputValueError(
                "raflora: previous= needs levels=, the ranks configured for all clients"
            )
        return c.ranks
    levels = [as_integer(level, "levels=", at_least=1) for level in as_list(levels, "levels=")]
    for id, rank in zip(c.ids, c.ranks, strict=True):
        if rank not in levels and rank:
            raise InputValueError(
                f"raflora: client {id!r} has rank {rank}, not one of the levels "
                f"{sorted(levels)}; add it to levels= or leave the client out"
            )
    return levels


def _check_prefix(c: Components) -> None:
    for id, rank, slots in zip(c.ids, c.ranks, c.slots_by_client, strict=True):
        if set(slots) != set(range(rank)):
            raise InputValueError(
                f"raflora: client {id!r} of rank {rank} fills slots {slots}; partitions are ranges "
                f"of leading slots, so expected 0 to {rank - 1}; use 'rb' for other slots"
            )
