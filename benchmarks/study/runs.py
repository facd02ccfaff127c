"""Runs the study, or what is left of it: ``python -m benchmarks.study.runs``.

One record per run, in one JSON file per configuration under ``results/study``; runs that are there
are not run again. ``--quick`` is a few minutes' look that touches no result.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import statistics
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.study import plan as plans
from benchmarks.study import text, vision
from benchmarks.study.contenders import CONTENDERS
from benchmarks.study.plan import Configuration, runs_of
from benchmarks.study.variants import VARIANTS
from benchmarks.timing import RESULTS, machine
from hetlora_agg import HetLoRAError
from hetlora_agg.simulate import Settings, SimulationResult, run

STUDY = RESULTS / "study"
QUICK = vision.CACHE / "quick"
PLANS = {"study": plans.study, "full": plans.full, "quick": plans.quick}

FEDERATIONS = {"vision": vision.federation, "text": text.federation}
"""Setting -> data and settings to a federation that is ready."""

FORMAT = "hetlora_agg.study/1"
DIGITS = 4
"""Significant ones that are kept of a measure."""

PER_ROUND = (
    "accuracy",
    "aggregation_noise",
    "energy_kept",
    "energy_ratio",
    "effective_rank",
    "initialisation_noise",
)
"""What is kept of every round; bytes are summed over the run."""

Run = tuple[Configuration, int]


def execute(configuration: Configuration, seed: int) -> dict[str, Any]:
    """One run's record: every measure per round, or why the method could not take the clients."""
    settings = Settings(**configuration.settings, seed=seed)
    federation = FEDERATIONS[configuration.setting](configuration.data, settings)
    contender = CONTENDERS[configuration.label]
    try:
        result = run(
            federation,
            contender.run,
            label=configuration.label,
            sides=VARIANTS[configuration.clients],
            **{**contender.options, **configuration.options},
        )
    except HetLoRAError as error:
        return {"skipped": str(error)}
    return record_of(result)


def record_of(result: SimulationResult) -> dict[str, Any]:
    """What is kept of a run; all but the seconds is the same whenever it is run."""
    kept = {name: [_rounded(x) for x in getattr(result, name)] for name in PER_ROUND}
    return {
        **kept,
        "bytes_up": sum(result.bytes_up),
        "bytes_down": sum(result.bytes_down),
        "server_seconds": _rounded(statistics.median(result.server_seconds)),
        "seconds": _rounded(result.seconds),
    }


def path_of(configuration: Configuration, folder: Path) -> Path:
    """The file that holds a configuration's runs."""
    return folder / f"{configuration.id}.json"


def load(configuration: Configuration, folder: Path = STUDY) -> dict[int, dict[str, Any]]:
    """The records that there are, by seed; none if they are of another configuration."""
    path = path_of(configuration, folder)
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["format"] != FORMAT or found["configuration"] != _plain(configuration.describe()):
        return {}
    return {int(seed): record for seed, record in found["runs"].items()}


def save(
    configuration: Configuration,
    records: Mapping[int, Mapping[str, Any]],
    folder: Path,
    where: Mapping[str, Any],
) -> None:
    """Write a configuration's runs, a line each; a reader sees all of the file or none of it."""
    path = path_of(configuration, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "format": FORMAT,
        "command": f"python -m benchmarks.study.runs --full --only '{configuration.id}/*'",
        "configuration": configuration.describe(),
        "machine": where,
    }
    runs = {str(seed): records[seed] for seed in sorted(records)}
    text = f'{{{_lines(head)},\n"runs": {{{_lines(runs)}\n}}\n}}\n'
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def missing(plan: Iterable[Configuration], folder: Path, only: str | None = None) -> list[Run]:
    """The runs that have no record yet, in the order in which to run them.

    Args:
        plan: what is wanted.
        folder: where records are.
        only: those whose id and seed, as in ``vision/digits/main/rb/0``, match this pattern, or
            contain it if it has no wildcards; None is all.
    """
    plan = list(plan)
    there = {configuration.id: load(configuration, folder) for configuration in plan}
    return [
        (configuration, seed)
        for configuration, seed in runs_of(plan)
        if seed not in there[configuration.id] and _matches(f"{configuration.id}/{seed}", only)
    ]


