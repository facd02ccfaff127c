"""What ``docs/contributing.md`` shows of the mutation tests, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.report import load, markdown


def mutants() -> str:
    """Changes and how many of them a test noticed, module by module."""
    record = load("mutants")
    found = record["results"]
    rows = [_row(f"`{name}.py`", counts) for name, counts in found["modules"].items()]
    head = ["file", "changes", "noticed by a test", "not noticed"]
    minutes = f"{found['processor_seconds'] / 60:.1f} minutes of one core"
    caption = f"mutmut {found['mutmut']}, {minutes}, commit {record['machine']['commit']}:"
    return f"{caption}\n\n{markdown(head, [*rows, _row('all', found)])}"


def _row(name: str, counts: Mapping[str, Any]) -> list[str]:
    noticed = counts["killed"] + counts["timeout"]
    share = f"{noticed} ({noticed / counts['total']:.1%})"
    return [name, str(counts["total"]), share, str(counts["total"] - noticed)]


def seeds() -> str:
    """Properties, examples, seeds, and which of them failed under which seed."""
    found = load("seeds")["results"]
    text = _under_seeds(found)
    if "again" in found:
        text += f"\n\nThose that failed, mended, once more: {_under_seeds(found['again'])}"
    return text


def _under_seeds(found: Mapping[str, Any]) -> str:
    failed = [
        f"`{name.rpartition('::')[2]}` (seed {seed})"
        for seed, one in found["seeds"].items()
        for name in one["failed"]
    ]
    return (
        f"{found['properties']} properties, {found['examples']} examples each, "
        f"{len(found['seeds'])} seeds, commit {found['commit']}: "
        + (f"{len(failed)} failed, {', '.join(failed)}." if failed else "none failed.")
    )


TABLES: dict[str, Callable[[], str]] = {"mutants": mutants, "seeds": seeds}
"""Name in a page's comment -> what stands there."""
