"""One theorem for each claim, stated on dense float64 matrices.

Expectations are finite sums over all sign patterns, orders are all permutations: a verdict never
depends on luck. Nothing here uses the library's own arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations, product

import torch
from torch import Tensor

from hetlora_agg.testing.trial import Inapplicable, Refuted, Trial
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
    trial.expect("exact", "generic clients", trial.total(updates), _mean(updates), updates)


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


def order(trial: Trial) -> None:
    """Every permutation of the clients gives the same."""
    updates = trial.generic()
    found = trial.total(updates)
    for shuffled in permutations(updates):
        trial.expect("order", "clients permuted", trial.total(list(shuffled)), found, updates)


def split_client(trial: Trial) -> None:
    """Any one client split into two of half its weight changes nothing."""
    updates = trial.generic()
    found = trial.total(updates)
    for k, update in enumerate(updates):
        half = replace(update, weight=update.weight / 2)
        split = [*updates[:k], half, half, *updates[k + 1 :]]
        trial.expect("split_client", f"client {k} split", trial.total(split), found, updates)


def rescaling(trial: Trial) -> None:
    """All weights times one number changes nothing."""
    updates = trial.generic()
    found = trial.total(updates)
    for c in (3.0, 1e-6, 1e9):
        scaled = [replace(u, weight=c * u.weight) for u in updates]
        trial.expect("rescaling", f"weights times {c}", trial.total(scaled), found, updates)


def homogeneous(trial: Trial) -> None:
    """``c B_k`` for every client gives ``c`` times the result."""
    updates = trial.generic()
    found = trial.total(updates)
    for c in (-1.0, 0.25, 100.0):
        scaled = [replace(u, B=c * u.B) for u in updates]
        trial.expect("homogeneous", f"B times {c}", trial.total(scaled), c * found, scaled)


def orthogonal(trial: Trial) -> None:
    """``U B_k, A_k V`` for orthogonal U, V gives ``U W V``."""
    updates = trial.generic()
    U, V = trial.orthogonal(trial.out), trial.orthogonal(trial.columns)
    # A product of fewer rows need not round as one of more: what is common is made so again.
    turned = trial.sharing([replace(u, A=u.A @ V, B=U @ u.B) for u in updates])
    expected = U @ trial.total(updates) @ V
    trial.expect("orthogonal", "inputs and outputs turned", trial.total(turned), expected, updates)


def transpose(trial: Trial) -> None:
    """``A_kᵀ, B_kᵀ`` in place of ``B_k, A_k`` gives ``Wᵀ``."""
    _needs_free_factors(trial, "transpose")
    updates = trial.generic()
    turned = [replace(u, A=u.B.mT, B=u.A.mT) for u in updates]
    expected = trial.total(updates).mT
    trial.expect("transpose", "A and B exchanged", trial.total(turned), expected, updates)


def single_client(trial: Trial) -> None:
    """One client alone gets ``s_k B_k A_k`` back, whatever its weight and rank."""
    for update in trial.generic():
        case = f"one client of rank {update.rank}"
        trial.expect("single_client", case, trial.total([update]), _mean([update]), [update])


def gauge(trial: Trial) -> None:
    """``B_k G_k, G_k⁻¹ A_k`` for invertible G_k changes nothing."""
    _needs_free_factors(trial, "gauge")
    updates = trial.generic()
    mixed = []
    for u in updates:
        # Singular values 1/2 to 2: far from orthogonal, well conditioned.
        r = u.A.shape[-2]
        d = 2.0 ** torch.linspace(-1, 1, r, dtype=torch.float64)
        left, right = trial.orthogonal(r), trial.orthogonal(r)
        G, G_inv = (left * d) @ right, (right.mT / d) @ left.mT
        mixed.append(replace(u, A=G_inv @ u.A, B=u.B @ G))
    found, expected = trial.total(mixed), trial.total(updates)
    trial.expect("gauge", "components re-mixed within clients", found, expected, updates)


def zero_component(trial: Trial) -> None:
    """A zero component appended to any one client changes nothing."""
    updates = trial.generic()
    found = trial.total(updates)
    for k, u in enumerate(updates):
        r = u.A.shape[-2]
        row, column = u.A.new_zeros(1, trial.columns), u.B.new_zeros(trial.out, 1)
        # Where a factor is common, its next slot cannot be zero: the other one is.
        if trial.common == "A":
            row = torch.cat([trial.largest(updates).A, row])[r : r + 1]
        if trial.common == "B":
            column = torch.cat([trial.largest(updates).B, column], dim=-1)[:, r : r + 1]
        A, B = torch.cat([u.A, row]), torch.cat([u.B, column], dim=-1)
        longer = [*updates[:k], replace(u, A=A, B=B, rank=r + 1), *updates[k + 1 :]]
        case = f"client {k} with a zero component"
        trial.expect("zero_component", case, trial.total(longer), found, updates)


def idle_kept(trial: Trial) -> None:
    """An idle round keeps every singular value."""
    _idle(trial, "idle_kept", lambda q: torch.ones_like(q))


def idle_coverage(trial: Trial) -> None:
    """An idle round multiplies singular value j by ``q_j``."""
    _idle(trial, "idle_coverage", lambda q: q)


def idle_coverage_squared(trial: Trial) -> None:
    """An idle round multiplies singular value j by ``q_j²``."""
    _idle(trial, "idle_coverage_squared", lambda q: q**2)


def _needs_free_factors(trial: Trial, claim: str) -> None:
    """Some claims change what a common factor may not."""
    if trial.common is not None:
        raise Inapplicable(claim, f"{trial.common} is one and the same on all clients")


def _idle(trial: Trial, claim: str, multiplier: Callable[[Tensor], Tensor]) -> None:
    """Every client sends back the leading slots of a global result as it received them."""
    r, K, q = max(trial.ranks), len(trial.ranks), trial.coverage()
    if claim != "idle_kept" and bool((q == 1).all()):
        raise Inapplicable(claim, "every slot is owned by all clients, pass mixed ranks")
    U, V = trial.orthogonal(trial.out)[:, :r], trial.orthogonal(trial.columns)[:r]
    # Far enough apart that the multipliers, all in (0, 1], do not change the order.
    S = 100.0 ** -torch.arange(r, dtype=torch.float64)
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
    found = trial.total(updates, last)
    trial.expect(claim, "an idle round", found, (U * (S * multiplier(q))) @ V, updates)


def _mean(updates: Sequence[ClientUpdate]) -> Tensor:
    """``Σ p_k s_k B_k A_k``, densely and without the library."""
    whole = math.fsum(u.weight for u in updates)
    terms: Iterator[Tensor] = (u.weight / whole * u.scaling * (u.B @ u.A) for u in updates)
    return torch.stack(list(terms)).sum(0)


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
        order,
        split_client,
        rescaling,
        homogeneous,
        orthogonal,
        transpose,
        single_client,
        gauge,
        zero_component,
        idle_kept,
        idle_coverage,
        idle_coverage_squared,
    )
}
"""Claim -> its theorem, for every claim in ``hetlora_agg.CLAIMS``."""
