"""The command line `hetlora-agg`: the one package that prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 the command
was written wrongly, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from safetensors import SafetensorError

from hetlora_agg import HetLoRAError, __version__
from hetlora_agg.cli.aggregating import add_aggregate
from hetlora_agg.cli.comparing import add_compare
from hetlora_agg.cli.errors import Failure
from hetlora_agg.cli.inspecting import add_inspect
from hetlora_agg.cli.listing import add_methods
from hetlora_agg.cli.simulating import add_simulate

PROGRAM = "hetlora-agg"
FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class Terminated(BaseException):
    """Somebody asked the process to end: what was begun is cleared up and saved, as by Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (None: the process's own) and return the exit code."""
    try:
        arguments = _parser().parse_args(argv)
        with _ending():
            arguments.run(arguments)
            sys.stdout.flush()
    except HetLoRAError as error:
        return _complain(error, USAGE)
    except BrokenPipeError:
        # The reader, `head` say, has seen enough; Python would complain again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (Failure, ImportError, OSError, SafetensorError) as error:
        return _complain(error, FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except Terminated:
        return _complain("terminated", TERMINATED)
    return 0


@contextmanager
def _ending() -> Iterator[None]:
    """SIGTERM as an exception, unless somebody else has a say in it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _complain(message: object, code: int) -> int:
    print(f"{PROGRAM}: error: {' '.join(str(message).split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_complain(f"{message}; see {self.prog} --help", USAGE))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Aggregate LoRA updates of different ranks.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_aggregate(
        commands.add_parser("aggregate", help="aggregate clients' PEFT adapters into a global one")
    )
    add_compare(commands.add_parser("compare", help="several methods on the same adapters"))
    add_inspect(commands.add_parser("inspect", help="ranks, scalings and spectra of adapters"))
    add_methods(commands.add_parser("methods", help="list the aggregation methods"))
    add_simulate(
        commands.add_parser(
            "simulate",
            help="train a small federation on real digits and compare methods",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    return parser
