"""What ``docs/robustness.md`` shows of the attacks, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.report import load, markdown, ran_on

AGGREGATIONS = ("flexlora", "flexlora, nnm, geomed")


def robustness() -> str:
    """Every rule under every attack, six of thirty clients."""
    return _errors("6 of 30")


def robustness_small() -> str:
    """The same, two of ten."""
    return _errors("2 of 10")


def robustness_noisy() -> str:
    """The same, six of thirty, among honest clients that differ more."""
    return _errors("6 of 30, noisy")


def robustness_times() -> str:
    """Distances through the factors against dense ones."""
    record = load("robustness")
    rows = [
        [
            row["size"],
            str(row["R"]),
            *(f"{1e3 * row['seconds'][name]:.0f}" for name in ("factors", "dense")),
            *(f"{row[name] / 1e6:.0f}" for name in ("factor_bytes", "dense_bytes")),
            *(f"{1e3 * row['seconds'][name]:.0f}" for name in AGGREGATIONS),
        ]
        for row in record["results"]["times"]
    ]
    head = ["size, float32", "R", "`squared_distances`, ms", "dense distances, ms", "factors, MB"]
    head += ["dense updates, MB", "`flexlora`, ms", "with `nnm(2).then(geomed(2))`, ms"]
    return f"{markdown(head, rows)}\n\nRun on {ran_on(record['machine'])}."


def _errors(label: str) -> str:
    found = load("robustness")["results"]
    federation, rules = found["federations"][label], found["errors"][label]
    attacks = list(next(iter(rules.values())))
    caption = (
        f"{federation['attackers']} of {federation['clients']} clients attack; honest ranks "
        f"{', '.join(map(str, federation['ranks']))} in turns, noise {federation['noise']:g} per "
        f"factor; means over {len(found['seeds'])} seeds. Every rule that takes f is told the true "
        f"one, `norm_clip` the bound {found['bound']:g}; `trimmed_mean` and `median` have "
        '`rank="full"`. *Worst* is the attack that does most, *worst seed* what it or another did '
        "on one seed:"
    )
    rows = []
    for rule, by_attack in rules.items():
        means = [by_attack[attack]["mean"] for attack in attacks]
        most = max(spread["max"] for spread in by_attack.values())
        rows.append([f"`{rule}`", *(_number(x) for x in (*means, max(means), most))])
    head = ["rule", "no attack", *(f"`{attack}`" for attack in attacks[1:])]
    return f"{caption}\n\n{markdown([*head, 'worst', 'worst seed'], rows)}"


def _number(x: float) -> str:
    return f"{x:.2f}" if x < 100 else f"{x:.0e}"


TABLES: dict[str, Callable[[], Any]] = {
    table.__name__: table
    for table in (robustness, robustness_small, robustness_noisy, robustness_times)
}
"""Name in a page's comment -> what stands there."""
