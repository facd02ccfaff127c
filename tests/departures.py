"""What a method computes where a claim is false: the formulas of ``DEPARTURES``, dense, float64.

Every function takes the clients of one layer and what was known of the call, and gives the matrix.
Those of rules that pick entries, bases or rotations are the methods' own oracles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import reference_slots
import reference_spaces
from reference import (
    Client,
    Factors,
    Matrix,
    best_rank,
    component,
    coverage,
    fold,
    fractions,
    owners,
    padded,
    slot_count,
)


@dataclass(frozen=True)
class Call:
    """What surrounds one layer's clients.

    Attributes:
        method: whose formula it is, where one name stands for a mass and a form.
        clients: the clients with all their layers.
        layer: index of this layer.
        previous: factors (A, B) of all layers that the trial handed on, or None.
        total: the fixed denominator handed on, or None.
        totals: the fixed denominators of the slots handed on, or None.
    """

    method: str
    clients: Sequence[Client]
    layer: tuple[int, ...] = ()
    previous: Factors | None = None
    total: float | None = None
    totals: Sequence[float] | None = None

    def earlier(self) -> Factors | None:
        """This layer's previous factors."""
        return None if self.previous is None else tuple(X[self.layer] for X in self.previous)


def largest(clients: Sequence[Client]) -> int:
    """max r_k."""
    return max(client.rank for client in clients)


def mean_of_products(clients: Sequence[Client], w: Sequence[float]) -> Matrix:
    """Σ w_k ΔW_k."""
    return np.sum([w_k * c.update() for w_k, c in zip(w, clients, strict=True)], axis=0)


def less_cross_terms(pairs: Sequence[Factors], w: Sequence[float]) -> Matrix:
    """Σ_k w_k B_k A_k − ½ Σ_kl w_k w_l (B_k − B_l)(A_k − A_l), for w that sum to 1."""
    assert math.isclose(math.fsum(w), 1.0, rel_tol=1e-12)
    W = np.sum([w_k * (B @ A) for w_k, (A, B) in zip(w, pairs, strict=True)], axis=0)
    for w_k, (A_k, B_k) in zip(w, pairs, strict=True):
        for w_l, (A_l, B_l) in zip(w, pairs, strict=True):
            W = W - w_k * w_l / 2 * ((B_k - B_l) @ (A_k - A_l))
    return W


def padded_means(clients: Sequence[Client], w: Sequence[float]) -> Matrix:
    """The same with zero-padded factors, the root of the scaling in both."""
    clients = fold(clients)
    width = slot_count(clients)
    return less_cross_terms([padded(client, width) for client in clients], w)


Shares = Callable[[int, Sequence[Client]], Sequence[float]]


def slot_means(clients: Sequence[Client], shares: Shares) -> Matrix:
    """The same slot by slot, over its owners."""
    W = 0.0
    for j in range(slot_count(clients)):
        S_j = owners(clients, j)
        pairs = [(a[None, :], b[:, None]) for a, b in (component(c, j) for c in S_j)]
        W = W + less_cross_terms(pairs, shares(j, S_j))
    return W


def of_owners(j: int, S_j: Sequence[Client]) -> list[float]:
    """n_k / N_j."""
    return fractions(S_j)


# --- the departures -----------------------------------------------------------------------------


def stack(clients: Sequence[Client], call: Call) -> Matrix:
    total = call.total or math.fsum(client.n for client in clients)
    return mean_of_products(clients, [client.n / total for client in clients])


def cut_stack(clients: Sequence[Client], call: Call) -> Matrix:
    return best_rank(stack(clients, call), largest(clients))


def sketch(clients: Sequence[Client], call: Call) -> Matrix:
    return best_rank(reference_spaces.fedask(clients), largest(clients))


def agreed_rows(clients: Sequence[Client], call: Call) -> Matrix:
    return reference_spaces.glora(clients)


def leading_columns(clients: Sequence[Client], call: Call) -> Matrix:
    return reference_slots.ilora(clients)


def factor_means(clients: Sequence[Client], call: Call) -> Matrix:
    return padded_means(clients, fractions(clients))


def norms(clients: Sequence[Client]) -> list[float]:
    """‖ΔW_k‖_F over all leading dimensions; ones if all are zero."""
    found = [float(np.sqrt(np.sum(client.update() ** 2))) for client in clients]
    return found if any(found) else [1.0] * len(found)


def norm_weighted(clients: Sequence[Client], call: Call) -> Matrix:
    sizes = norms(clients)
    return padded_means(clients, [size / math.fsum(sizes) for size in sizes])


def corrected(clients: Sequence[Client], call: Call) -> Matrix:
    return reference_slots.fair(clients)


def owner_means(clients: Sequence[Client], call: Call) -> Matrix:
    W = 0.0
    for j in range(slot_count(clients)):
        S_j = owners(clients, j)
        N_j = call.totals[j] if call.totals else math.fsum(client.n for client in S_j)
        for client in S_j:
            a, b = component(client, j)
            W = W + client.n / N_j * client.s * np.outer(b, a)
    return W


