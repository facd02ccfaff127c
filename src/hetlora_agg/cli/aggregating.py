"""`hetlora-agg aggregate`: clients' adapter folders in, the global one and theirs out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from hetlora_agg import InputValueError, resolve
from hetlora_agg.adapters import Adapter
from hetlora_agg.adapters.calling import call_roll
from hetlora_agg.adapters.roll import headers_of
from hetlora_agg.cli.adapters import (
    Bar,
    add_missing,
    add_option,
    amount,
    emit,
    integers,
    rank,
    table,
)
from hetlora_agg.cli.gathering import add_clients, folders_of
from hetlora_agg.cli.targets import check_targets
from hetlora_agg.streaming import aggregate_folders
from hetlora_agg.streaming.folders import check_own

FLAGS = {
    "paths": "ADAPTER … or --from",
    "weights": "--weights",
    "method": "--method",
    "checkpoint": "--checkpoint",
    "every": "--checkpoint-every",
    "on_bad_folder": "--on-bad-folder",
    "on_duplicate": "--on-duplicate",
    "ranks": "--client-ranks",
    "missing": "--missing",
    "dora": "--dora",
    "progress": "a terminal, which has a bar,",
    "memory_limit": "--memory-limit",
}
"""What is no option of a method, and what says it on the command line."""

LIMITS = ("memory_limit", "max_rank", "on_bad_client")
"""Options of every method."""


def add_aggregate(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    add_clients(parser)
    add_missing(parser)
    add_option(parser, "an option of the method, VALUE as JSON or plain text; may be repeated")
    add = parser.add_argument
    add("-o", "--out", type=Path, required=True, metavar="DIR", help="the global adapter's folder")
    add("--method", default="rb", help="see hetlora-agg methods")
    add("--rank", type=rank, help="of the global adapter, or full; default the method's")
    add(
        "--per-client-out", type=Path, metavar="DIR", help="write every client's next adapter there"
    )
    add("--client-ranks", type=integers, metavar="R,R,…", help="ranks the clients want back")
    add("--dora", default="error", help="DoRA adapters: error, or mean of their magnitudes")
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="one client after the other; save there, and take up from there after an interruption",
    )
    add(
        "--checkpoint-every",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="between saves, at least; default 60",
    )
    add(
        "--on-bad-folder",
        default="error",
        help="a folder is not whole: error, or skip to name it and leave it out",
    )
    add(
        "--on-duplicate",
        default="error",
        help="a client came twice: error, skip to count it once, or keep under another name",
    )
    add(
        "--memory-limit",
        type=amount,
        metavar="BYTES",
        help="for the arithmetic, or for what is kept of the clients, such as 2e9",
    )
    add("--workers", type=int, help="layers decomposed at a time")
    add("--dry-run", action="store_true", help="check and say what would be done; write nothing")
    add("--force", action="store_true", help="replace adapters that are there")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_aggregate)


def _aggregate(arguments: argparse.Namespace) -> None:
    """Aggregate folders into a folder."""
    if arguments.client_ranks is not None and arguments.per_client_out is None:
        raise InputValueError("--client-ranks: has no effect without --per-client-out; add it")
    folders = folders_of(arguments)
    check_targets(arguments, folders)
    if arguments.dry_run:
        plan = _plan(folders, arguments)
        emit(plan, lambda: _plan_text(plan), arguments.json)
        return
    for target in filter(None, (arguments.out, arguments.per_client_out)):
        if os.path.lexists(target) and not arguments.force:
            raise InputValueError(f"{target}: is there already; choose another or add --force")
    bar = Bar(arguments.method)
    try:
        result = aggregate_folders(
            folders,
            arguments.weights,
            arguments.method,
            checkpoint=arguments.checkpoint,
            every=arguments.checkpoint_every,
            on_bad_folder=arguments.on_bad_folder,
            on_duplicate=arguments.on_duplicate,
            ranks=arguments.client_ranks,
            missing=arguments.missing,
            dora=arguments.dora,
            progress=bar,
            **_options(arguments),
        )
    finally:
        bar.close()
    # The clients' first: who cannot be given an adapter is found before anything is written.
    written = []
    if arguments.per_client_out is not None:
        written = result.write_clients(arguments.per_client_out, force=arguments.force)
    written.insert(0, result.write(arguments.out, force=arguments.force))
    if arguments.checkpoint is not None:
        # The next round would be another run.
        arguments.checkpoint.unlink(missing_ok=True)
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
    if odd := [name for name in options if name in FLAGS]:
        raise InputValueError(
            f"--option: {odd[0]!r} is no option of a method; use {FLAGS[odd[0]]} instead"
        )
    for name in ("rank", "memory_limit", "workers"):
        value = getattr(arguments, name)
        if value is not None:
            options[name] = value
    return options


def _plan(folders: list[Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """What would be done, from headers alone."""
    entry = resolve(arguments.method)
    check_own(entry, {k: v for k, v in _options(arguments).items() if k not in LIMITS})
    policies = (arguments.on_bad_folder, arguments.on_duplicate)
    ranks = arguments.client_ranks
    roll = call_roll(folders, arguments.weights, ranks, *policies, None)
    targets = [p for p in (arguments.out, arguments.per_client_out) if p is not None]
    return {
        "method": entry.name,
        "clients": list(roll),
        "layers": _plan_rows(headers_of(roll), arguments),
        "excluded": [list(pair) for pair in roll.excluded.items()],
        "notes": roll.notes,
        "would_write": [str(path) for path in targets],
        "there_already": [str(path) for path in targets if os.path.lexists(path)],
    }


def _plan_rows(
    adapters: Mapping[Hashable, Adapter], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Layer by layer: its size, and every client's rank and scaling."""
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
    return rows


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
    lines += [f"excluded {client!r}: {why}" for client, why in plan["excluded"]]
    lines += [f"note: {note}" for note in plan["notes"]]
    lines += [f"would write {path}" for path in plan["would_write"]]
    lines += [f"{path} is there already: needs --force" for path in plan["there_already"]]
    return "\n".join(lines)
