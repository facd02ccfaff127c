"""Fuzzing: whatever comes in, an error of the library's own comes out, or a finite result.

``make fuzz`` runs the same properties with FUZZ_EXAMPLES examples each and prints how many.
"""

import dataclasses
import io
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import wraps
from inspect import isfunction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hetlora_agg
from fuzz import files, garbage
from hetlora_agg import (
    METHODS,
    HetLoRAError,
    LowRank,
    aggregate,
    aggregate_layers,
    clients,
    distributed,
)
from hetlora_agg.adapters import Adapter, aggregate_adapters, aggregate_state_dicts, read_adapter
from hetlora_agg.cli import main
from hetlora_agg.streaming import RunningAggregate, aggregate_folders, as_adapters
from processes import world_of_one
from states import fitting, state_for

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
# Few are the same every time, or `make test` would fail one day of itself; many are new ones.
LONG = {"max_examples": EXAMPLES, "derandomize": EXAMPLES < 200} if EXAMPLES else {}
fuzzed = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], **LONG)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    # Made by the garbage itself.
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning"),
]


def parts(value):
    """Every tensor and array in a result, however deep."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from parts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from parts(item)
    elif isinstance(value, Adapter):
        yield from (value.tensor(key) for key in value.keys)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from parts(getattr(value, field.name))


def finite(value):
    """Whether every number in a result is."""
    for X in parts(value):
        if isinstance(X, torch.Tensor) and X.is_meta:
            return False
        X = X.detach().double().numpy() if isinstance(X, torch.Tensor) else X
        if X.dtype.kind == "f" and not np.isfinite(X).all():
            return False
    return True


def survives(call, entries=True):
    """The call gives a finite result or an error of ours; anything else comes through."""
    try:
        result = call()
    except HetLoRAError as error:
        message = str(error)
        assert message.strip()
        assert len(message) < 4000, "an error is read by people"
        return None
    assert not entries or finite(result)
    return result


def updates():
    return [garbage.sound(2), garbage.sound(3, 1)]


def result():
    return aggregate(updates())


def rotated():
    return aggregate(updates(), "flexlora")


def weight():
    return torch.ones(garbage.OUT, garbage.IN)


def seeded():
    return torch.Generator().manual_seed(0)


def scores():
    return torch.tensor([1.0, 2.0])


def server():
    return garbage.low_rank(3)


def running():
    taken = RunningAggregate("flexlora")
    taken.add(garbage.sound(2), id="phone")
    return taken


def in_one_process(function):
    """The call in a process group of one; who waits for nobody is not kept from an error."""

    @wraps(function)
    def call(*args, **kwargs):
        with world_of_one():
            return function(*args, **kwargs)

    return call


def adapters_by_id():
    return {
        f"c{r}": Adapter.from_state_dict(state_dict(r), {"r": r, "lora_alpha": 4}) for r in (2, 3)
    }


def of_adapters():
    begun = RunningAggregate("flexlora")
    for id, adapter in adapters_by_id().items():
        begun.add(adapter, id=id)
    return begun


LR = garbage.low_rank
CALLS = {
    "aggregate": (aggregate, {"updates": updates, "method": lambda: "rb", "workers": lambda: None,
        "memory_limit": lambda: None, "on_bad_client": lambda: "error", "max_rank": lambda: None}),
    "aggregate_layers": (aggregate_layers, {"layers": lambda: {"q": updates(), "v": updates()},
        "missing": lambda: "error", "max_group": lambda: None, "memory_limit": lambda: 10**9,
        "on_bad_client": lambda: "drop", "max_rank": lambda: None, "workers": lambda: None}),
    "distribute": (hetlora_agg.distribute, {"result": result, "ranks": lambda: [1, 5],
        "scalings": lambda: [1.0, 2.0], "generator": seeded}),
    "diagnose": (hetlora_agg.diagnose, {"updates": updates, "result": result,
        "missing": lambda: "error"}),
    "compare": (hetlora_agg.compare, {"updates": updates, "methods": lambda: ["rb", "flora"],
        "missing": lambda: "error", "on_bad_client": lambda: "error", "workers": lambda: None,
        "memory_limit": lambda: None, "rank": lambda: None}),
    "align_rounds signs": (hetlora_agg.align_rounds, {"result": result, "previous": LR,
        "by": lambda: "signs"}),
    "align_rounds rotation": (hetlora_agg.align_rounds, {"result": rotated, "previous": LR,
        "by": lambda: "rotation"}),
    "LowRank": (LowRank, {"A": lambda: torch.ones(2, 3), "B": lambda: torch.ones(4, 2)}),
    "unbiased_truncate": (hetlora_agg.unbiased_truncate, {"low_rank": LR, "rank": lambda: 1,
        "u": lambda: 0.5}),
    "uniform_inclusion": (hetlora_agg.uniform_inclusion, {"clients": lambda: 4,
        "size": lambda: 2}),
    "midzuno_inclusion": (hetlora_agg.midzuno_inclusion, {"weights": lambda: [1, 2, 3],
        "size": lambda: 2}),
    "draw_uniform": (hetlora_agg.draw_uniform, {"clients": lambda: 4, "size": lambda: 2,
        "generator": seeded}),
    "draw_midzuno": (hetlora_agg.draw_midzuno, {"weights": lambda: [1, 2, 3],
        "size": lambda: 2, "generator": seeded}),
    "inverse_inclusion": (hetlora_agg.inverse_inclusion, {"weights": lambda: [1, 2],
        "inclusion": lambda: [0.5, 1.0]}),
    "resolve": (hetlora_agg.resolve, {"method": lambda: "rb"}),
    "importance": (clients.importance, {"weights": LR, "gradients": LR, "earlier": lambda: None,
        "decay": lambda: 0.5}),
    "important_slots": (clients.important_slots, {"scores": scores, "count": lambda: 1}),
    "allot_bits": (clients.allot_bits, {"scores": scores, "budget": lambda: 4.0,
        "choices": lambda: (2, 4)}),
    "quantise": (clients.quantise, {"adapter": LR, "bits": lambda: 4}),
    "prune": (clients.prune, {"trained": LR, "received": LR, "decay": lambda: 0.5,
        "min_rank": lambda: 1}),
    "continue_from": (clients.continue_from, {"result": result, "own": LR,
        "scaling": lambda: 1.0}),
    "merge_and_restart": (clients.merge_and_restart, {"weight": weight, "result": result,
        "rank": lambda: 1, "generator": seeded}),
    "qr_start": (clients.qr_start, {"weight": weight, "rank": lambda: 1, "scaling": lambda: 1.0}),
    "corrected": (clients.corrected, {"gradient": LR, "own": LR, "server": server,
        "slots": lambda: None}),
    "client_variate": (clients.client_variate, {"own": LR, "server": server, "start": LR,
        "end": LR, "steps": lambda: 2, "learning_rate": lambda: 0.1, "slots": lambda: None}),
    "server_variate": (clients.server_variate, {"server": server, "changes": lambda: [LR()],
        "slots": lambda: None, "clients": lambda: 2}),
    "select_and_fold": (clients.select_and_fold, {"current": LR, "rank": lambda: 1,
        "generator": seeded, "scaling": lambda: 1.0}),
    "sketch": (clients.sketch, {"update": garbage.sound, "omega": lambda: torch.ones(3, 2)}),
    "project": (clients.project, {"update": garbage.sound, "Q": lambda: torch.ones(4, 2)}),
    "basis": (clients.basis, {"total_sketch": weight}),
    "aggregate_adapters": (aggregate_adapters, {"paths": lambda: ["/nonexistent/a"],
        "weights": lambda: [1.0], "ranks": lambda: [1], "missing": lambda: "error",
        "dora": lambda: "error"}),
    "aggregate_folders": (aggregate_folders, {"paths": lambda: ["/nonexistent/a"],
        "weights": lambda: [1.0], "checkpoint": lambda: None, "every": lambda: 1.0,
        "on_bad_folder": lambda: "error", "on_duplicate": lambda: "error", "ranks": lambda: [1],
        "missing": lambda: "error", "dora": lambda: "error", "memory_limit": lambda: None,
        "on_bad_client": lambda: "error"}),
    "as_adapters": (as_adapters, {"running": of_adapters, "clients": adapters_by_id,
        "ranks": lambda: None}),
    "read_adapter": (read_adapter, {"path": lambda: "/nonexistent/a"}),
    "distributed.own": (in_one_process(distributed.own), {"names": lambda: ["q", "v"],
        "cost": lambda: {"q": 1, "v": 2}, "group": lambda: None}),
    "distributed.aggregate_layers": (in_one_process(distributed.aggregate_layers), {
        "layers": lambda: {"q": updates(), "v": updates()}, "missing": lambda: "error",
        "max_group": lambda: None, "memory_limit": lambda: 10**9, "max_rank": lambda: None,
        "on_bad_client": lambda: "drop", "workers": lambda: None, "group": lambda: None}),
    "distributed.gather": (in_one_process(distributed.gather), {
        "results": lambda: {"q": result()}, "group": lambda: None}),
    "distributed.merge": (in_one_process(distributed.merge), {"running": running,
        "group": lambda: None}),
    "distributed.result": (in_one_process(distributed.result), {"running": running,
        "group": lambda: None}),
    "distributed.receipts": (in_one_process(distributed.receipts), {"running": running,
        "group": lambda: None}),
    "distributed.save": (in_one_process(distributed.save), {"running": running,
        "group": lambda: None, "folder": lambda: 7}),
    "distributed.load": (in_one_process(distributed.load), {"folder": lambda: "/nonexistent/a",
        "group": lambda: None}),
}  # fmt: skip
"""Public function -> its arguments as makers of sound values."""


def named(maker):
    """The arguments by name, or in order where the function has them by position only."""
    return {name: make() for name, make in maker.items()}


def own_code(value):
    """Whether a value is the caller's own function, whose errors are its own."""
    return callable(value) and not isinstance(value, str)


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_that_nobody_expects(name, tmp_path, monkeypatch):
    function, makers = CALLS[name]
    # Any string may be a path to write to.
    monkeypatch.chdir(tmp_path)

    @settings(fuzzed, **({} if EXAMPLES else {"max_examples": 40}))
    @given(st.data())
    def check(data):
        arguments = named(makers)
        spoiled = data.draw(st.lists(st.sampled_from(sorted(makers)), min_size=1, max_size=2))
        for argument in spoiled:
            arguments[argument] = data.draw(garbage.values, label=argument)
        if own_code(arguments.get("method")) or any(
            map(own_code, _listed(arguments.get("methods")))
        ):
            return
        # A container holds what it is given; whoever computes with it looks at the entries.
        survives(lambda: function(**arguments), entries=function is not LowRank)

    check()


