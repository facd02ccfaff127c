"""What ``docs/theory.md`` shows of the theory runs, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.report import load, markdown, ran_on

POWERS = {0: "1", 1: "q", 2: "q²"}


def theory() -> str:
    """What holds, by criteria that were fixed before the reported seeds were run."""
    record = load("theory")
    found, seeds = record["results"], len(record["results"]["seeds"])
    criteria = found["criteria"]
    training, after = found["training"], found["rescue"]["after"]
    lines = [
        f"Settings and criteria were chosen on seeds {_listed(found['tuning_seeds'])}; reported "
        f"are seeds {_listed(found['seeds'])}.",
        f"* **Collapses** when the tail `1 − ρ`, averaged over the last third of the rounds, is at "
        f"most {criteria['collapses']:g} of its average over the third before: "
        + "; ".join(f"{n} on {row['collapses']} of {seeds} seeds" for n, row in training.items())
        + ".",
        f"* **Does not** when that is at least {criteria['stays']:g}: "
        + "; ".join(f"{n} on {row['stays']} of {seeds} seeds" for n, row in training.items())
        + ".",
        f"* **Falls** when the accuracy is at least {criteria['clear_fall']:g} below the strong "
        f"client's on every seed: {_those(after, 'falls')}.",
        f"* **Is rescued** when it is at most {criteria['small_fall']:g} below it in the mean: "
        f"{_those(after, 'rescued')}.",
        "",
        f"Run on {ran_on(record['machine'])}.",
    ]
    return "\n".join([lines[0], "", *lines[1:]])


def theory_idle() -> str:
    """Rounds in which nobody trains, next to the closed form."""
    rows = [
        [
            f"`{name}`",
            POWERS[row["power"]],
            *(f"{row['energy_ratio'][t]:.4f}" for t in (0, 1, 5, -1)),
            f"{row['largest_deviation']:.0e}",
            f"{row['last_rate']:.6f}",
            f"{row['limit']:.6f}",
        ]
        for name, row in load("theory")["results"]["idle"].items()
    ]
    first = next(iter(load("theory")["results"]["idle"].values()))
    last = len(first["energy_ratio"]) - 1
    caption = (
        f"Ranks {_listed(first['ranks'])}, weights {_listed(first['weights'])}, hence coverage "
        f"{', '.join(f'{q:g}' for q in first['coverage'])}:"
    )
    head = ["method", "σ times", "ρ(0)", "ρ(1)", "ρ(5)", f"ρ({last})"]
    head += ["largest deviation of ρ from its closed form", "last rate of (1 − ρ)/ρ", "its limit"]
    return f"{caption}\n\n{markdown(head, rows)}"


def theory_training() -> str:
    """ρ over the rounds of training."""
    found = load("theory")["results"]
    runs = next(iter(found["training"].values()))["runs"]
    settings = runs[0]["settings"]
    caption = (
        f"{len(settings['ranks'])} clients of ranks {_listed(settings['ranks'])}, "
        f"Dirichlet({settings['dirichlet']:g}) labels, {settings['local_epochs']} local epochs, "
        f"{settings['rounds']} rounds; means over {len(runs)} seeds, ranges in brackets. The tail "
        "is 1 − ρ, and what is left of it the last third's mean over that of the third before:"
    )
    head = ["method", "ρ, first round", "lowest ρ", "ρ, last third", "tail left"]
    head += ["ρ of the change, last third", "tail of the change left", "accuracy"]
    names = ("rho_first", "rho_least", "rho_last", "tail_left", "change_rho_last")
    names += ("change_tail_left", "accuracy")
    rows = [
        [f"`{method}`", *(_spread(row[name], 4 if "rho" in name else 2) for name in names)]
        for method, row in found["training"].items()
    ]
    return f"{caption}\n\n{markdown(head, rows)}"


def theory_rescue() -> str:
    """Accuracy after one aggregation."""
    found = load("theory")["results"]["rescue"]
    who = found["runs"][0]["clients"]
    caption = (
        f"One client of rank {who['strong_rank']} with {who['strong_share']:.0%} of the examples, "
        f"{who['weak']} of rank {who['weak_rank']} with the rest, split by "
        f"Dirichlet({who['dirichlet']:g}); local epochs {who['strong_epochs']} and "
        f"{who['weak_epochs']}; means over {len(found['runs'])} seeds, ranges in brackets:"
    )
    rows = [
        [label, _spread(found[name], 3), ""]
        for label, name in (
            ("pre-trained start", "start"),
            ("weak clients alone, exact mean", "weak"),
            ("strong client alone", "strong"),
        )
    ]
    rows += [
        [f"`{label}`", _spread(row["accuracy"], 3), _spread(row["fall"], 3)]
        for label, row in found["after"].items()
    ]
    head = ["global model", "accuracy", "below the strong client alone"]
    return f"{caption}\n\n{markdown(head, rows)}"


def theory_tried_training() -> str:
    """Other settings of the training."""
    tried = load("theory")["results"]["tried_training"]
    rows = [
        [
            label,
            *(f"{row['rho_last']['mean']:.4f}" for row in methods.values()),
            *(_spread(row["tail_left"], 2) for row in methods.values()),
            *(f"{row['change_tail_left']['mean']:.2f}" for row in methods.values()),
        ]
        for label, methods in tried.items()
    ]
    names = list(next(iter(tried.values())))
    head = ["setting", *(f"{n}: ρ, last third" for n in names), *(f"{n}: tail left" for n in names)]
    head += [f"{n}: tail of the change left" for n in names]
    return markdown(head, rows)


def theory_tried_rescue() -> str:
    """Other clients: how far the means lie below the strong client alone."""
    tried = load("theory")["results"]["tried_rescue"]
    labels = list(next(iter(tried.values()))["after"])
    rows = [
        [
            label,
            f"{row['strong']['mean']:.3f}",
            *(f"{row['after'][name]['fall']['mean']:.3f}" for name in labels),
        ]
        for label, row in tried.items()
    ]
    return markdown(["setting", "strong client alone", *(f"`{name}`" for name in labels)], rows)


def _those(rows: Mapping[str, Mapping[str, Any]], verdict: str) -> str:
    """The labels whose verdict is yes."""
    return ", ".join(f"`{label}`" for label, row in rows.items() if row[verdict]) or "none"


def _spread(spread: Mapping[str, float], digits: int) -> str:
    mean, least, most = (f"{spread[name]:.{digits}f}" for name in ("mean", "min", "max"))
    return f"{mean} ({least}–{most})"


def _listed(values: list[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        theory,
        theory_idle,
        theory_training,
        theory_rescue,
        theory_tried_training,
        theory_tried_rescue,
    )
}
"""Name in a page's comment -> what stands there."""
