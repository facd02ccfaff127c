"""Several callers in one process, gradients, inference mode, precision switches and forks."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from test_certificate_inputs import Problem, solve
from test_execution import TIMEOUT, batch, drive, every_driver, parts, threads

# --- callers at the same time -------------------------------------------------------------------


class Callers:
    """Two calls that overlap for certain, and end in the order they are told to.

    The first asks for rank 3, the second for rank 4: that tells their chunks apart.
    """

    def __init__(self, look=lambda: None):
        self.look = look
        self.known, self.start, self.inside, self.may_go, self.over = (
            {rank: threading.Event() for rank in (3, 4)} for _ in range(5)
        )
        self.all_over = threading.Event()
        self.seen_inside, self.seen_afterwards = {3: set(), 4: set()}, {}

    def hook(self, real, B, A, rank):
        self.inside[rank].set()
        assert self.may_go[rank].wait(TIMEOUT)
        self.seen_inside[rank].add(self.look())
        return real(B, A, rank)

    def call(self, rank, workers):
        # A thread's settings are fixed by its first question: both ask before either call.
        self.look()
        self.known[rank].set()
        assert self.start[rank].wait(TIMEOUT)
        one = batch(4)
        svd = solve(Problem(one.B, one.A, rank), "gram", workers=workers)
        self.over[rank].set()
        assert self.all_over.wait(TIMEOUT)
        self.seen_afterwards[rank] = self.look()
        return svd

    def run(self, workers, order):
        with ThreadPoolExecutor(2) as pool:
            try:
                calls = [pool.submit(self.call, r, w) for r, w in zip((3, 4), workers, strict=True)]
                assert all(known.wait(TIMEOUT) for known in self.known.values())
                for rank in (3, 4):
                    self.start[rank].set()
                    assert self.inside[rank].wait(TIMEOUT)
                for rank in order:
                    self.may_go[rank].set()
                    assert self.over[rank].wait(TIMEOUT)
            finally:
                for event in (*self.start.values(), *self.may_go.values(), self.all_over):
                    event.set()
            return [call.result(TIMEOUT) for call in calls]


# never the same number above one twice: those calls may share workers and wait for each other
overlapping = pytest.mark.parametrize("workers", [(1, 2), (2, 1), (1, 1), (2, 3), (3, 2)], ids=str)
ending = pytest.mark.parametrize("order", [(3, 4), (4, 3)], ids=["in turn", "last in first out"])


@overlapping
@ending
def test_callers_at_the_same_time_leave_every_thread_its_count(workers, order, monkeypatch):
    callers = Callers(torch.get_num_threads)
    drive(monkeypatch, callers.hook)
    with threads(4):
        callers.run(workers, order)
        with ThreadPoolExecutor(1) as pool:
            newcomer = pool.submit(torch.get_num_threads).result()
        assert callers.seen_afterwards == {3: 4, 4: 4}
        assert torch.get_num_threads() == newcomer == 4


@overlapping
@ending
def test_callers_at_the_same_time_get_their_own_results(workers, order, monkeypatch):
    one = batch(4)
    expected = [parts(solve(Problem(one.B, one.A, rank), "gram", workers=1)) for rank in (3, 4)]
    callers = Callers()
    drive(monkeypatch, callers.hook)
    for svd, own in zip(callers.run(workers, order), expected, strict=True):
        for name, x in parts(svd).items():
            # not bit by bit: the chunks are not the same
            assert np.allclose(x, own[name], rtol=1e-4, atol=1e-5), name


# --- the caller's settings ----------------------------------------------------------------------

needs_switches = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9"
)


def precision():
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def reduced():
    """Matrix products in bfloat16 on the CPU."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@needs_switches
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_chunk_is_computed_in_full_precision(workers, reduced, monkeypatch):
    seen = []
    drive(monkeypatch, lambda real, *args: seen.append(precision()) or real(*args))
    found = parts(solve(batch(5), "gram", workers=workers))
    assert set(seen) == {"ieee"}
    assert precision() == "bf16"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    for name, x in parts(solve(batch(5), "gram", workers=workers)).items():
        assert np.array_equal(found[name], x), name


