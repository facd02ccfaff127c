"""The usual clients, and those that restart: what other client sides are variations of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hetlora_agg import ClientUpdate, InputValueError, LowRank, MethodEntry, distribute
from hetlora_agg.simulate.federation import Federation, Results, Server, Stream
from hetlora_agg.simulate.local import FACTORS, Adapter, Rules, Slots, Start
from hetlora_agg.simulate.network import Network, fold, fresh_adapter, layer_ranks
from hetlora_agg.simulate.traffic import Ledger, bytes_of

Updates = Mapping[str, Sequence[ClientUpdate]]


class Slice:
    """Trains the leading components that `distribute` hands out at the client's rank.

    One object serves one run: what clients remember from round to round is in its attributes.
    Rounds are counted from 1.

    Attributes:
        federation: the clients and what they share.
        entry: the method.
        ledger: who took part when, and what of the base they lack.
    """

    def __init__(self, federation: Federation, entry: MethodEntry) -> None:
        self.federation = federation
        self.entry = entry
        self.ledger = Ledger(federation.network, len(federation.clients))

    def ranks(self, client: int) -> dict[str, int]:
        """The rank at which the client takes part, by layer."""
        return layer_ranks(self.federation.network, self.federation.settings.ranks[client])

    def scaling(self, client: int) -> dict[str, float]:
        """The scaling of the client's adapter, by layer: `lora_alpha / rank`."""
        alpha = self.federation.settings.lora_alpha
        ranks = layer_ranks(self.federation.network, self.federation.settings.ranks[client])
        return {name: alpha / rank for name, rank in ranks.items()}

    def starts(self, server: Server, cohort: Sequence[int], number: int) -> list[Start]:
        """What each client of the cohort starts the round from."""
        handed = self.hand_out(server, cohort, number)
        return [
            Start(server.network, adapter, self.scaling(client))
            for client, adapter in zip(cohort, handed, strict=True)
        ]

    def hand_out(
        self, server: Server, cohort: Sequence[int], number: int
    ) -> list[dict[str, LowRank]]:
        """The adapter of each client of the cohort, by layer."""
        ranks = [self.ranks(client) for client in cohort]
        if server.results is None:
            fresh = self.fresh(number)
            return [{name: fresh[name].select(slice(own[name])) for name in fresh} for own in ranks]
        scalings = [self.scaling(client) for client in cohort]
        handed: list[dict[str, LowRank]] = [{} for _ in cohort]
        generator = self.federation.generator(Stream.PADDING, number - 1)
        for name, result in server.results.items():
            parts = distribute(
                result,
                [own[name] for own in ranks],
                [own[name] for own in scalings],
                generator=generator,
            )
            for adapter, part in zip(handed, parts, strict=True):
                adapter[name] = part
        return handed

    def fresh(self, number: int) -> dict[str, LowRank]:
        """One draw at the largest rank: clients agree on the slots they share."""
        generator = self.federation.generator(Stream.START, number - 1)
        return fresh_adapter(
            self.federation.network, max(self.federation.settings.ranks), generator
        )

    def rules(self, client: int, start: Start, number: int) -> Rules:
        """What trains in this round, and what else the client minds."""
        return Rules()

    def send(
        self, client: int, start: Start, trained: Adapter, number: int
    ) -> dict[str, ClientUpdate]:
        """The client's update, by layer."""
        return self.updates(client, start.scaling, trained, start.slots)

    def updates(
        self, client: int, scaling: Mapping[str, float], sent: Adapter, slots: Slots | None = None
    ) -> dict[str, ClientUpdate]:
        """These factors in the client's name and with its weight."""
        return {
            name: ClientUpdate(
                own.A,
                own.B,
                own.rank,
                weight=len(self.federation.clients[client]),
                scaling=scaling[name],
                slots=None if slots is None else slots[name],
                id=client,
            )
            for name, own in sent.items()
        }

    def exchanged(self, number: int) -> tuple[str, ...]:
        """The factors that travel in a round: those that others do not know already."""
        return FACTORS

    def bytes_up(self, client: int, sent: Mapping[str, ClientUpdate], number: int) -> int:
        """What the client's upload takes."""
        return bytes_of(sent, self.exchanged(number))

    def bytes_down(self, client: int, start: Start, server: Server, number: int) -> int:
        """What the client needs to start from: its adapter, and what its base lacks."""
        adapter = 0 if server.results is None else bytes_of(start.adapter, self.exchanged(number))
        return adapter + self.ledger.caught_up(client)

    def changes(self, updates: Updates, starts: Sequence[Start], number: int) -> Updates:
        """The updates as changes of the base that the global update is added to."""
        return updates

    def options(self, server: Server, cohort: Sequence[int], number: int) -> dict[str, Any]:
        """The options that depend on the state between rounds: `previous`, `initial`.

        `previous` is this: last round's results where somebody misses a round; for methods that
        cannot do without it always, and as wide as this cohort's clients were handed it.
        """
        if "previous" in self.entry.needs:
            return {"previous": self.reference(server, cohort, number)}
        if self.federation.somebody_misses and server.results is not None:
            return {"previous": server.results}
        return {}

    def reference(
        self, server: Server, cohort: Sequence[int], number: int
    ) -> dict[str, Any] | None:
        """The global factors, of no smaller rank than any client of the cohort has; None at first.

        Slots beyond the global rank are those that the clients were handed: random rows in A, zero
        columns in B.
        """
        if server.results is None:
            return None
        generator = self.federation.generator(Stream.PADDING, number - 1)
        reference: dict[str, Any] = {}
        for name, result in server.results.items():
            widest = max(self.ranks(client)[name] for client in cohort)
            (handed,) = distribute(result, [widest], generator=generator)
            reference[name] = result if result.rank >= widest else handed
        return reference

    def absorb(self, server: Server, results: Results, whole: Network) -> Server:
        """The server after a round: the residual goes into the base, the factors to the clients.

        When the factors cannot be sliced to the clients' ranks, the base takes them as well.

        Raises:
            InputValueError: the method leaves a factor with the clients, who do not keep it.
        """
        if any(result.shared != {"A", "B"} for result in results.values()):
            raise InputValueError(
                f"simulate: method {self.entry.name!r}: expected both factors shared, got one that "
                f"stays with clients who train {self.entry.client!r}; register the method with "
                "the client side that keeps it"
            )
        return self.keep(server, results, whole)

    def keep(self, server: Server, results: Results, whole: Network) -> Server:
        """The server whose clients go on from these results, if they can be sliced."""
        if not all(result.nested for result in results.values()):
            return Server(whole, whole)
        rest = {n: r.residual for n, r in results.items() if r.residual is not None}
        return Server(fold(server.network, rest), whole, results)


class Restart(Slice):
    """Trains a fresh adapter on a base weight that took the whole update."""

    def absorb(self, server: Server, results: Results, whole: Network) -> Server:
        """The base takes everything, whether it could be sliced or not."""
        return Server(whole, whole)
