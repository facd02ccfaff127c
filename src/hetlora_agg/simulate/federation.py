"""The federated loop: hand out, train, aggregate, fold, evaluate; the same for every method."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch

from hetlora_agg import (
    METHODS,
    AggregationResult,
    ClientUpdate,
    InputValueError,
    LowRank,
    MethodEntry,
    aggregate_layers,
    diagnose,
    distribute,
)
from hetlora_agg.simulate.data import Examples, dirichlet_split, load_digits, split_digits
from hetlora_agg.simulate.network import (
    Network,
    Training,
    accuracy,
    fresh_adapter,
    layer_ranks,
    pretrain,
    train_adapter,
)
from hetlora_agg.simulate.result import Settings, SimulationResult

Method = str | Callable[..., AggregationResult]
Adapter = Mapping[str, LowRank]
Results = Mapping[str, AggregationResult]
Progress = Callable[[str, int, float], None]
"""Called after every round with the method's label, the round and the accuracy."""

# One independent stream per purpose: more rounds do not change the data, nor one client another.
_DATA, _PRETRAIN, _COHORT, _START, _TRAIN, _PADDING = range(6)


@dataclass(frozen=True)
class Federation:
    """What all methods of one comparison share: the start, the clients, the test.

    Attributes:
        settings: ranks, rounds, seed and so on.
        network: the pre-trained base.
        clients: one set of examples per client.
        test: examples no client and no pre-training has seen.
        cohorts: the participating clients of every round.
    """

    settings: Settings
    network: Network
    clients: tuple[Examples, ...]
    test: Examples
    cohorts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Server:
    """The global model between two rounds: a base and, on top, what clients continue from.

    `results` is None at the start and whenever the last update went into the base whole: clients
    then start a fresh adapter.
    """

    network: Network
    results: Results | None = None


def build_federation(settings: Settings) -> Federation:
    """Data, pre-trained network, client split and participation, all drawn from the seed."""
    rng = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(_DATA,)))
    split = split_digits(load_digits(), rng)
    clients = len(settings.ranks)
    rows = dirichlet_split(split.federated.labels.numpy(), clients, settings.dirichlet, rng)
    size = max(1, round(settings.participation * clients))
    cohorts = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(_COHORT,)))
    return Federation(
        settings,
        pretrain(split.pretrain, _generator(settings, _PRETRAIN)),
        tuple(split.federated.take(mine) for mine in rows),
        split.test,
        tuple(
            tuple(sorted(cohorts.permutation(clients)[:size].tolist()))
            for _ in range(settings.rounds)
        ),
    )