def _listed(value):
    return value if isinstance(value, (list, tuple)) else [value]


def test_every_function_of_the_public_names_is_fuzzed():
    fuzzed_here = {function for function, _ in CALLS.values()}
    public = [getattr(hetlora_agg, name) for name in hetlora_agg.__all__]
    public += [getattr(clients, name) for name in clients.__all__]
    functions = {f.__name__ for f in public if isfunction(f)}
    # `method` registers at import time; tail_penalty is a loss: NaN in, NaN out, for the trainer.
    exempt = {"method", "tail_penalty"}
    missing = functions - {f.__name__ for f in fuzzed_here} - exempt
    assert not missing, missing


@fuzzed
@given(garbage.spoiled_updates())
def test_a_spoiled_client(given):
    # Garbage may be a sound update of another size, or none: whatever it is, it is named.
    survives(lambda: aggregate(given))


@fuzzed
@given(st.lists(garbage.spoiled_updates(), min_size=1, max_size=2), st.sampled_from(
    ["error", "zero", "renormalise"]), st.sampled_from(["error", "drop"]))  # fmt: skip
def test_a_spoiled_client_in_a_model(layers, missing, policy):
    named_layers = {f"layer {k}": layer for k, layer in enumerate(layers)}
    survives(lambda: aggregate_layers(named_layers, missing=missing, on_bad_client=policy))


