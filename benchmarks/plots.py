"""The pictures of ``docs/performance.md``, from ``results/scaling.json`` alone.

``python -m benchmarks.plots`` writes ``docs/img/scaling.png`` and ``docs/img/accuracy.png``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.contenders import CONTENDERS
from benchmarks.timing import RESULTS

IMAGES = Path(__file__).parent.parent / "docs" / "img"

# Okabe and Ito's colours without yellow: told apart by the colour-blind, dark enough on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

FLOOR = 1e-16
"""Excess errors at or below this are drawn here: a logarithmic axis has no zero."""


def draw_scaling(sweeps: Mapping[str, Any]) -> Figure:
    """Time against R, layers and out + in, fitted lines over the range they were fitted to."""
    figure = Figure(figsize=(13, 4.4), dpi=130, layout="constrained")
    for axes, (name, sweep) in zip(figure.subplots(1, len(sweeps)), sweeps.items(), strict=True):
        x = [point["x"] for point in sweep["points"]]
        for number, (contender, fit) in enumerate(sweep["fits"].items()):
            y = [1e3 * point["seconds"][contender] for point in sweep["points"]]
            label = f"{contender}: exponent {fit['exponent']:.2f} from {fit['from']:.0f}"
            colour = COLOURS[number]
            axes.plot(x, y, MARKERS[number], color=colour, label=label)
            ends = np.array([fit["from"], fit["to"]])
            axes.plot(ends, 1e3 * fit["factor"] * ends ** fit["exponent"], color=colour)
        _frame(axes, name, "ms")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(sweep["fixed"], fontsize=10)
        axes.legend(fontsize=8)
    return figure


def draw_accuracy(workloads: list[Mapping[str, Any]]) -> Figure:
    """Excess error against time; settings of one contender are joined."""
    figure = Figure(figsize=(13, 5.4), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0]
    names = sorted(
        {p["contender"] for w in workloads for p in w["points"]}, key=list(CONTENDERS).index
    )
    for axes, workload in zip(panels, workloads, strict=True):
        for number, name in enumerate(names):
            points = [p for p in workload["points"] if p["contender"] == name]
            axes.plot(
                [p["times_LB"] for p in points],
                [max(p["excess"], FLOOR) for p in points],
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
                markersize=12 if name == "ours" else 6,
                label=name,
            )
        _frame(axes, "time / LB", "excess error")
        axes.set_title(workload["workload"], fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _frame(axes: Axes, x: str, y: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw both."""
    results = json.loads((RESULTS / "scaling.json").read_text())["results"]
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("scaling", draw_scaling(results["sweeps"])),
        ("accuracy", draw_accuracy(results["accuracy"])),
    ):
        figure.savefig(IMAGES / f"{name}.png")
        print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
