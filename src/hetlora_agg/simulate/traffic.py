"""What a round costs: bytes that clients send and receive, and the server's time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hetlora_agg import ClientUpdate, LowRank
from hetlora_agg.simulate.federation import Results, Server
from hetlora_agg.simulate.network import Network

BYTES = 4
"""Of one entry: factors travel as float32."""


@dataclass(frozen=True)
class Costs:
    """One round's costs; `SimulationResult` has one entry per round of each.

    Attributes:
        bytes_up: that the cohort sent: the factors that the method's clients upload, quantised
            where they quantise, and what else the method needs of them. Names, slot numbers and
            headers are not counted.
        bytes_down: that the cohort needed to start: adapters, and what the base took since each
            client last took part, in factors or as dense weights, whichever is less. The
            pre-trained base is not counted, nor is a first draw: a seed gives it.
        server_seconds: wall time of the aggregation, all layers.
    """

    bytes_up: int
    bytes_down: int
    server_seconds: float


class Ledger:
    """Who took part when, and what each client has not yet seen of the base.

    Attributes:
        last: the last round each client took part in.
    """

    def __init__(self, network: Network, clients: int) -> None:
        self.last: dict[int, int] = {}
        self._dense = {name: layer.weight.numel() for name, layer in network.items()}
        self._lacking = [dict.fromkeys(network, 0) for _ in range(clients)]

    def caught_up(self, client: int) -> int:
        """Bytes of what the client's base lacks."""
        return BYTES * sum(self._lacking[client].values())

    def close(self, number: int, cohort: Sequence[int], results: Results, after: Server) -> None:
        """Enter a round: the cohort had all there was, the base took what no adapter holds."""
        for client in cohort:
            self.last[client] = number
            self._lacking[client] = dict.fromkeys(self._dense, 0)
        for name, result in results.items():
            taken = result.total() if after.results is None else result.residual
            added = 0 if taken is None else entries([taken])
            for lacking in self._lacking:
                lacking[name] = min(lacking[name] + added, self._dense[name])


def entries(factors: Iterable[LowRank | ClientUpdate], of: Sequence[str] = ("A", "B")) -> int:
    """How many numbers these factors hold, those named in `of`."""
    return sum(getattr(own, factor).numel() for own in factors for factor in of)


def bytes_of(
    adapter: Mapping[str, LowRank] | Mapping[str, ClientUpdate], of: Sequence[str] = ("A", "B")
) -> int:
    """What the factors of an adapter, those named in `of`, take on the way."""
    return BYTES * entries(adapter.values(), of)
