"""``Components``: the one thing a method sees."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from hetlora_agg.types import LowRank


class Sums(Protocol):
    """Clients that were added up on their way in: what is left of them to combine."""

    def stack(self, share: Tensor) -> LowRank:
        """``Σ share_j b_j a_j`` for shares ``(R,)`` or ``(*layers, R)`` of all that were added."""

    def average_factors(self, share: Tensor) -> LowRank:
        """A's and B's of each slot averaged apart."""

    def common(self, factor: str) -> Tensor:
        """The factor that all clients share, bit for bit, its slots along the rank."""

    def aligned(self, c: Components, to: str | None) -> Components:
        """The components, which were aligned one client at a time."""

    def squared_norms(self) -> Tensor:
        """``‖ΔW_k‖_F²`` of everybody, ``(*layers, K)`` float64."""


BLOCK = 4_096
"""Components whose slots are laid out one-hot at a time."""


@dataclass(frozen=True, eq=False)
class Components:
    """All clients' rank-1 components side by side on one axis of length ``R = sum(ranks)``.

    Scaling is folded in, weight-0 clients are gone, everything is validated.

    Attributes:
        A: ``(*layers, R, in_features)``.
        B: ``(*layers, out_features, R)``.
        ranks: K Python ints; 0 for a client that counts but has nothing in this layer.
        weight: ``(K,)`` float64, > 0.
        slots: the slot of each of the R components.
        ids: K client ids; a client without one is called by its position in the list.
        statistic: this method's client statistics summed over all layers, each ``(K,)`` or
            ``(K, K)``, when ``aggregate`` or ``aggregate_layers`` has computed them.
        sums: what a running aggregate has added up; A and B then have no components of their own,
            while ranks, weights and slots tell of everybody who was added.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    weight: Tensor
    slots: tuple[int, ...]
    ids: tuple[Hashable, ...]
    statistic: tuple[Tensor, ...] | None = None
    sums: Sums | None = None

    @property
    def max_rank(self) -> int:
        """The largest participating rank."""
        return max(self.ranks)

    @property
    def n_slots(self) -> int:
        """One more than the highest slot anybody fills."""
        return 1 + max(self.slots)

    @property
    def layers(self) -> tuple[int, ...]:
        """Leading dimensions, ``()`` for a single layer."""
        return tuple(self.A.shape[:-2])

    @cached_property
    def client(self) -> Tensor:
        """Which client each component came from, ``(R,)`` int64."""
        owners = [k for k, rank in enumerate(self.ranks) for _ in range(rank)]
        return torch.tensor(owners, device=self.A.device)

    @cached_property
    def slot_index(self) -> Tensor:
        """Which slot each component fills, ``(R,)`` int64."""
        return torch.tensor(self.slots, device=self.A.device)

    @cached_property
    def slot(self) -> Tensor:
        """One-hot map from components to slots, ``(n_slots, R)`` float64."""
        every = torch.arange(self.n_slots, device=self.A.device)
        return (every[:, None] == self.slot_index).to(torch.float64)

    def over_slots(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Largest and sum of the components' values in each slot, both ``(*layers, n_slots)``.

        Block by block: of ten thousand clients the one-hot map alone would be too large.
        """
        top = total = values.new_zeros(1)
        every = torch.arange(self.n_slots, device=values.device)[:, None]
        blocks = zip(
            torch.split(values, BLOCK, -1), torch.split(self.slot_index, BLOCK), strict=True
        )
        for block, filled in blocks:
            slot = (every == filled).to(values.dtype)
            top = torch.maximum(top, (slot * block.unsqueeze(-2)).amax(-1))
            total = total + block @ slot.mT
        return top, total

    def with_factors(self, A: Tensor, B: Tensor) -> Components:
        """The same clients with other factors of the same shapes."""
        return replace(self, A=A, B=B)

    def also(self, **known: Any) -> Components:
        """The same clients in the same slots, with other factors, statistics or sums.

        Who owns which component is not worked out again, which takes long of a million clients.
        """
        fresh = replace(self, **known)
        kept = ("client", "slot_index", "slot", "rank_groups")
        vars(fresh).update({name: vars(self)[name] for name in kept if name in vars(self)})
        return fresh

    @property
    def slots_by_client(self) -> list[tuple[int, ...]]:
        """Each client's slots."""
        starts = accumulate(self.ranks, initial=0)
        return [self.slots[i : i + r] for i, r in zip(starts, self.ranks, strict=False)]

    @cached_property
    def rank_groups(self) -> list[tuple[Tensor, Tensor]]:
        """Clients of equal rank: ``(clients (n,), their components (n, rank))``, rank 0 left out.

        A client's components come in the order of their slots.
        Each group is one batch, so work per client is a few batched calls however many clients.
        """
        starts = [0, *accumulate(self.ranks)]
        groups = []
        for rank in sorted(set(self.ranks) - {0}):
            members = [k for k, r in enumerate(self.ranks) if r == rank]
            rows = [
                sorted(range(starts[k], starts[k] + rank), key=self.slots.__getitem__)
                for k in members
            ]
            device = self.A.device
            groups.append((torch.tensor(members, device=device), torch.tensor(rows, device=device)))
        return groups

    def of_clients(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of some clients of equal rank as a batch over them.

        Args:
            components: ``(n, rank)``, from ``rank_groups``.

        Returns:
            ``A (*layers, n, rank, in_features)`` and ``B (*layers, n, out_features, rank)``.
        """
        return self.A[..., components, :], self.B.mT[..., components, :].mT
