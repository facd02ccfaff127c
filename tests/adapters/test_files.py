"""Folders: written whole or not at all, read lazily, and every wrong one named."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetlora_agg import InputTypeError, InputValueError
from hetlora_agg.adapters import Adapter, aggregate_adapters, files, read_adapter, write_adapter

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "target_modules": ["q"], "base_model_name_or_path": "tiny"}


def adapter_of(rank=2, seed=0, path="h.0.q", **config):
    g = torch.Generator().manual_seed(seed)
    factors = {
        f"{PREFIX}{path}.lora_A.weight": torch.randn(rank, 5, generator=g),
        f"{PREFIX}{path}.lora_B.weight": torch.randn(6, rank, generator=g),
    }
    return Adapter.from_state_dict(factors, {**CONFIG, "r": rank, "lora_alpha": 4, **config})


@pytest.fixture
def clients(tmp_path):
    return [
        write_adapter(tmp_path / "in" / name, adapter_of(rank, rank))
        for name, rank in (("phone", 2), ("tablet", 3))
    ]


def change(folder, name="adapter_config.json", **fields):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def contents(folder):
    """Every file below, with its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


# ---- writing -----------------------------------------------------------------------------------


def test_a_written_folder_holds_two_files(tmp_path):
    adapter = adapter_of()
    folder = write_adapter(tmp_path / "new" / "place", adapter)
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["place"]
    assert read_adapter(folder).config == adapter.config
    for key, X in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(X, adapter.tensor(key))
    start = (folder / "adapter_model.safetensors").read_bytes()[8:200]
    assert b'"__metadata__":{"format":"pt"}' in start


def test_named_keys_without_prefix_are_written_as_peft_wants_them(tmp_path):
    pair = {"h.q.lora_A.mine.weight": torch.ones(1, 2), "h.q.lora_B.mine.weight": torch.ones(3, 1)}
    adapter = Adapter.from_state_dict(pair, {"r": 1, "lora_alpha": 1})
    folder = write_adapter(tmp_path / "a", adapter)
    assert list(load_file(folder / "adapter_model.safetensors")) == [
        f"{PREFIX}h.q.lora_A.weight",
        f"{PREFIX}h.q.lora_B.weight",
    ]


def test_shared_and_strided_tensors_are_written(tmp_path):
    shared = torch.randn(4, 4)
    pair = {
        "q.lora_A.weight": shared,
        "q.lora_B.weight": shared,
        "v.lora_A.weight": shared.mT,
        "v.lora_B.weight": shared.expand(4, 4),
    }
    folder = write_adapter(tmp_path / "a", Adapter.from_state_dict(pair, {"r": 4, "lora_alpha": 4}))
    found = load_file(folder / "adapter_model.safetensors")
    assert torch.equal(found[f"{PREFIX}v.lora_A.weight"], shared.mT)
    assert torch.equal(found[f"{PREFIX}q.lora_B.weight"], shared)


def test_what_is_there_is_replaced_with_force_only(tmp_path):
    folder = write_adapter(tmp_path / "a", adapter_of(2))
    (folder / "README.md").write_text("a model card")
    before = contents(folder)
    with pytest.raises(InputValueError, match=r"a: is there already; set force"):
        write_adapter(folder, adapter_of(3))
    assert contents(folder) == before
    write_adapter(folder, adapter_of(3), force=True)
    assert read_adapter(folder).rank("h.0.q") == 3
    assert (folder / "README.md").read_text() == "a model card"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_folders_of_others_are_never_replaced(tmp_path):
    folder = write_adapter(tmp_path / "a", adapter_of(2))
    (folder / "checkpoint-100").mkdir()
    with pytest.raises(InputValueError, match=r"holds other folders, 'checkpoint-100'"):
        write_adapter(folder, adapter_of(3), force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputValueError, match="is there and no folder"):
        write_adapter(tmp_path / "file", adapter_of(3), force=True)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("step", ["weights", "config", "flush"])
