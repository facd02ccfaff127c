"""`hetlora-agg compare`: several methods on the same adapter folders."""

from __future__ import annotations

import argparse

from hetlora_agg import compare
from hetlora_agg.cli.adapters import add_folders, emit, read_all, updates_of


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    add_folders(parser)
    add = parser.add_argument
    add("--methods", default="all", help="names separated by commas, or all")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    """Print every method's rank, distance from the exact mean, energy kept and time."""
    names = None if arguments.methods == "all" else arguments.methods.split(",")
    updates = updates_of(read_all(arguments.folders), arguments.weights)
    comparison = compare(updates, names, missing=arguments.missing, **dict(arguments.option))
    emit(comparison.to_dict(), comparison.summary, arguments.json)
