"""Naive dense float64 oracles of the methods that know slots, frozen factors or a corrected B.

The same terms as in ``reference``: clients with plain matrices in, the dense global update before
any truncation out, nothing of the library in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from reference import (
    Case,
    Client,
    Factors,
    Matrix,
    cohort,
    component,
    exact_mean,
    fold,
    fractions,
    owners,
    padded,
    padded_means,
    slot_count,
    zeros,
)

# --- scaling and common factors -----------------------------------------------------------------


def into(clients: Sequence[Client], factor: str) -> list[Client]:
    """The participating clients with the scaling whole in one factor, the other as sent."""
    present = [client for client in clients if client.n > 0]
    if factor == "A":
        return [replace(client, A=client.s * client.A, s=1.0) for client in present]
    return [replace(client, B=client.s * client.B, s=1.0) for client in present]


def with_common(clients: Sequence[Client], factor: str) -> list[Client]:
    """The clients with one common A or B: every slot has what its first owner sent, on all."""
    first = {j: owners(clients, j)[0] for client in clients for j in client.owned}
    if factor == "A":
        row = {j: owner.A[..., owner.owned.index(j), :] for j, owner in first.items()}
        return [replace(c, A=np.stack([row[j] for j in c.owned], axis=-2)) for c in clients]
    column = {j: owner.B[..., owner.owned.index(j)] for j, owner in first.items()}
    return [replace(c, B=np.stack([column[j] for j in c.owned], axis=-1)) for c in clients]


def common_rows(clients: Sequence[Client]) -> Matrix:
    """The common A with every row in its slot, zeros in slots that nobody owns."""
    A = np.zeros((slot_count(clients), clients[0].A.shape[1]))
    for client in clients:
        for i, j in enumerate(client.owned):
            A[j] = client.A[i]
    return A


def transposed(clients: Sequence[Client]) -> list[Client]:
    """The clients with the two factors exchanged: ΔW_kᵀ = s_k A_kᵀ B_kᵀ."""
    return [replace(client, A=client.B.T, B=client.A.T) for client in clients]


def slot_means(
    clients: Sequence[Client], weights: Sequence[float], previous: Factors | None = None
) -> Factors:
    """Row j of A and column j of B: the weighted means over the owners of slot j, apart.

    A slot without owners is that of the previous global update, or zero without one.
    """
    n_slots = slot_count(clients, previous)
    A = np.zeros((n_slots, clients[0].A.shape[1]))
    B = np.zeros((clients[0].B.shape[0], n_slots))
    for j in range(n_slots):
        S_j = [(w, c) for w, c in zip(weights, clients, strict=True) if j in c.owned]
        if S_j:
            total = math.fsum(w for w, _ in S_j)
            A[j] = sum(w / total * component(c, j)[0] for w, c in S_j)
            B[:, j] = sum(w / total * component(c, j)[1] for w, c in S_j)
        elif previous is not None and j < previous[0].shape[0]:
            A[j], B[:, j] = previous[0][j], previous[1][:, j]
    return A, B


# --- the methods --------------------------------------------------------------------------------


def plora(
    clients: Sequence[Client], weighting: str = "uniform", previous: Factors | None = None
) -> Matrix:
    """Σ_j mean_{S_j}(b_k^j) mean_{S_j}(a_k^j), plain means, or weighted by n_k."""
    clients = fold(clients)
    weights = [1.0 if weighting == "uniform" else client.n for client in clients]
    A, B = slot_means(clients, weights, previous)
    return B @ A


def hafl(clients: Sequence[Client], previous: Factors | None = None) -> Matrix:
    """Σ_j (Σ_{S_j} (n_k/N_j) b_k^j)(Σ_{S_j} (n_k/N_j) a_k^j), S_j = who did not freeze j."""
    clients = fold(clients)
    W = zeros(clients)
    for j in range(slot_count(clients, previous)):
        S_j = owners(clients, j)
        if not S_j:
            if previous is not None and j < previous[0].shape[0]:
                W += np.outer(previous[1][:, j], previous[0][j])
            continue
        N_j = math.fsum(client.n for client in S_j)
        a_mean = sum(client.n * component(client, j)[0] for client in S_j) / N_j
        b_mean = sum(client.n * component(client, j)[1] for client in S_j) / N_j
        W += np.outer(b_mean, a_mean)
    return W


def shared_a(clients: Sequence[Client], previous: Factors | None = None) -> Matrix:
    """Σ_j (Σ_{S_j} (n_k/N_j) s_k b_k^j) a^j, with a^j one and the same on all owners."""
    clients = into(clients, "B")
    W = zeros(clients)
    for j in range(slot_count(clients, previous)):
        S_j = owners(clients, j)
        if S_j:
            N_j = math.fsum(client.n for client in S_j)
            b_mean = sum(client.n / N_j * component(client, j)[1] for client in S_j)
            W += np.outer(b_mean, component(S_j[0], j)[0])
        elif previous is not None and j < previous[0].shape[0]:
            W += np.outer(previous[1][:, j], previous[0][j])
    return W


def ffa(clients: Sequence[Client]) -> Matrix:
    """(Σ p_k pad(s_k B_k)) A."""
    clients = into(clients, "B")
    n_slots = slot_count(clients)
    pads = [padded(client, n_slots)[1] for client in clients]
    B = sum(p * B_k for p, B_k in zip(fractions(clients), pads, strict=True))
    return B @ common_rows(clients)


def rolora(clients: Sequence[Client], round: int) -> Matrix:
    """(Σ p_k pad(s_k B_k)) A in odd rounds, B (Σ p_k pad(s_k A_k)) in even ones."""
    return ffa(clients) if round % 2 == 1 else ffa(transposed(clients)).T


def fedsa(clients: Sequence[Client]) -> Matrix:
    """Σ_j (Σ_{S_j} (n_k/N_j) s_k b_k^j)(Σ_{S_j} (n_k/N_j) a_k^j): A as sent, s_k whole in B."""
    clients = into(clients, "B")
    A, B = slot_means(clients, [client.n for client in clients])
    return B @ A


def fair_penalty(A_mean: Matrix, regularisation: float) -> float:
    """λ: the regularisation in units of the mean squared norm of a row of Ā."""
    return regularisation * float(np.mean(np.sum(A_mean**2, axis=1)))


def fair(clients: Sequence[Client], regularisation: float = 0.01) -> Matrix:
    """(B̄ + ΔB) Ā with ΔB = argmin ‖ΔW* − (B̄ + ΔB) Ā‖² + λ ‖ΔB‖².

    Solved as the least-squares problem [Āᵀ; √λ I] ΔBᵀ ≈ [(ΔW* − B̄ Ā)ᵀ; 0], not by its normal
    equations.
    """
    folded = fold(clients)
    A, B = padded_means(folded, fractions(folded))
    gap = exact_mean(clients) - B @ A
    root = math.sqrt(fair_penalty(A, regularisation))
    left = np.concatenate([A.T, root * np.eye(len(A))])
    right = np.concatenate([gap.T, np.zeros((len(A), len(gap)))])
    change = np.linalg.lstsq(left, right, rcond=None)[0].T
    return (B + change) @ A


def ilora_mean(clients: Sequence[Client], initial: Factors | None = None) -> Matrix:
    """ΔW* = Σ p_k (s_k B_k A_k − B_k⁰ A_k⁰), client k's start being the slots that it owns."""
    W = exact_mean(clients)
    if initial is not None:
        present = [client for client in clients if client.n > 0]
        for p, client in zip(fractions(present), present, strict=True):
            for j in client.owned:
                W = W - p * np.outer(initial[1][:, j], initial[0][j])
    return W