def test_a_failing_write_leaves_what_was_there(there, step, tmp_path, monkeypatch):
    target = tmp_path / "a"
    if there:
        write_adapter(target, adapter_of(2))
    before = contents(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "weights":
        monkeypatch.setattr(files, "save_file", full)
    elif step == "config":
        monkeypatch.setattr(files.json, "dumps", full)
    else:
        monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(target, adapter_of(3), force=there)
    assert contents(tmp_path) == before
    assert target.exists() is there


def test_a_failing_exchange_puts_the_old_one_back(tmp_path, monkeypatch):
    target = write_adapter(tmp_path / "a", adapter_of(2))
    before = contents(tmp_path)
    real = os.replace

    def second_fails(source, destination):
        if Path(destination) == target and "replaced" not in str(source):
            raise OSError(errno.EIO, "Input/output error")
        real(source, destination)

    monkeypatch.setattr(files.os, "replace", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        write_adapter(target, adapter_of(3), force=True)
    assert contents(tmp_path) == before


KILLED = """
import os, signal, sys
from hetlora_agg.adapters import files, read_adapter, write_adapter
source, target, step = sys.argv[1:]
adapter = read_adapter(source)
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if step == "weights":
    def half(tensors, path, metadata):
        open(path, "wb").write(b"half")
        die()
    files.save_file = half
else:
    files._publish = die
write_adapter(target, adapter, force=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("step", ["weights", "publish"])
def test_killed_while_writing_leaves_the_old_one(step, tmp_path):
    source = write_adapter(tmp_path / "source", adapter_of(3))
    target = write_adapter(tmp_path / "target", adapter_of(2))
    before = contents(target)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(target), step],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(target) == before
    assert all(p.name.startswith(".") for p in tmp_path.iterdir() if p not in (source, target))


def test_clients_are_written_all_or_none(clients, tmp_path, monkeypatch):
    outcome = aggregate_adapters(clients)
    out = tmp_path / "next"
    saved = []
    real = files.save

    def second_fails(folder, adapter):
        saved.append(folder)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, adapter)

    monkeypatch.setattr("hetlora_agg.adapters.outcome.save", second_fails)
    with pytest.raises(OSError, match="No space"):
        outcome.write_clients(out)
    assert not out.exists()
    monkeypatch.undo()
    outcome.write_clients(out)
    before = contents(out)
    saved.clear()
    changed = aggregate_adapters(clients, [1, 9])
    monkeypatch.setattr("hetlora_agg.adapters.outcome.save", second_fails)
    with pytest.raises(OSError, match="No space"):
        changed.write_clients(out, force=True)
    assert contents(out) == before
    monkeypatch.undo()
    with pytest.raises(InputValueError, match=r"tablet: is there already|phone: is there already"):
        changed.write_clients(out)
    changed.write_clients(out, force=True)
    assert contents(out).keys() == before.keys()
    assert contents(out) != before


def test_two_clients_of_one_folder_name_are_refused(tmp_path, clients):
    outcome = aggregate_adapters({1: clients[0], "1": clients[1]})
    with pytest.raises(InputValueError, match="clients 1 and '1': both have the folder '1'"):
        outcome.write_clients(tmp_path / "next")
    assert not (tmp_path / "next").exists()


def test_a_link_is_called_by_its_own_name(tmp_path, clients):
    links = [tmp_path / name for name in ("one", "two")]
    for link, folder in zip(links, clients, strict=True):
        link.symlink_to(folder)
    assert list(aggregate_adapters(links).clients) == ["one", "two"]


def test_an_empty_folder_for_clients_needs_force_too(clients, tmp_path):
    outcome = aggregate_adapters(clients)
    (tmp_path / "next").mkdir()
    with pytest.raises(InputValueError, match=r"next: is there already"):
        outcome.write_clients(tmp_path / "next")
    written = outcome.write_clients(tmp_path / "next", force=True)
    assert [read_adapter(folder).rank("h.0.q") for folder in written] == [2, 3]


def test_inputs_are_never_written_over(clients, tmp_path):
    before = contents(tmp_path)
    outcome = aggregate_adapters(clients)
    (tmp_path / "link").symlink_to(clients[0])
    for out in (clients[0], tmp_path / "link", clients[0].parent / ".." / "in" / "phone"):
        with pytest.raises(InputValueError, match=r"is the folder of an input.*choose another"):
            outcome.write(out, force=True)
    with pytest.raises(InputValueError, match=r"phone: is the folder of an input"):
        outcome.write_clients(clients[0].parent, force=True)
    with pytest.raises(InputValueError, match="holds other folders"):
        outcome.write(clients[0].parent, force=True)
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("id", ["..", "a/b", "", "a\\b", "."])
def test_ids_lead_nowhere_else(id, clients, tmp_path):
    outcome = aggregate_adapters({id: clients[0], "tablet": clients[1]})
    with pytest.raises(InputValueError, match="no name for a folder"):
        outcome.write_clients(tmp_path / "next")
    assert outcome.client(id).rank("h.0.q") == 2


def test_without_a_config_nothing_can_be_written(tmp_path):
    pair = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(3, 1)}
    adapter = Adapter.from_state_dict(pair, scalings=2.0)
    with pytest.raises(InputValueError, match=r"no config to write.*configs= instead of scalings="):
        write_adapter(tmp_path / "a", adapter)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputTypeError, match=r"expected an Adapter, got dict.*from_state_dict"):
        write_adapter(tmp_path / "a", pair)


# ---- reading -----------------------------------------------------------------------------------


def test_reading_a_folder_reads_no_tensor(clients):
    loads = []
    adapter = read_adapter(clients[1])
    real = adapter._tensors.load
    object.__setattr__(
        adapter._tensors, "load", lambda key, rows: (loads.append(key), real(key, rows))[1]
    )
    assert adapter.rank("h.0.q") == 3
    assert adapter.scaling("h.0.q") == 4 / 3
    assert repr(adapter) == "Adapter(1 layers, ranks 3)"
    assert adapter.info(f"{PREFIX}h.0.q.lora_A.weight") == ((3, 5), torch.float32)
    assert loads == []
    adapter.update("h.0.q")
    assert loads == [f"{PREFIX}h.0.q.lora_A.weight", f"{PREFIX}h.0.q.lora_B.weight"]


def test_links_to_files_are_read(clients, tmp_path):
    # A hub's cache is made of them.
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in clients[0].iterdir():
        (folder / file.name).symlink_to(file)
    assert read_adapter(folder).rank("h.0.q") == 2


def test_a_pipe_or_folder_is_no_weights_file(clients):
    weights = clients[0] / "adapter_model.safetensors"
    weights.unlink()
    weights.mkdir()
    with pytest.raises(InputValueError, match="is no regular file"):
        read_adapter(clients[0])
    weights.rmdir()
    os.mkfifo(weights)
    with pytest.raises(InputValueError, match="is no regular file"):
        read_adapter(clients[0])


def replace_weights(change_bytes):
    def spoil(folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(change_bytes(path.read_bytes()))

    return spoil


def resave(change_tensors):
    def spoil(folder):
        path = folder / "adapter_model.safetensors"
        tensors = {k: X.clone() for k, X in load_file(path).items()}
        path.unlink()
        change_tensors(tensors)
        save_file(tensors, path)

    return spoil


def only_pickle(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


A, B = f"{PREFIX}h.0.q.lora_A.weight", f"{PREFIX}h.0.q.lora_B.weight"
SPOILED = {
    "no folder": (shutil.rmtree, r"tablet: no such folder.*save_pretrained"),
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(),
        r"tablet: no adapter_config.json; without it rank.*Copy it",
    ),
    "no JSON": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        r"tablet.adapter_config.json: no JSON",
    ),
    "no object": (
        lambda f: (f / "adapter_config.json").write_text("[1]"),
        r"expected a JSON object, got list",
    ),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        r"tablet: no adapter_model.safetensors; save with model.save_pretrained",
    ),
    "pickle only": (only_pickle, r"only 'adapter_model.bin': a pickle can run.*convert it"),
    "a pickle under its name": (
        replace_weights(lambda raw: b"PK\x03\x04" + raw),
        r"adapter_model.safetensors is no intact .*pickle under another name",
    ),
    "truncated": (
        replace_weights(lambda raw: raw[:-5]),
        r"no intact safetensors.*send or download",
    ),
    "empty": (replace_weights(lambda raw: b""), r"no intact safetensors.*header too small"),
    "trailing bytes": (replace_weights(lambda raw: raw + b"more"), r"no intact safetensors"),
    "header too large": (replace_weights(lambda raw: b"\xff" * 64), r"no intact safetensors"),
    "unknown key": (
        resave(lambda t: t.update({f"{PREFIX}h.0.q.lora_C.weight": torch.ones(2)})),
        r"tablet: 1 keys are no part of a LoRA adapter: '.*lora_C.weight'",
    ),
    "base weights": (
        resave(lambda t: t.update({f"{PREFIX}h.{i}.mlp.weight": torch.ones(2) for i in range(7)})),
        r"7 keys are no part .*mlp.weight'.* and 2 more; pass get_peft_model_state_dict",
    ),
    "A without B": (resave(lambda t: t.pop(B)), r"layer 'h.0.q': expected lora_A and lora_B.*only"),
    "no factors": (
        resave(lambda t: (t.clear(), t.update({f"{PREFIX}lm_head.weight": torch.ones(2, 2)}))),
        r"tablet: no LoRA factors among 1 keys",
    ),
    "bias without lora_bias": (
        resave(lambda t: t.update({f"{PREFIX}h.0.q.lora_B.bias": torch.ones(6)})),
        r"lora_B.bias' do not fit lora_bias=None",
    ),
    "magnitudes without DoRA": (
        resave(lambda t: t.update({f"{PREFIX}h.0.q.lora_magnitude_vector": torch.ones(6)})),
        r"lora_magnitude_vector' do not fit use_dora=None",
    ),
    "DoRA without magnitudes": (
        lambda f: change(f, use_dora=True),
        r"use_dora is set, but these layers have no magnitudes: 'h.0.q'",
    ),
    "bias of no layer": (
        resave(lambda t: t.update({f"{PREFIX}h.9.q.lora_B.bias": torch.ones(6)})),
        r"no factors belong to '.*h.9.q.lora_B.bias'",
    ),
    "integers": (resave(lambda t: t.update({A: t[A].int()})), r"lora_A.weight': expected float16"),
    "one dimension": (
        resave(lambda t: t.update({A: t[A][0]})),
        r"got \(5,\).*before it was gathered",
    ),
    "ranks of A and B": (
        resave(lambda t: t.update({B: t[B][:, :2].clone(memory_format=torch.contiguous_format)})),
        r"A \(3, 5\) has rank 3, B \(6, 2\) has rank 2; check which",
    ),
    "grouped convolution": (
        resave(lambda t: t.update({A: torch.ones(4, 3, 3, 3), B: torch.ones(6, 2, 1, 1)})),
        r"it is a grouped convolution.*leave it out of target_modules",
    ),
    "rank of the config": (
        lambda f: change(f, r=8),
        r"layer 'h.0.q': the config says rank 8 .*A \(3, 5\) has 3 rows.*rank_pattern included",
    ),
    "no r": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 1}'),
        r"tablet: the adapter's config has no 'r'",
    ),
    "no peft_type": (
        lambda f: (f / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 1}'),
        r"adapter_config.json: no peft_type",
    ),
    "another type": (lambda f: change(f, peft_type="IA3"), r"expected peft_type 'LORA', got 'IA3'"),
    "PiSSA": (
        lambda f: change(f, init_lora_weights="pissa_niter_4"),
        r"init_lora_weights='pissa_niter_4'.*path_initial_model_for_weight_conversion",
    ),
    "EVA": (lambda f: change(f, init_lora_weights="eva"), r"set init_lora_weights to true"),
    "LoftQ": (lambda f: change(f, init_lora_weights="loftq"), r"quantised.*common quantised base"),
    "unknown start": (lambda f: change(f, init_lora_weights="mica"), r"is not known here"),
    "aLoRA": (
        lambda f: change(f, alora_invocation_tokens=[1, 2]),
        r"alora_invocation_tokens=\[1, 2\]",
    ),
    "unknown field": (lambda f: change(f, new_variant={"x": 0}), r"new_variant=.*set it to null"),
    "experts": (lambda f: change(f, target_parameters=["w"]), r"target_parameters=\['w'\]"),
    "alpha": (
        lambda f: change(f, lora_alpha=0),
        r"tablet: lora_alpha: expected a finite number > 0",
    ),
    "r": (lambda f: change(f, r="3"), r"tablet: r: expected an integer of at least 1, got '3'"),
    "a pattern": (lambda f: change(f, rank_pattern={"(": 3}), r"rank_pattern\['\('\]: no regular"),
    "a pattern's rank": (
        lambda f: change(f, rank_pattern={"q": 0}),
        r"rank_pattern\['q'\]: expected",
    ),
    "a pattern's alpha": (
        lambda f: change(f, alpha_pattern={"q": -1}),
        r"alpha_pattern\['q'\]: exp",
    ),
    "patterns": (lambda f: change(f, alpha_pattern=[1]), r"alpha_pattern: expected a dict, got"),
    "sizes": (
        resave(lambda t: t.update({A: torch.ones(3, 7)})),
        r"layer 'h.0.q': expected A \(rank, \*\(5,\)\).*got A \(rank, \*\(7,\)\).*share its base",
    ),
    "layers": (
        resave(lambda t: t.update({k.replace("h.0", "h.1"): t.pop(k) for k in (A, B)})),
        r"tablet: has no layer 'h.0.q', which others have",
    ),
    "NaN": (
        resave(lambda t: t[A].fill_(torch.nan)),
        r"'tablet'.*layer 'h.0.q', lora_A: 15 NaN or Inf entries.*on_bad_client",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_folder_is_named_with_what_is_wrong(kind, clients, tmp_path):
    spoil, message = SPOILED[kind]
    third = write_adapter(tmp_path / "in" / "laptop", adapter_of(4, 4))
    spoil(clients[1])
    before = contents(tmp_path)
    with pytest.raises((InputValueError, InputTypeError), match="(?s)" + message) as caught:
        aggregate_adapters([clients[0], clients[1], third])
    assert "tablet" in str(caught.value)
    assert contents(tmp_path) == before


ARGUMENTS = {
    "no paths": (lambda p: ([],), {}, "no client adapters"),
    "one path": (lambda p: (p[0],), {}, "got one path"),
    "a path twice": (lambda p: ([p[0], p[1], p[0]],), {}, "phone is given twice"),
    "a path by two names": (lambda p: ({"a": p[0], "b": p[0]},), {}, "'a' and 'b' have one folder"),
    "no path": (lambda p: ([p[0], 3],), {}, "expected the path of a folder, got int"),
    "too few weights": (lambda p: (p, [1]), {}, "weights: expected one for each of 2 .*got 1"),
    "a negative weight": (lambda p: (p, [1, -1]), {}, "client 'tablet': weight: expected .*-1"),
    "a weight that is none": (lambda p: (p, [1, float("nan")]), {}, "client 'tablet': weight"),
    "a weight for nobody": (lambda p: (p, {"phone": 1, "x": 2}), {}, "none for 'tablet'"),
    "one weight too many": (
        lambda p: (p, {"phone": 1, "tablet": 2, "x": 2}),
        {},
        "got 'x' besides",
    ),
    "all weights zero": (lambda p: (p, [0, 0]), {}, "every one has weight 0"),
    "weights as text": (lambda p: (p, "12"), {}, "weights: expected a list"),
    "too few ranks": (lambda p: (p,), {"ranks": [2]}, "ranks: expected one for each"),
    "rank zero": (lambda p: (p,), {"ranks": [2, 0]}, "client 'tablet': rank: expected an integer"),
    "missing": (lambda p: (p,), {"missing": "zeros"}, "unknown missing= 'zeros'; did you mean"),
    "dora": (lambda p: (p,), {"dora": "drop"}, "unknown dora="),
    "method": (lambda p: (p, None, "rbb"), {}, "unknown method 'rbb'"),
    "option": (lambda p: (p,), {"quorums": 2}, "unknown option of method 'rb' 'quorums'"),
    "on_bad_client": (lambda p: (p,), {"on_bad_client": "keep"}, "unknown on_bad_client="),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_a_wrong_argument_is_named(kind, clients):
    arguments, options, message = ARGUMENTS[kind]
    with pytest.raises((InputValueError, InputTypeError), match=message):
        aggregate_adapters(*arguments(clients), **options)


def test_folders_of_one_name_need_ids(tmp_path):
    folders = [
        write_adapter(tmp_path / owner / "adapter", adapter_of(2, k))
        for k, owner in enumerate(("ann", "bob"))
    ]
    with pytest.raises(InputValueError, match=r"both called 'adapter'; pass a mapping of ids"):
        aggregate_adapters(folders)
    outcome = aggregate_adapters(dict(zip(("ann", "bob"), folders, strict=True)))
    assert list(outcome.clients) == ["ann", "bob"]
    with pytest.raises(InputValueError, match=r"no client 'eve'; there are \['ann', 'bob'\]"):
        outcome.client("eve")


def test_other_base_models_are_noted(clients):
    change(clients[1], base_model_name_or_path="another")
    outcome = aggregate_adapters(clients)
    assert outcome.notes == (
        "base_model_name_or_path differs: 'tiny', 'another'; the first client's is written",
    )
    assert "note: base_model" in outcome.summary()
    assert outcome.adapter.config["base_model_name_or_path"] == "tiny"


def test_base_tensors_must_be_equal(tmp_path):
    key = f"{PREFIX}embed_tokens.base_layer.weight"
    sent = []
    for k in range(2):
        adapter = adapter_of(2, k)
        tensors = {**adapter.state_dict(), key: torch.ones(3, 3, dtype=torch.bfloat16)}
        sent.append(Adapter.from_state_dict(tensors, adapter.config))
    folders = [write_adapter(tmp_path / name, a) for name, a in zip("ab", sent, strict=True)]
    outcome = aggregate_adapters(folders)
    assert torch.equal(outcome.adapter.tensor(key), torch.ones(3, 3, dtype=torch.bfloat16))
    resave(lambda t: t[key].mul_(2))(folders[1])
    with pytest.raises(InputValueError, match=r"a tensor of the base model.*b'.*modules_to_save"):
        aggregate_adapters(folders)


def test_shapes_of_saved_modules_must_be_equal(tmp_path):
    key = f"{PREFIX}score.weight"
    folders = []
    for k, size in enumerate((3, 4)):
        adapter = adapter_of(2, k, modules_to_save=["score"])
        tensors = {**adapter.state_dict(), key: torch.ones(size)}
        folders.append(
            write_adapter(tmp_path / str(k), Adapter.from_state_dict(tensors, adapter.config))
        )
    with pytest.raises(InputValueError, match=r"'score.weight' has shape \(4,\), \(3,\) at"):
        aggregate_adapters(folders)
    change(folders[0], modules_to_save=None)
    with pytest.raises(InputValueError, match="1 keys are no part"):
        aggregate_adapters(folders)
