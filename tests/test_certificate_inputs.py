"""What the certificate's tests are drawn from: clients of every kind, and what is true of them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from hypothesis import strategies as st

from hetlora_agg.linalg import svd_product
from test_gate_inputs import F32, F64, LD, norms, product_and_spectrum

# --- kinds of clients: (rng, out, R, in) -> B, A ------------------------------------------------


def unrelated(rng, out, R, in_):
    """Columns of B and rows of A of length 1, in random directions."""
    B, A = rng.standard_normal((out, R)), rng.standard_normal((R, in_))
    return B / np.linalg.norm(B, axis=0), A / np.linalg.norm(A, axis=1, keepdims=True)


def graded(rng, out, R, in_):
    B, A = unrelated(rng, out, R, in_)
    grades = rng.uniform(0, 20, R)
    return B * 10.0 ** (grades.min() - grades), A


def one_starting_point(rng, out, R, in_):
    """Neighbours share their rows of A, as LoRA's start makes them, up to some training."""
    B, A = unrelated(rng, out, R, in_)
    return B, paired(A.T, A.T, 10.0 ** -rng.uniform(0, 12)).T


def duplicates(rng, out, R, in_):
    """Neighbours agree in B and A, each up to something between nothing and all."""
    B, A = unrelated(rng, out, R, in_)
    off_B, off_A = 10.0 ** -rng.uniform(0, 12, 2)
    return paired(B, B, off_B), paired(A.T, A.T, off_A).T


def idle(rng, out, R, in_):
    """Some B and some A are zero, as they are at the start."""
    B, A = unrelated(rng, out, R, in_)
    return B * (rng.random(R) < 0.7), A * (rng.random((R, 1)) < 0.7)


def all_zero(rng, out, R, in_):
    return np.zeros((out, R)), rng.standard_normal((R, in_))


def exact_opposites(rng, out, R, in_):
    """The first neighbours cancel, bit for bit."""
    B, A = unrelated(rng, out, R, in_)
    half = R // 2
    B[:, :half], A[:half] = paired(B, -B, 0)[:, :half], paired(A.T, A.T, 0).T[:half]
    return B, A


def near_opposites(rng, out, R, in_):
    """Neighbours cancel up to a part of 1e-1 to 1e-6 in B and up to nothing in A."""
    B, A = unrelated(rng, out, R, in_)
    off_B, off_A = 10.0 ** -rng.uniform(1, 6), 10.0 ** -rng.uniform(0, 12)
    return paired(B, -B, off_B), paired(A.T, A.T, off_A).T


def paired(X, other, off):
    """Every second column is ``off`` of its own and otherwise that of ``other`` before it."""
    X = X.copy()
    pairs = X.shape[1] // 2
    X[:, 1 : 2 * pairs : 2] = other[:, : 2 * pairs : 2] + off * X[:, 1 : 2 * pairs : 2]
    return X


KINDS = [unrelated, graded, one_starting_point, duplicates, idle, all_zero, exact_opposites]
"""Where nothing nearly cancels: sums of opposites are gone entirely or not at all."""

SCALES = {F32: (-18, 0, 18), F64: (-150, 0, 150)}
"""Powers of ten for either factor: the squares of some leave the dtype, the products do not."""


@dataclass(frozen=True)
class Problem:
    """A batch, the rank that is asked for, and what is true of it."""

    B: torch.Tensor
    A: torch.Tensor
    rank: int

    @property
    def shape(self):
        return self.B.shape[-2], self.A.shape[-1]

    @cached_property
    def truth(self):
        """W, its singular values and ``S = Σ ‖b_j‖‖a_j‖``, longdouble, over the leading dims."""
        B, A = self.B.detach().numpy(), self.A.detach().numpy()
        W, sigma = product_and_spectrum(B, A)
        return W, sigma, (norms(B.astype(LD), -2) * norms(A.astype(LD), -1)).sum(-1)

    def error(self, svd):
        """``‖W − U diag(S) Vh‖`` in longdouble."""
        U, S, Vh = (part.numpy().astype(LD) for part in (svd.U, svd.S, svd.Vh))
        return norms(self.truth[0] - (U * S[..., None, :]) @ Vh, (-2, -1))

    def rounding(self):
        """(10·max(out, in) + 50)·ε·S in float64: as far as an SVD in float64 may be off."""
        return (10 * max(self.shape) + 50) * torch.finfo(F64).eps * self.truth[2]


def problem(kinds, seed, sizes, layers, rank, dtype, exponents=(0, 0)):
    """A batch whose members are of the kinds in turn."""
    rng = np.random.default_rng(seed)
    out, R, in_ = sizes
    members = [kinds[i % len(kinds)](rng, out, R, in_) for i in range(int(np.prod(layers)))]
    B, A = (
        torch.from_numpy(np.stack(part) * 10.0**e).to(dtype)
        for part, e in zip(zip(*members, strict=True), exponents, strict=True)
    )
    B, A = B.reshape(*layers, out, R), A.reshape(*layers, R, in_)
    return Problem(B, A, min(rank, *sizes))


@st.composite
def problems(draw, dtype, kinds=KINDS, scales=None):
    """Sizes, layers, rank, kinds and scales."""
    scale = st.sampled_from(SCALES[dtype] if scales is None else scales)
    return problem(
        draw(st.permutations(kinds)),
        draw(st.integers(0, 2**32)),
        draw(st.tuples(*[st.integers(1, 20)] * 3)),
        draw(st.sampled_from([(), (1,), (3,), (2, 2)])),
        draw(st.integers(1, 20)),
        dtype,
        (draw(scale), draw(scale)),
    )


def solve(problem, driver, **options):
    return svd_product(problem.B, problem.A, rank=problem.rank, driver=driver, **options)


def numbers(certificate):
    """Every tensor of a certificate as longdouble, by name."""
    return {name: x.numpy().astype(LD) for name, x in certificate.tensors().items()}
