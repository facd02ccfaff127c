"""`fedsa`: A is averaged, B stays with its client, FedSA-LoRA."""

from hetlora_agg.claims import GAUGE, OWNER_AVERAGED, SYMMETRIC
from hetlora_agg.combining import average_factors
from hetlora_agg.components import Components
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, result_of
from hetlora_agg.weighting import examples, guarded_share


@method(
    reference="arXiv:2410.01463",
    claims={k: v for k, v in SYMMETRIC.items() if k != "transpose"}
    | {
        "mixed_ranks": {},
        "consensus": {},
        "statistical_uncorrelated": {},
        "split_client": {},
        "idle_kept": {},
    },
    fails=dict.fromkeys((*OWNER_AVERAGED, *GAUGE, "transpose"), "as-sent owner factor means"),
    client="keep_B",
    unscaled="A",
    sums="factors",
)
def fedsa(c: Components, *, weight_cap: float | None = None) -> AggregationResult:
    """Averages the rows of A over the owners of their slot; every client keeps its own B.

    ``A_g[j] = Σ_{k∈S_j} (n_k / N_j) A_k[j]``. ``B_g`` is averaged likewise, for clients that join
    and for measuring; it replaces nobody's B (``shared == {"A"}``).

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        weight_cap: τ in (0, 1]: no client counts for more than this part of all weight.

    Returns:
        Factors of the largest rank, leading slots for every smaller one; ``shared == {"A"}``.

    Raises:
        InputValueError: a cap outside its range, or one that these clients cannot keep.

    Cost: ``(out + in) R n_slots`` multiply-adds.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> one, three = (ones(1, 2), ones(2, 1)), (3 * ones(1, 2), ones(2, 1))
        >>> result = aggregate([one, three], "fedsa")
        >>> result.A, sorted(result.shared)
        (tensor([[2., 2.]]), ['A'])

    Reference: FedSA-LoRA, Guo, Zeng, Wang, Fan, Wang, Qu, ICLR 2025, arXiv:2410.01463.

    Fidelity: PAPER for equal ranks; OURS for mixed ranks (owners of a slot), ``B_g`` and
    ``weight_cap``.

    Deviations: weighted by examples. A is averaged as sent: the scaling goes whole into B, which
    stays with its client. No floor and no quorum: a row of A that is shrunk or left out would meet
    the client's own B, and a slot beyond a client's rank is not handed to it anyway.
    """
    share, _ = guarded_share(c, examples(c), weight_cap=weight_cap)
    return result_of(average_factors(c, share), shared=frozenset("A"))
