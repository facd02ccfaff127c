"""The command line, called as a function and once as a process."""

import io
import json
import subprocess
import sys

import pytest
import torch

from hetlora_agg import METHODS, __version__
from hetlora_agg.cli import main
from hetlora_agg.plotting import plot_simulation

QUICK = ["simulate", "--rounds", "2", "--local-epochs", "1", "--seeds", "0"]
PNG = b"\x89PNG\r\n\x1a\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def error_of(capsys):
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("hetlora-agg: error: ")
    return lines[0]


# ---- methods -------------------------------------------------------------------------------------


def test_methods_lists_every_method_with_claims_options_and_source(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    blocks = {line.split()[0] for line in text.splitlines() if not line.startswith(" ")}
    assert blocks == set(METHODS)
    flowing = " ".join(text.split())
    for entry in METHODS.values():
        known = entry.describe()
        assert known["summary"] in text
        for key in ("formula", "client", "cost", "fidelity", "reference"):
            assert " ".join(known[key].split()) in flowing, (entry.name, key)
        for kept in known["server"]:
            assert kept in flowing
    assert "statistical (rank=full)" in flowing
    assert "generator (needed)" in flowing
    assert max(map(len, text.splitlines())) <= 120


def test_methods_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(METHODS)
    assert rows["flora"]["claims"]["exact"] == {}
    assert set(rows["rb"]["options"]) == set(METHODS["rb"].options)


def test_methods_by_name(capsys):
    assert main(["methods", "rb", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row == json.loads(json.dumps(METHODS["rb"].describe()))
    assert main(["methods", "rbb"]) == 2
    assert "unknown method 'rbb'; did you mean 'rb' or 'rbla'? known: ['dare'" in error_of(capsys)


def test_the_module_runs_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "hetlora_agg", "methods"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "\nrb " in done.stdout


def test_a_reader_that_leaves_early_gets_no_error_text():
    process = subprocess.Popen(
        [sys.executable, "-m", "hetlora_agg", "methods", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


# ---- simulate ------------------------------------------------------------------------------------


def test_simulate_prints_a_table_and_lines_of_progress(capsys):
    threads = torch.get_num_threads()
    assert main([*QUICK, "--methods", "rb,flora,fedit"]) == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert 0 <= float(rows["rb"][1]) <= 1
    assert float(rows["flora"][3]) < 1e-5 < float(rows["rb"][3])
    assert "skipped fedit: fedit: expected clients of equal rank" in out
    assert [line.split()[:3] for line in err.splitlines()] == [
        ["seed", "0", "rb"],
        ["seed", "0", "flora"],
    ]
    assert torch.get_num_threads() == threads


def test_simulate_writes_json_and_picture_next_to_each_other(tmp_path, capsys):
    out = tmp_path / "new" / "demo"
    command = [*QUICK, "--methods", "rb,zeropad,fedit", "--seeds", "0,1", "--out", str(out)]
    assert main(command) == 0
    assert sorted(path.name for path in out.iterdir()) == ["simulation.json", "simulation.png"]
    assert (out / "simulation.png").read_bytes().startswith(PNG)
    record = json.loads((out / "simulation.json").read_text())
    assert record["format"] == "hetlora_agg.simulation/2"
    assert record["versions"]["hetlora_agg"] == __version__
    assert record["seeds"] == [0, 1]
    assert record["settings"] == {
        "ranks": [2, 4, 8, 8, 16],
        "rounds": 2,
        "local_epochs": 1,
        "dirichlet": 0.3,
        "participation": 1.0,
        "lora_alpha": 16.0,
        "learning_rate": 0.01,
        "cohorts": None,
        "sampling": "uniform",
    }
    assert list(record["skipped"]) == ["fedit"]
    assert list(record["methods"]) == ["rb", "zeropad"]
    for row in record["methods"].values():
        assert row["accuracy"]["min"] <= row["accuracy"]["mean"] <= row["accuracy"]["max"]
        assert [len(single["accuracy"]) for single in row["runs"]] == [3, 3]
        assert [len(single["aggregation_noise"]) for single in row["runs"]] == [2, 2]
    assert str(out / "simulation.png") in capsys.readouterr().err


def test_simulate_prints_the_record_it_writes(tmp_path, capsys):
    assert main([*QUICK, "--methods", "rb", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "simulation.json").read_text())


@pytest.mark.parametrize("name", ["simulation.json", "simulation.png"])
def test_simulate_overwrites_only_when_forced(tmp_path, capsys, name):
    (tmp_path / name).write_text("precious")
    command = [*QUICK, "--methods", "rb", "--out", str(tmp_path)]
    assert main(command) == 1
    message = error_of(capsys)
    assert name in message
    assert "--force" in message
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
    assert main([*command, "--force"]) == 0
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / name).read_bytes()[:8] != b"precious"


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, capsys, monkeypatch):
    (tmp_path / "simulation.json").write_text("old")

    def full(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main([*QUICK, "--methods", "rb", "--out", str(tmp_path), "--force"]) == 1
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_an_out_that_is_a_file_is_found_before_the_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*QUICK, "--out", str(tmp_path / "file")]) == 1
    assert "expected a directory" in error_of(capsys)


def test_a_terminal_gets_a_bar_that_reaches_the_end(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert main([*QUICK, "--methods", "rb,fedit", "--seeds", "0,1"]) == 0
    assert "seed 1 rb" in screen.getvalue()
    assert "accuracy 0." in screen.getvalue()
    assert "100%|" in screen.getvalue()
    assert " 8/8 " in screen.getvalue()


def test_nothing_that_can_run_is_a_failure(tmp_path, capsys):
    assert main([*QUICK, "--methods", "fedit", "--out", str(tmp_path / "demo")]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("skipped fedit: ")
    assert "none of these methods can take these clients" in err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simulate", "--methods", "flexlroa"], "did you mean 'fedrot' or 'flexlora' or 'flora'?"),
        (["simulate", "--methods", "rb,rb"], "more than once"),
        (["simulate", "--ranks", "2,x"], "whole numbers separated by commas"),
        (["simulate", "--ranks", "2,0"], "one rank >= 1 for every client"),
        (["simulate", "--participation", "2"], "a share in (0, 1]"),
        (["simulate", "--rounds", "0"], "rounds: expected an integer >= 1"),
        (["simulate", "--rounds", "many"], "see hetlora-agg simulate --help"),
        (["simulat"], "see hetlora-agg --help"),
        ([], "see hetlora-agg --help"),
    ],
)
def test_a_command_written_wrongly_is_one_line_and_code_2(arguments, says, capsys):
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert says in error_of(capsys)


@pytest.mark.parametrize(
    ("module", "extra"), [("matplotlib.figure", "plot"), ("sklearn.datasets", "sim")]
)
def test_a_missing_extra_is_named(module, extra, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert main([*QUICK, "--methods", "rb", "--out", str(tmp_path)]) == 1
    assert f'pip install "hetlora-agg[{extra}]"' in error_of(capsys)


def test_a_terminal_without_tqdm_names_the_extra(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main([*QUICK, "--methods", "rb"]) == 1
    assert 'pip install "hetlora-agg[sim]"' in screen.getvalue()


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    def interrupted(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("hetlora_agg.cli.simulating.simulate_many", interrupted)
    assert main([*QUICK, "--methods", "rb"]) == 130
    assert "interrupted" in error_of(capsys)


def test_version_and_help_exit_with_0(capsys):
    for arguments in (["--version"], ["--help"], ["simulate", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
    assert f"hetlora-agg {__version__}" in capsys.readouterr().out


def test_the_picture_is_drawn_from_what_was_run(tmp_path, monkeypatch):
    drawn = []

    def watched(runs):
        drawn.append({name: len(results) for name, results in runs.items()})
        return plot_simulation(runs)

    monkeypatch.setattr("hetlora_agg.cli.simulating.plot_simulation", watched)
    main([*QUICK, "--methods", "rb,flora", "--seeds", "0,1", "--out", str(tmp_path)])
    assert drawn == [{"rb": 2, "flora": 2}]


def test_no_seed_is_run_twice(capsys):
    assert main(["simulate", "--seeds", "0,0"]) == 1
    assert "--seeds: expected each once, got 0,0" in capsys.readouterr().err
