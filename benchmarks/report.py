"""What ``docs/performance.md`` shows of the driver benchmark, as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.timing import PEERS, RESULTS
from benchmarks.workloads import QUICK

EQUAL = 1e-7
"""Excess error up to which a peer's answer counts as exact: the target of float32."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def load(*names: str) -> dict[str, Any]:
    """The first of these records that there is."""
    for name in names:
        path = RESULTS / f"{name}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
    raise FileNotFoundError(f"none of {names} in {RESULTS}; run `make bench-full`")


def drivers_record() -> dict[str, Any]:
    """The full run of the driver benchmark; the quick one where there is none."""
    return load("drivers", "drivers-quick")


def ran_on(machine: Mapping[str, Any]) -> str:
    """Machine, versions and commit in one line."""
    versions = [f"{p} {machine[p] or 'not installed'}" for p in PEERS if p in machine]
    return (
        f"{machine['processor']}, threads: {machine['threads']}, torch {machine['torch']}, "
        f"{', '.join(versions)}, commit {machine['commit']}"
    )


def machine() -> str:
    """What the driver benchmark ran on, and how much of it was run."""
    record = drivers_record()
    mode = record["results"]["mode"]
    text = (
        f"{ran_on(record['machine'])}. A {mode['name']} run: at most {mode['turns']} turns each, "
        f"peers that need more than {mode['limit']:g} s a call left out."
    )
    if left_out := record["results"].get("left_out"):
        text += f" Not measured in this run, for lack of time: {', '.join(left_out)}."
    if mode["name"] == "trial":
        text += " **Placeholders: a trial only shows that everything runs.**"
    return text


def targets() -> str:
    """Every target, measured, and which are missed."""
    found = drivers_record()["results"]["targets"]
    rows = [[t["name"], t["target"], _number(t["measured"]), _verdict(t)] for t in found]
    return f"{_missed(found)}\n\n{markdown(['what', 'target', 'measured', 'met'], rows)}"


def _missed(found: Sequence[Mapping[str, Any]]) -> str:
    """The sentences above the table of targets."""
    missed = [
        f"{t['name']} ({_number(t['measured'])}, target {t['target']})"
        for t in found
        if t["measured"] is not None and not t["met"]
    ]
    absent = [t["name"] for t in found if t["measured"] is None]
    text = f"Missed: {'; '.join(missed)}." if missed else "No target that was measured is missed."
    return text + (f" Not measured in this run: {'; '.join(absent)}." if absent else "")


def _verdict(target: Mapping[str, Any]) -> str:
    if target["measured"] is None:
        return "–"
    return "yes" if target["met"] else "**no**"


def _number(x: float | None) -> str:
    """Three digits; powers of ten below a hundredth."""
    if x is None:
        return "–"
    return f"{x:.1e}" if abs(x) < 0.01 else f"{x:.3g}"


def drivers() -> str:
    """Ours and the QR loop on every workload."""
    rows = []
    for row in drivers_record()["results"]["workloads"]:
        ours, loop = (row["contenders"][name] for name in ("ours", "QR loop"))
        shape = f"{row['layers']} × {row['out']}×{row['in']}, R = {row['R']}, r = {row['rank']}"
        bits = row["dtype"].removeprefix("float")
        rows.append(
            [row["workload"], shape, bits, row["driver"], f"{row['LB_ms']:.2f}"]
            + [f"{c['times_LB']:.1f} ({c['spread']:.1f})" for c in (ours, loop)]
            + [f"{loop['against_ours']:.1f}×", _tiny(ours["excess"]), _tiny(ours["sigma_error"])]
            + [_tiny(loop["excess"]), _megabytes(ours["peak_bytes"]), _number(row["memory_ratio"])]
        )
    head = ["workload", "size", "bits", "auto picks", "LB ms", "ours / LB", "QR loop / LB"]
    head += [
        "QR loop / ours",
        "excess",
        "σ error",
        "excess of QR loop",
        "peak MB",
        "measured / predicted",
    ]
    return markdown(head, rows)


def summary() -> str:
    """The QR loop against ours over all float32 workloads, and who else is faster than ours."""
    results = drivers_record()["results"]
    s = results["summary"]
    text = (
        f"Over the {s['workloads']} float32 workloads the QR loop takes {s['geomean']:.2f} times "
        f"as long as ours in the geometric mean, and {s['minimum']:.2f} times on the worst one."
    )
    faster: dict[str, list[str]] = {}
    for row in results["workloads"]:
        for name, found in row["contenders"].items():
            close = (found.get("excess") or 0.0) <= EQUAL and found.get("rank") == row["rank"]
            if not name.startswith("ours") and close and found["against_ours"] < 1:
                where = f"{row['workload']} {row['dtype']} ({found['against_ours']:.2f})"
                faster.setdefault(name, []).append(where)
    if not faster:
        return f"{text} Nobody with an excess error up to {EQUAL:.0e} is faster anywhere."
    named = "; ".join(f"`{name}` on {', '.join(where)}" for name, where in faster.items())
    return f"{text} Faster than ours with an excess error up to {EQUAL:.0e}: {named}."


def contenders() -> str:
    """What each contender is and how it was called."""
    notes = drivers_record()["results"]["contenders"]
    return markdown(["name", "what it is"], [[f"`{name}`", note] for name, note in notes.items()])


def _grid(cell: Callable[[Mapping[str, Any]], str]) -> str:
    """Contenders by the quick float32 workloads."""
    results, names = drivers_record()["results"], [w.name for w in QUICK]
    single = [r for r in results["workloads"] if r["dtype"] == "float32"]
    found = {r["workload"]: r["contenders"] for r in single if r["workload"] in names}
    rows = []
    for contender in results["contenders"]:
        here = [by_name[contender] for by_name in found.values()]
        rows.append([f"`{contender}`", *(cell(x) if "times_LB" in x else "–" for x in here)])
    return markdown(["", *found], rows)


def peers_time() -> str:
    """Everyone's time over ours."""
    return _grid(lambda found: f"{found['against_ours']:.3g}")


def peers_excess() -> str:
    """Everyone's excess error."""
    return _grid(lambda found: "rank R" if found["excess"] is None else _tiny(found["excess"]))


def peers_memory() -> str:
    """Everyone's peak memory in MB."""
    return _grid(lambda found: _megabytes(found["peak_bytes"]))


def skipped() -> str:
    """Who was not run where, and why."""
    why: dict[str, dict[str, list[str]]] = {}
    for row in drivers_record()["results"]["workloads"]:
        label = row["workload"] + (" (float64)" if row["dtype"] == "float64" else "")
        for name, found in row["contenders"].items():
            if "skipped" in found:
                reason = re.sub(r"^skipped: (an estimated \S+ s against)?", "", found["skipped"])
                reason = reason.replace(" a limit of", "by estimate slower than")
                why.setdefault(name, {}).setdefault(reason, []).append(label)
    lines = [
        f"* `{name}`: " + "; ".join(f"{r}: {', '.join(where)}" for r, where in reasons.items())
        for name, reasons in why.items()
    ]
    return "\n".join(lines) or "Everyone was run everywhere."


def _tiny(x: float | None) -> str:
    """An error; what is under float64's own rounding says so."""
    if x is None:
        return "–"
    return f"{x:.0e}" if x > 1e-16 else "< 1e-16"


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.3g}"


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        machine,
        targets,
        drivers,
        summary,
        contenders,
        peers_time,
        peers_excess,
        peers_memory,
        skipped,
    )
}
"""Name in a page's comment -> what stands there."""
