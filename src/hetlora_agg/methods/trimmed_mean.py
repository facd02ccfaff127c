"""`trimmed_mean`: entry by entry in the shared core, the extreme clients left out."""

import math

from hetlora_agg.checks import as_number
from hetlora_agg.claims import ENTRYWISE, GAUGE_FREE, IDLE, SYMMETRIC
from hetlora_agg.components import Components
from hetlora_agg.compression import Rank, compress
from hetlora_agg.core import core_bytes
from hetlora_agg.errors import OptionValueError
from hetlora_agg.registry import method
from hetlora_agg.robustness import trimmed_core
from hetlora_agg.types import AggregationResult, result_of

TRIM = 0.25
"""Share of the clients that is left out at either end unless the caller says otherwise."""


@method(
    reference="arXiv:1803.01498",
    claims=SYMMETRIC
    | GAUGE_FREE
    | {
        "mixed_ranks": {},
        "zero_component": {"rank": "full"},
    },
    fails=dict.fromkeys((*ENTRYWISE, *IDLE, "split_client"), "entrywise trimmed mean"),
    workspace=core_bytes,
)
def trimmed_mean(
    c: Components,
    *,
    trim: float | None = None,
    f: int | None = None,
    rank: Rank = None,
    split: str = "balanced",
) -> AggregationResult:
    """Leaves out the smallest and largest clients of every entry, in bases that all share.

    ``ΔW_k = U X_k Vᵀ`` with U, V the ordered eigenvectors of ``Σ ΔW_k ΔW_kᵀ`` and
    ``Σ ΔW_kᵀ ΔW_k``; of the K values of an entry the f at either end are left out, ``⌊trim K⌋``
    unless f is given, and the others averaged; then the SVD to the wanted rank.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        trim: share of the clients left out at either end, in [0, 1/2); None is a quarter.
        f: number of the clients left out at either end, K > 2f; takes the place of ``trim``.
        rank: None for the largest participating rank, "full" for no truncation, or an integer.
        split: "balanced", "left" (all of S in B) or "right" (all of S in A).

    Returns:
        Nested factors with their singular values; ``.notes`` says so if nobody was left out.

    Raises:
        InputValueError: a trim outside [0, 1/2), K ≤ 2f, both of them given, a rank or split that
            is none.

    Cost: ``3 (out + in) R²`` multiply-adds, SVDs of size R, and several times
    ``K min(R, out) min(R, in)`` numbers per layer: it is for tens of clients, not for hundreds.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> clients = [(ones(1, 1), size * ones(1, 1)) for size in (-70.0, 1.0, 2.0, 900.0)]
        >>> aggregate(clients, "trimmed_mean").factors.dense()
        tensor([[1.5000]])

    Reference: coordinate-wise trimmed mean, Yin, Chen, Ramchandran, Bartlett, ICML 2018,
    arXiv:1803.01498; the core after Core Space, arXiv:2509.17786.

    Fidelity: PAPER for the rule, OURS for the core's ordered bases.

    Deviations: clients count equally: a weight is a client's own word. The bases follow the
    largest updates, an attacker's included, up to 10⁹ times the median size: what is larger
    is shortened to that, or it would take the others' digits.
    """
    cut, notes = _share(trim, len(c.ranks)) if f is None else (f, ())
    if f is not None and trim is not None:
        raise OptionValueError(f"f=: expected f= or trim=, got f={f!r} and trim={trim!r}")
    kept = compress(trimmed_core(c, cut), rank, default=c.max_rank, split=split)
    return result_of(kept, notes=notes)


def _share(trim: float | None, clients: int) -> tuple[int, tuple[str, ...]]:
    """How many clients that share is at either end, and a note if it is none."""
    share = TRIM if trim is None else as_number(trim, "trim=", zero=True)
    if share >= 0.5:
        raise OptionValueError(f"trim=: expected a share in [0, 0.5), got {trim!r}")
    # 0.29 of 100 is 29, though not in binary.
    cut = math.floor(round(share * clients, 9))
    none = share > 0 and cut == 0
    return cut, (f"trim={share:g}: of {clients} clients none was left out",) * none
