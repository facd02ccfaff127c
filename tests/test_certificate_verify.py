"""What the certificate measures: ``verify=True`` against a dense product in longdouble."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from drivers import every_driver, exact_driver
from hetlora_agg.linalg import svd as svd_module
from test_certificate_inputs import (
    Problem,
    all_zero,
    exact_opposites,
    near_opposites,
    numbers,
    one_starting_point,
    problem,
    problems,
    solve,
    unrelated,
)
from test_gate_inputs import F32, F64, norms, orthonormal

# --- the error itself ---------------------------------------------------------------------------


def assert_measured(one, driver, **options):
    """Certificate's error and what it says about the bound; the error in longdouble."""
    svd = solve(one, driver, verify=True, **options)
    known, true = numbers(svd.certificate), one.error(svd)
    # a thousandth, which is what Gram matrices leave of it, or the rounding of sums in float64
    assert (np.abs(known["error"] - true) <= np.maximum(1e-3 * true, one.rounding())).all()
    for name in ("error", "probes"):
        assert np.isfinite(known[name]).all()
        assert (known[name] >= 0).all()
        assert known[name].shape == true.shape
    return svd, known, true


@exact_driver
@given(data=st.data())
def test_error_is_that_of_the_dense_product_and_within_its_bounds(driver, dtype, data):
    # products of 1e±140 at most: their squares, and those of their last digits, are float64 still
    scales = (-18, 0, 18) if dtype == F32 else (-70, 0, 70)
    one = data.draw(problems(dtype, scales=scales))
    _, known, true = assert_measured(one, driver)
    assert (known["tail"] - known["rounding"] <= known["error"]).all()
    assert (known["error"] <= known["tail"] + known["rounding"]).all()
    lowest, highest = chi_square_factors(PROBES, ALPHA)
    slack = highest * one.rounding()
    assert (lowest * true - slack <= known["probes"]).all()
    assert (known["probes"] <= highest * true + slack).all()


@exact_driver
@given(data=st.data())
def test_error_is_that_of_the_dense_product_where_clients_nearly_cancel(driver, dtype, data):
    assert_measured(data.draw(problems(dtype, [near_opposites], scales=[0])), driver)


RESIDUALS = [1e-8, 2e-7, 2e-6, 3e-5, 1e-3]
"""Relative to ‖W‖. Squared they are below float32's ε, and the second is below 1e-10: where Gram
matrices would cancel, and on both sides of where they are still used."""


def with_residual(residual, layers, dtype):
    """Four components of size 1 and two that make up the residual."""
    rng = np.random.default_rng(0)
    B, A = (np.stack([orthonormal(rng, rows, 6) for _ in range(3)]) for rows in (40, 28))
    B = B * np.array([1, 1, 1, 1, residual * 2**0.5, residual * 2**0.5])
    B, A = (torch.from_numpy(X.astype(np.float64)).to(dtype) for X in (B, A.swapaxes(-1, -2)))
    return Problem(B, A, 4) if layers else Problem(B[0], A[0], 4)


