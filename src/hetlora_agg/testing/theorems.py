"""One theorem for each claim, stated on dense float64 matrices; here those of what is estimated.

Expectations are finite sums over all sign patterns, orders are all permutations: a verdict never
depends on luck. Nothing here uses the library's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product

import torch
from torch import Tensor

from hetlora_agg.errors import InputTypeError, InputValueError, unknown_name
from hetlora_agg.testing import cohorts, symmetries
from hetlora_agg.testing.trial import Inapplicable, Refuted, Trial, mean_of
from hetlora_agg.types import AggregationResult, ClientUpdate, LowRank


def mixed_ranks(trial: Trial) -> None:
    """Clients of different ranks give a finite matrix of their size."""
    if len(set(trial.ranks)) == 1:
        raise Inapplicable("mixed_ranks", "the trial's clients have equal ranks, pass others")
    updates = trial.generic()
    try:
        found = trial.total(updates)
    except (ValueError, RuntimeError) as error:
        raise Refuted("mixed_ranks", f"the aggregator raised {error!r}") from error
    if found.shape != (trial.out, trial.columns) or not bool(torch.isfinite(found).all()):
        raise Refuted("mixed_ranks", f"got shape {tuple(found.shape)}, or entries not finite")


def exact(trial: Trial) -> None:
    """The total is ``Σ p_k s_k B_k A_k``."""
    updates = trial.generic()
    trial.expect("exact", "generic clients", trial.total(updates), mean_of(updates), updates)


def consensus(trial: Trial) -> None:
    """If all owners of slot j send ``b_j a_j``, the result is ``Σ_j b_j a_j``."""
    r, K = max(trial.ranks), len(trial.ranks)
    b, a = trial.randn(trial.out, r), trial.randn(r, trial.columns)
    updates = trial.agreeing([b] * K, [a] * K)
    trial.expect("consensus", "all owners agree", trial.total(updates), b @ a, updates)


def statistical(trial: Trial) -> None:
    """``E[total] = Σ_j M_j`` for components ``M_j`` + zero-mean noise, A and B correlated."""
    r, K = max(trial.ranks), len(trial.ranks)
    b, a = trial.randn(trial.out, r), trial.randn(r, trial.columns)
    e, f = trial.randn(trial.out, r) / 2, trial.randn(r, trial.columns) / 2
    # Client k's noise is ±(e c_k, f / c_k): sizes differ, the mean component b a + e f does not.
    sizes = [1.0 + k / 2 for k in range(K)]
    runs = [
        trial.agreeing(
            [trial.noisy(b, s * c * e, "B") for s, c in zip(signs, sizes, strict=True)],
            [trial.noisy(a, s / c * f, "A") for s, c in zip(signs, sizes, strict=True)],
        )
        for signs in product((-1, 1), repeat=K)
    ]
    _expect_mean(trial, "statistical", runs, b @ a + (e @ f if trial.common is None else 0))


def statistical_uncorrelated(trial: Trial) -> None:
    """The same with independent signs on A and on B: then the mean component is ``b_j a_j``."""
    r, K = max(trial.ranks), len(trial.ranks)
    b, a = trial.randn(trial.out, r), trial.randn(r, trial.columns)
    e = [trial.randn(trial.out, r) / 2 for _ in range(K)]
    f = [trial.randn(r, trial.columns) / 2 for _ in range(K)]
    runs = [
        trial.agreeing(
            [trial.noisy(b, s * x, "B") for s, x in zip(signs[:K], e, strict=True)],
            [trial.noisy(a, s * y, "A") for s, y in zip(signs[K:], f, strict=True)],
        )
        for signs in product((-1, 1), repeat=2 * K)
    ]
    _expect_mean(trial, "statistical_uncorrelated", runs, b @ a)


def idle_kept(trial: Trial) -> None:
    """An idle round keeps every singular value."""
    _idle(trial, "idle_kept", lambda q: torch.ones_like(q))


def idle_coverage(trial: Trial) -> None:
    """An idle round multiplies singular value j by ``q_j``."""
    _idle(trial, "idle_coverage", lambda q: q)


def idle_coverage_squared(trial: Trial) -> None:
    """An idle round multiplies singular value j by ``q_j²``."""
    _idle(trial, "idle_coverage_squared", lambda q: q**2)


def _idle(trial: Trial, claim: str, multiplier: Callable[[Tensor], Tensor]) -> None:
    """Every client sends back the leading slots of a global result as it received them."""
    r, K, q = max(trial.ranks), len(trial.ranks), trial.coverage()
    if claim != "idle_kept" and bool((q == 1).all()):
        raise Inapplicable(claim, "every slot is owned by all clients, pass mixed ranks")
    U, V = trial.orthogonal(trial.out)[:, :r], trial.orthogonal(trial.columns)[:r]
    # Apart enough for an SVD to tell them apart; multipliers that never rise keep the order.
    S = 2.0 ** -torch.arange(r, dtype=torch.float64)
    # The global result of an earlier round: what the aggregator makes of one client with it all.
    last = LowRank(S.sqrt()[:, None] * V, U * S.sqrt())
    result = trial.run([ClientUpdate(last.A, last.B, r, 1.0)])
    if isinstance(result, AggregationResult):
        if not result.nested and not result.slotted:
            raise Inapplicable(claim, "the result is not nested, clients cannot be handed a slice")
        result = result.factors
    if isinstance(result, LowRank):
        last = result
    updates = trial.agreeing([last.B] * K, [last.A] * K)
    found = trial.total(updates, previous=last)
    trial.expect(claim, "an idle round", found, (U * (S * multiplier(q))) @ V, updates)


def _expect_mean(
    trial: Trial, claim: str, runs: list[list[ClientUpdate]], expected: Tensor
) -> None:
    """The mean over all equally likely runs is the expectation, exactly."""
    mean = torch.stack([trial.total(updates) for updates in runs]).mean(0)
    trial.expect(claim, f"mean over all {len(runs)} sign patterns", mean, expected, runs[0])


THEOREMS: Mapping[str, Callable[[Trial], None]] = {
    theorem.__name__: theorem
    for theorem in (
        mixed_ranks,
        exact,
        consensus,
        statistical,
        statistical_uncorrelated,
        cohorts.cohort,
        cohorts.cohort_equal,
        cohorts.cohort_ratio,
        cohorts.slot_ratio,
        cohorts.bounded_share,
        symmetries.order,
        symmetries.split_client,
        symmetries.rescaling,
        symmetries.homogeneous,
        symmetries.orthogonal,
        symmetries.transpose,
        symmetries.single_client,
        symmetries.absent,
        symmetries.layers,
        symmetries.gauge,
        symmetries.component_scale,
        symmetries.component_order,
        symmetries.zero_component,
        idle_kept,
        idle_coverage,
        idle_coverage_squared,
    )
}
"""Claim -> its theorem, for every claim in ``hetlora_agg.CLAIMS``."""


def known_claims(aggregator: object, claims: str | Iterable[str], what: str) -> list[str]:
    """The claims by name, once they are known and the aggregator is a function."""
    listed = [claims] if isinstance(claims, str) else list(claims)
    if not callable(aggregator):
        raise InputTypeError(
            f"{what}: expected a function of updates, got {aggregator!r}; a method goes in as "
            "partial(aggregate, method=…)"
        )
    if not listed:
        raise InputValueError(f"{what}: expected at least one claim; known: {sorted(THEOREMS)}")
    for claim in listed:
        if claim not in THEOREMS:
            raise InputValueError(unknown_name("claim", claim, THEOREMS))
    return listed
