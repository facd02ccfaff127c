"""A million clients of a 70B model, from what was measured: the tables of ``docs/scaling.md``.

Nothing here was run at that size. Every function takes measured rates out of the committed results
and given numbers out of `GIVEN`, and its formula stands in the page beside the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from benchmarks.report import load, markdown
from benchmarks.streaming_clients import Model

LAYERS = 80

ATTENTION = ((8192, 8192), (1024, 8192))
"""(out, in) of q and v in a 70B model: hidden size 8192, eight key and value heads of 128."""

LINEAR = (*ATTENTION, (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672))
"""The same with k, o, gate, up and down."""

LARGE = {
    "q and v": Model("70B, q and v", ATTENTION * LAYERS, 1_000_000),
    "all linear layers": Model("70B, all linear layers", LINEAR * LAYERS, 1_000_000),
}


@dataclass(frozen=True)
class Given:
    """What is assumed and not measured.

    Attributes:
        seconds: of a round.
        number: bytes of an entry on the way up: bfloat16.
        link: bytes a second of a machine's network, 10 Gbit/s.
        cores: of a machine.
        memory: bytes of a machine.
        between: seconds between two failures of one machine, 1,000 hours.
        kept: rank of a truncated state, four times the largest client's.
    """

    seconds: float = 3600.0
    number: int = 2
    link: float = 10e9 / 8
    cores: int = 32
    memory: float = 256e9
    between: float = 1000 * 3600.0
    kept: int = 256


GIVEN = Given()


@dataclass(frozen=True)
class Measured:
    """Rates of one core, and what a state needs beside itself.

    Attributes:
        adding: products: operations a second in `add`, everything that `add` does included.
        factors: entries a second in `add` of a sum of factors.
        result: seconds per ``min(out, in)² max(out, in)`` of a full-rank sum's decomposition.
        room: peak memory over the state, at the moment when kept clients become sums.
        saving: seconds per byte of a checkpoint.
        loading: the same of reading it.
        receipt: bytes of a client's receipt in memory.
        receipt_file: the same in a checkpoint.
        passing: bytes per client while a result is computed, and
        asking: seconds of it per client: everybody's shares.
        merging: seconds per byte of a state and hop in `distributed.merge`.
        reducing: seconds per byte of a state in `distributed.result`.
    """

    adding: float
    factors: float
    result: float
    room: float
    saving: float
    loading: float
    receipt: float
    receipt_file: float
    passing: float
    asking: float
    merging: float
    reducing: float

    @classmethod
    def read(cls) -> Measured:
        """From the committed results; of the largest model and state that were measured."""
        found = load("streaming")["results"]
        streams = {row["method"]: row for row in found["clients"] if "Llama" in row["model"]}
        sizes = found["models"][streams["flora"]["model"]]
        model = Model(sizes["what"], tuple(map(tuple, sizes["sizes"])), 0, tuple(sizes["ranks"]))
        seconds = {
            name: row["points"][-1]["seconds"] / row["points"][-1]["clients"]
            for name, row in streams.items()
        }
        square, layers, receipt = found["decomposition"][-1], found["layers"][-1], found["receipts"]
        checkpoint = layers["checkpoint"]
        large = max(load("distributed")["results"]["jobs"], key=_state_of_job)
        run, state = large["runs"][-1], _state_of_job(large)
        steps, hops = run["summary"]["steps"], log2(run["processes"]) + 1
        return cls(
            adding=model.flops / seconds["flora"],
            factors=model.numbers / seconds["rbla"],
            result=square["seconds"] / square["size"] ** 3,
            room=(layers["peak"] - layers["resting"]) / layers["state"],
            saving=checkpoint["save"]["wall"] / checkpoint["bytes"],
            loading=checkpoint["load"]["wall"] / checkpoint["bytes"],
            receipt=receipt["memory"],
            receipt_file=receipt["file"],
            passing=receipt["result"]["memory"],
            asking=receipt["result"]["seconds"],
            merging=steps["merge"]["wall"] / hops / state,
            reducing=steps["result"]["wall"] / state,
        )


def _state_of_job(job: Mapping[str, Any]) -> int:
    """Bytes of one process's state; none where layers are shared out."""
    size: int = job["runs"][-1]["each"][0].get("state", 0)
    return size


def million_client() -> str:
    """What one client costs."""
    m = Measured.read()
    rows = [
        [
            name,
            f"{model.numbers / 1e6:.0f} million",
            f"{GIVEN.number * model.numbers / 1e6:.0f} MB",
            f"{GIVEN.number * model.numbers / GIVEN.link:.2f} s",
            f"{model.flops / 1e12:.2f} Tflop",
            f"{model.flops / m.adding:.1f} s",
            f"{model.numbers / m.factors:.2f} s",
        ]
        for name, model in LARGE.items()
    ]
    head = ["adapted", "entries", "up, bfloat16", "at 10 Gbit/s", "products"]
    return markdown([*head, "core seconds, products", "core seconds, factors"], rows)


def million_state() -> str:
    """What the state takes."""
    m = Measured.read()
    rows = []
    for name, model in LARGE.items():
        factors = state_of(model, "factors")
        rows.append(
            [
                name,
                f"{model.dense_bytes / 1e9:.0f} GB",
                f"{m.room * model.dense_bytes / 1e9:.0f} GB",
                f"{2 * GIVEN.kept / max(model.ranks) * factors / 1e9:.1f} GB",
                f"{factors / 1e9:.1f} GB",
                f"{m.receipt * model.clients / 1e9:.2f} GB",
                f"{m.receipt_file * model.clients / 1e9:.2f} GB",
                f"{m.passing * model.clients / 1e9:.1f} GB",
            ]
        )
    head = ["adapted", "sums of products", "peak", f"truncated at rank {GIVEN.kept}"]
    head += ["sums of factors", "receipts in memory", "receipts on disk", "shares, in a `result`"]
    return markdown(head, rows)


