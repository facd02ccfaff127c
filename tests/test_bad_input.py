"""Bad input through every door: the right error, and everything as it was before.

Rows are those of the promise; every row says for every door what happens there, which existing test
shows it, or why it cannot occur.
"""

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hetlora_agg
from doors import DOORS, NAMES, Complaint, Sent, client, folders_of, memory, run_command, tree
from fuzz import files as mutants
from fuzz import garbage
from hetlora_agg import (
    ClientUpdate,
    ConvergenceError,
    HetLoRAError,
    InputTypeError,
    InputValueError,
    LowRank,
    MemoryLimitError,
    aggregate,
    clients,
)
from hetlora_agg.streaming import RunningAggregate

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Shown:
    """An existing test of this row at this door, as ``file::test``."""

    at: str


@dataclass(frozen=True)
class Never:
    """Why the row cannot occur at this door."""

    because: str


@dataclass(frozen=True)
class Case:
    """What is sent, and what each door must say.

    Attributes:
        send: makes the clients and options.
        error: the error's class; None where it is accepted.
        says: parts of the message, as patterns, everywhere.
        doors: door -> `Shown`, `Never`, or other patterns; doors not named are as ``says``.
        code: of the command line's exit.
    """

    send: object
    error: type | None = None
    says: tuple = ()
    doors: dict = field(default_factory=dict)
    code: int = 2


def three(**fields):
    return [client(2, 0, **fields), client(2, 1, **fields), client(2, 2, **fields)]


def changed(k, **fields):
    """Sound clients, one with other fields."""

    def send():
        made = three()
        return Sent([*made[:k], replace(made[k], **fields), *made[k + 1 :]])

    return send


def with_entry(value, factor="A", options=None):
    def send():
        made = three()
        X = getattr(made[1], factor).clone()
        X[1, 2] = value
        return Sent([made[0], replace(made[1], **{factor: X}), made[2]], options=options)

    return send


def filled(A, B, dtype=torch.float32, **fields):
    def send():
        made = three(dtype=dtype)
        X, Y = torch.full((2, 5), A, dtype=dtype), torch.full((7, 2), B, dtype=dtype)
        return Sent([made[0], replace(made[1], A=X, B=Y, **fields), made[2]])

    return send


def asked(method="rb", **options):
    return lambda: Sent(three(), method, options)


def of_kind(make):
    def send():
        made = three()
        return Sent([made[0], replace(made[1], A=make(made[1].A)), made[2]])

    return send


def padded(zero):
    def send():
        A, B = client(3, 1).A.clone(), client(3, 1).B
        A[2] = 0 if zero else 1
        return Sent([client(2, 0), replace(client(3, 1), A=A, B=B, rank=2), client(2, 2)])

    return send


IN_FILES = Never("safetensors holds dense tensors with data only")
ADAPTERS = ("state dict", "folder", "command")
BY_CONFIG = dict.fromkeys(
    ADAPTERS, ("tablet", "the config says rank 2", "has 3 rows", "rank_pattern included")
)
SHAPES = dict.fromkeys(ADAPTERS, ("tablet", r"h\.0\.q", "expected A", "got"))
FOLDERS = {
    "tensor": Never("it takes no files"),
    "layers": Never("it takes no files"),
    "stream": Never("its only file is its own checkpoint: streaming/test_checkpoint.py"),
    "state dict": Never("it takes no files"),
}
STATE_DICTS = {
    "tensor": Never("it takes one layer's factors, no keys"),
    "layers": Never("it takes pairs of factors by layer, no keys"),
    "stream": Shown("test_bad_input.py::test_a_stream_says_what_of_a_model_is_wrong"),
}
V = "test_validation.py::"
F = "adapters/test_files.py::"
M = "adapters/test_in_memory_refusals.py::"
C = "test_cli_adapters.py::"

