"""`fedask`: two linear sketches whose messages are sums, FedASK."""

from hetlora_agg.checks import as_integer
from hetlora_agg.claims import GAUGE_FREE, STACKED, SYMMETRIC, TRUNCATED
from hetlora_agg.combining import cast_balanced, stack
from hetlora_agg.components import Components
from hetlora_agg.compression import Rank, as_rank, compress
from hetlora_agg.drawing import Generator, normal
from hetlora_agg.linalg import orthonormal_columns
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import Weighting, weighted_share

OVERSAMPLING = 8
"""Columns of the sketch beyond the wanted rank."""


@method(
    reference="arXiv:2507.09990",
    claims={k: v for k, v in SYMMETRIC.items() if k not in ("orthogonal", "transpose")}
    | GAUGE_FREE
    | {
        "mixed_ranks": {},
        "exact": {"rank": "full"},
        "split_client": {},
        "zero_component": {"rank": "full"},
        "idle_coverage": {},
        "cohort_equal": {"rank": "full"},
        "cohort_ratio": {"rank": "full"},
        "bounded_share": {},
    },
    fails=dict.fromkeys((*STACKED, *TRUNCATED, "orthogonal", "transpose"), "sketch"),
    sums="sketches",
)
def fedask(
    c: Components,
    *,
    rank: Rank = None,
    sketch: int | None = None,
    generator: Generator | None = None,
    weighting: Weighting = "examples",
    split: str = "balanced",
) -> AggregationResult:
    """Sketches the exact mean twice with messages that are plain sums over clients.

    ``Ȳ = Σ p_k B_k (A_k Ω)``, ``Q = qr(Ȳ)``, ``P̄ = Σ p_k (B_k A_k)ᵀ Q``, then the SVD of
    ``Q P̄ᵀ``. Ȳ and P̄ have one size whatever the ranks: they fit secure aggregation and hide who
    has which rank.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        rank: None for the largest participating rank, "full" for no truncation, or an integer.
        sketch: columns of the Gaussian Ω; None is the rank and 8 more.
        generator: draws Ω; None takes one Ω from seed 0 for every layer and in every call.
        weighting: "examples" for ``p_k = n_k / Σ n``, "uniform" for ``1 / K``, or a function that
            returns the clients' coefficients, such as `robustness.geomed`.
        split: "balanced", "left" (all of S in B) or "right" (all of S in A).

    Returns:
        Nested factors with their singular values. Their certificate is that of the sketched
        matrix ``Q P̄ᵀ``: `diagnose` tells the distance from the exact mean.

    Raises:
        InputValueError: a rank or a sketch that is none, a sketch smaller than the rank.

    Cost: ``2 (out + in) R sketch`` multiply-adds and the QR of ``out × sketch``.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> A, B = torch.diag(torch.tensor([4.0, 2.0])), torch.eye(2)
        >>> aggregate([(A, B), (A[:1], B[:, :1])], "fedask").singular_values
        tensor([4., 1.])

    Reference: FedASK, arXiv:2507.09990.

    Fidelity: CODE for both stages; OURS for weights by examples and ``weighting=``.

    Deviations: the noise that FedASK adds for differential privacy is the caller's. Exact once
    sketch and rank reach the rank of the mean, which can be R. The clients' messages by themselves
    are `clients.sketch` and `clients.project`.
    """
    mean = stack(c, weighted_share(c, weighting))
    largest = min(mean.rank, *mean.dense_shape[-2:])
    wanted = min(as_rank(rank, default=c.max_rank) or largest, largest)
    width = min(wanted + OVERSAMPLING, largest)
    if sketch is not None:
        width = min(as_integer(sketch, "sketch=", at_least=wanted), largest)
    omega = normal(c, generator, mean.in_features, width)
    A, B = mean.A.double(), mean.B.double()
    Q, _ = orthonormal_columns(B @ (A @ omega))
    sketched = cast_balanced(LowRank((Q.mT @ B) @ A, Q), c.A)
    return result_of(compress(sketched, wanted, split=split))
