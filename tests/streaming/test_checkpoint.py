"""Saved at any moment, killed at any moment, restored, finished: the same bits."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hetlora_agg import METHODS, LowRank
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.streaming import RunningAggregate
from streamed import LEVELS, STREAMING, clients_for, filled, total64


def levels_for(name):
    return {"levels": LEVELS} if name in ("rb", "raflora") else {}


def add_all(running, clients):
    for own in clients:
        running.add(own, id=next(iter(own.values())).id)
    return running


def assert_equal_bits(found, expected):
    assert list(found) == list(expected)
    for layer, result in found.items():
        other = expected[layer]
        for X, Y in ((result.A, other.A), (result.B, other.B)):
            assert X.dtype == Y.dtype
            assert torch.equal(X, Y)
        assert (result.residual is None) == (other.residual is None)
        assert result.notes == other.notes


@pytest.mark.parametrize(
    ("name", "after"), [*((name, 25) for name in STREAMING), ("rb", 1), ("hetlora", 1), ("ffa", 1)]
)
def test_finished_after_restore_is_uninterrupted(name, after, tmp_path):
    dtype = torch.bfloat16 if after == 1 else torch.float32
    clients = clients_for(name, dtype=dtype)
    told = levels_for(name)
    whole = filled(name, clients, **told)
    path = filled(name, clients[:after], **told).save(tmp_path / "state.safetensors")
    restored = RunningAggregate.load(path)
    assert repr(restored) == repr(filled(name, clients[:after], **told))
    # Again in the middle, over the old file.
    add_all(restored, clients[after:28]).save(path)
    restored = add_all(RunningAggregate.load(path), clients[28:])
    assert_equal_bits(restored.result(), whole.result())
    for layer, bound in whole.bound.items():
        assert torch.equal(restored.bound[layer], bound)
    assert dict(restored.receipts) == dict(whole.receipts)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_everything_told_comes_back(tmp_path):
    clients = clients_for("rb", dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    previous = {
        layer: LowRank(
            torch.randn(4, u.A.shape[-1], generator=g), torch.randn(u.B.shape[-2], 4, generator=g)
        )
        for layer, u in clients[0].items()
    }
    told = {
        "round": 7,
        "roster": [(own["q"].id, own["q"].A.shape[0], own["q"].weight) for own in clients],
        "max_rank": dict.fromkeys(range(33), 4),
        "on_bad_client": "drop",
        "stale": "skip",
        "memory_limit": 10**6,
        "previous": previous,
        "quorum": 30,
        "weight_cap": 0.1,
    }
    running = filled("rb", clients[:9], **told)
    running.add(clients[9], id="late", round=6)
    restored = RunningAggregate.load(running.save(tmp_path / "s"))
    assert dict(restored.late) == {"late": 6}
    whole = filled("rb", clients, **told)
    add_all(restored, clients[9:])
    assert_equal_bits(restored.result(), whole.result())
    with pytest.raises(InputValueError, match="not on the roster"):
        restored.add(clients[0], id="x")


def test_truncated_sums_and_generators_come_back(tmp_path):
    clients = clients_for("fedask", sizes={"q": (40, 50)}, dtype=torch.float32, count=60)

    def start():
        return filled(
            "fedask", clients[:50], memory_limit=12_000, rank=2, sketch=3,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip

    running = start()
    restored = RunningAggregate.load(running.save(tmp_path / "s"))
    assert "summed up to rank" in repr(running)
    for one in (running, restored):
        add_all(one, clients[50:])
    assert_equal_bits(restored.result(), running.result())
    assert restored.bound["q"] > 0


KILLED = """
import json, os, sys
sys.path[:0] = {paths!r}
from hetlora_agg.streaming import RunningAggregate
from streamed import clients_for

clients = clients_for("flexlora", sizes={{"q": (9, 7)}})


