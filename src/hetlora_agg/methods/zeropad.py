"""`zeropad`: averages of zero-padded factors."""

from hetlora_agg.claims import SYMMETRIC, ZERO_PADDED
from hetlora_agg.combining import average_factors
from hetlora_agg.components import Components
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, result_of
from hetlora_agg.weighting import Weighting, weighted_share


@method(
    reference="acl:2026.findings-eacl.88",
    claims=SYMMETRIC
    | {
        "mixed_ranks": {},
        "split_client": {},
        "zero_component": {},
        "idle_coverage_squared": {},
        "bounded_share": {},
    },
    fails=dict.fromkeys(ZERO_PADDED, "factor means"),
    sums="factors",
)
def zeropad(c: Components, *, weighting: Weighting = "examples") -> AggregationResult:
    """Averages zero-padded A's and B's apart: the uniform and weighted zero-padding baselines.

    ``A_g = Σ w_k pad(A_k)``, ``B_g = Σ w_k pad(B_k)``, ``w_k = n_k / Σ n`` or ``1 / K``.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        weighting: "examples" for ``w_k = n_k / Σ n``, "uniform" for ``w_k = 1 / K``, or a
            function that returns the clients' coefficients. A rule against bad clients bounds
            nothing here: it sees ``B_k A_k``, which a client can write in factors of any size.

    Returns:
        Factors of the largest rank, leading slots for every smaller one.

    Raises:
        InputValueError: an unknown weighting.

    Cost: ``(out + in) R n_slots`` multiply-adds.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> small, large = (ones(1, 2), ones(2, 1)), (ones(2, 2), ones(2, 2))
        >>> aggregate([small, large], "zeropad").B[0]  # slot 1 is halved, in both factors
        tensor([1.0000, 0.5000])

    Reference: the "HETLoRA" baselines of RB-LoRA's release, acl:2026.findings-eacl.88.

    Fidelity: CODE, OURS for functions as ``weighting=``.

    Deviations: none.
    """
    return result_of(average_factors(c, weighted_share(c, weighting)))