ROWS = {
    "no clients": {
        "an empty list": Case(
            lambda: Sent([]),
            InputValueError,
            ("no client",),
            {
                "tensor": Shown(V + "test_no_updates"),
                "layers": Shown(V + "test_no_updates"),
                "state dict": ("no clients; pass at least one",),
                "folder": Shown(F + "test_a_wrong_argument_is_named"),
                "command": ("the following arguments are required: ADAPTER|expected one per client"
                            "|could not convert|numbers separated",),
            },
        ),
        "an exhausted generator": Case(
            lambda: Sent([]),
            InputValueError,
            (),
            dict.fromkeys(("tensor", "layers"), Shown(V + "test_an_exhausted_generator"))
            | {
                "stream": Never("clients are added one by one"),
                "state dict": Never("read into a list at once: the empty list"),
                "folder": Never("read into a list at once: the empty list"),
                "command": Never("arguments are no generator"),
            },
        ),
    },
    "NaN and Inf": {
        f"{value} in {factor}": Case(
            with_entry(value, factor),
            InputValueError,
            ("tablet", f"lora_{factor}: 1 NaN or Inf entries", r"first at \(1, 2\)",
             "on_bad_client"),
            {"tensor": Shown(V + "test_nan_and_inf_are_an_error_that_says_where")},
        )
        for value, factor in ((math.nan, "A"), (math.inf, "A"), (-math.inf, "A"))
    }
    | {
        "dropped": Case(with_entry(math.nan, options={"on_bad_client": "drop"})),
    },
    "half precision": {
        "a product beyond half": Case(filled(3e3, 3e3, torch.float16)),
        "bfloat16": Case(lambda: Sent(three(dtype=torch.bfloat16))),
        "two dtypes": Case(
            lambda: Sent([client(2, 0, torch.float16), client(2, 1), client(2, 2, torch.float64)])
        ),
    },
    "a product beyond its dtype": {
        "float32": Case(
            filled(1e25, 1e25), InputValueError,
            ("tablet", "component 0 of scaling", r"3\.4e\+38", "scale the update down"),
        ),
        "through the scaling": Case(
            filled(1e15, 1e15, scaling=1e10), InputValueError,
            ("tablet", "component 0 of scaling", "scale the update down"),
        ),
    },
    "shapes": {
        "one dimension": Case(
            changed(1, A=torch.ones(5)), InputValueError,
            ("tablet", r"lora_A: expected at least two dimensions", r"\(5,\)"),
            dict.fromkeys(ADAPTERS,
                          ("tablet", r"\(5,\)", "before it was gathered|config says")),
        ),
        "leading dimensions of one client": Case(
            changed(1, A=torch.ones(2, 2, 5), B=torch.ones(2, 7, 2)), InputValueError,
            ("tablet", "leading dimensions", r"\(7, 5\)", r"\(2, 7, 5\)"),
            SHAPES | {"stream": ("tablet", r"= \(7, 5\)", r"got \(2, 7, 5\)")},
        ),
        "rows are not columns": Case(
            changed(1, A=torch.ones(3, 5)), InputValueError,
            ("tablet", r"lora_A \(3, 5\), lora_B \(7, 2\)", "check which"),
            dict.fromkeys(ADAPTERS,
                          (r"A \(3, 5\) has rank 3, B \(7, 2\) has rank 2", "check which")),
        ),
        "transposed": Case(
            changed(1, A=client(2, 1).A.mT.contiguous()), InputValueError,
            ("tablet", "lora_A looks transposed: pass lora_A.mT"),
            dict.fromkeys(ADAPTERS,
                          (r"A \(5, 2\) has rank 5, B \(7, 2\) has rank 2", "tablet")),
        ),
        "another size": Case(
            changed(1, B=torch.ones(8, 2)), InputValueError,
            ("tablet", r"\(7, 5\) as the others have", r"\(8, 5\)"),
            dict.fromkeys(ADAPTERS,
                          ("tablet", r"as the others have, got", "share its base model"))
            | {"stream": ("tablet", "as the others have", r"got \(8, 5\)", "must have its size")},
        ),
        "empty": Case(
            changed(1, A=torch.ones(0, 5), B=torch.ones(7, 0)), InputValueError,
            ("tablet", "none of them 0"),
            dict.fromkeys(ADAPTERS, ("tablet", "at least 1|empty")),
        ),
    },
    "a declared rank": {
        "below the rows, padding zero": Case(
            padded(True), None, (), dict(BY_CONFIG),
        ),
        "below the rows, padding not zero": Case(
            padded(False), InputValueError,
            ("tablet", "declares rank 2 with 3 rows", "component 2 is not zero"),
            dict(BY_CONFIG),
        ),
        "above the rows": Case(
            changed(1, rank=3), InputValueError, ("tablet", "expected 1 to 2", "got 3"),
            dict.fromkeys(ADAPTERS,
                          ("tablet", "the config says rank 3", "has 2 rows")),
        ),
        "zero": Case(
            changed(1, rank=0), InputValueError, ("tablet", "expected 1 to 2", "got 0"),
            dict.fromkeys(ADAPTERS,
                          ("tablet", "r: expected an integer of at least 1, got 0")),
        ),
        "a truth value": Case(
            changed(1, rank=True), InputTypeError, ("tablet", "expected an integer", "got True"),
        ),
        "a fraction": Case(
            changed(1, rank=2.0), InputTypeError, ("tablet", "expected an integer", r"got 2\.0"),
        ),
        "text": Case(
            changed(1, rank="2"), InputTypeError, ("tablet", "expected an integer", "got '2'"),
        ),
        "above the sizes": Case(lambda: Sent([client(9, 0), client(9, 1)], "flora")),
    },
    "a rank above the registered one": {
        "one number": Case(
            lambda: Sent([client(2, 0), client(4, 1)], options={"max_rank": 3}), InputValueError,
            ("tablet", "declares rank 4, above the registered 3", "max_rank="),
        ),
        "by client": Case(
            lambda: Sent([client(2, 0), client(4, 1)], options={"max_rank": {"phone": 2}}),
            InputValueError, ("tablet", "not in max_rank=", "register"),
        ),
    },
    "weights": {
        **{
            f"{value}": Case(
                changed(1, weight=value), InputValueError,
                ("tablet", "weight: expected a finite number >= 0", re.escape(f"got {value}")),
            )
            for value in (-1.0, math.nan, math.inf)
        },
        "all zero": Case(
            lambda: Sent(three(weight=0.0)), InputValueError,
            ("no client is left", "every one has weight 0", "positive weight"),
        ),
        "huge": Case(lambda: Sent(three(weight=1e308))),
        "denormal": Case(lambda: Sent(three(weight=5e-324))),
    },
    "kinds of tensors": {
        name: Case(
            of_kind(make), InputTypeError, ("tablet", says),
            dict.fromkeys(("folder", "command"), at) if isinstance(at, Never)
            else {"state dict": at, "folder": at, "command": at},
        )
        for name, make, says, at in (
            ("int64", lambda X: X.long(), "torch.int64", ("tablet", "expected float16")),
            ("bool", lambda X: X > 0, "torch.bool", ("tablet", "expected float16")),
            ("float8", lambda X: X.to(torch.float8_e4m3fn), "float8",
             ("tablet", "expected float16")),
            ("complex", lambda X: X * 1j, "complex64", ("tablet", "expected float16")),
            ("sparse", lambda X: X.to_sparse(), "expected a dense tensor", IN_FILES),
            ("meta", lambda X: X.to("meta"), "got a meta one", IN_FILES),
        )
    }
    | {
        "nested": Case(
            lambda: Sent([]), InputTypeError, (),
            dict.fromkeys(("tensor", "layers"), Shown(V + "test_kinds_of_tensors_that_are_refused"))
            | {"state dict": Shown("test_fuzz.py::test_a_spoiled_state_dict"),
               "stream": Shown("test_bad_input.py::test_a_nested_tensor_is_not_added")}
            | dict.fromkeys(("folder", "command"), IN_FILES),
        ),
        "two devices": Case(
            lambda: Sent([]), InputValueError, (),
            dict.fromkeys(("tensor", "layers", "stream", "state dict"),
                          Never("needs a second device with data; meta is refused before"))
            | dict.fromkeys(("folder", "command"), Never("files are read to one device")),
        ),
    },
    "awkward tensors": {
        "trained": Case(
            lambda: Sent([replace(u, A=u.A.clone().requires_grad_()) for u in three()])
        ),
        "expanded and shared": Case(
            lambda: Sent([replace(u, A=torch.arange(5.0).expand(2, 5)) for u in three()])
        ),
        "arrays, read-only": Case(
            lambda: Sent([replace(u, A=read_only(u.A), B=read_only(u.B)) for u in three()])
        ),
    },
    "state dicts": {
        "a missing layer": Case(lambda: Sent([]), InputValueError, (), {
            "tensor": Never("it takes one layer"),
            "layers": Shown("test_layers.py::test_a_missing_layer_is_an_error_by_default"),
            "stream": Shown("test_bad_input.py::test_a_stream_says_what_of_a_model_is_wrong"),
            "state dict": Shown("adapters/test_state_dicts.py::"
                                "test_a_client_may_lack_layers"),
            "folder": Shown(F + "test_a_spoiled_folder_is_named_with_what_is_wrong"),
            "command": Shown("test_bad_input.py::test_a_spoiled_folder_at_the_command_line"),
        }),
        "A without B, DoRA, biases, saved modules": Case(
            lambda: Sent([]), InputValueError, (), STATE_DICTS | {
                "state dict": Shown(M + "test_what_is_wrong_is_named"),
                "folder": Shown(F + "test_a_spoiled_folder_is_named_with_what_is_wrong"),
                "command": Shown("test_bad_input.py::test_a_spoiled_folder_at_the_command_line"),
            }),
    },
    "files": {
        "spoiled": Case(lambda: Sent([]), InputValueError, (), FOLDERS | {
            "folder": Shown(F + "test_a_spoiled_folder_is_named_with_what_is_wrong"),
            "command": Shown("test_bad_input.py::test_a_spoiled_folder_at_the_command_line"),
        }),
        "pickles": Case(lambda: Sent([]), InputValueError, (), FOLDERS | {
            "folder": Shown(F + "test_a_spoiled_folder_is_named_with_what_is_wrong"),
            "command": Shown(C + "test_pickles_are_refused_with_the_remedy"),
        }),
        "links, devices, pipes": Case(lambda: Sent([]), InputValueError, (), FOLDERS | {
            "folder": Shown("test_fuzz.py::test_what_is_no_file_is_refused_at_once"),
            "command": Shown("test_fuzz.py::test_what_is_no_file_is_refused_at_once"),
        }),
        "names that lead elsewhere": Case(lambda: Sent([]), InputValueError, (), FOLDERS | {
            "folder": Shown(F + "test_ids_lead_nowhere_else"),
            "command": Never("its clients are called by their folders' own names"),
        }),
        "a target that is there, a full disk, a kill": Case(
            lambda: Sent([]), InputValueError, (), FOLDERS | {
                "folder": Shown(F + "test_a_failing_write_leaves_what_was_there"),
                "command": Shown("test_bad_input.py::test_a_full_disk_at_the_command_line"),
            }),
    },
    "arithmetic": {
        "no driver converges": Case(lambda: Sent([]), InputValueError, (),
            dict.fromkeys(DOORS, Shown("test_bad_input.py::test_no_driver_converges"))),
        "memory": Case(
            asked(memory_limit=1000), MemoryLimitError,
            ("memory_limit=", "need", "raise the limit"),
            {"stream": Shown("streaming/test_schedules.py::test_memory_limits")},
        ),
    },
    "names": {
        "a method": Case(
            lambda: Sent(three(), "flexlra"), InputValueError,
            ("unknown method 'flexlra'", "did you mean .*'flexlora'", "known: "),
        ),
        "an option": Case(
            asked(rnak=2), InputTypeError, ("unknown option of method 'rb' 'rnak'", "'rank'"),
        ),
        "an option's value": Case(
            asked(energy=2), InputValueError, (r"energy=: expected a number in \(0, 1\]", "got 2"),
        ),
    },
    "a rule outside its condition": {
        "equal ranks": Case(
            lambda: Sent([client(2, 0), client(3, 1)], "fedit"), InputValueError,
            ("fedit: expected clients of equal rank", "use 'zeropad'"),
        ),
        "trimming": Case(
            asked("trimmed_mean", trim=0.5), InputValueError, ("trim=", r"got 0\.5"),
            {"stream": Never("it looks at all clients at once, which a stream refuses")},
        ),
    },
}  # fmt: skip


