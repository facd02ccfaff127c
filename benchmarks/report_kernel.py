"""What ``docs/performance.md`` shows of the scaling and kernel benchmarks, as Markdown."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.report import load, markdown, ran_on


def scaling() -> str:
    """Fitted exponents, and over which range."""
    record = load("scaling")
    rows = [
        [
            name,
            sweep["fixed"],
            contender,
            f"{fit['exponent']:.2f}",
            f"≤ {sweep['most']}",
            f"{fit['from']:.0f} – {fit['to']:.0f}, {fit['points']} points",
            f"{fit['worst']:.2f}×",
        ]
        for name, sweep in record["results"]["sweeps"].items()
        for contender, fit in sweep["fits"].items()
    ]
    head = [
        "over",
        "fixed",
        "who",
        "exponent",
        "target",
        "fitted over",
        "farthest point off the line",
    ]
    mode = f"A {record['results']['mode']} run on {ran_on(record['machine'])}."
    return f"{markdown(head, rows)}\n\n{mode}"


def crossover() -> str:
    """Milliseconds per layer of the three drivers over R and the shape; in bold, the one chosen."""
    rows = []
    for r in load("kernel")["results"]["crossover"]:
        size = f"{r['R'] * (r['out'] + r['in']) / (r['out'] * r['in']):.2f}"
        times = [f"**{t:.2f}**" if d == r["chosen"] else f"{t:.2f}" for d, t in r["ms"].items()]
        rows.append([f"{r['out']}×{r['in']}", str(r["R"]), size, *times])
    return markdown(["W", "R", "factors / W", "gram ms", "qr ms", "dense ms"], rows)


def workspace() -> str:
    """Milliseconds per layer over the size of a chunk's working copies."""
    rows = load("kernel")["results"]["workspace"]
    head = ["size", *(f"{int(size) >> 20} MiB" for size in rows[0]["ms"])]
    cells = [
        [f"{r['out']}×{r['in']}, R = {r['R']}", *(f"{t:.1f} ms" for t in r["ms"].values())]
        for r in rows
    ]
    return markdown(head, cells)


def blocks() -> str:
    """Milliseconds of a Gram matrix over its block width and cast size."""
    rows = load("kernel")["results"]["blocks"]

    def label(choice: str) -> str:
        name, value = choice.split()
        if name == "cast":
            return f"cast {int(value) >> 20} MiB"
        return "one block" if int(value) > 10**5 else f"blocks of {value}"

    head = ["Gram matrix of", *(label(choice) for choice in rows[0]["ms"])]
    cells = [[f"{r['length']}×{r['R']}", *(f"{t:.2f} ms" for t in r["ms"].values())] for r in rows]
    return markdown(head, cells)


def sampling() -> str:
    """Milliseconds of the sampled and the exact driver over the share of directions sampled."""
    rows = [
        [
            f"{row['out']}×{row['in']}, R = {row['R']}",
            str(row["rank"]),
            f"1 / {1 / row['share']:.3g}",
        ]
        + [f"{t:.2f} ms" for t in row["ms"].values()]
        for row in load("kernel")["results"]["sampling"]
    ]
    return markdown(["size", "r", "sampled", "exact", "sampling"], rows)


def threads() -> str:
    """Milliseconds of one eigendecomposition on one thread and on all."""
    rows = load("kernel")["results"]["threads"]
    head = ["R", *(f"{n} threads" if n != "1" else "1 thread" for n in rows[0]["ms"])]
    return markdown(head, [[str(r["R"]), *(f"{t:.2f} ms" for t in r["ms"].values())] for r in rows])


def workers() -> str:
    """Milliseconds of a batch over the number of workers."""
    rows = load("kernel")["results"]["workers"]
    counts = [f"{n} workers" if n != "1" else "1 worker" for n in rows[0]["ms"]]
    cells = [
        [r["workload"], f"{r['multiply_adds']:.1e}", *(f"{t:.2f} ms" for t in r["ms"].values())]
        for r in rows
    ]
    return markdown(["workload", "multiply-adds", *counts], cells)


def parts() -> str:
    """What the Gram driver cannot do without, in LB, next to what it takes as a whole."""
    whole = {
        row["workload"]: row["contenders"]["ours"]["times_LB"]
        for row in load("drivers")["results"]["workloads"]
        if row["dtype"] == "float32"
    }
    rows = load("kernel")["results"]["parts"]
    head = ["workload", *rows[0]["times_LB"], "together", "whole call"]
    cells = []
    for row in rows:
        found = [*row["times_LB"].values()]
        numbers = (*found, sum(found), whole[row["workload"]])
        cells.append([row["workload"], *(f"{t:.2f}" for t in numbers)])
    return markdown(head, cells)


def kernel_machine() -> str:
    """What the constants were measured on."""
    return f"{ran_on(load('kernel')['machine'])}."


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        scaling,
        crossover,
        workspace,
        blocks,
        sampling,
        threads,
        workers,
        parts,
        kernel_machine,
    )
}
"""Name in a page's comment -> what stands there."""
