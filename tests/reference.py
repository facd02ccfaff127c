"""Naive dense float64 oracle of every method: the papers' formulas, one client and slot at a time.

An oracle takes clients whose factors are plain matrices and returns the dense global update before
any truncation. Nothing here imports the library: agreement of the two is evidence, not tautology.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import import_module

import numpy as np
import torch

Matrix = np.ndarray
Factors = tuple[Matrix, Matrix]  # (A, B) of a previous global update


@dataclass(frozen=True)
class Client:
    """One client's message: A (*layers, rank, in), B (*layers, out, rank), weight n, scaling s."""

    A: Matrix
    B: Matrix
    n: float
    s: float = 1.0
    slots: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """r_k."""
        return self.A.shape[-2]

    @property
    def owned(self) -> tuple[int, ...]:
        """The slots of the components, in order: 0..r_k-1 unless the client says otherwise."""
        return tuple(range(self.rank)) if self.slots is None else self.slots

    def folded(self) -> Client:
        """A_k ← sqrt(s_k) A_k, B_k ← sqrt(s_k) B_k, so that ΔW_k = B_k A_k."""
        root = math.sqrt(self.s)
        return replace(self, A=root * self.A, B=root * self.B, s=1.0)

    def update(self) -> Matrix:
        """ΔW_k = s_k B_k A_k."""
        return self.s * (self.B @ self.A)


def fold(clients: Sequence[Client]) -> list[Client]:
    """The clients with their scalings folded in and the absent ones (n_k = 0) removed."""
    return [client.folded() for client in clients if client.n > 0]


def fractions(clients: Sequence[Client]) -> list[float]:
    """p_k = n_k / Σ n."""
    total = math.fsum(client.n for client in clients)
    return [client.n / total for client in clients]


def water_filling(mass: Sequence[float], cap: float | Fraction) -> list[float]:
    """One after the other to the cap, the rest shared as before; in fractions."""
    mass, cap = [Fraction(m) for m in mass], Fraction(cap)
    clients, full = len(mass), set()
    if clients * cap <= 1:
        return [1 / clients] * clients
    while True:
        rest = [k for k in range(clients) if k not in full]
        whole, left = sum(mass[k] for k in rest), 1 - cap * len(full)
        own = {k: left * mass[k] / whole if whole else left / len(rest) for k in rest}
        above = {k for k in rest if own[k] > cap}
        if not above:
            return [float(cap) if k in full else float(own[k]) for k in range(clients)]
        full |= above


def slot_count(clients: Sequence[Client], previous: Factors | None = None) -> int:
    """The number of slots anybody owns, or the previous global update has."""
    owned = 1 + max(max(client.owned) for client in clients)
    return max(owned, 0 if previous is None else previous[0].shape[0])


def zeros(clients: Sequence[Client]) -> Matrix:
    """The out × in zero matrix."""
    return np.zeros((clients[0].B.shape[0], clients[0].A.shape[1]))


def padded(client: Client, n_slots: int) -> Factors:
    """A_k and B_k with every component in its slot and zeros in the slots not owned."""
    A = np.zeros((n_slots, client.A.shape[1]))
    B = np.zeros((client.B.shape[0], n_slots))
    for i, j in enumerate(client.owned):
        A[j] = client.A[i]
        B[:, j] = client.B[:, i]
    return A, B


def component(client: Client, j: int) -> tuple[Matrix, Matrix]:
    """(a_k^j, b_k^j): the row and the column that the client put into slot j."""
    i = client.owned.index(j)
    return client.A[i], client.B[:, i]


def owners(clients: Sequence[Client], j: int) -> list[Client]:
    """S_j = {k : client k owns slot j}."""
    return [client for client in clients if j in client.owned]


def coverage(clients: Sequence[Client]) -> list[float]:
    """q_j = N_j / N for every slot."""
    total = math.fsum(client.n for client in clients)
    return [
        math.fsum(client.n for client in owners(clients, j)) / total
        for j in range(slot_count(clients))
    ]


# --- the exact mean, its scale, and the mixing matrix -------------------------------------------


