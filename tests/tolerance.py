"""The derived tolerances: how far a correct result may be from the oracle, and no further.

Every gate is relative to S = Σ p_k ‖B_k‖ ‖A_k‖ (``reference.scale``), never to ‖ΔW‖: updates may
cancel. ε is that of the dtype of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from reference import (
    Client,
    Factors,
    Matrix,
    Oracle,
    array,
    by_layer,
    dense,
    fold,
    scale,
    shared_scale,
    tail,
)

Gate = Callable[[torch.dtype, Sequence[Client]], float]


def eps(dtype: torch.dtype) -> float:
    """ε of the dtype."""
    return torch.finfo(dtype).eps


def stack_gate(dtype: torch.dtype, S: float) -> float:
    """4εS: six roundings of ε/2 per entry (root, fold of two factors, share), no sum over clients.

    The sum over the stacked axis is not the library's: tests take it in float64.
    """
    return 4 * eps(dtype) * S


def recompressed_gate(dtype: torch.dtype, out_features: int, in_features: int, S: float) -> float:
    """10·max(out, in)·ε·S + 50·ε₆₄·S: LAPACK's backward error, with ‖ΔW‖ ≤ S.

    The sums of orthogonal transformations give c·max(m, n)·ε, with c = 10; besides, the iteration
    for singular values stops at ``eps**(-1/8)`` = 98.7 roundings of the norm, whatever the size:
    49.4 ε₆₄, which matrices of 3 to 6 rows do reach.
    """
    return (10 * max(out_features, in_features) * eps(dtype) + 50 * eps(torch.float64)) * S


def consensus_gate(dtype: torch.dtype, n_clients: int, norm_b: float, norm_a: float) -> float:
    """(K+3)ε‖b‖‖a‖ per component: K−1 additions and four roundings in each of two factors."""
    return (n_clients + 3) * eps(dtype) * norm_b * norm_a


def order_gate(dtype: torch.dtype, n_clients: int, S: float) -> float:
    """(K+2)εS: another order of the clients reassociates K−1 additions in each factor."""
    return (n_clients + 2) * eps(dtype) * S


def split_gate(dtype: torch.dtype, n_clients: int, S: float) -> float:
    """(K+2)εS: a client cut into two halves adds one term and two roundings of the weights."""
    return (n_clients + 2) * eps(dtype) * S


def averaged_gate(dtype: torch.dtype, clients: Sequence[Client]) -> float:
    """(K+3)ε·sqrt(Σ‖B_k‖²)·sqrt(Σ‖A_k‖²): the consensus gate for components that differ.

    A product of two means is not bounded by S, a mean of products; but shares that sum to at most
    1 on each slot leave no column of B_g longer than the longest of its owners'.
    """
    clients = fold(clients)
    norm_B = math.hypot(*(np.linalg.norm(client.B) for client in clients))
    norm_A = math.hypot(*(np.linalg.norm(client.A) for client in clients))
    return consensus_gate(dtype, len(clients), norm_B, norm_A)


def recompressed_gate_of(dtype: torch.dtype, clients: Sequence[Client]) -> float:
    """The recompressed gate of one layer's clients."""
    out_features, in_features = clients[0].B.shape[-2], clients[0].A.shape[-1]
    return recompressed_gate(dtype, out_features, in_features, scale(clients))


def shared_gate_of(dtype: torch.dtype, clients: Sequence[Client]) -> float:
    """The recompressed gate where owners of a slot share it: ‖ΔW‖ ≤ S holds for their shares only.

    With the shares p_k the bound is S / min q_j: a lone owner with little data has ‖ΔW‖ > S.
    """
    out_features, in_features = clients[0].B.shape[-2], clients[0].A.shape[-1]
    return recompressed_gate(dtype, out_features, in_features, shared_scale(clients))


def stack_gate_of(dtype: torch.dtype, clients: Sequence[Client]) -> float:
    """The stack gate of one layer's clients."""
    return stack_gate(dtype, scale(clients))


def distance(X: Matrix, Y: Matrix) -> float:
    """‖X − Y‖_F."""
    return float(np.linalg.norm(np.asarray(X) - np.asarray(Y)))


def assert_equals_oracle(
    actual: Matrix,
    oracle: Oracle,
    clients: Sequence[Client],
    gate: Gate,
    dtype: torch.dtype,
    previous: Factors | None = None,
    **options: object,
) -> None:
    """Every layer of a dense update is the oracle's within that layer's gate.

    A previous update enters with weight 1, so its rounding is that of a lone client.
    """
    for index, layer, earlier in by_layer(clients, previous):
        state = {} if earlier is None else {"previous": earlier}
        error = distance(actual[index], oracle(layer, **options, **state))
        allowed = gate(dtype, layer)
        if earlier is not None:
            allowed += gate(dtype, [Client(*earlier, n=1)])
        assert error <= allowed, f"layer {index}: error {error:.3e} above {allowed:.3e}"


def assert_best_rank(actual: Matrix, W: Matrix, r: int, gate: float) -> None:
    """‖W − Ŵ‖_F ≤ optimal tail + gate, with nothing beyond rank r in Ŵ.

    A lower error than the optimal tail is as wrong as a higher one: the rank would be above r.
    """
    optimum = tail(W, r)
    error = distance(W, actual)
    assert error <= optimum + gate, f"error {error:.3e}, optimal {optimum:.3e} + {gate:.3e}"
    beyond = tail(actual, r)
    assert beyond <= gate, f"{beyond:.3e} lies beyond rank {r}, gate {gate:.3e}"


def assert_leading_slices(pieces, result, ranks, scalings) -> None:
    """Client k holds the leading r_k components, scaling divided out."""
    B, A = array(result.B), array(result.A)
    for piece, r, s in zip(pieces, ranks, scalings, strict=True):
        assert piece.A.shape[-2] == r
        assert piece.B.shape[-1] == r
        expected = B[..., :, :r] @ A[..., :r, :]
        # two roundings (the root of s, the division) in each factor
        gate = 4 * eps(result.A.dtype) * np.linalg.norm(B) * np.linalg.norm(A)
        assert distance(s * dense(piece), expected) <= gate
