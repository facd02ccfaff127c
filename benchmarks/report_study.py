"""What ``docs/evidence.md`` shows of the study, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.report import markdown
from benchmarks.study.contenders import MAIN, VARIANTS
from benchmarks.study.findings import FEWEST
from benchmarks.study.plan import Configuration
from benchmarks.study.results import (
    ALPHA,
    Record,
    Table,
    accuracies,
    compare,
    measures,
    points,
    table_of,
)
from benchmarks.study.runs import PLANS, STUDY, load
from benchmarks.study.statistics import Interval, accuracy_last, paired_interval

NAMES = {
    "digits": "digits",
    "mnist_5k": "MNIST",
    "vader_corpora": "text, 4 corpora",
    "vader_dirichlet": "text, 10 clients",
}
"""Data set -> what a table calls it."""

FACTORS: Mapping[str, tuple[str, str]] = {
    "every client starts from its own draw": ("init", "own start"),
    "scalings α/r ignored by the server": ("scaling", "scaling ignored"),
    "results aligned with the last round's by signs": ("align", "signs"),
    "the same by rotations, all of rank 8": ("align", "rotation"),
    "one client of rank 16, nine of rank 2": ("ranks", "one high"),
    "five clients of rank 4, five of 16": ("ranks", "two levels"),
    "three of ten clients a round": ("participation", "0.3"),
    "skew: Dirichlet 0.1": ("skew", "0.1"),
    "skew: Dirichlet 1": ("skew", "1"),
    "skew: Dirichlet 100": ("skew", "100"),
    "half the learning rate": ("rate", "0.005"),
    "twice the learning rate": ("rate", "0.02"),
    "singular values in B": ("split", "left"),
    "singular values in A": ("split", "right"),
}
"""What is different -> group and case of the plan; everything else is as in `usual_of` it."""

Plan = Sequence[Configuration]


def study_size(folder: Path = STUDY, plan: Plan | None = None) -> str:
    """How many runs of every data set there are, what they took, and where they all start."""
    plan = PLANS["study"]() if plan is None else plan
    rows, whole = [], [0.0] * 4
    for data, name in NAMES.items():
        own = [c for c in plan if c.data == data]
        records = [r for c in own for r in load(c, folder).values()]
        starts = [100 * r["accuracy"][0] for r in records if "accuracy" in r]
        seconds = sum(r.get("seconds", 0.0) for r in records)
        line = [len(own), sum(len(c.seeds) for c in own), len(records), seconds / 60]
        whole = [a + b for a, b in zip(whole, line, strict=True)]
        rows.append([name, *_counted(line), f"{statistics.fmean(starts):.1f}" if starts else "–"])
    rows.append(["together", *_counted(whole), "–"])
    head = ["data", "configurations", "runs planned", "recorded", "minutes of one core"]
    return markdown([*head, "accuracy before round 1, %"], rows)


def _counted(line: Sequence[float]) -> list[str]:
    return [f"{x:,.0f}" for x in line]


def study_methods(data: str, folder: Path = STUDY, plan: Plan | None = None) -> str:
    """Accuracy of every method on one data set under the usual settings."""
    return accuracies(table_of(_all(plan), folder, data=data, group="main", case=""))


def study_measures(data: str, folder: Path = STUDY, plan: Plan | None = None) -> str:
    """What else was measured in the same runs."""
    return measures(table_of(_all(plan), folder, data=data, group="main", case=""))


def study_factors(data: str = "digits", folder: Path = STUDY, plan: Plan | None = None) -> str:
    """What one change does to each of the main methods, in points of accuracy."""
    found = changes(data, folder, _all(plan))
    rows = [[words, *(_change(found[words].get(m)) for m in MAIN)] for words in FACTORS]
    return markdown(["different from the usual", *(f"`{label}`" for label in MAIN)], rows)


def _change(x: Interval | None) -> str:
    return "–" if x is None else points(x, "+", x.excludes(0.0))


def changes(data: str, folder: Path, plan: Plan) -> dict[str, dict[str, Interval]]:
    """What is different -> method -> change in points of accuracy, where seeds are enough."""
    found: dict[str, dict[str, Interval]] = {}
    for words, (group, case) in FACTORS.items():
        usual = table_of(plan, folder, data=data, group=usual_of(case), case="")
        changed = table_of(plan, folder, data=data, group=group, case=case)
        found[words] = {}
        for m in MAIN:
            both = sorted(changed.get(m, {}).keys() & usual.get(m, {}).keys())
            if len(both) >= FEWEST:
                pair = ([100 * accuracy_last(t[m][s]) for s in both] for t in (changed, usual))
                found[words][m] = paired_interval(*pair)
    return found


def usual_of(case: str) -> str:
    """The group that a case differs from in one thing: rotations need equal ranks."""
    return "equal" if case == "rotation" else "main"


@dataclass(frozen=True)
class Standing:
    """The main methods under one setting.

    Attributes:
        setting: data, group and case.
        mean: accuracy in percent by method, the best first.
        level: methods that cannot be told from the best one: the interval of the difference holds
            zero.
    """

    setting: str
    mean: Mapping[str, float]
    level: frozenset[str]


def standings(folder: Path = STUDY, plan: Plan | None = None) -> Iterator[Standing]:
    """One for every setting in which all of the main methods have seeds enough."""
    plan = _all(plan)
    for data, group, case in dict.fromkeys((c.data, c.group, c.case) for c in plan):
        table = table_of(plan, folder, data=data, group=group, case=case)
        own = {m: runs for m, runs in table.items() if m in MAIN and len(runs) >= FEWEST}
        if len(own) < len(MAIN):
            continue
        order = sorted(own, key=lambda m: -_mean(own, m))
        against = compare(own, order[0])
        yield Standing(
            ", ".join(part for part in (NAMES[data], group, case) if part),
            {m: 100 * _mean(own, m) for m in order},
            frozenset(m for m in order[1:] if not against[m].difference.excludes(0.0)),
        )


RATES = {"0.005": ("rate", "0.005"), "0.01": ("main", ""), "0.02": ("rate", "0.02")}
"""Learning rate -> group and case of the plan, on digits."""


def study_rates(data: str = "digits", folder: Path = STUDY, plan: Plan | None = None) -> str:
    """Accuracy of the main methods at each learning rate, and at the best of them."""
    tables = {
        rate: table_of(_all(plan), folder, data=data, group=group, case=case)
        for rate, (group, case) in RATES.items()
    }
    rows = []
    for m in MAIN:
        seeds = set.intersection(*(set(table.get(m, {})) for table in tables.values()))
        if len(seeds) >= FEWEST:
            mean = [
                100 * statistics.fmean(accuracy_last(table[m][s]) for s in seeds)
                for table in tables.values()
            ]
            rows.append([f"`{m}`", *(f"{x:.1f}" for x in mean), f"{max(mean):.1f}"])
    rows.sort(key=lambda row: -float(row[-1]))
    return markdown(["method", *RATES, "best of the three"], rows)


def study_best(folder: Path = STUDY, plan: Plan | None = None) -> str:
    """Under every setting the best of the main methods and those that cannot be told from it."""
    rows = []
    for standing in standings(folder, plan):
        named = {m: f"`{m}` {mean:.1f}" for m, mean in standing.mean.items()}
        order = list(named)
        level = ", ".join(named[m] for m in order if m in standing.level)
        rows.append([standing.setting, named[order[0]], level or "none", named[order[-1]]])
    return markdown(["setting", "best", "not told from it (95 % interval)", "last"], rows)


def study_combinations(folder: Path = STUDY, plan: Plan | None = None) -> str:
    """Combinations of the library's pieces against the best registered method of each data set."""
    rows = []
    for data in NAMES:
        registered, combined = combinations(data, folder, _all(plan))
        if not registered or not combined:
            continue
        best = max(registered, key=lambda m: _mean(registered, m))
        found = compare({best: registered[best], **combined}, best)
        for label in sorted(found, key=lambda m: -found[m].difference.mean):
            x, p = found[label].difference, found[label].p
            gain = Interval(100 * x.mean, 100 * x.low, 100 * x.high)
            rows.append(
                [
                    NAMES[data],
                    f"`{best}` {100 * _mean(registered, best):.1f}",
                    f"`{label}`",
                    points(gain, "+", p < ALPHA),
                    f"{p:.2g}",
                    *(
                        f"{_megabytes(t[m]):.2f}"
                        for t, m in ((combined, label), (registered, best))
                    ),
                ]
            )
    head = ["data", "best registered", "combination", "difference in points", "p (Holm)"]
    return markdown([*head, "MB down", "of the best"], rows)


