"""`flexlora`: the best low-rank approximation of the exact mean."""

from hetlora_agg.checks import check_flag
from hetlora_agg.claims import GAUGE_FREE, STACKED, SYMMETRIC, TRUNCATED
from hetlora_agg.combining import stack
from hetlora_agg.components import Components
from hetlora_agg.compression import Rank, compress, divide
from hetlora_agg.errors import OptionValueError
from hetlora_agg.reduction import Offset
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, result_of
from hetlora_agg.weighting import Weighting, weighted_share


@method(
    reference="arXiv:2402.11505",
    claims=SYMMETRIC
    | GAUGE_FREE
    | {
        "mixed_ranks": {},
        "exact": {"rank": "full"},
        "split_client": {},
        "zero_component": {"rank": "full"},
        "idle_coverage": {},
        "cohort": {"rank": "full"},
        "cohort_equal": {"rank": "full"},
        "cohort_ratio": {"rank": "full"},
        "bounded_share": {},
    },
    fails=dict.fromkeys((*STACKED, *TRUNCATED), "cut stack"),
    sums="products",
)
def flexlora(
    c: Components,
    *,
    rank: Rank = None,
    energy: float | None = None,
    fold_rest: bool = False,
    weighting: Weighting = "examples",
    total: float | None = None,
    split: str = "balanced",
    reduction: str = "truncate",
    u: Offset | None = None,
) -> AggregationResult:
    """Takes the exact mean of the updates and its best approximation of the wanted rank.

    ``ΔW* = Σ p_k s_k B_k A_k = U S Vᵀ``, factors ``U_r √S_r`` and ``√S_r V_rᵀ``.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        rank: None for the largest participating rank, "full" for no truncation, or an integer.
        energy: τ in (0, 1]: the smallest rank whose squared singular values reach the share τ, per
            layer; ``rank`` caps it if given.
        fold_rest: hand all discarded components back as ``residual``: then the total is exact.
        weighting: "examples" for ``p_k = n_k / Σ n``, "uniform" for ``1 / K``, or a function that
            returns the clients' coefficients, such as `robustness.geomed`.
        total: the denominator of "examples" in place of ``Σ n``: with the weight of all clients,
            whoever takes part, and weights ``n_k / π_k`` a cohort's result is unbiased for
            everybody's (Horvitz-Thompson), with ``rank="full"``.
        split: "balanced", "left" (all of S in B) or "right" (all of S in A).
        reduction: "truncate", or "unbiased" for a draw of that rank whose expectation over u is
            ``ΔW*``, see `reduction.unbiased_truncate`.
        u: uniform on [0, 1), for "unbiased" only: a number, or one per layer ``(*layers,)``. Drawn
            anew every round, or the error of one round is that of all.

    Returns:
        Nested factors with their singular values; those of a draw are not nested.

    Raises:
        InputValueError: a rank, energy, split, reduction or u that is none; a draw together with
            ``energy``, ``fold_rest`` or ``rank="full"``.

    Cost: one factored SVD of R components, see `linalg.svd_product`; never out×in.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> A, B = torch.diag(torch.tensor([4.0, 2.0])), torch.eye(2)
        >>> aggregate([(A, B), (A[:1], B[:, :1])], "flexlora").singular_values
        tensor([4., 1.])

    Reference: FlexLoRA, Bai et al., NeurIPS 2024, arXiv:2402.11505; the same estimator is HLoRA,
    arXiv:2503.00813. ``energy=`` is FLoRIST's rule, arXiv:2506.09199; the draw is arXiv:2505.09647.

    Fidelity: CODE for the estimator, OURS for ``fold_rest`` (after FedMomentum's idea), for
    ``reduction="unbiased"``, ``weighting=`` and ``total=``.

    Deviations: none in exact arithmetic; the dense matrix is not formed.
    """
    check_flag("fold_rest", fold_rest)
    mean = stack(c, weighted_share(c, weighting, total))
    if not fold_rest:
        kept = compress(
            mean,
            rank,
            default=c.max_rank,
            energy=energy,
            split=split,
            reduction=reduction,
            u=u,
        )
        return result_of(kept, nested=reduction == "truncate")
    if reduction != "truncate" or u is not None:
        raise OptionValueError(
            "fold_rest=: the total is exact, so that there is nothing to draw; leave out "
            "reduction= and u="
        )
    whole = compress(mean, "full", split=split)
    factors, residual = divide(whole, rank, default=c.max_rank, energy=energy)
    return result_of(factors, residual=residual)
