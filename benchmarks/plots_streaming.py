"""The pictures of ``docs/performance-streaming.md``, from its two results.

``python -m benchmarks.plots_streaming`` writes ``docs/img/streaming.png`` and
``docs/img/distributed.png``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.plots import COLOURS, IMAGES, MARKERS
from benchmarks.report import load


def draw_streaming(results: Mapping[str, Any]) -> Figure:
    """Seconds and peak against clients, seconds against layers; lines where they were fitted."""
    figure = Figure(figsize=(14, 5.2), dpi=130, layout="constrained")
    spent, peaks, layers = figure.subplots(1, 3)
    for i, row in enumerate(results["clients"]):
        points = row["points"]
        x = [point["clients"] for point in points]
        style = _style(i)
        label = f"{row['model']}, {row['method']}: exponent {row['fit']['exponent']:.2f}"
        _fitted(spent, x, [p["seconds"] for p in points], row["fit"], label, style)
        growth = row["growth"]["peak"]
        label = f"{row['model']}, {row['method']}: {growth:.2f}× from 100"
        peaks.plot(x, [p["peak"] / 1e6 for p in points], label=label, **style)
    x = [row["layers"] for row in results["layers"]]
    for i, (key, unit) in enumerate((("seconds", 1), ("state", 1e9))):
        y = [row[key] / unit for row in results["layers"]]
        if key == "seconds":
            label = f"`add`, s: exponent {results['layers_fit']['exponent']:.2f}"
            _fitted(layers, x, y, results["layers_fit"], label, _style(i))
        else:
            layers.plot(x, y, label="state, GB", **_style(i))
    _frame(spent, "clients", "processor seconds in add")
    _frame(peaks, "clients", "peak of the process, MB")
    _frame(layers, "layers of Llama-8B, 100 clients", "")
    peaks.set_ylim(bottom=100)
    for axes in (spent, peaks, layers):
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def draw_distributed(jobs: list[Mapping[str, Any]]) -> Figure:
    """Processor and wall seconds against processes, next to an even division."""
    figure = Figure(figsize=(11, 5.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key in zip(panels, ("processor", "wall"), strict=True):
        for i, job in enumerate(jobs):
            x = [run["processes"] for run in job["runs"]]
            y = [run["summary"][key] for run in job["runs"]]
            exponent = f": exponent {job['fit']['exponent']:.2f}" if key == "processor" else ""
            label = f"{job['shared']} shared out, {job['model']}, {job['method']}{exponent}"
            axes.plot(x, y, label=label, **_style(i))
            axes.plot(x, [y[0] / p for p in x], ":", color=_style(i)["color"])
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    _frame(panels[0], "processes", "processor seconds of the busiest process")
    _frame(panels[1], "processes", "wall seconds")
    for axes in panels:
        axes.set_xticks([run["processes"] for run in jobs[0]["runs"]])
    figure.suptitle("Dotted: seconds of one process divided by processes", fontsize=9)
    return figure


def _style(i: int) -> dict[str, Any]:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
        "markersize": 4,
    }


def _fitted(
    axes: Axes, x: list[float], y: list[float], fit: Mapping[str, float], label: str, style: Any
) -> None:
    axes.plot(x, y, linestyle="none", label=label, **style)
    ends = np.array([fit["from"], fit["to"]])
    axes.plot(ends, fit["factor"] * ends ** fit["exponent"], color=style["color"])


def _frame(axes: Axes, x: str, y: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,), numticks=12)
        )
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw both."""
    for name, figure in (
        ("streaming", draw_streaming(load("streaming")["results"])),
        ("distributed", draw_distributed(load("distributed")["results"]["jobs"])),
    ):
        figure.savefig(IMAGES / f"{name}.png")
        print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
