"""The federated loop: hand out, train, aggregate, absorb, evaluate; the same for every method."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from hetlora_agg import (
    AggregationResult,
    ClientUpdate,
    aggregate_layers,
    resolve,
)
from hetlora_agg.simulate.attacks import Attack
from hetlora_agg.simulate.federation import Federation, Results, Server, Stream
from hetlora_agg.simulate.local import Start, train_adapter
from hetlora_agg.simulate.measures import Measures, initialisation_noise, measure
from hetlora_agg.simulate.network import Training, accuracy, fold, layer_ranks
from hetlora_agg.simulate.result import SimulationResult
from hetlora_agg.simulate.sides import SIDES, Slice
from hetlora_agg.simulate.traffic import Costs

Method = str | Callable[..., AggregationResult]
Progress = Callable[[str, int, float], None]
"""Called after every round with the method's label, the round and the accuracy."""


@dataclass(frozen=True)
class Round:
    """What happened in one round.

    Attributes:
        starts: what each client of the cohort started from.
        updates: what they sent, by layer, attackers included.
        results: what the method made of it, by layer.
        measures: what is to be said about it.
        server: the global model after it.
        costs: bytes and the server's time.
    """

    starts: Sequence[Start]
    updates: Mapping[str, Sequence[ClientUpdate]]
    results: Results
    measures: Measures
    server: Server
    costs: Costs


def run(
    federation: Federation,
    method: Method,
    *,
    label: str | None = None,
    attack: Attack | None = None,
    progress: Progress | None = None,
    sides: Mapping[str, type[Slice]] = SIDES,
    **options: Any,
) -> SimulationResult:
    """All rounds of one method in a federation that is ready; see `simulate`.

    Args:
        federation: from `build_federation`, or put together from a network of one's own.
        method: a name in `METHODS` or a function of `Components`.
        label: what the result calls it; None is its name.
        attack: what attackers send in place of what they trained.
        progress: called after every round as `progress(label, round, accuracy)`.
        sides: the client side for every name in `CLIENTS`, where clients are to do something else.
        **options: for `aggregate_layers` and the method.
    """
    entry = resolve(method)
    label = label or entry.name
    side = sides[entry.client](federation, entry)
    server = Server(federation.network, federation.network)
    scores = [accuracy(server.whole, federation.test, federation.forward)]
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for number, cohort in enumerate(federation.cohorts, start=1):
        played = play(side, server, cohort, number, options, attack)
        server = played.server
        rows.append(asdict(played.measures) | asdict(played.costs))
        scores.append(accuracy(server.whole, federation.test, federation.forward))
        if progress is not None:
            progress(label, number, scores[-1])
    columns: dict[str, Any] = {name: tuple(row[name] for row in rows) for name in rows[0]}
    return SimulationResult(
        label,
        federation.settings,
        tuple(scores),
        participants=federation.cohorts,
        seconds=time.perf_counter() - began,
        **columns,
    )


def play(
    side: Slice,
    server: Server,
    cohort: Sequence[int],
    number: int,
    options: Mapping[str, Any] | None = None,
    attack: Attack | None = None,
) -> Round:
    """One round of the side's method.

    Args:
        side: the method's clients, with what they remember.
        server: the global model before the round.
        cohort: the clients that take part.
        number: of the round, from 1.
        options: of the caller's, before those that the simulator supplies.
        attack: what attackers send in place of what they trained; None is that all are honest.
    """
    federation, entry = side.federation, side.entry
    starts = side.starts(server, cohort, number)
    # Before training: clients remember what they train.
    down = sum(
        side.bytes_down(client, start, server, number)
        for client, start in zip(cohort, starts, strict=True)
    )
    weights = [len(federation.clients[client]) for client in cohort]
    noise = initialisation_noise(starts, weights, server.whole, federation.network)
    updates: Mapping[str, Sequence[ClientUpdate]] = local_updates(side, starts, cohort, number)
    if attack is not None:
        generator = federation.generator(Stream.ATTACK, number - 1)
        updates = attack(updates, federation, generator, number)
    options = dict(options or {})
    known = supplied(side, server, cohort, number, options) | options
    began = time.perf_counter()
    results = aggregate_layers(updates, entry.run, **known)
    seconds = time.perf_counter() - began
    totals = {name: result.total() for name, result in results.items()}
    changes = side.changes(updates, starts, number)
    measures = measure(changes, results, min(federation.settings.ranks), noise)
    up = sum(side.bytes_up(client, own, number) for client, own in by_client(updates).items())
    after = side.absorb(server, results, fold(server.network, totals))
    side.ledger.close(number, cohort, results, after)
    return Round(starts, updates, results, measures, after, Costs(up, down, seconds))


def local_updates(
    side: Slice, starts: Sequence[Start], cohort: Sequence[int], number: int
) -> dict[str, list[ClientUpdate]]:
    """One round of local training: the cohort's updates, by layer."""
    federation, settings = side.federation, side.federation.settings
    training = Training(settings.local_epochs, settings.learning_rate)
    updates: dict[str, list[ClientUpdate]] = {name: [] for name in federation.network}
    for client, start in zip(cohort, starts, strict=True):
        trained = train_adapter(
            start,
            federation.clients[client],
            training,
            federation.generator(Stream.TRAIN, number - 1, client),
            side.rules(client, start, number),
            federation.forward,
        )
        for name, update in side.send(client, start, trained, number).items():
            updates[name].append(update)
    return updates


def by_client(
    updates: Mapping[str, Sequence[ClientUpdate]],
) -> dict[Any, dict[str, ClientUpdate]]:
    """The updates by id, then by layer."""
    sent: dict[Any, dict[str, ClientUpdate]] = {}
    for name, own in updates.items():
        for update in own:
            sent.setdefault(update.id, {})[name] = update
    return sent


def supplied(
    side: Slice,
    server: Server,
    cohort: Sequence[int],
    number: int,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The options that only the federation knows, for a method that has them."""
    federation = side.federation
    levels = {
        rank
        for own in federation.settings.ranks
        for rank in layer_ranks(federation.network, own).values()
    }
    # What a quorum drops stays as it was in the last round.
    last = {"previous": server.results} if "quorum" in options and server.results else {}
    known = {
        "levels": tuple(sorted(levels)),
        "round": number,
        "generator": federation.generator(Stream.METHOD, number - 1),
        **last,
        **side.options(server, cohort, number),
    }
    return {name: value for name, value in known.items() if name in side.entry.options}
