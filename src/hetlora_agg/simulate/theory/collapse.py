"""Rank collapse: the energy of the global update over idle rounds and over rounds of training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from hetlora_agg import (
    AggregationResult,
    ClientUpdate,
    InputTypeError,
    InputValueError,
    LowRank,
    aggregate,
    distribute,
    resolve,
)
from hetlora_agg.linalg import svd_product
from hetlora_agg.simulate.federation import Federation, Server, build_federation
from hetlora_agg.simulate.loop import Method, play
from hetlora_agg.simulate.measures import squared_singular_values
from hetlora_agg.simulate.network import Network, accuracy
from hetlora_agg.simulate.result import Settings
from hetlora_agg.simulate.sides import SIDES

MOSTLY_SMALL = (2, 2, 2, 2, 2, 2, 4, 4, 8, 16)
"""Ranks of clients most of which are small."""


@dataclass(frozen=True)
class IdleRecursion:
    """What rounds in which nobody trains leave of a global update.

    Attributes:
        method: the method's name.
        ranks: of the clients.
        weights: of the clients.
        singular_values: of the global update, descending, before the first round and after each.
    """

    method: str
    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    singular_values: tuple[tuple[float, ...], ...]

    @property
    def coverage(self) -> tuple[float, ...]:
        """`q_j`, the part of all weight whose clients own slot j, for every slot."""
        ranks, weights = np.array(self.ranks), np.array(self.weights)
        slots = range(max(self.ranks))
        return tuple(float(weights[ranks > j].sum() / weights.sum()) for j in slots)

    @property
    def energy_ratio(self) -> tuple[float, ...]:
        """`ρ(t) = Σ_{i ≤ r_1} σ_i² / Σ σ_i²` for t = 0, 1, …, `r_1` the smallest rank."""
        smallest = min(self.ranks)
        return tuple(_energy_ratio([row], smallest) for row in self._squares())

    @property
    def odds(self) -> tuple[float, ...]:
        """`(1 − ρ(t)) / ρ(t)`, energy beyond the smallest rank over energy within it."""
        smallest = min(self.ranks)
        return tuple(float(row[smallest:].sum() / row[:smallest].sum()) for row in self._squares())

    def _squares(self) -> np.ndarray:
        """σ_j², `(rounds + 1, slots)`."""
        return np.square(self.singular_values)

    def closed_form(self, power: int) -> IdleRecursion:
        """The same with singular value j multiplied by `q_j ** power` in every round.

        Power 0 is what the methods with the claim `idle_kept` do, 1 those with `idle_coverage`, 2
        those with `idle_coverage_squared`. For power 1 the odds shrink by a factor that tends to
        `(max_{j > r_1} q_j)²`.
        """
        rounds = np.arange(len(self.singular_values))[:, None]
        left = np.array(self.singular_values[0]) * np.array(self.coverage) ** (power * rounds)
        rows = tuple(tuple(row) for row in left.tolist())
        return IdleRecursion(f"q^{power}", self.ranks, self.weights, rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        derived = {name: getattr(self, name) for name in ("coverage", "energy_ratio", "odds")}
        return asdict(self) | derived


@dataclass(frozen=True)
class Collapse:
    """How the energy of the global update is spread over the rounds of one method's training.

    Attributes:
        method: the method's name.
        settings: of the simulation.
        energy_ratio: per round, ρ of the total update, as in `SimulationResult`.
        change_energy_ratio: per round, ρ of what the round changed of the global weights.
        accuracy: of the global model on the test examples, entry 0 before the first round.
    """

    method: str
    settings: Settings
    energy_ratio: tuple[float, ...]
    change_energy_ratio: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def tail_left(self) -> float:
        """Mean of `1 − ρ` over the last third of the rounds over that of the third before.

        Below 1 the total update collapses onto the smallest rank; at 1 and above it does not. 1
        where there was no tail to lose.
        """
        return self._left(self.energy_ratio)

    @property
    def change_tail_left(self) -> float:
        """The same for what the rounds changed."""
        return self._left(self.change_energy_ratio)

    def _left(self, ratio: Sequence[float]) -> float:
        tail, third = 1 - np.array(ratio), len(ratio) // 3
        before = float(tail[-2 * third : -third].mean())
        return float(tail[-third:].mean()) / before if before else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        derived = {name: getattr(self, name) for name in ("tail_left", "change_tail_left")}
        return asdict(self) | derived


def idle_recursion(
    method: Method,
    ranks: Sequence[int],
    weights: Sequence[float],
    rounds: int,
    *,
    singular_values: Sequence[float] | None = None,
    seed: int = 0,
    **options: Any,
) -> IdleRecursion:
    """Rounds in which nobody trains: clients send back the leading slices they were handed.

    A method that multiplies singular value j by `m_j` per idle round has
    `ρ(t) = Σ_{i ≤ r_1} σ_i² m_i^{2t} / Σ σ_i² m_i^{2t}` after t rounds: rank collapse in one line.
    `m_j` is the coverage `q_j` for the exact mean, `q_j²` for zero-padding, 1 for rank sharing.

    Args:
        method: a name in `METHODS` or a function of `Components`.
        ranks: one per client.
        weights: one per client.
        rounds: how many.
        singular_values: of the first global update, descending, one for each slot; None is
            `r_max, …, 2, 1`.
        seed: of its singular vectors and, for random methods, of every round.
        **options: the method's own. What carries state between rounds (`previous`, `round`,
            `generator`) is supplied to methods that need it.

    Returns:
        The singular values after every round.

    Raises:
        HetLoRAError: the method refuses these clients, or its results cannot be sliced.
        InputValueError: not one weight for each client, not one singular value for each slot, or a
            method that leaves a residual: its factors are not all of the global update.

    Example:
        >>> idle = idle_recursion("flexlora", ranks=(1, 2), weights=(1, 1), rounds=1)
        >>> [round(ratio, 3) for ratio in idle.energy_ratio]  # 2² / (2² + 1²), 2² / (2² + ½²)
        [0.8, 0.941]
    """
    entry, widest = resolve(method), max(ranks)
    sigma = range(widest, 0, -1) if singular_values is None else singular_values
    for name, given, expected in (
        ("weights", weights, len(ranks)),
        ("singular_values", sigma, widest),
    ):
        if len(given) != expected:
            raise InputValueError(
                f"idle_recursion: {name}: expected {expected}, got {len(given)}; give one weight "
                "for each client and one singular value for each slot"
            )
    result = AggregationResult(_update(sigma, seed))
    spectra = [tuple(map(float, sigma))]
    for number in range(1, rounds + 1):
        handed = distribute(result, ranks)
        idle = [
            ClientUpdate(own.A, own.B, weight=weight)
            for own, weight in zip(handed, weights, strict=True)
        ]
        generator = torch.Generator().manual_seed(seed + number)
        known = {"previous": result, "round": number, "generator": generator}
        state: dict[str, Any] = {name: known[name] for name in entry.needs if name in known}
        result = aggregate(idle, entry.run, **(state | options))
        if result.residual is not None:
            raise InputValueError(
                f"idle_recursion: expected a method whose factors are the whole update, got "
                f"{entry.name!r}, which leaves a residual to the base weight"
            )
        spectra.append(tuple(np.sqrt(squared_singular_values(result.factors)).tolist()))
    return IdleRecursion(entry.name, tuple(ranks), tuple(weights), tuple(spectra))


def collapse_in_training(
    methods: Iterable[Method] = ("flexlora", "rb", "raflora"),
    *,
    ranks: Sequence[int] = MOSTLY_SMALL,
    rounds: int = 30,
    **settings: Any,
) -> dict[str, Collapse]:
    """The simulator's ρ over the rounds of training, of the total update and of its change.

    Every method runs in the same federation, as in `simulate_many`.

    Args:
        methods: names in `METHODS` and functions of `Components`.
        ranks: one per client.
        rounds: communication rounds, at least 6.
        **settings: the other fields of `Settings`, such as `seed`.

    Returns:
        Name -> ρ per round, in the order given.

    Raises:
        HetLoRAError: a setting is wrong, a method is unknown or refuses these clients.
        ImportError: scikit-learn is missing.

    Example:
        >>> run = collapse_in_training(["rb"], ranks=(2, 2, 4), rounds=6, local_epochs=1)["rb"]
        >>> len(run.energy_ratio), 0 < run.energy_ratio[-1] < 1
        (6, True)
    """
    known = {item.name for item in fields(Settings)}
    if unknown := sorted(set(settings) - known):
        raise InputTypeError(f"collapse_in_training: no settings {unknown}; known: {sorted(known)}")
    if rounds < 6:
        raise InputValueError(
            f"collapse_in_training: rounds: expected at least 6, thirds of which can be compared, "
            f"got {rounds}"
        )
    federation = build_federation(Settings(tuple(ranks), rounds, **settings))
    runs = (_collapse(federation, method) for method in methods)
    return {run.method: run for run in runs}


def _collapse(federation: Federation, method: Method) -> Collapse:
    """One method's rounds."""
    entry, smallest = resolve(method), min(federation.settings.ranks)
    side = SIDES[entry.client](federation, entry)
    server = Server(federation.network, federation.network)
    scores, total, change = [accuracy(server.whole, federation.test)], [], []
    for number, cohort in enumerate(federation.cohorts, start=1):
        before, played = server.whole, play(side, server, cohort, number)
        server = played.server
        scores.append(accuracy(server.whole, federation.test))
        total.append(played.measures.energy_ratio)
        change.append(_energy_ratio(_changes(before, server.whole), smallest))
    return Collapse(entry.name, federation.settings, tuple(total), tuple(change), tuple(scores))


