"""Who contributed what: clients by layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hetlora_agg import InputTypeError, Report
from hetlora_agg.plotting.drawing import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More cells than this are not told apart by their numbers.
MOST_NUMBERED_CELLS = 200


def plot_contributions(report: Report) -> Figure:
    """Every client's part of the result, layer by layer, as a heat map.

    A cell is ``p_k ⟨ΔW_k, total⟩ / ‖total‖²``: of an exact mean a column sums to 1; a negative cell
    is a client whose update was outvoted; a column that sums to less than 1 is one in which absent
    clients count for nothing.

    Args:
        report: from `diagnose`.

    Raises:
        InputTypeError: `report` is none.
        ImportError: matplotlib is missing; the message names the extra that brings it.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate, diagnose
        >>> clients = [(torch.eye(2), torch.eye(2)), (torch.eye(2)[:1], torch.eye(2)[:, :1])]
        >>> figure = plot_contributions(diagnose(clients, aggregate(clients, "rb")))
        >>> figure.axes[0].get_title(loc="left")
        'share of the result'
    """
    figure_type = require_matplotlib()
    if not isinstance(report, Report):
        raise InputTypeError(
            f"plot_contributions: expected a Report from diagnose, got {type(report).__name__}"
        )
    clients = list(dict.fromkeys(client for layer in report.layers for client in layer.clients))
    cells = np.full((len(clients), len(report.layers)), np.nan)
    for column, layer in enumerate(report.layers):
        total = np.sqrt(np.sum(np.square(layer.singular_values)))
        rows = [clients.index(client) for client in layer.clients]
        part = np.multiply(layer.client_shares, layer.client_norms) * layer.client_cosines
        cells[rows, column] = part / total if total else 0.0
    height, width = 1.6 + 0.34 * len(clients), 3.2 + 0.5 * len(report.layers)
    figure = figure_type(figsize=(width, max(2.6, height)), dpi=150, layout="constrained")
    axes = figure.subplots()
    reach = max(float(np.nanmax(np.abs(cells))), np.finfo(float).tiny)
    shown = axes.imshow(cells, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
    axes.set_yticks(range(len(clients)), [str(client) for client in clients], fontsize=8)
    names = [layer.layer or "" for layer in report.layers]
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 1 else 0, fontsize=8)
    axes.set_title("share of the result", loc="left", fontsize=10)
    axes.set_ylabel("client")
    if cells.size <= MOST_NUMBERED_CELLS:
        for (row, column), value in np.ndenumerate(cells):
            if np.isfinite(value):
                dark = abs(value) > 0.6 * reach
                colour = "white" if dark else "black"
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour
                )
    figure.colorbar(shown, ax=axes)
    return figure
