"""Chunks on a pool of workers: the same numbers, and every setting of the process put back."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hetlora_agg import ConvergenceError, InputValueError
from hetlora_agg.linalg import memory as memory_module
from hetlora_agg.linalg import svd as svd_module
from hetlora_agg.linalg.lapack import MemberFailed
from test_certificate_inputs import one_starting_point, problem, solve, unrelated
from test_gate_inputs import F32, F64
from tolerance import recompressed_gate

TIMEOUT = 20.0
"""Seconds until a hang counts as one; nothing here takes more than a tenth of one."""

WORKERS = [1, 2, 3, 5]
DRIVERS = [("gram", F32), ("qr", F32), ("qr", F64), ("dense", F32), ("dense", F64)]
every_driver = pytest.mark.parametrize(
    ("driver", "dtype"), DRIVERS, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in DRIVERS]
)


def batch(members, dtype=F32, kinds=(unrelated,)):
    return problem(list(kinds), 7, (20, 6, 16), (members,), 4, dtype)


def parts(svd):
    named = {"U": svd.U, "S": svd.S, "Vh": svd.Vh, **svd.certificate.tensors()}
    return {name: x.numpy() for name, x in named.items()}


def one_member_per_chunk(monkeypatch):
    monkeypatch.setattr(memory_module, "WORKSPACE_BYTES", 1)


def drive(monkeypatch, hook, driver="gram"):
    """``hook(real, B, A, rank)`` runs in place of a driver, for chunks of one member."""
    real = svd_module.DRIVERS[driver]
    wrapped = {**svd_module.DRIVERS, driver: lambda *args: hook(real, *args)}
    monkeypatch.setattr(svd_module, "DRIVERS", wrapped)
    one_member_per_chunk(monkeypatch)


@contextmanager
def threads(count):
    """torch is told to use so many: with four, a share of them is a number above one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- results ------------------------------------------------------------------------------------


@every_driver
def test_any_number_of_workers_gives_the_same_within_rounding(driver, dtype):
    one = batch(7, dtype, (unrelated, one_starting_point))
    results = {workers: solve(one, driver, workers=workers) for workers in WORKERS}
    W, _, size = one.truth
    gate = np.array([recompressed_gate(dtype, *W.shape[-2:], float(s)) for s in size])
    for svd in results.values():
        # of an optimal product its distance to W says all: both are within the gate of it
        tail = svd.certificate.tail.numpy()
        assert (np.abs(one.error(svd) - tail) <= gate).all()
        first = results[1]
        assert (np.abs(svd.S.numpy() - first.S.numpy()).max(-1) <= gate).all()
        assert svd.certificate.fallbacks == first.certificate.fallbacks


@every_driver
def test_workers_change_no_bit_of_the_same_chunks(driver, dtype, monkeypatch):
    one_member_per_chunk(monkeypatch)
    one = batch(7, dtype, (unrelated, one_starting_point))
    first, *others = (parts(solve(one, driver, workers=workers)) for workers in WORKERS)
    for other in others:
        for name, expected in first.items():
            assert np.array_equal(other[name], expected), name


@pytest.mark.parametrize("workers", WORKERS)
def test_every_chunk_is_solved_once_on_at_most_so_many_threads(workers, monkeypatch):
    seen = []
    drive(
        monkeypatch, lambda real, *args: seen.append(threading.current_thread().name) or real(*args)
    )
    solve(batch(7), "gram", workers=workers)
    assert len(seen) == 7
    assert len(set(seen)) <= workers
    assert (threading.current_thread().name in seen) == (workers == 1)


@pytest.mark.parametrize("members", [1, 2, 3])
def test_more_workers_than_layers_is_a_worker_per_layer(members, monkeypatch):
    seen = []
    drive(monkeypatch, lambda real, *args: seen.append(len(args[0])) or real(*args))
    one = batch(members)
    found, expected = solve(one, "gram", workers=50), solve(one, "gram", workers=members)
    assert seen == [1] * 2 * members
    for name, x in parts(expected).items():
        assert np.array_equal(parts(found)[name], x), name


