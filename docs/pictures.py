"""Draw docs/img/components.png: all clients' components on one axis.

``python docs/pictures.py`` writes it; it shows sizes only, no measurements.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

HERE = Path(__file__).parent

# Okabe and Ito's colours, told apart by the colour-blind.
CLIENTS = (("phone", 2, "#0072B2"), ("tablet", 3, "#009E73"), ("server", 5, "#D55E00"))
"""Name, rank, colour."""

IN, OUT, GAP = 6.0, 5.0, 1.6
"""Sizes in the picture: of an A row, of a B column, and between clients."""

HIGH, WIDTH = 2.8, 24.0
"""Where the upper bars stand; the width of all panels."""


def block(axes: Any, x: float, y: float, width: float, height: float, colour: str) -> None:
    """One row of A or column of B."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", alpha=0.8))


def draw_clients(axes: Any) -> None:
    """What is sent: A_k and B_k of every client, each at its own rank."""
    x = 0.0
    for name, rank, colour in CLIENTS:
        for j in range(rank):
            block(axes, x + j, 0, 1, OUT, colour)
            block(axes, x + rank + 0.5, OUT - j - 1, IN / 2, 1, colour)
            axes.text(x + j + 0.5, 0.25, str(j), ha="center", fontsize=8, color="white")
        axes.text(x + rank / 2, OUT + 0.35, "B", ha="center", fontsize=9)
        axes.text(x + rank + 0.5 + IN / 4, OUT + 0.35, "A", ha="center", fontsize=9)
        axes.text(x, -0.95, f"{name}, rank {rank}", fontsize=10, color=colour)
        x += rank + 0.5 + IN / 2 + GAP
    finish(axes, "what clients send", OUT + 1.2)


def draw_components(axes: Any) -> None:
    """The one axis: all columns of B, then all rows of A, with slot numbers and owners."""
    total, x = sum(rank for _, rank, _ in CLIENTS), 0
    for _, rank, colour in CLIENTS:
        for j in range(rank):
            block(axes, x, 0, 1, OUT, colour)
            block(axes, total + 1.2, OUT - 0.5 * (x + 1), IN, 0.5, colour)
            axes.text(x + 0.5, 0.25, str(j), ha="center", fontsize=8, color="white")
            x += 1
    arrow = {"arrowstyle": "<->", "color": "0.3"}
    axes.annotate("", (0, OUT + 0.3), (total, OUT + 0.3), arrowprops=arrow)
    axes.text(total / 2, OUT + 0.5, "B (out × R),  R = Σ r_k", ha="center", fontsize=9)
    axes.text(total + 1.2 + IN / 2, OUT + 0.5, "A (R × in)", ha="center", fontsize=9)
    axes.text(0, -0.95, "numbers: the slot of each component", fontsize=9, color="0.3")
    finish(axes, "what a method sees: one axis of components", OUT + 1.2)


def draw_shares(axes: Any) -> None:
    """What a component counts for, at equal weights: over all clients, over a slot's owners."""
    x, step = 0, len(CLIENTS)
    for _, rank, colour in CLIENTS:
        for j in range(rank):
            owners = sum(other > j for _, other, _ in CLIENTS)
            for base, share in ((HIGH, 1 / step), (0.0, 1 / owners)):
                axes.add_patch(
                    Rectangle((x + 0.1, base), 0.8, 2.2 * share, facecolor=colour, alpha=0.8)
                )
            x += 1
    for base, text in (
        (HIGH, "exact: its client's share of all clients"),
        (0.0, "consensus: its client's share of the slot's owners"),
    ):
        axes.plot([0, x], [base, base], color="0.3", linewidth=0.8)
        axes.text(x + 0.4, base + 0.1, text, fontsize=9, va="bottom")
    finish(axes, "what a component counts for, at equal weights", HIGH + 1)


def finish(axes: Any, title: str, top: float) -> None:
    """Title, limits, no frame."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlim(-0.3, WIDTH)
    axes.set_ylim(-1.3, top)
    axes.set_aspect("equal", anchor="NW")
    axes.axis("off")


def components() -> Figure:
    """The picture of the home page."""
    figure = Figure(figsize=(7.6, 6.4), dpi=120, layout="constrained")
    panels = figure.subplots(3, 1, height_ratios=[7.5, 7.5, 5.1])
    for axes, draw in zip(panels, (draw_clients, draw_components, draw_shares), strict=True):
        draw(axes)
    return figure


def main(folder: Path = HERE / "img") -> None:
    """Write the pictures."""
    components().savefig(folder / "components.png", metadata={"Software": None})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
