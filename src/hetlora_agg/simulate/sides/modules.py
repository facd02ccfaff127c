"""Clients whose global model is one set of slots of equal standing, of which each trains some."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hetlora_agg import ClientUpdate, LowRank, MethodEntry, clients
from hetlora_agg.simulate.federation import Federation, Results, Server, Stream
from hetlora_agg.simulate.local import Adapter, Rules, Start, only
from hetlora_agg.simulate.network import Network, fold, layer_ranks
from hetlora_agg.simulate.sides.slice import Slice, Updates
from hetlora_agg.simulate.traffic import bytes_of

# Bits per entry of an upload: on average, and what a component may get.
MEAN_BITS = 8
BITS = (4, 8, 16)


class Select(Slice):
    """Trains a random choice of the slots, drawn anew each round, the others folded into its base.

    The global model has as many slots as the largest rank, and one scaling, `lora_alpha` over that
    rank, serves all clients: a slot is trained alike whoever chooses it.

    Attributes:
        first: the slots before the first round, in units of ΔW: a fresh draw, B zero.
        handed: the slots that this round's clients started from, in units of ΔW.
    """

    def __init__(self, federation: Federation, entry: MethodEntry) -> None:
        super().__init__(federation, entry)
        self.handed: dict[str, LowRank] = {}
        common = self.scaling(0)
        self.first = {
            name: LowRank(math.sqrt(common[name]) * own.A, own.B)
            for name, own in self.fresh(1).items()
        }

    def scaling(self, client: int) -> dict[str, float]:
        """`lora_alpha` over the largest rank of all, by layer."""
        settings = self.federation.settings
        widest = layer_ranks(self.federation.network, max(settings.ranks))
        return {name: settings.lora_alpha / rank for name, rank in widest.items()}

    def current(self, server: Server) -> dict[str, LowRank]:
        """All slots of the global model, by layer."""
        if server.results is None:
            return self.first
        return {name: result.factors for name, result in server.results.items()}

    def starts(self, server: Server, cohort: Sequence[int], number: int) -> list[Start]:
        """A base that took the slots the client did not choose, and an adapter of those it did."""
        self.handed = self.current(server)
        return [self.start(server, client, number) for client in cohort]

    def start(self, server: Server, client: int, number: int) -> Start:
        """One client's choice and what is folded."""
        generator = self.federation.generator(Stream.CHOICE, number - 1, client)
        scaling, ranks = self.scaling(client), self.ranks(client)
        chosen = {
            name: clients.select_and_fold(
                slots, ranks[name], generator=generator, scaling=scaling[name]
            )
            for name, slots in self.current(server).items()
        }
        return Start(
            fold(server.network, {name: own.rest for name, own in chosen.items()}),
            {name: own.adapter for name, own in chosen.items()},
            scaling,
            {name: own.slots for name, own in chosen.items()},
        )

    def bytes_down(self, client: int, start: Start, server: Server, number: int) -> int:
        """All slots: those that the client trains and those that its base takes."""
        return 0 if server.results is None else bytes_of(self.current(server))

    def changes(self, updates: Updates, starts: Sequence[Start], number: int) -> Updates:
        """Every client's whole model: what it sent, and the slots it has and did not train."""
        return {
            name: [
                _beside(update, self.handed[name], trained_slots(start)[name])
                for update, start in zip(updates[name], starts, strict=True)
            ]
            for name in updates
        }

    def options(self, server: Server, cohort: Sequence[int], number: int) -> dict[str, Any]:
        """Last round's slots, always: what nobody trains stays, from the first round on."""
        return {"previous": self.current(server)}

    def absorb(self, server: Server, results: Results, whole: Network) -> Server:
        """The slots go to the clients; the base stays as it is."""
        return Server(server.network, whole, results)


class Freeze(Select):
    """Holds every slot, trains the most important ones and uploads them quantised.

    A client that has no scores yet trains a random choice. Would all train the leading slots, the
    others would rest with clients of high rank alone, and with B = 0 score nothing for ever.

    Attributes:
        scores: how important each slot is to the client, `(rank,)` by layer, from its own training.
        uploads: what each client sent last, as integers, by layer.
    """

    def __init__(self, federation: Federation, entry: MethodEntry) -> None:
        super().__init__(federation, entry)
        self.scores: dict[int, dict[str, Tensor]] = {}
        self.uploads: dict[int, dict[str, clients.Quantised]] = {}

    def start(self, server: Server, client: int, number: int) -> Start:
        """All slots, of which the client will train those in `Start.slots`."""
        scaling = self.scaling(client)
        adapter = {
            name: LowRank(own.A / math.sqrt(scaling[name]), own.B / math.sqrt(scaling[name]))
            for name, own in self.current(server).items()
        }
        return Start(server.network, adapter, scaling, self.choice(client, number))

    def choice(self, client: int, number: int) -> dict[str, tuple[int, ...]]:
        """The slots that matter most to the client by what it trained last, at random at first."""
        ranks, known = self.ranks(client), self.scores.get(client)
        if known is not None:
            return {name: clients.important_slots(known[name], ranks[name]) for name in ranks}
        generator = self.federation.generator(Stream.CHOICE, number - 1, client)
        order = {
            name: torch.randperm(own.rank, generator=generator).tolist()
            for name, own in self.first.items()
        }
        return {name: tuple(sorted(order[name][:rank])) for name, rank in ranks.items()}

    def rules(self, client: int, start: Start, number: int) -> Rules:
        """The chosen slots train; the gradients of all are scored."""
        scores = self.scores.setdefault(client, {})

        def steer(name: str, factors: LowRank, gradient: LowRank) -> LowRank:
            scores[name] = clients.importance(factors, gradient, scores.get(name))
            return only(gradient, trained_slots(start)[name])

        return Rules(steer=steer)

    def send(
        self, client: int, start: Start, trained: Adapter, number: int
    ) -> dict[str, ClientUpdate]:
        """The trained slots, quantised and restored."""
        slots, scores = trained_slots(start), self.scores[client]
        self.uploads[client] = {
            name: clients.quantise(
                own.select(list(slots[name])),
                clients.allot_bits(scores[name][list(slots[name])], MEAN_BITS, BITS),
            )
            for name, own in trained.items()
        }
        sent = {name: upload.dequantise() for name, upload in self.uploads[client].items()}
        return self.updates(client, start.scaling, sent, slots)

    def bytes_up(self, client: int, sent: Mapping[str, ClientUpdate], number: int) -> int:
        """The integers, and what restores them."""
        return sum(upload.payload_bytes for upload in self.uploads[client].values())


def trained_slots(start: Start) -> Mapping[str, tuple[int, ...]]:
    """The slots a client chose."""
    if start.slots is None:
        raise RuntimeError("expected a client that chose its slots")
    return start.slots


def _beside(update: ClientUpdate, slots: LowRank, trained: Sequence[int]) -> ClientUpdate:
    """An update and the slots that are not among the trained ones."""
    rest = slots.select([slot for slot in range(slots.rank) if slot not in trained])
    return ClientUpdate(
        torch.cat([update.A, rest.A]),
        torch.cat([update.scaling * update.B, rest.B], dim=1),
        weight=update.weight,
        id=update.id,
    )
