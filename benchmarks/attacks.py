"""Honest clients of mixed ranks around one truth, and clients that mean them harm.

Everything is dense NumPy-style linear algebra on small matrices: what attackers know and do is
worked out on the matrices themselves, and sent as factors of a rank that an honest client could
have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from hetlora_agg import ClientUpdate


@dataclass(frozen=True)
class Federation:
    """What honest clients look like.

    Attributes:
        clients: all of them, attackers included.
        attackers: how many are not honest.
        ranks: honest ranks, taken in turns.
        out: rows.
        columns: columns.
        decay: singular value j of the truth is ``decay ** j``.
        noise: norm of a client's noise on component j, relative to the component, per factor.
    """

    clients: int = 30
    attackers: int = 6
    ranks: tuple[int, ...] = (4, 8, 12, 16)
    out: int = 48
    columns: int = 40
    decay: float = 0.7
    noise: float = 0.5

    def honest(self, seed: int) -> tuple[list[ClientUpdate], Tensor]:
        """The honest clients, ids 0, 1, …, and the mean of what each would send without noise."""
        g = torch.Generator().manual_seed(seed)
        most = max(self.ranks)
        B, A = (
            torch.linalg.qr(torch.randn(size, most, generator=g, dtype=torch.float64)).Q
            for size in (self.out, self.columns)
        )
        root = self.decay ** (torch.arange(most) / 2)
        B, A = B * root, (A * root).mT
        updates, truth = [], torch.zeros(self.out, self.columns, dtype=torch.float64)
        for k in range(self.clients - self.attackers):
            r = self.ranks[k % len(self.ranks)]
            own_B = B[:, :r] + self._noise(g, self.out, root[:r])
            own_A = A[:r] + self._noise(g, self.columns, root[:r]).mT
            updates.append(ClientUpdate(own_A, own_B, r, weight=1.0, id=k))
            truth += B[:, :r] @ A[:r] / (self.clients - self.attackers)
        return updates, truth

    def _noise(self, g: torch.Generator, length: int, root: Tensor) -> Tensor:
        entries = torch.randn(length, len(root), generator=g, dtype=torch.float64)
        return self.noise * root * entries / math.sqrt(length)


Attack = Callable[[Sequence[ClientUpdate], int, torch.Generator], list[ClientUpdate]]
"""Honest clients, number of attackers, randomness -> what the attackers send."""


def scale(
    honest: Sequence[ClientUpdate], f: int, g: torch.Generator, size: float = 1e6
) -> list[ClientUpdate]:
    """An honest update times a million."""
    return [replace(u, B=size * u.B) for u in _in_turns(honest, f)]


def flip(honest: Sequence[ClientUpdate], f: int, g: torch.Generator) -> list[ClientUpdate]:
    """An honest update times −10."""
    return [replace(u, B=-10 * u.B) for u in _in_turns(honest, f)]


def ipm(
    honest: Sequence[ClientUpdate], f: int, g: torch.Generator, size: float = 0.5
) -> list[ClientUpdate]:
    """Minus half the honest mean: the inner product with the truth turns, the norm is discreet.

    Xie, Koyejo, Gupta, UAI 2019.
    """
    return _all_alike(-size * dense(honest).mean(0), honest, f)


def strong_ipm(honest: Sequence[ClientUpdate], f: int, g: torch.Generator) -> list[ClientUpdate]:
    """Minus ten times the honest mean."""
    return ipm(honest, f, g, 10.0)


def close(honest: Sequence[ClientUpdate], f: int, g: torch.Generator) -> list[ClientUpdate]:
    """The honest mean less one standard deviation of every entry.

    As near to every honest client as these are to each other, so that no rule on distances tells:
    the worst of this kind for rules that leave out whoever is far.
    """
    W = dense(honest)
    return _all_alike(W.mean(0) - W.std(0), honest, f)


def alie(honest: Sequence[ClientUpdate], f: int, g: torch.Generator) -> list[ClientUpdate]:
    """The honest mean less z standard deviations of every entry: a little is enough.

    Baruch, Baruch, Goldberg, NeurIPS 2019; z as there, from the number of clients.
    """
    n, W = len(honest) + f, dense(honest)
    supporters = n // 2 + 1 - f
    z = NormalDist().inv_cdf((n - f - supporters) / (n - f))
    return _all_alike(W.mean(0) - max(z, 0.0) * W.std(0), honest, f)


def subspace(honest: Sequence[ClientUpdate], f: int, g: torch.Generator) -> list[ClientUpdate]:
    """One random direction of rank 1, the same for all, of honest norm."""
    size = dense(honest).flatten(1).norm(dim=1).mean()
    B = torch.randn(honest[0].B.shape[-2], 1, generator=g, dtype=torch.float64)
    A = torch.randn(1, honest[0].A.shape[-1], generator=g, dtype=torch.float64)
    B = B * size / (B.norm() * A.norm())
    return [ClientUpdate(A, B, 1) for _ in range(f)]


def inflation(honest: Sequence[ClientUpdate], f: int, g: torch.Generator) -> list[ClientUpdate]:
    """Twice the largest honest rank, every component as long as the honest ones' longest."""
    r = 2 * max(u.A.shape[-2] for u in honest)
    size = max(float((u.B.norm(dim=0) * u.A.norm(dim=1)).max()) for u in honest)
    sent = []
    for _ in range(f):
        B = torch.randn(honest[0].B.shape[-2], r, generator=g, dtype=torch.float64)
        A = torch.randn(r, honest[0].A.shape[-1], generator=g, dtype=torch.float64)
        sent.append(ClientUpdate(A / A.norm(dim=1, keepdim=True), size * B / B.norm(dim=0), r))
    return sent


def nan(honest: Sequence[ClientUpdate], f: int, g: torch.Generator) -> list[ClientUpdate]:
    """An honest update with one entry that is not a number."""
    sent = []
    for u in _in_turns(honest, f):
        B = u.B.clone()
        B[..., 0, 0] = math.nan
        sent.append(replace(u, B=B))
    return sent


ATTACKS: Mapping[str, Attack] = {
    "scale": scale,
    "flip": flip,
    "ipm": ipm,
    "strong_ipm": strong_ipm,
    "alie": alie,
    "close": close,
    "subspace": subspace,
    "inflation": inflation,
    "nan": nan,
}
"""Name -> attack."""


def attacked(
    federation: Federation, attack: str | None, seed: int
) -> tuple[list[ClientUpdate], Tensor]:
    """All clients with ids, attackers last, and the truth; without an attack the honest alone."""
    honest, truth = federation.honest(seed)
    if attack is None:
        return honest, truth
    g = torch.Generator().manual_seed(10_000 + seed)
    bad = ATTACKS[attack](honest, federation.attackers, g)
    return honest + [replace(u, id=len(honest) + k) for k, u in enumerate(bad)], truth


def dense(updates: Sequence[ClientUpdate]) -> Tensor:
    """The matrices, ``(K, out, columns)``."""
    return torch.stack([u.B @ u.A for u in updates])


def _in_turns(honest: Sequence[ClientUpdate], f: int) -> list[ClientUpdate]:
    return [honest[k % len(honest)] for k in range(f)]


def _all_alike(W: Tensor, honest: Sequence[ClientUpdate], f: int) -> list[ClientUpdate]:
    """The matrix at the largest honest rank, sent by all attackers."""
    r = max(u.A.shape[-2] for u in honest)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return [ClientUpdate(Vh[:r], U[:, :r] * S[:r], r) for _ in range(f)]
