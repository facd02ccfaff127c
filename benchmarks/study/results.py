"""What the study found so far: ``python -m benchmarks.study.results`` prints it as tables.

``--quick`` reads what ``runs --quick`` wrote.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import markdown
from benchmarks.study.plan import Configuration
from benchmarks.study.runs import PLANS, QUICK, STUDY, load
from benchmarks.study.statistics import (
    Interval,
    accuracy_at,
    accuracy_last,
    bootstrap_interval,
    holm,
    paired_interval,
    paired_p_value,
)

Record = Mapping[str, Any]
Metric = Callable[[Record], float]
Table = dict[str, dict[int, Record]]
"""Label -> seed -> record, of what ran."""

ALPHA = 0.05
"""Of the permutation tests, after Holm's adjustment."""

BASELINES = ("zeropad", "flexlora")
"""What every method is compared with."""

METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy_last,
    "after round 1": partial(accuracy_at, number=1),
    "after round 3": partial(accuracy_at, number=3),
}
"""What methods are compared by."""


@dataclass(frozen=True)
class Comparison:
    """A method against a baseline, on the seeds that both have.

    Attributes:
        seeds: how many.
        difference: of the method's metric, interval of the mean.
        p: of the paired permutation test, adjusted for the methods of the table.
    """

    seeds: int
    difference: Interval
    p: float


def table_of(plan: Iterable[Configuration], folder: Path = STUDY, **wanted: str) -> Table:
    """The records of the configurations with these attributes, such as `group="main"`.

    Runs that were skipped are left out, and labels that have none left.
    """
    found: Table = {}
    for c in plan:
        if all(getattr(c, name) == value for name, value in wanted.items()):
            records = load(c, folder)
            ran: dict[int, Record] = {
                seed: r for seed, r in sorted(records.items()) if "skipped" not in r
            }
            if ran:
                found[c.label] = ran
    return found


def compare(table: Table, baseline: str, metric: Metric = accuracy_last) -> dict[str, Comparison]:
    """Every other label against the baseline, pair by pair of equal seeds."""
    theirs = table.get(baseline, {})
    pairs = {
        label: ([metric(own[s]) for s in both], [metric(theirs[s]) for s in both])
        for label, own in table.items()
        if label != baseline and (both := sorted(own.keys() & theirs.keys()))
    }
    p = holm({label: paired_p_value(*pair) for label, pair in pairs.items()})
    return {
        label: Comparison(len(pair[0]), paired_interval(*pair), p[label])
        for label, pair in pairs.items()
    }


def accuracies(table: Table) -> str:
    """A line per label, best first: accuracy in percent, and differences in points.

    Bold are differences that the permutation test finds at 0.05 after Holm's adjustment.
    """
    against = {name: compare(table, name) for name in BASELINES}
    head = ["method", "seeds", *METRICS, *(f"− `{name}`" for name in BASELINES)]
    rows = [
        [
            f"`{label}`",
            str(len(own)),
            *(_percent(metric, own.values()) for metric in METRICS.values()),
            *(_difference(against[name].get(label)) for name in BASELINES),
        ]
        for label, own in _best_first(table)
    ]
    return markdown(head, rows)


def measures(table: Table) -> str:
    """A line per label, best first: noises, what is in the leading ranks, bytes, the server's time.

    Noises are means over rounds, the ratio is the last round's, bytes are a run's sum. What a
    record holds but is not what the head says is left out.
    """
    head = ["method", "aggregation noise", "initialisation noise", "energy ratio"]
    rows = [
        [
            f"`{label}`",
            *(
                "–" if label in LEFT_OUT.get(name, ()) else f"{_mean(own, name, reduce):.2g}"
                for name, reduce in REDUCED.items()
            ),
            *(f"{_mean(own, name, float) / 1e6:.2f}" for name in ("bytes_up", "bytes_down")),
            f"{1e3 * _mean(own, 'server_seconds', float):.1f}",
        ]
        for label, own in _best_first(table)
    ]
    return markdown([*head, "MB up", "MB down", "server ms"], rows)


REDUCED: Mapping[str, Callable[[Any], float]] = {
    "aggregation_noise": statistics.fmean,
    "initialisation_noise": statistics.fmean,
    "energy_ratio": lambda rounds: rounds[-1],
}
"""A measure of every round -> one of the run."""

LEFT_OUT: Mapping[str, frozenset[str]] = {
    # Recorded before the measure took in the slots that a client has and does not train.
    "aggregation_noise": frozenset({"plora", "hafl"}),
    # The base weight takes some of every round, or all of it; the rest is not the whole update.
    "energy_ratio": frozenset({"flora", "fedex", "flexlora, rest folded", "rb, rest folded"}),
}
"""Measure -> methods of which it does not say what it says of the others."""


def _best_first(table: Table) -> list[tuple[str, dict[int, Record]]]:
    return sorted(
        table.items(), key=lambda item: -statistics.fmean(map(accuracy_last, item[1].values()))
    )


def _mean(own: Mapping[int, Record], name: str, reduce: Callable[[Any], float]) -> float:
    return statistics.fmean(reduce(record[name]) for record in own.values())


def _percent(metric: Metric, records: Iterable[Record]) -> str:
    values = [100 * metric(record) for record in records]
    return points(bootstrap_interval(values), several=len(values) > 1)


def _difference(comparison: Comparison | None) -> str:
    if comparison is None:
        return "–"
    x, found = comparison.difference, comparison.p < ALPHA
    whole = Interval(100 * x.mean, 100 * x.low, 100 * x.high)
    return points(whole, "+", found, comparison.seeds > 1)


def points(x: Interval, sign: str = "", bold: bool = False, several: bool = True) -> str:
    """A mean to a decimal, with its interval; one value has none."""
    mean = f"{x.mean:{sign}.1f}"
    ends = f" ({x.low:{sign}.1f} to {x.high:{sign}.1f})" if several else ""
    return f"{f'**{mean}**' if bold else mean}{ends}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for every data set, group and case that has records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.results", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args(arguments).quick
    plan, folder = (PLANS["quick"](), QUICK) if quick else (PLANS["full"](), STUDY)
    for key in dict.fromkeys((c.setting, c.data, c.group, c.case) for c in plan):
        wanted = dict(zip(("setting", "data", "group", "case"), key, strict=True))
        if table := table_of(plan, folder, **wanted):
            head = ", ".join(part for part in key if part)
            print(f"## {head}\n\n{accuracies(table)}\n\n{measures(table)}\n")


if __name__ == "__main__":
    main()
