"""Dilution by zero-padding and its rescue by replication (arXiv:2406.17477)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from hetlora_agg import ClientUpdate, aggregate_layers, resolve
from hetlora_agg.simulate.data import dirichlet_split, load_digits, split_digits
from hetlora_agg.simulate.federation import Federation, Server, Stream, stream
from hetlora_agg.simulate.local import train_adapter
from hetlora_agg.simulate.loop import Method
from hetlora_agg.simulate.network import Training, accuracy, fold, pretrain
from hetlora_agg.simulate.result import Settings
from hetlora_agg.simulate.sides import SIDES

Updates = Mapping[str, list[ClientUpdate]]

CONTENDERS: Mapping[str, tuple[Method, Mapping[str, Any]]] = MappingProxyType(
    {
        "zeropad": ("zeropad", {}),
        "zeropad, uniform": ("zeropad", {"weighting": "uniform"}),
        "flexlora": ("flexlora", {}),
        "replicate": ("replicate", {}),
        "rb": ("rb", {}),
        "raflora": ("raflora", {}),
    }
)
"""Label -> method and its options, for `dilution_and_rescue`."""


@dataclass(frozen=True)
class StrongAndWeak:
    """One strong client among many weak ones.

    Attributes:
        weak: how many weak clients there are.
        weak_rank: the rank of each.
        strong_rank: the rank of the strong client.
        strong_share: its share of the clients' examples, drawn evenly from all classes; the weak
            ones share the rest.
        weak_epochs: passes each weak client makes over its own examples.
        strong_epochs: passes of the strong client.
        dirichlet: label skew among the weak clients.
        lora_alpha: a client's scaling is `lora_alpha / rank`.
        learning_rate: of the clients' Adam.
    """

    weak: int = 20
    weak_rank: int = 2
    strong_rank: int = 16
    strong_share: float = 0.4
    weak_epochs: int = 1
    strong_epochs: int = 20
    dirichlet: float = Settings.dirichlet
    lora_alpha: float = Settings.lora_alpha
    learning_rate: float = Settings.learning_rate

    @property
    def ranks(self) -> tuple[int, ...]:
        """The strong client's rank, then those of the weak ones."""
        return (self.strong_rank, *(self.weak_rank,) * self.weak)


@dataclass(frozen=True)
class Rescue:
    """Accuracy on test digits around one aggregation.

    Attributes:
        seed: of everything random.
        clients: who took part.
        start: of the pre-trained network.
        strong: of the strong client alone.
        weak: of the exact mean of the weak clients alone.
        after: of the global model after the aggregation, by the contender's label.
    """

    seed: int
    clients: StrongAndWeak
    start: float
    strong: float
    weak: float
    after: Mapping[str, float]

    def fall(self, label: str) -> float:
        """How much less accurate the global model is than the strong client alone."""
        return self.strong - self.after[label]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return asdict(self) | {"after": dict(self.after)}


def dilution_and_rescue(
    seed: int = 0,
    *,
    clients: StrongAndWeak | None = None,
    contenders: Mapping[str, tuple[Method, Mapping[str, Any]]] = CONTENDERS,
) -> Rescue:
    """Accuracy after one aggregation of a strong high-rank client with many weak low-rank ones.

    All start from one fresh adapter on a network that knows the digits 0-4, so slot j means the
    same to all. The strong client, alone in the slots above the weak rank, learns all ten. With
    its share p of the weight, zero-padding leaves `p²` of what it has there (`p` in each factor),
    the exact mean `p`, replication and rank sharing all of it; in the lower slots everybody has a
    say.

    Args:
        seed: of data, start and training.
        clients: their number, ranks, data and training; None is the default `StrongAndWeak`.
        contenders: label -> method and its options; methods whose clients train what `distribute`
            hands them.

    Returns:
        Accuracies at the start, of the strong client alone, of the weak ones alone, after each.

    Raises:
        HetLoRAError: a setting is wrong, or a contender refuses these clients.
        ValueError: there are too few examples for so many weak clients.
        ImportError: scikit-learn is missing.

    Example:
        >>> few = StrongAndWeak(weak=9, strong_epochs=10)
        >>> found = dilution_and_rescue(clients=few)
        >>> found.fall("zeropad") > 0.2, found.fall("rb") < 0.1
        (True, True)
    """
    clients = clients or StrongAndWeak()
    federation = _federation(seed, clients)
    network, test = federation.network, federation.test
    updates = _trained(federation, clients)

    def score(sent: Updates, method: Method, options: Mapping[str, Any]) -> float:
        results = aggregate_layers(sent, resolve(method).run, **options)
        totals = {name: result.total() for name, result in results.items()}
        return accuracy(fold(network, totals), test)

    return Rescue(
        seed,
        clients,
        start=accuracy(network, test),
        strong=score({name: own[:1] for name, own in updates.items()}, "flora", {}),
        weak=score({name: own[1:] for name, own in updates.items()}, "flora", {}),
        after={label: score(updates, *contender) for label, contender in contenders.items()},
    )


def _federation(seed: int, clients: StrongAndWeak) -> Federation:
    """The strong client first, with an even draw of all classes; the weak ones share the rest."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(Stream.DATA,)))
    split = split_digits(load_digits(), rng)
    rows = rng.permutation(len(split.federated))
    cut = round(clients.strong_share * len(rows))
    rest = split.federated.take(rows[cut:])
    parts = dirichlet_split(rest.labels.numpy(), clients.weak, clients.dirichlet, rng)
    settings = Settings(
        clients.ranks,
        rounds=1,
        dirichlet=clients.dirichlet,
        lora_alpha=clients.lora_alpha,
        learning_rate=clients.learning_rate,
        seed=seed,
    )
    return Federation(
        settings,
        pretrain(split.pretrain, stream(seed, Stream.PRETRAIN)),
        (split.federated.take(rows[:cut]), *map(rest.take, parts)),
        split.test,
        (tuple(range(1 + clients.weak)),),
    )


def _trained(federation: Federation, clients: StrongAndWeak) -> dict[str, list[ClientUpdate]]:
    """One round of local training, by layer, the strong client's update first."""
    # The usual clients; before the first result nothing depends on the method.
    side = SIDES["slice"](federation, resolve("flora"))
    server, everybody = Server(federation.network, federation.network), federation.cohorts[0]
    updates: dict[str, list[ClientUpdate]] = {name: [] for name in federation.network}
    for client, start in enumerate(side.starts(server, everybody, 1)):
        epochs = clients.weak_epochs if client else clients.strong_epochs
        trained = train_adapter(
            start,
            federation.clients[client],
            Training(epochs, clients.learning_rate),
            federation.generator(Stream.TRAIN, 0, client),
        )
        for name, update in side.send(client, start, trained, 1).items():
            updates[name].append(update)
    return updates