def die(path, point, when):
    running = RunningAggregate.load(path)
    for own in clients[20:25]:
        running.add(own, id=own["q"].id)
    real, calls = getattr(os, point), [0]

    def dying(*args):
        calls[0] += 1
        if calls[0] < when:
            return real(*args)
        if point == "write":
            real(args[0], bytes(args[1])[: len(args[1]) // 2])
        os._exit(9)

    setattr(os, point, dying)
    running.save(path)
    os._exit(0)


codes = []
for path, point, when in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        try:
            die(path, point, when)
        finally:
            os._exit(1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""

POINTS = [
    *(("open", 1), ("write", 1), ("write", 2), ("write", 5), ("fsync", 1), ("replace", 1)),
    *(("open", 2), ("fsync", 2), ("replace", 2)),
]
"""The call during which the process dies; what is replaced stays when the folder is not synced."""


def test_killed_at_any_point_the_old_or_the_new_state_is_there(tmp_path):
    tests = Path(__file__).parent.parent
    clients = clients_for("flexlora", sizes={"q": (9, 7)})
    old, new = (filled("flexlora", clients[:n]) for n in (20, 25))
    places = []
    for i, (point, when) in enumerate(POINTS):
        place = tmp_path / f"{i}" / "state"
        place.parent.mkdir()
        places.append((str(old.save(place)), point, when))
    script = KILLED.format(paths=[str(tests), str(tests.parent / "src")])
    arguments = [sys.executable, "-c", script, json.dumps(places)]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True)
    # The last point is never reached: the file was replaced once, and the save ended well.
    assert json.loads(said.stdout) == [9] * (len(POINTS) - 1) + [0]
    for place, point, when in places:
        found = RunningAggregate.load(place)
        replaced = when == 2 and point != "write"
        assert_equal_bits(found.result(), (new if replaced else old).result())
        assert len(found.receipts) == (25 if replaced else 20)
        # What is left over is written over by the next save.
        found.save(place)
        assert [p.name for p in Path(place).parent.iterdir()] == ["state"]


@pytest.mark.parametrize("point", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(point, tmp_path, monkeypatch):
    path = filled("flora", clients_for("flora", count=2)).save(tmp_path / "s")
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    running = filled("flora", clients_for("flora", count=3))
    with monkeypatch.context() as patched:
        patched.setattr(os, point, full)
        with pytest.raises(OSError, match="No space left"):
            running.save(path)
    assert path.read_bytes() == before
    running.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


DAMAGE = r"damaged|checksum|no checkpoint|schema"


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return length, json.loads(data[8 : 8 + length])


def test_damage_is_found(tmp_path):
    running = filled("flexlora", clients_for("flexlora", sizes={"q": (9, 7)}))
    path = running.save(tmp_path / "s")
    data = path.read_bytes()
    length, _ = header_of(data)
    places = [
        0,
        7,
        9,
        length // 2,
        8 + length,
        8 + length + (len(data) - length) // 2,
        len(data) - 1,
    ]
    for place in places:
        broken = bytearray(data)
        broken[place] ^= 1
        path.write_bytes(broken)
        with pytest.raises(InputValueError, match=DAMAGE):
            RunningAggregate.load(path)
    for cut in (0, 5, length, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(InputValueError, match="damaged or no checkpoint"):
            RunningAggregate.load(path)
    path.write_bytes(data)
    RunningAggregate.load(path)


def test_every_single_byte_of_a_small_file_counts(tmp_path):
    running = RunningAggregate("flora")
    running.add((torch.ones(1, 2), torch.ones(2, 1)), id="a")
    path = running.save(tmp_path / "s")
    data = path.read_bytes()
    length, _ = header_of(data)
    text = data[8 : 8 + length].rstrip()
    for place in range(0, len(data), 7):
        if 8 + len(text) <= place < 8 + length:
            continue
        broken = bytearray(data)
        broken[place] ^= 0x20
        path.write_bytes(broken)
        try:
            RunningAggregate.load(path)
        except InputValueError:
            continue
        raise AssertionError(f"byte {place} of {len(data)}: {data[place : place + 1]}")


def test_other_files_versions_and_methods(tmp_path):
    path = filled("flora", clients_for("flora", count=2)).save(tmp_path / "s")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={**metadata, "schema": "3"})
    with pytest.raises(InputValueError, match="schema version 3, this library reads 2"):
        RunningAggregate.load(path)
    save_file(tensors, path)
    with pytest.raises(InputValueError, match="no checkpoint of a running aggregate"):
        RunningAggregate.load(path)
    with pytest.raises(InputValueError, match="no such file"):
        RunningAggregate.load(tmp_path / "nowhere")
    with pytest.raises(InputTypeError, match="expected the path of a file, got int"):
        RunningAggregate.load(3)
    METHODS["mine"] = METHODS["flora"].__class__(**{**vars(METHODS["flora"]), "name": "mine"})
    try:
        filled("mine", clients_for("flora", count=2)).save(path)
    finally:
        del METHODS["mine"]
    with pytest.raises(InputValueError, match="'mine', which is not registered here"):
        RunningAggregate.load(path)


def test_saving_changes_nothing(tmp_path):
    clients = clients_for("flexlora")
    one, two = filled("flexlora", clients[:25]), filled("flexlora", clients[:25])
    for k in range(25, 33):
        one.save(tmp_path / "s")
        add_all(one, clients[k : k + 1]), add_all(two, clients[k : k + 1])
    assert_equal_bits(one.result(), two.result())
    assert total64(one.result()["q"]).any()


def test_an_option_that_no_file_can_hold_is_refused(tmp_path):
    running = RunningAggregate("flora", weighting=lambda c: c.weight / c.weight.sum())
    running.add((torch.ones(1, 2), torch.ones(2, 1)), id="a")
    with pytest.raises(InputValueError, match="weighting' is a function, which no file can hold"):
        running.save(tmp_path / "s")
    assert not list(tmp_path.iterdir())
