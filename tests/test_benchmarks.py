"""The benchmarks measure what they say: peers solve the problem, errors and targets are right."""

import importlib.metadata
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_drivers, bench_kernel, bench_scaling, memory, report, timing
from benchmarks import workloads as named
from benchmarks.contenders import CONTENDERS, as_factors, refusal
from benchmarks.packages import Problem
from benchmarks.peers import forms_product, gemm_bound
from benchmarks.quality import Reference
from benchmarks.targets import summary, targets
from benchmarks.workloads import Workload

PROJECT = Path(__file__).parent.parent
SMALL = Workload("small", 2, 40, 56, (2, 5, 7), 6)
CROWDED = Workload("crowded", 2, 24, 20, (3,) * 9, 5)
EXACT = ("ours", "ours, qr", "QR loop", "dense SVD", "dense SVD per client", "svds", "PEFT svd")
EXACT += ("chorus-fl",)


def answer(name, workload):
    """What a contender returns, float64, next to W."""
    contender = CONTENDERS[name]
    if not contender.installed:
        pytest.skip(f"{contender.needs} is not installed")
    torch.manual_seed(0)
    B, A = workload.factors()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = contender.prepare(Problem(B, A, workload.ranks, workload.rank))
        run()
        getattr(run, "reset", lambda: None)()
        result = run()
    return as_factors(result, contender.scale(workload)), (B, A)


def truncated(B, A, rank):
    """The oracle: NumPy's dense SVD in float64."""
    U, S, Vh = np.linalg.svd(B.double().numpy() @ A.double().numpy(), full_matrices=False)
    return torch.from_numpy((U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]), S


@pytest.mark.parametrize("workload", [SMALL, CROWDED], ids=lambda w: w.name)
@pytest.mark.parametrize("name", EXACT)
def test_exact_contenders_agree_with_the_oracle(name, workload):
    (found_B, found_A), (B, A) = answer(name, workload)
    best, S = truncated(B, A, workload.rank)
    gap = S[:, workload.rank - 1] - S[:, workload.rank]
    # Rounding of float32 in W, magnified by S / gap in the truncation.
    gate = 100 * torch.finfo(torch.float32).eps * float((S[:, 0] ** 2 / gap).max())
    assert float((found_B @ found_A - best).norm(dim=(-2, -1)).max()) < gate
    reference = Reference(B, A)
    assert abs(reference.excess(found_B, found_A)) < 1e-8
    assert reference.sigma_error(found_B, found_A) < 1e-5


@pytest.mark.parametrize("name", ["randomized", "svd_lowrank", "svd_lowrank 2r", "randomized_svd"])
def test_approximate_contenders_come_within_a_thousandth(name):
    (found_B, found_A), (B, A) = answer(name, SMALL)
    reference = Reference(B, A)
    assert -1e-8 < reference.excess(found_B, found_A) < 1e-3
    assert reference.sigma_error(found_B, found_A) < 1e-2


def test_peft_cat_keeps_everything():
    (found_B, found_A), (B, A) = answer("PEFT cat", SMALL)
    assert found_B.shape[-1] == SMALL.R
    torch.testing.assert_close(found_B @ found_A, B.double() @ A.double(), rtol=0, atol=1e-4)


def test_a_missing_package_is_said_so(monkeypatch):
    missing = CONTENDERS["QR loop"].__class__("", lambda p: None, lambda w: 0.0, needs="no_such")
    monkeypatch.setitem(CONTENDERS, "QR loop", missing)
    assert refusal("QR loop", SMALL, torch.float32, 1.0) == "not installed"


def test_what_is_too_slow_or_too_large_is_said_so():
    large = Workload("", 1, 4096, 4096, (4,) * 1000, 16)
    assert "estimated" in refusal("dense SVD", large, torch.float32, limit=1.0)
    assert "estimated" in refusal("dense SVD", SMALL, torch.float32, limit=1.0, speed=1e9)
    assert refusal("dense SVD", SMALL, torch.float32, limit=1.0) is None
    if CONTENDERS["PEFT svd"].installed:
        assert "GiB" in refusal("PEFT svd", large, torch.float32, limit=1e9)


def test_workloads_are_what_they_are_called():
    everything = (*named.QUICK, *named.MORE)
    assert len({w.name for w in everything}) == len(everything)
    for workload in everything:
        if stated := re.search(r"-R(\d+)$", workload.name):
            assert workload.R == int(stated[1]), workload.name
        if stated := re.search(r"-K(\d+)$", workload.name):
            assert len(workload.ranks) == int(stated[1]), workload.name
    assert (sum(named.TEN_TO_64), max(named.TEN_TO_64), len(named.TEN_TO_64)) == (120, 64, 10)
    assert (sum(named.TEN_TO_256), max(named.TEN_TO_256), len(named.TEN_TO_256)) == (936, 256, 10)
    sizes = {(w.layers, w.out, w.columns, w.R, w.rank) for w in named.QUICK}
    wanted = {(1, 4096, 4096, 936, 256), (1, 4096, 4096, 120, 16), (12, 384, 384, 30, 16)}
    assert wanted | {(32, 768, 768, 192, 32), (32, 768, 768, 48, 16)} <= sizes
    crowd = [w for w in named.QUICK if len(w.ranks) == 100]
    assert all(w.R > 0.8 * min(w.out, w.columns) for w in crowd)
    assert crowd
    B, A = SMALL.factors()
    assert (B.shape, A.shape) == ((2, 40, SMALL.R), (2, SMALL.R, 56))


