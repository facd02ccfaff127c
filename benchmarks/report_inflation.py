"""What ``docs/rank-inflation.md`` shows of the inflation runs, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.report import load, markdown, ran_on

CLEAN = "nobody attacks"

ALONE = ("none", "one max_rank", "registry", "floor", "quorum", "cap")
TOGETHER = ("floor + cap", "quorum + cap", "registry + quorum", "registry + quorum + cap")


def inflation() -> str:
    """What was run."""
    record = load("inflation")
    found = record["results"]["settings"]
    ranks = found["ranks"]
    counted = ", ".join(f"{ranks.count(rank)} of rank {rank}" for rank in dict.fromkeys(ranks))
    clean = record["results"]["errors"]["rb"][CLEAN]["1"]["none"]["mean"]
    return (
        f"{len(ranks)} clients, {counted}, agree on a matrix of rank {max(ranks)} up to noise of "
        f"{found['noise']:.0%} in every row of A and column of B. One aggregation by `rb`, whose "
        f"error without attackers is {clean:.3f} of the matrix; means over {len(found['seeds'])} "
        f"seeds. Attackers send noise as large as an honest update; those that inflate declare "
        f"rank {found['inflated']} or {max(ranks)}, are registered for {min(ranks)} (one to six of "
        f"them) and are honest in the slots they are registered for; liars declare "
        f"{found['lie']:g} times their weight. Floor {found['floor']:g}, cap {found['cap']:g}, "
        f"quorum 2f + 1 for f attackers, what it drops carried over from an earlier round.\n\n"
        f"Run on {ran_on(record['machine'])}."
    )


def inflation_alone() -> str:
    """Error over the clean error for one, three and six attackers, one defence at a time."""
    return _table(ALONE)


def inflation_together() -> str:
    """The same for combinations."""
    return _table(TOGETHER)


def inflation_methods() -> str:
    """The other consensus methods."""
    found = load("inflation")["results"]["errors"]
    rows = []
    for method, attacks in found.items():
        clean = attacks[CLEAN]["1"]["none"]["mean"]
        for defence in ("none", "registry", "registry + quorum + cap"):
            if defence in attacks[CLEAN]["1"]:
                cells = [_ratios(own, defence, clean) for own in attacks.values()]
                rows.append([f"`{method}`", defence, *cells])
    return markdown(["method", "defence", *found["rb"]], rows)


def inflation_training() -> str:
    """Accuracy on digits after the last round."""
    found = load("inflation")["results"]["training"]
    settings, accuracy = found["settings"], found["accuracy"]
    caption = (
        f"The same {len(settings['ranks'])} clients on scikit-learn's digits, "
        f"Dirichlet({settings['dirichlet']:g}) labels, {settings['rounds']} rounds of `rb`; means "
        f"over {len(found['seeds'])} seeds, ranges in brackets. `RankInflation` sends noise in all "
        "slots, its norm that of the honest clients' mean:"
    )
    defences = list(next(iter(accuracy.values())))
    rows = [[f, *(_spread(own[name]) for name in defences)] for f, own in accuracy.items()]
    return f"{caption}\n\n{markdown(['attackers', *defences], rows)}"


def _table(defences: Sequence[str]) -> str:
    """One line per attack."""
    found = load("inflation")["results"]["errors"]["rb"]
    clean = found[CLEAN]["1"]["none"]["mean"]
    rows = [[label, *(_ratios(own, d, clean) for d in defences)] for label, own in found.items()]
    return markdown(["attack", *defences], rows)


def _ratios(own: Mapping[str, Any], defence: str, clean: float) -> str:
    """Error over the clean error for every number of attackers; one number where all are equal."""
    values = [f"{rows[defence]['mean'] / clean:.1f}" for rows in own.values()]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _spread(spread: Mapping[str, float]) -> str:
    mean, least, most = (f"{spread[name]:.2f}" for name in ("mean", "min", "max"))
    return f"{mean} ({least}–{most})"


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        inflation,
        inflation_alone,
        inflation_together,
        inflation_methods,
        inflation_training,
    )
}
"""Name in a page's comment -> what stands there."""