def combinations(data: str, folder: Path, plan: Plan) -> tuple[Table, Table]:
    """Registered methods, and combinations by a name that says all of them, on the same seeds."""
    registered: Table = {}
    combined: Table = {}
    for case in dict.fromkeys(c.case for c in plan):
        table = table_of(plan, folder, data=data, group="combine", case=case)
        for label, own in table.items():
            if len(own) >= FEWEST:
                name = f"{label}, {case}" if case else label
                (combined if case or label in VARIANTS else registered)[name] = own
    return registered, combined


def _megabytes(runs: Mapping[int, Record]) -> float:
    return statistics.fmean(r["bytes_down"] for r in runs.values()) / 1e6


def _mean(table: Table, label: str) -> float:
    return statistics.fmean(map(accuracy_last, table[label].values()))


def _all(plan: Plan | None) -> Plan:
    return PLANS["full"]() if plan is None else plan


TABLES: Mapping[str, Callable[[], str]] = {
    **{
        f.__name__: f
        for f in (
            study_size,
            study_factors,
            study_rates,
            study_best,
            study_combinations,
        )
    },
    **{f"study_{data}": partial(study_methods, data) for data in NAMES},
    **{f"study_{data}_measures": partial(study_measures, data) for data in NAMES},
}
"""Name in a page's comment -> what stands there."""
