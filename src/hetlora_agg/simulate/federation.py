"""What all methods of one comparison share: data, start, clients, participation, randomness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from hetlora_agg import AggregationResult, draw_midzuno
from hetlora_agg.simulate.data import Examples, dirichlet_split, load_digits, split_digits
from hetlora_agg.simulate.network import Forward, Network, forward, pretrain
from hetlora_agg.simulate.result import Settings

Results = Mapping[str, AggregationResult]


class Stream(IntEnum):
    """One independent stream of random numbers per purpose.

    More rounds then do not change the data, nor one client another.
    """

    DATA = 0
    PRETRAIN = 1
    COHORT = 2
    START = 3
    TRAIN = 4
    PADDING = 5
    METHOD = 6
    CHOICE = 7
    ATTACK = 8


@dataclass(frozen=True)
class Federation:
    """What all methods of one comparison share: the start, the clients, the test.

    Attributes:
        settings: ranks, rounds, seed and so on.
        network: the layers of the pre-trained base that take adapters.
        clients: one set of examples per client.
        test: examples no client and no pre-training has seen.
        cohorts: the participating clients of every round.
        forward: of the network that the layers belong to.
    """

    settings: Settings
    network: Network
    clients: tuple[Examples, ...]
    test: Examples
    cohorts: tuple[tuple[int, ...], ...]
    forward: Forward = forward

    @property
    def somebody_misses(self) -> bool:
        """Whether there is a round in which not everybody takes part."""
        return any(len(cohort) < len(self.clients) for cohort in self.cohorts)

    def generator(self, purpose: Stream, *path: int) -> torch.Generator:
        """A stream of the simulation's seed; `path` is the round, and the client if it has one."""
        return stream(self.settings.seed, purpose, *path)


@dataclass(frozen=True)
class Server:
    """The global model between two rounds.

    Attributes:
        network: the base that clients are given.
        whole: the global model, base and global update in one: what is evaluated.
        results: what clients continue from; None at the start, and when the base took all of it.
    """

    network: Network
    whole: Network
    results: Results | None = None


def build_federation(settings: Settings) -> Federation:
    """Data, pre-trained network, client split and participation, all drawn from the seed."""
    rng = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(Stream.DATA,)))
    split = split_digits(load_digits(), rng)
    clients = len(settings.ranks)
    rows = dirichlet_split(split.federated.labels.numpy(), clients, settings.dirichlet, rng)
    return Federation(
        settings,
        pretrain(split.pretrain, stream(settings.seed, Stream.PRETRAIN)),
        tuple(split.federated.take(mine) for mine in rows),
        split.test,
        draw_cohorts(settings, [len(mine) for mine in rows]),
    )


def stream(seed: int, purpose: Stream, *path: int) -> torch.Generator:
    """An independent stream of a seed."""
    state = np.random.SeedSequence(seed, spawn_key=(purpose, *path)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def draw_cohorts(settings: Settings, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The participating clients of every round: given, or drawn in the settings' share.

    Args:
        settings: participation, sampling, rounds and seed.
        sizes: examples of each client.
    """
    if settings.cohorts is not None:
        return settings.cohorts
    clients = len(settings.ranks)
    size = max(1, round(settings.participation * clients))
    if settings.sampling == "midzuno":
        generator = stream(settings.seed, Stream.COHORT)
        return tuple(draw_midzuno(sizes, size, generator) for _ in range(settings.rounds))
    rng = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(Stream.COHORT,)))
    return tuple(
        tuple(sorted(rng.permutation(clients)[:size].tolist())) for _ in range(settings.rounds)
    )
