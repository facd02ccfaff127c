"""Rank inflation: what attackers do to the global update, and what each defence is worth.

``python -m benchmarks.bench_inflation`` writes ``results/inflation.json`` and
``docs/img/inflation.png``: ``errors``, one aggregation of 30 clients that agree on a truth up to
noise, for every attack, number of attackers and defence; ``training``, the simulator on digits.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plots import COLOURS, IMAGES, MARKERS
from benchmarks.report_inflation import CLEAN
from benchmarks.timing import record
from hetlora_agg import (
    METHODS,
    AggregationResult,
    ClientUpdate,
    LowRank,
    aggregate,
)
from hetlora_agg.simulate import RankInflation, Settings, build_federation, run

SEEDS = tuple(range(12))

OUT, IN = 48, 40
RANKS = (2,) * 10 + (4,) * 8 + (8,) * 7 + (16,) * 5
"""Of 30 clients; the first are the attackers, but where the largest attack."""

NOISE = 0.1
"""Of a client's column of B and row of A, relative to the column and the row."""

LEAST = 0.2
"""The truth's last singular value, its first being 1."""

NUMBERS = (1, 3, 6)
"""Of attackers."""

INFLATED = 2 * max(RANKS)
"""What the bold attackers declare."""

LIE = 1000.0
"""Times the number of examples that liars declare."""

FLOOR, CAP = 0.5, 0.05
"""The support floor; the weight cap, one and a half times the fair share of 30 clients."""


@dataclass(frozen=True)
class Attack:
    """What the attackers do.

    Attributes:
        rank: they declare this; None is their own.
        times: their weight is this times the true one.
        largest: they are the clients of the largest rank, where else they are the smallest.
    """

    rank: int | None = None
    times: float = 1.0
    largest: bool = False


ATTACKS: dict[str, Attack] = {
    "rank above all others": Attack(INFLATED),
    "largest allowed rank": Attack(max(RANKS)),
    "largest allowed rank, weight lie": Attack(max(RANKS), LIE),
    "own rank, weight lie": Attack(times=LIE),
    "own rank, the largest": Attack(largest=True),
    "own rank, the smallest": Attack(),
}

DEFENCES: dict[str, tuple[str, ...]] = {
    "none": (),
    "one max_rank": ("max_rank",),
    "registry": ("registry",),
    "floor": ("floor",),
    "quorum": ("quorum",),
    "cap": ("cap",),
    "floor + cap": ("floor", "cap"),
    "quorum + cap": ("quorum", "cap"),
    "registry + quorum": ("registry", "quorum"),
    "registry + quorum + cap": ("registry", "quorum", "cap"),
}


SHOWN: dict[str, tuple[str, ...]] = {
    "rb": tuple(DEFENCES),
    **dict.fromkeys(("raflora", "rbla"), ("none", "registry", "registry + quorum + cap")),
    "replicate": ("none", "registry"),
}
"""Method -> defences that are run; replicate has no options against inflation."""


def options_of(defence: str, attackers: int) -> dict[str, Any]:
    """The defence as options of `aggregate`; the quorum is 2f + 1."""
    known: dict[str, dict[str, Any]] = {
        "max_rank": {"max_rank": max(RANKS), "on_bad_client": "drop"},
        "registry": {"max_rank": dict(enumerate(RANKS)), "on_bad_client": "drop"},
        "floor": {"floor": FLOOR},
        "quorum": {"quorum": 2 * attackers + 1},
        "cap": {"weight_cap": CAP},
    }
    return {name: value for part in DEFENCES[defence] for name, value in known[part].items()}


@dataclass(frozen=True)
class Cohort:
    """Clients that agree on a truth up to noise.

    Attributes:
        truth: orthogonal components, the singular values descending from 1 to `LEAST`.
        updates: of the honest clients.
        previous: method -> what the same clients with other noise gave in an earlier round.
    """

    truth: LowRank
    updates: tuple[ClientUpdate, ...]
    previous: Mapping[str, AggregationResult]


def cohort(seed: int) -> Cohort:
    """30 clients: ranks are given, numbers of examples and noise drawn."""
    rng = np.random.default_rng(seed)
    slots = max(RANKS)
    root = np.sqrt(np.geomspace(1, LEAST, slots))
    B = np.linalg.qr(rng.standard_normal((OUT, slots)))[0] * root
    A = (np.linalg.qr(rng.standard_normal((IN, slots)))[0] * root).T
    examples = rng.integers(50, 150, len(RANKS))

    def sent() -> tuple[ClientUpdate, ...]:
        return tuple(
            ClientUpdate(
                torch.from_numpy(A[:r] + NOISE * root[:r, None] * unit(rng, r, IN)),
                torch.from_numpy(B[:, :r] + NOISE * root[:r] * unit(rng, r, OUT).T),
                weight=float(examples[k]),
                id=k,
            )
            for k, r in enumerate(RANKS)
        )

    earlier = {method: aggregate(sent(), method) for method in SHOWN}
    return Cohort(LowRank(torch.from_numpy(A), torch.from_numpy(B)), sent(), earlier)


