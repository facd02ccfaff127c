"""The table of adapters from disk to disk, from ``results/adapters.json``."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.report import load, markdown


def adapters() -> str:
    """One line per method: seconds to aggregate and to write, peak memory."""
    record = load("adapters")
    results, rows = record["results"], []
    for name, run in results["methods"].items():
        back = run["write_clients_seconds"]
        rows.append(
            [
                f"`{name}`",
                f"{run['aggregate_seconds']:.1f} s",
                f"{run['write_seconds']:.2f} s",
                "–" if back is None else f"{back:.1f} s",
                f"{run['peak_bytes'] / 1e9:.2f} GB",
            ]
        )
    caption = (
        f"{len(results['ranks'])} adapters of {results['model']} ({results['layers']} layers), "
        f"ranks {', '.join(map(str, results['ranks']))}, {results['dtype']}, "
        f"{results['input_bytes'] / 1e6:.0f} MB on disk, {record['machine']['threads']} threads, "
        f"commit {record['machine']['commit']}. Peak is of the whole process, torch included; the "
        f"target is {results['peak_target_bytes'] / 1e9:.0f} GB."
    )
    head = ["method", "read and aggregate", "write the global one", "write all clients'", "peak"]
    return f"{caption}\n\n{markdown(head, rows)}"


TABLES: dict[str, Callable[[], str]] = {"adapters": adapters}