def cut_owner_means(clients: Sequence[Client], call: Call) -> Matrix:
    return best_rank(owner_means(clients, call), slot_count(clients))


def owner_factor_means(clients: Sequence[Client], call: Call) -> Matrix:
    return slot_means(fold(clients), of_owners)


def as_sent(clients: Sequence[Client], call: Call) -> Matrix:
    return slot_means(reference_slots.into(clients, "B"), of_owners)


def equal_owners(clients: Sequence[Client], call: Call) -> Matrix:
    return slot_means(fold(clients), lambda j, S_j: [1 / len(S_j)] * len(S_j))


def replicated(clients: Sequence[Client], call: Call) -> Matrix:
    clients = fold(clients)
    N = math.fsum(client.n for client in clients)
    most = largest(clients)
    top = [client for client in clients if client.rank == most]
    q = coverage(clients)

    def shares(j: int, S_j: Sequence[Client]) -> list[float]:
        d = [c.n / math.fsum(t.n for t in top) if c.rank == most else 0.0 for c in S_j]
        return [c.n / N + (1 - q[j]) * d_k for c, d_k in zip(S_j, d, strict=True)]

    return slot_means(clients, shares)


def equal_means(clients: Sequence[Client], call: Call) -> Matrix:
    return best_rank(mean_of_products(clients, [1 / len(clients)] * len(clients)), largest(clients))


def steps(clients: Sequence[Client], call: Call) -> Matrix:
    earlier = call.earlier()
    if earlier is None:
        return equal_means(clients, call)
    rank = max(largest(clients), earlier[0].shape[0])
    return best_rank(reference_spaces.fedhl(clients, earlier), rank)


def doubled_mass(clients: Sequence[Client], call: Call) -> Matrix:
    """The clients with their two halves put together again, one of double mass."""
    whole: list[Client] = []
    twice = None
    for client in clients:
        if whole and np.array_equal(whole[-1].A, client.A):
            twice = len(whole) - 1
        else:
            whole.append(client)

    def shares(masses: Sequence[float], split: int | None) -> list[float]:
        M = math.fsum(masses)
        extra = 0.0 if split is None else masses[split]
        return [m * (2 if i == split else 1) / (M + extra) for i, m in enumerate(masses)]

    if call.method == "hetlora":
        return padded_means(whole, shares(norms(whole), twice))
    if call.method == "fedhl":
        return best_rank(mean_of_products(whole, shares([1.0] * len(whole), twice)), largest(whole))
    folded = fold(whole)

    def of_slot(j: int, S_j: Sequence[Client]) -> list[float]:
        places = [
            i for i, client in enumerate(S_j) if twice is not None and client is folded[twice]
        ]
        return shares([1.0] * len(S_j), places[0] if places else None)

    return slot_means(folded, of_slot)


def one_mass(clients: Sequence[Client], call: Call) -> Matrix:
    if call.method == "hetlora":
        sizes = norms(call.clients)
        return padded_means(clients, [size / math.fsum(sizes) for size in sizes])
    errors, size = reference_spaces.truncation_errors(call.clients, call.previous)
    w = reference_spaces.fedhl_weights(clients, errors, size)
    W = reference_spaces.fedhl(clients, call.earlier(), weights=w)
    return best_rank(W, max(largest(clients), call.earlier()[0].shape[0]))


def entrywise_median(clients: Sequence[Client], call: Call) -> Matrix:
    return best_rank(reference_spaces.median(clients), largest(clients))


def entrywise_trimmed_mean(clients: Sequence[Client], call: Call) -> Matrix:
    return best_rank(reference_spaces.trimmed_mean(clients), largest(clients))


def elected_signs(clients: Sequence[Client], call: Call) -> Matrix:
    return best_rank(reference_spaces.ties(clients), largest(clients))


def random_masks(clients: Sequence[Client], call: Call) -> Matrix:
    layers = call.clients[0].A.shape[:-2]
    drawn = torch.Generator().manual_seed(0)
    masks = reference_spaces.keep_masks(call.clients, 0.5, drawn, layers)
    return best_rank(reference_spaces.dare(clients, masks[call.layer]), largest(clients))


FORMULAS: dict[str, Callable[[Sequence[Client], Call], Matrix]] = {
    "stack": stack,
    "cut stack": cut_stack,
    "sketch": sketch,
    "agreed rows": agreed_rows,
    "leading columns": leading_columns,
    "factor means": factor_means,
    "norm-weighted factor means": norm_weighted,
    "one mass for all layers": one_mass,
    "corrected factor means": corrected,
    "owner means": owner_means,
    "cut owner means": cut_owner_means,
    "owner factor means": owner_factor_means,
    "as-sent owner factor means": as_sent,
    "equal owner factor means": equal_owners,
    "padded factor means": replicated,
    "equal means": equal_means,
    "steps from truncations": steps,
    "doubled mass": doubled_mass,
    "entrywise median": entrywise_median,
    "entrywise trimmed mean": entrywise_trimmed_mean,
    "elected signs": elected_signs,
    "random masks": random_masks,
    "own total": stack,
    # What it computes on the clients that it takes.
    "refusal": factor_means,
}
