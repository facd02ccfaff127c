"""What the commands on adapter folders share: their arguments and the reading of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from hetlora_agg import ClientUpdate, InputValueError
from hetlora_agg.adapters import Adapter, read_adapter
from hetlora_agg.adapters.calling import name_of


def add_folders(parser: argparse.ArgumentParser) -> None:
    """The clients' folders and what each counts for."""
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="ADAPTER", help="a client's PEFT adapter folder")
    add("--weights", type=numbers, metavar="N,N,…", help="one per client; default all alike")
    add_missing(parser)
    add_option(parser, "an option of the method, VALUE as JSON or plain text; may be repeated")


def add_missing(parser: argparse.ArgumentParser) -> None:
    """What a client without a layer counts for there."""
    text = "a client lacks a layer: error, zero or renormalise"
    parser.add_argument("--missing", default="error", help=text)


def add_option(parser: argparse.ArgumentParser, text: str) -> None:
    """The methods' own options."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=option,
        metavar="NAME=VALUE",
        help=text,
    )


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers separated by commas, got {text!r}"
        ) from None


def amount(text: str) -> int:
    """A finite number of bytes, such as 2e9."""
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a number such as 2e9, got {text!r}") from None


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers separated by commas, got {text!r}"
        ) from None


def option(text: str) -> tuple[str, Any]:
    """``name=value`` with the value read as JSON, or as it stands."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value


def rank(text: str) -> int | str:
    """A whole number, or full."""
    try:
        return text if text == "full" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a whole number or 'full', got {text!r}"
        ) from None


def read_all(folders: Sequence[Path]) -> dict[str, Adapter]:
    """Every folder's adapter by the folder's name; nothing but headers is read."""
    adapters: dict[str, Adapter] = {}
    for folder in folders:
        name = name_of(folder)
        if name in adapters:
            raise InputValueError(
                f"{folder}: another client's folder is called {name!r} too; names are the clients' "
                "ids, so give each its own"
            )
        adapters[name] = read_adapter(folder)
    return adapters


def updates_of(
    adapters: dict[str, Adapter], weights: Sequence[float] | None
) -> dict[str, list[ClientUpdate]]:
    """Every layer's updates, read now."""
    counts = weights_by_client(adapters, weights)
    layers = dict.fromkeys(layer for adapter in adapters.values() for layer in adapter.layers)
    return {
        layer: [
            adapter.update(layer, counts[id], id)
            for id, adapter in adapters.items()
            if layer in adapter.layers
        ]
        for layer in layers
    }


def weights_by_client(
    adapters: dict[str, Adapter], weights: Sequence[float] | None
) -> dict[Hashable, float]:
    """One weight for each client."""
    given = [1.0] * len(adapters) if weights is None else weights
    if len(given) != len(adapters):
        raise InputValueError(
            f"--weights: expected one per client, {len(adapters)} in all, got {len(given)}"
        )
    return dict(zip(adapters, given, strict=True))


class Bar:
    """One bar for every stage of a long run, on a terminal; silent where stderr is none."""

    def __init__(self, what: str) -> None:
        self.bar: Any = None
        self.what = what
        self.stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move on to this many of a stage's things, called by what they are in the plural."""
        if self.bar is None or stage != self.stage:
            self.close()
            self.stage = stage
            if sys.stderr.isatty():
                self.bar = progress_bar(
                    total=total, initial=done - 1, unit=stage.removesuffix("s"), desc=self.what
                )
        if self.bar is not None:
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Leave the terminal on a fresh line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def progress_bar(**look: Any) -> Any:
    """A tqdm bar on stderr, or an error that names the extra that brings it."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            'the progress bar needs tqdm; do: pip install "hetlora-agg[sim]"'
        ) from error
    return tqdm(file=sys.stderr, **look)


def emit(rows: Any, text: Callable[[], str], as_json: bool) -> None:
    """Print as JSON or as text, whatever names the output can spell."""
    said = json.dumps(rows, indent=2, allow_nan=False, default=str) if as_json else text()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(said.encode(encoding, "backslashreplace").decode(encoding))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines)
