"""Regenerate the tables of README.md and docs/ from the registry and the committed results.

``python docs/tables.py`` rewrites what stands between a ``table: name`` comment and an ``end`` one;
``--check`` only says whether anything is out of date.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hetlora_agg import CLAIMS, CLIENTS, METHODS
from hetlora_agg.claims import DEPARTURES, GAUGE, IDLE, INAPPLICABLE, Cell

PROJECT = Path(__file__).parent.parent
# Run as a script, only docs/ is on the path.
sys.path.insert(0, str(PROJECT))

from benchmarks import (  # noqa: E402
    report,
    report_adapters,
    report_claims,
    report_inflation,
    report_kernel,
    report_mutants,
    report_published,
    report_robustness,
    report_streaming,
    report_study,
    report_theory,
    streaming_million,
)
from benchmarks.report import markdown  # noqa: E402
from docs import decisions  # noqa: E402

RESULTS = PROJECT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "docs/methods.md",
    "docs/performance.md",
    "docs/theory.md",
    "docs/choosing.md",
    "docs/contributing.md",
    "docs/claims.md",
    "docs/rank-inflation.md",
    "docs/robustness.md",
    "docs/performance-streaming.md",
    "docs/scaling.md",
    "docs/evidence.md",
)


def claim(entry: Any, name: str) -> str:
    """yes, no, or the options under which the claim holds."""
    if name not in entry.claims:
        return "–"
    options = entry.claims[name]
    return "yes" if not options else ", ".join(f"`{k}={v!r}`" for k, v in options.items())


def methods() -> str:
    """One line per registered method."""
    shown = ("mixed_ranks", "exact", "consensus", "statistical", "gauge")
    head = ["method", "what it does", "mixed ranks", "exact", "consensus", "unbiased under noise"]
    rows = [
        [f"`{name}`", entry.summary, *(claim(entry, c) for c in shown), entry.reference]
        for name, entry in sorted(METHODS.items())
    ]
    return markdown([*head, "gauge-invariant", "source"], rows)


def cell_text(cell: Cell) -> str:
    """One cell of the matrix: it holds, departs by a formula of that name, or cannot be tried."""
    if cell.verdict == "not applicable":
        return "n/a"
    if cell.verdict == "fails":
        return f"✗ {cell.departure}"
    under = ", ".join(f"`{k}={v!r}`" for k, v in cell.options.items())
    return f"✓ with {under}, else {cell.departure}" if under else "✓"


CLAIMS_ABOUT = {
    "estimates": (
        "mixed_ranks",
        "exact",
        "consensus",
        "statistical",
        "statistical_uncorrelated",
    ),
    "participation": ("cohort", "cohort_equal", "cohort_ratio", "slot_ratio", "bounded_share"),
    "clients": ("order", "split_client", "rescaling", "single_client", "absent", "layers"),
    "factors": ("homogeneous", "orthogonal", "transpose", *GAUGE, "zero_component"),
    "idle": IDLE,
}


def matrix(about: str) -> str:
    """Every method's cells of some claims, and what those claims say."""
    names = CLAIMS_ABOUT[about]
    rows = [
        [f"`{name}`", *(cell_text(entry.cell(claim)) for claim in names)]
        for name, entry in sorted(METHODS.items())
    ]
    said = "\n".join(f"* `{name}`: {CLAIMS[name]}" for name in names)
    return f"{said}\n\n{markdown(['method', *(f'`{name}`' for name in names)], rows)}"


def departures() -> str:
    """What is computed where a claim is false."""
    return markdown(["name", "what is computed"], [[k, v] for k, v in DEPARTURES.items()])


def inapplicable() -> str:
    """Why a claim cannot be tried on a method."""
    rows = []
    for kind, (reason, claims) in INAPPLICABLE.items():
        met = [m for m, e in sorted(METHODS.items()) if e.inapplicable(kind)]
        rows.append([reason, ", ".join(f"`{c}`" for c in claims), ", ".join(f"`{m}`" for m in met)])
    return markdown(["why", "claims", "methods"], rows)


