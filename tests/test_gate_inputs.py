"""LAPACK's test matrices (dchkbd, dlatms) as products of factors, and an oracle that knows them.

Everything is built in longdouble (64 bits of mantissa where the machine has them) and rounded once,
to the dtype under test. The oracle takes the factors *as given* after that rounding.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

from tolerance import eps

LD = np.longdouble
F32, F64 = torch.float32, torch.float64
SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (14, 14)}

# --- spectra: the modes of dlatms ---------------------------------------------------------------


def evenly_spaced(k, cond, rng):
    return np.linspace(1, 1 / cond, k)


def geometric(k, cond, rng):
    return cond ** -np.linspace(0, 1, k)


def one_large(k, cond, rng):
    return np.array([1.0] + [1 / cond] * (k - 1))


def one_small(k, cond, rng):
    return np.array([1.0] * (k - 1) + [1 / cond])


def clustered(k, cond, rng):
    """Two clusters, neighbours within 16 ulp of float64."""
    near = 1 - 16 * eps(F64) * np.arange(k)
    return near * np.where(np.arange(k) < k // 2, 1, 1 / cond)


def random_logarithms(k, cond, rng):
    return np.sort(cond ** -rng.uniform(0, 1, k))[::-1]


MODES = [evenly_spaced, geometric, one_large, one_small, clustered, random_logarithms]


def conditions(dtype):
    """Easy, where a Gram matrix in the dtype breaks down, and where the dtype itself does."""
    return {"2": 2.0, "eps^-1/2": eps(dtype) ** -0.5, "1/eps": 1 / eps(dtype)}


def scalings(dtype):
    """As it is, × underflow/ε, × overflow·ε."""
    range_ = np.finfo(str(dtype)[6:])
    tiny, huge = LD(range_.tiny), LD(range_.max)
    return {"1": LD(1), "underflow/eps": tiny / eps(dtype), "overflow·eps": huge * eps(dtype)}


# --- matrices: W = L diag(d) Rt, with k = len(d) -------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """``L diag(d) Rt``; ``planted`` says that d holds its singular values."""

    name: str
    L: np.ndarray
    d: np.ndarray
    Rt: np.ndarray
    planted: bool = True


def orthonormal(rng, rows, columns):
    Q = np.linalg.qr(rng.standard_normal((rows, columns)))[0].astype(LD)
    # A Newton step to the polar factor squares the defect: float64's becomes that of longdouble.
    return Q @ (LD(1.5) * np.eye(columns) - LD(0.5) * (Q.T @ Q))


def diagonal(rows, columns, rng):
    """Columns of the identity with random signs."""
    return np.eye(rows, columns, dtype=LD) * rng.choice([-1, 1], columns)


def types(out, in_, k, dtype):
    """Every type of one size and rank k, unscaled."""
    rng = np.random.default_rng([out, in_, k])
    eye_L, eye_R = np.eye(out, k, dtype=LD), np.eye(k, in_, dtype=LD)
    yield Matrix("zero", eye_L, np.zeros(k, LD), eye_R)
    yield Matrix("identity", eye_L, np.ones(k, LD), eye_R)
    dense_L, dense_R = rng.standard_normal((out, k)), rng.standard_normal((k, in_))
    yield Matrix("random", dense_L.astype(LD), np.ones(k, LD), dense_R.astype(LD), planted=False)
    for mode in MODES:
        for name, cond in conditions(dtype).items():
            d = mode(k, LD(cond), rng).astype(LD)
            L, R = orthonormal(rng, out, k), orthonormal(rng, in_, k)
            yield Matrix(f"{mode.__name__} {name}", L, d, R.T)
        L, R = diagonal(out, k, rng), diagonal(in_, k, rng)
        yield Matrix(f"{mode.__name__} 1/eps, diagonal", L, d, R.T)


# --- splits of W into factors -------------------------------------------------------------------


def mixer(rng, k, R):
    """``G (k, R)`` and ``H (R, k)`` with ``G H = I``; singular values of G in [1, 2]."""
    P, Q = orthonormal(rng, k, k), orthonormal(rng, R, k)
    levels = np.linspace(1, 2, k)
    return (P * levels) @ Q.T, (Q / levels) @ P.T


def orthonormal_left(M, rng):
    return M.L, M.d[:, None] * M.Rt


def balanced(M, rng):
    return M.L * np.sqrt(M.d), np.sqrt(M.d)[:, None] * M.Rt


def graded_left_mixed(M, rng):
    G, H = mixer(rng, len(M.d), len(M.d))
    return (M.L * M.d) @ G, H @ M.Rt


def graded_right_mixed(M, rng):
    G, H = mixer(rng, len(M.d), len(M.d))
    return M.L @ G, H @ (M.d[:, None] * M.Rt)


def mixed_into_more(M, rng):
    """Half as many columns again as the rank."""
    B, A = balanced(M, rng)
    G, H = mixer(rng, len(M.d), len(M.d) * 3 // 2)
    return B @ G, H @ A


def duplicating_clients(M, rng):
    B, A = balanced(M, rng)
    return np.hstack([B, B]), np.vstack([A, A]) / 2


def cancelling_clients(M, rng):
    """Two more clients whose updates, a thousand times W, are each other's negatives."""
    B, A = balanced(M, rng)
    p = len(M.d) // 2
    size = np.sqrt(1000 * (M.d.max() or LD(1)))
    Y, Z = size * orthonormal(rng, len(B), p), size * orthonormal(rng, A.shape[1], p).T
    return np.hstack([B, Y, -Y]), np.vstack([A, Z, Z])