def ilora_rank(
    clients: Sequence[Client], rank: int | str | None, initial: Factors | None = None
) -> int:
    """The number of columns kept: the largest client rank, min(R, out, in), or what was asked.

    A start that is subtracted is components too, one for every slot that anybody owns.
    """
    present = [client for client in clients if client.n > 0]
    R = sum(client.rank for client in present)
    if initial is not None:
        R += len({j for client in present for j in client.owned})
    most = min(R, present[0].B.shape[-2], present[0].A.shape[-1])
    wanted = max(c.rank for c in present) if rank is None else most if rank == "full" else rank
    return min(wanted, most)


def ilora(
    clients: Sequence[Client], rank: int | str | None = None, initial: Factors | None = None
) -> Matrix:
    """Q[:, :r] T[:r] of the unpivoted ΔW* = Q T."""
    Q, T = np.linalg.qr(ilora_mean(clients, initial))
    r = ilora_rank(clients, rank, initial)
    return Q[:, :r] @ T[:r]


# --- cohorts to compare on ----------------------------------------------------------------------

# two of one size, so that they go through one batched call, and one of another
LAYERS = {"q": (9, 7), "v": (9, 7), "down": (7, 12)}
# all five slots have owners in the first round; nobody trains 0 and 3 in the second
FIRST = Case(9, 7, (2, 3, 1), (3, 1, 4), (1.0, 2.0, 0.5), slots=((0, 2), (1, 3, 2), (4,)))
SECOND = Case(9, 7, (2, 1, 2), (2, 5, 1), (0.5, 1.0, 3.0), slots=((1, 2), (4,), (2, 4)))
MIXED = Case(9, 7, (2, 4, 1), (3, 1, 4), (1.0, 2.0, 0.5))


def model(
    case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, common: str | None = None
) -> dict[str, list[Client]]:
    """{layer: cohort} of one case in the sizes of LAYERS, each with values of its own."""
    layers = {}
    for i, (name, (out, in_)) in enumerate(LAYERS.items()):
        sized = replace(case, out_features=out, in_features=in_)
        clients = cohort(sized, dtype, seed=10 * seed + i)
        layers[name] = clients if common is None else with_common(clients, common)
    return layers