def read_only(X):
    X = X.numpy().copy()
    X.flags.writeable = False
    return X


CELLS = [
    pytest.param(case, door, id=f"{row}: {name}-{door}")
    for row, cases in ROWS.items()
    for name, case in cases.items()
    for door in DOORS
    if not isinstance(case.doors.get(door), (Shown, Never))
]


def state_of(sent, tmp_path):
    return [(memory(u.A), memory(u.B)) for u in sent.updates], tree(tmp_path)


@pytest.mark.parametrize(("case", "door"), CELLS)
def test_a_cell_of_the_table(case, door, tmp_path):
    sent = case.send()
    if door in ("folder", "command") and sent.updates:
        folders_of(sent, tmp_path)
    before = state_of(sent, tmp_path)
    says = case.doors.get(door, case.says)
    # A door may refuse what others accept, and says so in words of its own.
    if case.error is None and not says:
        found = DOORS[door](sent, tmp_path)
        assert np.isfinite(found).all()
        expected = DOORS["tensor"](case.send(), tmp_path)
        size = np.linalg.norm(expected)
        # Files hold the rounding to the dtype sent; in memory the arithmetic is the same.
        assert np.linalg.norm(found - expected) <= 1e-2 * size
    else:
        error = (case.error or InputValueError) if door != "command" else Complaint
        with pytest.raises(error) as caught:
            DOORS[door](sent, tmp_path)
        for part in says:
            assert re.search(part, str(caught.value)), (part, str(caught.value))
        if door == "command":
            assert caught.value.code == case.code
        assert state_of(sent, tmp_path)[1] == before[1], "files are as they were"
    assert state_of(sent, tmp_path)[0] == before[0], "arguments are as they were"
    # And a good call works as if nothing had been.
    good = Sent([replace(client(2, k), id=f"good-{NAMES[k]}") for k in range(2)])
    again = DOORS[door](good, tmp_path / "again")
    assert np.array_equal(again, DOORS[door](good, tmp_path / "once more"))


