"""Bases, rotations and small solves: what they promise, on matrices that make it hard."""

import numpy as np
import pytest
import torch

from hetlora_agg import ConvergenceError
from hetlora_agg.linalg import (
    bases,
    column_space,
    nearest_isometry,
    orthonormal_columns,
    solve_gram,
)
from hetlora_agg.linalg import row_space as rows_of
from hetlora_agg.linalg.lapack import MemberFailed

F64 = torch.float64
EPS = torch.finfo(F64).eps


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def is_orthonormal(Q, tol=1e-13):
    gram = Q.mT @ Q
    return bool(((gram - torch.eye(gram.shape[-1], dtype=F64)).abs() <= tol).all())


SHAPES = [(9, 4), (4, 9), (5, 5), (1, 3), (3, 1)]


@pytest.mark.parametrize("layers", [(), (2, 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_orthonormal_columns_in_the_order_of_the_columns(shape, layers):
    X = normal(*layers, *shape)
    Q, T = orthonormal_columns(X)
    assert Q.shape == (*layers, shape[0], min(shape))
    assert is_orthonormal(Q)
    assert (Q @ T - X).abs().max() <= 100 * EPS * X.abs().max()
    assert torch.equal(T.triu(), T)


def test_dependent_columns_still_give_an_orthonormal_basis():
    X = normal(6, 4)
    X[:, 1], X[:, 2] = 2 * X[:, 0], 0.0
    Q, T = orthonormal_columns(X)
    assert is_orthonormal(Q)
    assert (Q @ T - X).abs().max() <= 100 * EPS * X.abs().max()


@pytest.mark.parametrize("layers", [(), (2, 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_column_space_is_the_left_half_of_the_svd(shape, layers):
    X = normal(*layers, *shape)
    U, S = column_space(X)
    assert is_orthonormal(U)
    for index in np.ndindex(*layers):
        expected = np.linalg.svd(X[index].numpy(), compute_uv=False)
        np.testing.assert_allclose(S[index].numpy(), expected, rtol=1e-12, atol=1e-13)
        # X lies in the span, and its Gram matrix is diagonal there
        assert (U[index] @ (U[index].mT @ X[index]) - X[index]).abs().max() <= 1e-13
        core = U[index].mT @ X[index] @ X[index].mT @ U[index]
        assert (core - torch.diag(S[index].square())).abs().max() <= 1e-12


def test_strengths_far_below_the_square_root_of_rounding_are_kept():
    # through a Gram matrix 1e-10 of the largest would be lost
    U0, _ = orthonormal_columns(normal(8, 3))
    V0, _ = orthonormal_columns(normal(20, 3, seed=1))
    sigma = torch.tensor([1.0, 1e-10, 1e-14], dtype=F64)
    for X in ((U0 * sigma) @ V0.mT, ((U0 * sigma) @ V0.mT).mT):
        U, S = column_space(X)
        np.testing.assert_allclose(S[:3].numpy(), sigma.numpy(), rtol=1e-1)
        assert float(S[3:].abs().max()) == 0.0 if S.shape[-1] > 3 else True
        assert is_orthonormal(U)


def test_row_space_is_the_projection_of_the_pseudo_inverse():
    A = normal(2, 4, 7)
    A[1, 3] = A[1, 0] - 2 * A[1, 1]  # rank 3
    A[0] *= 1e-9
    found = rows_of(A)
    for layer in range(2):
        X = A[layer].numpy()
        expected = np.linalg.pinv(X, rcond=1e-10) @ X
        np.testing.assert_allclose((found[layer].mT @ found[layer]).numpy(), expected, atol=1e-12)
    assert float(found[1, 3].abs().max()) == 0.0


def test_row_space_of_zero_is_zero():
    assert float(rows_of(torch.zeros(3, 5)).abs().max()) == 0.0


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("singular", [False, True])
def test_solve_gram_is_the_ridge_solution(ridge, singular):
    X = normal(2, 4, 6)
    if singular:
        X[:, 3] = X[:, 0]
    P, G = normal(2, 5, 4, seed=1), X @ X.mT
    found = solve_gram(P, G, torch.full((2,), ridge, dtype=F64))
    for layer in range(2):
        lifted = G[layer].numpy() + ridge * np.eye(4)
        expected = P[layer].numpy() @ np.linalg.pinv(lifted, rcond=1e-12, hermitian=True)
        np.testing.assert_allclose(found[layer].numpy(), expected, rtol=1e-9, atol=1e-9)


def test_solve_gram_of_zero_is_zero():
    zero = torch.zeros(3, 3, dtype=F64)
    assert float(solve_gram(normal(2, 3), zero, torch.zeros((), dtype=F64)).abs().max()) == 0.0


@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (1, 1), (1, 4)])
def test_the_nearest_isometry_is_nearest(shape):
    M = normal(4, *shape)
    R, unique = nearest_isometry(M)
    assert bool(unique.all())
    assert is_orthonormal(R.mT)
    best = torch.linalg.matrix_norm(M - R)
    for seed in range(50):
        Q, _ = orthonormal_columns(normal(4, shape[1], shape[0], seed=seed))
        assert bool((best <= torch.linalg.matrix_norm(M - Q.mT) * (1 + 1e-12)).all())


def test_a_proper_rotation_has_determinant_one_and_is_the_nearest_of_those():
    M = torch.stack([torch.diag(torch.tensor([3.0, 2.0, -0.5])), torch.eye(3)]).double()
    R, _ = nearest_isometry(M, proper=True)
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(2, dtype=F64))
    # of the three reflections to undo, that of the weakest direction costs least
    torch.testing.assert_close(R[0], torch.eye(3, dtype=F64))
    free, _ = nearest_isometry(M)
    torch.testing.assert_close(free[0], torch.diag(torch.tensor([1.0, 1.0, -1.0])).double())


def test_a_singular_matrix_has_no_one_nearest_isometry():
    M = torch.stack([torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2)]).double()
    R, unique = nearest_isometry(M)
    assert unique.tolist() == [False, True]
    assert is_orthonormal(R)


def test_where_no_driver_converges_the_error_says_which_member(monkeypatch):
    def fails(X):
        raise MemberFailed(1)

    monkeypatch.setattr(bases, "core_svd", fails)
    with pytest.raises(ConvergenceError, match="no driver converged on batch member 1"):
        nearest_isometry(normal(2, 3, 3))
