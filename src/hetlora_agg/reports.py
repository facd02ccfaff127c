"""What `diagnose` and `compare` return: numbers, one line, a table for notebooks."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from typing import Any

FAR_ON_PURPOSE = (
    "While ranks differ, methods with consensus (rb, …) are far from the exact mean on purpose: a\n"
    "slot that a client lacks counts as missing, not as zero."
)
"""What a reader of a distance must know: it is no quality by itself."""


@dataclass(frozen=True, repr=False)
class LayerReport:
    """One layer's measurements.

    Attributes:
        layer: its name, None for a single unnamed one.
        clients: participating clients' ids or positions.
        ranks: their ranks.
        rank: rank of the result's factors.
        distance: ``‖total − Σ p_k ΔW_k‖_F``.
        mean_norm: ``‖Σ p_k ΔW_k‖_F``.
        kept: squared norm kept by truncation, and squared norm before it.
        singular_values: of the result; nested lists for leading dimensions.
        client_norms: ``‖ΔW_k‖_F``.
        client_cosines: cosine of ΔW_k to the total, 0 where either is zero.
        client_shares: ``p_k = n_k / Σ n``.
        fallbacks: batch members whose SVD left the fast path, and how.
    """

    layer: str | None
    clients: tuple[Hashable, ...]
    ranks: tuple[int, ...]
    rank: int
    distance: float
    mean_norm: float
    kept: tuple[float, float]
    singular_values: list[Any]
    client_norms: list[float]
    client_cosines: list[float]
    client_shares: list[float]
    fallbacks: tuple[tuple[int, str], ...] = ()

    def __repr__(self) -> str:
        """One line: the numbers that sum the layer up."""
        return (
            f"LayerReport({self.layer or 'one layer'}, rank {self.rank}, "
            f"{self.relative_distance:.3g} from the exact mean)"
        )

    @property
    def relative_distance(self) -> float:
        """Distance from the exact mean over the norm of the mean."""
        return _ratio(self.distance, self.mean_norm)

    @property
    def energy_kept(self) -> float:
        """Σσ² kept over Σσ² before truncation; 1 where nothing was discarded."""
        return 1.0 if self.kept[1] == 0 else self.kept[0] / self.kept[1]


@dataclass(frozen=True, repr=False)
class Report:
    """What `diagnose` found, over all layers and layer by layer.

    Attributes:
        layers: one `LayerReport` per layer.

    With a single layer its fields can be read off the report itself: ``report.singular_values``.
    """

    layers: tuple[LayerReport, ...]

    @property
    def relative_distance(self) -> float:
        """Distance of the total from ``Σ p_k ΔW_k`` relative to it, all layers together."""
        distance = math.hypot(*(layer.distance for layer in self.layers))
        return _ratio(distance, math.hypot(*(layer.mean_norm for layer in self.layers)))

    @property
    def energy_kept(self) -> float:
        """Part of Σσ² that truncation kept, all layers together."""
        whole = sum(layer.kept[1] for layer in self.layers)
        return 1.0 if whole == 0 else sum(layer.kept[0] for layer in self.layers) / whole

    @property
    def singular_values(self) -> Any:
        """The result's singular values: of the only layer, or by layer name."""
        return self._each("singular_values")

    @property
    def client_norms(self) -> Any:
        """``‖ΔW_k‖_F``: of the only layer, or by layer name."""
        return self._each("client_norms")

    @property
    def client_cosines(self) -> Any:
        """Cosine of each update to the result: of the only layer, or by layer name."""
        return self._each("client_cosines")

    @property
    def client_shares(self) -> Any:
        """``p_k``: of the only layer, or by layer name."""
        return self._each("client_shares")

    def _each(self, field: str) -> Any:
        values = {layer.layer: getattr(layer, field) for layer in self.layers}
        return next(iter(values.values())) if len(values) == 1 else values

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, lists and strings, ready for JSON."""
        layers = []
        for layer in self.layers:
            entry = asdict(layer)
            entry["clients"] = [_plain(client) for client in layer.clients]
            entry["relative_distance"] = layer.relative_distance
            entry["energy_kept"] = layer.energy_kept
            layers.append(entry)
        return {
            "relative_distance": self.relative_distance,
            "energy_kept": self.energy_kept,
            "layers": layers,
        }

    def summary(self) -> str:
        """The table of layers and the table of clients as text."""
        parts = [text_table(*self._layer_table())]
        if len(self.layers) == 1:
            parts.append(text_table(*self._client_table()))
        parts.append(FAR_ON_PURPOSE)
        return "\n\n".join(parts)

    def _layer_table(self) -> tuple[list[str], list[list[str]]]:
        head = ["layer", "client ranks", "rank", "kept by truncation", "distance from exact mean"]
        rows = [
            [
                layer.layer or "-",
                _ranks(layer.ranks),
                str(layer.rank),
                f"{layer.energy_kept:.4f}",
                f"{layer.relative_distance:.3g}",
            ]
            for layer in self.layers
        ]
        if len(rows) > 1:
            total = [f"{self.energy_kept:.4f}", f"{self.relative_distance:.3g}"]
            rows.append(["all layers", "", "", *total])
        return head, rows

    def _client_table(self) -> tuple[list[str], list[list[str]]]:
        (layer,) = self.layers
        columns = (layer.clients, layer.ranks, layer.client_shares, layer.client_norms)
        rows = [
            [str(client), str(rank), f"{share:.4f}", f"{norm:.4g}", f"{cosine:+.3f}"]
            for client, rank, share, norm, cosine in zip(
                *columns, layer.client_cosines, strict=True
            )
        ]
        return ["client", "rank", "share", "norm", "cosine to result"], rows

    def __repr__(self) -> str:
        """One line."""
        ranks = sorted({layer.rank for layer in self.layers})
        return (
            f"Report({len(self.layers)} layer{'s' * (len(self.layers) != 1)}, rank "
            f"{'/'.join(map(str, ranks))}, {self.relative_distance:.3g} from the exact mean, "
            f"{self.energy_kept:.1%} of the energy kept by truncation)"
        )

    def _repr_html_(self) -> str:
        parts = [html_table(*self._layer_table())]
        if len(self.layers) == 1:
            parts.append(html_table(*self._client_table()))
        return "".join(parts)


@dataclass(frozen=True)
class Row:
    """One method's line in a `Comparison`; ``skipped`` says why it has no numbers."""

    method: str
    rank: int | None = None
    relative_distance: float | None = None
    energy_kept: float | None = None
    nested: bool | None = None
    seconds: float | None = None
    skipped: str | None = None