def test_every_row_speaks_of_every_door():
    for row, cases in ROWS.items():
        for name, case in cases.items():
            assert set(case.doors) <= set(DOORS), (row, name)
            told = {door for door in DOORS if case.says or case.error is None} | set(case.doors)
            assert told == set(DOORS), (row, name)
            for found in case.doors.values():
                assert not isinstance(found, Never) or len(found.because) > 10


def test_every_test_that_the_table_names_is_there():
    named = {
        found.at
        for cases in ROWS.values()
        for case in cases.values()
        for found in case.doors.values()
        if isinstance(found, Shown)
    }
    assert named
    for at in sorted(named):
        file, test = at.split("::")
        assert f"\ndef {test}(" in (TESTS / file).read_text(), at


def spoil_header(folder):
    (folder / mutants.WEIGHTS).write_bytes(mutants.packed("{", b""))


def spoil_layers(folder):
    path = folder / mutants.WEIGHTS
    path.write_bytes(path.read_bytes().replace(b"h.0.q", b"h.1.q"))


def spoil_factor(folder):
    path = folder / mutants.WEIGHTS
    path.write_bytes(path.read_bytes().replace(b"h.0.q.lora_B", b"h.1.q.lora_B"))


def spoil_pickle(folder):
    path = folder / mutants.WEIGHTS
    path.write_bytes(b"\x80\x04" + path.read_bytes())