def run(
    federation: Federation,
    method: Method,
    *,
    label: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SimulationResult:
    """All rounds of one method in a federation that is ready; see `simulate`."""
    label = label or label_of(method)
    settings = federation.settings
    server = Server(federation.network)
    scores = [accuracy(server.network, federation.test)]
    rows: list[tuple[float, float, float]] = []
    start = time.perf_counter()
    for round_, cohort in enumerate(federation.cohorts):
        updates = local_updates(federation, server, cohort, round_)
        known = _supplied(method, settings, federation.network, server) | options
        results = aggregate_layers(updates, method, **known)
        totals = {name: result.total() for name, result in results.items()}
        rows.append(measure(updates, results, min(settings.ranks)))
        scores.append(accuracy(fold(server.network, totals), federation.test))
        server = absorb(server, results)
        if progress is not None:
            progress(label, round_ + 1, scores[-1])
    distance, energy_kept, tail_energy = zip(*rows, strict=True)
    return SimulationResult(
        label,
        settings,
        tuple(scores),
        distance,
        energy_kept,
        tail_energy,
        federation.cohorts,
        time.perf_counter() - start,
    )


def local_updates(
    federation: Federation, server: Server, cohort: Sequence[int], round_: int
) -> dict[str, list[ClientUpdate]]:
    """One round of local training: the cohort's updates, by layer."""
    settings = federation.settings
    training = Training(settings.local_epochs, settings.learning_rate)
    adapters = hand_out(federation, server, cohort, round_)
    updates: dict[str, list[ClientUpdate]] = {name: [] for name in server.network}
    for client, adapter in zip(cohort, adapters, strict=True):
        scaling = {name: settings.lora_alpha / own.rank for name, own in adapter.items()}
        trained = train_adapter(
            server.network,
            adapter,
            scaling,
            federation.clients[client],
            training,
            _generator(settings, _TRAIN, round_, client),
        )
        for name, own in trained.items():
            updates[name].append(
                ClientUpdate(
                    own.A,
                    own.B,
                    own.rank,
                    weight=len(federation.clients[client]),
                    scaling=scaling[name],
                    id=client,
                )
            )
    return updates


def hand_out(
    federation: Federation, server: Server, cohort: Sequence[int], round_: int
) -> list[dict[str, LowRank]]:
    """What each client of the cohort starts the round from, by layer.

    A fresh start is one draw of the largest rank: clients agree on the slots they share.
    """
    settings = federation.settings
    ranks = [layer_ranks(server.network, settings.ranks[client]) for client in cohort]
    if server.results is None:
        generator = _generator(settings, _START, round_)
        fresh = fresh_adapter(server.network, max(settings.ranks), generator)
        return [{name: fresh[name].select(slice(own[name])) for name in fresh} for own in ranks]
    handed: list[dict[str, LowRank]] = [{} for _ in cohort]
    generator = _generator(settings, _PADDING, round_)
    for name, result in server.results.items():
        own_ranks = [own[name] for own in ranks]
        scalings = [settings.lora_alpha / rank for rank in own_ranks]
        parts = distribute(result, own_ranks, scalings, generator=generator)
        for adapter, part in zip(handed, parts, strict=True):
            adapter[name] = part
    return handed


def absorb(server: Server, results: Results) -> Server:
    """The server after a round: the residual goes into the base, the factors to the clients.

    When the factors cannot be sliced to the clients' ranks, the base takes them as well.

    Raises:
        InputValueError: the method leaves a factor with the clients, so there is no global model.
    """
    if any(result.shared != {"A", "B"} for result in results.values()):
        raise InputValueError(
            "simulate: expected a method that shares both factors, got one that leaves a factor "
            "with the clients; there is no global model to follow"
        )
    if all(result.nested for result in results.values()):
        rest = {n: r.residual for n, r in results.items() if r.residual is not None}
        return Server(fold(server.network, rest), results)
    totals = {name: result.total() for name, result in results.items()}
    return Server(fold(server.network, totals))


def fold(network: Network, updates: Adapter) -> Network:
    """The network with `updates` added to the weights of the layers they name."""
    return {
        name: layer.fold(updates[name]) if name in updates else layer
        for name, layer in network.items()
    }


def measure(
    updates: Mapping[str, Sequence[ClientUpdate]], results: Results, smallest_rank: int
) -> tuple[float, float, float]:
    """Distance from the exact mean, energy kept, energy beyond a rank; over all layers."""
    report = diagnose(updates, results)
    spectra = [np.square(layer.singular_values) for layer in report.layers]
    energy = sum(squares.sum() for squares in spectra)
    tail = sum(squares[smallest_rank:].sum() for squares in spectra)
    return report.relative_distance, report.energy_kept, float(tail / energy) if energy else 0.0


def _supplied(
    method: Method, settings: Settings, network: Network, server: Server
) -> dict[str, Any]:
    """The options that only the federation knows, for a method that has them."""
    ranks = {rank for own in settings.ranks for rank in layer_ranks(network, own).values()}
    known: dict[str, Any] = {"levels": tuple(sorted(ranks))}
    if settings.participation < 1 and server.results is not None:
        known["previous"] = server.results
    return {name: value for name, value in known.items() if name in options_of(method)}


def _generator(settings: Settings, *path: int) -> torch.Generator:
    """An independent stream of the simulation's seed."""
    state = np.random.SeedSequence(settings.seed, spawn_key=path).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def label_of(method: Method) -> str:
    """The name a method goes by in results."""
    return method if isinstance(method, str) else getattr(method, "__name__", "method")


def options_of(method: Method) -> frozenset[str]:
    """The names of a method's own options.

    Raises:
        InputValueError: no method has this name.
    """
    if not isinstance(method, str):
        return frozenset(MethodEntry(label_of(method), method, "", {}).options)
    if method not in METHODS:
        near = get_close_matches(method, METHODS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputValueError(f"unknown method {method!r}; {hint}known: {sorted(METHODS)}")
    return frozenset(METHODS[method].options)