@dataclass(frozen=True, repr=False)
class Comparison:
    """Several methods on the same updates, one `Row` each."""

    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Method -> its row as plain numbers."""
        names = [field.name for field in fields(Row) if field.name != "method"]
        return {row.method: {name: getattr(row, name) for name in names} for row in self.rows}

    def summary(self) -> str:
        """The table as text, and the reasons of the methods that were skipped."""
        skipped = [f"{row.method}: skipped, {row.skipped}" for row in self.rows if row.skipped]
        return "\n".join([text_table(*self._table()), FAR_ON_PURPOSE, *skipped])

    def _table(self) -> tuple[list[str], list[list[str]]]:
        head = ["method", "rank", "distance from exact mean", "kept by truncation", "nested", "ms"]
        rows = [
            [
                row.method,
                str(row.rank),
                f"{row.relative_distance:.3g}",
                f"{row.energy_kept:.4f}",
                "yes" if row.nested else "no",
                f"{1e3 * (row.seconds or 0):.1f}",
            ]
            for row in self.rows
            if row.skipped is None
        ]
        return head, rows

    def __repr__(self) -> str:
        """One line."""
        ran = [row for row in self.rows if row.skipped is None]
        listed = ", ".join(f"{row.method} {row.relative_distance:.3g}" for row in ran)
        more = f"; {len(self.rows) - len(ran)} skipped" if len(ran) < len(self.rows) else ""
        return f"Comparison(distance from the exact mean: {listed}{more})"

    def _repr_html_(self) -> str:
        skipped = "".join(
            f"<p><code>{escape(row.method)}</code> skipped: {escape(row.skipped)}</p>"
            for row in self.rows
            if row.skipped
        )
        return html_table(*self._table()) + skipped


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their width, first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)])


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as an HTML table, everything escaped."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _ranks(ranks: Sequence[int]) -> str:
    """All ranks if few, else their range."""
    if len(ranks) <= 8:
        return ",".join(map(str, ranks))
    return f"{min(ranks)}–{max(ranks)} ({len(ranks)} clients)"


def _ratio(distance: float, size: float) -> float:
    """Relative distance; a zero mean has no scale, so any distance from it is infinite."""
    if size > 0:
        return distance / size
    return 0.0 if distance == 0 else math.inf


def _plain(client: Hashable) -> int | float | str:
    return client if isinstance(client, (int, float, str)) else str(client)
