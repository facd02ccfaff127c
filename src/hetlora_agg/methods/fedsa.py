"""`fedsa`: A is averaged, B stays with its client, FedSA-LoRA."""

from hetlora_agg.combining import average_factors
from hetlora_agg.components import Components
from hetlora_agg.registry import SYMMETRIC, method
from hetlora_agg.types import AggregationResult, result_of
from hetlora_agg.weighting import examples, slot_share


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
    client="keep_B",
    unscaled="A",
)
def fedsa(c: Components) -> AggregationResult:
    """Averages the rows of A over the owners of their slot; every client keeps its own B.

    ``A_g[j] = Σ_{k∈S_j} (n_k / N_j) A_k[j]``. ``B_g`` is averaged likewise, for clients that join
    and for measuring; it replaces nobody's B (``shared == {"A"}``).

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.

    Returns:
        Factors of the largest rank, leading slots for every smaller one; ``shared == {"A"}``.

    Cost: ``(out + in) R n_slots`` multiply-adds.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> one, three = (ones(1, 2), ones(2, 1)), (3 * ones(1, 2), ones(2, 1))
        >>> result = aggregate([one, three], "fedsa")
        >>> result.A, sorted(result.shared)
        (tensor([[2., 2.]]), ['A'])

    Reference: FedSA-LoRA, Guo, Zeng, Wang, Fan, Wang, Qu, ICLR 2025, arXiv:2410.01463.

    Fidelity: PAPER for equal ranks; OURS for mixed ranks (owners of a slot) and for ``B_g``.

    Deviations: weighted by examples. A is averaged as sent: the scaling goes whole into B, which
    stays with its client.
    """
    return result_of(average_factors(c, slot_share(c, examples(c))), shared=frozenset("A"))
