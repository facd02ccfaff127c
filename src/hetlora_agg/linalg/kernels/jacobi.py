"""Eigenpairs of many small symmetric matrices at once, by Jacobi rotations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hetlora_agg.errors import InputValueError
from hetlora_agg.linalg.kernels._triton import jacobi_eigh, launch
from hetlora_agg.linalg.kernels.backend import Backend, takes_triton
from hetlora_agg.linalg.kernels.ragged import check_float64, power_below, power_of_two_from

MAX_SIZE = 64
"""Largest R: the matrix, its vectors and one exchanged copy fill a program's registers at 64."""

MAX_SWEEPS = 20
"""Convergence is quadratic once it sets in; float64 takes six to ten sweeps at these sizes."""


class Eigen(NamedTuple):
    """``values (members, R)`` ascending, ``vectors (members, R, R)``, ``converged (members,)``."""

    values: Tensor
    vectors: Tensor
    converged: Tensor


@torch.no_grad()
def jacobi(G: Tensor, *, backend: Backend = "auto") -> Eigen:
    """Eigenvalues and eigenvectors of symmetric matrices, like ``torch.linalg.eigh``.

    ``G = V diag(λ) Vᵀ`` by two-sided cyclic Jacobi: rounds of ⌊R/2⌋ disjoint rotations, every pair
    met once per sweep (round-robin), until ``‖offdiag‖_F ≤ R ε ‖G‖_F`` or 20 sweeps have passed.
    Only the lower triangle is read. Matrices are scaled by a power of two first, so any size does.
    No gradient. A matrix with NaN or Inf comes back with ``converged`` False.

    Args:
        G: ``(members, R, R)`` float64, R ≤ 64.
        backend: "torch" runs the same rotations as batched torch operations; "triton" one program
            per matrix; "auto" takes triton where it was measured to win, see `MEASURED_WINS`.

    Returns:
        An `Eigen` ``(values, vectors, converged)``; signs of the vectors are arbitrary.

    Raises:
        InputTypeError: not a float64 tensor.
        InputValueError: not a batch of square matrices, or R above 64.
        OptionValueError: an unknown backend, or triton where it cannot run.

    Cost: ``6 R³`` multiply-adds a sweep and member, six to ten sweeps, and ``32 R²`` bytes. In
    triton the block is padded to a power of two P ≥ 16, and it is not the arithmetic that takes the
    time: the R − 1 rounds of a sweep follow one another, and each exchanges 3 P² numbers through
    shared memory. In torch each round is some forty calls on the whole batch.

    Example:
        >>> values, vectors, converged = jacobi(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]).double())
        >>> values.round(decimals=12), converged
        (tensor([[1., 3.]], dtype=torch.float64), tensor([True]))
    """
    _check(G)
    if takes_triton("jacobi", backend, G.device.type):
        return jacobi_triton(G)
    return jacobi_torch(G)


def jacobi_torch(G: Tensor) -> Eigen:
    """`jacobi` in plain torch: the reference, and what runs without triton."""
    R = G.shape[-1]
    G, power = _scaled(G)
    players = R + R % 2
    # A player without a partner is a zero row and column, which no rotation touches.
    A = torch.nn.functional.pad(G, (0, players - R, 0, players - R))
    V = torch.eye(players, dtype=A.dtype, device=A.device).expand_as(A)
    limit = (R * torch.finfo(A.dtype).eps) ** 2 * _squared(A)
    diagonal = A.diagonal(dim1=-2, dim2=-1).clone()
    A.diagonal(dim1=-2, dim2=-1).zero_()
    rounds = _round_robin(players, A.device)
    for _ in range(MAX_SWEEPS):
        running = _squared(A) > limit
        if not running.any():
            break
        for partner in rounds:
            diagonal, A, V = _rotated(diagonal, A, V, partner, running)
    return _ascending(diagonal[..., :R], V[..., :R, :R], _squared(A) <= limit, power)


