"""Claims about the study's runs, and what the runs say of them.

A claim says of two runs of one seed which has more of something. The interval of the mean
difference decides: *reproduced* where all of it is on the side that the paper says, *contradicted*
where all of it is on the other, *not at this scale* where it holds zero. Where several comparisons
of a claim differ in that, they are counted.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.study.plan import Configuration
from benchmarks.study.runs import STUDY, load
from benchmarks.study.statistics import Interval, accuracy_at, accuracy_last, paired_interval

Record = Mapping[str, Any]
Metric = Callable[[Record], float]

FEWEST = 5
"""Seeds without which nothing is said."""

REPRODUCED, OPEN, CONTRADICTED = "reproduced", "not at this scale", "contradicted"


def last(run: Record, name: str) -> float:
    """Of a measure: its value after the last round."""
    return float(run[name][-1])


def mean(run: Record, name: str) -> float:
    """Of a measure: its mean over the rounds."""
    return statistics.fmean(run[name])


def tail(run: Record) -> float:
    """Share of the global update's energy outside its leading components, after the last round."""
    return 1 - last(run, "energy_ratio")


def tail_left(run: Record) -> float:
    """What is left of the first round's tail after the last: below one the rank collapses."""
    return tail(run) / (1 - float(run["energy_ratio"][0]))


def falls(run: Record) -> float:
    """Mean fall of the accuracy from one round to the next, rises being none."""
    accuracy = run["accuracy"][1:]
    return statistics.fmean(max(0.0, a - b) for a, b in itertools.pairwise(accuracy))


METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy_last,
    "accuracy after round 1": partial(accuracy_at, number=1),
    "accuracy after round 3": partial(accuracy_at, number=3),
    "falls of accuracy": falls,
    "tail energy": tail,
    "part of the first tail energy that is left": tail_left,
    "aggregation noise": partial(mean, name="aggregation_noise"),
    "initialisation noise": partial(mean, name="initialisation_noise"),
    "bytes up": lambda run: float(run["bytes_up"]),
}
"""What claims are about."""


@dataclass(frozen=True)
class Runs:
    """Runs of one contender, whatever the data set.

    Attributes:
        group: of the plan.
        label: the contender.
        case: of the group.
    """

    group: str
    label: str
    case: str = ""

    def __str__(self) -> str:
        """As a table says it."""
        return f"{self.label} ({self.case})" if self.case else self.label


@dataclass(frozen=True)
class Comparison:
    """``more`` is claimed to have more of the metric than ``less``."""

    metric: str
    more: Runs
    less: Runs


@dataclass(frozen=True)
class Claim:
    """One statement of a paper.

    Attributes:
        says: the statement.
        source: arXiv or ACL id.
        figure: the paper's numbers.
        comparisons: what it says of runs.
        only: pattern of the runs, for `runs --only`; "" for those of `bench_theory`.
    """

    says: str
    source: str
    figure: str
    comparisons: tuple[Comparison, ...]
    only: str

    @property
    def command(self) -> str:
        """What runs them."""
        if not self.only:
            return "python -m benchmarks.bench_theory"
        return f"python -m benchmarks.study.runs --only '{self.only}'"


@dataclass(frozen=True)
class Finding:
    """What the runs say of one comparison on one data set.

    Attributes:
        seeds: pairs.
        difference: `more` less `less`, with its interval.
        more: mean of the first.
        less: mean of the second.
    """

    seeds: int
    difference: Interval
    more: float
    less: float

    @property
    def verdict(self) -> str:
        """By where the interval is."""
        if not self.difference.excludes(0.0):
            return OPEN
        return REPRODUCED if self.difference.mean > 0 else CONTRADICTED


def findings(
    claim: Claim, plan: Sequence[Configuration], folder: Path = STUDY
) -> dict[tuple[str, str], list[tuple[Comparison, Finding]]]:
    """Setting and data set -> what its runs say of each comparison, on the seeds of both."""
    found: dict[tuple[str, str], list[tuple[Comparison, Finding]]] = {}
    for place in dict.fromkeys((c.setting, c.data) for c in plan):
        for comparison in claim.comparisons:
            metric = METRICS[comparison.metric]
            more, less = (
                dict(_records(plan, folder, place, runs))
                for runs in (comparison.more, comparison.less)
            )
            if len(both := sorted(more.keys() & less.keys())) >= FEWEST:
                ours = [metric(more[seed]) for seed in both]
                theirs = [metric(less[seed]) for seed in both]
                finding = Finding(
                    len(both),
                    paired_interval(ours, theirs),
                    statistics.fmean(ours),
                    statistics.fmean(theirs),
                )
                found.setdefault(place, []).append((comparison, finding))
    return found


def verdict(found: Sequence[Finding]) -> str:
    """Of several comparisons on one data set: one word where they agree, else how many of each."""
    each = Counter(finding.verdict for finding in found)
    if len(each) == 1:
        return next(iter(each))
    counted = [f"{word} {each[word]}" for word in (REPRODUCED, OPEN, CONTRADICTED) if each[word]]
    return f"{', '.join(counted)} of {len(found)}"


def _records(
    plan: Sequence[Configuration], folder: Path, place: tuple[str, str], runs: Runs
) -> Iterator[tuple[int, Record]]:
    """Seed and record of every run that was not skipped."""
    for c in plan:
        if (c.setting, c.data) == place and (c.group, c.label, c.case) == (
            runs.group,
            runs.label,
            runs.case,
        ):
            yield from ((seed, r) for seed, r in load(c, folder).items() if "skipped" not in r)
