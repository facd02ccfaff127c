"""The kernel under everything, against a dense float64 SVD by numpy."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.linalg import LinAlgError
from torch.utils._python_dispatch import TorchDispatchMode

from drivers import every_driver
from hetlora_agg import ConvergenceError, HetLoRAError, InputTypeError, InputValueError
from hetlora_agg.linalg import (
    all_finite,
    component_inner_products,
    component_peaks,
    exact_arithmetic,
    product_norm,
    select_driver,
    squared_norms,
    svd_product,
)
from hetlora_agg.linalg import gram as gram_module
from hetlora_agg.linalg import lapack as lapack_module
from hetlora_agg.linalg import memory as memory_module
from hetlora_agg.linalg import randomized as randomized_module
from hetlora_agg.linalg import svd as svd_module
from tolerance import distance, eps, recompressed_gate

OUT, IN, K, R_K = 40, 28, 4, 4
F32, F64 = torch.float32, torch.float64


def array(X):
    """As float64 numpy; by way of torch, since numpy has no bfloat16."""
    return X.double().numpy()


def normal(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows, columns, seed):
    return torch.linalg.qr(normal(rows, columns, seed=seed)).Q


def side_by_side(Bs, As):
    return torch.cat(list(Bs), -1), torch.cat(list(As), -2)


B_ = [normal(OUT, R_K, seed=10 + k) for k in range(K)]
A_ = [normal(R_K, IN, seed=50 + k) for k in range(K)]
U16, V16 = orthonormal(OUT, 16, 1), orthonormal(IN, 16, 2).mT
GRADED = torch.logspace(0, -20, 16, dtype=F64)
MIX = normal(16, 16, seed=3)
# each client writes its update with its own split of the size between the factors
SPLITS = [1e15, 1e-15, 1e-15, 1e15]

# All of one size, so that they also make one batch.
HARD = {
    "plain": side_by_side(B_, A_),
    "shared A plus 1e-4 noise": side_by_side(B_, [A_[0] + 1e-4 * A for A in A_]),
    "shared A plus 1e-7 noise": side_by_side(B_, [A_[0] + 1e-7 * A for A in A_]),
    "shared A": side_by_side(B_, [A_[0]] * K),
    "shared B": side_by_side([B_[0]] * K, A_),
    "duplicates": side_by_side([B_[0]] * K, [A_[0]] * K),
    "duplicates up to rounding": side_by_side(
        [B_[0] * (1 + 1e-7 * B) for B in B_], [A_[0] * (1 + 1e-7 * A) for A in A_]
    ),
    "one client with B = 0": side_by_side([0 * B_[0], *B_[1:]], A_),
    "one client with A = 0": side_by_side(B_, [*A_[:3], 0 * A_[3]]),
    "all zero": side_by_side([0 * B for B in B_], A_),
    "cancelling": side_by_side([B_[0], -B_[0], B_[1], -B_[1]], [A_[0], A_[0], A_[1], A_[1]]),
    "cancelling to 1e-4": side_by_side(
        [B_[0], -B_[0] + 1e-4 * B_[1], B_[2], -B_[2]], [A_[0], A_[0], A_[2], A_[2]]
    ),
    # small differences on both sides: W is far smaller than the Gram matrices that make it
    "cancelling to 1e-3, A shared to 1e-6": side_by_side(
        [B_[0], -B_[0] + 1e-3 * B_[2], B_[1], -B_[1] + 1e-3 * B_[3]],
        [A_[0], A_[0] + 1e-6 * A_[2], A_[1], A_[1] + 1e-6 * A_[3]],
    ),
    "B times 1e20": side_by_side([1e20 * B for B in B_], A_),
    "A times 1e-20": side_by_side(B_, [1e-20 * A for A in A_]),
    "B times 1e20, A times 1e-20": side_by_side([1e20 * B for B in B_], [1e-20 * A for A in A_]),
    "B times 1e-20, A times 1e20": side_by_side([1e-20 * B for B in B_], [1e20 * A for A in A_]),
    "clients of opposite scales": side_by_side(
        [s * B for s, B in zip(SPLITS, B_, strict=True)],
        [A / s for s, A in zip(SPLITS, A_, strict=True)],
    ),
    "duplicates of opposite scales": side_by_side(
        [s * B_[0] for s in SPLITS], [A_[0] / s for s in SPLITS]
    ),
    "one client 1e12 times the others": side_by_side([1e12 * B_[0], *B_[1:]], A_),
    "graded, all in B": (U16 * GRADED, V16),
    "graded, split": (U16 * GRADED.sqrt(), GRADED.sqrt().unsqueeze(-1) * V16),
    "graded, mixed": ((U16 * GRADED) @ MIX, torch.linalg.inv(MIX) @ V16),
    "equal singular values": (U16, V16),
    "clustered singular values": (U16 * (1 + 1e-9 * torch.arange(16)), V16),
    "two levels": (U16 * torch.tensor([1.0] * 8 + [1e-3] * 8), V16),
    "denormal B": side_by_side([1e-39 * B for B in B_], A_),
    "denormal A": side_by_side(B_, [1e-40 * A for A in A_]),
}
SHAPES = {
    "R above min(out, in)": (normal(9, 20, seed=4), normal(20, 7, seed=5)),
    "R equal to min(out, in)": (normal(9, 7, seed=4), normal(7, 7, seed=5)),
    "R between 0.8 and 1 of min(out, in)": (normal(13, 9, seed=4), normal(9, 10, seed=5)),
    "rank 1": (normal(9, 1, seed=4), normal(1, 12, seed=5)),
    "1x1": (torch.full((1, 1), -3.0, dtype=F64), torch.full((1, 1), 2.0, dtype=F64)),
    "1x1 of rank 3": (normal(1, 3, seed=4), normal(3, 1, seed=5)),
    "one row": (normal(1, 3, seed=4), normal(3, 12, seed=5)),
    "one column": (normal(12, 3, seed=4), normal(3, 1, seed=5)),
}
NAMED = {**HARD, **SHAPES}
hard_inputs = pytest.mark.parametrize("name", NAMED)


def scale(B, A):
    """S = Σ_j ‖b_j‖ ‖a_j‖ of one member, what every tolerance is relative to."""
    # hypot: neither overflow nor underflow on the way, where the sum of squares has both
    pairs = zip(array(B).T, array(A), strict=True)
    return math.fsum(math.hypot(*b) * math.hypot(*a) for b, a in pairs)


def assert_leading_svd(B, A, svd, index=()):
    """Every promise of svd_product for the member at an index of the leading dimensions."""
    B, A = B[index], A[index]
    U, S, Vh = (array(part[index]) for part in (svd.U, svd.S, svd.Vh))
    W = array(B) @ array(A)
    rank, epsilon = S.shape[-1], eps(svd.S.dtype)
    gate = recompressed_gate(svd.S.dtype, *W.shape, scale(B, A))
    exact = np.linalg.svd(W, compute_uv=False)
    tail = float(np.linalg.norm(exact[rank:]))

    # a smaller error than the optimum is as wrong: there would be more than rank components
    assert abs(distance(W, (U * S) @ Vh) - tail) <= gate
    assert np.abs(S - exact[:rank]).max() <= gate
    assert (S >= 0).all()
    assert (np.diff(S) <= 0).all()
    # norms come from the core, which the factors of that dtype determine
    assert abs(float(svd.certificate.norm[index]) - np.linalg.norm(exact)) <= gate
    assert abs(float(svd.certificate.tail[index]) - tail) <= gate

    alive = S > 0
    identity = np.eye(alive.sum())
    U_alive, V_alive = U[:, alive], Vh[alive].T
    assert np.linalg.norm(identity - U_alive.T @ U_alive) <= 10 * len(U) * epsilon
    assert np.linalg.norm(identity - V_alive.T @ V_alive) <= 10 * Vh.shape[-1] * epsilon
    assert not U[:, ~alive].any()
    assert not Vh[~alive].any()
    # sign: the entry of largest magnitude is positive
    assert (U_alive.max(0, initial=0) == np.abs(U_alive).max(0, initial=0)).all()


@every_driver
@hard_inputs
def test_leading_triplets_are_the_best_of_every_rank(name, driver, dtype):
    B, A = (X.to(dtype) for X in NAMED[name])
    thin = min(*B.shape, A.shape[-1])
    for rank in {1, (thin + 1) // 2, thin}:
        svd = svd_product(B, A, rank=rank, driver=driver)
        assert svd.U.dtype == svd.S.dtype == svd.Vh.dtype == dtype
        assert svd.U.shape == (len(B), rank)
        assert svd.S.shape == (rank,)
        assert svd.Vh.shape == (rank, A.shape[-1])
        assert_leading_svd(B, A, svd)


@every_driver
def test_a_batch_of_all_hard_inputs_is_solved_member_by_member(driver, dtype):
    B, A = (torch.stack(part).to(dtype) for part in zip(*HARD.values(), strict=True))
    B, A = B.reshape(2, 7, 2, *B.shape[1:]), A.reshape(2, 7, 2, *A.shape[1:])
    svd = svd_product(B, A, rank=6, driver=driver)
    assert svd.U.shape == (2, 7, 2, OUT, 6)
    assert svd.S.shape == (2, 7, 2, 6)
    assert svd.Vh.shape == (2, 7, 2, 6, IN)
    assert svd.certificate.norm.shape == svd.certificate.tail.shape == (2, 7, 2)
    for index in np.ndindex(2, 7, 2):
        assert_leading_svd(B, A, svd, index)


@every_driver
@pytest.mark.parametrize("shape", [(40, 28), (3, 11), (11, 3)], ids=str)
@pytest.mark.parametrize("sign", [1, -1], ids=["alike", "cancelling"])
def test_every_degree_of_near_dependence(driver, dtype, shape, sign):
    # pairs of columns and of rows that differ by 1, 1e-1, …, 1e-9: between the thresholds too
    out, in_ = shape
    b, db, a, da = (
        normal(out, 2, seed=1),
        normal(out, 2, seed=2),
        normal(2, in_, seed=3),
        normal(2, in_, seed=4),
    )
    members = [
        side_by_side([b, sign * b + 10.0**-i * db], [a, a + 10.0**-j * da])
        for i in range(10)
        for j in range(10)
    ]
    B, A = (torch.stack(part).to(dtype) for part in zip(*members, strict=True))
    svd = svd_product(B, A, driver=driver)
    for i in range(len(members)):
        assert_leading_svd(B, A, svd, (i,))


# numerical rank of inputs that are exactly dependent
DEFICIENT = {
    "shared A": 4,
    "shared B": 4,
    "duplicates": 4,
    "duplicates of opposite scales": 4,
    "one client with B = 0": 12,
    "one client with A = 0": 12,
    "cancelling": 0,
    "cancelling to 1e-4": 4,
    "all zero": 0,
}


@every_driver
@pytest.mark.parametrize("name", DEFICIENT)
def test_components_beyond_the_numerical_rank_are_exact_zeros(name, driver, dtype):
    svd = svd_product(*(X.to(dtype) for X in HARD[name]), driver=driver)
    assert int((svd.S > 0).sum()) == DEFICIENT[name]
    assert not svd.U[:, DEFICIENT[name] :].any()
    assert not svd.Vh[DEFICIENT[name] :].any()


@pytest.mark.parametrize("n", [6, 8, 16])
@pytest.mark.parametrize("seed", range(6))
def test_rank_1_clients_that_cancel_exactly_leave_nothing(n, seed):
    # the rounding of a core grows with the number of columns that share one direction
    b, a = normal(37, 1, seed=seed).float(), normal(1, 39, seed=seed + 100).float()
    B, A = side_by_side([b, -b] * (n // 2), [a] * n)
    assert not svd_product(B, A).S.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("driver", ["gram", "qr", "dense", "auto"])
def test_half_precision_is_computed_and_returned_in_float32(driver, dtype):
    B, A = (X.to(dtype) for X in HARD["shared A plus 1e-4 noise"])
    svd = svd_product(B, A, driver=driver)
    assert svd.U.dtype == svd.S.dtype == svd.Vh.dtype == F32
    assert_leading_svd(B, A, svd)


@pytest.mark.parametrize("driver", ["qr", "dense", "auto"])
@pytest.mark.parametrize("size", [1e150, 1e-150, 1e200, 1e-200, 1e300, 1e-300])
def test_float64_factors_of_far_apart_scales(driver, size):
    B, A = HARD["plain"]
    assert_leading_svd(size * B, A / size, svd_product(size * B, A / size, driver=driver))


@pytest.mark.parametrize("driver", ["qr", "dense", "auto"])
@pytest.mark.parametrize("exponent", [700, -700])
def test_float64_products_whose_squares_leave_float64(driver, exponent):
    # times a power of two: everything scales along, the norms too
    B, A = HARD["plain"]
    plain, scaled = (svd_product(X, A, rank=6, driver=driver) for X in (B, B * 2.0**exponent))
    gate = recompressed_gate(F64, OUT, IN, scale(B, A))
    back = 2.0**-exponent
    assert distance(array(back * scaled.S), array(plain.S)) <= gate
    for name in ("norm", "tail"):
        found = back * getattr(scaled.certificate, name)
        assert abs(float(found) - float(getattr(plain.certificate, name))) <= gate


@pytest.mark.parametrize("name", ["plain", "one client 1e12 times the others", "shared A"])
def test_gram_by_name_keeps_the_product_of_float64_factors(name):
    # only the product: vectors of small singular values are outside its declared class
    B, A = HARD[name]
    svd = svd_product(B, A, driver="gram")
    W = array(B @ A)
    gate = recompressed_gate(F64, OUT, IN, scale(B, A))
    assert distance(W, array((svd.U * svd.S) @ svd.Vh)) <= gate


@pytest.mark.parametrize("pair", [("gram", "qr"), ("gram", "dense"), ("qr", "dense")])
def test_drivers_are_interchangeable(pair):
    B, A = (X.float() for X in HARD["plain"])
    one, other = (svd_product(B, A, driver=driver) for driver in pair)
    gate = 2 * recompressed_gate(F32, OUT, IN, scale(B, A))
    assert distance(array(one.S), array(other.S)) <= gate
    # singular values of this input are apart, so signs and order make the vectors agree too
    gap = -np.diff(array(one.S)).max()
    error = distance(array(one.U) * array(one.S), array(other.U) * array(other.S))
    assert error <= gate * (1 + 2 * float(one.S[0]) / (gap - gate)) * math.sqrt(16)


@every_driver
def test_repeats_are_bit_equal_and_arguments_are_left_alone(driver, dtype):
    B, A = (X.to(dtype) for X in HARD["shared A"])
    before = B.clone(), A.clone()
    one, two = (svd_product(B, A, driver=driver) for _ in range(2))
    assert torch.equal(one.U, two.U)
    assert torch.equal(one.S, two.S)
    assert torch.equal(one.Vh, two.Vh)
    assert torch.equal(B, before[0])
    assert torch.equal(A, before[1])


@every_driver
def test_strided_expanded_and_trained_tensors_are_taken_as_they_are(driver, dtype):
    B, A = (X.to(dtype) for X in HARD["plain"])
    plain = svd_product(B.expand(3, OUT, 16), A.expand(3, 16, IN).contiguous(), driver=driver)
    odd = svd_product(
        B.mT.contiguous().mT.expand(3, OUT, 16).requires_grad_(),
        A.repeat_interleave(2, -1)[:, ::2].expand(3, 16, IN),
        driver=driver,
    )
    assert not odd.U.requires_grad
    for i in range(3):
        assert_leading_svd(B.expand(3, OUT, 16).detach(), A.expand(3, 16, IN), odd, (i,))
    gate = 2 * recompressed_gate(dtype, OUT, IN, scale(B, A))
    assert distance(array(plain.S), array(odd.S)) <= math.sqrt(3) * gate


# --- neighbours in a batch ----------------------------------------------------------------------


@every_driver
@pytest.mark.parametrize("name", [name for name in HARD if name != "plain"])
def test_a_hard_member_does_not_change_its_neighbours(name, driver, dtype):
    easy = [(B * 2.0**i, A) for i, (B, A) in enumerate([HARD["plain"]] * 3)]
    calm = [torch.stack(part).to(dtype) for part in zip(*easy, strict=True)]
    upset = [torch.stack(part).to(dtype) for part in zip(easy[0], HARD[name], easy[2], strict=True)]
    expected = svd_product(calm[0], calm[1], driver=driver)
    found = svd_product(upset[0], upset[1], driver=driver)
    for i in (0, 2):
        for part in ("U", "S", "Vh"):
            assert torch.equal(getattr(found, part)[i], getattr(expected, part)[i])
        assert found.certificate.norm[i] == expected.certificate.norm[i]
    assert not {0, 2} & {member for member, _ in found.certificate.fallbacks}


def test_fallbacks_name_the_members_that_left_the_fast_path():
    names = ["plain", "shared A", "equal singular values", "duplicates", "B times 1e20"]
    B, A = (torch.stack(part).float() for part in zip(*(HARD[n] for n in names), strict=True))
    svd = svd_product(B, A, driver="gram")
    assert [member for member, _ in svd.certificate.fallbacks] == [1, 3]
    assert all(how == "Householder QR" for _, how in svd.certificate.fallbacks)


@every_driver
def test_easy_input_falls_back_nowhere(driver, dtype):
    B, A = (X.to(dtype).expand(4, *X.shape) for X in HARD["plain"])
    solve = svd_product(B, A, driver=driver).certificate
    assert solve.fallbacks == ()
    assert solve.driver == (select_driver(OUT, IN, 16, dtype=dtype) if driver == "auto" else driver)


@pytest.mark.parametrize("driver", ["gram", "qr", "dense"])
def test_a_small_workspace_gives_the_same_with_members_numbered_through(driver, monkeypatch):
    names = ["plain", "shared A", "two levels", "duplicates", "all zero", "equal singular values"]
    B, A = (torch.stack(part).float() for part in zip(*(HARD[n] for n in names), strict=True))
    B, A = B.reshape(2, 3, OUT, 16), A.reshape(2, 3, 16, IN)
    whole = svd_product(B, A, rank=4, driver=driver)
    sizes = []
    run = svd_module.DRIVERS[driver]

    def counted(b, a, rank):
        sizes.append(len(b))
        return run(b, a, rank)

    monkeypatch.setattr(svd_module, "DRIVERS", {**svd_module.DRIVERS, driver: counted})
    per_member = memory_module.working_bytes(OUT, IN, 16, 4, F32, driver)
    for budget, expected in ((1, [1] * 6), (4 * per_member, [3, 3])):
        sizes.clear()
        monkeypatch.setattr(memory_module, "WORKSPACE_BYTES", budget)
        chunked = svd_product(B, A, rank=4, driver=driver, workers=1)
        assert sizes == expected
        assert chunked.certificate.fallbacks == whole.certificate.fallbacks
        for index in np.ndindex(2, 3):
            assert_leading_svd(B, A, chunked, index)
            gate = recompressed_gate(F32, OUT, IN, scale(B[index], A[index]))
            assert distance(array(chunked.S[index]), array(whole.S[index])) <= gate
            assert (
                abs(float(chunked.certificate.tail[index] - whole.certificate.tail[index])) <= gate
            )


@pytest.mark.parametrize("name", ["plain", "one client with B = 0", "denormal B", "shared A"])
def test_fused_kernels_give_the_same_where_they_are_selected(name, monkeypatch):
    # on a CPU "auto" runs their torch twins: what is tested is that they are fitted in rightly
    B, A = (torch.stack([X, 2 * X]).float() for X in NAMED[name])
    asked = []

    def chosen(kernel, device_type):
        asked.append(kernel)
        return True

    monkeypatch.setattr(gram_module, "selected", chosen)
    monkeypatch.setattr(lapack_module, "selected", chosen)
    svd = svd_product(B, A, rank=4, driver="gram")
    assert {"ragged_gram", "ragged_output", "jacobi"} <= set(asked)
    for i in range(2):
        assert_leading_svd(B, A, svd, (i,))


@pytest.mark.parametrize("name", ["plain", "shared A", "one client with B = 0", "all zero"])
def test_padding_R_changes_nothing(name, monkeypatch):
    # as on a GPU; 16 components become 21
    B, A = (torch.stack([X, 2 * X]).float() for X in HARD[name])
    monkeypatch.setattr(svd_module, "PAD_TO", {"cpu": 7})
    for rank in (4, 16):
        svd = svd_product(B, A, rank=rank, driver="gram", verify=True)
        assert svd.S.shape == (2, rank)
        assert (svd.certificate.error <= svd.certificate.bound).all()
        for i in range(2):
            assert_leading_svd(B, A, svd, (i,))


# --- when LAPACK does not converge --------------------------------------------------------------

LARGE = 1e6


@pytest.fixture
def marked_batch():
    """Three members, the middle one recognised by its size in every core made of it."""
    B, A = (torch.stack([X, X, X]) for X in HARD["plain"])
    B[1] *= LARGE
    return B, A


def failing(real, times):
    """A decomposition that fails on the marked member: in batches, and ``times`` times alone."""
    left = [times]

    def attempt(M, *args, **options):
        marked = bool((torch.linalg.matrix_norm(M) > LARGE).any())
        if marked and (M.dim() > 2 or left[0] > 0):
            left[0] -= M.dim() == 2
            raise LinAlgError("did not converge")
        return real(M, *args, **options)

    return attempt


@pytest.mark.parametrize("driver", ["qr", "dense"])
@pytest.mark.parametrize(
    ("times", "how"),
    [
        (0, "SVD by itself on the CPU"),
        (1, "SVD of the transpose on the CPU"),
        (2, "SVD after QR on the CPU"),
    ],
)
def test_each_step_of_the_ladder_is_right_and_reported(
    driver, times, how, marked_batch, monkeypatch
):
    monkeypatch.setattr(torch.linalg, "svd", failing(torch.linalg.svd, times))
    B, A = marked_batch
    svd = svd_product(B, A, rank=5, driver=driver)
    alone = "SVD by itself on the CPU"
    assert svd.certificate.fallbacks == ((0, alone), (1, how), (2, alone))
    for i in range(3):
        assert_leading_svd(B, A, svd, (i,))


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
@pytest.mark.parametrize("times", [1, 2])
def test_the_ladder_takes_tall_and_wide_cores(shape, times, monkeypatch):
    B = torch.stack([LARGE * normal(shape[0], 40, seed=1)] * 2)
    A = torch.stack([normal(40, shape[1], seed=2)] * 2)
    B[0] /= LARGE
    monkeypatch.setattr(torch.linalg, "svd", failing(torch.linalg.svd, times))
    svd = svd_product(B, A, driver="dense")
    assert [how for _, how in svd.certificate.fallbacks].count("SVD by itself on the CPU") == 1
    assert [member for member, _ in svd.certificate.fallbacks] == [0, 1]
    for i in range(2):
        assert_leading_svd(B, A, svd, (i,))


@pytest.mark.parametrize("driver", ["qr", "dense"])
@pytest.mark.parametrize("workspace", [1 << 29, 1], ids=["one chunk", "a chunk each"])
def test_a_member_no_driver_can_take_is_named(driver, workspace, marked_batch, monkeypatch):
    monkeypatch.setattr(memory_module, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(torch.linalg, "svd", failing(torch.linalg.svd, 99))
    with pytest.raises(ConvergenceError, match=r"no driver converged on batch member 1\b"):
        svd_product(*marked_batch, driver=driver)


def test_the_rank_revealing_route_climbs_the_ladder_for_the_right_member(monkeypatch):
    # the marked member is third in the batch and second of those that leave the fast path
    names = ["plain", "shared A", "duplicates"]
    B, A = (torch.stack(part).float() for part in zip(*(HARD[n] for n in names), strict=True))
    real, attempts = torch.linalg.svd, []

    def attempt(M, *args, **options):
        if M.dim() > 2:
            raise LinAlgError("did not converge")
        attempts.append(M)
        if len(attempts) == 2:
            raise LinAlgError("did not converge")
        return real(M, *args, **options)

    monkeypatch.setattr(torch.linalg, "svd", attempt)
    svd = svd_product(B, A, driver="gram")
    assert (2, "SVD of the transpose on the CPU") in svd.certificate.fallbacks
    assert {member for member, _ in svd.certificate.fallbacks} == {1, 2}
    for i in range(3):
        assert_leading_svd(B, A, svd, (i,))


def test_the_rank_revealing_route_names_the_member_no_driver_can_take(monkeypatch):
    names = ["plain", "plain", "shared A"]
    B, A = (torch.stack(part).float() for part in zip(*(HARD[n] for n in names), strict=True))

    def attempt(*args, **options):
        raise LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", attempt)
    with pytest.raises(ConvergenceError, match=r"no driver converged on batch member 2\b"):
        svd_product(B, A, driver="gram")


@pytest.mark.parametrize("driver", ["gram", "dense"])
@pytest.mark.parametrize("name", ["plain", "shared A"])
def test_a_failing_eigendecomposition_is_replaced_and_reported(name, driver, monkeypatch):
    def attempt(*args, **options):
        raise LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", attempt)
    B, A = (torch.stack([X, X]).float() for X in HARD[name])
    svd = svd_product(B, A, rank=3, driver=driver)
    for i in range(2):
        assert_leading_svd(B, A, svd, (i,))
    # nothing falls back without a word, whatever route the member takes afterwards
    reported = [member for member, how in svd.certificate.fallbacks if "revealing" not in how]
    assert set(reported) == {0, 1}


def test_no_decomposition_at_all_is_an_error(monkeypatch):
    def attempt(*args, **options):
        raise LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", attempt)
    monkeypatch.setattr(torch.linalg, "svd", attempt)
    with pytest.raises(ConvergenceError, match=r"no driver converged on batch member 0\b"):
        svd_product(*(X.float() for X in HARD["plain"]), driver="gram")


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["B", "A"])
@every_driver
def test_nan_and_inf_are_refused_with_their_place(factor, value, driver, dtype):
    factors = {"B": torch.ones(2, 5, 3, dtype=dtype), "A": torch.ones(2, 3, 6, dtype=dtype)}
    factors[factor][1, 2, 1] = value
    with pytest.raises(InputValueError, match=rf"{factor} has NaN or Inf, first at \[1, 2, 1\]"):
        svd_product(**factors, driver=driver)


BAD_CALLS = {
    "int": (torch.ones(3, 2, dtype=torch.int64), torch.ones(2, 3), {}, "B must be a float16"),
    "complex": (torch.ones(3, 2), torch.ones(2, 3) * 1j, {}, "A must be.*complex64"),
    "float8": (torch.ones(3, 2).to(torch.float8_e4m3fn), torch.ones(2, 3), {}, "float8_e4m3fn"),
    "numpy": (np.ones((3, 2)), torch.ones(2, 3), {}, "got ndarray"),
    "mixed dtypes": (torch.ones(3, 2), torch.ones(2, 3).double(), {}, "one dtype and device"),
    "mixed devices": (torch.ones(3, 2, device="meta"), torch.ones(2, 3), {}, "on meta"),
    "vector": (torch.ones(3), torch.ones(3, 3), {}, r"\(\*layers, rows, columns\).*\(3,\)"),
    "empty": (torch.ones(3, 0), torch.ones(0, 3), {}, r"none of them 0, got \(3, 0\)"),
    "R differs": (torch.ones(3, 2), torch.ones(3, 4), {}, r"got \(3, 2\) and \(3, 4\)"),
    "layers differ": (torch.ones(2, 3, 1), torch.ones(3, 1, 4), {}, r"\(2, 3, 1\) and \(3, 1, 4\)"),
    "rank 0": (torch.ones(3, 2), torch.ones(2, 3), {"rank": 0}, "at least 1, got 0"),
    "rank bool": (torch.ones(3, 2), torch.ones(2, 3), {"rank": True}, "integer.*got True"),
    "rank float": (torch.ones(3, 2), torch.ones(2, 3), {"rank": 1.0}, "integer.*got 1.0"),
    "driver": (torch.ones(3, 2), torch.ones(2, 3), {"driver": "lu"}, r"'lu'; known: \['auto', 'd"),
}


@pytest.mark.parametrize(("B", "A", "options", "match"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_what_svd_product_refuses(B, A, options, match):
    with pytest.raises(HetLoRAError, match=match) as caught:
        svd_product(B, A, **options)
    assert isinstance(caught.value, (InputTypeError, InputValueError))


def test_a_rank_above_the_sizes_is_cut_to_them():
    svd = svd_product(torch.ones(3, 2), torch.ones(2, 5), rank=100)
    assert svd.S.shape == (2,)


@pytest.mark.parametrize("driver", ["gram", "dense"])
def test_a_singular_value_beyond_the_dtype_is_an_error(driver):
    B, A = torch.full((3, 1), 1e20), torch.full((1, 3), 1e20)
    with pytest.raises(ConvergenceError, match=r"3e\+40 is beyond 3.4e\+38.*float64"):
        svd_product(B, A, driver=driver)


# --- which driver -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "in_", "R", "dtype", "expected"),
    [
        (100, 100, 80, F32, "gram"),
        (100, 100, 81, F32, "dense"),
        (100, 100, 80, F64, "qr"),
        (100, 100, 81, F64, "dense"),
        (4096, 100, 80, F32, "gram"),
        (100, 4096, 80, F32, "gram"),
        (100, 4096, 100, F32, "gram"),
        (4096, 100, 100, F64, "qr"),
        (100, 4096, 101, F32, "dense"),
        (4096, 100, 101, F64, "dense"),
        (100, 150, 96, F32, "gram"),
        (150, 100, 97, F32, "dense"),
        (4096, 4096, 936, F32, "gram"),
        (1024, 1024, 4096, F32, "dense"),
        (1024, 1024, 4096, F64, "dense"),
        (4096, 4096, 120, torch.bfloat16, "gram"),
        (4096, 4096, 120, torch.float16, "gram"),
        (1, 1, 1, F32, "dense"),
    ],
)
def test_select_driver_follows_its_rules_in_order(out, in_, R, dtype, expected):
    for rank in (None, 1, R):
        for device in ("cpu", "cuda"):
            assert select_driver(out, in_, R, rank, dtype, device) == expected


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.numel())
        return result


@pytest.mark.parametrize("name", ["easy", "shared A"])
@pytest.mark.parametrize("driver", ["gram", "qr", "auto"])
def test_the_dense_matrix_is_never_formed(driver, name):
    out, in_, R = 300, 200, 12
    B = normal(2, out, R, seed=1).float()
    A = normal(2, R, in_, seed=2).float()
    if name == "shared A":
        A[:, 6:] = A[:, :6]
    with Largest() as largest:
        svd_product(B, A, driver=driver)
    assert largest.elements <= 2 * out * R
    with Largest() as control:
        svd_product(B, A, driver="dense")
    assert control.elements >= 2 * out * in_


# --- the caller's precision settings ------------------------------------------------------------

needs_switches = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9"
)


def matmuls():
    """The switches of torch 2.9 and later."""
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def precisions():
    return [owner.fp32_precision for owner in matmuls()]


@pytest.fixture
def reduced():
    """Matrix products in TF32 on CUDA and in bfloat16 on the CPU."""
    for owner, value in zip(matmuls(), ("tf32", "bf16"), strict=True):
        owner.fp32_precision = value
    yield
    for owner in matmuls():
        owner.fp32_precision = "none"


@needs_switches
@pytest.mark.parametrize("driver", ["gram", "qr", "dense"])
def test_reduced_precision_changes_nothing_and_stays_set(driver, reduced):
    B, A = (X.float() for X in HARD["plain"])
    found = svd_product(B, A, driver=driver)
    assert precisions() == ["tf32", "bf16"]
    for owner in matmuls():
        owner.fp32_precision = "none"
    expected = svd_product(B, A, driver=driver)
    assert precisions() == ["none", "none"]
    assert torch.equal(found.U, expected.U)
    assert torch.equal(found.S, expected.S)
    assert torch.equal(found.Vh, expected.Vh)


def stop_inside():
    with exact_arithmetic("cpu"):
        assert precisions() == ["ieee", "ieee"]
        assert not torch.is_grad_enabled()
        raise RuntimeError("inside")


@needs_switches
def test_settings_are_restored_after_an_error_too(reduced):
    with pytest.raises(RuntimeError, match="inside"):
        stop_inside()
    assert torch.is_grad_enabled()
    assert precisions() == ["tf32", "bf16"]


@needs_switches
def test_a_setting_inherited_from_the_global_one_is_still_inherited_afterwards():
    # reading gives the effective value; written back as such it would cut the inheritance
    torch.backends.fp32_precision = "tf32"
    try:
        svd_product(torch.ones(9, 2), torch.ones(2, 9))
        assert precisions() == ["tf32", "tf32"]
        torch.backends.fp32_precision = "ieee"
        assert precisions() == ["ieee", "ieee"]
    finally:
        torch.backends.fp32_precision = "none"
        for owner in matmuls():
            owner.fp32_precision = "none"


@pytest.mark.parametrize("driver", ["gram", "qr", "dense"])
def test_autocast_changes_nothing_and_stays_on(driver):
    B, A = (X.float() for X in HARD["plain"])
    expected = svd_product(B, A, driver=driver)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = svd_product(B, A, driver=driver)
        assert torch.is_autocast_enabled("cpu")
        # control: outside the kernel autocast does bite
        assert (B @ A).dtype == torch.bfloat16
    assert torch.equal(found.U, expected.U)
    assert torch.equal(found.S, expected.S)
    assert torch.equal(found.Vh, expected.Vh)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, F64])
def test_the_default_dtype_does_not_matter(default):
    names = ["plain", "shared A"]
    B, A = (torch.stack(part).float() for part in zip(*(HARD[n] for n in names), strict=True))
    for driver in ("gram", "qr", "dense"):
        expected = svd_product(B, A, driver=driver)
        torch.set_default_dtype(default)
        try:
            found = svd_product(B, A, driver=driver)
        finally:
            torch.set_default_dtype(F32)
        assert torch.equal(found.U, expected.U)
        assert torch.equal(found.S, expected.S)
        assert torch.equal(found.Vh, expected.Vh)


# --- norms through the factors ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, F32, F64])
@pytest.mark.parametrize("name", [*SHAPES, "plain", "shared A", "B times 1e20, A times 1e-20"])
def test_product_norm_is_that_of_the_dense_matrix(name, dtype):
    B, A = NAMED[name]
    if dtype == torch.float16 and B.abs().max() > 1e3:
        B, A = B * 1e-20, A * 1e20
    B, A = B.to(dtype), A.to(dtype)
    norm = product_norm(B, A)
    assert norm.dtype == F64
    # the arithmetic is float64 whatever the factors are
    gate = recompressed_gate(F64, len(B), A.shape[-1], scale(B, A))
    assert abs(float(norm) - np.linalg.norm(array(B) @ array(A))) <= gate


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_product_norm_of_a_difference_of_equal_products_is_rounding(shape):
    B, A = normal(*shape, 40, 5, seed=1), normal(*shape, 5, 30, seed=2)
    G = normal(*shape, 5, 5, seed=3)
    # the same matrix with other factors
    B_other, A_other = B @ G, torch.linalg.solve(G, A)
    difference = product_norm(torch.cat([B, -B_other], -1), torch.cat([A, A_other], -2))
    assert difference.shape == shape
    for index in np.ndindex(shape):
        S = scale(B[index], A[index]) + scale(B_other[index], A_other[index])
        assert float(difference[index]) <= recompressed_gate(F64, 40, 30, S)


def test_component_inner_products_and_squared_norms_match_dense_ones():
    B, A = normal(2, 9, 3, seed=1).float(), normal(2, 3, 7, seed=2).float()
    B_other, A_other = normal(2, 9, 4, seed=3).float(), normal(2, 4, 7, seed=4).float()
    inner = component_inner_products(B, A, B_other, A_other)
    squares = squared_norms(B, A)
    assert inner.dtype == squares.dtype == F64
    assert inner.shape == (2, 3)
    for i in range(2):
        W = array(B[i]) @ array(A[i])
        W_other = array(B_other[i]) @ array(A_other[i])
        for j in range(3):
            exact = (np.outer(array(B[i, :, j]), array(A[i, j])) * W_other).sum()
            # float64 sums of 9 and 7 products
            S = scale(B[i][:, [j]], A[i][[j]]) * scale(B_other[i], A_other[i])
            assert abs(float(inner[i, j]) - exact) <= 20 * eps(F64) * S
        assert abs(float(squares[i]) - (W**2).sum()) <= 20 * eps(F64) * scale(B[i], A[i]) ** 2


def test_squared_norms_of_cancelling_components_are_not_negative():
    B, A = (X.float() for X in HARD["cancelling"])
    square = squared_norms(B, A)
    assert float(square) >= 0
    # Gram matrices: the square is exact to rounding of S², its root only to that root
    assert float(square) <= 16 * 16 * eps(F64) * scale(B, A) ** 2


def test_component_peaks_let_nan_and_inf_through():
    B, A = torch.ones(2, 4, 3), -2 * torch.ones(2, 3, 5)
    B[0, 1, 2], A[1, 0, 3] = math.nan, -math.inf
    peaks_B, peaks_A = component_peaks(B, A)
    assert torch.isnan(peaks_B[0, 2])
    assert peaks_A[1, 0] == math.inf
    assert peaks_B[1].tolist() == [1.0, 1.0, 1.0]
    assert peaks_A[0].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1.0, 2.0], True),
        ([1e308, 1e308, 1e308], True),
        ([math.inf, -math.inf], False),
        ([math.nan], False),
        ([-math.inf, 1e308], False),
    ],
)
def test_all_finite_is_not_fooled_by_sums(values, finite):
    assert all_finite(torch.tensor(values, dtype=F64)) is finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32])
def test_all_finite_takes_the_largest_numbers_of_a_dtype(dtype):
    assert all_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))


BEFORE_2_9 = """
import torch
from hetlora_agg.linalg.precision import _for_all
torch.set_float32_matmul_precision("medium")
with _for_all():
    assert torch.get_float32_matmul_precision() == "highest"
