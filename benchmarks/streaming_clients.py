"""Models and clients of the streaming benchmarks, and exact sums of some of their entries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from hetlora_agg import ClientUpdate

SAMPLED = 24
"""Rows and columns of every layer that are followed in long doubles."""


@dataclass(frozen=True)
class Model:
    """What is adapted, and by whom.

    Attributes:
        what: in words.
        sizes: (out_features, in_features) of every layer.
        clients: how many.
        ranks: theirs, in turns.
    """

    what: str
    sizes: tuple[tuple[int, int], ...]
    clients: int
    ranks: tuple[int, ...] = tuple(range(4, 65, 4))

    @property
    def rank(self) -> float:
        """The clients' mean rank."""
        return sum(self.ranks) / len(self.ranks)

    @property
    def flops(self) -> float:
        """What adding one client's products takes: two for each entry and component."""
        return 2 * self.rank * sum(out * columns for out, columns in self.sizes)

    @property
    def numbers(self) -> float:
        """Entries of one client's factors."""
        return self.rank * sum(out + columns for out, columns in self.sizes)

    @property
    def dense_bytes(self) -> int:
        """One float64 matrix for every layer."""
        return 8 * sum(out * columns for out, columns in self.sizes)


MINILM = Model("6 layers, q and v, 384×384", ((384, 384),) * 12, 10_000)
LLAMA = Model("1 of 32 layers, q 4096×4096 and v 1024×4096", ((4096, 4096), (1024, 4096)), 10_000)


def tiny(model: Model) -> Model:
    """The same with layers of at most 256, ranks of at most 16 and 150 clients."""
    sizes = tuple((min(out, 256), min(columns, 256)) for out, columns in model.sizes)
    return replace(model, sizes=sizes[:4], clients=150, ranks=(4, 8, 12, 16))


@dataclass(frozen=True)
class Stream:
    """One method as clients are streamed through it.

    Attributes:
        method: its name.
        how: what it is told beforehand: nothing, the "levels", or the "roster".
        options: its own.
        watched: "products" or "factors" where its exact sum is one of them, else "".
    """

    method: str
    how: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    watched: str = ""

    @property
    def label(self) -> str:
        """As tables say it."""
        told = [f"{self.how}="] * bool(self.how) + [f"{k}={v}" for k, v in self.options.items()]
        return ", ".join([self.method, *told])

    def settings(self, model: Model) -> dict[str, Any]:
        """Keyword arguments of a `RunningAggregate`."""
        told: dict[str, Any] = {
            "": {},
            "levels": {"levels": model.ranks},
            "roster": {"roster": [(k, *_kind(model, k)) for k in range(model.clients)]},
        }[self.how]
        return {**told, **self.options}


def _kind(model: Model, k: int) -> tuple[int, int]:
    """Rank and weight of client number k."""
    return model.ranks[k % len(model.ranks)], 1 + k % 97


def client(model: Model, k: int, dtype: torch.dtype = torch.float32) -> dict[str, ClientUpdate]:
    """Client number k, the same whenever it is asked for."""
    g = torch.Generator().manual_seed(k)
    r, weight = _kind(model, k)
    return {
        f"layers.{i}": ClientUpdate(
            (torch.randn(r, columns, generator=g) / columns**0.5).to(dtype),
            (torch.randn(out, r, generator=g) / r**0.5).to(dtype),
            weight=weight,
            id=k,
        )
        for i, (out, columns) in enumerate(model.sizes)
    }


class Watched:
    """Some rows and columns of every layer's sum, in long doubles.

    Args:
        model: whose clients come.
        what: "products" or "factors", whichever is summed.
    """

    def __init__(self, model: Model, what: str) -> None:
        """Nothing was added yet."""
        self.what, self.width = what, max(model.ranks)
        # Σ n_k ‖B_k‖ ‖A_k‖: of everything, and of what is watched.
        self.size, self.seen = 0.0, 0.0
        self.sums: dict[str, Any] = {f"layers.{i}": 0.0 for i in range(len(model.sizes))}
        self.weight = np.zeros(self.width, dtype=np.longdouble)

    def add(self, update: Mapping[str, ClientUpdate]) -> None:
        """One client, weights as they are."""
        for name, u in update.items():
            B, A = u.B[:SAMPLED].numpy(), u.A[:, :SAMPLED].numpy()
            B, A = (X.astype(np.longdouble) for X in (B, A))
            r = len(A)
            if self.what == "products":
                self.sums[name] = self.sums[name] + u.weight * (B @ A)
            else:
                wide = np.zeros((2, self.width, SAMPLED), dtype=np.longdouble)
                wide[0, :r, : A.shape[1]], wide[1, :r, : len(B)] = u.weight * A, u.weight * B.T
                self.sums[name] = self.sums[name] + wide
            self.size += float(u.weight * np.linalg.norm(u.B) * np.linalg.norm(u.A))
            self.seen += float(u.weight * _norm(B) * _norm(A))
        self.weight[:r] += u.weight

    def error(self, results: Mapping[str, Any]) -> float:
        """Frobenius distance of what was watched, over ``Σ p_k ‖B_k‖ ‖A_k‖`` of that."""
        square = 0.0
        for name, result in results.items():
            A, B = (X.double().numpy() for X in (result.A, result.B))
            found = B[:SAMPLED] @ A[:, :SAMPLED]
            if self.what == "products":
                exact = self.sums[name] / self.weight[0]
            else:
                rows, columns = self.sums[name] / self.weight[None, :, None]
                exact = (columns.T @ rows)[: len(found), : found.shape[1]]
            square += float(np.square(found - exact).sum())
        return square**0.5 / (self.seen / float(self.weight[0]))


def _norm(X: Any) -> float:
    return float(np.square(X).sum() ** 0.5)


def distance(found: Mapping[str, Any], exact: Mapping[str, Any]) -> float:
    """Frobenius distance of two results over all layers, over the norm of the second."""
    pairs = [(_product(found[name]), _product(result)) for name, result in exact.items()]
    return _root(a - b for a, b in pairs) / _root(b for _, b in pairs)


def _product(result: Any) -> torch.Tensor:
    return result.B.double() @ result.A.double()  # type: ignore[no-any-return]


def _root(matrices: Iterable[torch.Tensor]) -> float:
    return float(sum(float(X.square().sum()) for X in matrices) ** 0.5)