SPLITS = [
    orthonormal_left,
    balanced,
    graded_left_mixed,
    graded_right_mixed,
    mixed_into_more,
    duplicating_clients,
    cancelling_clients,
]


# --- cases and their oracle ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A batch ``(types, scalings)`` of one size, split one way."""

    shape: str
    full: bool
    split: str

    @property
    def cancels(self):
        return self.split == "cancelling_clients"

    def __str__(self):
        return f"{self.shape}-{'full' if self.full else 'half'}-{self.split}"


CASES = [Case(s, full, f.__name__) for s in SHAPES for full in (False, True) for f in SPLITS]


@dataclass(frozen=True)
class Exact:
    """What the factors as given multiply out to, member by member (one flat leading dimension)."""

    names: list[str]
    B: torch.Tensor
    A: torch.Tensor
    W: np.ndarray
    sigma: np.ndarray
    norm: np.ndarray
    size: np.ndarray
    planted: np.ndarray


@cache
def exact(case, dtype):
    out, in_ = SHAPES[case.shape]
    k = min(out, in_) // (1 if case.full else 2)
    split = globals()[case.split]
    names, Bs, As, planted = [], [], [], []
    for matrix in types(out, in_, k, dtype):
        for scaling, c in scalings(dtype).items():
            scaled = Matrix(matrix.name, matrix.L, c * matrix.d, matrix.Rt, matrix.planted)
            B, A = split(scaled, np.random.default_rng([out, in_, k, 1]))
            names.append(f"{matrix.name} × {scaling}")
            Bs.append(B)
            As.append(A)
            planted.append(np.sort(scaled.d)[::-1] if matrix.planted else np.full(k, LD("nan")))
    numpy_dtype = np.dtype(str(dtype)[6:])
    B, A = (np.stack(part).astype(numpy_dtype) for part in (Bs, As))
    W, sigma = product_and_spectrum(B, A)
    size = (norms(B.astype(LD), -2) * norms(A.astype(LD), -1)).sum(-1)
    tensors = torch.from_numpy(B), torch.from_numpy(A)
    return Exact(names, *tensors, W, sigma, norms(W, (-2, -1)), size, np.stack(planted))


def norms(X, axis):
    """In longdouble, whose exponent has room for every square of a float64."""
    return np.sqrt((X.astype(LD) ** 2).sum(axis))


def product_and_spectrum(B, A):
    """``B @ A`` in longdouble and numpy's singular values, a stack of matrices at a time."""
    W = B.astype(LD) @ A.astype(LD)
    top = np.abs(W).max((-2, -1), keepdims=True)
    # By a power of two, exactly: what float64 cannot hold after this is below its rounding.
    _, exponent = np.frexp(np.where(top > 0, top, 1))
    sigma = np.linalg.svd(np.ldexp(W, -exponent).astype(np.float64), compute_uv=False)
    return W, np.ldexp(sigma.astype(LD), exponent[..., 0])


# --- the oracle itself --------------------------------------------------------------------------

every_case = pytest.mark.parametrize("case", CASES, ids=str)
both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])


@both_dtypes
@every_case
def test_the_oracle_finds_the_planted_spectrum(case, dtype):
    found = exact(case, dtype)
    k = found.planted.shape[-1]
    R, thin = found.B.shape[-1], found.sigma.shape[-1]
    # Rounding each factor once moves W by at most 2 · ε/2 · ‖b_j‖‖a_j‖ per component and, where an
    # entry is subnormal, by its spacing times the partner; numpy's own error is LAPACK's.
    spacing = LD(torch.finfo(dtype).smallest_normal) * eps(dtype)
    long_B, long_A = (norms(factor.numpy(), (-2, -1)) for factor in (found.B, found.A))
    subnormal = spacing * R**0.5 * max(SHAPES[case.shape]) ** 0.5 * (long_B + long_A)
    allowed = eps(dtype) * found.size + 10 * thin * eps(F64) * found.norm + subnormal
    off = np.abs(found.sigma[:, :k] - found.planted).max(-1)
    beyond = found.sigma[:, k:].max(-1, initial=0)
    is_planted = ~np.isnan(found.planted[:, 0])
    assert (off <= allowed)[is_planted].all()
    assert (beyond <= allowed).all()


@both_dtypes
@every_case
def test_only_the_cancelling_split_cancels(case, dtype):
    found = exact(case, dtype)
    k = found.planted.shape[-1]
    nonzero = found.norm > 0
    # S ≤ ‖B‖‖A‖ ≤ 2 ‖√d‖² ≤ 2 √k ‖d‖, or 2 ‖d‖ √k where the grading is on one side; half as much
    # again for L and R of the random type, which are orthonormal only nearly
    calm = found.size <= 3 * k**0.5 * found.norm
    assert (calm[nonzero] != case.cancels).all()
    assert (found.size >= found.norm * (1 - 10 * eps(F64))).all()