assert torch.get_float32_matmul_precision() == "medium"
"""


def test_the_one_switch_of_older_torch_is_restored():
    # In a process of its own: the old and the new switches do not mix.
    run = subprocess.run([sys.executable, "-c", BEFORE_2_9], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# --- randomized drivers -------------------------------------------------------------------------


def decaying(rate, members=2, size=400, R=240, seed=0):
    """Factors whose product has singular values ``rate^i``, of random sizes on either side."""
    S = rate ** torch.arange(R, dtype=F64)
    parts = []
    for m in range(members):
        U, V = orthonormal(size, R, seed + 2 * m), orthonormal(size + 40, R, seed + 2 * m + 1)
        G = normal(R, R, seed=seed + 9) / R**0.5 + 2 * torch.eye(R, dtype=F64)
        parts.append(((U * S) @ G, torch.linalg.inv(G) @ V.mT))
    B, A = (torch.stack(part).float() for part in zip(*parts, strict=True))
    return B, A


@pytest.mark.parametrize("driver", ["randomized", "randomized_dense"])
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
def test_sampling_is_as_good_as_it_says_or_not_done(driver, rate):
    B, A = decaying(rate)
    exact = svd_product(B, A, rank=12, driver="qr")
    svd = svd_product(B, A, rank=12, driver=driver, verify=True)
    known, norm = svd.certificate, exact.certificate.norm
    excess = (known.error - exact.certificate.tail) / norm
    # 1e-4 is predicted from the convergence seen; float32 products leave 1e-6 of their own
    assert (excess <= 2e-4).all()
    assert (excess >= -1e-6).all()
    assert known.driver == driver
    # W is there and the tail measured, or estimated from 16 Gaussian vectors: within a factor
    factor = 1.001 if driver == "randomized_dense" else 2.0
    floor = 2e-6 * norm
    assert (known.tail <= factor * exact.certificate.tail + floor).all()
    assert (known.tail >= exact.certificate.tail / factor - floor).all()
    identity = torch.eye(12, dtype=F64)
    for Q in (svd.U.mT.double() @ svd.U.double(), svd.Vh.double() @ svd.Vh.mT.double()):
        assert (Q - identity).abs().max() <= 1e-5
    assert (svd.U.amax(-2) >= -svd.U.amin(-2)).all()


@pytest.mark.parametrize("driver", ["randomized", "randomized_dense"])
def test_what_has_not_converged_in_time_is_solved_exactly_and_named(driver, monkeypatch):
    # one iteration shows no rate of convergence yet
    monkeypatch.setattr(randomized_module, "MOST_ROUNDS", 1)
    B, A = decaying(0.95)
    flat = svd_product(B, A, rank=12, driver=driver)
    assert [m for m, how in flat.certificate.fallbacks if "converges too slowly" in how] == [0, 1]
    exact = svd_product(B, A, rank=12)
    assert torch.allclose(flat.S, exact.S, rtol=1e-6)
    assert torch.allclose(flat.certificate.tail, exact.certificate.tail, rtol=1e-6)


@pytest.mark.parametrize("driver", ["randomized", "randomized_dense"])
@pytest.mark.parametrize("name", ["plain", "all zero", "B times 1e20, A times 1e-20", "shared A"])
def test_what_is_too_small_to_sample_is_solved_exactly(driver, name):
    B, A = (X.float() for X in HARD[name])
    svd = svd_product(B, A, rank=4, driver=driver)
    assert (0, "exact driver, rank too high to sample") in svd.certificate.fallbacks
    assert_leading_svd(B, A, svd)


def test_sampling_repeats_to_the_bit_and_leaves_the_global_generator_alone():
    B, A = decaying(0.8)
    state = torch.get_rng_state()
    first, second = (svd_product(B, A, rank=12, driver="randomized") for _ in "12")
    assert torch.equal(first.U, second.U)
    assert torch.equal(state, torch.get_rng_state())


# --- beyond float64 -----------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["gram", "qr", "dense"])
def test_a_float64_product_beyond_float64_is_an_error(driver):
    B, A = torch.full((3, 1), 1e200, dtype=F64), torch.full((1, 3), 1e200, dtype=F64)
    with pytest.raises(ConvergenceError, match=r"beyond 1\.8e\+308|no driver converged"):
        svd_product(B, A, driver=driver)


def test_what_the_noise_cut_drops_is_in_the_bound():
    # 900 values just under the cut: together √900 of what one may be
    n = 1000
    U, V = orthonormal(n, 901, 1), orthonormal(n, 901, 2)
    S = torch.full((901,), 0.9 * n * torch.finfo(F64).eps * 2, dtype=F64)
    S[0] = 1.0
    svd = svd_product(U * S, V.mT, driver="qr", verify=True)
    assert svd.certificate.error <= svd.certificate.bound


@pytest.mark.parametrize("driver", ["gram", "qr", "randomized"])
def test_a_default_device_does_not_matter(driver):
    # "meta" holds no numbers: whatever is made on the default device by mistake fails
    B, A = decaying(0.8)
    expected = svd_product(B, A, rank=12, driver=driver, verify=True)
    with torch.device("meta"):
        found = svd_product(B, A, rank=12, driver=driver, verify=True)
    assert torch.equal(found.U, expected.U)
    assert torch.equal(found.certificate.error, expected.certificate.error)