def with_fields(**fields):
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **fields}


@pytest.mark.parametrize("door", DOORS)
def test_no_driver_converges(door, tmp_path, monkeypatch):
    # What the ladder's steps give, and that they are reported, is test_linalg's.
    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    sent = Sent(three())
    folders_of(sent, tmp_path)
    before = state_of(sent, tmp_path)
    with monkeypatch.context() as patched:
        for name in ("svd", "eigh", "eigvalsh", "qr", "cholesky"):
            patched.setattr(torch.linalg, name, fails)
        error = Complaint if door == "command" else ConvergenceError
        with pytest.raises(error, match=r"(?i)converge|fail"):
            DOORS[door](sent, tmp_path)
    assert state_of(sent, tmp_path) == before
    assert np.isfinite(DOORS[door](sent, tmp_path)).all()


SPOILED = {
    "a damaged header": (spoil_header, "no intact safetensors file"),
    "a pickle": (spoil_pickle, "a pickle under another name"),
    "no JSON": (lambda f: (f / mutants.SETTINGS).write_text("{"), "no JSON"),
    "another layer": (spoil_layers, "has no layer 'h.0.q', which others have"),
    "A without B": (spoil_factor, "expected lora_A and lora_B, got only"),
    "nothing": (lambda f: (f / mutants.WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "remote code": (
        lambda f: (f / mutants.SETTINGS).write_text(
            '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "auto_map": {"AutoModel": "x--y.Z"}}'
        ),
        "auto_map=",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_folder_at_the_command_line(kind, tmp_path):
    good, bad = mutants.sound(tmp_path / "phone", 3, 1), mutants.sound(tmp_path / "tablet")
    spoil, message = SPOILED[kind]
    spoil(bad)
    before = tree(tmp_path)
    with pytest.raises(Complaint, match=f"tablet.*{message}") as caught:
        run_command(["aggregate", str(good), str(bad), "-o", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert tree(tmp_path) == before


def test_a_spoiled_folder_in_a_process_of_its_own(tmp_path):
    good, bad = mutants.sound(tmp_path / "phone", 3, 1), mutants.sound(tmp_path / "tablet")
    spoil_pickle(bad)
    before = tree(tmp_path)
    command = [sys.executable, "-m", "hetlora_agg", "aggregate", str(good), str(bad), "-o", "out"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(hetlora_agg.__file__).parents[1])},
    )
    assert done.returncode == 2
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("hetlora-agg: error: ")
    assert "tablet" in line
    assert "pickle under another name" in line
    assert tree(tmp_path) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_at_the_command_line(tmp_path, monkeypatch):
    from hetlora_agg.adapters import files

    good, other = mutants.sound(tmp_path / "phone", 3, 1), mutants.sound(tmp_path / "tablet")
    command = ["aggregate", str(good), str(other), "-o", str(tmp_path / "out")]
    run_command(command)
    before = tree(tmp_path)

    def full(tensors, path, **kwargs):
        Path(path).write_bytes(b"half")
        Path("/dev/full").write_bytes(b"x")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(Complaint, match="No space left on device") as caught:
        run_command([*command, "--force"])
    assert caught.value.code == 1
    assert tree(tmp_path) == before
    monkeypatch.undo()
    run_command([*command, "--force"])


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a*)*b", "((a|b)+c)*", "(a|aa)+$", "(x+x+)+y", "a" * 1001]
)
def test_a_pattern_that_would_never_end_is_refused_at_once(pattern, tmp_path):
    good, bad = mutants.sound(tmp_path / "phone"), mutants.sound(tmp_path / "tablet")
    mutants.write(bad, (bad / mutants.WEIGHTS).read_bytes(), with_fields(rank_pattern={pattern: 2}))
    with pytest.raises(InputValueError, match=r"tablet: rank_pattern.*can take for ever to match"):
        hetlora_agg.adapters.aggregate_adapters([good, bad])


@pytest.mark.parametrize("pattern", ["q", r"^h\.0\.q", "h.*(q|v)", "(h.0.)?q", r"h\.[0-9]+\.q"])
def test_patterns_that_people_write_are_taken(pattern, tmp_path):
    from hetlora_agg.adapters import read_adapter

    folder = mutants.sound(tmp_path / "phone")
    config = with_fields(r=9, rank_pattern={pattern: 2})
    mutants.write(folder, (folder / mutants.WEIGHTS).read_bytes(), config)
    assert read_adapter(folder).rank("h.0.q") == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_rslora": "false"}, "use_rslora: expected true or false, got 'false'"),
        ({"use_dora": 1}, "use_dora: expected true or false, got 1"),
        ({"bias": ["all"]}, r"bias: expected one of \['none', 'all', 'lora_only'\], got \['all'\]"),
        ({"modules_to_save": True}, "modules_to_save: expected a list of names or null, got True"),
        ({"modules_to_save": "score"}, "modules_to_save: expected a list of names"),
    ],
)
def test_fields_of_another_kind_are_refused(fields, message, tmp_path):
    good, bad = mutants.sound(tmp_path / "phone"), mutants.sound(tmp_path / "tablet")
    mutants.write(bad, (bad / mutants.WEIGHTS).read_bytes(), with_fields(**fields))
    with pytest.raises((InputValueError, InputTypeError), match="tablet: " + message):
        hetlora_agg.adapters.aggregate_adapters([good, bad])


