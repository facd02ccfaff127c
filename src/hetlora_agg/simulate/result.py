"""What goes into a simulation and what comes out of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hetlora_agg import InputValueError


@dataclass(frozen=True)
class Settings:
    """Everything about a simulation but the method.

    Attributes:
        ranks: one LoRA rank per client.
        rounds: communication rounds.
        local_epochs: passes each client makes over its own examples per round.
        dirichlet: label skew; small values give clients few classes each.
        participation: share of the clients that take part in a round, in (0, 1].
        lora_alpha: a client's scaling is `lora_alpha / rank`.
        learning_rate: of the clients' Adam.
        seed: of everything random.
    """

    ranks: tuple[int, ...] = (2, 4, 8, 8, 16)
    rounds: int = 15
    local_epochs: int = 2
    dirichlet: float = 0.3
    participation: float = 1.0
    lora_alpha: float = 16.0
    learning_rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("ranks", bool(self.ranks) and min(self.ranks) >= 1, "one rank >= 1 for every client"),
            ("rounds", self.rounds >= 1, "an integer >= 1"),
            ("local_epochs", self.local_epochs >= 1, "an integer >= 1"),
            ("dirichlet", self.dirichlet > 0, "a number > 0"),
            ("participation", 0 < self.participation <= 1, "a share in (0, 1]"),
            ("lora_alpha", self.lora_alpha > 0, "a number > 0"),
            ("learning_rate", self.learning_rate > 0, "a number > 0"),
            ("seed", self.seed >= 0, "an integer >= 0"),
        ):
            if not ok:
                raise InputValueError(
                    f"simulate: {name}: expected {expected}, got {getattr(self, name)!r}"
                )


@dataclass(frozen=True, repr=False)
class SimulationResult:
    """What one method did over the rounds; two results compare equal whatever their `seconds`.

    Attributes:
        method: the method's name or label.
        settings: of the simulation.
        accuracy: of the global model on the test examples; entry 0 is the pre-trained start, so
            there is one entry more than rounds.
        distance: per round, relative distance of the method's total update from the exact mean of
            the updates it was given.
        energy_kept: per round, share of the squared singular values that truncation kept.
        tail_energy: per round, share of the result's squared singular values beyond the smallest
            client rank: it dies out when the rank collapses.
        participants: per round, the clients that took part.
        seconds: wall time of the whole run.
        skipped: why the method could not take these clients; None when it ran.
    """

    method: str
    settings: Settings
    accuracy: tuple[float, ...] = ()
    distance: tuple[float, ...] = ()
    energy_kept: tuple[float, ...] = ()
    tail_energy: tuple[float, ...] = ()
    participants: tuple[tuple[int, ...], ...] = ()
    seconds: float = field(default=0.0, compare=False)
    skipped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """A line per round: accuracy, distance from the exact mean, energies, participants."""
        if self.skipped is not None:
            return repr(self)
        lines = [repr(self), "round  accuracy  distance  energy kept  tail energy  participants"]
        lines.append(f"{0:5d}  {self.accuracy[0]:8.3f}")
        for i, clients in enumerate(self.participants):
            lines.append(
                f"{i + 1:5d}  {self.accuracy[i + 1]:8.3f}  {self.distance[i]:8.1e}  "
                f"{self.energy_kept[i]:11.3f}  {self.tail_energy[i]:11.3f}  "
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
            f"distance from the exact mean {self.distance[-1]:.1e})"
        )
