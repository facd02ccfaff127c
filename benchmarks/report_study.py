"""What ``docs/evidence.md`` shows of the study, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import markdown
from benchmarks.study.claims import CLAIMS
from benchmarks.study.findings import Comparison, Finding, findings, verdict
from benchmarks.study.plan import Configuration
from benchmarks.study.runs import PLANS, STUDY

NAMES = {
    "digits": "digits",
    "mnist_5k": "MNIST",
    "vader_corpora": "text, 4 corpora",
    "vader_dirichlet": "text, 10 clients",
}
"""Data set -> what a table calls it."""

PERCENT = ("accuracy", "roughness")
"""Beginnings of the metrics that are shown in points of a hundred."""


def study_claims(folder: Path = STUDY, plan: Sequence[Configuration] | None = None) -> str:
    """Every claim with the paper's figure, ours, the verdict and the command."""
    plan = PLANS["full"]() if plan is None else plan
    rows = []
    for claim in CLAIMS:
        found = findings(claim, plan, folder)
        rows.append(
            [
                f"{claim.says} ({claim.source})",
                claim.figure,
                "<br>".join(_ours(data, pairs) for (_, data), pairs in found.items()) or "not run",
                _verdicts(found),
                f"`{claim.command}`",
            ]
        )
    head = ["claim", "the paper's figure", "ours: difference (95 % interval), seeds", "verdict"]
    return markdown([*head, "command"], rows)


def _ours(data: str, pairs: Sequence[tuple[Comparison, Finding]]) -> str:
    return f"{NAMES[data]}: " + "; ".join(_difference(*pair) for pair in pairs)


def _difference(comparison: Comparison, found: Finding) -> str:
    x = found.difference
    scale = 100 if comparison.metric.startswith(PERCENT) else 1
    low, mean, high = (f"{scale * value:+.3g}" for value in (x.low, x.mean, x.high))
    return (
        f"{comparison.metric}, `{comparison.more}` − `{comparison.less}`: "
        f"{mean} ({low} to {high}), {found.seeds}"
    )


def _verdicts(found: Mapping[tuple[str, str], Sequence[tuple[Comparison, Finding]]]) -> str:
    """One word where all data sets agree, else one for each."""
    each = {data: verdict([f for _, f in pairs]) for (_, data), pairs in found.items()}
    if len(set(each.values())) == 1:
        return f"**{next(iter(each.values()))}**"
    return "; ".join(f"{NAMES[data]}: **{word}**" for data, word in each.items()) or "–"