def test_errors_are_short_whatever_they_quote():
    long = "x" * 100_000
    deep = []
    for _ in range(5000):
        deep = [deep]
    for value in (long, deep, 10**5000, list(range(10**5))):
        for options in ({"max_rank": value}, {"on_bad_client": value}, {"workers": value}):
            if isinstance(value, int) and "on_bad_client" not in options:
                continue  # a count like any other
            with pytest.raises((InputValueError, InputTypeError)) as caught:
                aggregate(three(), **options)
            assert len(str(caught.value)) < 600


@pytest.mark.parametrize("value", [torch.tensor(True), np.array(True), np.array("2"),
                                   np.timedelta64(2, "s")])  # fmt: skip
@pytest.mark.parametrize("name", ["weight", "scaling"])
def test_arrays_that_hold_no_number_are_no_number(name, value):
    with pytest.raises(InputTypeError, match=f"client 0.*{name}: expected a finite number"):
        aggregate([replace(client(), **{name: value})])


def test_an_endless_view_is_refused_by_the_memory_limit():
    # Two rows of 2**40 entries in four bytes: whoever adds them up allocates terabytes.
    endless = replace(client(), A=torch.ones(1).expand(2, 2**40))
    with pytest.raises(MemoryLimitError, match=r"memory_limit=1e\+09.*need"):
        aggregate([endless], memory_limit=10**9)


