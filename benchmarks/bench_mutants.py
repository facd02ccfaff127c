"""How many small changes to the verbs the tests would not notice.

``python -m benchmarks.bench_mutants`` has mutmut make them, one at a time, in a copy under
``mutants/``, run the tests that ``[tool.mutmut]`` in pyproject.toml selects, and writes
``results/mutants.json``. A number after it is how many to try at a time, 1 if none is given.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.timing import record

PROJECT = Path(__file__).parent.parent

NOTICED = ("killed", "timeout")
"""A test failed, or did not come to an end."""


def mutmut(*arguments: str) -> str:
    """What mutmut prints."""
    call = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, cwd=PROJECT)
    if done.returncode:
        raise RuntimeError(f"mutmut {' '.join(arguments)}:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def statuses(listing: str) -> dict[str, str]:
    """Mutant -> what became of it, from ``mutmut results --all``."""
    found = dict(re.findall(r"^\s*(\S+__mutmut_\d+): (.+?)\s*$", listing, flags=re.M))
    if not found:
        raise RuntimeError(f"mutmut made no mutants: {listing[-1000:]!r}")
    return found


def function_of(mutant: str) -> str:
    """``module.function`` without the package and without mutmut's own additions."""
    module, _, name = mutant.partition(".")[2].rpartition(".")
    return f"{module}.{re.sub(r'^x_|__mutmut_[0-9]+$', '', name)}"


def changed_lines(diff: str) -> dict[str, str]:
    """The lines before and after, from ``mutmut show``."""
    body = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    return {
        key: "\n".join(line[1:].strip() for line in body if line.startswith(sign))
        for key, sign in (("before", "-"), ("after", "+"))
    }


def counted(found: Mapping[str, str]) -> dict[str, Any]:
    """Counts of all, by module and by function."""

    def count(mutants: Iterable[str]) -> dict[str, int]:
        by_status = Counter(found[mutant] for mutant in mutants)
        return {"total": by_status.total(), **dict.fromkeys((*NOTICED, "survived"), 0), **by_status}

    def grouped(names: Mapping[str, str]) -> dict[str, dict[str, int]]:
        groups: dict[str, list[str]] = {}
        for mutant, name in names.items():
            groups.setdefault(name, []).append(mutant)
        return {name: count(mutants) for name, mutants in sorted(groups.items())}

    functions = {mutant: function_of(mutant) for mutant in found}
    return {
        **count(found),
        "modules": grouped({m: name.partition(".")[0] for m, name in functions.items()}),
        "functions": grouped(functions),
    }


def main(children: str = "1") -> None:
    """Run anew, count, and write."""
    # What mutmut remembers of an earlier run does not know that the tests have changed.
    shutil.rmtree(PROJECT / "mutants", ignore_errors=True)
    start, before = time.perf_counter(), os.times()
    mutmut("run", "--max-children", children)
    seconds, after = time.perf_counter() - start, os.times()
    # What it costs, whatever else the machine is busy with.
    used = sum(getattr(after, t) - getattr(before, t) for t in ("children_user", "children_system"))
    found = statuses(mutmut("results", "--all", "true"))
    survivors = [
        {"mutant": mutant, "status": status, **changed_lines(mutmut("show", mutant))}
        for mutant, status in sorted(found.items())
        if status not in NOTICED
    ]
    results = {
        "mutmut": importlib.metadata.version("mutmut"),
        "seconds": round(seconds),
        "processor_seconds": round(used),
        "at_a_time": int(children),
        **counted(found),
        "survivors": survivors,
    }
    print(record("mutants", results))


if __name__ == "__main__":
    main(*sys.argv[1:])