def test_lb_is_grams_and_outputs_or_the_product():
    B, A = SMALL.factors()
    assert not forms_product(40, 56, SMALL.R)
    assert [tuple(x.shape) for x in gemm_bound(B, A, 6)] == [
        (2, 14, 14),
        (2, 14, 14),
        (2, 40, 6),
        (2, 6, 56),
    ]
    assert [tuple(x.shape) for x in gemm_bound(*CROWDED.factors(), 5)] == [(2, 24, 20)]


@pytest.mark.parametrize("workload", [SMALL, CROWDED], ids=lambda w: w.name)
def test_planted_errors_are_found(workload):
    B, A = workload.factors(dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    r = workload.rank
    reference = Reference(B, A)
    found_B, found_A = U[..., :r] * S[:, None, :r], Vh[:, :r]
    assert abs(reference.excess(found_B, found_A)) < 1e-14
    assert reference.sigma_error(found_B, found_A) < 1e-12
    # An error orthogonal to W in the last layer: ‖W − Ŵ‖² grows by its square.
    stray = found_B.clone()
    size, rest = 0.5 * S[-1, 0], torch.linalg.vector_norm(S[-1, r:])
    stray[-1, :, -1] = 0
    gone = (rest**2 + S[-1, r - 1] ** 2).sqrt()
    planted = (gone - rest) / torch.linalg.vector_norm(S[-1])
    assert reference.excess(stray, found_A) == pytest.approx(float(planted), rel=1e-9)
    direction = U[-1, :, r].clone()
    stray[-1, :, -1] = size * direction
    planted = ((gone**2 + size**2).sqrt() - rest) / torch.linalg.vector_norm(S[-1])
    assert reference.excess(stray, found_A) == pytest.approx(float(planted), rel=1e-9)
    assert reference.sigma_error(1.01 * found_B, found_A) == pytest.approx(0.01, rel=1e-6)
    # And one outside the column space of W.
    outside = torch.linalg.qr(U[-1], mode="complete").Q[:, -1]
    stray = found_B.clone()
    stray[-1, :, 0] += size * outside
    planted = ((rest**2 + size**2).sqrt() - rest) / torch.linalg.vector_norm(S[-1])
    assert reference.excess(stray, found_A) == pytest.approx(float(planted), rel=1e-9)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.3])
def test_a_known_exponent_is_recovered(exponent):
    x = [1, 2, 10, 20, 40, 80]
    y = [9.0, 9.0, *(3 * t**exponent for t in x[2:])]
    fit = bench_scaling.fit(x, y, low=10)
    assert fit["exponent"] == pytest.approx(exponent)
    assert fit["factor"] == pytest.approx(3)
    assert (fit["from"], fit["to"], fit["points"]) == (pytest.approx(10), pytest.approx(80), 4)
    assert fit["worst"] == pytest.approx(1)


@pytest.mark.parametrize("trial", [False, True])
def test_sweeps_stay_below_the_dense_rule(trial):
    for _, low, points in bench_scaling.sweeps(trial).values():
        assert sum(x >= low for x, _ in points) >= 2
        assert not any(forms_product(w.out, w.columns, w.R) for _, w in points)


def row(layers, out, R, dtype="float32", ours=2.0, loop=2.0, **others):
    contenders = {
        "ours": {"times_LB": ours, "against_ours": 1.0, "excess": others.get("excess", 1e-9)},
        "QR loop": {"against_ours": loop},
        "dense SVD": others.get("dense", {"skipped": "not installed"}),
    }
    sizes = {"layers": layers, "out": out, "in": out, "R": R, "dtype": dtype}
    return {**sizes, "contenders": contenders, "memory_ratio": others.get("memory")}


