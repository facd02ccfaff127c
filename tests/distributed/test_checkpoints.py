"""Checkpoints of all processes: whole or as before, for any number of processes."""

import errno
import itertools

import pytest
import torch

from hetlora_agg import InputTypeError, InputValueError, distributed
from hetlora_agg.distributed import checkpoints
from hetlora_agg.streaming import RunningAggregate, files
from processes import in_processes, results_of
from streamed import assert_same, clients_for, filled, one_shot

COUNT = 60


def saved(monkeypatch, folder, clients, size, name="flexlora"):
    """A checkpoint of these clients on so many processes."""

    def work(rank):
        running = filled(name, clients[rank::size])
        assert distributed.save(running, folder) == folder
        return running

    return results_of(monkeypatch, size, work)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def loaded(monkeypatch, folder, size):
    return results_of(monkeypatch, size, lambda rank: distributed.load(folder))


def test_restored_by_as_many_processes_nothing_has_changed(monkeypatch, tmp_path):
    clients = clients_for("flexlora", COUNT)
    before = saved(monkeypatch, tmp_path, clients, 3)
    for running, found in zip(before, loaded(monkeypatch, tmp_path, 3), strict=True):
        assert found.receipts == running.receipts
        for layer, result in running.result().items():
            assert torch.equal(found.result()[layer].A, result.A)
        # Fed again, nobody counts twice.
        assert not found.add(clients[min(found.receipts)], id=min(found.receipts))


@pytest.mark.parametrize(("wrote", "reads"), [(4, 2), (2, 4), (3, 1), (1, 3), (5, 3)])
@pytest.mark.parametrize("count", [5, COUNT])
def test_another_number_of_processes_goes_on(wrote, reads, count, monkeypatch, tmp_path):
    clients = clients_for("flexlora", count)
    first = clients[: count * 2 // 3]
    saved(monkeypatch, tmp_path / "new" / "folder", first, wrote)

    def work(rank):
        running = distributed.load(tmp_path / "new" / "folder")
        added = distributed.receipts(running)
        assert set(added) == {own["q"].id for own in first}
        todo = [own["q"].id for own in clients if own["q"].id not in added]
        for id in distributed.own(todo):
            running.add(clients[id], id=id)
        return distributed.result(running)

    expected = one_shot("flexlora", clients)
    for found in results_of(monkeypatch, reads, work):
        assert_same(found, expected, clients)


def test_files_of_a_larger_world_are_not_counted_again(monkeypatch, tmp_path):
    clients = clients_for("flexlora", COUNT)
    saved(monkeypatch, tmp_path, clients, 4)
    assert len(names_in(tmp_path)) == 5
    (tmp_path / "notes.txt").write_text("kept")
    stale = (tmp_path / "state-1-3-of-4.safetensors").read_bytes()
    saved(monkeypatch, tmp_path, clients, 2)
    assert names_in(tmp_path) == [
        "checkpoint.safetensors",
        "notes.txt",
        "state-2-0-of-2.safetensors",
        "state-2-1-of-2.safetensors",
    ]
    # Killed before it was cleared away, it would stand here still.
    (tmp_path / "state-1-3-of-4.safetensors").write_bytes(stale)
    ids = [sorted(running.receipts) for running in loaded(monkeypatch, tmp_path, 4)]
    assert sorted(itertools.chain(*ids)) == list(range(COUNT))


def test_a_save_that_breaks_off_leaves_the_checkpoint_before(monkeypatch, tmp_path):
    clients = clients_for("flexlora", COUNT)
    saved(monkeypatch, tmp_path, clients[:30], 2)
    write = files.write

    def save(fails):
        def breaking(path, tensors, state, format=files.FORMAT):
            if fails in path.name:
                raise OSError(errno.ENOSPC, "no space left")
            return write(path, tensors, state, format)

        monkeypatch.setattr(files, "write", breaking)
        monkeypatch.setattr(checkpoints, "write", breaking)

        def work(rank):
            return distributed.save(filled("flexlora", clients[rank::2]), tmp_path)

        return in_processes(monkeypatch, 2, work)[0]

    # The index first: then files of the broken save lie where the next one's belong.
    for fails in ("checkpoint", "-1-of-", "-0-of-"):
        found = save(fails)
        assert all(isinstance(error, (OSError, distributed.ProcessLostError)) for error in found)
        assert any("no space left" in str(error) for error in found)
        ids = [sorted(running.receipts) for running in loaded(monkeypatch, tmp_path, 2)]
        assert sorted(itertools.chain(*ids)) == list(range(30))
    assert save("nothing") == [tmp_path] * 2
    assert len(names_in(tmp_path)) == 3
    ids = [sorted(running.receipts) for running in loaded(monkeypatch, tmp_path, 2)]
    assert sorted(itertools.chain(*ids)) == list(range(COUNT))


def test_a_folder_without_a_checkpoint(monkeypatch, tmp_path):
    assert loaded(monkeypatch, tmp_path, 2) == [None, None]
    assert loaded(monkeypatch, tmp_path / "none", 2) == [None, None]
    # The first save broke off before its index was there.
    filled("flexlora", []).save(tmp_path / "state-1-0-of-2.safetensors")
    assert loaded(monkeypatch, tmp_path, 2) == [None, None]


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda path: path.unlink(), "all processes see"),
        (damage, "checksum"),
    ],
)
def test_a_file_that_is_lost_or_damaged_is_an_error_on_all(spoil, text, monkeypatch, tmp_path):
    saved(monkeypatch, tmp_path, clients_for("flexlora", COUNT), 3)
    spoil(tmp_path / "state-1-1-of-3.safetensors")
    found, _ = in_processes(monkeypatch, 3, lambda rank: distributed.load(tmp_path))
    for error in found:
        assert isinstance(error, InputValueError)
        assert text in str(error)


def test_the_index_is_no_running_aggregate(monkeypatch, tmp_path):
    saved(monkeypatch, tmp_path, clients_for("flexlora", 3), 1)
    with pytest.raises(InputValueError, match="no checkpoint of a running aggregate"):
        RunningAggregate.load(tmp_path / "checkpoint.safetensors")
    filled("flexlora", []).save(tmp_path / "checkpoint.safetensors")
    found, _ = in_processes(monkeypatch, 2, lambda rank: distributed.load(tmp_path))
    assert all("hetlora_agg.distributed" in str(error) for error in found)


def test_what_is_no_path_or_no_running_aggregate_is_refused(monkeypatch, tmp_path):
    calls = [
        lambda rank: distributed.save({}, tmp_path),
        lambda rank: distributed.save(filled("flexlora", []), 7),
        lambda rank: distributed.load(7),
    ]
    for call in calls:
        found, _ = in_processes(monkeypatch, 2, call)
        assert all(isinstance(error, InputTypeError) for error in found), found
