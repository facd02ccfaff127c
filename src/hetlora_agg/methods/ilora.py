"""`ilora`: the exact mean, cut by an unpivoted QR decomposition, ILoRA."""

import torch
from torch import Tensor

from hetlora_agg.checks import check_choice, fitting_state
from hetlora_agg.claims import GAUGE_FREE, STACKED, SYMMETRIC, TRUNCATED
from hetlora_agg.combining import stack
from hetlora_agg.components import Components
from hetlora_agg.compression import Rank, as_rank
from hetlora_agg.errors import OptionValueError
from hetlora_agg.linalg import SPLITS, norms, orthonormal_columns
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import Weighting, weighted_share


@method(
    reference="arXiv:2511.16069",
    claims={k: v for k, v in SYMMETRIC.items() if k not in ("orthogonal", "transpose")}
    | GAUGE_FREE
    | {
        "mixed_ranks": {},
        "exact": {"rank": "full"},
        "split_client": {},
        "zero_component": {"rank": "full"},
        "cohort_equal": {"rank": "full"},
        "cohort_ratio": {"rank": "full"},
        "bounded_share": {},
    },
    fails=dict.fromkeys(
        (*STACKED, *TRUNCATED, "idle_coverage", "orthogonal", "transpose"), "leading columns"
    ),
    client="qr_start",
)
def ilora(
    c: Components,
    *,
    rank: Rank = None,
    initial: LowRank | None = None,
    weighting: Weighting = "examples",
    split: str = "balanced",
) -> AggregationResult:
    """Takes the exact mean of the updates and the leading columns of its unpivoted QR.

    ``ΔW* = Σ p_k (ΔW_k − B_k⁰ A_k⁰) = Q T``, result ``Q[:, :r] T[:r]``.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        rank: None for the largest participating rank, "full" for ``min(R, out, in)`` (with
            ``initial`` its components count too), or an integer.
        initial: what the clients started from, in units of ΔW: ``Q[:, :r], T[:r]`` of the base
            weight, see `clients.qr_start`; client k had the components of its slots. First round
            only: without it the start would be counted into the update.
        weighting: "examples" for ``p_k = n_k / Σ n``, "uniform" for ``1 / K``, or a function that
            returns the clients' coefficients, such as `robustness.geomed`.
        split: "balanced", "left" (the lengths of T's rows in B) or "right" (Q and T themselves).

    Returns:
        Nested factors: the leading r columns and rows are the QR's own rank-r answer.

    Raises:
        InputValueError: a rank that is none, ``initial`` of another shape or too small a rank.

    Cost: ``(out + in) R r`` multiply-adds and the QR of ``out × r``; never out×in.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> A, B = torch.tensor([[3.0, 4.0], [4.0, -3.0]]), torch.eye(2)
        >>> kept = aggregate([(A, B)], "ilora", rank=1).factors.dense()
        >>> kept.abs()  # the first column, and what of the second lies along it: nothing
        tensor([[3.0000, 0.0000],
                [4.0000, 0.0000]])

    Reference: ILoRA, Zhou, Liu, Shang, arXiv:2511.16069.

    Fidelity: SECOND for stacking and the QR, OURS for ``initial``, ``weighting=`` and for taking Q
    from the stacked factors: ``Q[:, :r]`` spans the first r columns of ``ΔW*``,
    ``B_cat (A_cat[:, :r])``.

    Deviations: none known. The cut depends on the order of the input features and is worse than
    the SVD of 'flexlora'. An idle round multiplies row j of T by q_j. Columns that depend on
    earlier ones, such as those of dead inputs, waste a component; ``.notes`` counts them.
    """
    check_choice("split", split, sorted(SPLITS))
    share = weighted_share(c, weighting)
    mean = stack(c, share)
    start = fitting_state("initial", initial, c)
    if start is not None:
        mean = mean.minus(_mean_start(c, start, share))
    width = min(as_rank(rank, default=c.max_rank) or mean.rank, mean.rank, *mean.dense_shape[-2:])
    A, B = mean.A.double(), mean.B.double()
    Q, T = orthonormal_columns(B @ A[..., :width])
    rows = (Q.mT @ B) @ A
    length = norms(rows, -1)
    unit = rows / torch.where(length > 0, length, 1.0).unsqueeze(-1)
    left, right = SPLITS[split](Q, length, unit)
    return result_of(LowRank(right.to(c.A), left.to(c.B)), notes=_wasted(T, c.A.dtype))


def _mean_start(c: Components, start: LowRank, share: Tensor) -> LowRank:
    """``Σ p_k B_k⁰ A_k⁰``: every client had the components of its own slots."""
    if start.rank < c.n_slots:
        raise OptionValueError(
            f"initial=: expected the {c.n_slots} components that the clients started from, got "
            f"{start.rank}"
        )
    covered = (share @ c.slot.mT).to(c.A)
    used = start.select(slice(0, c.n_slots))
    return LowRank(covered.unsqueeze(-1) * used.A, used.B)


def _wasted(T: Tensor, dtype: torch.dtype) -> tuple[str, ...]:
    """A note on leading columns that add nothing, but rounding, to the ones before them."""
    size = T.diagonal(dim1=-2, dim2=-1).abs()
    largest = size.amax(-1, keepdim=True)
    rounding = T.shape[-1] * torch.finfo(dtype).eps * largest
    wasted = int(((size <= rounding) & (largest > 0)).sum())
    if not wasted:
        return ()
    return (f"{wasted} of {size.numel()} leading columns depend on earlier ones and are wasted",)