def jacobi_triton(G: Tensor) -> Eigen:
    """`jacobi` by the kernel, one program per matrix."""
    members, R = _check(G)
    G, power = _scaled(G)
    values, vectors = G.new_empty((members, R)), G.new_empty((members, R, R))
    converged = G.new_empty(members, dtype=torch.int32)
    P = power_of_two_from(R, 16, MAX_SIZE)
    launch(
        jacobi_eigh,
        members,
        G,
        values,
        vectors,
        converged,
        R,
        R + R % 2,
        # Exact in the float32 that triton makes of it: a small integer times a power of two.
        R * torch.finfo(G.dtype).eps,
        MAX_SWEEPS=MAX_SWEEPS,
        P=P,
        # At most sixteen entries of a P×P block in each thread.
        num_warps={16: 1, 32: 4, 64: 8}[P],
    )
    return _ascending(values, vectors, converged.bool(), power)


def _check(G: Tensor) -> tuple[int, int]:
    check_float64("jacobi: G", G, (-1, -1, -1), getattr(G, "device", torch.device("cpu")))
    members, R, columns = G.shape
    if R != columns or R > MAX_SIZE:
        raise InputValueError(
            f"jacobi: expected (members, R, R) with R ≤ {MAX_SIZE}, got {tuple(G.shape)}; larger "
            "matrices are for torch.linalg.eigh"
        )
    return members, R


def _scaled(G: Tensor) -> tuple[Tensor, Tensor]:
    """The lower triangle mirrored, contiguous, entries below 2; and the power of two taken out."""
    G = (G.tril() + G.tril(-1).mT).contiguous()
    power = power_below(G.abs().amax((-2, -1)))
    return G / power[:, None, None], power


def _round_robin(players: int, device: torch.device) -> list[Tensor]:
    """Who meets whom, ``players − 1`` permutations ``(players,)``: every pair meets once."""
    i = torch.arange(players, device=device)
    rounds = []
    for turn in range(players - 1):
        # j meets the k with j + k = 2·turn; whoever would meet itself meets the last player.
        partner = (2 * turn - i) % (players - 1)
        partner = torch.where(partner == i, players - 1, partner)
        partner[-1] = turn
        rounds.append(partner)
    return rounds


def _rotated(
    diagonal: Tensor, A: Tensor, V: Tensor, partner: Tensor, running: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``JᵀAJ`` and ``VJ`` for the disjoint rotations J that empty A at ``(j, partner_j)``.

    The diagonal of A is kept apart, and zero in A. Seen from j: ``θ = (a_kk − a_jj) / 2a_jk``,
    ``t = sgn θ / (|θ| + √(1 + θ²))``, ``a_jj ← a_jj − t a_jk``, ``a_j ← c a_j − s a_k``. Seen from
    k, θ has the other sign, which is the other half of the rotation.
    """
    i = torch.arange(len(partner), device=A.device)
    entry = A[..., i, partner]
    # Both partners must see the same number to the bit, or they turn by different angles.
    entry = 0.5 * (entry + entry[..., partner])
    idle = (entry == 0) | ~running[:, None]
    theta = 0.5 * (diagonal[..., partner] - diagonal) / torch.where(idle, 1.0, entry)
    # Where θ² is Inf, t is 0: such an entry is lost in the diagonal's rounding.
    t = 1 / (theta.abs() + (1 + theta.square()).sqrt())
    t = torch.where((theta > 0) | ((theta == 0) & (i < partner)), t, -t)
    t = torch.where(idle, 0.0, t)
    c = 1 / (1 + t.square()).sqrt()
    s = t * c

    A_new = c.unsqueeze(-2) * A - s.unsqueeze(-2) * A[..., partner]
    A_new = c.unsqueeze(-1) * A_new - s.unsqueeze(-1) * A_new[..., partner, :]
    V = c.unsqueeze(-2) * V - s.unsqueeze(-2) * V[..., partner]
    emptied = (partner[:, None] == i) | (i[:, None] == i)
    # A member that has converged keeps the small entries it has: it does not turn.
    A = torch.where(emptied & running[:, None, None], 0.0, A_new)
    return diagonal - t * entry, A, V


def _squared(A: Tensor) -> Tensor:
    """Squared Frobenius norms, ``(members,)``."""
    return A.square().sum((-2, -1))


def _ascending(values: Tensor, vectors: Tensor, converged: Tensor, power: Tensor) -> Eigen:
    values, order = values.sort(-1)
    vectors = vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
    return Eigen(values * power[:, None], vectors, converged)
