"""`hetlora-agg simulate`: every method in a small federation, for every seed."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hetlora_agg import METHODS
from hetlora_agg.cli.adapters import add_option, integers, progress_bar
from hetlora_agg.cli.errors import Failure
from hetlora_agg.plotting import plot_simulation, require_matplotlib
from hetlora_agg.simulate import (
    ATTACKS,
    SAMPLINGS,
    Attack,
    Settings,
    SimulationResult,
    record_of,
    simulate_many,
    table_of,
)


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand its options."""
    add = parser.add_argument
    ranks = ",".join(map(str, Settings.ranks))
    add("--methods", default="all", help="names separated by commas, or all")
    add("--ranks", type=integers, default=ranks, help="one rank per client")
    add("--rounds", type=int, default=Settings.rounds, help="communication rounds")
    add("--local-epochs", type=int, default=Settings.local_epochs, help="epochs per round")
    add("--dirichlet", type=float, default=Settings.dirichlet, help="label skew: small is skewed")
    add("--participation", type=float, default=Settings.participation, help="share of clients")
    add("--sampling", choices=SAMPLINGS, default=Settings.sampling, help="how clients are drawn")
    add("--lora-alpha", type=float, default=Settings.lora_alpha, help="scaling is this over rank")
    add("--attackers", type=int, default=0, metavar="N", help="the first N clients attack")
    add("--attack", choices=sorted(ATTACKS), default="rank-inflation", help="what they do")
    add("--registered", action="store_true", help="drop who declares more than its rank")
    add_option(parser, "an option for the methods that have it, such as quorum=3; may be repeated")
    add("--seeds", type=integers, default="0,1,2", help="every method runs once per seed")
    add("--out", type=Path, metavar="DIR", help="write simulation.json and simulation.png there")
    add("--force", action="store_true", help="overwrite the files in DIR")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_simulate)


def _simulate(arguments: argparse.Namespace) -> None:
    """Run every method for every seed; print the table, write the JSON and the picture."""
    names = list(METHODS) if arguments.methods == "all" else arguments.methods.split(",")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise Failure(f"--seeds: expected each once, got {','.join(map(str, arguments.seeds))}")
    if arguments.out is not None:
        _check_free(arguments.out, arguments.force)
    attack = _attack(arguments)
    runs = _run_seeds(names, arguments, attack)
    record = record_of(runs)
    if attack is not None:
        record["attack"] = repr(attack)
    text = json.dumps(record, indent=2, allow_nan=False)
    print(text if arguments.json else table_of(record))
    if not record["methods"]:
        raise Failure("none of these methods can take these clients; choose others, or other ranks")
    if arguments.out is not None:
        picture = io.BytesIO()
        plot_simulation(runs).savefig(picture, format="png")
        for path, data in zip(
            _targets(arguments.out), (text.encode(), picture.getvalue()), strict=True
        ):
            _write(path, data)
            print(f"wrote {path}", file=sys.stderr)


def _attack(arguments: argparse.Namespace) -> Attack | None:
    """What the first clients do, if any attacks."""
    if not 0 <= arguments.attackers < len(arguments.ranks):
        raise Failure(
            f"--attackers: expected 0 to {len(arguments.ranks) - 1}, so that one of "
            f"{len(arguments.ranks)} clients is honest, got {arguments.attackers}"
        )
    attackers = tuple(range(arguments.attackers))
    return ATTACKS[arguments.attack](attackers) if attackers else None


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of the methods, and the registry of ranks."""
    registry = {"max_rank": dict(enumerate(arguments.ranks)), "on_bad_client": "drop"}
    return (registry if arguments.registered else {}) | dict(arguments.option)


def _run_seeds(
    names: Sequence[str], arguments: argparse.Namespace, attack: Attack | None
) -> dict[str, list[SimulationResult]]:
    """Method -> one result per seed; the methods of a seed share data, start and participation."""
    runs: dict[str, list[SimulationResult]] = {name: [] for name in names}
    progress = _Progress(len(arguments.seeds), len(names), arguments.rounds)
    # Matrices this small gain nothing from threads, and one gives everybody the same numbers.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed in arguments.seeds:
            progress.seed = seed
            results = simulate_many(
                names,
                ranks=arguments.ranks,
                rounds=arguments.rounds,
                local_epochs=arguments.local_epochs,
                dirichlet=arguments.dirichlet,
                participation=arguments.participation,
                sampling=arguments.sampling,
                lora_alpha=arguments.lora_alpha,
                seed=seed,
                attack=attack,
                progress=progress,
                **_options(arguments),
            )
            progress.finish_seed()
            for name, result in results.items():
                runs[name].append(result)
    finally:
        torch.set_num_threads(threads)
        progress.close()
    return runs


class _Progress:
    """A bar when stderr is a terminal, one line per finished run when it is not."""

    def __init__(self, seeds: int, methods: int, rounds: int) -> None:
        self.rounds = rounds
        self.per_seed = methods * rounds
        self.finished = 0
        self.seed = 0
        self.bar = None
        if sys.stderr.isatty():
            # A terminal that says it is 0 x 0, as some containers do, still gets a bar.
            columns, lines = shutil.get_terminal_size()
            self.bar = progress_bar(
                total=seeds * self.per_seed, unit="round", ncols=columns, nrows=lines
            )

    def finish_seed(self) -> None:
        """Count the rounds of skipped methods as done."""
        self.finished += self.per_seed
        if self.bar is not None:
            self.bar.update(self.finished - self.bar.n)

    def __call__(self, label: str, round_: int, accuracy: float) -> None:
        if self.bar is not None:
            self.bar.set_description(f"seed {self.seed} {label}", refresh=False)
            self.bar.set_postfix_str(f"accuracy {accuracy:.3f}", refresh=False)
            self.bar.update()
        elif round_ == self.rounds:
            print(
                f"seed {self.seed}  {label}  {round_} rounds  accuracy {accuracy:.3f}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the terminal on a fresh line."""
        if self.bar is not None:
            self.bar.close()


def _check_free(out: Path, force: bool) -> None:
    """Find out before the long run, not after it, that the files cannot be written."""
    require_matplotlib()
    taken = [str(path) for path in _targets(out) if path.exists()]
    if taken and not force:
        raise Failure(f"{' and '.join(taken)}: exists already; choose another --out or add --force")
    if out.exists() and not out.is_dir():
        raise Failure(f"{out}: expected a directory or nothing, got a file; choose another --out")


def _targets(out: Path) -> tuple[Path, Path]:
    return out / "simulation.json", out / "simulation.png"


def _write(path: Path, data: bytes) -> None:
    """The whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
