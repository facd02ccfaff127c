"""Clients that start from the QR decomposition of their base weight and correct their gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hetlora_agg import ClientUpdate, LowRank, MethodEntry, clients
from hetlora_agg.simulate.federation import Federation, Results, Server
from hetlora_agg.simulate.local import Adapter, Rules, Start
from hetlora_agg.simulate.network import Linear, Network, Training
from hetlora_agg.simulate.sides.slice import Slice, Updates
from hetlora_agg.simulate.traffic import bytes_of


class QRStart(Slice):
    """Starts from leading columns of the base weight's QR, corrects gradients by control variates.

    In the first round the client takes the piece it starts from out of its base, so that all begin
    with the pre-trained model; later it trains its slice of the global update on the pre-trained
    base, as others do.

    Variates are gradients with respect to the global factors, of which a client's are `1/√scaling`
    times as large: they could not be averaged over clients of different scalings otherwise. What
    moves a client's variate is where plain descent along its gradients would have ended. Adam's own
    path would not do: its steps have the size of the learning rate whatever the gradients have, and
    variates made of them drown the gradients they are to correct.

    Attributes:
        variate: the server's control variate at the largest rank, by layer.
        own: each client's control variate at its own rank, by layer.
        taken: this round's gradients of the client in training, corrected and summed, by layer.
        moved: what this round's clients changed of theirs, by layer.
    """

    def __init__(self, federation: Federation, entry: MethodEntry) -> None:
        super().__init__(federation, entry)
        self.variate = {name: _zeros(own) for name, own in self.fresh(1).items()}
        self.own: dict[int, dict[str, LowRank]] = {}
        self.taken: dict[str, LowRank] = {}
        self.moved: dict[str, list[LowRank]] = {name: [] for name in self.variate}

    def starts(self, server: Server, cohort: Sequence[int], number: int) -> list[Start]:
        """In the first round the QR piece on the base without it, then slices as usual."""
        if server.results is not None:
            return super().starts(server, cohort, number)
        return [self.first_start(client) for client in cohort]

    def first_start(self, client: int) -> Start:
        """The pre-trained model, its leading piece in the adapter."""
        ranks, scaling = self.ranks(client), self.scaling(client)
        pieces = {
            name: clients.qr_start(layer.weight, ranks[name], scaling=scaling[name])
            for name, layer in self.federation.network.items()
        }
        network = {
            name: Linear(pieces[name].base, layer.bias)
            for name, layer in self.federation.network.items()
        }
        return Start(network, {name: piece.adapter for name, piece in pieces.items()}, scaling)

    def options(self, server: Server, cohort: Sequence[int], number: int) -> dict[str, Any]:
        """In the first round what all clients started from, so that it is not counted as update."""
        if server.results is not None:
            return super().options(server, cohort, number)
        initial = {
            name: clients.qr_start(self.federation.network[name].weight, slots.rank).initial
            for name, slots in self.variate.items()
        }
        return {**super().options(server, cohort, number), "initial": initial}

    def changes(self, updates: Updates, starts: Sequence[Start], number: int) -> Updates:
        """In the first round the updates less what the clients started from."""
        if number > 1:
            return updates
        return {
            name: [
                _less(update, start.adapter[name])
                for update, start in zip(updates[name], starts, strict=True)
            ]
            for name in updates
        }

    def rules(self, client: int, start: Start, number: int) -> Rules:
        """Every gradient is corrected by the client's variate and the server's."""
        own = self.variates(client)
        self.taken = {name: _zeros(variate) for name, variate in own.items()}

        def steer(name: str, factors: LowRank, gradient: LowRank) -> LowRank:
            root = math.sqrt(start.scaling[name])
            taken = clients.corrected(_times(1 / root, gradient), own[name], self.variate[name])
            self.taken[name] = _sum(self.taken[name], taken)
            return _times(root, taken)

        return Rules(steer=steer)

    def variates(self, client: int) -> dict[str, LowRank]:
        """The client's control variates, zero before it has trained."""
        ranks = self.ranks(client)
        return self.own.get(client) or {
            name: _zeros(slots.select(slice(ranks[name]))) for name, slots in self.variate.items()
        }

    def send(
        self, client: int, start: Start, trained: Adapter, number: int
    ) -> dict[str, ClientUpdate]:
        """The update; the client's variate moves, and the server hears by how much."""
        settings, examples = self.federation.settings, len(self.federation.clients[client])
        before, after = self.variates(client), {}
        for name, taken in self.taken.items():
            after[name] = clients.client_variate(
                before[name],
                self.variate[name],
                _zeros(taken),
                _times(-settings.learning_rate, taken),
                steps=Training(settings.local_epochs, settings.learning_rate).steps(examples),
                learning_rate=settings.learning_rate,
            )
            self.moved[name].append(_sum(after[name], _times(-1, before[name])))
        self.own[client] = after
        return super().send(client, start, trained, number)

    def bytes_up(self, client: int, sent: Mapping[str, ClientUpdate], number: int) -> int:
        """The factors, and what the client's variate moved by: as many numbers."""
        return super().bytes_up(client, sent, number) + bytes_of(self.own[client])

    def bytes_down(self, client: int, start: Start, server: Server, number: int) -> int:
        """The adapter, and the server's variate at the client's rank; in round 1 it is zero."""
        variate = 0 if server.results is None else bytes_of(self.variates(client))
        return super().bytes_down(client, start, server, number) + variate

    def absorb(self, server: Server, results: Results, whole: Network) -> Server:
        """The factors go to the clients; the server's variate moves with theirs."""
        total = len(self.federation.clients)
        for name, moved in self.moved.items():
            self.variate[name] = clients.server_variate(self.variate[name], moved, clients=total)
            moved.clear()
        return super().absorb(server, results, whole)


def _zeros(like: LowRank) -> LowRank:
    return LowRank(torch.zeros_like(like.A), torch.zeros_like(like.B))


def _times(number: float, factors: LowRank) -> LowRank:
    """Each factor times a number, entry by entry."""
    return LowRank(number * factors.A, number * factors.B)


def _sum(one: LowRank, other: LowRank) -> LowRank:
    """The factors added entry by entry: these are gradients, not matrices in factors."""
    return LowRank(one.A + other.A, one.B + other.B)


def _less(update: ClientUpdate, start: LowRank) -> ClientUpdate:
    """The update with what it started from taken off, side by side."""
    change = LowRank(update.A, update.B).minus(start)
    return replace(update, A=change.A, B=change.B, rank=change.rank)
