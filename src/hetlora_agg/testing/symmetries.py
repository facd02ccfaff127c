"""Theorems of the symmetries: what may be changed about clients without changing the result."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import torch

from hetlora_agg.testing.trial import Inapplicable, Refuted, Trial, mean_of
from hetlora_agg.types import ClientUpdate, LowRank


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
        trial.expect("single_client", case, trial.total([update]), mean_of([update]), [update])


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


def component_scale(trial: Trial) -> None:
    """``b_j d_j, a_j / d_j`` for nonzero numbers d_j of either sign changes nothing."""
    _needs_free_factors(trial, "component_scale")
    updates = trial.generic()
    # The first run changes nothing but signs: sizes that cancel do not hide them.
    for base in (1.0, 4.0):
        scaled = []
        for k, u in enumerate(updates):
            steps = torch.arange(u.A.shape[-2], dtype=torch.float64)
            d = torch.where((steps + k) % 2 == 0, -1.0, 1.0) * base ** ((steps + k) % 3 - 1)
            scaled.append(replace(u, A=u.A / d[:, None], B=u.B * d))
        found, expected = trial.total(scaled), trial.total(updates)
        case = "components rescaled within clients" if base > 1 else "signs of components changed"
        trial.expect("component_scale", case, found, expected, updates)


def component_order(trial: Trial) -> None:
    """Another order of any one client's components changes nothing."""
    _needs_free_factors(trial, "component_order")
    updates = trial.generic()
    found = trial.total(updates)
    for k, u in enumerate(updates):
        orders = (u.A.flip(-2), u.B.flip(-1)), (u.A.roll(1, -2), u.B.roll(1, -1))
        for A, B in orders:
            turned = [*updates[:k], replace(u, A=A, B=B), *updates[k + 1 :]]
            case = f"components of client {k} in another order"
            trial.expect("component_order", case, trial.total(turned), found, updates)


def absent(trial: Trial) -> None:
    """A client of weight 0, of whatever rank and wherever it stands, changes nothing."""
    largest = max(trial.ranks)
    for rank in sorted({1, min(largest + 1, trial.out, trial.columns)}):
        own = ClientUpdate(
            trial.randn(rank, trial.columns), trial.randn(trial.out, rank), rank, 0.0, 2.0
        )
        *updates, own = trial.sharing([*trial.generic(), own])
        found = trial.total(updates)
        for k in range(len(updates) + 1):
            longer = [*updates[:k], own, *updates[k:]]
            case = f"a client of weight 0 and rank {rank} at position {k}"
            trial.expect("absent", case, trial.total(longer), found, updates)


def layers(trial: Trial) -> None:
    """Layers stacked on a leading dimension give each its own result."""
    # Every client is large in another layer: shares taken over all layers together are not its own.
    sizes = [[10.0 ** ((k + i) % 2) for k in range(len(trial.ranks))] for i in range(2)]
    apart = [
        [_times(trial, u, size) for u, size in zip(trial.generic(), of_layer, strict=True)]
        for of_layer in sizes
    ]
    rank = max(trial.ranks)
    last = [LowRank(trial.randn(rank, trial.columns), trial.randn(trial.out, rank)) for _ in sizes]
    if trial.common == "A":
        last = [replace(p, A=trial.largest(us).A) for p, us in zip(last, apart, strict=True)]
    expected = [trial.total(us, previous=p) for us, p in zip(apart, last, strict=True)]
    together = [
        replace(own[0], A=torch.stack([u.A for u in own]), B=torch.stack([u.B for u in own]))
        for own in zip(*apart, strict=True)
    ]
    state = LowRank(torch.stack([p.A for p in last]), torch.stack([p.B for p in last]))
    try:
        found = trial.total(together, previous=state)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        why = f"factors with a leading dimension: the aggregator raised {error!r}"
        raise Refuted("layers", why) from error
    trial.expect("layers", "two layers at once", found, torch.stack(expected), together)


def _times(trial: Trial, update: ClientUpdate, size: float) -> ClientUpdate:
    """The update times a number, in the factor that is the client's own."""
    if trial.common == "B":
        return replace(update, A=size * update.A)
    return replace(update, B=size * update.B)


def _needs_free_factors(trial: Trial, claim: str) -> None:
    """Some claims change what a common factor may not."""
    if trial.common is not None:
        raise Inapplicable(claim, f"{trial.common} is one and the same on all clients")
