"""`median`: entry by entry in the shared core, the middle client."""

from hetlora_agg.claims import ENTRYWISE, GAUGE_FREE, IDLE, SYMMETRIC
from hetlora_agg.components import Components
from hetlora_agg.compression import Rank, compress
from hetlora_agg.core import core, core_bytes
from hetlora_agg.registry import method
from hetlora_agg.robustness.trimming import moderated
from hetlora_agg.types import AggregationResult, result_of
from hetlora_agg.weighting import uniform


@method(
    reference="arXiv:1803.01498",
    claims=SYMMETRIC
    | GAUGE_FREE
    | {
        "mixed_ranks": {},
        "zero_component": {"rank": "full"},
    },
    fails=dict.fromkeys((*ENTRYWISE, *IDLE, "split_client"), "entrywise median"),
    workspace=core_bytes,
)
def median(c: Components, *, rank: Rank = None, split: str = "balanced") -> AggregationResult:
    """Takes the median over clients of every entry, in orthonormal bases that they share.

    ``ΔW_k = U X_k Vᵀ`` with U, V the ordered eigenvectors of ``Σ ΔW_k ΔW_kᵀ`` and
    ``Σ ΔW_kᵀ ΔW_k``; ``ΔW = U median_k(X_k) Vᵀ``, then the SVD to the wanted rank.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        rank: None for the largest participating rank, "full" for no truncation, or an integer.
        split: "balanced", "left" (all of S in B) or "right" (all of S in A).

    Returns:
        Nested factors with their singular values.

    Raises:
        InputValueError: a rank or split that is none.

    Cost: ``3 (out + in) R²`` multiply-adds, SVDs of size R, and several times
    ``K min(R, out) min(R, in)`` numbers per layer: it is for tens of clients, not for hundreds.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> clients = [(ones(1, 1), size * ones(1, 1)) for size in (1.0, 2.0, 900.0)]
        >>> aggregate(clients, "median").factors.dense()
        tensor([[2.0000]])

    Reference: coordinate-wise median, Yin, Chen, Ramchandran, Bartlett, ICML 2018,
    arXiv:1803.01498; the core after Core Space, arXiv:2509.17786.

    Fidelity: PAPER for the rule, OURS for the core's ordered bases.

    Deviations: clients count equally: a weight is a client's own word. A slot that fewer than half
    of the clients own is zero for most, and so is its median. The bases follow the largest
    updates, an attacker's included, up to 10⁹ times the median size: what is larger is
    shortened to that, or it would take the others' digits.
    """
    c = moderated(c)
    shared = core(c, uniform(c))
    X = shared.X.sort(-3).values
    middle = X.shape[-3] - 1
    merged = (X[..., middle // 2, :, :] + X[..., (middle + 1) // 2, :, :]) / 2
    return result_of(compress(shared.back(merged, c.A), rank, default=c.max_rank, split=split))
