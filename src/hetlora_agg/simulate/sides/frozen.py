"""Clients with a factor that is frozen, or that stays with them."""

from __future__ import annotations

from collections.abc import Sequence

from hetlora_agg import AggregationResult, ClientUpdate, LowRank, MethodEntry, clients
from hetlora_agg.simulate.federation import Federation, Results, Server
from hetlora_agg.simulate.local import FACTORS, Adapter, Rules, Start
from hetlora_agg.simulate.network import Network
from hetlora_agg.simulate.sides.slice import Slice
from hetlora_agg.simulate.traffic import bytes_of


class TrainB(Slice):
    """Trains B; A is the first draw, common to all clients and frozen for the whole run.

    Attributes:
        common: the first draw at the largest rank. A slot that nobody filled for a round comes back
            with the A it had.
    """

    def __init__(self, federation: Federation, entry: MethodEntry) -> None:
        super().__init__(federation, entry)
        self.common = self.fresh(1)

    def hand_out(
        self, server: Server, cohort: Sequence[int], number: int
    ) -> list[dict[str, LowRank]]:
        """The common A and the global B."""
        return [
            {name: LowRank(self.common[name].A[: own.rank], own.B) for name, own in adapter.items()}
            for adapter in super().hand_out(server, cohort, number)
        ]

    def rules(self, client: int, start: Start, number: int) -> Rules:
        """B alone trains."""
        return Rules(factors=("B",))

    def exchanged(self, number: int) -> tuple[str, ...]:
        """B alone."""
        return ("B",)

    def absorb(self, server: Server, results: Results, whole: Network) -> Server:
        """B goes to the clients, who have the A that belongs to it."""
        return self.keep(server, results, whole)


class Alternate(Slice):
    """Trains the factor that takes the scaling this round, the other one frozen and common."""

    def rules(self, client: int, start: Start, number: int) -> Rules:
        """All but the factor that takes no scaling."""
        return Rules(factors=self.exchanged(number))

    def exchanged(self, number: int) -> tuple[str, ...]:
        """What is trained in the round."""
        frozen = self.entry.unscaled_factor({"round": number})
        return tuple(factor for factor in FACTORS if factor != frozen)

    def bytes_down(self, client: int, start: Start, server: Server, number: int) -> int:
        """What the last round trained; both factors for a client that missed it."""
        known = self.ledger.last.get(client) == number - 1
        factors = self.exchanged(number - 1) if known else FACTORS
        adapter = 0 if server.results is None else bytes_of(start.adapter, factors)
        return adapter + self.ledger.caught_up(client)

    def absorb(self, server: Server, results: Results, whole: Network) -> Server:
        """Both factors go to the clients: the frozen one is what they have."""
        return self.keep(server, results, whole)


class KeepB(Slice):
    """Takes the global A and goes on with its own B, however long ago it trained it.

    Attributes:
        own: each client's factors as it last trained them, by layer.
    """

    def __init__(self, federation: Federation, entry: MethodEntry) -> None:
        super().__init__(federation, entry)
        self.own: dict[int, Adapter] = {}

    def hand_out(
        self, server: Server, cohort: Sequence[int], number: int
    ) -> list[dict[str, LowRank]]:
        """The global A with the client's own B; the mean B for clients that join."""
        handed = super().hand_out(server, cohort, number)
        for client, adapter in zip(cohort, handed, strict=True):
            if server.results is not None and client in self.own:
                scaling = self.scaling(client)
                for name, result in server.results.items():
                    adapter[name] = _continued(result, self.own[client][name], scaling[name])
        return handed

    def send(
        self, client: int, start: Start, trained: Adapter, number: int
    ) -> dict[str, ClientUpdate]:
        """Both factors; B stays with the client as well."""
        self.own[client] = trained
        return super().send(client, start, trained, number)

    def exchanged(self, number: int) -> tuple[str, ...]:
        """A alone."""
        return ("A",)

    def bytes_down(self, client: int, start: Start, server: Server, number: int) -> int:
        """A; both factors for a client that joins."""
        if server.results is None or client in self.own:
            return super().bytes_down(client, start, server, number)
        return bytes_of(start.adapter)

    def absorb(self, server: Server, results: Results, whole: Network) -> Server:
        """A goes to the clients; the mean B is there for those that join and for the test."""
        return self.keep(server, results, whole)


def _continued(result: AggregationResult, own: LowRank, scaling: float) -> LowRank:
    """The global A over the client's B; slots the global result lost are the client's own."""
    known, lost = own.select(slice(result.rank)), own.select(slice(result.rank, None))
    return clients.continue_from(result, known, scaling=scaling).plus(lost)
