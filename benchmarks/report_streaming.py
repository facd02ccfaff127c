"""What ``docs/streaming.md`` shows of the streaming benchmark, as Markdown."""

from __future__ import annotations

from benchmarks.report import load, markdown, ran_on


def streaming_clients() -> str:
    """Throughput, growth, memory and error of whole streams."""
    found = load("streaming")
    models = found["results"]["models"]
    rows = []
    for row in found["results"]["clients"]:
        last = row["points"][-1]
        few, many = sorted(row["peak"], key=int)
        peaks = [f"{row['peak'][n]['peak'] / 1e6:.0f}" for n in (few, many)]
        rows.append(
            [
                f"{row['model']} ({models[row['model']]['what']})",
                f"`{row['method']}`",
                f"{last['clients']:,}",
                f"{last['clients'] / last['seconds']:.0f}",
                f"{row['fit']['exponent']:.2f}",
                f"{last['state'] / 1e6:.0f}",
                f"{peaks[0]} → {peaks[1]} ({row['growth']['peak']:.2f}×)",
                f"{row['error']:.0e}",
                f"{row['result_seconds']:.2f}",
            ]
        )
    head = ["model", "method", "clients", "clients/s", "time ∝ clients^"]
    head += ["state, MB", "peak of the process at 100 and at all, MB", "error / S", "`result`, s"]
    return f"{markdown(head, rows)}\n\nRun on {ran_on(found['machine'])}."


def streaming_products() -> str:
    """Adding buffered clients next to the bare matrix product."""
    rows = [
        [
            name,
            "×".join(map(str, row["shape"][:3])) + f", {row['shape'][3]} components",
            f"{row['gflops']['product']:.1f}",
            f"{row['gflops']['added']:.1f}",
            f"{100 * row['rate']:.0f} %",
        ]
        for name, row in load("streaming")["results"]["products"].items()
    ]
    head = ["model", "layers × out × in", "bare product, GFLOP/s", "added, GFLOP/s", "rate"]
    return markdown(head, rows)


TABLES = {
    "streaming-clients": streaming_clients,
    "streaming-products": streaming_products,
}
