"""What every driver returns, and the pieces they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetlora_agg.linalg.lapack import MemberFailed, Notes


class Solution(NamedTuple):
    """What a driver found, float64 but for the vectors.

    Attributes:
        U: ``(members, out, r)`` leading vectors, in float64 or in the dtype of the factors.
        S: ``(members, ≥ r)`` the spectrum, descending; approximate drivers know r values only.
        Vh: ``(members, r, in)``.
        size: ``(members,)`` ``Σ ‖b_j‖‖a_j‖``, what rounding is relative to.
        pivot: ``(members,)`` smallest Cholesky pivot relied on; 1 where none was.
        roundings: ``(members,)`` roundings of the factors' dtype that the vectors carry; 0 where
            they were multiplied out in float64.
        square_error: ``(members,)`` absolute error of the squared singular values where they are
            eigenvalues; 0 where they come from an SVD.
        notes: ``(member, how)`` for members that left the fast path.
        tail: ``(members,)`` norm of what lies beyond r, where S does not tell.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    size: Tensor
    pivot: Tensor
    roundings: Tensor
    square_error: Tensor
    notes: Notes
    tail: Tensor | None = None


def plain(U: Tensor, S: Tensor, Vh: Tensor, size: Tensor, notes: Notes) -> Solution:
    """The `Solution` of a driver that stays in float64 and relies on no pivot."""
    none = torch.zeros_like(size)
    return Solution(U, S, Vh, size, torch.ones_like(size), none, none, notes)


def eigenvalue_error(order: int, size: Tensor) -> Tensor:
    """Error of eigenvalues of ``W Wᵀ`` that float64 sums of that order leave, relative to size²."""
    return 10 * order * torch.finfo(torch.float64).eps * size.square()


def norms(X: Tensor, dim: int) -> Tensor:
    """Euclidean norms along a dimension in float64, right where squares leave it."""
    norm: Tensor
    if X.dtype != torch.float64:
        norm = torch.linalg.vector_norm(X, dim=dim, dtype=torch.float64)
        return norm
    if X.shape[dim] == 0:
        return X.sum(dim)
    # Two steps, so that squares neither overflow nor vanish.
    peak = torch.linalg.vector_norm(X, math.inf, dim=dim, keepdim=True)
    norm = torch.linalg.vector_norm(X / torch.where(peak > 0, peak, 1.0), dim=dim)
    norm = norm * peak.squeeze(dim)
    return norm


def with_notes(solution: Solution) -> tuple[Solution, Notes]:
    """What `again` takes."""
    return solution, solution.notes


def again(slow: list[int], solve: Callable[[], tuple[Any, Notes]], how: str) -> tuple[Any, Notes]:
    """The slow few solved another way; their notes, and a failure, name them in the whole batch."""
    try:
        solved, further = solve()
    except MemberFailed as error:
        raise MemberFailed(slow[error.member]) from error
    return solved, [(m, how) for m in slow] + [(slow[i], more) for i, more in further]
