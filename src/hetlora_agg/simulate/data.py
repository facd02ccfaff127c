"""Real data for the reference federation: scikit-learn's digits, split with label skew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
PRETRAIN_CLASSES = (0, 1, 2, 3, 4)
TEST_SHARE = 0.25
MIN_EXAMPLES = 8


@dataclass(frozen=True)
class Examples:
    """Images and labels that belong together.

    Attributes:
        inputs: `(examples, in_features)` float32, pixels in [0, 1].
        labels: `(examples,)` int64.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Examples:
        """The examples at `rows`, in that order."""
        index = torch.from_numpy(rows)
        return Examples(self.inputs[index], self.labels[index])


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of examples: for pre-training, for the clients, for testing."""

    pretrain: Examples
    federated: Examples
    test: Examples


def load_digits() -> Examples:
    """All 1,797 digits of scikit-learn, `(1797, 64)`, a real data set that ships with it.

    Raises:
        ImportError: scikit-learn is missing; the message names the extra that brings it.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError(
            "the simulator needs scikit-learn: "
            'expected it to be installed, do: pip install "hetlora-agg[sim]"'
        ) from error
    pixels, labels = load(return_X_y=True)
    return Examples(
        torch.from_numpy(pixels / 16.0).to(torch.float32), torch.from_numpy(labels).to(torch.int64)
    )


def split_digits(digits: Examples, rng: np.random.Generator) -> Split:
    """`digits` cut into pre-training, client and test examples.

    A quarter of every class is for testing. Of the rest, half of the classes 0-4 pre-trains the
    network and is never seen by a client; everything else, including all of the classes 5-9, is
    what the clients share.
    """
    labels = digits.labels.numpy()
    parts: dict[str, list[np.ndarray]] = {"pretrain": [], "federated": [], "test": []}
    for label in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(labels == label))
        test, train = np.split(rows, [round(TEST_SHARE * len(rows))])
        early = len(train) // 2 if label in PRETRAIN_CLASSES else 0
        parts["test"].append(test)
        parts["pretrain"].append(train[:early])
        parts["federated"].append(train[early:])
    return Split(**{name: digits.take(np.concatenate(rows)) for name, rows in parts.items()})


def dirichlet_split(
    labels: np.ndarray,
    clients: int,
    concentration: float,
    rng: np.random.Generator,
    min_examples: int = MIN_EXAMPLES,
) -> list[np.ndarray]:
    """Row numbers per client, with label skew; every row goes to exactly one client.

    Every class is divided in proportions drawn from Dirichlet(`concentration`): small values give
    clients that see few classes, large values give equal clients. A client left with fewer than
    `min_examples` rows takes rows from the client that has most, so nobody trains on nothing.

    Args:
        labels: `(examples,)` integer labels.
        clients: how many clients share the rows.
        concentration: the Dirichlet parameter, > 0.
        rng: source of all draws.
        min_examples: the least number of rows a client ends with.

    Raises:
        ValueError: there are not enough rows for `min_examples` each.
    """
    if clients * min_examples > len(labels):
        raise ValueError(
            f"dirichlet_split: expected at least {min_examples} examples for each of {clients} "
            f"clients, got {len(labels)} in all; use fewer clients"
        )
    owned: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, concentration))
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for mine, part in zip(owned, np.split(rows, cuts), strict=True):
            mine.extend(part.tolist())
    for mine in owned:
        while len(mine) < min_examples:
            richest = max(owned, key=len)
            mine.append(richest.pop(int(rng.integers(len(richest)))))
    return [np.sort(np.asarray(mine, dtype=np.int64)) for mine in owned]
