"""What goes into a simulation and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hetlora_agg import InputValueError

SAMPLINGS = ("uniform", "midzuno")
"""How a simulation may draw its cohorts."""


@dataclass(frozen=True)
class Settings:
    """Everything about a simulation but the method.

    Attributes:
        ranks: one LoRA rank per client.
        rounds: communication rounds.
        local_epochs: passes each client makes over its own examples per round.
        dirichlet: label skew; small values give clients few classes each.
        participation: share of the clients that take part in a round, in (0, 1].
        cohorts: who takes part, clients by number for every round; None draws them.
        lora_alpha: a client's scaling is `lora_alpha / rank`.
        learning_rate: of the clients' Adam.
        seed: of everything random.
        sampling: how cohorts are drawn: "uniform", or "midzuno", the first client in proportion to
            its examples and the others uniformly (`draw_midzuno`).
    """

    ranks: tuple[int, ...] = (2, 4, 8, 8, 16)
    rounds: int = 15
    local_epochs: int = 2
    dirichlet: float = 0.3
    participation: float = 1.0
    lora_alpha: float = 16.0
    learning_rate: float = 0.01
    seed: int = 0
    cohorts: tuple[tuple[int, ...], ...] | None = None
    sampling: str = "uniform"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(self.ranks))
        for name, ok, expected in (
            ("ranks", bool(self.ranks) and min(self.ranks) >= 1, "one rank >= 1 for every client"),
            ("rounds", self.rounds >= 1, "an integer >= 1"),
            ("local_epochs", self.local_epochs >= 1, "an integer >= 1"),
            ("dirichlet", self.dirichlet > 0, "a number > 0"),
            ("participation", 0 < self.participation <= 1, "a share in (0, 1]"),
            ("lora_alpha", self.lora_alpha > 0, "a number > 0"),
            ("learning_rate", self.learning_rate > 0, "a number > 0"),
            ("seed", self.seed >= 0, "an integer >= 0"),
            ("sampling", self.sampling in SAMPLINGS, f"one of {list(SAMPLINGS)}"),
        ):
            if not ok:
                raise InputValueError(
                    f"simulate: {name}: expected {expected}, got {getattr(self, name)!r}"
                )
        if self.cohorts is not None:
            object.__setattr__(self, "cohorts", self._checked_cohorts(self.cohorts))

    def _checked_cohorts(self, given: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """The cohorts in ascending order, one for every round."""
        cohorts = tuple(tuple(sorted(cohort)) for cohort in given)
        clients = len(self.ranks)
        if len(cohorts) != self.rounds:
            raise InputValueError(
                f"simulate: cohorts: expected one for each of {self.rounds} rounds, got "
                f"{len(cohorts)}"
            )
        for number, cohort in enumerate(cohorts, start=1):
            if not cohort or len(set(cohort)) < len(cohort) or not set(cohort) <= {*range(clients)}:
                raise InputValueError(
                    f"simulate: cohorts: expected in round {number} some of the clients 0 to "
                    f"{clients - 1}, each once, got {list(cohort)}"
                )
        if self.participation != 1:
            raise InputValueError(
                "simulate: cohorts: expected participation=1 where the cohorts are given, got "
                f"{self.participation!r}"
            )
        if self.sampling != "uniform":
            raise InputValueError(
                "simulate: sampling: expected 'uniform' where the cohorts are given, got "
                f"{self.sampling!r}"
            )
        return cohorts


@dataclass(frozen=True, repr=False)
class SimulationResult:
    """What one method did over the rounds; two results compare equal whatever their `seconds` and
    `server_seconds`.

    Attributes:
        method: the method's name or label.
        settings: of the simulation.
        accuracy: of the global model on the test examples; entry 0 is the pre-trained start, so
            there is one entry more than rounds.
        aggregation_noise: per round, distance of the method's total update from the exact mean of
            the updates it was given, relative to that mean.
        energy_kept: per round, share of the squared singular values that truncation kept.
        energy_ratio: per round, share of the total update's squared singular values in its leading
            components up to the smallest client rank: it goes to 1 when the rank collapses.
        effective_rank: per round, exponential of the entropy of the total update's squared singular
            values, layers weighted by their energy: how many components of equal size it has.
        initialisation_noise: per round, distance of the models that clients start from to the
            global model, relative to what the global model has moved since the start.
        participants: per round, the clients that took part.
        seconds: wall time of the whole run.
        skipped: why the method could not take these clients; None when it ran.
        bytes_up: per round, what the cohort sent; see `Costs`.
        bytes_down: per round, what the cohort needed to start.
        server_seconds: per round, wall time of the aggregation.
    """

    method: str
    settings: Settings
    accuracy: tuple[float, ...] = ()
    aggregation_noise: tuple[float, ...] = ()
    energy_kept: tuple[float, ...] = ()
    energy_ratio: tuple[float, ...] = ()
    effective_rank: tuple[float, ...] = ()
    initialisation_noise: tuple[float, ...] = ()
    participants: tuple[tuple[int, ...], ...] = ()
    seconds: float = field(default=0.0, compare=False)
    skipped: str | None = None
    bytes_up: tuple[int, ...] = ()
    bytes_down: tuple[int, ...] = ()
    server_seconds: tuple[float, ...] = field(default=(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """A line per round: accuracy, noises, energies, effective rank, costs, participants."""
        if self.skipped is not None:
            return repr(self)
        lines = [
            repr(self),
            "round  accuracy  aggregation noise  initialisation noise  energy kept  energy ratio  "
            "effective rank  bytes up  bytes down  server seconds  participants",
            f"{0:5d}  {self.accuracy[0]:8.3f}",
        ]
        for i, clients in enumerate(self.participants):
            lines.append(
                f"{i + 1:5d}  {self.accuracy[i + 1]:8.3f}  {self.aggregation_noise[i]:17.1e}  "
                f"{self.initialisation_noise[i]:20.1e}  {self.energy_kept[i]:11.3f}  "
                f"{self.energy_ratio[i]:12.3f}  {self.effective_rank[i]:14.2f}  "
                f"{self.bytes_up[i]:8d}  {self.bytes_down[i]:10d}  {self.server_seconds[i]:14.4f}  "
                f"{' '.join(map(str, clients))}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        """One line for notebooks and logs."""
        if self.skipped is not None:
            return f"SimulationResult({self.method}, skipped: {self.skipped})"
        return (
            f"SimulationResult({self.method}, {len(self.participants)} rounds, "
            f"accuracy {self.accuracy[0]:.3f} -> {self.accuracy[-1]:.3f}, "
            f"aggregation noise {self.aggregation_noise[-1]:.1e})"
        )
