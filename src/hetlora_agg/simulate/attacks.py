"""Clients that send something else than what they trained: attacks on the reference federation.

An attack is a function of what the cohort trained, the federation, a generator and the round, that
returns what arrives at the server instead. Those here are frozen dataclasses with a call.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from hetlora_agg import ClientUpdate, InputValueError
from hetlora_agg.linalg import product_norm
from hetlora_agg.simulate.federation import Federation
from hetlora_agg.simulate.network import layer_ranks

Updates = Mapping[str, Sequence[ClientUpdate]]
Change = Callable[[str, ClientUpdate], ClientUpdate]

Attack = Callable[[Updates, Federation, torch.Generator, int], Updates]
"""What the cohort trained by layer, the federation, a generator of the round's own and the number
of the round from 1, to what the server is sent. A client's id is its number."""


@dataclass(frozen=True)
class RankInflation:
    """Sends noise at a rank of the attackers' choice, so that they own the upper slots alone.

    The noise is as large as what honest clients send, so that no norm gives it away, and the rank
    need not be above any configured one: whoever declares the largest that is allowed shares its
    upper slots with few. Methods that need one A on all clients refuse it.

    Attributes:
        clients: the attackers, by number.
        rank: that they declare, in each layer at most what it can hold; None is twice the largest
            configured rank.
        size: `‖ΔW‖_F` of the noise over the mean of that of the honest clients, layer by layer.
        weight: that they declare; None is their true number of examples.

    Example:
        >>> from hetlora_agg.simulate import simulate
        >>> options = {"ranks": (2, 2, 4), "rounds": 1, "local_epochs": 1}
        >>> attacked = simulate("rb", attack=RankInflation((0,)), **options)
        >>> attacked.aggregation_noise > simulate("rb", **options).aggregation_noise
        True
    """

    clients: tuple[int, ...] = (0,)
    rank: int | None = None
    size: float = 1.0
    weight: float | None = None

    def __call__(
        self, updates: Updates, federation: Federation, generator: torch.Generator, number: int
    ) -> Updates:
        """The updates, those of the attackers replaced by noise."""
        rank = 2 * max(federation.settings.ranks) if self.rank is None else self.rank
        ranks = layer_ranks(federation.network, rank)
        sizes = {name: self.size * _usual_norm(own, self.clients) for name, own in updates.items()}

        def noise(name: str, update: ClientUpdate) -> ClientUpdate:
            A = torch.randn(ranks[name], update.A.shape[-1], generator=generator)
            B = torch.randn(update.B.shape[-2], ranks[name], generator=generator)
            B = B * (sizes[name] / (update.scaling * product_norm(B, A)))
            weight = update.weight if self.weight is None else self.weight
            return replace(update, A=A, B=B, rank=ranks[name], weight=weight, slots=None)

        return _changed(updates, self.clients, federation, noise)


@dataclass(frozen=True)
class Scale:
    """Sends a multiple of what the attackers trained.

    Attributes:
        clients: the attackers, by number.
        times: what B is multiplied by.

    Example:
        >>> from hetlora_agg.simulate import Settings, build_federation
        >>> sent = {"q": [ClientUpdate(torch.ones(1, 2), torch.ones(2, 1), id=k) for k in (0, 1)]}
        >>> federation = build_federation(Settings(ranks=(1, 1)))
        >>> arrived = Scale((1,), times=3.0)(sent, federation, torch.Generator(), 1)
        >>> [float(update.B[0]) for update in arrived["q"]]
        [1.0, 3.0]
    """

    clients: tuple[int, ...] = (0,)
    times: float = 10.0

    def __call__(
        self, updates: Updates, federation: Federation, generator: torch.Generator, number: int
    ) -> Updates:
        """The updates, those of the attackers multiplied."""

        def scaled(_: str, update: ClientUpdate) -> ClientUpdate:
            return replace(update, B=self.times * update.B)

        return _changed(updates, self.clients, federation, scaled)


@dataclass(frozen=True)
class SignFlip:
    """Sends the opposite of what the attackers trained.

    Attributes:
        clients: the attackers, by number.

    Example:
        >>> from hetlora_agg.simulate import Settings, build_federation
        >>> sent = {"q": [ClientUpdate(torch.ones(1, 2), torch.ones(2, 1), id=k) for k in (0, 1)]}
        >>> federation = build_federation(Settings(ranks=(1, 1)))
        >>> arrived = SignFlip((1,))(sent, federation, torch.Generator(), 1)
        >>> [float(update.B[0]) for update in arrived["q"]]
        [1.0, -1.0]
    """

    clients: tuple[int, ...] = (0,)

    def __call__(
        self, updates: Updates, federation: Federation, generator: torch.Generator, number: int
    ) -> Updates:
        """The updates, those of the attackers with the other sign."""
        return Scale(self.clients, -1.0)(updates, federation, generator, number)


ATTACKS: Mapping[str, Callable[[tuple[int, ...]], Attack]] = MappingProxyType(
    {"rank-inflation": RankInflation, "scale": Scale, "sign-flip": SignFlip}
)
"""Attacks by name, as functions of the attackers."""


def _changed(
    updates: Updates, attackers: Collection[int], federation: Federation, change: Change
) -> Updates:
    """The updates, those of the attackers changed; who sits the round out sends nothing."""
    if unknown := sorted(set(attackers) - {*range(len(federation.clients))}):
        raise InputValueError(
            f"simulate: attack: expected attackers among the clients 0 to "
            f"{len(federation.clients) - 1}, got {unknown}"
        )
    return {
        name: [change(name, update) if update.id in attackers else update for update in own]
        for name, own in updates.items()
    }


def _usual_norm(updates: Sequence[ClientUpdate], attackers: Collection[int]) -> float:
    """Mean of `‖ΔW_k‖_F` over the honest clients; over all where there are none."""
    honest = [update for update in updates if update.id not in attackers] or updates
    return statistics.fmean(u.scaling * float(product_norm(u.B, u.A)) for u in honest)
