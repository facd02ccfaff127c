"""Rank collapse over the rounds, and accuracy around one aggregation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hetlora_agg import InputValueError
from hetlora_agg.plotting.drawing import COLOURS, Curve, frame, name_lines, require_matplotlib
from hetlora_agg.simulate import Collapse, IdleRecursion, Rescue

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_collapse(
    idle: Mapping[str, IdleRecursion], training: Mapping[str, Sequence[Collapse]]
) -> Figure:
    """The share of energy beyond the smallest rank, `1 − ρ`, over the rounds, on a log scale.

    Three panels: rounds in which nobody trains, rounds of training, and what each round of training
    changed. A straight line down is collapse at a geometric rate.

    Args:
        idle: label -> what `idle_recursion` returned.
        training: label -> results of `collapse_in_training`, one per seed; the mean is drawn.

    Returns:
        A matplotlib Figure.

    Raises:
        InputValueError: there is nothing to draw.
        ImportError: matplotlib is missing; the message names the extra that brings it.

    Example:
        >>> from hetlora_agg.simulate import Settings, idle_recursion
        >>> run = Collapse("rb", Settings(), (0.8, 0.7), (0.8, 0.7), (0.5, 0.6, 0.7))
        >>> idle = idle_recursion("rb", ranks=(1, 2), weights=(1, 1), rounds=2)
        >>> len(plot_collapse({"rb": idle}, {"rb": [run]}).axes)
        3
    """
    figure_type = require_matplotlib()
    if not idle or not training or not all(training.values()):
        raise InputValueError(
            "plot_collapse: expected idle and training runs, got none of one; "
            "see idle_recursion and collapse_in_training"
        )
    labels = list(dict.fromkeys([*training, *idle]))
    panels: dict[str, dict[str, np.ndarray]] = {
        "1 − ρ, nobody trains": {
            label: 1 - np.array(run.energy_ratio) for label, run in idle.items()
        },
        "1 − ρ of the total update, training": {
            label: 1 - np.mean([run.energy_ratio for run in runs], axis=0)
            for label, runs in training.items()
        },
        "1 − ρ of a round's change, training": {
            label: 1 - np.mean([run.change_energy_ratio for run in runs], axis=0)
            for label, runs in training.items()
        },
    }
    figure = figure_type(figsize=(15, 4.2), dpi=150, layout="constrained")
    firsts = (0, 1, 1)
    for axes, first, (title, tails) in zip(
        figure.subplots(1, 3), firsts, panels.items(), strict=True
    ):
        curves = [
            Curve(label, np.arange(first, first + len(tail)), tail, labels.index(label))
            for label, tail in tails.items()
        ]
        _draw_tails(axes, title, curves)
    return figure


def plot_rescue(results: Sequence[Rescue]) -> Figure:
    """Accuracy of the strong client alone and of every aggregate, a dot per seed, a bar the mean.

    Args:
        results: of `dilution_and_rescue`, one per seed, with the same contenders.

    Returns:
        A matplotlib Figure.

    Raises:
        InputValueError: there is nothing to draw.
        ImportError: matplotlib is missing; the message names the extra that brings it.

    Example:
        >>> from hetlora_agg.simulate import StrongAndWeak
        >>> found = Rescue(0, StrongAndWeak(), 0.5, 0.9, 0.5, {"zeropad": 0.5, "rb": 0.9})
        >>> [text.get_text() for text in plot_rescue([found]).axes[0].get_yticklabels()][-2:]
        ['zeropad', 'rb']
    """
    figure_type = require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    if not results:
        raise InputValueError(
            "plot_rescue: expected at least one result, got none; see dilution_and_rescue"
        )
    first = results[0]
    rows = {
        "start": [result.start for result in results],
        "weak clients, mean": [result.weak for result in results],
        "strong client alone": [result.strong for result in results],
        **{label: [result.after[label] for result in results] for label in first.after},
    }
    figure = figure_type(figsize=(7.5, 1.2 + 0.34 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, scores in enumerate(rows.values()):
        colour = COLOURS[0] if place > 2 else COLOURS[-1]
        axes.plot(scores, [place] * len(scores), "o", color=colour, alpha=0.45, markersize=5)
        axes.plot([np.mean(scores)], [place], "|", color=colour, markersize=16, markeredgewidth=2.5)
    axes.axvline(float(np.mean(rows["strong client alone"])), color="0.6", linewidth=1, zorder=0)
    who = first.clients
    frame(
        axes,
        f"one client of rank {who.strong_rank} with {who.strong_share:.0%} of the data and "
        f"{who.weak} of rank {who.weak_rank}, one aggregation",
        "accuracy on test digits",
    )
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    return figure


def _draw_tails(axes: Axes, title: str, curves: Sequence[Curve]) -> None:
    axes.set_yscale("log")
    for curve in curves:
        axes.plot(curve.x, curve.y, **curve.style)
    frame(axes, title, "round")
    axes.set_xlim(curves[0].x[0], curves[0].x[-1])
    name_lines(axes, curves)