LR = garbage.low_rank
ODD_FACTORS = ("low rank on meta", "low rank of objects", "low rank of integers")
FOUND = {
    "a rank that no memory holds": lambda: hetlora_agg.distribute(aggregate(three()), [10**13]),
    "a rank beyond 64 bits": lambda: hetlora_agg.distribute(aggregate(three()), [10**30]),
    "a fresh adapter of such a rank": lambda: clients.merge_and_restart(
        torch.ones(7, 5), aggregate(three()), 10**13, generator=torch.Generator()
    ),
    "steps beyond float64": lambda: clients.client_variate(
        LR(), LR(), LR(), LR(), steps=10**400, learning_rate=0.1
    ),
    "a step too small to divide by": lambda: clients.client_variate(
        LR(), LR(), LR(), LR(2, 5), steps=1, learning_rate=1e-320
    ),
    "a federation beyond float64": lambda: clients.server_variate(LR(), [LR()], clients=10**400),
    "a correction beyond the dtype": lambda: clients.corrected(
        LowRank(torch.full((2, 3), 3e38), torch.ones(4, 2)),
        LowRank(torch.full((2, 3), -3e38), torch.ones(4, 2)),
        LR(),
    ),
    "a generator for a number": lambda: hetlora_agg.aggregate_layers(
        {"q": three()}, "rolora", round=torch.Generator()
    ),
    "a federation that no list holds": lambda: hetlora_agg.uniform_inclusion(10**30, 1),
    "nobody registered, under a limit": lambda: aggregate(
        three(), memory_limit=10**9, on_bad_client="drop", max_rank={}
    ),
    "an array for a policy of ranks": lambda: aggregate(
        three(), max_rank=1, on_bad_client=np.array(["error", "drop"])
    ),
    "a name that no system takes": lambda: hetlora_agg.adapters.read_adapter("x" * 5000),
    "a draw from text": lambda: hetlora_agg.unbiased_truncate(LR(), 1, "x" * 5000),
    "scores on meta": lambda: clients.important_slots(torch.ones(2, device="meta"), 1),
    "scores in float8": lambda: clients.important_slots(torch.ones(2).to(torch.float8_e5m2), 1),
    "sparse scores": lambda: clients.allot_bits(torch.ones(2).to_sparse(), 4.0),
    "a sparse base": lambda: clients.qr_start(torch.eye(4).to_sparse(), 1),
    "no list of methods": lambda: hetlora_agg.compare(three(), 0.5),
    "no list of updates": lambda: hetlora_agg.compare(0.5),
    "no updates of a layer": lambda: hetlora_agg.compare({"q": 0.5}),
    "a truth value for bytes": lambda: aggregate(three(), memory_limit=torch.tensor(True)),
    "an array for a policy": lambda: aggregate(three(), on_bad_client=np.array(["error", "drop"])),
    "an array in a config": lambda: hetlora_agg.adapters.aggregate_state_dicts(
        [state_dict()], [{"r": np.ones(3), "lora_alpha": 4}]
    ),
    "a number that compares as arrays do": lambda: hetlora_agg.adapters.aggregate_state_dicts(
        [state_dict()], [{"r": 2, "lora_alpha": 4, "q": np.float64("nan")}]
    ),
    "a config without end": lambda: hetlora_agg.adapters.aggregate_state_dicts(
        [state_dict()], [{"r": 2, "lora_alpha": 4, "target_modules": garbage.deep()}]
    ),
    "an array of objects": lambda: hetlora_agg.adapters.aggregate_state_dicts(
        [{**state_dict(), mutants.KEYS[0]: np.full((2, 3), None)}], scalings=[1.0]
    ),
    **{
        f"{name} in {where}": (lambda name=name, call=call: call(garbage.MAKERS[name]()))
        for name in ODD_FACTORS
        for where, call in {
            "previous": lambda x: aggregate([garbage.sound()], previous=x),
            "importance": lambda x: clients.importance(x, LR()),
            "align_rounds": lambda x: hetlora_agg.align_rounds(aggregate([garbage.sound()]), x),
            "select_and_fold": lambda x: clients.select_and_fold(x, 1, generator=torch.Generator()),
        }.items()
    },
}


