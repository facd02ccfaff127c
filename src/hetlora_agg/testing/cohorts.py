"""Theorems of who takes part: expectations over all cohorts of a size, and the share of one client.

A cohort is m of the K clients, all equally likely. Means over cohorts are finite sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from hetlora_agg.testing.trial import Inapplicable, Refuted, Trial
from hetlora_agg.types import ClientUpdate


def cohort(trial: Trial) -> None:
    """Weights ``n_k K / m`` under everybody's denominators: the mean over cohorts is the whole."""
    updates = trial.generic()
    K = len(updates)
    if K == 1:
        raise Inapplicable("cohort", "one client has no cohorts, pass more ranks")
    expected = trial.total(updates)
    everybody = {"total": math.fsum(u.weight for u in updates), "totals": _owned(updates)}
    for m in range(1, K):
        # Horvitz–Thompson: every client takes part with probability m / K.
        sampled = [replace(u, weight=u.weight * K / m) for u in updates]
        runs = [trial.total(list(own), **everybody) for own in combinations(sampled, m)]
        case = f"mean over all cohorts of {m}, weights n_k K / m"
        trial.expect("cohort", case, torch.stack(runs).mean(0), expected, updates)


def cohort_equal(trial: Trial) -> None:
    """At equal weights the mean over cohorts that leave no slot empty is the whole."""
    updates = [replace(u, weight=1.0) for u in trial.generic()]
    expected = trial.total(updates)
    for m in _sizes(trial, "cohort_equal"):
        runs = [trial.total(list(own)) for own in combinations(updates, m)]
        case = f"mean over all cohorts of {m}, equal weights"
        trial.expect("cohort_equal", case, torch.stack(runs).mean(0), expected, updates)


def cohort_ratio(trial: Trial) -> None:
    """``E[R] − whole = −Cov(R, D) / E[D]`` for the cohort's result R and its weight D."""
    updates = trial.generic()
    if len(updates) == 1:
        raise Inapplicable("cohort_ratio", "one client has no cohorts, pass more ranks")
    for m in range(1, len(updates)):
        _ratio(trial, "cohort_ratio", updates, range(len(updates)), m)


def slot_ratio(trial: Trial) -> None:
    """The same slot by slot, with D the weight of the slot's owners that take part."""
    everywhere = trial.generic()
    for m in _sizes(trial, "slot_ratio"):
        for j in range(max(trial.ranks)):
            updates = [_only(trial, u, j) for u in everywhere]
            owners = [k for k, r in enumerate(trial.ranks) if j < r]
            _ratio(trial, "slot_ratio", updates, owners, m)


def bounded_share(trial: Trial) -> None:
    """Against zeros a client moves the result by at most ``p_k ‖s_k B_k A_k‖_F``."""
    updates = trial.generic()
    K = len(updates)
    # Pairs too: of two clients one may own slots alone, which in a large cohort nobody does.
    for own in (*combinations(range(K), min(2, K)), tuple(range(K))):
        whole = math.fsum(updates[k].weight for k in own)
        for k in own:
            u, p = updates[k], updates[k].weight / whole
            against = [updates[i] if i == k else _zero(trial, updates[i]) for i in own]
            moved = float(trial.total(against).norm())
            allowed = p * u.scaling * float((u.B @ u.A).norm())
            if not moved <= allowed * (1 + trial.rtol):
                raise Refuted(
                    "bounded_share",
                    f"a client of rank {u.rank} with {p:.3g} of all weight moves the result by "
                    f"{moved:.4g}, {moved / allowed:.3g} times its share "
                    f"(ranks {[trial.ranks[i] for i in own]})",
                )


def _ratio(
    trial: Trial, claim: str, updates: list[ClientUpdate], counted: range | list[int], m: int
) -> None:
    """``E[D R] = E[D]`` times the whole over cohorts of m, D the weight of those counted."""
    runs: list[Tensor] = []
    weights: list[float] = []
    for own in combinations(range(len(updates)), m):
        runs.append(trial.total([updates[k] for k in own]))
        weights.append(math.fsum(updates[k].weight for k in own if k in counted))
    D = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    R = torch.stack(runs)
    bias = -((D * R).mean(0) - D.mean() * R.mean(0)) / D.mean()
    case = f"bias over all cohorts of {m} against −Cov(R, D) / E[D]"
    trial.expect(claim, case, R.mean(0) - trial.total(updates), bias, updates)


def _sizes(trial: Trial, claim: str) -> Iterator[int]:
    """The sizes of cohorts, below K, in which every slot has an owner whoever takes part."""
    K = len(trial.ranks)
    fewest = sum(r == max(trial.ranks) for r in trial.ranks)
    if fewest == 1:
        why = "a slot with one owner is empty in some cohort, pass the largest rank twice"
        raise Inapplicable(claim, why)
    yield from range(K - fewest + 1, K)


def _owned(updates: list[ClientUpdate]) -> list[float]:
    """``N_j``: the weight of the owners of every slot."""
    width = max(u.A.shape[-2] for u in updates)
    return [math.fsum(u.weight for u in updates if j < u.A.shape[-2]) for j in range(width)]


def _only(trial: Trial, update: ClientUpdate, j: int) -> ClientUpdate:
    """The client with every component but that of slot j zero, in the factor that is its own."""
    keep = (torch.arange(update.A.shape[-2]) == j).double()
    if trial.common == "B":
        return replace(update, A=update.A * keep[:, None])
    return replace(update, B=update.B * keep)


def _zero(trial: Trial, update: ClientUpdate) -> ClientUpdate:
    """The client with nothing but its rank, and the factor that is common to all."""
    A = update.A if trial.common == "A" else 0 * update.A
    return replace(update, A=A, B=update.B if trial.common == "B" else 0 * update.B)