def test_targets_are_read_off_the_rows():
    rows = [
        row(1, 4096, 936, ours=2.4, loop=2.0, dense={"against_ours": 31.0}, memory=0.9),
        row(1, 4096, 120, ours=2.1, loop=8.0, dense={"against_ours": 900.0}, memory=0.6),
        row(1, 4096, 120, ours=1.0, loop=0.1, dtype="float64", excess=3e-12),
    ]
    assert summary(rows) == {"geomean": pytest.approx(4.0), "minimum": 2.0, "workloads": 2}
    found = {t["name"]: t for t in targets(rows)}
    # Four bounds in LB, two on the QR loop, two on dense SVDs, two on the excess, two on memory.
    met = [[True, False, False, False], [True, True], [True, False], [True, False], [False, True]]
    assert [t["met"] for t in found.values()] == [yes for group in met for yes in group]
    assert found["time in LB, 4096×4096, R = 936"]["measured"] == 2.4
    assert found["time in LB, 32 layers of 768×768, R = 48"]["measured"] is None
    assert found["largest excess error, float64"]["measured"] == 3e-12
    assert all(t["measured"] is None and not t["met"] for t in targets([]))


def test_timing_takes_turns_resets_and_keeps_to_the_budget():
    calls = []

    class Run:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def __call__(self):
            calls.append(self.name)
            timing.time.sleep(self.seconds)

        def reset(self):
            calls.append(f"reset {self.name}")

    runs = {"slow": Run("slow", 0.03), "quick": Run("quick", 0.0)}
    found = timing.interleaved(runs, repeats=3, budget=0.02)
    assert (found["slow"]["turns"], found["quick"]["turns"]) == (1, 3)
    assert found["slow"]["median"] >= 0.03
    # Warm-up and three turns, each after one call that is not timed.
    assert calls.count("quick") == calls.count("reset quick") == 7


def test_memory_is_what_a_call_allocates():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc")
    one = memory.peak_bytes(lambda: torch.ones(5_000_000))
    assert one == pytest.approx(20e6, rel=0.1)
    assert memory.peak_bytes(lambda: torch.ones(5_000_000) + 1) == pytest.approx(40e6, rel=0.1)


def test_the_constants_that_are_measured_are_there():
    for name, (where, attribute) in bench_kernel.CONSTANTS.items():
        module = bench_kernel.import_module(where)
        before = getattr(module, attribute)
        with bench_kernel.constant(name, 12345):
            assert getattr(module, attribute) == 12345
        assert getattr(module, attribute) == before


def test_modes_cover_the_workloads():
    quick, full = (bench_drivers.cases(bench_drivers.MODES[m]) for m in ("quick", "full"))
    assert set(quick) < set(full)
    assert {dtype for _, dtype in quick} == {torch.float32, torch.float64}


def test_an_interrupted_run_goes_on(monkeypatch, tmp_path, capsys):
    measured = []

    def measure(workload, dtype, mode, speed):
        measured.append(workload.name)
        name = str(dtype).removeprefix("torch.")
        one = row(1, 8, 4, dtype=name)
        one["contenders"]["ours"] |= {"times_LB": 2.0}
        return {**one, "workload": workload.name, "LB_ms": 1.0}

    monkeypatch.setattr(bench_drivers, "measure", measure)
    so_far, mode = tmp_path / "so_far.json", bench_drivers.MODES["trial"]
    both = [(SMALL, torch.float32), (CROWDED, torch.float32)]
    first = bench_drivers.run_all(both[:1], mode, so_far)
    rows = bench_drivers.run_all(both, mode, so_far)
    assert measured == ["small", "crowded"]
    assert rows[:1] == first
    assert json.loads(so_far.read_text()) == rows


def test_the_records_name_machine_versions_and_commit():
    for path in (PROJECT / "benchmarks" / "results").glob("*.json"):
        if path.stem in ("drivers", "drivers-quick", "scaling", "kernel"):
            machine = json.loads(path.read_text())["machine"]
            assert {"processor", "threads", "torch", "commit", *timing.PEERS} <= set(machine)
    assert timing.machine()["scipy"] == importlib.metadata.version("scipy")


def test_whoever_is_faster_and_as_good_is_named(monkeypatch):
    one = row(1, 8, 4) | {"workload": "w", "rank": 2}
    one["contenders"]["svds"] = {"against_ours": 0.5, "excess": 1e-9, "rank": 2}
    one["contenders"]["randomized"] = {"against_ours": 0.4, "excess": 1e-3, "rank": 2}
    one["contenders"]["PEFT cat"] = {"against_ours": 0.3, "excess": None, "rank": 4}
    results = {"workloads": [one], "summary": summary([one])}
    monkeypatch.setattr(report, "drivers_record", lambda: {"results": results})
    assert report.summary().endswith("up to 1e-07: `svds` on w float32 (0.50).")
    del one["contenders"]["svds"]
    assert "Nobody" in report.summary()


def test_missed_and_unmeasured_targets_are_named():
    rows = [row(1, 4096, 936, ours=2.6, loop=1.0, memory=0.9)]
    text = report._missed(targets(rows))
    missed, absent = text.split(" Not measured in this run: ")
    assert "R = 936 (2.6, target ≤ 2.5)" in missed
    assert "memory" not in missed
    assert "R = 120" in absent