@needs_switches
@overlapping
@ending
def test_callers_at_the_same_time_compute_in_full_precision(workers, order, reduced, monkeypatch):
    callers = Callers(precision)
    drive(monkeypatch, callers.hook)
    callers.run(workers, order)
    assert callers.seen_inside == {3: {"ieee"}, 4: {"ieee"}}
    assert precision() == "bf16"


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("enabled", [True, False])
@every_driver
def test_grad_mode_is_the_callers_and_results_have_no_gradient(
    driver, dtype, enabled, workers, monkeypatch
):
    seen = []
    drive(monkeypatch, lambda real, *a: seen.append(torch.is_grad_enabled()) or real(*a), driver)
    one = batch(5, dtype)
    B, A = one.B.requires_grad_(), one.A.requires_grad_()
    with torch.set_grad_enabled(enabled):
        svd = solve(Problem(B, A, 3), driver, workers=workers)
        assert torch.is_grad_enabled() == enabled
    assert set(seen) == {False}
    for x in (svd.U, svd.S, svd.Vh, *svd.certificate.tensors().values()):
        assert not x.requires_grad
        assert x.grad_fn is None


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("verify", [False, True], ids=["", "verified"])
@every_driver
def test_inside_and_outside_inference_mode_is_the_same(driver, dtype, verify, workers):
    # in turn, since every thread keeps its scratch from one call to the next
    one = batch(5, dtype)
    found = []
    for inside in (True, False, True, False):
        with torch.inference_mode(inside):
            svd = solve(one, driver, workers=workers, verify=verify)
            found.append({name: x.copy() for name, x in parts(svd).items()})
    for other in found[1:]:
        for name, x in other.items():
            assert np.array_equal(x, found[0][name]), name


@pytest.mark.parametrize("workers", [1, 2])
@every_driver
def test_factors_made_in_inference_mode_are_taken(driver, dtype, workers):
    one = batch(5, dtype)
    with torch.inference_mode():
        made_inside = Problem(one.B.clone(), one.A.clone(), one.rank)
    expected = parts(solve(one, driver, workers=workers, verify=True))
    found = parts(solve(made_inside, driver, workers=workers, verify=True))
    for name, x in found.items():
        assert np.array_equal(x, expected[name]), name


# --- forks --------------------------------------------------------------------------------------

FORKED = """
import multiprocessing, sys
import torch
from hetlora_agg.linalg import svd_product

generator = torch.Generator().manual_seed(0)
B = torch.randn(6, 20, 6, generator=generator)
A = torch.randn(6, 6, 16, generator=generator)

def solve(workers):
    threads = torch.get_num_threads()
    S = svd_product(B, A, driver="gram", workers=workers).S
    return torch.get_num_threads() == threads, S.tolist()

def child(pipe, workers):
    pipe.send(solve(workers))

# the pools that children will ask for, and one that they will not
expected = {workers: solve(workers) for workers in (1, 2, 3, 4)}
fork = multiprocessing.get_context("fork")
for workers in (1, 2, 3):
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(there, workers))
    process.start()
    answered = here.poll(TIMEOUT)
    if not answered:
        process.kill()
    process.join()
    assert answered, f"a child with {workers} workers hangs"
    assert here.recv() == expected[workers], f"a child with {workers} workers differs"
# and the parent's pools are still there
assert solve(3) == expected[3]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_solves_with_workers_of_its_own():
    # in a process of its own, with one OpenMP thread: libgomp itself does not survive a fork
    script = FORKED.replace("TIMEOUT", str(TIMEOUT))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=4 * TIMEOUT,
    )
    assert run.returncode == 0, run.stderr