def test_workers_run_at_the_same_time(monkeypatch):
    # broken, were they to come one after the other
    together = threading.Barrier(3)
    drive(monkeypatch, lambda real, *args: together.wait(TIMEOUT) is None or real(*args))
    solve(batch(3), "gram", workers=3)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, -1, True, "2", 1.5], ids=repr)
def test_workers_that_are_no_count_are_refused(workers):
    with pytest.raises(InputValueError, match=rf"workers must be an integer .* 1, got {workers!r}"):
        solve(batch(2), "gram", workers=workers)


def member_of(B, one):
    """Which member of the batch a chunk of one holds."""
    (i,) = (i for i, own in enumerate(one.B) if torch.equal(own, B[0]))
    return i


@pytest.mark.parametrize("workers", WORKERS)
def test_the_first_member_that_fails_is_named_whichever_fails_first(workers, monkeypatch):
    one, later_has_failed = batch(6), threading.Event()

    def hook(real, B, A, rank):
        member = member_of(B, one)
        if member == 4:
            later_has_failed.set()
            raise MemberFailed(0)
        if member == 1:
            # alone it would wait for ever
            assert workers < 5 or later_has_failed.wait(TIMEOUT)
            raise MemberFailed(0)
        return real(B, A, rank)

    drive(monkeypatch, hook)
    with pytest.raises(ConvergenceError, match=r"no driver converged on batch member 1\b"):
        solve(one, "gram", workers=workers)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_call_after_a_failed_one_is_right(workers, monkeypatch):
    one = batch(6)
    expected = parts(solve(one, "gram", workers=1))
    fails = [True]

    def hook(real, B, A, rank):
        if fails[0] and member_of(B, one) == 2:
            raise MemberFailed(0)
        return real(B, A, rank)

    drive(monkeypatch, hook)
    with pytest.raises(ConvergenceError):
        solve(one, "gram", workers=workers)
    fails[0] = False
    for name, x in parts(solve(one, "gram", workers=workers)).items():
        assert np.array_equal(x, expected[name]), name


def test_a_failed_call_leaves_no_chunk_running(monkeypatch):
    # it would go on beside whatever the caller does next, with settings that are the caller's
    one, running = batch(2), [0]
    second_is_in, first_has_failed = threading.Event(), threading.Event()

    def hook(real, B, A, rank):
        if member_of(B, one) == 0:
            assert second_is_in.wait(TIMEOUT)
            first_has_failed.set()
            raise MemberFailed(0)
        running[0] += 1
        second_is_in.set()
        assert first_has_failed.wait(TIMEOUT)
        # the failure is on its way to the caller; a call that waits for this chunk waits this long
        threading.Event().wait(0.2)
        running[0] -= 1
        return real(B, A, rank)

    drive(monkeypatch, hook)
    with pytest.raises(ConvergenceError):
        solve(one, "gram", workers=2)
    assert running == [0]


# --- torch's threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", WORKERS)
def test_threads_are_shared_out_and_put_back(workers, monkeypatch):
    seen = []
    drive(monkeypatch, lambda real, *args: seen.append(torch.get_num_threads()) or real(*args))
    with threads(4):
        solve(batch(6), "gram", workers=workers)
        assert set(seen) == {max(1, 4 // workers)}
        assert torch.get_num_threads() == 4


@pytest.mark.parametrize("counts", [(4, 2, 6), (2, 8)], ids=str)
def test_workers_follow_a_thread_count_that_was_changed_since(counts, monkeypatch):
    seen = []
    drive(monkeypatch, lambda real, *args: seen.append(torch.get_num_threads()) or real(*args))
    for count in counts:
        seen.clear()
        with threads(count):
            solve(batch(6), "gram", workers=2)
        assert set(seen) == {count // 2}, f"{count} threads"


@pytest.mark.parametrize("error", [MemberFailed(0), RuntimeError("in one chunk")], ids=repr)
@pytest.mark.parametrize("workers", WORKERS)
def test_threads_are_put_back_after_an_error_in_one_chunk(workers, error, monkeypatch):
    one = batch(6)

    def hook(real, B, A, rank):
        if member_of(B, one) == 3:
            raise error
        return real(B, A, rank)

    drive(monkeypatch, hook)
    with threads(4):
        with pytest.raises((ConvergenceError, RuntimeError)):
            solve(one, "gram", workers=workers)
        assert torch.get_num_threads() == 4