def exact_mean(clients: Sequence[Client]) -> Matrix:
    """ΔW* = Σ p_k s_k B_k A_k."""
    clients = fold(clients)
    return sum(p * (c.B @ c.A) for p, c in zip(fractions(clients), clients, strict=True))


def scale(clients: Sequence[Client]) -> float:
    """S = Σ p_k ‖B_k‖_F ‖A_k‖_F after folding: what every tolerance is relative to."""
    clients = fold(clients)
    return math.fsum(
        p * np.linalg.norm(c.B) * np.linalg.norm(c.A)
        for p, c in zip(fractions(clients), clients, strict=True)
    )


def shared_scale(clients: Sequence[Client]) -> float:
    """Σ γ_k ‖B_k‖_F ‖A_k‖_F, γ_k = max_j n_k / N_j: S for shares over the owners of a slot."""
    clients = fold(clients)
    return math.fsum(
        max(c.n / math.fsum(owner.n for owner in owners(clients, j)) for j in c.owned)
        * np.linalg.norm(c.B)
        * np.linalg.norm(c.A)
        for c in clients
    )


def mixed(clients: Sequence[Client], gamma: Matrix) -> Matrix:
    """B_cat Γ A_cat: what every linear method is, for its own mixing matrix Γ (R × R)."""
    clients = fold(clients)
    B_cat = np.concatenate([client.B for client in clients], axis=1)
    A_cat = np.concatenate([client.A for client in clients], axis=0)
    return B_cat @ gamma @ A_cat


def mixing_of_stack(clients: Sequence[Client]) -> Matrix:
    """Γ = diag(p) ⊗ I."""
    diagonal = [p for p, c in zip(fractions(clients), clients, strict=True) for _ in c.owned]
    return np.diag(diagonal)


def mixing_of_slot_shares(clients: Sequence[Client]) -> Matrix:
    """Γ = diag(γ_j^(k)), γ_j^(k) = n_k / N_j."""
    diagonal = [
        client.n / math.fsum(owner.n for owner in owners(clients, j))
        for client in clients
        for j in client.owned
    ]
    return np.diag(diagonal)


def mixing_of_factor_means(clients: Sequence[Client], weights: Sequence[float]) -> Matrix:
    """Γ[(k, i), (l, j)] = w_k w_l if i = j else 0; at equal ranks this is (w wᵀ) ⊗ I."""
    slot = [(w, j) for w, c in zip(weights, clients, strict=True) for j in c.owned]
    return np.array([[w * v if i == j else 0.0 for v, j in slot] for w, i in slot])


# --- the methods --------------------------------------------------------------------------------


def padded_means(clients: Sequence[Client], weights: Sequence[float]) -> Factors:
    """A_g = Σ w_k pad(A_k), B_g = Σ w_k pad(B_k)."""
    n_slots = slot_count(clients)
    pads = [padded(client, n_slots) for client in clients]
    A = sum(w * A_k for w, (A_k, _) in zip(weights, pads, strict=True))
    B = sum(w * B_k for w, (_, B_k) in zip(weights, pads, strict=True))
    return A, B


def fedit(clients: Sequence[Client]) -> Matrix:
    """(Σ p_k B_k)(Σ p_k A_k), equal ranks."""
    clients = fold(clients)
    p = fractions(clients)
    B = sum(p_k * client.B for p_k, client in zip(p, clients, strict=True))
    A = sum(p_k * client.A for p_k, client in zip(p, clients, strict=True))
    return B @ A


def zeropad(clients: Sequence[Client], weighting: str = "examples") -> Matrix:
    """(Σ w_k pad(B_k))(Σ w_k pad(A_k)), w_k = p_k or 1/K."""
    clients = fold(clients)
    uniform = [1 / len(clients)] * len(clients)
    A, B = padded_means(clients, uniform if weighting == "uniform" else fractions(clients))
    return B @ A


def update_norms(clients: Sequence[Client]) -> list[float]:
    """‖ΔW_k‖_F, over every layer that the client sends."""
    return [float(np.linalg.norm(client.update().ravel())) for client in clients]


