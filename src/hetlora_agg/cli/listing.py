"""`hetlora-agg methods`: what every method is, promises, needs and costs."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from hetlora_agg import METHODS, resolve


def add_methods(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    parser.add_argument("names", nargs="*", metavar="METHOD", help="only these; default all")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_methods)


def _methods(arguments: argparse.Namespace) -> None:
    """Print what the registry knows of every method, as docs/methods.md has it."""
    rows = [resolve(name).describe() for name in sorted(arguments.names or METHODS)]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    columns = max(60, shutil.get_terminal_size(fallback=(100, 24)).columns)
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:{width}}  {row['summary']}")
        needed = [f"{name} (needed)" if name in row["needs"] else name for name in row["options"]]
        for title, text in (
            ("formula", row["formula"]),
            ("claims", ", ".join(_claim(*claim) for claim in row["claims"].items())),
            ("client", row["client"]),
            ("server", "keeps " + ("; ".join(row["server"]) or "nothing")),
            ("options", ", ".join(needed)),
            ("cost", row["cost"]),
            ("fidelity", row["fidelity"]),
            ("source", row["reference"]),
        ):
            margin = f"{'':{width}}  {title:9}"
            print(
                textwrap.fill(
                    text or "none",
                    columns,
                    initial_indent=margin,
                    subsequent_indent=" " * len(margin),
                    break_on_hyphens=False,
                )
            )


def _claim(claim: str, options: Mapping[str, Any]) -> str:
    """`claim`, or `claim (option=value)` where it holds under an option only."""
    needed = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{claim} ({needed})" if needed else claim
