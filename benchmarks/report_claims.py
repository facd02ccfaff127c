"""What ``docs/evidence.md`` shows of the papers' claims, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import load, markdown
from benchmarks.report_study import NAMES
from benchmarks.study.claims import CLAIMS, CONSEQUENCES, RESCUE, STRONG
from benchmarks.study.findings import (
    CONTRADICTED,
    REPRODUCED,
    Claim,
    Comparison,
    Finding,
    Runs,
    findings,
    verdict,
)
from benchmarks.study.plan import Configuration
from benchmarks.study.runs import PLANS, STUDY
from benchmarks.study.statistics import paired_interval

Plan = Sequence[Configuration]
Pairs = Sequence[tuple[Comparison, Finding]]

NAMES_HERE = {**NAMES, "rescue": "digits, one aggregation"}
"""Data set -> what a table calls it."""

POINTS = ("accuracy", "falls")
"""Beginnings of the metrics that are shown in points of a hundred."""


def study_claims(folder: Path = STUDY, plan: Plan | None = None) -> str:
    """Every claim with the paper's figure, ours, the verdict and the command."""
    head = ["claim", "the paper's figure", *HEAD]
    plan = PLANS["full"]() if plan is None else plan
    rows = [_row(claim, findings(claim, plan, folder)) for claim in CLAIMS]
    return markdown(head, [*rows, *(_row(claim, rescued(claim)) for claim in RESCUE)])


def study_consequences(folder: Path = STUDY, plan: Plan | None = None) -> str:
    """The same of what one may infer from the papers and none says: nothing to reproduce."""
    plan = PLANS["full"]() if plan is None else plan
    rows = [_row(claim, findings(claim, plan, folder)) for claim in CONSEQUENCES]
    table = markdown(["statement", "why", *HEAD], rows)
    for verdict_on_a_claim, words in PLAINLY.items():
        table = table.replace(verdict_on_a_claim, words)
    return table


PLAINLY = {REPRODUCED: "holds", CONTRADICTED: "does not hold"}
"""Verdict on a claim -> on a statement that nobody made."""

HEAD = ("ours: difference (95 % interval), means, seeds", "verdict", "command")


def _row(claim: Claim, found: Mapping[tuple[str, str], Pairs]) -> list[str]:
    return [
        f"{claim.says} ({claim.source})",
        claim.figure,
        "<br>".join(_ours(data, pairs) for (_, data), pairs in found.items()) or "not run",
        _verdicts(found, len(claim.comparisons)),
        f"`{claim.command}`",
    ]


def _ours(data: str, pairs: Pairs) -> str:
    return f"{NAMES_HERE[data]}: " + "; ".join(_difference(*pair) for pair in pairs)


def _difference(comparison: Comparison, found: Finding) -> str:
    x = found.difference
    scale = 100 if comparison.metric.startswith(POINTS) else 1
    low, mean, high = (f"{scale * value:+.3g}" for value in (x.low, x.mean, x.high))
    more, less = (f"{scale * value:.3g}" for value in (found.more, found.less))
    return (
        f"{comparison.metric}, `{comparison.more}` − `{comparison.less}`: "
        f"{mean} ({low} to {high}), {more} against {less}, {found.seeds}"
    )


def _verdicts(found: Mapping[tuple[str, str], Pairs], comparisons: int) -> str:
    """One verdict where all data sets agree and all comparisons ran, else one for each."""
    each = {}
    for (_, data), pairs in found.items():
        part = "" if len(pairs) == comparisons else f" (of {len(pairs)}; the others were not run)"
        each[data] = f"**{verdict([f for _, f in pairs])}**{part}"
    if len(set(each.values())) == 1:
        return next(iter(each.values()))
    return "; ".join(f"{NAMES_HERE[data]}: {words}" for data, words in each.items()) or "–"


def rescued(claim: Claim) -> dict[tuple[str, str], Pairs]:
    """What the runs of docs/theory.md say of a claim: one aggregation each."""
    runs = load("theory")["results"]["rescue"]["runs"]
    found = []
    for comparison in claim.comparisons:
        more, less = ([_after(run, r) for run in runs] for r in (comparison.more, comparison.less))
        means = statistics.fmean(more), statistics.fmean(less)
        found.append((comparison, Finding(len(runs), paired_interval(more, less), *means)))
    return {("vision", "rescue"): found}


def _after(run: Mapping[str, Any], runs: Runs) -> float:
    return float(run["strong"] if runs == STRONG else run["after"][runs.label])


TABLES: Mapping[str, Callable[[], str]] = {
    f.__name__: f for f in (study_claims, study_consequences)
}
"""Name in a page's comment -> what stands there."""