@every_driver
@pytest.mark.parametrize("layers", [(), (3,)], ids=["one layer", "batched"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_small_residuals_are_measured(residual, layers, driver, dtype):
    one = with_residual(residual, layers, dtype)
    _, known, true = assert_measured(one, driver)
    # the planted one: what was kept adds its rounding
    size = norms(one.truth[0], (-2, -1))
    assert (np.abs(true - residual * size) <= known["rounding"] + residual * size * 1e-3).all()


@every_driver
@pytest.mark.parametrize("layers", [(), (3,)], ids=["one layer", "batched"])
@pytest.mark.parametrize("kind", [all_zero, exact_opposites, one_starting_point])
def test_nothing_left_is_measured_as_rounding(kind, layers, driver, dtype):
    one = problem([kind], 3, (20, 6, 16), layers, 6, dtype)
    _, known, true = assert_measured(one, driver)
    assert (known["error"] <= known["rounding"]).all()
    assert (true <= known["rounding"]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("driver", ["gram", "qr", "dense", "auto"])
def test_error_of_half_precision_factors(driver, dtype):
    one = problem([unrelated, one_starting_point], 3, (20, 6, 16), (4,), 3, dtype)
    svd = solve(one, driver, verify=True)
    same = Problem(one.B.double(), one.A.double(), 3)
    true = same.error(svd)
    assert (np.abs(svd.certificate.error.numpy() - true) <= 1e-3 * true).all()


@pytest.mark.parametrize("driver", ["qr", "dense"])
@pytest.mark.parametrize(
    "exponents", [(-150, 0), (150, 0), (150, -150), (-200, 0), (200, 0)], ids=str
)
def test_error_at_the_ends_of_float64(exponents, driver):
    one = problem([unrelated], 3, (20, 6, 16), (2,), 3, F64, exponents)
    assert_measured(one, driver)


@pytest.mark.parametrize("driver", ["qr", "dense"])
@pytest.mark.parametrize("exponents", [(-150, -150), (150, 150)], ids=str)
def test_error_at_the_ends_of_float64_in_both_factors(exponents, driver):
    assert_measured(problem([unrelated], 3, (20, 6, 16), (2,), 3, F64, exponents), driver)


@pytest.mark.parametrize("driver", ["gram", "qr", "dense"])
@pytest.mark.parametrize("exponents", [(-18, -18), (18, 0), (18, 18), (18, -18)], ids=str)
def test_error_at_the_ends_of_float32(exponents, driver):
    assert_measured(problem([unrelated], 3, (20, 6, 16), (2,), 3, F32, exponents), driver)


# --- probes -------------------------------------------------------------------------------------


PROBES = 16
ALPHA = 1e-9
"""What one comparison leaves to chance, on either side; the probes are fixed: only once."""


def chi_square_factors(probes, alpha):
    """What the probes' root mean square is of the error, at least and at most, but for 2·alpha.

    Against a fixed E, ``‖E ω‖² / ‖E‖²`` is a mean of χ² with one degree of freedom, weighted by
    σ_i² / ‖E‖². The logarithm of χ²'s moment generating function is convex and 0 at 0, so that of
    the weighted mean is nowhere above that of one χ² alone, and Chernoff's bound for q = ``probes``
    of those holds whatever the spectrum: ``P(mean ≥ t) ≤ exp(−q (t − 1 − ln t) / 2)`` for t > 1,
    the same for ``≤ t`` below 1.
    """
    excess = 2 * math.log(1 / alpha) / probes
    lowest = brentq(lambda t: t - 1 - math.log(t) - excess, 1e-9, 1)
    highest = brentq(lambda t: t - 1 - math.log(t) - excess, 1, 100)
    return lowest**0.5, highest**0.5


def evenness(squares):
    """1 over the largest of the weights that the eigenvalues of a Gram matrix make."""
    return np.trace(squares) / np.linalg.norm(squares, 2)


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_probes_of_errors_in_many_directions_lie_closer(rank):
    # With no weight above 1/w the bound is that of w times as many probes.
    one = problem([unrelated], 5, (24, 8, 20), (64,), rank, F32)
    svd, known, true = assert_measured(one, "gram")
    U, S, Vh = (part.double().numpy() for part in (svd.U, svd.S, svd.Vh))
    E = (one.truth[0] - (U * S[:, None]) @ Vh).astype(np.float64) / true[:, None, None]
    squares = (E.swapaxes(-1, -2) @ E).astype(np.float64)
    found = (known["probes"] / true) ** 2
    for square, one_found in zip(squares, found, strict=True):
        lowest, highest = chi_square_factors(PROBES * evenness(square), ALPHA)
        assert lowest**2 <= one_found <= highest**2
    # All members meet the same probes: their mean is that of one error with their mean EᵀE.
    lowest, highest = chi_square_factors(PROBES * evenness(squares.mean(0)), ALPHA)
    assert lowest**2 <= found.mean() <= highest**2


def test_probes_do_not_depend_on_the_generator_of_the_caller():
    one = problem([unrelated], 5, (24, 8, 20), (), 3, F32)
    torch.manual_seed(1)
    first = solve(one, "gram", verify=True).certificate
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = solve(one, "gram", verify=True).certificate
    assert torch.equal(first.probes, second.probes)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


# --- wrong results are seen, right ones left alone ----------------------------------------------

SPOILED = {
    "a singular value": lambda s: s._replace(S=torch.cat([1.01 * s.S[:, :1], s.S[:, 1:]], -1)),
    "a sign": lambda s: s._replace(U=s.U * torch.tensor([1, -1, 1]).to(s.U)),
    "two vectors swapped": lambda s: s._replace(Vh=s.Vh[:, [0, 2, 1]]),
}


@every_driver
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_wrong_result_is_measured_as_such(spoil, driver, dtype, monkeypatch):
    def spoiled(run):
        return lambda B, A, rank: spoil(run(B, A, rank))

    wrong = {name: spoiled(run) for name, run in svd_module.DRIVERS.items()}
    monkeypatch.setattr(svd_module, "DRIVERS", wrong)
    one = problem([unrelated], 3, (20, 8, 16), (3,), 3, dtype)
    svd, known, _ = assert_measured(one, driver)
    assert (known["error"] > svd.certificate.bound.numpy()).all()


@every_driver
@pytest.mark.parametrize("layers", [(), (2, 3)], ids=str)
def test_measuring_changes_nothing(layers, driver, dtype):
    one = problem([unrelated, one_starting_point], 3, (20, 8, 16), layers, 5, dtype)
    before = one.B.clone(), one.A.clone()
    plain, measured = solve(one, driver), solve(one, driver, verify=True)
    assert plain.certificate.error is plain.certificate.probes is None
    for part in ("U", "S", "Vh"):
        assert torch.equal(getattr(plain, part), getattr(measured, part))
    for name, x in plain.certificate.tensors().items():
        assert torch.equal(x, measured.certificate.tensors()[name]), name
    assert plain.certificate.fallbacks == measured.certificate.fallbacks
    assert torch.equal(one.B, before[0])
    assert torch.equal(one.A, before[1])


def in_a_thread_of_its_own(body):
    """Scratch buffers belong to a thread: what is done to them here stays here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(body).result()


def with_gradients(tensors):
    return {name for name, x in tensors.items() if x.requires_grad}


@pytest.mark.parametrize("driver", ["gram", "qr", "dense"])
def test_measuring_trained_factors_records_no_gradients(driver):
    def body():
        one = problem([unrelated], 3, (20, 8, 16), (2,), 5, F32)
        trained = Problem(one.B.requires_grad_(), one.A, 5)
        return solve(trained, driver, verify=True).certificate.tensors()

    assert not with_gradients(in_a_thread_of_its_own(body))


def test_measuring_trained_factors_leaves_later_calls_alone():
    def body():
        one = problem([unrelated], 3, (20, 8, 16), (2,), 5, F32)
        plain = Problem(one.B.clone(), one.A, 5)
        solve(Problem(one.B.requires_grad_(), one.A, 5), "gram", verify=True)
        return solve(plain, "gram", verify=True).certificate.tensors()

    assert not with_gradients(in_a_thread_of_its_own(body))


@pytest.mark.parametrize("driver", ["gram", "qr", "dense"])
def test_measuring_inside_and_outside_inference_mode_is_the_same(driver):
    def body():
        one = problem([unrelated], 3, (20, 8, 16), (2,), 5, F32)
        found = []
        for inside in (True, False, True, False):
            with torch.inference_mode(inside):
                found.append(solve(one, driver, verify=True, workers=1).certificate.error)
        return found

    first, *others = in_a_thread_of_its_own(body)
    for other in others:
        assert np.array_equal(first.numpy(), other.numpy())