def needs(model: Model, m: Measured, what: str) -> dict[str, float]:
    """Machines by network, by cores and by memory for one round of sums.

    Args:
        model: with its clients.
        m: rates.
        what: "products" or "factors".
    """
    products = what == "products"
    client = model.flops / m.adding if products else model.numbers / m.factors
    # Factors have no more rows than the largest client: what is decomposed is small.
    result = m.result * sum(min(s) ** 2 * max(s) for s in model.sizes) if products else 0.0
    adding, sent = model.clients * client, model.clients * GIVEN.number * model.numbers
    return {
        "bytes": sent,
        "adding": adding,
        "result": result,
        "network": sent / GIVEN.link / GIVEN.seconds,
        "cores": (adding + result) / GIVEN.seconds / GIVEN.cores,
        "memory": m.room * state_of(model, what) / GIVEN.memory,
    }


def state_of(model: Model, what: str) -> float:
    """Bytes of the sums."""
    if what == "products":
        return model.dense_bytes
    return 8 * max(model.ranks) * sum(out + columns for out, columns in model.sizes)


def machines(need: dict[str, float]) -> int:
    """As many as the scarcest of the three takes."""
    return max(ceil(need[key]) for key in ("network", "cores", "memory"))


def million_machines() -> str:
    """How many machines a round of an hour takes."""
    m = Measured.read()
    rows = []
    for name, model in LARGE.items():
        for what in ("products", "factors"):
            need = needs(model, m, what)
            rows.append(
                [
                    f"{name}, {what}",
                    f"{need['bytes'] / 1e12:.0f} TB",
                    f"{need['adding'] / 3600:,.0f} core hours",
                    f"{need['result'] / 3600:,.1f} core hours" if need["result"] else "–",
                    *(f"{need[key]:,.1f}" for key in ("network", "cores", "memory")),
                    f"**{machines(need):,}**",
                ]
            )
    head = ["adapted, sums of", "up", "adding", "`result`", "by network", "by cores", "by memory"]
    return markdown([*head, "machines"], rows)


def million_tree() -> str:
    """Regional servers: what crosses between them at the end of a round."""
    m, rows = Measured.read(), []
    model = LARGE["q and v"]
    state = model.dense_bytes + m.receipt_file * model.clients
    for servers in (4, 16, 64, 256):
        # Up the tree, and from its root to everybody.
        hops = ceil(log2(servers)) + 1
        once = state * (servers - 1) / servers
        spent = (hops * state / GIVEN.link, hops * state * m.merging)
        spent += (once / GIVEN.link, once * m.reducing)
        row = [str(servers), f"{model.clients // servers:,}", str(hops)]
        rows.append([*row, f"{state / 1e9:.0f} GB", *(f"{x / 60:.1f} min" for x in spent)])
    head = ["servers", "clients each", "hops", "bytes a hop", "`merge`, network"]
    head += ["`merge`, at the rate measured", "`result`, network"]
    return markdown([*head, "`result`, at the rate measured"], rows)


def million_failures() -> str:
    """How often to save, and what a dead process costs."""
    m, rows = Measured.read(), []
    for name, model in LARGE.items():
        count = machines(needs(model, m, "products"))
        for how, share in (("layers shared out", count), ("clients shared out", 1)):
            state = model.dense_bytes / share + m.receipt_file * model.clients
            fits = m.room * state <= GIVEN.memory
            save = m.saving * state
            every = (2 * save * GIVEN.between / count) ** 0.5
            times = [f"{save:.0f} s", f"{every / 60:.0f} min", f"{100 * save / every:.1f} %"]
            times += [f"{m.loading * state:.0f} s"]
            rows.append(
                [
                    f"{name}, {how}",
                    f"{count:,}",
                    f"{state / 1e9:.1f} GB",
                    *(times if fits else ["does not fit", "–", "–", "–"]),
                    f"{count * GIVEN.seconds / GIVEN.between:.2f}",
                ]
            )
    head = ["adapted", "machines", "state of each", "save", "save every", "of the time", "load"]
    return markdown([*head, "failures expected in a round"], rows)


def million_given() -> str:
    """What was measured and what is assumed, in one paragraph."""
    m = Measured.read()
    found: dict[str, Any] = load("streaming")["results"]
    return (
        f"Measured, per core: {m.adding / 1e9:.1f} GFLOP/s in `add` of products (the bare float64 "
        f"matrix product runs at {found['product']['gflops']:.1f}), {m.factors / 1e6:.0f} million "
        f"entries a second in `add` of factors, {m.result * 1e12:.0f} ps × min(out, in)² max(out, "
        f"in) for a `result`, peak {m.room:.2f} × state, {1 / m.saving / 1e9:.2f} GB/s saving and "
        f"{1 / m.loading / 1e9:.2f} GB/s loading, {m.receipt:.0f} bytes of memory for a receipt. "
        f"Assumed: a round of {GIVEN.seconds / 3600:.0f} hour; machines of {GIVEN.cores} cores, "
        f"{GIVEN.memory / 1e9:.0f} GB and {8 * GIVEN.link / 1e9:.0f} Gbit/s, each failing once in "
        f"{GIVEN.between / 3600:,.0f} hours; all cores together as fast as each alone."
    )


TABLES = {
    table.__name__: table
    for table in (
        million_given,
        million_client,
        million_state,
        million_machines,
        million_tree,
        million_failures,
    )
}
"""Name in a page's comment -> what stands there."""
