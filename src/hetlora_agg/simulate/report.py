"""Several methods over several seeds, as a record for machines and a table for people."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from hetlora_agg import __version__
from hetlora_agg.simulate.result import SimulationResult

FORMAT = "hetlora_agg.simulation/2"


def record_of(runs: Mapping[str, Sequence[SimulationResult]]) -> dict[str, Any]:
    """Settings, means over seeds and every single run, ready for JSON.

    Args:
        runs: label -> one result per seed; all labels with the same seeds and settings.

    Returns:
        `format`, `versions`, `settings`, `seeds`, `start_accuracy` (None if nothing ran),
        `methods` (label -> `accuracy` after the last round, `aggregation_noise` and
        `initialisation_noise` averaged over the rounds, `energy_ratio` and `effective_rank` after
        the last round, `seconds`, `runs`) and `skipped` (label -> reason). A method that was
        skipped for one seed is skipped.
    """
    skipped = {
        label: next(result.skipped for result in results if result.skipped is not None)
        for label, results in runs.items()
        if any(result.skipped is not None for result in results)
    }
    ran = {label: results for label, results in runs.items() if label not in skipped}
    first = next(iter(runs.values()))
    settings = first[0].to_dict()["settings"]
    del settings["seed"]
    starts = [result.accuracy[0] for results in ran.values() for result in results]
    return {
        "format": FORMAT,
        "versions": {"hetlora_agg": __version__, "torch": str(torch.__version__)},
        "settings": settings,
        "seeds": [result.settings.seed for result in first],
        "start_accuracy": _spread(starts) if starts else None,
        "methods": {
            label: {
                "accuracy": _spread(result.accuracy[-1] for result in results),
                **{
                    name: _spread(statistics.fmean(getattr(result, name)) for result in results)
                    for name in ("aggregation_noise", "initialisation_noise")
                },
                **{
                    name: _spread(getattr(result, name)[-1] for result in results)
                    for name in ("energy_ratio", "effective_rank")
                },
                "seconds": _spread(result.seconds for result in results),
                "runs": [result.to_dict() for result in results],
            }
            for label, results in ran.items()
        },
        "skipped": skipped,
    }


def table_of(record: Mapping[str, Any]) -> str:
    """The record as text: one line per method, best accuracy first, then what was skipped."""
    lines = []
    if record["methods"]:
        width = max(map(len, ["(start)", *record["methods"]]))
        lines += [
            f"{'method':{width}}  accuracy  {'seeds from-to':>13}  aggregation noise  "
            "initialisation noise  energy ratio  seconds",
            f"{'(start)':{width}}  {_accuracy(record['start_accuracy'])}",
        ]
        best_first = sorted(record["methods"].items(), key=lambda row: -row[1]["accuracy"]["mean"])
        lines += [
            f"{label:{width}}  {_accuracy(row['accuracy'])}  "
            f"{row['aggregation_noise']['mean']:17.2g}  "
            f"{row['initialisation_noise']['mean']:20.2g}  {row['energy_ratio']['mean']:12.2f}  "
            f"{row['seconds']['mean']:7.1f}"
            for label, row in best_first
        ]
        lines += [
            "Accuracy on test digits after the last round, mean over seeds "
            f"{', '.join(map(str, record['seeds']))}. Aggregation noise:",
            "relative distance of the total update from the exact mean of the updates, mean over "
            "rounds.",
            "Initialisation noise: relative distance of the models clients start from to the "
            "global one, mean",
            "over rounds. Energy ratio: share of the last update within the smallest client rank; "
            "1 is collapse.",
        ]
    return "\n".join(
        lines + [f"skipped {label}: {reason}" for label, reason in record["skipped"].items()]
    )


def _spread(values: Iterable[float]) -> dict[str, float]:
    listed = list(values)
    return {"mean": statistics.fmean(listed), "min": min(listed), "max": max(listed)}


def _accuracy(spread: Mapping[str, float]) -> str:
    extent = f"{spread['min']:.3f}-{spread['max']:.3f}"
    return f"{spread['mean']:8.3f}  {extent:>13}"
