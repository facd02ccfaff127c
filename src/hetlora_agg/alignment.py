"""Align: change a client's factors without changing its update."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hetlora_agg.checks import check_choice
from hetlora_agg.components import Components
from hetlora_agg.linalg import SPLITS, leading_svd


def own_svd(c: Components) -> Components:
    """Every client's factors replaced by its own thin SVD, balanced, slots in order of σ.

    Makes any method invariant to re-mixing within clients. Cost of one small factored SVD per
    client, batched over clients of equal rank.
    """
    A, B = c.A.clone(), c.B.clone()
    for _, components in c.rank_groups:
        A_sent, B_sent = c.of_clients(components)
        svd = leading_svd(B_sent, A_sent)
        B_own, A_own = SPLITS["balanced"](svd.U, svd.S, svd.Vh)
        r = svd.S.shape[-1]
        # A client's rank may exceed min(out, in): components beyond the thin SVD are zero.
        A[..., components, :] = 0.0
        B.mT[..., components, :] = 0.0
        A[..., components[:, :r], :] = A_own.to(A.dtype)
        B.mT[..., components[:, :r], :] = B_own.mT.to(B.dtype)
    return c.with_factors(A, B)


ALIGNMENTS: Mapping[str | None, Callable[[Components], Components]] = {
    None: lambda c: c,
    "svd": own_svd,
}


def align(c: Components, to: str | None) -> Components:
    """The components aligned by name: None leaves them, "svd" takes each client's own SVD."""
    if to is not None:
        check_choice("align", to, sorted(name for name in ALIGNMENTS if name))
    return ALIGNMENTS[to](c) if c.sums is None else c.sums.aligned(c, to)