def hetlora(clients: Sequence[Client], norms: Sequence[float] | None = None) -> Matrix:
    """Zero-padded factor means with w_k = ‖ΔW_k‖_F / Σ ‖ΔW‖_F (norms over all layers if given)."""
    norms = update_norms(clients) if norms is None else norms
    if not any(norms):  # 0/0: the limit of equal norms
        norms = [1.0] * len(clients)
    A, B = padded_means(fold(clients), [norm / math.fsum(norms) for norm in norms])
    return B @ A


def replicate(clients: Sequence[Client], previous: Factors | None = None) -> Matrix:
    """Ã_k = D_A with rows 1..r_k replaced by A_k; (Σ p_k B̃_k)(Σ p_k Ã_k); D = mean of the tallest.

    Slots above the tallest participant come from the previous global update.
    """
    clients = fold(clients)
    r_max = max(client.rank for client in clients)
    tallest = [client for client in clients if client.rank == r_max]
    D_A, D_B = padded_means(tallest, fractions(tallest))
    A, B = np.zeros_like(D_A), np.zeros_like(D_B)
    for p, client in zip(fractions(clients), clients, strict=True):
        A_k, B_k = D_A.copy(), D_B.copy()
        A_k[: client.rank] = client.A
        B_k[:, : client.rank] = client.B
        A += p * A_k
        B += p * B_k
    if previous is not None:
        A = np.concatenate([A, previous[0][r_max:]], axis=0)
        B = np.concatenate([B, previous[1][:, r_max:]], axis=1)
    return B @ A


def flora(clients: Sequence[Client]) -> Matrix:
    """[B_1 … B_K][p_1 A_1; …; p_K A_K]."""
    clients = fold(clients)
    B = np.concatenate([client.B for client in clients], axis=1)
    scaled = [p * client.A for p, client in zip(fractions(clients), clients, strict=True)]
    return B @ np.concatenate(scaled, axis=0)


def flexlora(clients: Sequence[Client]) -> Matrix:
    """ΔW* = Σ p_k s_k B_k A_k, before its truncation; with fold_rest also the total after it."""
    return exact_mean(clients)


def own_svd(client: Client) -> Client:
    """The same ΔW_k in the components of its own thin SVD, the root of σ on both sides."""
    U, sigma, Vh = np.linalg.svd(client.B @ client.A, full_matrices=False)
    root = np.sqrt(sigma[: client.rank])
    U, Vh = U[:, : client.rank], Vh[: client.rank]
    return replace(client, A=root[:, None] * Vh, B=U * root)


def rb(
    clients: Sequence[Client],
    floor: float | None = None,
    quorum: int | None = None,
    align: str | None = None,
    previous: Factors | None = None,
) -> Matrix:
    """Σ_j Σ_{k∈S_j} γ_j^(k) b_k^j a_k^j, γ_j^(k) = n_k / max(N_j, floor · N)."""
    clients = fold(clients)
    if align == "svd":
        clients = [own_svd(client) for client in clients]
    N = math.fsum(client.n for client in clients)
    W = zeros(clients)
    for j in range(slot_count(clients, previous)):
        S_j = owners(clients, j)
        if len(S_j) < max(1, quorum or 1):
            if previous is not None and j < previous[0].shape[0]:
                W += np.outer(previous[1][:, j], previous[0][j])
            continue
        N_j = math.fsum(client.n for client in S_j)
        for client in S_j:
            a, b = component(client, j)
            W += client.n / max(N_j, (floor or 0.0) * N) * np.outer(b, a)
    return W


def rbla(
    clients: Sequence[Client],
    floor: float | None = None,
    quorum: int | None = None,
    previous: Factors | None = None,
) -> Matrix:
    """Σ_j (Σ_{S_j} γ_j^(k) b_k^j)(Σ_{S_j} γ_j^(k) a_k^j), γ_j^(k) = n_k / max(N_j, floor · N)."""
    clients = fold(clients)
    N = math.fsum(client.n for client in clients)
    W = zeros(clients)
    for j in range(slot_count(clients, previous)):
        S_j = owners(clients, j)
        if len(S_j) < max(1, quorum or 1):
            if previous is not None and j < previous[0].shape[0]:
                W += np.outer(previous[1][:, j], previous[0][j])
            continue
        denominator = max(math.fsum(client.n for client in S_j), (floor or 0.0) * N)
        a_mean = sum(client.n / denominator * component(client, j)[0] for client in S_j)
        b_mean = sum(client.n / denominator * component(client, j)[1] for client in S_j)
        W += np.outer(b_mean, a_mean)
    return W