def _changes(before: Network, after: Network) -> list[np.ndarray]:
    """Squared singular values of what each layer's weight has changed by."""
    moved = [after[name].weight.double() - before[name].weight.double() for name in before]
    # A dense matrix is the product of itself and the identity.
    return [
        squared_singular_values(LowRank(torch.eye(W.shape[1], dtype=W.dtype), W)) for W in moved
    ]


def _energy_ratio(squares: Iterable[np.ndarray], smallest_rank: int) -> float:
    """Share of the leading components in squared singular values, over all layers; 1 for none."""
    rows = list(squares)
    energy = sum(float(row.sum()) for row in rows)
    return sum(float(row[:smallest_rank].sum()) for row in rows) / energy if energy else 1.0


def _update(singular_values: Sequence[float], seed: int) -> LowRank:
    """A matrix with these singular values and random vectors, its halves balanced, float64."""
    rank = len(singular_values)
    generator = torch.Generator().manual_seed(seed)
    # Wider than its rank, and not square.
    B = torch.randn(2 * rank + 1, rank, generator=generator, dtype=torch.float64)
    A = torch.randn(rank, 2 * rank, generator=generator, dtype=torch.float64)
    vectors = svd_product(B, A)
    root = torch.tensor(singular_values, dtype=torch.float64).sqrt()
    return LowRank(root.unsqueeze(-1) * vectors.Vh, vectors.U * root)
