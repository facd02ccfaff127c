"""What ``docs/performance-streaming.md`` shows of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.report import load, markdown, ran_on


def streaming_clients() -> str:
    """Throughput, growth, memory and error of whole streams."""
    found = load("streaming")
    models = found["results"]["models"]
    rows = []
    for row in found["results"]["clients"]:
        last = row["points"][-1]
        growth, error = row["growth"], row["error"]
        rows.append(
            [
                row["model"],
                f"`{row['method']}`",
                f"{1e3 * last['seconds'] / last['clients']:.1f}",
                f"{row['fit']['exponent']:.2f}",
                f"{last['state'] / 1e6:.0f}",
                f"{last['peak'] / 1e6:.0f}",
                f"{growth['peak']:.2f}× ({growth['above']:.2f}×)",
                f"{error['watched']:.0e} ({error['bound']:.0e})" if error else "–",
                f"{last['result']:.2f}" if "result" in last else "–",
            ]
        )
    head = ["model", "method", "ms a client", "time ∝ clients^", "state, MB", "peak, MB"]
    head += ["peak over that of 100 clients (without Python and torch)", "error / S (bound)"]
    head += ["`result`, s"]
    most = found["results"]["targets"]["growth"]
    missed = [
        f"`{row['method']}` on {row['model']}"
        for row in found["results"]["clients"]
        if row["growth"]["peak"] > most
    ]
    verdict = f"**missed** by {', '.join(missed)}" if missed else "met"
    what = "; ".join(f"{name}: {model['what']}" for name, model in models.items())
    last = found["results"]["clients"][0]["points"][-1]["clients"]
    return (
        f"{last:,} clients of ranks 4 to 64, float32. {what}. Processor time of one thread; peak "
        f"of the whole process, `result` included; target ≤ {most}× that of 100 clients: {verdict}."
        f"\n\n{markdown(head, rows)}\n\n"
        f"Run on {ran_on(found['machine'])}."
    )


def streaming_llama() -> str:
    """Ten thousand clients of a whole large model, by how many have come."""
    record = load("llama")
    model, streams = record["results"]["model"], record["results"]["clients"]
    marks = [p["clients"] for p in streams[0]["points"] if p["clients"] >= 100]
    rows = [
        [f"{n:,}", *(cell for row in streams for cell in _so_far(row["points"], n))] for n in marks
    ]
    head = ["clients"]
    for row in streams:
        head += [f"`{row['method']}`: ms a client", "state, GB", "peak of the process, GB"]
    ends = []
    for row in streams:
        kept, error = row["checkpoint"], row["error"]
        ends.append(
            f"`{row['method']}`: error / S "
            f"{error['watched']:.0e} (bound {error['bound']:.0e}), checkpoint of "
            f"{kept['bytes'] / 1e9:.2f} GB saved in {kept['save']['wall']:.1f} s and loaded in "
            f"{kept['load']['wall']:.1f} s"
        )
    mean = sum(model["ranks"]) / len(model["ranks"])
    least, most = min(model["ranks"]), max(model["ranks"])
    return (
        f"{model['clients']:,} clients of ranks {least} to {most}, half of them {least}, "
        f"{mean:.0f} on average, float32; {model['what']}.\n\n"
        f"{markdown(head, rows)}\n\n{'. '.join(ends)}.\n\nRun on {ran_on(record['machine'])}."
    )


def _so_far(points: Sequence[Mapping[str, Any]], clients: int) -> list[str]:
    """Time, state and peak when so many had come."""
    point = next(p for p in points if p["clients"] == clients)
    times = f"{1e3 * point['seconds'] / clients:.0f}"
    return [times, *(f"{point[key] / 1e9:.2f}" for key in ("state", "peak"))]


def streaming_errors() -> str:
    """Streamed results next to those of one call on the same float64 clients."""
    found = load("streaming")["results"]
    rows, most = found["one_shot"], found["targets"]["error"]
    verdict = "met" if max(row["error"] for row in rows) <= most else "**missed**"
    methods = ", ".join(f"`{row['method']}` {row['error']:.0e}" for row in rows)
    peaks = [row["peak"] / 1e9 for row in rows]
    spent = [row["one_shot"] for row in rows]
    return (
        f"{rows[0]['clients']:,} clients of MiniLM in float64, distance over the norm of the "
        f"result: {methods}; target {most:.0e}, {verdict}."
        f" With all clients in memory the one call took {min(spent):.0f} to {max(spent):.0f} s and "
        f"a process of {min(peaks):.1f} to {max(peaks):.1f} GB."
    )


def streaming_products() -> str:
    """Adding buffered clients next to the bare matrix product."""
    found = load("streaming")["results"]
    rows = [
        [
            name,
            "×".join(map(str, row["shape"][:3])),
            f"{row['gflops']['added']:.1f}",
            f"{row['gflops']['same shape']:.1f}",
            f"{row['gflops']['machine']:.1f}",
            f"{100 * row['rate']['machine']:.0f} %",
            "yes" if row["rate"]["machine"] >= found["targets"]["rate"] else "**no**",
        ]
        for name, row in found["products"].items()
    ]
    head = ["model", "layers × out × in", "adding 64 components, GFLOP/s"]
    head += ["product of that shape", "large square product", "adding / large product"]
    return markdown([*head, f"≥ {100 * found['targets']['rate']:.0f} %"], rows)


def streaming_layers() -> str:
    """All layers of a large model."""
    found = load("streaming")["results"]
    rows = []
    for row in found["layers"]:
        kept = row["checkpoint"]
        rows.append(
            [
                str(row["layers"]),
                f"{row['seconds']:.1f}",
                f"{row['state'] / 1e9:.2f}",
                f"{(row['peak'] - row['resting']) / 1e9:.2f}",
                f"{kept['bytes'] / 1e9:.2f}",
                f"{kept['save']['wall']:.1f} ({kept['save']['processor']:.1f})",
                f"{kept['load']['wall']:.1f} ({kept['load']['processor']:.1f})",
            ]
        )
    head = ["layers", "`add` of 100 clients, s", "state, GB", "peak above the start, GB"]
    head += ["checkpoint, GB", "save, s (processor)", "load, s (processor)"]
    fit = found["layers_fit"]
    return (
        f"{markdown(head, rows)}\n\nTime grows with layers^{fit['exponent']:.2f}, farthest point "
        f"{fit['worst']:.2f}× off the line."
    )


def streaming_truncated() -> str:
    """Truncated states next to exact ones."""
    found = load("streaming")["results"]["truncated"]
    rows = []
    for row in found:
        small, exact = (row["state"][how] / 1e6 for how in ("truncated", "exact"))
        times = row["seconds"]["truncated"] / row["seconds"]["exact"]
        rows.append(
            f"rank {row['rank']}: {small:.0f} MB instead of {exact:.0f}, {times:.1f} × the time, "
            f"true error {row['error']:.2f} and bound {row['bound']:.2f} of the sum's norm"
        )
    return f"One layer of Llama-8B, {found[0]['clients']} clients. {'; '.join(rows)}."


def distributed_clients() -> str:
    """Clients shared out over processes."""
    steps = ("result", "merge")
    head = ["adding, processor s of the busiest", "adding, wall s"]
    head += [f"`{name}`, wall s (MB sent)" for name in steps]
    record = load("distributed")
    table = _shared_out(
        record,
        "clients",
        [*head, "result after `merge`, s"],
        1,
        lambda found: [
            *(_step(found[name]) for name in steps),
            f"{found['result of the merged']['wall']:.2f}",
        ],
    )
    return f"{table}\n\n{_machine(record)}"


def distributed_layers() -> str:
    """Layers shared out over processes."""
    head = ["processor s of the busiest", "wall s", "`gather`, s (MB sent)"]
    return _shared_out(
        load("distributed"), "layers", head, 2, lambda found: [_step(found["gather"])]
    )


def _shared_out(
    record: Mapping[str, Any],
    shared: str,
    head: Sequence[str],
    digits: int,
    steps: Callable[[Mapping[str, Any]], list[str]],
) -> str:
    """A row for each number of processes of each job: seconds, how many times less than one's."""
    rows = []
    for job in _jobs(record, shared):
        first = job["runs"][0]["summary"]
        for run in job["runs"]:
            one = run["summary"]
            spent = (
                f"{one[key]:.{digits}f} ({first[key] / one[key]:.2f}×)"
                for key in ("processor", "wall")
            )
            rows.append(
                [
                    f"{job['model']}, `{job['method']}`",
                    str(run["processes"]),
                    *spent,
                    *steps(one["steps"]),
                    f"{run['distance']:.0e}",
                ]
            )
    return markdown(["model", "processes", *head, "distance from one process"], rows)


def _jobs(record: Mapping[str, Any], shared: str) -> list[Any]:
    return [job for job in record["results"]["jobs"] if job["shared"] == shared]


def _step(step: Mapping[str, float]) -> str:
    return f"{step['wall']:.2f} ({step['bytes'] / 1e6:.0f})"


def _machine(record: Mapping[str, Any]) -> str:
    cores = record["results"]["cores"]
    return f"{cores} cores, one thread a process. Run on {ran_on(record['machine'])}."


TABLES = {
    table.__name__: table
    for table in (
        streaming_clients,
        streaming_llama,
        streaming_errors,
        streaming_products,
        streaming_layers,
        streaming_truncated,
        distributed_clients,
        distributed_layers,
    )
}
"""Name in a page's comment -> what stands there."""