def raflora(
    clients: Sequence[Client],
    levels: Sequence[int] | None = None,
    previous: Factors | None = None,
) -> Matrix:
    """Σ_h Σ_{k: r_k ≥ R_h} (n_k / N_h) B_k[:, h] A_k[h, :], h = slots (R_{h−1}, R_h]."""
    clients = fold(clients)
    tops = sorted(set(levels)) if levels is not None else sorted({c.rank for c in clients})
    W = zeros(clients)
    for low, high in zip([0, *tops[:-1]], tops, strict=True):
        tall = [client for client in clients if client.rank >= high]
        N_h = math.fsum(client.n for client in tall)
        for client in tall:
            W += client.n / N_h * (client.B[:, low:high] @ client.A[low:high])
        if not tall and previous is not None:
            W += previous[1][:, low:high] @ previous[0][low:high]
    return W


def fedex(clients: Sequence[Client]) -> Matrix:
    """B̄ Ā + (Σ p_k ΔW_k − B̄ Ā): the residual makes the total the exact mean."""
    return exact_mean(clients)


def fedex_residual(clients: Sequence[Client]) -> Matrix:
    """Σ p_k ΔW_k − B̄ Ā with zero-padded factor means."""
    return exact_mean(clients) - zeropad(clients)


def of(method: str) -> Callable[..., Matrix]:
    """The oracle of a method, in whichever of the reference files it is."""
    for module in ("reference", "reference_slots", "reference_spaces"):
        found = getattr(import_module(module), method, None)
        if found is not None:
            return found
    raise LookupError(f"no oracle for {method!r}")


# --- rank reduction -----------------------------------------------------------------------------


def energy_rank(W: Matrix, energy: float) -> int:
    """The smallest r ≥ 1 with Σ_{i≤r} σ_i² ≥ energy · Σ σ_i²; 1 for a zero matrix."""
    squares = np.linalg.svd(W, compute_uv=False) ** 2
    if squares[0] == 0:
        return 1
    kept = 0.0
    for r, square in enumerate(squares, start=1):
        kept += square
        if kept >= energy * math.fsum(squares):
            return r
    return len(squares)


def best_rank(W: Matrix, r: int) -> Matrix:
    """Σ_{i≤r} σ_i u_i v_iᵀ: the best approximation of rank r."""
    U, sigma, Vh = np.linalg.svd(W, full_matrices=False)
    return (U[:, :r] * sigma[:r]) @ Vh[:r]


def tail(W: Matrix, r: int) -> float:
    """sqrt(Σ_{i>r} σ_i²): the least error any matrix of rank r can have."""
    return float(np.linalg.norm(np.linalg.svd(W, compute_uv=False)[r:]))


# --- results read without the library -----------------------------------------------------------


def array(tensor: torch.Tensor | Matrix) -> Matrix:
    """A tensor or an array as a float64 array."""
    return np.asarray(tensor, dtype=np.float64)


def dense(low_rank) -> Matrix:
    """B A in float64 of anything with the two factors."""
    return array(low_rank.B) @ array(low_rank.A)


def total(result) -> Matrix:
    """Factors plus residual, dense: the update that a result stands for."""
    rest = 0.0 if result.residual is None else dense(result.residual)
    return dense(result.factors) + rest


# --- cohorts to compare on ----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The sizes of one cohort; values are drawn from a seeded generator."""

    out_features: int
    in_features: int
    ranks: tuple[int, ...]
    n: tuple[float, ...]
    scalings: tuple[float, ...]
    layers: tuple[int, ...] = ()
    slots: tuple[tuple[int, ...] | None, ...] | None = None


