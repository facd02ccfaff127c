"""`hetlora-agg aggregate`, `compare` and `inspect` on adapter folders."""

import csv
import io
import json
import os
import re
import shutil
import signal
from contextlib import nullcontext

import pytest
import torch

from hetlora_agg.adapters import Adapter, aggregate_adapters, read_adapter, write_adapter
from hetlora_agg.cli import main

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")


def adapter(rank, alpha=16, seed=0, layers=LAYERS):
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for name in layers:
        key = f"base_model.model.{name}"
        factors[f"{key}.lora_A.weight"] = torch.randn(rank, 12, generator=g)
        factors[f"{key}.lora_B.weight"] = torch.randn(10, rank, generator=g)
    config = {"r": rank, "lora_alpha": alpha, "peft_type": "LORA", "target_modules": ["q_proj"]}
    return Adapter.from_state_dict(factors, config)


@pytest.fixture
def folders(tmp_path):
    made = []
    for name, rank, seed in (("car", 2, 1), ("phone", 4, 2), ("tablet", 8, 3)):
        made.append(write_adapter(tmp_path / name, adapter(rank, seed=seed)))
    return [str(path) for path in made]


def error_of(capsys):
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("hetlora-agg: error: ")
    return lines[0]


def same(one, other):
    tensors, expected = one.state_dict(), other.state_dict()
    return list(tensors) == list(expected) and all(
        torch.equal(tensors[key], expected[key]) for key in expected
    )