OPTIONS = [(name, option) for name in sorted(METHODS) for option in METHODS[name].options]


@fuzzed
@given(st.sampled_from(OPTIONS), garbage.values, st.booleans())
def test_an_option_that_nobody_expects(which, value, model):
    name, option = which
    if own_code(value) or (isinstance(value, LowRank) and not finite(value)):
        return
    options = state_for(name) | {option: value}
    sent = fitting(name, [garbage.sound(2), garbage.sound(2, 1)])
    if model:
        survives(lambda: aggregate_layers({"q": sent}, name, **options))
    else:
        survives(lambda: aggregate(sent, name, **options))


# ---- adapters ----------------------------------------------------------------------------------


def state_dict(rank=2):
    g = torch.Generator().manual_seed(rank)
    stem = f"base_model.model.{files.LAYER}.lora_"
    return {
        f"{stem}A.weight": torch.randn(rank, 3, generator=g),
        f"{stem}B.weight": torch.randn(4, rank, generator=g),
    }


keys = st.sampled_from([*files.KEYS, *files.NAMES, 1, None, ("a",)])


@fuzzed
@given(st.data())
def test_a_spoiled_state_dict(data):
    sent = [state_dict(2), state_dict(3)]
    configs = [{"r": 2, "lora_alpha": 4}, {"r": 3, "lora_alpha": 4}]
    options = {}
    kind = data.draw(st.sampled_from(["tensor", "key", "dict", "config", "field", "option"]))
    if kind == "tensor":
        sent[1][data.draw(st.sampled_from(files.KEYS))] = data.draw(garbage.values)
    elif kind == "key":
        sent[1][data.draw(keys)] = sent[1].pop(files.KEYS[0])
    elif kind == "dict":
        sent[1] = data.draw(garbage.values)
    elif kind == "config":
        configs[1] = data.draw(garbage.values)
    elif kind == "field":
        configs[1][data.draw(st.sampled_from(files.FIELDS))] = data.draw(garbage.values)
    else:
        option = data.draw(st.sampled_from(["weights", "scalings", "keys", "ranks", "missing"]))
        options[option] = data.draw(garbage.values)

    def call():
        outcome = aggregate_state_dicts(sent, configs, **options)
        return [outcome.adapter, *map(outcome.client, outcome.clients)]

    survives(call)


