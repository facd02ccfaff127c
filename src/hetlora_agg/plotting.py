"""Pictures of simulations and spectra; matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hetlora_agg import AggregationResult, InputTypeError, InputValueError, Report
from hetlora_agg.linalg import svd_product
from hetlora_agg.simulate import SimulationResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow: told apart by the colour-blind, dark enough on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

# Four patterns against seven colours: every pair comes once in 28 lines. The solid lines are wide
# and lie below, so that equal curves show through each other.
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))

# More lines than this are not told apart by their names.
MOST_NAMED_LAYERS = 16

# Height of one name in points.
NAME_POINTS = 13

# Below this a relative distance is rounding in float32.
EXACT = 1e-5

Runs = SimulationResult | Sequence[SimulationResult]


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


def plot_simulation(results: SimulationResult | Mapping[str, Runs]) -> Figure:
    """Accuracy and distance from the exact mean over the rounds, one line per method.

    Args:
        results: what `simulate` or `simulate_many` returned, or label -> results of several seeds,
            of which the mean is drawn. Skipped methods are left out.

    Raises:
        InputValueError: there is nothing to draw.
        ImportError: matplotlib is missing; the message names the extra that brings it.
    """
    figure_type = require_matplotlib()
    runs = _by_label(results)
    if not runs:
        raise InputValueError(
            "plot_simulation: expected at least one method that ran, got none; "
            "see the reason in each result's .skipped"
        )
    height = max(4.2, 1.6 + 0.24 * len(runs))
    figure = figure_type(figsize=(11, height), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
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


def plot_spectrum(
    results: AggregationResult | Mapping[str, AggregationResult] | Report,
    *,
    rank: int | None = None,
) -> Figure:
    """Singular values, one line per layer, and where a rank cuts them off.

    Args:
        results: from `aggregate`, `aggregate_layers` or `diagnose`; made with `rank="full"` they
            show what lies beyond the cut-off.
        rank: where to cut; None cuts at the rank of the results.

    Raises:
        InputTypeError: `results` is none of the three.
        InputValueError: `rank` is below 1.
        ImportError: matplotlib is missing; the message names the extra that brings it.
    """
    figure_type = require_matplotlib()
    spectra, own_rank, kept = _spectra(results)
    cut = own_rank if rank is None else rank
    if cut < 1:
        raise InputValueError(f"plot_spectrum: rank: expected at least 1, got {rank}")
    squares = [np.square(S) for S in spectra.values()]
    energy, inside = sum(S.sum() for S in squares), sum(S[:cut].sum() for S in squares)
    share = kept * inside / energy if energy else 1.0
    figure = figure_type(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(subplot_kw={"yscale": "log", "ylabel": "σ"})
    many = len(spectra) > MOST_NAMED_LAYERS
    curves = [
        Curve(label, 1 + np.flatnonzero(S), S[S > 0], number=0 if many else number)
        for number, (label, S) in enumerate(spectra.items())
        if S.any()
    ]
    look: dict[str, Any] = {"marker": "o", "markersize": 3.5, "alpha": 0.35 if many else 1.0}
    for curve in curves:
        axes.plot(curve.x, curve.y, **curve.style | look)
    axes.axvline(cut + 0.5, color="0.35", linewidth=1, linestyle=(0, (4, 3)))
    where = f" in {len(spectra)} layers" if many else ""
    _frame(axes, f"singular values{where}: rank {cut} keeps {share:.1%} of the energy", "component")
    axes.set_xlim(0.5, max(cut, *(len(S) for S in spectra.values())) + 0.7)
    if not many:
        _name_lines(axes, curves)
    return figure


def require_matplotlib() -> type[Figure]:
    """The Figure of matplotlib, or an error that names the extra that brings it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plotting needs matplotlib; do: pip install "hetlora-agg[plot]"'
        ) from error
    return Figure


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


def _spectra(
    results: AggregationResult | Mapping[str, AggregationResult] | Report,
) -> tuple[dict[str, np.ndarray], int, float]:
    """Layer -> its singular values `(rank,)`, the largest rank, the energy share they stand for."""
    if isinstance(results, Report):
        layers: dict[Any, Any] = {each.layer: each.singular_values for each in results.layers}
        rank, kept = max(layer.rank for layer in results.layers), results.energy_kept
    else:
        named = {None: results} if isinstance(results, AggregationResult) else results
        if not isinstance(named, Mapping) or not named:
            raise InputTypeError(
                "plot_spectrum: expected a result of aggregate, aggregate_layers or diagnose, "
                f"got {results!r:.80}"
            )
        layers = {name: _singular_values(result) for name, result in named.items()}
        rank = max(result.rank for result in named.values())
        known = [result.certificate for result in named.values() if result.certificate is not None]
        whole = sum(float((np.asarray(c.norm) ** 2).sum()) for c in known)
        lost = sum(float((np.asarray(c.tail) ** 2).sum()) for c in known)
        kept = 1 - lost / whole if whole else 1.0
    spectra = {}
    for layer, values in layers.items():
        name, stacked = "" if layer is None else str(layer), np.asarray(values, dtype=float)
        for index in np.ndindex(stacked.shape[:-1]):
            spectra[f"{name}[{', '.join(map(str, index))}]" if index else name] = stacked[index]
    return spectra, rank, kept


def _singular_values(result: AggregationResult) -> Any:
    """Singular values of the factors, `(*layers, rank)`."""
    if result.singular_values is not None:
        return result.singular_values
    return svd_product(result.factors.torch().B, result.factors.torch().A).S


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
    _frame(axes, "accuracy on test digits", "round")
    axes.set_xlim(0, curves[0].x[-1])
    _name_lines(axes, curves)


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
    _frame(axes, "relative distance from the exact mean", "round")
    (first, last), alone = curves[0].x[[0, -1]], len(curves[0].x) == 1
    axes.set_xlim(first - alone / 2, last + alone / 2)
    _name_lines(axes, shown)


def _frame(axes: Axes, title: str, xlabel: str) -> None:
    from matplotlib.ticker import LogFormatter, MaxNLocator

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_yscale() == "log":
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name_lines(axes: Axes, curves: Sequence[Curve]) -> None:
    """Every line's name beside its right end, moved apart where names would touch."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    named = [curve for curve in curves if curve.label]
    ends = np.array([to_axes.transform((curve.x[-1], curve.y[-1]))[1] for curve in named])
    gap = NAME_POINTS / 72 * axes.figure.dpi / axes.bbox.height
    for curve, height in zip(named, _apart(ends, gap), strict=True):
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


def _apart(wanted: np.ndarray, gap: float) -> np.ndarray:
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