def unit(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Rows of normal noise, of length 1 in the mean of squares."""
    return rng.standard_normal((rows, size)) / np.sqrt(size)


def attacked(
    updates: Sequence[ClientUpdate], attack: Attack, attackers: int, seed: int
) -> list[ClientUpdate]:
    """The updates, those of the attackers of the size of honest ones and otherwise noise.

    Who inflates its rank sends the truth as it knows it in its own slots, so that only the slots
    it is not registered for are wrong; who does not sends nothing but noise.
    """
    rng = np.random.default_rng((seed, 1))
    usual = statistics.fmean(float((u.B @ u.A).norm()) for u in updates)
    first = len(updates) - attackers if attack.largest else 0
    sent = list(updates)
    for k in range(first, first + attackers):
        own = RANKS[k]
        kept = 0 if attack.rank is None else own
        new = (attack.rank or own) - kept
        B, A = torch.from_numpy(unit(rng, new, OUT).T), torch.from_numpy(unit(rng, new, IN))
        B = B * (usual / (B @ A).norm())
        sent[k] = replace(
            updates[k],
            A=torch.cat([updates[k].A[:kept], A]),
            B=torch.cat([updates[k].B[:, :kept], B], dim=1),
            weight=attack.times * updates[k].weight,
        )
    return sent


def error_under(
    method: str, found: Cohort, sent: Sequence[ClientUpdate], options: Mapping[str, Any]
) -> float:
    """Relative distance of the global update from the truth, under these options."""
    state: dict[str, Any] = {"previous": found.previous[method]}
    if "levels" in METHODS[method].options:
        state["levels"] = (*RANKS, INFLATED)
    result = aggregate(sent, method, **state, **options)
    truth = found.truth.dense()
    return float((result.total().dense() - truth).norm() / truth.norm())


def errors(seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Method -> attack -> attackers -> defence -> error over seeds; "clean" is no attack."""
    cohorts = {seed: cohort(seed) for seed in seeds}
    found: dict[str, Any] = {}
    for method, defences in SHOWN.items():
        found[method] = {
            label: {
                str(f): {
                    defence: _spread(
                        [
                            error_under(
                                method,
                                own,
                                attacked(own.updates, attack, f, seed) if attack else own.updates,
                                options_of(defence, f),
                            )
                            for seed, own in cohorts.items()
                        ]
                    )
                    for defence in defences
                }
                for f in NUMBERS
            }
            for label, attack in {CLEAN: None, **ATTACKS}.items()
        }
        print(f"errors of {method}", flush=True)
    return found


TRAINING = Settings(ranks=RANKS, rounds=6)
TRAINING_SEEDS = (0, 1, 2)
TRAINED_DEFENCES = ("none", "registry", "registry + quorum + cap")


def training() -> dict[str, Any]:
    """Attackers -> defence -> accuracy on digits under `rb`; attackers send noise at rank 32."""
    scores: dict[str, dict[str, list[float]]] = {}
    for seed in TRAINING_SEEDS:
        federation = build_federation(replace(TRAINING, seed=seed))
        for f in (0, *NUMBERS):
            attack = RankInflation(tuple(range(f))) if f else None
            for defence in TRAINED_DEFENCES:
                options = options_of(defence, max(f, 1))
                done = run(federation, "rb", attack=attack, **options)
                scores.setdefault(str(f), {}).setdefault(defence, []).append(done.accuracy[-1])
        print(f"training, seed {seed}", flush=True)
    return {
        "settings": asdict(TRAINING),
        "seeds": TRAINING_SEEDS,
        "accuracy": {
            f: {name: _spread(values) for name, values in own.items()} for f, own in scores.items()
        },
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


PANELS = ("rank above all others", "largest allowed rank", "own rank, weight lie")
CURVES = ("none", "one max_rank", "floor", "quorum", "cap", "registry + quorum + cap")


def draw(found: Mapping[str, Any], method: str = "rb") -> Figure:
    """Error over the clean error against the number of attackers, one panel per attack."""
    figure = Figure(figsize=(13, 4.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    clean = found[method][CLEAN]["1"]["none"]["mean"]
    for axes, label in zip(panels, PANELS, strict=True):
        own = found[method][label]
        for number, defence in enumerate(CURVES):
            y = [own[str(f)][defence]["mean"] / clean for f in NUMBERS]
            # Beside each other where they are equal.
            x = [f * 1.03 ** (number - len(CURVES) / 2) for f in NUMBERS]
            style = {"color": COLOURS[number], "marker": MARKERS[number]}
            axes.plot(x, y, label=defence, **style)
        _frame(axes, label)
    panels[0].set_ylabel(f"error of {method} over its clean error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return figure


def _frame(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xscale="log", yscale="log", xlabel="attackers of 30")
    axes.set_xticks(NUMBERS, [str(f) for f in NUMBERS])
    axes.set_yticks((1, 2, 5, 10, 20), ("1", "2", "5", "10", "20"))
    axes.minorticks_off()
    axes.axhline(1, color="0.6", linewidth=1, zorder=0)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Run, write, draw."""
    # Matrices this small gain nothing from threads.
    torch.set_num_threads(1)
    found = errors()
    settings = {
        "ranks": RANKS, "size": (OUT, IN), "noise": NOISE, "least": LEAST, "seeds": SEEDS,
        "floor": FLOOR, "cap": CAP, "lie": LIE, "inflated": INFLATED,
    }  # fmt: skip
    print(record("inflation", {"settings": settings, "errors": found, "training": training()}))
    IMAGES.mkdir(parents=True, exist_ok=True)
    draw(found).savefig(IMAGES / "inflation.png")
    print(IMAGES / "inflation.png")


if __name__ == "__main__":
    main()