def sides() -> str:
    """One line per method: what its clients do, what the server keeps, what a round costs."""
    rows = []
    for name, entry in sorted(METHODS.items()):
        known = entry.describe()
        server = "; ".join(known["server"]) or "nothing"
        rows.append([f"`{name}`", known["client"], server, known["cost"], known["fidelity"]])
    return markdown(["method", "a client", "the server keeps", "cost", "fidelity"], rows)


def method_cards() -> str:
    """Everything the docstrings say, method by method."""
    cards = []
    for name, entry in sorted(METHODS.items()):
        claims = [c if not o else f"{c} (with {o})" for c, o in sorted(entry.claims.items())]
        missed = "; ".join(f"{c} ({d})" for c, d in sorted(entry.fails.items()))
        text = inspect.getdoc(entry.run) or ""
        text = re.sub(r"\nExample:\n(?:    .*\n|\n)*(?=\S)", "\n", text)
        sides = f"Client: {CLIENTS[entry.client]}.\nServer keeps: "
        sides += "; ".join(entry.server) or "nothing"
        cards.append(
            f"## `{name}`\n\n```text\n{text}\n\n{sides}.\n\nClaims: {', '.join(claims)}."
            f"\n\nDepartures under the defaults: {missed or 'none'}.\n```"
        )
    return "\n\n".join(cards)


def simulation() -> str:
    """The demo's runs: accuracy, noises, rank."""
    record = json.loads((RESULTS / "simulation.json").read_text())
    by_accuracy = sorted(record["methods"].items(), key=lambda item: -item[1]["accuracy"]["mean"])
    rows = [
        [
            f"`{name}`",
            f"{run['accuracy']['mean']:.3f}",
            f"{run['accuracy']['min']:.3f}–{run['accuracy']['max']:.3f}",
            f"{run['aggregation_noise']['mean']:.2g}",
            f"{run['initialisation_noise']['mean']:.2g}",
            f"{run['effective_rank']['mean']:.1f}",
        ]
        for name, run in by_accuracy
    ]
    settings, seeds = record["settings"], len(record["seeds"])
    caption = (
        f"Clients of ranks {', '.join(map(str, settings['ranks']))} on scikit-learn's digits, "
        f"labels split by Dirichlet({settings['dirichlet']}), a network pre-trained on classes 0–4 "
        f"(accuracy {record['start_accuracy']['mean']:.3f}), {settings['rounds']} rounds, mean and "
        f"range over {seeds} seeds:"
    )
    head = [
        "method",
        "accuracy",
        "over seeds",
        "aggregation noise",
        "initialisation noise",
        "effective rank",
    ]
    return f"{caption}\n\n{markdown(head, rows)}"


TABLES: dict[str, Callable[[], str]] = {
    **{f.__name__: f for f in (methods, sides, method_cards, simulation)},
    **{f.__name__: f for f in (departures, inapplicable)},
    **{f"claims_{about}": partial(matrix, about) for about in CLAIMS_ABOUT},
    **report.TABLES,
    **report_kernel.TABLES,
    **report_mutants.TABLES,
    **report_published.TABLES,
    **report_theory.TABLES,
    **report_adapters.TABLES,
    **report_inflation.TABLES,
    **report_robustness.TABLES,
    **report_streaming.TABLES,
    **report_study.TABLES,
    **report_claims.TABLES,
    **streaming_million.TABLES,
    **decisions.TABLES,
}


def rebuilt(text: str) -> str:
    """A page with every generated part made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, text, flags=re.S)


def main(check: bool) -> int:
    """Rewrite the pages, or with check return 1 if one is out of date."""
    stale = []
    for page in PAGES:
        path = PROJECT / page
        text = path.read_text()
        new = rebuilt(text)
        if new != text:
            stale.append(page)
            if not check:
                path.write_text(new)
    verb = "out of date" if check else "rewritten"
    print("\n".join(f"{verb}: {page}" for page in stale) or "all tables are current")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
