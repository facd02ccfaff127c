"""Any number of folders: the same answer, half-written ones and duplicates named, resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from folders import CONFIG, WEIGHTS, contents, many, written
from hetlora_agg import METHODS as entries
from hetlora_agg.adapters import Adapter, aggregate_adapters, read_adapter, roll
from hetlora_agg.adapters.calling import call_roll
from hetlora_agg.cli import main
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.robustness import geomed
from hetlora_agg.streaming import RunningAggregate, aggregate_folders, choosing, resuming

COUNT = 30


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A directory of folders that no test changes, and weights."""
    root = tmp_path_factory.mktemp("shelf") / "clients"
    return root, many(root, COUNT, head=True)


@pytest.fixture
def place(tmp_path):
    """Nine folders of its own."""
    root = tmp_path / "clients"
    many(root, 9)
    return root


def total(result):
    whole = result.total().torch()
    return whole.B.double().numpy() @ whole.A.double().numpy()


def assert_near(found, wanted):
    """The same factors but for rounding on either way, everything besides bit for bit."""
    assert list(found.results) == list(wanted.results)
    for layer, result in wanted.results.items():
        X, Y = total(found.results[layer]), total(result)
        assert np.linalg.norm(X - Y) <= 1e-5 * np.linalg.norm(Y)
        assert found.results[layer].nested == result.nested
    assert list(found.extras) == list(wanted.extras)
    for name, (_, value) in wanted.extras.items():
        assert torch.equal(found.extras[name][1], value)
    assert found.adapter.config == wanted.adapter.config
    assert list(found.clients) == list(wanted.clients)
    assert found.notes == wanted.notes