CASES = {
    # R = 16 exceeds min(out, in) = 6, and two clients share a rank
    "tall": Case(17, 6, (2, 4, 4, 6), (5, 10, 15, 20), (1.0, 0.5, 2.0, 4 / 3)),
    # R = 8 against 5, the highest rank first
    "wide": Case(5, 23, (5, 1, 2), (3, 1, 7), (0.25, 1.0, 3.0)),
    # square: a transposed result has the right shape
    "square": Case(8, 8, (8, 2, 4, 4), (2, 9, 4, 1), (2.0, 2.0, 1.0, 0.1)),
    # R = 5 is far below both sizes
    "thin": Case(40, 30, (2, 3), (1, 2), (16 / 2, 16 / 3)),
    "lone": Case(7, 9, (3,), (11,), (0.7,)),
    "layers": Case(10, 7, (1, 2, 4), (4, 2, 3), (1.0, 2.0, 0.5), layers=(2, 3)),
}
EQUAL_RANKS = {
    "tall": Case(17, 6, (4, 4, 4), (5, 10, 15), (1.0, 0.5, 2.0)),
    "square": Case(8, 8, (3, 3, 3), (2, 9, 4), (2.0, 1.0, 0.1)),
    "lone": Case(7, 9, (3,), (11,), (0.7,)),
    "layers": Case(10, 7, (2, 2, 2), (4, 2, 3), (1.0, 2.0, 0.5), layers=(2, 3)),
}
SLOTS = {
    # slot 3 belongs to nobody, slot 4 to one client, and one client lists its slots unsorted
    "gap": Case(9, 11, (2, 3, 3), (3, 1, 4), (1.0, 2.0, 0.5), slots=((0, 2), (4, 1, 2), (0, 1, 2))),
    # every slot has an owner, nobody starts at slot 0 except the last client
    "layers": Case(
        6, 6, (2, 1, 3), (1, 2, 5), (3.0, 1.0, 0.2), (2,), slots=((1, 3), (2,), (0, 1, 2))
    ),
}
DTYPES = (torch.float32, torch.float64)


def rounded(values: Matrix, dtype: torch.dtype) -> Matrix:
    """The float64 values of the numbers as the library will receive them."""
    return torch.from_numpy(values).to(dtype).to(torch.float64).numpy()


def cohort(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Client]:
    """Seeded normal factors for a case, rounded to dtype so that the oracle sees equal inputs."""
    rng = np.random.default_rng(seed)
    slots = case.slots or (None,) * len(case.ranks)
    clients = []
    for rank, n, s, own in zip(case.ranks, case.n, case.scalings, slots, strict=True):
        A = rng.standard_normal((*case.layers, rank, case.in_features))
        B = rng.standard_normal((*case.layers, case.out_features, rank))
        clients.append(Client(rounded(A, dtype), rounded(B, dtype), n, s, own))
    return clients


def previous_factors(
    case: Case, rank: int, dtype: torch.dtype = torch.float64, seed: int = 99
) -> Factors:
    """Seeded factors (A, B) of an earlier global update of a case's shape."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((*case.layers, rank, case.in_features))
    B = rng.standard_normal((*case.layers, case.out_features, rank))
    return rounded(A, dtype), rounded(B, dtype)


def arguments(client: Client, dtype: torch.dtype = torch.float64) -> dict[str, object]:
    """The client as keyword arguments of a ClientUpdate."""
    return {
        "A": torch.from_numpy(np.ascontiguousarray(client.A)).to(dtype),
        "B": torch.from_numpy(np.ascontiguousarray(client.B)).to(dtype),
        "weight": client.n,
        "scaling": client.s,
        "slots": client.slots,
    }


def by_layer(
    clients: Sequence[Client], previous: Factors | None = None
) -> Iterator[tuple[tuple[int, ...], list[Client], Factors | None]]:
    """(index, clients of that layer, previous of that layer) for every leading index."""
    for index in np.ndindex(clients[0].A.shape[:-2]):
        layer = [replace(client, A=client.A[index], B=client.B[index]) for client in clients]
        earlier = None if previous is None else (previous[0][index], previous[1][index])
        yield index, layer, earlier


Oracle = Callable[..., Matrix]