def test_aggregate_writes_what_the_function_returns(folders, tmp_path, capsys):
    out, back = tmp_path / "global", tmp_path / "next"
    command = ["aggregate", *folders, "-o", str(out), "--method", "rb", "--rank", "6"]
    command += ["--weights", "500,900,1200", "--option", "floor=0.5"]
    command += ["--per-client-out", str(back), "--client-ranks", "2,4,6"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert LAYERS[0] in captured.out
    assert f"wrote {out}" in captured.err
    expected = aggregate_adapters(
        folders, [500, 900, 1200], "rb", rank=6, floor=0.5, ranks=[2, 4, 6]
    )
    assert same(read_adapter(out), expected.adapter)
    for name, rank in (("car", 2), ("phone", 4), ("tablet", 6)):
        written = read_adapter(back / name)
        assert same(written, expected.client(name))
        assert {written.rank(layer) for layer in written.layers} == {rank}


def test_aggregate_as_json(folders, tmp_path, capsys):
    out = str(tmp_path / "global")
    assert main(["aggregate", *folders, "-o", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clients"] == ["car", "phone", "tablet"]
    assert [row["rank"] for row in found["layers"]] == [8, 8]
    assert found["written"] == [out]


def test_dry_run_says_what_would_be_done_and_writes_nothing(folders, tmp_path, capsys):
    out = tmp_path / "global"
    command = ["aggregate", *folders, "-o", str(out), "--dry-run"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "rb over car, phone, tablet" in text
    assert f"would write {out}" in text
    assert "2, 4, 8" in text
    assert "8, 4, 2" in text  # lora_alpha / r
    assert not out.exists()
    out.mkdir()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["there_already"] == [str(out)]


def test_what_is_there_is_replaced_on_request_only(folders, tmp_path, capsys):
    out = str(tmp_path / "global")
    assert main(["aggregate", *folders, "-o", out]) == 0
    capsys.readouterr()
    assert main(["aggregate", *folders, "-o", out, "--method", "zeropad"]) == 2
    assert "is there already; choose another or add --force" in error_of(capsys)
    assert main(["aggregate", *folders, "-o", out, "--method", "zeropad", "--force"]) == 0
    assert same(read_adapter(out), aggregate_adapters(folders, None, "zeropad").adapter)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--weights", "1,2"], "weights: expected one for each of 3 clients, got 2"),
        (["--method", "rbb"], "unknown method 'rbb'; did you mean 'rb'"),
        (["--option", "floor=2"], "floor=: expected a number in"),
        (["--option", "flor=0.5"], "unknown option of method 'rb' 'flor'"),
        (["--client-ranks", "1,2,3"], "has no effect without --per-client-out"),
        (["--missing", "drop"], "missing=.*known: .'error', 'renormalise', 'zero'"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    folders, tmp_path, capsys, extra, message
):
    out = tmp_path / "global"
    assert main(["aggregate", *folders, "-o", str(out), *extra]) == 2
    line = error_of(capsys)
    assert re.search(message, line), line
    assert not out.exists()


def test_pickles_are_refused_with_the_remedy(folders, tmp_path, capsys):
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    )
    torch.save({"x": torch.ones(1)}, old / "adapter_model.bin")
    assert main(["aggregate", *folders, str(old), "-o", str(tmp_path / "global")]) == 2
    line = error_of(capsys)
    assert "adapter_model.bin" in line
    assert "safetensors" in line


def test_two_folders_of_one_name(folders, tmp_path, capsys):
    other = write_adapter(tmp_path / "elsewhere" / "car", adapter(2))
    assert main(["inspect", *folders, str(other)]) == 2
    assert "another client's folder is called 'car' too" in error_of(capsys)


def test_compare_prints_the_comparison(folders, capsys):
    assert main(["compare", *folders, "--methods", "rb,flora", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == ["rb", "flora"]
    assert rows["flora"]["relative_distance"] < 1e-6 < rows["rb"]["relative_distance"]
    assert main(["compare", *folders, "--methods", "rb,flora", "--weights", "1,2,3"]) == 0
    assert "distance from exact mean" in capsys.readouterr().out
    assert main(["compare", *folders, "--methods", "rb", "--option", "flor=1"]) == 2
    assert "flor" in error_of(capsys)


def test_inspect_measures_updates_and_names_near_duplicates(folders, tmp_path, capsys):
    copied = write_adapter(tmp_path / "copy", adapter(4, seed=2))
    assert main(["inspect", *folders, str(copied), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nearly_the_same"] == [{"clients": ["phone", "copy"], "cosine": pytest.approx(1)}]
    row = found["adapters"]["car"]["layers"][0]
    sent = read_adapter(folders[0]).factors(LAYERS[0])
    update = 8 * sent.B.double() @ sent.A.double()
    S = torch.linalg.svdvals(update)[:2]
    assert row["size"] == [10, 12]
    assert (row["rank"], row["scaling"], row["dtype"]) == (2, 8.0, "float32")
    assert row["singular_values"] == pytest.approx(S.tolist(), rel=1e-6)
    assert row["norm"] == pytest.approx(float(update.norm()), rel=1e-6)
    p = S.square() / S.square().sum()
    assert row["effective_rank"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-6)
    assert main(["inspect", *folders, str(copied)]) == 0
    text = capsys.readouterr().out
    assert "nearly the same: phone and copy, cosine 1.0000" in text
    assert "effective" in text


def test_a_zero_adapter_can_be_inspected(tmp_path, capsys):
    zero = adapter(2).state_dict()
    zero = {key: torch.zeros_like(X) for key, X in zero.items()}
    made = Adapter.from_state_dict(zero, {"r": 2, "lora_alpha": 4, "peft_type": "LORA"})
    folder = write_adapter(tmp_path / "zero", made)
    assert main(["inspect", str(folder), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["adapters"]["zero"]["layers"][0]
    assert (row["norm"], row["effective_rank"]) == (0.0, 0.0)


# ---- many folders ------------------------------------------------------------------------------


def test_folders_from_a_directory_or_a_list(folders, tmp_path, capsys):
    out = [str(tmp_path / f"global{i}") for i in range(3)]
    clients = tmp_path / "clients"
    clients.mkdir()
    for folder in folders:
        (tmp_path / folder).rename(clients / (tmp_path / folder).name)
    named = sorted(str(path) for path in clients.iterdir())
    (tmp_path / "list.txt").write_text("\n".join(named[::-1]) + "\n\n")
    assert main(["aggregate", *named, "-o", out[0], "--weights", "1,2,3"]) == 0
    assert main(["aggregate", "--from", str(clients), "-o", out[1], "--weights", "1,2,3"]) == 0
    command = ["aggregate", "--from", str(tmp_path / "list.txt"), "-o", out[2]]
    assert main([*command, "--weights", "3,2,1"]) == 0
    assert same(read_adapter(out[0]), read_adapter(out[1]))
    assert same(read_adapter(out[0]), read_adapter(out[2]))
    capsys.readouterr()
    for more, match in (
        ([named[0], "--from", str(clients)], "got both"),
        ([], "got neither"),
        (["--from", str(tmp_path / "nowhere")], "expected a directory or a file"),
    ):
        assert main(["aggregate", *more, "-o", str(tmp_path / "x")]) == 2
        assert match in error_of(capsys)


def test_weights_from_a_file(folders, tmp_path, capsys):
    wanted = aggregate_adapters(folders, [500, 900, 1200.5]).adapter
    numbers = {"tablet": 1200.5, "car": 500, "phone": 900}
    files = {
        "w.json": json.dumps(numbers),
        "w.csv": "".join(f"{name},{value}\n" for name, value in numbers.items()),
        "mark.csv": "\ufeff" + "".join(f"{name},{value}\n" for name, value in numbers.items()),
        "mark.json": "\ufeff" + json.dumps(numbers),
        "head.csv": "client,examples\n" + "".join(f"{k}, {v}\n" for k, v in numbers.items()),
    }
    for i, (name, text) in enumerate(files.items()):
        (tmp_path / name).write_text(text)
        out = tmp_path / f"out{i}"
        assert main(["aggregate", *folders, "-o", str(out), "--weights", str(tmp_path / name)]) == 0
        assert same(read_adapter(out), wanted)
    capsys.readouterr()
    wrong = {
        "a.json": ('{"car": 1, "car": 2}', "'car' is there twice"),
        "b.json": ('{"car": "many"}', "no object of numbers"),
        "c.json": ("[1, 2, 3]", "no object of numbers"),
        "d.json": ('{"car": 1', "Expecting"),
        "e.csv": ("car,1,2\n", "3 columns in 'car,1,2'"),
        "f.csv": ("car,1\nphone,x\n", "could not convert"),
        "g.csv": ("car,1\ncar,2\n", "'car' is there twice"),
        "g.json": (f'{{"car": 1{"0" * 400}}}', "too large"),
        "gg.csv": ("a" * (csv.field_size_limit() + 1) + ",1\n", "field larger than"),
        "h.csv": ("car,1\nphone,2\n", "none for 'tablet'"),
        "i.csv": ("car,1\nphone,2\ntablet,3\nwatch,1\n", "got 'watch' besides"),
        "j.csv": ("car,1\nphone,2\ntablet,nan\n", "client 'tablet': weight"),
    }
    for name, (text, match) in wrong.items():
        (tmp_path / name).write_text(text)
        command = ["aggregate", *folders, "-o", str(tmp_path / "x")]
        with pytest.raises(SystemExit) if name < "h" else nullcontext():
            assert main([*command, "--weights", str(tmp_path / name)]) == 2
        assert match in error_of(capsys), name
    with pytest.raises(SystemExit):
        main(["aggregate", *folders, "-o", "x", "--weights", str(tmp_path / "none.csv")])
    assert "No such file" in error_of(capsys)


def test_a_checkpoint_and_policies(folders, tmp_path, capsys):
    half = tmp_path / "watch"
    half.mkdir()
    again = tmp_path / "again" / "car"
    again.parent.mkdir()
    write_adapter(again, adapter(2, seed=1))
    every = [*folders, str(half), str(again)]
    out = ["-o", str(tmp_path / "out")]
    assert main(["aggregate", *every, *out]) == 2
    assert "watch: no adapter_config.json" in error_of(capsys)
    state = tmp_path / "state"
    command = ["aggregate", *every, *out, "--on-bad-folder", "skip", "--checkpoint", str(state)]
    assert main(command) == 2
    assert "both called 'car' and have the same tensors" in error_of(capsys)
    assert main([*command, "--on-duplicate", "skip", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "excluded 'watch':" in text
    assert "note: " in text
    assert not (tmp_path / "out").exists()
    assert main([*command, "--on-duplicate", "skip", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [who for who, _ in found["excluded"]] == ["watch"]
    assert any("counted once" in note for note in found["notes"])
    assert found["clients"] == ["car", "phone", "tablet"]
    assert not state.exists()
    assert read_adapter(tmp_path / "out").rank(LAYERS[0]) == 8
    for more, match in (
        (["--on-bad-folder", "drop"], "on_bad_folder"),
        (["--on-duplicate", "drop"], "on_duplicate"),
        (["--checkpoint-every", "-1"], "every="),
        (["--method", "median"], "cannot take them one by one"),
    ):
        command = ["aggregate", *folders, *out, "--force", "--checkpoint", str(state), *more]
        assert main(command) == 2
        assert match in error_of(capsys)
        assert not state.exists()


def test_a_bar_for_every_stage(folders, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    command = ["aggregate", *folders, "-o", str(tmp_path / "out")]
    assert main([*command, "--checkpoint", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().err
    assert "folder/s" in said or "s/folder" in said
    assert "client/s" in said or "s/client" in said
    assert said.count("3/3") >= 2


@pytest.fixture
def shelf(folders, tmp_path):
    """The three folders in a directory of their own."""
    clients = tmp_path / "clients"
    clients.mkdir()
    for folder in folders:
        shutil.move(folder, clients)
    return clients


def test_targets_in_the_way_are_refused_before_anything_is_written(shelf, tmp_path, capsys):
    out, new = str(tmp_path / "out"), str(tmp_path / "next")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(shelf / "car")
    before = sorted(shelf.parent.rglob("*"))
    for targets, match in (
        (["-o", str(shelf / "global")], "--out: .*global: is in the directory of --from"),
        (["-o", out, "--per-client-out", str(shelf / "next")], "would count as a client"),
        (["-o", str(shelf / "car"), "--force"], "--out: .*car: is the folder of an input"),
        (["-o", str(tmp_path / "link"), "--force"], "--out: .*link: is the folder of an input"),
        (["-o", out, "--per-client-out", str(shelf), "--force"], "holds the folder of an input"),
        (["-o", str(shelf), "--force"], "holds other folders"),
        (["-o", out, "--per-client-out", out], "--out: .*: is what --per-client-out writes"),
        (["-o", f"{new}/a", "--per-client-out", new], "--out: .*: is in what --per-client-out"),
        (["-o", out, "--per-client-out", f"{out}/a"], "--per-client-out: .*: is in what --out"),
        (["-o", out, "--checkpoint", out], "--out: .*: is what --checkpoint writes"),
        (["-o", str(tmp_path / "file"), "--force"], "--out: .*: is there and no folder"),
        (["-o", out, "--per-client-out", str(tmp_path / "file"), "--force"], "and no folder"),
        (["-o", out, "--checkpoint", str(tmp_path)], "is in what --checkpoint writes"),
        (["-o", f"{out}/a", "--checkpoint", str(shelf)], "checkpoint: .*: is a folder"),
    ):
        for more in ([], ["--dry-run"]) if "checkpoint: " not in match else ([],):
            assert main(["aggregate", "--from", str(shelf), *targets, *more]) == 2, targets
            assert re.search(match, error_of(capsys)), targets
        assert sorted(shelf.parent.rglob("*")) == before
    # Next adapters would take the place of links to the clients.
    links = tmp_path / "links"
    links.mkdir()
    (links / "one").symlink_to(shelf / "car")
    run = ["aggregate", str(links / "one"), "-o", out, "--per-client-out", str(links), "--force"]
    assert main([*run, "--dry-run"]) == 2
    assert "holds the folder of an input" in error_of(capsys)
    # A checkpoint may lie where nobody looks for clients, hidden results too.
    run = ["aggregate", "--from", str(shelf), "--checkpoint", str(shelf / "state")]
    assert main([*run, "-o", str(shelf / ".out")]) == 0
    assert main([*run, "-o", out]) == 0


def test_who_can_be_given_no_adapter_is_found_before_the_global_one_is_written(
    folders, tmp_path, capsys
):
    run = ["-o", str(tmp_path / "out"), "--per-client-out", str(tmp_path / "next")]
    assert main(["aggregate", *folders, *run, "--method", "fedex"]) == 2
    assert "the result has a residual" in error_of(capsys)
    (tmp_path / "car").rename(tmp_path / "c\\ar")
    assert main(["aggregate", str(tmp_path / "c\\ar"), *folders[1:], *run]) == 2
    assert "no name for a folder" in error_of(capsys)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "next").exists()


def test_options_that_are_none_of_a_method(folders, tmp_path, capsys):
    run = ["aggregate", *folders, "-o", str(tmp_path / "out")]
    for name, match in (
        ("checkpoint", "use --checkpoint"), ("paths", "use ADAPTER … or --from"),
        ("weights", "use --weights"), ("method", "use --method"), ("ranks", "use --client-ranks"),
        ("progress", "no option of a method"), ("memory_limit", "use --memory-limit"),
        ("junk", "unknown option of method 'rb' 'junk'"),
    ):  # fmt: skip
        for more in ([], ["--dry-run"]):
            assert main([*run, "--option", f"{name}=1", *more]) == 2
            assert match in error_of(capsys)
    for amount in ("nan", "inf", "-inf", "1e999", "much"):
        with pytest.raises(SystemExit):
            main([*run, f"--memory-limit={amount}"])
        assert "expected a number such as 2e9" in error_of(capsys)
    assert not (tmp_path / "out").exists()
    assert main([*run, "--memory-limit", "2e9", "--option", "max_rank=8", "--dry-run"]) == 0


def test_lists_that_are_no_text(folders, tmp_path, capsys):
    source = tmp_path / "list.txt"
    run = ["aggregate", "--from", str(source), "-o", str(tmp_path / "out")]
    for content, match in (
        (b"phone\ncaf\xe9\n", "expected a text in UTF-8"),
        (b"phone\nc\0ar\n", "line 2: expected a path, got a NUL"),
    ):
        source.write_bytes(content)
        assert main(run) == 2
        assert match in error_of(capsys)
    # Only a new line ends a name, whatever else separates lines.
    odd = tmp_path / "ca\u2028r"
    (tmp_path / "car").rename(odd)
    source.write_text("\ufeff" + "\r\n".join([str(odd), *folders[1:]]), encoding="utf-8")
    assert main([*run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clients"] == ["ca\u2028r", "phone", "tablet"]


def test_a_disk_that_fills_is_one_line(folders, tmp_path, capsys, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("hetlora_agg.adapters.files.save_file", full)
    assert main(["aggregate", *folders, "-o", str(tmp_path / "out")]) == 1
    assert "No space left" in error_of(capsys)
    assert not any("out" in path.name for path in tmp_path.iterdir())


def test_names_that_the_output_cannot_spell(folders, tmp_path, monkeypatch):
    (tmp_path / "car" / "adapter_config.json").unlink()
    (tmp_path / "car").rename(tmp_path / "käfer")
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    run = ["aggregate", str(tmp_path / "käfer"), *folders[1:], "-o", str(tmp_path / "out")]
    assert main([*run, "--on-bad-folder", "skip"]) == 0
    assert b"k\\xe4fer: no adapter_config.json" in stdout.buffer.getvalue()


@pytest.mark.usefixtures("usual_signals")
def test_sigterm_saves_and_cleans_up(folders, tmp_path, capsys, monkeypatch):
    from hetlora_agg.streaming import RunningAggregate

    state, out = tmp_path / "state", tmp_path / "out"
    run = ["aggregate", *folders, "-o", str(out), "--checkpoint", str(state)]
    real = RunningAggregate.add

    def ended(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    for place, held in (("streaming.RunningAggregate.add", 1), ("adapters.files.save_file", 3)):
        with monkeypatch.context() as patched:
            patched.setattr(f"hetlora_agg.{place}", ended)
            assert main(run) == 143
        assert error_of(capsys) == "hetlora-agg: error: terminated"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert len(RunningAggregate.load(state).receipts) == held
        assert not any("part" in path.name or path == out for path in tmp_path.iterdir())
    assert main(run) == 0
    # Somebody else's handler is asked, and what is ignored stays so.
    heard = []
    for handler in (lambda *at: heard.append(at[0]), signal.SIG_IGN):
        before = signal.signal(signal.SIGTERM, handler)
        try:
            with monkeypatch.context() as patched:
                patched.setattr("hetlora_agg.streaming.RunningAggregate.add", ended)
                assert main([*run, "--force"]) == 0
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] * 3
    capsys.readouterr()