def go(
    left: Sequence[Run], folder: Path, workers: int = 1, bar: tqdm[Any] | None = None
) -> list[str]:
    """Run what is left and save every record as it comes.

    Args:
        left: the runs.
        folder: where records go.
        workers: processes; each computes on one thread.
        bar: told of every run that is done.

    Returns:
        Runs that broke, with what broke them; the others are not held up.
    """
    where, broken = {**machine(), "threads": 1}, []
    for (configuration, seed), record in _executed(left, workers):
        name = f"{configuration.id}/{seed}"
        if isinstance(record, str):
            broken.append(f"{name}\n{record}")
        else:
            save(configuration, {**load(configuration, folder), seed: record}, folder, where)
        if bar is not None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()
    return broken


def _executed(left: Sequence[Run], workers: int) -> Iterator[tuple[Run, dict[str, Any] | str]]:
    """Every run with its record, or with the error as text, as they are done."""
    if workers == 1:
        with _one_thread():
            for item in left:
                yield item, _guarded(*item)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
    try:
        futures = {pool.submit(_guarded, *item): item for item in left}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # What has not begun is for the next time.
        pool.shutdown(cancel_futures=True)


def _guarded(configuration: Configuration, seed: int) -> dict[str, Any] | str:
    try:
        return execute(configuration, seed)
    except (ImportError, FileNotFoundError) as error:
        # Packages or data that are not there: the message says what to do.
        return str(error)
    except Exception:
        return traceback.format_exc()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums have one order then, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _gathered(broken: Iterable[str]) -> list[str]:
    """What broke, each reason once: the first run that it broke, and how many more."""
    names: dict[str, list[str]] = {}
    for said in broken:
        name, _, reason = said.partition("\n")
        names.setdefault(reason, []).append(name)
    return [
        f"{own[0]}{f' and {len(own) - 1} more' if len(own) > 1 else ''}\n{reason}"
        for reason, own in names.items()
    ]


def _matches(name: str, only: str | None) -> bool:
    if only is None:
        return True
    return fnmatch.fnmatchcase(name, only) if set(only) & set("*?[") else only in name


def _rounded(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")


def _lines(items: Mapping[str, Any]) -> str:
    """One item a line, without the braces."""
    rows = [f"{json.dumps(name)}: {json.dumps(x, allow_nan=False)}" for name, x in items.items()]
    return "\n" + ",\n".join(rows)


def _plain(known: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(known))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; 1 if a run broke, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.runs", description=__doc__)
    parser.add_argument("--quick", action="store_const", const="quick", dest="plan")
    parser.add_argument("--full", action="store_const", const="full", dest="plan")
    parser.add_argument("--only", metavar="PATTERN", help="of setting/data/group/case/label/seed")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--list", action="store_true", help="name what would be run")
    parser.set_defaults(plan="study")
    chosen = parser.parse_args(arguments)
    folder = QUICK if chosen.plan == "quick" else STUDY
    plan = PLANS[chosen.plan]()
    left = missing(plan, folder, chosen.only)
    if chosen.list:
        print("\n".join(f"{configuration.id}/{seed}" for configuration, seed in left))
        return 0
    wanted = sum(_matches(f"{c.id}/{seed}", chosen.only) for c, seed in runs_of(plan))
    try:
        with tqdm(total=wanted, initial=wanted - len(left), unit="run", smoothing=0.05) as bar:
            broken = go(left, folder, chosen.workers, bar)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on, records in {folder}", file=sys.stderr)
        return 130
    print("\n".join([f"records in {folder}", *_gathered(broken)]), file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
