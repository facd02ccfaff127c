"""What ``docs/claims.md`` shows of the aggregators that come as packages, as Markdown."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.report import load, markdown

MARKS = {"holds": "✓", "refuted": "✗", "cannot be tried": "–"}


def published() -> str:
    """One line per claim, one column per aggregator."""
    record = load("published")
    found = record["results"]
    machine = record["machine"]
    claims = list(next(iter(found.values()))["verdicts"])
    rows = [
        [f"`{claim}`", *(MARKS[one["verdicts"][claim].split(":")[0]] for one in found.values())]
        for claim in claims
    ]
    caption = (
        f"peft {machine['peft']}, chorus-fl {machine['chorus_fl']}, torch {machine['torch']}; "
        f"commit {machine['commit']}:"
    )
    return f"{caption}\n\n{markdown(['claim', *found], rows)}"


TABLES: dict[str, Callable[[], str]] = {"published": published}
"""Name in a page's comment -> what stands there."""
