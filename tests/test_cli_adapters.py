"""`hetlora-agg aggregate`, `compare` and `inspect` on adapter folders."""

import json
import re

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
