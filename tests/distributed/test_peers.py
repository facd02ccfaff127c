"""The group itself: what is there, what is not, and what breaks."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import hetlora_agg
from hetlora_agg import InputTypeError, InputValueError, distributed
from hetlora_agg.distributed import peers
from hetlora_agg.distributed.peers import Peers
from processes import world_of_one
from streamed import clients_for, filled


def calls(group=None):
    """Every public function, with arguments nobody objects to."""
    running = filled("flexlora", clients_for("flexlora", 3))
    return [
        lambda: distributed.own(["q"], group=group),
        lambda: distributed.aggregate_layers({"q": [(torch.ones(1, 2), torch.ones(3, 1))]},
                                             group=group),
        lambda: distributed.gather({}, group=group),
        lambda: distributed.merge(running, group=group),
        lambda: distributed.result(running, group=group),
        lambda: distributed.receipts(running, group=group),
        lambda: distributed.load("/nonexistent", group=group),
    ]  # fmt: skip


def test_without_a_group_the_error_shows_the_lines_to_write():
    for call in calls():
        with pytest.raises(InputValueError, match="init_process_group") as caught:
            call()
        assert "torchrun" in str(caught.value)


def test_a_world_of_one_is_a_group():
    clients = clients_for("flexlora", 60)
    running = filled("flexlora", clients)
    with world_of_one():
        for call in calls():
            call()
        merged, reduced = distributed.merge(running), distributed.result(running)
    for layer, result in running.result().items():
        assert torch.equal(reduced[layer].B, result.B)
        assert torch.equal(merged.result()[layer].B, result.B)


def test_a_group_that_is_none_is_refused():
    with world_of_one():
        for group, error, text in (
            ("gloo", InputTypeError, "expected a ProcessGroup"),
            (dist.GroupMember.NON_GROUP_MEMBER, InputValueError, "not in it"),
        ):
            for call in calls(group):
                with pytest.raises(error, match=text):
                    call()


def test_steps_work_on_real_tensors():
    with world_of_one():
        here = Peers.of()
        assert (here.rank, here.size, here.everybody) == (0, 1, (0,))
        assert here.device == torch.device("cpu")
        assert here.tell("a step", b"abc") == [b"abc"]
        own = torch.arange(4, dtype=torch.uint8)
        assert torch.equal(here.spread("a step", own, 0), own)
        X = torch.tensor([1.5, -2.0], dtype=torch.float32)
        total = here.add_up("a step", X)
        assert total.dtype == X.dtype
        assert torch.equal(total, X)
        assert total.data_ptr() != X.data_ptr()
        assert here.pass_on("a step", None, None) is None


class Store:
    """Where process 0 came to three steps, process 1 to two and process 2 to three."""

    def __init__(self, fails_after=99):
        self.counts = [3, 2, 3]
        self.left = fails_after

    def add(self, key, more):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("Broken pipe")
        rank = int(key.rsplit("/", 1)[1])
        self.counts[rank] += more
        return self.counts[rank]


def broken_step(store, counts=None):
    """What a step that breaks says."""
    if counts:
        store.counts = counts
    here = Peers(0, 3, (4, 5, 7), None, torch.device("cpu"), store)
    with pytest.raises(distributed.ProcessLostError) as caught, here._together("merge, step 'x'"):
        raise RuntimeError("Connection closed by peer")
    return str(caught.value)


@pytest.mark.parametrize(
    ("store", "counts", "text"),
    [
        (Store(), None, "processes 5, 7 did not come to this step"),
        (Store(), [2, 0, 5], "process 5 did not come to this step"),
        (Store(), [2, 5, 3], "a process was lost in the middle of this step"),
        (None, None, "a process was lost in the middle of this step"),
        (Store(0), None, "a process was lost, the one that holds torch's store among them"),
        (Store(2), None, "a process was lost, the one that holds torch's store among them"),
        (Store(5), None, "processes 5, 7 did not come to this step"),
    ],
)
def test_a_step_that_breaks_says_who_did_not_come(store, counts, text, monkeypatch):
    monkeypatch.setattr(peers, "GRACE", 0.05)
    said = broken_step(store, counts)
    assert said.startswith(f"merge, step 'x': {text}; torch.distributed says: ")
    assert "--max-restarts" in said
    assert "load(folder)" in said


def test_a_store_that_is_silent_is_a_process_lost(monkeypatch):
    silent = threading.Event()

    class Silent:
        def add(self, key, more):
            return silent.wait(20) * 0

    monkeypatch.setattr(peers, "GRACE", 0.05)
    here = Peers(0, 2, (0, 1), None, torch.device("cpu"), Silent(), patience=0.05)
    with pytest.raises(distributed.ProcessLostError, match="store does not answer"):
        here.tell("a step", b"abc")
    silent.set()


def test_a_process_late_in_one_group_is_not_late_in_another(monkeypatch):
    monkeypatch.setattr(peers, "GRACE", 0.05)
    store = dist.HashStore()

    def seat(rank, name):
        group = SimpleNamespace(group_name=name)
        return Peers(rank, 2, (0, 1), group, torch.device("cpu"), store)

    seat(0, "hasty")._count(0, 1)
    seat(1, "patient")._count(1, 1)
    lost = pytest.raises(distributed.ProcessLostError, match="in the middle of this step")
    with lost, seat(0, "patient")._together("a step"):
        raise RuntimeError("Connection closed by peer")


def test_who_breaks_off_in_the_middle_of_a_step_tells_nobody(monkeypatch):
    steps, tell = [], Peers.tell

    def heard(self, step, own):
        steps.append(step)
        return tell(self, step, own)

    def full(self, step, buffer, source):
        raise MemoryError("no room for it")

    monkeypatch.setattr(Peers, "tell", heard)
    monkeypatch.setattr(Peers, "spread", full)
    with world_of_one(), pytest.raises(MemoryError, match="no room"):
        distributed.gather({})
    # The others are in the step's second half: a word to them would be taken for it.
    assert len(steps) == 1


def test_who_comes_a_moment_later_is_not_named(monkeypatch):
    class Later(Store):
        def add(self, key, more):
            if self.left < 90:
                self.counts[1:] = [4, 4]
            return super().add(key, more)

    monkeypatch.setattr(peers, "GRACE", 5.0)
    monkeypatch.setattr(peers.time, "sleep", lambda seconds: None)
    assert "a process was lost in the middle of this step" in broken_step(Later())


def test_the_library_does_not_import_it_unasked():
    # Nothing below its floor imports it either: see the floors of the house.
    assert "distributed" not in Path(hetlora_agg.__file__).read_text()
