"""Clients that lower their rank where the tail of their components fades."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hetlora_agg import ClientUpdate, MethodEntry, clients
from hetlora_agg.simulate.federation import Federation
from hetlora_agg.simulate.local import Adapter, Rules, Start
from hetlora_agg.simulate.sides.slice import Slice

# The published share of the rank that is kept: one slot less at these ranks.
DECAY = 0.99

# Of 0.001 to 0.1, the largest that cost no accuracy on seeds 10-12, which no default uses.
PENALTY = 0.01


class Prune(Slice):
    """Trains the leading components, its tail penalised, and lowers its rank where the tail fades.

    The rank goes down by itself in every layer. The scaling stays that of the configured rank, so
    that a pruned client's update differs by what was pruned and nothing else.

    Attributes:
        own: the rank that is left to each client that has trained, by layer.
    """

    def __init__(self, federation: Federation, entry: MethodEntry) -> None:
        super().__init__(federation, entry)
        self.own: dict[int, dict[str, int]] = {}

    def ranks(self, client: int) -> dict[str, int]:
        """The configured rank, or what is left of it."""
        return self.own.get(client) or super().ranks(client)

    def rules(self, client: int, start: Start, number: int) -> Rules:
        """The size of the tail, beyond `DECAY` of the rank, is added to the loss."""
        return Rules(penalty=penalty)

    def send(
        self, client: int, start: Start, trained: Adapter, number: int
    ) -> dict[str, ClientUpdate]:
        """The update at the rank that is left after training."""
        left = {
            name: clients.prune(own, start.adapter[name], decay=DECAY)
            for name, own in trained.items()
        }
        self.own[client] = left
        kept = {name: own.select(slice(left[name])) for name, own in trained.items()}
        return super().send(client, start, kept, number)


def penalty(adapter: Adapter) -> Tensor:
    """`PENALTY` times the size of every layer's tail, summed."""
    tails = [
        clients.tail_penalty(own, max(1, math.floor(DECAY * own.rank))) for own in adapter.values()
    ]
    return PENALTY * torch.stack(tails).sum()
