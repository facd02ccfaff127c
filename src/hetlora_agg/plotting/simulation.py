"""Accuracy and noise over the rounds of simulations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hetlora_agg import InputValueError
from hetlora_agg.plotting.drawing import Curve, frame, name_lines, require_matplotlib
from hetlora_agg.simulate import SimulationResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Below this a relative distance is rounding in float32.
EXACT = 1e-5

Runs = SimulationResult | Sequence[SimulationResult]


def plot_simulation(results: SimulationResult | Mapping[str, Runs]) -> Figure:
    """Accuracy and distance from the exact mean over the rounds, one line per method.

    Args:
        results: what `simulate` or `simulate_many` returned, or label -> results of several seeds,
            of which the mean is drawn. Skipped methods are left out.

    Raises:
        InputValueError: there is nothing to draw.
        ImportError: matplotlib is missing; the message names the extra that brings it.
    """
    runs, figure, (left, right) = _two_panels(results, "plot_simulation")
    _draw_accuracy(left, _curves(runs, "accuracy", first_round=0))
    _draw_noise(right, _curves(runs, "aggregation_noise", first_round=1))
    first = next(iter(runs.values()))
    settings, ranks = first[0].settings, ", ".join(map(str, first[0].settings.ranks))
    figure.suptitle(
        f"{len(settings.ranks)} clients of ranks {ranks} on digits, "
        f"Dirichlet({settings.dirichlet:g}) labels, participation {settings.participation:.0%}, "
        + ("one seed" if len(first) == 1 else f"mean of {len(first)} seeds"),
        fontsize=10,
    )
    return figure


def plot_energy(results: SimulationResult | Mapping[str, Runs]) -> Figure:
    """Energy ratio and effective rank over the rounds, one line per method: does the rank collapse?

    Args:
        results: what `simulate` or `simulate_many` returned, or label -> results of several seeds,
            of which the mean is drawn. Skipped methods are left out.

    Raises:
        InputValueError: there is nothing to draw.
        ImportError: matplotlib is missing; the message names the extra that brings it.
    """
    runs, figure, both = _two_panels(results, "plot_energy")
    panels = {
        "energy_ratio": "energy within the smallest client rank (1: collapse)",
        "effective_rank": "effective rank",
    }
    for axes, (what, title) in zip(both, panels.items(), strict=True):
        curves = _curves(runs, what, first_round=1)
        for curve in curves:
            axes.plot(curve.x, curve.y, **curve.style)
        frame(axes, title, "round")
        name_lines(axes, curves)
    return figure


def _two_panels(
    results: SimulationResult | Mapping[str, Runs], what: str
) -> tuple[dict[str, tuple[SimulationResult, ...]], Figure, Sequence[Axes]]:
    """The runs by label and a figure of two panels, high enough for their names."""
    figure_type = require_matplotlib()
    runs = _by_label(results)
    if not runs:
        raise InputValueError(
            f"{what}: expected at least one method that ran, got none; "
            "see the reason in each result's .skipped"
        )
    height = max(4.2, 1.6 + 0.24 * len(runs))
    figure = figure_type(figsize=(11, height), dpi=150, layout="constrained")
    return runs, figure, figure.subplots(1, 2)


def _by_label(
    results: SimulationResult | Mapping[str, Runs],
) -> dict[str, tuple[SimulationResult, ...]]:
    """Label -> its runs, one per seed; labels that were skipped for any seed are left out."""
    if isinstance(results, SimulationResult):
        results = {results.method: results}
    listed = {
        label: (runs,) if isinstance(runs, SimulationResult) else tuple(runs)
        for label, runs in results.items()
    }
    return {
        label: runs for label, runs in listed.items() if all(run.skipped is None for run in runs)
    }


def _curves(
    runs: Mapping[str, Sequence[SimulationResult]], what: str, first_round: int
) -> list[Curve]:
    means = {label: np.mean([getattr(run, what) for run in own], 0) for label, own in runs.items()}
    return [
        Curve(label, np.arange(first_round, first_round + len(mean)), mean, number)
        for number, (label, mean) in enumerate(means.items())
    ]


def _draw_accuracy(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve in curves:
        axes.plot(curve.x, curve.y, **curve.style)
    frame(axes, "accuracy on test digits", "round")
    axes.set_xlim(0, curves[0].x[-1])
    name_lines(axes, curves)


def _draw_noise(axes: Axes, curves: Sequence[Curve]) -> None:
    """Log scale; what is only rounding is drawn on a line of its own at the bottom."""
    measured = np.concatenate([*(curve.y[curve.y > EXACT] for curve in curves), [0.1, 1.0]])
    floor = 10 ** (np.floor(np.log10(measured.min())) - 0.5)
    shown = [replace(curve, y=np.where(curve.y > EXACT, curve.y, floor)) for curve in curves]
    axes.set_yscale("log")
    for curve in shown:
        axes.plot(curve.x, curve.y, **curve.style)
    axes.set_ylim(floor / 1.6, measured.max() * 1.4)
    if any((curve.y == floor).any() for curve in shown):
        axes.annotate(
            f"exact (below {EXACT:g})",
            (0.02, floor),
            xycoords=("axes fraction", "data"),
            xytext=(0, 5),
            textcoords="offset points",
            fontsize=8,
            color="0.35",
        )
    frame(axes, "relative distance from the exact mean", "round")
    (first, last), alone = curves[0].x[[0, -1]], len(curves[0].x) == 1
    axes.set_xlim(first - alone / 2, last + alone / 2)
    name_lines(axes, shown)