METHODS = [
    ("rb", {}), ("rb", {"floor": 0.5, "weight_cap": 0.1}), ("hetlora", {}),
    ("flexlora", {"rank": 4}), ("zeropad", {}), ("rbla", {"quorum": 3}), ("raflora", {}),
    ("fedex", {}), ("replicate", {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_one_after_the_other_is_all_at_once(method, options, shelf, tmp_path):
    root, weights = shelf
    wanted = aggregate_adapters(sorted(root.iterdir()), weights, method, **options)
    seen = []
    found = aggregate_folders(
        root, weights, method, checkpoint=tmp_path / "s", progress=lambda *at: seen.append(at),
        **options,
    )  # fmt: skip
    assert_near(found, wanted)
    assert seen == [(stage, k + 1, COUNT) for stage in ("folders", "clients") for k in range(COUNT)]
    held = RunningAggregate.load(tmp_path / "s")
    assert held._state.kept is None
    assert (held._settings.roster is None) == (method not in ("rb", "raflora"))


@pytest.mark.parametrize("method", ["rb", "hetlora"])
def test_in_any_order_the_same_bits(method, tmp_path):
    # In float32 the order of sums in float64 would not show.
    root = tmp_path / "clients"
    weights = many(root, 12, head=True, dtype=torch.float64)
    paths = sorted(root.iterdir())
    found = []
    for i, order in enumerate((paths, paths[::-1], paths[7:] + paths[:7])):
        out = aggregate_folders(order, weights, method, checkpoint=tmp_path / f"s{i}")
        assert list(out.clients) == [path.name for path in order]
        found.append(out)
    for other in found[1:]:
        for layer, result in found[0].results.items():
            assert torch.equal(other.results[layer].A, result.A)
            assert torch.equal(other.results[layer].B, result.B)
        for name, (_, value) in found[0].extras.items():
            assert torch.equal(other.extras[name][1], value)


def test_what_fits_goes_at_once_bit_for_bit(shelf, monkeypatch):
    root, weights = shelf
    wanted = aggregate_adapters(sorted(root.iterdir()), weights)
    seen = []
    found = aggregate_folders(root, weights, progress=lambda *at: seen.append(at[0]))
    assert list(dict.fromkeys(seen)) == ["folders", "layers"]
    for layer, result in wanted.results.items():
        assert torch.equal(found.results[layer].A, result.A)
        assert torch.equal(found.results[layer].B, result.B)
    # Once it does not fit the sums are taken, unless they are larger still.
    monkeypatch.setattr(choosing, "WHOLE", 100)
    monkeypatch.setattr(choosing, "GROUP_BYTES", 100)
    for smaller, stages in ((1, ["folders", "clients"]), (10**9, ["folders", "layers"])):
        monkeypatch.setattr(choosing, "sums_bytes", lambda *_, n=smaller: n)
        seen.clear()
        assert_near(
            aggregate_folders(root, weights, progress=lambda *at: seen.append(at[0])), wanted
        )
        assert list(dict.fromkeys(seen)) == stages
    seen.clear()
    aggregate_folders(root, weights, "median", progress=lambda *at: seen.append(at[0]))
    assert list(dict.fromkeys(seen)) == ["folders", "layers"]


def test_when_sums_are_smaller(shelf, monkeypatch):
    root, _ = shelf
    told = {
        "missing": "error", "dora": "error", "memory_limit": None, "max_rank": None,
        "on_bad_client": "error",
    }  # fmt: skip
    called = call_roll(root, None, None, "error", "error", None)
    # Two layers of 7 x 6; 30 clients of rank 2, 4, 8 in turns have 140 components.
    waiting = 2 * 64 * 8 * (7 + 6 + 1)
    everybody = 2 * 4 * 13 * 140
    assert choosing.components_of(called) == {"h.0.q": 140, "h.1.q": 140}
    for name, numbers in (("flexlora", 42), ("zeropad", 8 * 13)):
        found = choosing.sums_bytes(entries[name], {}, told, called)
        assert found == min(everybody, 2 * 8 * numbers + waiting)
    assert not choosing.streams(entries["rb"], {}, told, called)
    assert choosing.streams(entries["rb"], {}, told | {"memory_limit": everybody - 1}, called)
    assert not choosing.streams(entries["rb"], {}, told | {"memory_limit": everybody}, called)
    assert not choosing.streams(entries["median"], {}, told | {"memory_limit": 1}, called)
    # Layer by layer half of it is enough, unless a client's part depends on all its layers.
    monkeypatch.setattr(choosing, "GROUP_BYTES", 1)
    half = told | {"memory_limit": everybody * 3 // 4}
    assert not choosing.streams(entries["rb"], {}, half, called)
    assert choosing.streams(entries["rb"], {}, half | {"on_bad_client": "drop"}, called)
    assert choosing.streams(entries["hetlora"], {}, half, called)


def test_a_limit_on_memory_truncates_the_sums(shelf):
    root, weights = shelf
    found = aggregate_folders(root, weights, "flexlora", memory_limit=9_000, rank=2)
    assert any("the sum was truncated" in note for note in found.notes)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {}),
        ("median", {}),
        ("fedhl", {"previous": None}),
        ("flora", {"weighting": geomed()}),
    ],
)
def test_who_cannot_stream_takes_no_checkpoint(method, options, place, tmp_path):
    seen = []
    with pytest.raises(InputValueError, match=r"cannot take (clients|them) one by"):
        aggregate_folders(
            place, None, method, checkpoint=tmp_path / "s", progress=lambda *at: seen.append(at),
            **options,
        )  # fmt: skip
    # Said before ten thousand headers are read.
    assert not seen
    assert not (tmp_path / "s").exists()


def test_clients_get_theirs_back(shelf, tmp_path):
    root, weights = shelf
    ranks = [1 + k % 4 for k in range(COUNT)]
    wanted = aggregate_adapters(sorted(root.iterdir()), weights, "rb", ranks=ranks)
    found = aggregate_folders(root, weights, "rb", ranks=ranks, checkpoint=tmp_path / "s")
    found.write(tmp_path / "out")
    assert (tmp_path / "out" / CONFIG).read_text()
    paths = found.write_clients(tmp_path / "next")
    assert [p.name for p in paths] == list(weights)
    for path, rank in zip(paths, ranks, strict=True):
        own, other = read_adapter(path), wanted.client(path.name)
        assert {own.rank(layer) for layer in own.layers} == {rank}
        assert own.config == other.config
        for key, X in other.state_dict().items():
            assert torch.equal(own.tensor(key), X) or "lora" in key
    assert "10x2, 10x4, 10x8" in found.summary()
    assert found.to_dict()["layers"][0]["ranks"] == [(2, 4, 8)[k % 3] for k in range(COUNT)]
    with pytest.raises(InputValueError, match="is the folder of an input"):
        found.write(root / "c003", force=True)
    with pytest.raises(InputValueError, match="is the folder of an input"):
        found.write_clients(root, force=True)


def test_layers_that_some_lack(tmp_path):
    for k in range(9):
        written(tmp_path / "clients" / f"c{k}", k, layers=1 if k == 4 else 2)
    paths = sorted((tmp_path / "clients").iterdir())
    for missing in ("zero", "renormalise"):
        for method, options in (("rb", {"floor": 0.2}), ("flexlora", {})):
            wanted = aggregate_adapters(paths, None, method, missing=missing, **options)
            found = aggregate_folders(
                paths, None, method, missing=missing, checkpoint=tmp_path / missing, **options
            )
            assert_near(found, wanted)
            os.unlink(tmp_path / missing)
    with pytest.raises(InputValueError, match=r"c4: has no layer 'h.1.q'"):
        aggregate_folders(paths, checkpoint=tmp_path / "s")


# ---- half-written -------------------------------------------------------------------------------


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def rename(folder):
    folder.rename(folder.with_name(f".{folder.name}.x1.part"))


BAD = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no adapter_config.json"),
    "no tensors": (lambda f: (f / WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "no tensors yet": (
        lambda f: (f / WEIGHTS).rename(f / f"{WEIGHTS}.part"), "no adapter_model.safetensors"),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], "no adapter_config.json"),
    "half a file": (truncate, "no intact safetensors file"),
    "no bytes": (lambda f: (f / WEIGHTS).write_bytes(b""), "no intact safetensors file"),
    "no bytes of config": (lambda f: (f / CONFIG).write_bytes(b""), "no JSON"),
    "half a config": (lambda f: (f / CONFIG).write_text('{"r": 2, "lora'), "no JSON"),
    "another config": (
        lambda f: (f / CONFIG).write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 8}'),
        "the config says rank 3"),
    "left over": (rename, "a transfer that did not end"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("method", ["rb", "flexlora"])
def test_half_written_folders_are_named_or_skipped(kind, method, place, tmp_path):
    spoil, match = BAD[kind]
    spoil(place / "c004")
    wanted = aggregate_adapters([place / f"c00{k}" for k in range(9) if k != 4], None, method)
    for checkpoint in (None, tmp_path / "s"):
        with pytest.raises(InputValueError, match=match) as refusal:
            aggregate_folders(place, None, method, checkpoint=checkpoint)
        assert "c004" in str(refusal.value)
        assert not (tmp_path / "s").exists()
        found = aggregate_folders(place, None, method, checkpoint=checkpoint, on_bad_folder="skip")
        assert_near(found, wanted)
        ((who, why),) = found.excluded
        assert "c004" in who
        assert match in why
        assert f"excluded {who!r}" in found.summary()


def test_nobody_left(place):
    for k in range(9):
        (place / f"c00{k}" / CONFIG).unlink()
    with pytest.raises(InputValueError, match=r"none of 9 folders is whole; the first: .*c000"):
        aggregate_folders(place, on_bad_folder="skip")
    with pytest.raises(InputValueError, match="no client adapters"):
        aggregate_folders([])
    with pytest.raises(InputValueError, match="no such folder of clients' folders"):
        aggregate_folders(place / "nowhere")


def test_what_lies_beside_the_clients(place, tmp_path):
    (place / "README.md").write_text("clients")
    (place / ".cache").mkdir()
    assert len(aggregate_folders(place).clients) == 9
    (place / "c009.tmp").write_bytes(b"half")
    with pytest.raises(InputValueError, match=r"c009\.tmp: its name is that of a transfer"):
        aggregate_folders(place)
    found = aggregate_folders(place, on_bad_folder="skip")
    assert [who for who, _ in found.excluded] == ["c009.tmp"]
    (place / "c009.tmp").unlink()
    # What a killed process leaves of its checkpoint beside it.
    (place / ".state.part").write_bytes(b"half")
    assert len(aggregate_folders(place, checkpoint=place / "state").clients) == 9
    # A target that is out of reach is a client that did not come, not one that is not there.
    for link, target in (("c010", tmp_path / "gone"), ("c011", "c011")):
        (place / link).symlink_to(target)
        with pytest.raises(InputValueError, match=f"{link}: no such folder"):
            aggregate_folders(place)
        found = aggregate_folders(place, on_bad_folder="skip")
        assert len(found.excluded) == 1
        assert len(found.clients) == 9
        (place / link).unlink()


def test_a_folder_that_changes_between_the_passes(place, monkeypatch, tmp_path):
    def stage(*at):
        if at == ("folders", 9, 9):
            shutil.rmtree(place / "c004")

    kept = tmp_path / "kept"
    shutil.copytree(place, kept)
    wanted = aggregate_adapters([place / f"c00{k}" for k in range(9) if k != 4], None, "flexlora")
    found = aggregate_folders(
        place, None, "flexlora", checkpoint=tmp_path / "s", progress=stage, on_bad_folder="skip"
    )
    for layer, result in wanted.results.items():
        assert np.allclose(total(found.results[layer]), total(result), atol=1e-5)
    assert list(found.clients) == list(wanted.clients)
    assert found.excluded[0][0] == "c004"
    shutil.copytree(kept / "c004", place / "c004")
    with pytest.raises(InputValueError, match="c004: no such folder"):
        aggregate_folders(place, checkpoint=tmp_path / "t", progress=stage, on_bad_folder="skip")
    shutil.copytree(kept / "c004", place / "c004")

    def touch(*at):
        if at == ("folders", 9, 9):
            os.utime(place / "c004" / WEIGHTS, ns=(1, 1))

    with pytest.raises(InputValueError, match="c004: changed while"):
        aggregate_folders(place, checkpoint=tmp_path / "u", progress=touch)


@pytest.mark.parametrize("method", ["rb", "flexlora", "hetlora"])
@pytest.mark.parametrize("what", ["factor", "head", "rank"])
def test_bad_clients_by_policy(method, what, tmp_path):
    root = tmp_path / "clients"
    weights = many(root, 9, head=True)
    told = {"max_rank": 8} if what == "rank" else {}
    if what == "rank":
        shutil.rmtree(root / "c004")
        written(root / "c004", 4, rank=9, head=True)
    else:
        path = root / "c004" / WEIGHTS
        tensors = read_adapter(root / "c004").state_dict()
        key = next(k for k in tensors if ("score" in k) == (what == "head"))
        tensors[key] = torch.full_like(tensors[key], float("nan"))
        save_file(tensors, path, metadata={"format": "pt"})
    paths = sorted(root.iterdir())
    wanted = aggregate_adapters(paths, weights, method, on_bad_client="drop", **told)
    with pytest.raises(InputValueError, match="rank 9" if what == "rank" else "NaN or Inf"):
        aggregate_folders(paths, weights, method, checkpoint=tmp_path / "s", **told)
    (tmp_path / "s").unlink(missing_ok=True)
    found = aggregate_folders(
        paths, weights, method, checkpoint=tmp_path / "s", on_bad_client="drop", **told
    )
    assert_near(found, wanted)
    assert [who for who, _ in found.excluded] == [who for who, _ in wanted.excluded] == ["c004"]


# ---- duplicates ---------------------------------------------------------------------------------


def copy(place, source, target):
    shutil.copytree(place / source, target)
    return target


def test_the_same_folder_twice(place, tmp_path):
    paths = [*sorted(place.iterdir()), place / "c001" / ".." / "c003"]
    with pytest.raises(InputValueError, match="c003 is given twice"):
        aggregate_folders(paths)
    with pytest.raises(InputValueError, match="c003 is given twice"):
        aggregate_folders(paths, on_duplicate="keep")
    with pytest.raises(InputValueError, match="for 'a' and 'b'"):
        aggregate_folders({"a": place / "c001", "b": place / "c001"})
    found = aggregate_folders(paths, [1.0] * 9 + [5.0], on_duplicate="skip")
    assert_near(found, aggregate_adapters(paths[:9])) if not found.notes else None
    assert any("given twice, counted once" in note for note in found.notes)
    assert len(found.clients) == 9


def test_a_link_is_called_by_its_own_name(tmp_path, monkeypatch):
    for k, name in enumerate(("phone", "tablet")):
        written(tmp_path / "store" / str(k) / "adapter", k)
        (tmp_path / "clients").mkdir(exist_ok=True)
        (tmp_path / "clients" / name).symlink_to(tmp_path / "store" / str(k) / "adapter")
    weights = {"tablet": 3.0, "phone": 1.0}
    found = aggregate_folders(tmp_path / "clients", weights, "flexlora", rank="full")
    assert list(found.clients) == ["phone", "tablet"]
    real = {name: tmp_path / "store" / str(k) / "adapter" for k, name in enumerate(found.clients)}
    wanted = aggregate_adapters(real, weights, "flexlora", rank="full")
    assert_near(found, wanted)
    # What is named by the way to it alone is called what it is.
    monkeypatch.chdir(tmp_path / "store" / "0" / "adapter")
    assert list(aggregate_folders(["."]).clients) == ["adapter"]
    assert list(aggregate_folders(["../../1/adapter/."]).clients) == ["adapter"]
    (tmp_path / "store" / "0" / "adapter" / "deeper").mkdir()
    assert list(aggregate_folders(["deeper/.."]).clients) == ["adapter"]
    for paths in (["a\0b"], {"phone": "a\0b"}):
        with pytest.raises(InputValueError, match="expected a path, got a NUL"):
            aggregate_folders(paths, on_bad_folder="skip")


def test_two_folders_of_one_name(place, tmp_path):
    paths = [*sorted(place.iterdir()), copy(place, "c003", tmp_path / "again" / "c003")]
    with pytest.raises(InputValueError, match="both called 'c003' and have the same tensors"):
        aggregate_folders(paths)
    found = aggregate_folders(paths, on_duplicate="skip")
    assert any("the same as" in note for note in found.notes)
    assert len(found.clients) == 9
    paths[-1] = written(tmp_path / "other" / "c003", 77, rank=2)
    for policy in ("error", "skip", "keep"):
        with pytest.raises(InputValueError, match="both called 'c003' and differ"):
            aggregate_folders(paths, on_duplicate=policy)
    # One that is not whole is no rival.
    (paths[-1] / CONFIG).unlink()
    found = aggregate_folders(paths, on_bad_folder="skip")
    assert [who for who, _ in found.excluded] == [str(paths[-1])]
    assert "c003" in found.clients


@pytest.mark.parametrize("checkpoint", [False, True])
def test_equal_tensors_under_two_names(place, tmp_path, checkpoint):
    told = {"checkpoint": tmp_path / "s"} if checkpoint else {}
    copy(place, "c002", place / "z")
    copy(place, "c002", place / "zz")
    # The beginning and the end alone are not all of it.
    with pytest.raises(InputValueError, match="clients 'c002' and 'z' have the same tensors"):
        aggregate_folders(place, **told)
    wanted = aggregate_adapters([place / f"c00{k}" for k in range(9)])
    found = aggregate_folders(place, on_duplicate="skip", **told)
    assert_near(found, wanted)
    assert [who for who, _ in found.excluded] == ["z", "zz"]
    assert all("tensors are those of client 'c002'" in why for _, why in found.excluded)
    (tmp_path / "s").unlink(missing_ok=True)
    kept = aggregate_folders(place, on_duplicate="keep", **told)
    assert_near(kept, aggregate_adapters(sorted(place.iterdir())))
    assert len(kept.clients) == 11


def test_equal_ends_are_not_equal_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(roll, "ENDS", 8)
    for name, middle in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("d", 2.0)):
        A = torch.ones(2, 6)
        A[1, 0] = middle
        folder = tmp_path / "clients" / name
        folder.mkdir(parents=True)
        tensors = {"m.q.lora_A.weight": A, "m.q.lora_B.weight": torch.ones(5, 2)}
        save_file(tensors, folder / WEIGHTS)
        (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    with pytest.raises(InputValueError, match="clients 'b' and 'd' have the same tensors"):
        aggregate_folders(tmp_path / "clients")
    found = aggregate_folders(tmp_path / "clients", on_duplicate="skip")
    assert list(found.clients) == ["a", "b", "c"]


def test_weights_and_ranks_go_by_folder_though_some_are_skipped(place):
    (place / "c004" / CONFIG).unlink()
    paths = sorted(place.iterdir())
    left = [p for p in paths if p.name != "c004"]
    numbers = [1.0 + k for k in range(9)]
    named = {p.name: w for p, w in zip(paths, numbers, strict=True)}
    wanted = aggregate_adapters(left, [w for k, w in enumerate(numbers) if k != 4], "flexlora")
    for weights in (numbers, named):
        found = aggregate_folders(paths, weights, "flexlora", on_bad_folder="skip")
        assert_near(found, wanted)
    for weights, match in (
        (numbers[:8], "expected one for each of 9 clients, got 8"),
        ({**named, "z": 1.0}, "got 'z' besides"),
        ([*numbers[:8], -1.0], "client 'c008': weight"),
    ):
        with pytest.raises(InputValueError, match=match):
            aggregate_folders(paths, weights, "flexlora", on_bad_folder="skip")


@pytest.mark.parametrize(
    "told",
    [
        {"on_bad_folder": "drop"}, {"on_duplicate": "drop"}, {"missing": "x"}, {"dora": "x"},
        {"on_bad_client": "x"}, {"every": -1.0}, {"every": "x"}, {"checkpoint": 3},
        {"method": "rbb"}, {"flor": 1}, {"checkpoint": "/nonexistent/folder/s"},
        {"memory_limit": "2e9"}, {"memory_limit": 2e9}, {"memory_limit": 0},
    ],
)  # fmt: skip
def test_what_is_told_wrongly(told, place):
    with pytest.raises((InputTypeError, InputValueError)):
        aggregate_folders(place, **{"method": "rb", **told})


# ---- interruptions ------------------------------------------------------------------------------


def command(root, out, *more):
    weights = ",".join(str(1.0 + k % 5 + k / 7) for k in range(len(list(root.iterdir()))))
    return [
        "aggregate", "--from", str(root), "-o", str(out), "--weights", weights,
        "--checkpoint-every", "0", *more,
    ]  # fmt: skip


KILLED = """
import json, os, signal, sys
sys.path[:0] = {paths!r}
from hetlora_agg.cli import main
from hetlora_agg.streaming import RunningAggregate, files, resuming

resuming.SHARE = 1.0


def die(command, place, name, when):
    real, calls = getattr(place, name), [0]

    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(place, name, dying)
    sys.exit(main(command))


PLACES = {{"add": (RunningAggregate, "add"), "fsync": (os, "fsync"), "replace": (os, "replace")}}
codes = []
for command, point, when in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        die(command, *PLACES[point], when)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""

POINTS = [("add", 41, 40), ("fsync", 101, 50), ("replace", 150, 149)]
"""The call during which the process dies, and how many clients the file then holds."""


def test_killed_anywhere_and_taken_up_again_is_uninterrupted(tmp_path, capsys, monkeypatch):
    root = tmp_path / "clients"
    many(root, 300, layers=1, head=True)
    assert main(command(root, tmp_path / "whole", "--checkpoint", str(tmp_path / "none"))) == 0
    assert not (tmp_path / "none").exists()
    wanted = contents(tmp_path / "whole")
    runs = [
        (command(root, tmp_path / f"out{i}", "--checkpoint", str(tmp_path / f"s{i}")), point, when)
        for i, (point, when, _) in enumerate(POINTS)
    ]
    tests = Path(__file__).parent.parent
    script = KILLED.format(paths=[str(tests), str(tests.parent / "src")])
    said = subprocess.run(
        [sys.executable, "-c", script, json.dumps(runs)], capture_output=True, text=True, check=True
    )
    assert json.loads(said.stdout.splitlines()[-1]) == [-signal.SIGKILL] * len(POINTS)
    added = []
    real = RunningAggregate.add
    monkeypatch.setattr(
        RunningAggregate, "add", lambda *a, **k: (added.append(k["id"]), real(*a, **k))[1]
    )
    for i, ((run, _, _), (_, _, held)) in enumerate(zip(runs, POINTS, strict=True)):
        assert not (tmp_path / f"out{i}").exists()
        assert len(RunningAggregate.load(tmp_path / f"s{i}").receipts) == held
        added.clear()
        assert main(run) == 0
        assert len(added) == 300 - held
        assert contents(tmp_path / f"out{i}") == wanted
        assert not (tmp_path / f"s{i}").exists()
    capsys.readouterr()


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("method", ["rb", "hetlora"])
def test_ctrl_c_saves_first(method, shelf, tmp_path, capsys, monkeypatch):
    root, _ = shelf
    state = str(tmp_path / "s")
    run = command(root, tmp_path / "out", "--checkpoint", state, "--method", method)
    run[run.index("--checkpoint-every") + 1] = "1e9"
    real = RunningAggregate.add
    count = [0]

    def interrupted(*args, **kwargs):
        count[0] += 1
        if count[0] == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RunningAggregate, "add", interrupted)
        before = signal.getsignal(signal.SIGINT)
        assert main(run) == 130
        assert signal.getsignal(signal.SIGINT) is before
    # The client in the middle of which it came is in.
    assert len(RunningAggregate.load(state).receipts) == 11
    assert not (tmp_path / "out").exists()
    assert main(run) == 0
    whole = command(root, tmp_path / "whole", "--checkpoint", state, "--method", method)
    assert main(whole) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    capsys.readouterr()


def interrupted_at(root, state, k, monkeypatch, *args, **told):
    """A run that ends after k clients."""
    real = RunningAggregate.add
    count = [0]

    def failing(*args, **kwargs):
        count[0] += 1
        if count[0] > k:
            raise OSError(5, "Input/output error")
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RunningAggregate, "add", failing)
        with pytest.raises(OSError, match="Input/output error"):
            aggregate_folders(root, *args, checkpoint=state, every=1e9, **told)
    assert len(RunningAggregate.load(state).receipts) == k


def test_what_was_added_is_not_read_again_unless_it_has_changed(place, tmp_path, monkeypatch):
    state = tmp_path / "s"
    wanted = aggregate_folders(place, None, "flexlora", checkpoint=tmp_path / "whole")
    interrupted_at(place, state, 5, monkeypatch, None, "flexlora")
    reads = []
    real = Adapter.tensor

    def tensor(self, key, rows=None):
        reads.append(Path(self.name).name)
        return real(self, key, rows)

    monkeypatch.setattr(Adapter, "tensor", tensor)
    # Another time is looked into; the same content is no change.
    os.utime(place / "c001" / WEIGHTS, ns=(1, 1))
    held = state.read_bytes()
    found = aggregate_folders(place, None, "flexlora", checkpoint=state)
    assert sorted(set(reads)) == ["c001", "c005", "c006", "c007", "c008"]
    for layer, result in wanted.results.items():
        assert torch.equal(found.results[layer].A, result.A)
    # Again, with everybody in it: nobody is read, the result is there.
    reads.clear()
    aggregate_folders(place, None, "flexlora", checkpoint=state)
    assert not reads
    state.write_bytes(held)
    shutil.rmtree(place / "c001")
    written(place / "c001", 1, scale=2.0)
    with pytest.raises(InputValueError, match="'c001' was added before with other content"):
        aggregate_folders(place, None, "flexlora", checkpoint=state)


def test_a_checkpoint_of_another_run_is_refused(place, tmp_path, monkeypatch):
    state = tmp_path / "s"
    weights = {f"c00{k}": 1.0 + k for k in range(9)}
    for method in ("flexlora", "rb"):
        interrupted_at(place, state, 5, monkeypatch, weights, method)
        before = state.read_bytes()
        other = {**weights, "c001": 9.0}
        for args, told, match in (
            ((weights, "zeropad"), {}, "method"),
            ((weights, method), {"rank": 3}, "options"),
            ((weights, method), {"missing": "zero"}, "missing"),
            ((weights, method), {"memory_limit": 10**9}, "memory_limit"),
            ((other, method), {}, "roster differ" if method == "rb" else "'c001' has weight 2"),
        ):
            with pytest.raises(InputValueError, match=f"of another run: .*{match}"):
                aggregate_folders(place, *args, checkpoint=state, **told)
        gone = {k: w for k, w in weights.items() if k != "c002"}
        paths = [place / name for name in gone]
        match = "roster differ" if method == "rb" else "it has 'c002', not among these"
        with pytest.raises(InputValueError, match=match):
            aggregate_folders(paths, gone, method, checkpoint=state)
        assert state.read_bytes() == before
        state.unlink()
    running = RunningAggregate("flexlora")
    running.add(read_adapter(place / "c000"), id="c000")
    running.save(state)
    with pytest.raises(InputValueError, match="no run over folders has written it"):
        aggregate_folders(place, None, "flexlora", checkpoint=state)
    state.write_bytes(b"half")
    with pytest.raises(InputValueError, match="damaged or no checkpoint"):
        aggregate_folders(place, None, "flexlora", checkpoint=state)


def test_a_place_where_no_checkpoint_can_be_is_refused_first(place, tmp_path):
    (tmp_path / "folder").mkdir()
    said = []
    told = {"progress": lambda *at: said.append(at[0])}
    with pytest.raises(InputValueError, match=r"checkpoint: .*folder: is a folder; name a file"):
        aggregate_folders(place, checkpoint=tmp_path / "folder", **told)
    # As in a folder without the right to write, which the superuser always has.
    with pytest.raises(OSError, match="too long"):
        aggregate_folders(place, checkpoint=tmp_path / ("s" * 252), **told)
    assert set(said) == {"folders"}


def test_saving_takes_no_more_than_its_share(place, tmp_path, monkeypatch):
    now, saves = [0.0], []
    monkeypatch.setattr(resuming.time, "monotonic", lambda: now[0])
    real = resuming.files.write

    def slow(*args):
        now[0] += 1.0
        saves.append(now[0])
        return real(*args)

    monkeypatch.setattr(resuming.files, "write", slow)

    def stage(what, done, every):
        now[0] += 4.0

    aggregate_folders(place, None, "flexlora", checkpoint=tmp_path / "s", every=0.0, progress=stage)
    # After the headers at 36, saved until 37; at 57 twenty times a save later; then at the end.
    assert saves == [37.0, 58.0, 75.0]
    saves.clear()
    (tmp_path / "s").unlink()
    now[0] = 0.0
    aggregate_folders(
        place, None, "flexlora", checkpoint=tmp_path / "s", every=30.0, progress=stage
    )
    assert saves == [37.0, 70.0]


MEMORY = """
import json, sys
sys.path[:0] = {paths!r}
from pathlib import Path
import torch
torch.set_num_threads(1)
from folders import many
from hetlora_agg.streaming import aggregate_folders
from peak_memory import peak_of, resident

root = Path(sys.argv[1])
many(root, 160, size=500, rank=16)
every = sorted(root.iterdir())


def run(count, name):
    aggregate_folders(every[:count], None, "rb", checkpoint=root.parent / name, on_duplicate="keep")


run(60, "first")
few = peak_of(lambda: run(60, "few"))
many = peak_of(lambda: run(160, "many"))
data = sum((p / {weights!r}).stat().st_size for p in every)
print(json.dumps([resident("VmRSS"), few, many, data]))
"""


def test_memory_does_not_grow_with_folders(tmp_path):
    tests = Path(__file__).parent.parent
    script = MEMORY.format(paths=[str(tests), str(tests.parent / "src")], weights=WEIGHTS)
    said = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "clients")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    resting, few, many_, data = json.loads(said.stdout)
    assert data > 18e6
    assert resting + many_ <= 1.2 * (resting + few), said.stdout
    assert many_ - few <= data / 4, said.stdout


def test_real_models(tmp_path):
    models = pytest.importorskip("adapters.peft_models")
    case = models.CASES["bert"]
    clients = models.save_clients(case, tmp_path / "clients")
    weights = [3.0, 1.0, 2.0]
    out = aggregate_folders(
        [c.folder for c in clients], weights, "flora", checkpoint=tmp_path / "s"
    ).write(tmp_path / "out")
    found = case.forward(models.loaded(case, out))
    models.assert_same_output(found, models.expected(case, clients, weights))
