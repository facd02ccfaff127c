"""The pictures of ``docs/evidence.md``, from the study's records alone.

``python -m benchmarks.plots_study`` writes five of them, ``docs/img/study_rounds.png`` and so on.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.plots import COLOURS, IMAGES, MARKERS
from benchmarks.report_study import FACTORS, NAMES, Standing, changes, standings
from benchmarks.study.contenders import MAIN
from benchmarks.study.findings import FEWEST
from benchmarks.study.plan import Configuration
from benchmarks.study.results import BASELINES, Table, compare, table_of
from benchmarks.study.runs import PLANS, STUDY
from benchmarks.study.statistics import accuracy_last, bootstrap_interval

Plan = Sequence[Configuration]


def usual(data: str, folder: Path, plan: Plan) -> Table:
    """What ran of one data set under the usual settings, with seeds enough for an interval."""
    table = table_of(plan, folder, data=data, group="main", case="")
    return {label: own for label, own in table.items() if len(own) >= FEWEST}


def draw_rounds(tables: Mapping[str, Table]) -> Figure:
    """Accuracy of the main methods after every round: means, and intervals as bands."""
    figure = Figure(figsize=(13, 8), dpi=130, layout="constrained")
    for axes, (data, table) in _panels(figure, tables):
        for i, label in enumerate(label for label in MAIN if label in table):
            rounds = np.array([run["accuracy"] for run in table[label].values()]).T
            bands = [bootstrap_interval(values.tolist()) for values in 100 * rounds]
            x, style = np.arange(len(bands)), _style(i)
            axes.plot(x, [band.mean for band in bands], label=label, markersize=4, **style)
            ends = [band.low for band in bands], [band.high for band in bands]
            axes.fill_between(x, *ends, color=style["color"], alpha=0.12, linewidth=0)
        axes.set_title(NAMES[data], fontsize=10)
        axes.set_xlabel("round")
        axes.set_ylabel("accuracy, %")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7, ncols=2)
    return figure


def draw_differences(tables: Mapping[str, Table]) -> Figure:
    """Every method less each baseline in points of the last rounds' accuracy, with intervals."""
    figure = Figure(dpi=130, layout="constrained")
    for axes, (data, table) in _tall_panels(figure, tables):
        order = sorted(
            table, key=lambda label: statistics.fmean(map(accuracy_last, table[label].values()))
        )
        for i, baseline in enumerate(BASELINES):
            found = compare(table, baseline)
            for label, comparison in found.items():
                x, y = comparison.difference, order.index(label) + 0.3 * (i - 0.5)
                axes.plot([100 * x.low, 100 * x.high], [y, y], color=COLOURS[i])
                axes.plot(100 * x.mean, y, MARKERS[i], color=COLOURS[i], markersize=4)
            axes.plot([], [], MARKERS[i], color=COLOURS[i], label=f"less {baseline}")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(order)), order, fontsize=7)
        axes.set_title(NAMES[data], fontsize=10)
        axes.set_xlabel("difference in accuracy, points")
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def draw_factors(plan: Plan, folder: Path, data: str = "digits") -> Figure:
    """What each change does to each of the main methods, in points, with intervals."""
    figure = Figure(figsize=(13, 7), dpi=130, layout="constrained")
    panels = figure.subplots(2, (len(MAIN) + 1) // 2, sharex=True, sharey=True).flat
    found = changes(data, folder, plan)
    for axes, (i, label) in zip(panels, enumerate(MAIN), strict=True):
        for y, words in enumerate(FACTORS):
            if (x := found[words].get(label)) is not None:
                axes.plot([x.low, x.high], [y, y], color=COLOURS[i % len(COLOURS)])
                axes.plot(x.mean, y, "o", color=COLOURS[i % len(COLOURS)], markersize=4)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(label, fontsize=10)
        axes.set_yticks(range(len(FACTORS)), list(FACTORS), fontsize=7)
        axes.grid(axis="x", alpha=0.3)
    # Shared by all panels: the first row on top, as in the table.
    axes.invert_yaxis()
    figure.supxlabel("difference in accuracy from the usual settings, points", fontsize=10)
    return figure


def draw_tails(plan: Plan, folder: Path, data: str = "digits") -> Figure:
    """How much of the global update is outside its leading ranks, round by round of long runs."""
    figure = Figure(figsize=(7, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    table = table_of(plan, folder, data=data, group="long", case="")
    for i, label in enumerate(label for label in TAILED if len(table.get(label, {})) >= FEWEST):
        rounds = np.array([run["energy_ratio"] for run in table[label].values()]).T
        bands = [bootstrap_interval(values.tolist()) for values in 1 - rounds]
        x, style = np.arange(1, len(bands) + 1), _style(i) | {"marker": ""}
        axes.plot(x, [band.mean for band in bands], label=label, **style)
        ends = [band.low for band in bands], [band.high for band in bands]
        axes.fill_between(x, *ends, color=style["color"], alpha=0.12, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("round")
    axes.set_ylabel("energy outside the ranks that all clients have")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)
    return figure


TAILED = ("zeropad", "hetlora", "flexlora", "fedhl", "rbla", "raflora", "rb")
"""Methods of the long runs whose adapters go on from round to round, all in one update."""


def draw_settings(standings: Sequence[Standing]) -> Figure:
    """Under every setting how far each main method is behind the best one, in points.

    Framed are the best one and those that cannot be told from it.
    """
    behind = np.array(
        [[max(s.mean.values()) - s.mean.get(m, np.nan) for m in MAIN] for s in standings]
    ).reshape(len(standings), len(MAIN))
    figure = Figure(figsize=(9, 1.5 + 0.28 * len(standings)), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.imshow(behind, cmap="Blues", vmin=0, vmax=20, aspect="auto")
    for y, x in itertools.product(range(len(standings)), range(len(MAIN))):
        if np.isfinite(behind[y, x]):
            dark = "white" if behind[y, x] > 12 else "black"
            axes.text(x, y, f"{behind[y, x]:.1f}", color=dark, ha="center", va="center", fontsize=7)
        if behind[y, x] == 0 or MAIN[x] in standings[y].level:
            frame = Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, fill=False, edgecolor="#c44e00")
            axes.add_patch(frame)
    axes.set_yticks(range(len(standings)), [s.setting for s in standings], fontsize=7)
    axes.set_xticks(range(len(MAIN)), MAIN, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_xlabel("points of accuracy behind the best; framed: best, or not told from it")
    return figure


def _panels(figure: Figure, tables: Mapping[str, Table]) -> zip[tuple[Axes, tuple[str, Table]]]:
    """Two panels to a row."""
    panels = figure.subplots(-(-len(tables) // 2), 2, squeeze=False).flat
    return zip(panels, tables.items(), strict=False)


def _tall_panels(
    figure: Figure, tables: Mapping[str, Table]
) -> zip[tuple[Axes, tuple[str, Table]]]:
    """Two panels to a row, as high as the longer of their tables needs."""
    sizes = [len(table) for table in tables.values()]
    heights = [2 + max(sizes[i : i + 2]) for i in range(0, len(sizes), 2)]
    figure.set_size_inches(13, 1 + 0.24 * sum(heights))
    panels = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights).flat
    return zip(panels, tables.items(), strict=False)


def _style(i: int) -> dict[str, str]:
    """Colour and marker differ for all of the main methods, colour alone for seven."""
    dashes = "-" if i < len(COLOURS) else "--"
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": dashes,
    }


def main() -> None:
    """Draw."""
    plan = PLANS["full"]()
    tables = {data: usual(data, STUDY, plan) for data in NAMES}
    for name, figure in (
        ("rounds", draw_rounds(tables)),
        ("differences", draw_differences(tables)),
        ("factors", draw_factors(plan, STUDY)),
        ("tails", draw_tails(plan, STUDY)),
        ("settings", draw_settings([*standings(STUDY, plan)])),
    ):
        figure.savefig(IMAGES / f"study_{name}.png")
        print(IMAGES / f"study_{name}.png")


if __name__ == "__main__":
    main()
