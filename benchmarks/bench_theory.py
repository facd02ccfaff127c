"""Rank collapse, and dilution with its rescue, over several seeds.

``python -m benchmarks.bench_theory`` writes ``results/theory.json``, ``docs/img/theory.png`` and
``docs/img/rescue.png``: ``idle``, rounds in which nobody trains, against their closed form;
``training``, the simulator's ρ over the rounds; ``rescue``, accuracy after one aggregation of a
strong client with weak ones; ``tried_training`` and ``tried_rescue``, both with other settings on
other seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.plots import IMAGES
from benchmarks.timing import record
from hetlora_agg import METHODS
from hetlora_agg.plotting import plot_collapse, plot_rescue
from hetlora_agg.simulate import (
    Collapse,
    IdleRecursion,
    Rescue,
    StrongAndWeak,
    collapse_in_training,
    dilution_and_rescue,
    idle_recursion,
)

SEEDS = (0, 1, 2, 3, 4, 5, 6, 7)
"""What is reported; nothing was chosen on them."""

TUNING_SEEDS = (100, 101, 102, 103, 104)
"""What settings and criteria were chosen on."""

IDLE_CLIENTS: dict[str, tuple[int, ...]] = {"ranks": (2, 4, 4, 8), "weights": (5, 10, 15, 20)}
IDLE_ROUNDS = 20
IDLE_POWERS = {"idle_kept": 0, "idle_coverage": 1, "idle_coverage_squared": 2}
"""Claim -> power of the coverage in the closed form."""

COLLAPSES, STAYS = 0.5, 0.9
"""The total update collapses if its tail's last-third mean is at most half that of the third
before, on every seed; it does not if that is at least 0.9."""

CLEAR_FALL, SMALL_FALL = 0.2, 0.05
"""Zero-padding falls if it loses at least 0.2 on every seed; a rescue loses at most 0.05 in the
mean."""

TRIED_TRAINING: dict[str, dict[str, Any]] = {
    "as reported": {},
    "9 of rank 2, 1 of 16": {"ranks": (2,) * 9 + (16,)},
    "7 of rank 2, 3 of 16": {"ranks": (2,) * 7 + (16,) * 3},
    "9 of rank 4, 1 of 16": {"ranks": (4,) * 9 + (16,)},
    "learning rate 0.003": {"learning_rate": 0.003},
    "Dirichlet(10)": {"dirichlet": 10.0},
    "60 rounds": {"rounds": 60},
}
"""Settings of the training that were tried, with two methods."""

TRIED_RESCUE = {
    "as reported": StrongAndWeak(),
    "9 weak clients": StrongAndWeak(weak=9),
    "3 epochs for the weak": StrongAndWeak(weak_epochs=3),
    "ranks 4 and 16": StrongAndWeak(weak_rank=4),
    "ranks 5 and 20": StrongAndWeak(weak_rank=5, strong_rank=20),
    "30 weak clients, 30% of the data": StrongAndWeak(weak=30, strong_share=0.3),
    "30 weak, 20%, 60 epochs at 0.003": StrongAndWeak(
        weak=30, strong_share=0.2, strong_epochs=60, learning_rate=0.003
    ),
}
"""Clients that were tried."""


def idle_runs() -> dict[str, IdleRecursion]:
    """Four methods whose claims name three different recursions."""
    return {
        name: idle_recursion(name, **IDLE_CLIENTS, rounds=IDLE_ROUNDS)
        for name in ("flexlora", "zeropad", "rb", "raflora")
    }


def power_of(name: str) -> int:
    """The power of the coverage that the method's claims promise."""
    return next(power for claim, power in IDLE_POWERS.items() if claim in METHODS[name].claims)


def idle_row(name: str, run: IdleRecursion) -> dict[str, Any]:
    """One method's recursion next to its closed form."""
    power = power_of(name)
    rho, expected = np.array(run.energy_ratio), np.array(run.closed_form(power).energy_ratio)
    odds = np.array(run.odds)
    beyond = run.coverage[min(run.ranks)]  # coverage never rises with the slot
    return {
        "power": power,
        "largest_deviation": float(np.abs(rho - expected).max()),
        "last_rate": float(odds[-1] / odds[-2]),
        "limit": beyond ** (2 * power),
        **run.to_dict(),
    }


