"""What the certificate says without measuring: norms, bounds and what happened on the way."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drivers import every_driver, exact_driver
from hetlora_agg.linalg import svd_product
from test_certificate_inputs import (
    Problem,
    near_opposites,
    numbers,
    problem,
    problems,
    solve,
    unrelated,
)
from test_gate_inputs import F64, norms
from tolerance import eps, recompressed_gate

# --- bounds -------------------------------------------------------------------------------------


def assert_certified(given_problem, driver):
    """Every promise of `Certificate` about the matrix and the result."""
    svd = solve(given_problem, driver)
    known = numbers(svd.certificate)
    W, sigma, size = given_problem.truth
    rank, rounding = svd.S.shape[-1], known["rounding"]
    optimum = norms(sigma[..., rank:], -1)
    error = given_problem.error(svd)
    bound = svd.certificate.bound.numpy()
    assert (np.abs(known["norm"] - norms(W, (-2, -1))) <= rounding).all()
    assert (np.abs(known["tail"] - optimum) <= rounding).all()
    assert (known["tail"] - rounding <= error).all()
    assert (error <= bound).all()
    # R products of two sums over m and over n
    m, n = given_problem.shape
    off = (m + n + given_problem.B.shape[-1]) * eps(F64) * size
    assert (np.abs(known["size"] - size) <= off).all()
    for name, value in known.items():
        assert np.isfinite(value).all(), name
        assert (value >= 0).all(), name
    assert (known["pivot"] <= 1).all()
    assert (known["size"] >= known["norm"] - rounding).all()


@exact_driver
@given(data=st.data())
def test_tail_and_bounds_hold(driver, dtype, data):
    assert_certified(data.draw(problems(dtype)), driver)


@exact_driver
@given(data=st.data())
def test_tail_and_bounds_hold_where_clients_nearly_cancel(driver, dtype, data):
    assert_certified(data.draw(problems(dtype, kinds=[near_opposites], scales=[0])), driver)


@every_driver
@pytest.mark.parametrize("off_A", [0.0, 1e-8])
@pytest.mark.parametrize("off_B", [1e-2, 1e-3, 1e-4])
def test_tail_and_bounds_hold_for_opposite_B_and_shared_A(off_B, off_A, driver, dtype):
    # W is about off_B of its terms, its tail off_B · off_A of them; BᵀB is far from singular
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal((50, 11, 2)), rng.standard_normal((50, 2, 13))) for _ in "12"]
    (b, a), (db, da) = pairs
    B = np.concatenate([b, -b + off_B * db], -1)
    A = np.concatenate([a, a + off_A * da], -2)
    assert_certified(Problem(*(torch.from_numpy(X).to(dtype) for X in (B, A)), 2), driver)


@every_driver
def test_rounding_is_not_a_blank_cheque(driver, dtype):
    # no more than the gate of every result and eight roundings, ε for each
    easy = problem([unrelated], 1, (20, 8, 16), (3,), 8, dtype)
    known = numbers(solve(easy, driver).certificate)
    gate = [recompressed_gate(dtype, 20, 16, float(size)) for size in easy.truth[2]]
    assert (known["rounding"] <= np.array(gate) + 8 * eps(dtype) * known["norm"]).all()


@pytest.mark.parametrize("driver", ["qr", "dense"])
def test_where_lapack_stops_iterating_is_in_the_bound(driver):
    # columns of 1e-71 to 1e-82: the SVD of its 4x4 core is off by 49 ε of the norm, more than the
    # 10 max(out, in) of larger layers
    B = [
        [-1.3237e-78, 2.7897e-82, -8.8386e-80, 3.0916e-71],
        [3.6666e-78, 1.1711e-80, -6.27e-80, -7.8826e-71],
        [-7.8933e-79, -1.4273e-80, -4.9136e-80, 2.8955e-71],
        [1.882e-77, 8.2292e-81, -3.2719e-80, 4.4635e-71],
    ]
    A = [
        [-1.5958e-71, -1.7063e-71, -5.1315e-71, -8.2589e-71],
        [-6.6896e-71, 7.2113e-71, -1.5237e-71, 9.6181e-72],
        [-5.3232e-72, -2.1147e-71, 5.0173e-71, -8.3708e-71],
        [1.7921e-71, 2.283e-71, -1.2816e-71, -9.4833e-71],
    ]
    B, A = (torch.tensor(X, dtype=F64) for X in (B, A))
    assert_certified(Problem(B, A, 4), driver)


# --- counts and ratios --------------------------------------------------------------------------


def planted(rng, dtype, k, opposite):
    """k independent components, each twice, and two that cancel, ``opposite`` times as large."""
    B, A = unrelated(rng, 20, k, 16)
    y, z = opposite * rng.standard_normal((20, 2)), rng.standard_normal((2, 16))
    B, A = np.hstack([B, B, y, -y]), np.vstack([A, A, z, z])
    return torch.from_numpy(B).to(dtype), torch.from_numpy(A).to(dtype)


@every_driver
@pytest.mark.parametrize("rank", [2, 4, 16])
def test_kept_is_the_planted_rank_up_to_the_wanted_one(rank, driver, dtype):
    rng = np.random.default_rng(0)
    ks = [0, 1, 3, 4, 4, 0]
    members = [planted(rng, dtype, k, 1.0) for k in ks]
    R = max(B.shape[-1] for B, _ in members)
    B = torch.stack([torch.nn.functional.pad(B, (0, R - B.shape[-1])) for B, _ in members])
    A = torch.stack([torch.nn.functional.pad(A, (0, 0, 0, R - len(A))) for _, A in members])
    kept = svd_product(B, A, rank=rank, driver=driver).certificate.kept
    assert kept.dtype == torch.int64
    assert kept.tolist() == [min(k, rank) for k in ks]


@every_driver
@pytest.mark.parametrize("opposite", [0.0, 1.0, 1e3, 1e6])
def test_cancellation_is_the_planted_one(opposite, driver, dtype):
    B, A = planted(np.random.default_rng(0), dtype, 3, opposite)
    one = Problem(B, A, 10)
    W, _, size = one.truth
    norm = norms(W, (-2, -1))
    found = solve(one, driver).certificate
    # relative errors of size and norm add up
    off = float(found.rounding) / norm + 100 * eps(F64)
    assert abs(float(found.cancellation) - size / norm) <= 2 * off * size / norm


@every_driver
def test_cancellation_of_nothing_is_1_and_of_all_infinite(driver, dtype):
    B, A = planted(np.random.default_rng(0), dtype, 0, 1.0)
    found = svd_product(torch.stack([B, 0 * B]), torch.stack([A, A]), driver=driver).certificate
    assert found.cancellation.tolist() == [np.inf, 1.0]
    assert found.norm.tolist() == found.tail.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("sine", [1.0, 0.5, 1e-2, 1e-4, 2e-5])
def test_pivot_is_the_sine_of_the_angle_between_two_clients(sine):
    B = torch.zeros(9, 2)
    B[0, 0], B[0, 1], B[1, 1] = 3.0, (1 - sine**2) ** 0.5, sine
    A = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 7))).float()
    # of rank 1, since a wanted singular value as small as the angle is not read off a Gram matrix
    found = svd_product(B, A, rank=1, driver="gram").certificate
    true = float(B[1, 1]) / np.hypot(*B[:2, 1].double().tolist())
    # pivot² = 1 − cos², of which a few roundings of float64 are lost
    assert found.fallbacks == ()
    assert abs(float(found.pivot) ** 2 - true**2) <= 10 * eps(F64)


@pytest.mark.parametrize("sine", [5e-6, 1e-7, 0.0])
def test_a_pivot_that_is_not_relied_on_is_1(sine):
    B = torch.zeros(9, 2)
    B[0, 0], B[0, 1], B[1, 1] = 3.0, (1 - sine**2) ** 0.5, sine
    A = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 7))).float()
    found = svd_product(B, A, driver="gram").certificate
    assert found.fallbacks == ((0, "Householder QR"),)
    assert float(found.pivot) == 1.0


@pytest.fixture
def underflowing():
    """float32 factors whose product has singular values 1e-36, 1e-40 and 1e-46."""
    scales = torch.tensor([1e-18, 1e-20, 1e-23])
    return Problem(torch.eye(9, 3) * scales, torch.eye(3, 7) * scales[:, None], 3)


@pytest.mark.parametrize("driver", ["qr", "dense"])
def test_a_singular_value_that_underflows_leaves_no_vectors_and_is_not_kept(driver, underflowing):
    svd = solve(underflowing, driver)
    # 1e-40 is denormal, 1e-46 rounds to 0; in float64 all three are far above rounding
    assert (svd.S > 0).tolist() == [True, True, False]
    assert int(svd.certificate.kept) == 2
    assert not svd.U[:, 2].any()
    assert not svd.Vh[2].any()


@pytest.mark.parametrize("driver", ["qr", "dense"])
@pytest.mark.parametrize("component", [0, 1, 2])
def test_the_bound_counts_what_underflows(driver, component, underflowing):
    some = slice(component, component + 1)
    one = Problem(underflowing.B[:, some], underflowing.A[some], 1)
    svd = solve(one, driver)
    assert one.error(svd) <= float(svd.certificate.bound)