WRITING = (False,) * 7 + (True,)


def snapshot(root):
    """Everything below, links as links, with its bytes."""
    return {
        str(p.relative_to(root)): os.readlink(p) if p.is_symlink()
        else p.read_bytes() if p.is_file() else None
        for p in sorted(root.rglob("*"))
    }  # fmt: skip


def through_the_doors(root, folders, writing):
    """Reads and aggregates, or writes too, by function and command line; inputs stay as they are.

    Writing goes through to the disk, which takes longer than all the rest.
    """
    before = snapshot(root)
    out = root / "out"

    def call():
        outcome = aggregate_adapters(folders)
        if writing:
            outcome.write(out)
        return [outcome.adapter, *map(outcome.client, outcome.clients)]

    done = survives(call)
    after = snapshot(root)
    if not writing:
        assert after == before
        return
    assert {k: v for k, v in after.items() if not k.startswith("out")} == before
    assert (out in root.iterdir()) == (done is not None), "a failure leaves nothing behind"
    errors, printed = io.StringIO(), io.StringIO()
    with redirect_stderr(errors), redirect_stdout(printed):
        code = main(["aggregate", *map(str, folders), "-o", str(root / "cli")])
    if done is None:
        assert code in (1, 2)
        assert len(errors.getvalue().splitlines()) == 1
        assert not printed.getvalue()
        assert not (root / "cli").exists()
    else:
        assert code == 0
        assert snapshot(root / "cli") == snapshot(out)


def folders_in(root, weights=None, config=None):
    good = files.sound(root / "phone", 3, 1)
    bad = files.sound(root / "tablet")
    if weights is not None:
        (bad / files.WEIGHTS).write_bytes(weights)
    if config is not None:
        files.write(bad, (bad / files.WEIGHTS).read_bytes(), config)
    return [good, bad]


@fuzzed
@given(files.weights(), st.sampled_from(WRITING))
def test_a_mutant_of_a_weights_file(weights, writing):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        through_the_doors(root, folders_in(root, weights=weights), writing)


@fuzzed
@given(files.configs(), st.sampled_from(WRITING))
def test_a_mutant_of_a_config(config, writing):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        through_the_doors(root, folders_in(root, config=config), writing)


@pytest.mark.parametrize("place", files.PLACES)
def test_what_is_no_file_is_refused_at_once(place, tmp_path):
    good, bad = folders_in(tmp_path)
    files.PLACES[place](bad)
    with pytest.raises(HetLoRAError, match="tablet"):
        aggregate_adapters([good, bad])
    assert main(["aggregate", str(good), str(bad), "-o", str(tmp_path / "out")]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["phone", "tablet"]


def test_how_many_examples(capsys):
    """Prints, for ``make fuzz``, how many examples every property has seen."""
    expected = EXAMPLES or settings.default.max_examples
    assert fuzzed.max_examples == expected
    with capsys.disabled():
        if EXAMPLES:
            properties = len(CALLS) + 6
            print(f"\nfuzz: {properties} properties, up to {EXAMPLES} examples each")


MOST = 3 * 2**30
"""Bytes of address space; torch and what the tests import map about a third of it."""


def test_no_input_makes_it_allocate():
    # In a process of its own that has no more: what asks for more is a foreign MemoryError there.
    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))

    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-p", "no:cov", str(here), "-k", "mutant or spoiled or nobody_expects"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=here.parent.parent,
        env={**os.environ, "FUZZ_EXAMPLES": "30", "OMP_NUM_THREADS": "1"},
        preexec_fn=limited,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
