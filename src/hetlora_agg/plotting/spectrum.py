"""Singular values of results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hetlora_agg import AggregationResult, InputTypeError, InputValueError, Report
from hetlora_agg.linalg import svd_product
from hetlora_agg.plotting.drawing import Curve, frame, name_lines, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More lines than this are not told apart by their names.
MOST_NAMED_LAYERS = 16


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
    frame(axes, f"singular values{where}: rank {cut} keeps {share:.1%} of the energy", "component")
    axes.set_xlim(0.5, max(cut, *(len(S) for S in spectra.values())) + 0.7)
    if not many:
        name_lines(axes, curves)
    return figure


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
