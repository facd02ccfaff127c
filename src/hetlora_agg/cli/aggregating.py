"""`hetlora-agg aggregate`: clients' adapter folders in, the global one and theirs out."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from hetlora_agg import InputValueError, resolve
from hetlora_agg.adapters import Adapter, aggregate_adapters
from hetlora_agg.cli.adapters import Bar, add_folders, emit, integers, rank, read_all, table


def add_aggregate(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    add_folders(parser)
    add = parser.add_argument
    add("-o", "--out", type=Path, required=True, metavar="DIR", help="the global adapter's folder")
    add("--method", default="rb", help="see hetlora-agg methods")
    add("--rank", type=rank, help="of the global adapter, or full; default the method's")
    add(
        "--per-client-out", type=Path, metavar="DIR", help="write every client's next adapter there"
    )
    add("--client-ranks", type=integers, metavar="R,R,…", help="ranks the clients want back")
    add("--dora", default="error", help="DoRA adapters: error, or mean of their magnitudes")
    add("--memory-limit", type=float, metavar="BYTES", help="for the arithmetic, such as 2e9")
    add("--workers", type=int, help="layers decomposed at a time")
    add("--dry-run", action="store_true", help="check and say what would be done; write nothing")
    add("--force", action="store_true", help="replace adapters that are there")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_aggregate)


def _aggregate(arguments: argparse.Namespace) -> None:
    """Aggregate folders into a folder."""
    if arguments.client_ranks is not None and arguments.per_client_out is None:
        raise InputValueError("--client-ranks: has no effect without --per-client-out; add it")
    adapters = read_all(arguments.folders)
    if arguments.dry_run:
        plan = _plan(adapters, arguments)
        emit(plan, lambda: _plan_text(plan), arguments.json)
        return
    for target in filter(None, (arguments.out, arguments.per_client_out)):
        if os.path.lexists(target) and not arguments.force:
            raise InputValueError(f"{target}: is there already; choose another or add --force")
    folders = dict(zip(adapters, arguments.folders, strict=True))
    result = aggregate_adapters(
        folders,
        arguments.weights,
        arguments.method,
        ranks=arguments.client_ranks,
        missing=arguments.missing,
        dora=arguments.dora,
        progress=Bar(arguments.method),
        **_options(arguments),
    )
    written = [result.write(arguments.out, force=arguments.force)]
    if arguments.per_client_out is not None:
        written += result.write_clients(arguments.per_client_out, force=arguments.force)
    emit(
        result.to_dict() | {"written": [str(path) for path in written]},
        result.summary,
        arguments.json,
    )
    for path in written:
        print(f"wrote {path}", file=sys.stderr)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The method's options and those of the arithmetic, as far as they were given."""
    options = dict(arguments.option)
    for name in ("rank", "memory_limit", "workers"):
        value = getattr(arguments, name)
        if value is not None:
            options[name] = int(value) if name == "memory_limit" else value
    return options


def _plan(adapters: dict[str, Adapter], arguments: argparse.Namespace) -> dict[str, Any]:
    """What would be done, from headers alone."""
    entry = resolve(arguments.method)
    layers = dict.fromkeys(layer for adapter in adapters.values() for layer in adapter.layers)
    rows = []
    for layer in layers:
        own = {id: a for id, a in adapters.items() if layer in a.layers}
        sizes = {a.layers[layer].size for a in own.values()}
        lacking = [id for id in adapters if id not in own]
        if len(sizes) > 1:
            raise InputValueError(
                f"layer {layer!r}: expected one size on all clients, got {sorted(sizes)}; adapters "
                "of different base models cannot be aggregated"
            )
        if lacking and arguments.missing == "error":
            raise InputValueError(
                f"layer {layer!r}: client {lacking[0]!r} lacks it; say what that means with "
                "--missing zero or --missing renormalise"
            )
        rows.append(
            {
                "layer": layer,
                "size": list(sizes.pop()),
                "ranks": {id: a.rank(layer) for id, a in own.items()},
                "scalings": {id: a.scaling(layer) for id, a in own.items()},
                "lacking": lacking,
            }
        )
    targets = [p for p in (arguments.out, arguments.per_client_out) if p is not None]
    return {
        "method": entry.name,
        "clients": list(adapters),
        "layers": rows,
        "would_write": [str(path) for path in targets],
        "there_already": [str(path) for path in targets if os.path.lexists(path)],
    }


def _plan_text(plan: dict[str, Any]) -> str:
    rows = [
        [
            row["layer"],
            "x".join(map(str, row["size"])),
            ", ".join(map(str, row["ranks"].values())),
            ", ".join(f"{s:g}" for s in row["scalings"].values()),
        ]
        for row in plan["layers"]
    ]
    lines = [table(["layer", "out x in", "ranks", "scalings"], rows)]
    lines.append(f"{plan['method']} over {', '.join(plan['clients'])}")
    lines += [f"would write {path}" for path in plan["would_write"]]
    lines += [f"{path} is there already: needs --force" for path in plan["there_already"]]
    return "\n".join(lines)
