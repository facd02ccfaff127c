"""What all pictures share: colours, lines and their names, the frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow: told apart by the colour-blind, dark enough on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

# Four patterns against seven colours: every pair comes once in 28 lines. The solid lines are wide
# and lie below, so that equal curves show through each other.
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))

# Height of one name in points.
NAME_POINTS = 13


@dataclass(frozen=True)
class Curve:
    """One line of a panel, `x (n,)` and `y (n,)`, and how it is drawn."""

    label: str
    x: np.ndarray
    y: np.ndarray
    number: int

    @property
    def style(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot`."""
        solid = self.number % len(DASHES) == 0
        return {
            "marker": "o" if len(self.x) == 1 else None,
            "color": self.colour,
            "linestyle": DASHES[self.number % len(DASHES)],
            "linewidth": 2.6 if solid else 1.7,
            "zorder": 2 if solid else 3,
        }

    @property
    def colour(self) -> str:
        """The colour of the line and of its name."""
        return COLOURS[self.number % len(COLOURS)]


def require_matplotlib() -> type[Figure]:
    """The Figure of matplotlib, or an error that names the extra that brings it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plotting needs matplotlib; do: pip install "hetlora-agg[plot]"'
        ) from error
    return Figure


def frame(axes: Axes, title: str, xlabel: str) -> None:
    """Title and label of the axes, whole numbers below, lines across, nothing else."""
    from matplotlib.ticker import LogFormatter, MaxNLocator

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_yscale() == "log":
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def name_lines(axes: Axes, curves: Sequence[Curve]) -> None:
    """Every line's name beside its right end, moved apart where names would touch."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    named = [curve for curve in curves if curve.label]
    ends = np.array([to_axes.transform((curve.x[-1], curve.y[-1]))[1] for curve in named])
    gap = NAME_POINTS / 72 * axes.figure.dpi / axes.bbox.height
    for curve, height in zip(named, apart(ends, gap), strict=True):
        leader = {"arrowstyle": "-", "color": curve.colour, "linewidth": 0.7, "relpos": (0, 0.5)}
        axes.annotate(
            curve.label,
            (curve.x[-1], curve.y[-1]),
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=curve.colour,
            arrowprops={**leader, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )


def apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Heights at least `gap` apart in [0, 1], as near to `wanted` as can be, in its order.

    Names that touch form a block around the mean of their wishes (isotonic regression).
    """
    if not wanted.size:
        return wanted
    order = np.argsort(wanted, kind="stable")
    blocks: list[list[float]] = []
    for rank, wish in enumerate(wanted[order]):
        blocks.append([wish - rank * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) >= np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = np.concatenate([np.full(len(block), np.mean(block)) for block in blocks])
    steps = gap * np.arange(len(wanted))
    placed = np.empty_like(wanted)
    placed[order] = np.clip(level, 0, max(0, 1 - steps[-1])) + steps
    return placed