def state_dict():
    u = garbage.sound()
    return dict(zip(mutants.KEYS, (u.A, u.B), strict=True))


@pytest.mark.parametrize("kind", FOUND)
def test_what_fuzzing_found_is_refused(kind):
    with pytest.raises(HetLoRAError) as caught:
        FOUND[kind]()
    assert len(str(caught.value)) < 1500


def test_numbers_of_any_kind_are_bytes():
    plain = aggregate(three(), memory_limit=10**7)
    for limit in (np.int64(10**7), torch.tensor(10**7)):
        assert torch.equal(aggregate(three(), memory_limit=limit).A, plain.A)


def test_factors_of_two_kinds_are_taken_as_one():
    # An array beside a tensor, as a checkpoint read in two ways gives them.
    mixed = LowRank(LR().A.numpy(), LR().B)
    assert torch.equal(
        aggregate([garbage.sound()], previous=mixed).A,
        aggregate([garbage.sound()], previous=LR()).A,
    )


def test_a_saved_module_keeps_its_name_beside_unnamed_factors():
    sent = {**state_dict(), "base_model.model.score.modules_to_save.mine.weight": torch.ones(3)}
    outcome = hetlora_agg.adapters.aggregate_state_dicts([sent], scalings=[1.0])
    assert list(outcome.state_dict()) == list(sent)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_not_added():
    running = RunningAggregate("flexlora")
    nested = torch.nested.nested_tensor([torch.ones(5), torch.ones(5)])
    with pytest.raises(InputTypeError, match="lora_A: expected a dense tensor with data"):
        running.add(ClientUpdate(nested, torch.ones(7, 2)), id="phone")
    assert not running.receipts


def test_a_stream_says_what_of_a_model_is_wrong():
    running = RunningAggregate("flexlora")
    sound = {"q": three()[0], "v": three()[1]}
    running.add(sound, id="phone")
    with pytest.raises(InputValueError, match=r"client 'tablet' lacks layer 'v'.*missing="):
        running.add({"q": three()[0]}, id="tablet")
    alone = {mutants.KEYS[0]: torch.ones(2, 5)}
    with pytest.raises(InputValueError, match=r"lora_B|without"):
        running.add(alone, id="tablet", scaling=1.0)
    dora = {
        **state_dict(),
        mutants.KEYS[0].replace("lora_A", "lora_magnitude_vector"): torch.ones(7),
    }
    with pytest.raises(HetLoRAError):
        running.add(dora, id="tablet", scaling=1.0)
    assert list(running.receipts) == ["phone"]
    assert running.result()["q"].rank == 2
