"""What the rows of the driver benchmark say about the targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

BOUNDS = (
    ("4096×4096, R = 936", (1, 4096, 4096, 936), 2.5),
    ("4096×4096, R = 120", (1, 4096, 4096, 120), 2.0),
    ("32 layers of 768×768, R = 192", (32, 768, 768, 192), 3.5),
    ("32 layers of 768×768, R = 48", (32, 768, 768, 48), 3.0),
)
"""Most multiples of LB, in float32."""

AGAINST_DENSE = (("R = 936", 936, 30.0), ("R = 120", 120, 1000.0))
"""Least ratio of one dense SVD per 4096×4096 layer to ours."""


def of(row: Row, contender: str, value: str) -> float | None:
    """A number of one contender's, None if it was not run or says nothing."""
    found: float | None = row["contenders"].get(contender, {}).get(value)
    return found


def ratios(rows: Iterable[Row], contender: str = "QR loop") -> list[float]:
    """Time of a contender over ours, for every float32 row that has it."""
    single = [row for row in rows if row["dtype"] == "float32"]
    return [x for row in single if (x := of(row, contender, "against_ours")) is not None]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Geometric mean and least of the QR loop's time over ours."""
    found = ratios(rows)
    mean = statistics.geometric_mean(found) if found else None
    least = min(found) if found else None
    return {"geomean": mean, "minimum": least, "workloads": len(found)}


def targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every target with what was measured and whether it is met.

    Returns:
        ``{"name", "target", "measured", "met"}``; measured is None, and met False, where the run
        has no row to read it off.
    """
    single = [row for row in rows if row["dtype"] == "float32"]
    double = [row for row in rows if row["dtype"] == "float64"]
    found = []
    for name, sizes, most in BOUNDS:
        measured = _only(single, sizes, "ours", "times_LB")
        found.append(
            _target(f"time in LB, {name}", f"≤ {most:g}", measured, lambda x, m=most: x <= m)
        )
    against = summary(rows)
    for name, key, least in (
        ("slowest workload against the QR loop", "minimum", 1.5),
        ("geometric mean against the QR loop", "geomean", 2.0),
    ):
        found.append(_target(name, f"≥ {least:g}×", against[key], lambda x, m=least: x >= m))
    for name, R, least in AGAINST_DENSE:
        measured = _only(single, (1, 4096, 4096, R), "dense SVD", "against_ours")
        label = f"against one dense SVD per 4096×4096 layer, {name}"
        found.append(_target(label, f"≥ {least:g}×", measured, lambda x, m=least: x >= m))
    for name, some, most in (("float32", single, 1e-7), ("float64", double, 1e-12)):
        excess = [x for row in some if (x := of(row, "ours", "excess")) is not None]
        label, worst = f"largest excess error, {name}", max(excess, default=None)
        found.append(_target(label, f"≤ {most:.0e}", worst, lambda x, m=most: x <= m))
    memory = [x for row in rows if (x := row.get("memory_ratio")) is not None]
    for name, goal, worst, good in (
        ("least", "≥ 0.7", min(memory, default=None), lambda x: x >= 0.7),
        ("largest", "≤ 1.0", max(memory, default=None), lambda x: x <= 1.0),
    ):
        found.append(_target(f"{name} measured / predicted memory", goal, worst, good))
    return found


def _target(
    name: str, target: str, measured: float | None, good: Callable[[float], bool]
) -> dict[str, Any]:
    met = measured is not None and good(measured)
    return {"name": name, "target": target, "measured": measured, "met": met}


def _only(
    rows: Sequence[Row], sizes: tuple[int, int, int, int], contender: str, value: str
) -> float | None:
    """The number of the one row of these layers, out, in and R."""
    for row in rows:
        if (row["layers"], row["out"], row["in"], row["R"]) == sizes:
            return of(row, contender, value)
    return None