def training_row(runs: Sequence[Collapse]) -> dict[str, Any]:
    """One method's ρ over several seeds."""
    third = len(runs[0].energy_ratio) // 3
    left = [run.tail_left for run in runs]
    return {
        "rho_first": _spread([run.energy_ratio[0] for run in runs]),
        "rho_least": _spread([min(run.energy_ratio) for run in runs]),
        "rho_last": _spread([statistics.fmean(run.energy_ratio[-third:]) for run in runs]),
        "change_rho_last": _spread(
            [statistics.fmean(run.change_energy_ratio[-third:]) for run in runs]
        ),
        "tail_left": _spread(left),
        "change_tail_left": _spread([run.change_tail_left for run in runs]),
        "accuracy": _spread([run.accuracy[-1] for run in runs]),
        "collapses": sum(value <= COLLAPSES for value in left),
        "stays": sum(value >= STAYS for value in left),
        "runs": [run.to_dict() for run in runs],
    }


def rescue_rows(found: Sequence[Rescue]) -> dict[str, Any]:
    """Accuracies over several seeds, and how far each contender fell."""
    after = {
        label: {
            "accuracy": _spread([result.after[label] for result in found]),
            "fall": _spread([result.fall(label) for result in found]),
            "falls": all(result.fall(label) >= CLEAR_FALL for result in found),
            "rescued": statistics.fmean(result.fall(label) for result in found) <= SMALL_FALL,
        }
        for label in found[0].after
    }
    return {
        **{
            name: _spread([getattr(result, name) for result in found])
            for name in ("start", "weak", "strong")
        },
        "after": after,
    }


def training_runs(
    seeds: Sequence[int], methods: Sequence[str] = ("flexlora", "rb", "raflora"), **settings: Any
) -> dict[str, list[Collapse]]:
    """Method -> one run per seed."""
    by_seed = [collapse_in_training(methods, seed=seed, **settings) for seed in seeds]
    return {name: [runs[name] for runs in by_seed] for name in methods}


def tried_training() -> dict[str, Any]:
    """Label -> method -> what became of the tail, on the tuning seeds."""
    found: dict[str, Any] = {}
    for label, settings in TRIED_TRAINING.items():
        runs = training_runs(TUNING_SEEDS, ("flexlora", "rb"), **settings)
        found[label] = {name: training_row(own) for name, own in runs.items()}
        for row in found[label].values():
            del row["runs"]
        print(f"tried {label}", flush=True)
    return found


def tried_rescue() -> dict[str, Any]:
    """Label -> accuracies on the tuning seeds."""
    return {
        label: rescue_rows([dilution_and_rescue(seed, clients=who) for seed in TUNING_SEEDS])
        for label, who in TRIED_RESCUE.items()
    }


def measured(
    idle: Mapping[str, IdleRecursion],
    training: Mapping[str, Sequence[Collapse]],
    rescue: Sequence[Rescue],
) -> dict[str, Any]:
    """Everything that the page shows."""
    return {
        "seeds": SEEDS,
        "tuning_seeds": TUNING_SEEDS,
        "criteria": {
            "collapses": COLLAPSES,
            "stays": STAYS,
            "clear_fall": CLEAR_FALL,
            "small_fall": SMALL_FALL,
        },
        "idle": {name: idle_row(name, run) for name, run in idle.items()},
        "training": {name: training_row(runs) for name, runs in training.items()},
        "rescue": {**rescue_rows(rescue), "runs": [result.to_dict() for result in rescue]},
        "tried_training": tried_training(),
        "tried_rescue": tried_rescue(),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Run, write, draw."""
    # The simulator's products are too small to share out.
    torch.set_num_threads(1)
    idle, training = idle_runs(), training_runs(SEEDS)
    rescue = [dilution_and_rescue(seed) for seed in SEEDS]
    print(record("theory", measured(idle, training, rescue)))
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("theory", plot_collapse(idle, training)),
        ("rescue", plot_rescue(rescue)),
    ):
        figure.savefig(IMAGES / f"{name}.png")
        print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
