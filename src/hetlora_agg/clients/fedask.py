"""FedASK's two messages, whose size and sum tell nothing of a client's rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.clients.reading import as_matrix, wide
from hetlora_agg.errors import InputValueError
from hetlora_agg.linalg import all_finite, exact_arithmetic, orthonormal_columns
from hetlora_agg.types import ClientUpdate
from hetlora_agg.validation import read_updates


def sketch(update: ClientUpdate | tuple[Any, Any], omega: Tensor) -> Tensor:
    """The client's first message: its update times a random matrix that all clients share.

    ``Y_k = s_k B_k (A_k Ω)``; the server needs ``Σ p_k Y_k`` only.

    Args:
        update: a `ClientUpdate` or ``(A, B)``, ``A (*layers, rank, in_features)``,
            ``B (*layers, out_features, rank)``. Its weight is not applied, `secure.linear_message`
            does that.
        omega: ``(*layers, in_features, width)``, or one for all layers; standard normal.

    Returns:
        ``(*layers, out_features, width)``, whatever the rank; float64 for float64 factors, else
        float32; computed in float64.

    Raises:
        InputTypeError, InputValueError: a bad update, a matrix that does not fit it, NaN or Inf.

    Cost: ``(out + in) rank width`` multiply-adds.

    Example:
        >>> import torch
        >>> sketch(ClientUpdate(torch.eye(2), torch.eye(2), scaling=3.0), torch.ones(2, 1))
        tensor([[3.],
                [3.]])

    Reference: FedASK, arXiv:2507.09990.

    Fidelity: CODE; OURS for the scaling.

    Deviations: the noise that FedASK adds for differential privacy is the caller's.
    """
    read = _read(update, "sketch")
    omega = _fitting(omega, read.A.shape[-1], read, "sketch: omega", "in_features")
    with exact_arithmetic(read.A.device.type):
        message = read.scaling * (read.B.double() @ (read.A.double() @ omega))
        return _sent(message, read, "sketch")


def project(update: ClientUpdate | tuple[Any, Any], Q: Tensor) -> Tensor:
    """The client's second message: its transposed update times the basis that all clients share.

    ``P_k = s_k (B_k A_k)ᵀ Q = s_k A_kᵀ (B_kᵀ Q)``; with ``P̄ = Σ p_k P_k`` the server has the
    aggregate ``Q P̄ᵀ`` as ``LowRank(A=P̄.mT, B=Q)``.

    Args:
        update: a `ClientUpdate` or ``(A, B)``, ``A (*layers, rank, in_features)``,
            ``B (*layers, out_features, rank)``. Its weight is not applied, `secure.linear_message`
            does that.
        Q: ``(*layers, out_features, width)``, from `basis`.

    Returns:
        ``(*layers, in_features, width)``, whatever the rank; float64 for float64 factors, else
        float32; computed in float64.

    Raises:
        InputTypeError, InputValueError: a bad update, a matrix that does not fit it, NaN or Inf.

    Cost: ``(out + in) rank width`` multiply-adds.

    Example:
        >>> import torch
        >>> project(ClientUpdate(torch.ones(1, 2), torch.ones(2, 1)), torch.eye(2)[:, :1])
        tensor([[1.],
                [1.]])

    Reference: FedASK, arXiv:2507.09990.

    Fidelity: CODE; OURS for the scaling.

    Deviations: the noise that FedASK adds for differential privacy is the caller's.
    """
    read = _read(update, "project")
    Q = _fitting(Q, read.B.shape[-2], read, "project: Q", "out_features")
    with exact_arithmetic(read.A.device.type):
        message = read.scaling * (read.A.double().mT @ (read.B.double().mT @ Q))
        return _sent(message, read, "project")


def basis(total_sketch: Tensor) -> Tensor:
    """The orthonormal basis that the server makes of the sum of the sketches and sends to all.

    ``Ȳ = Q T``, unpivoted QR.

    Args:
        total_sketch: ``Ȳ = Σ p_k Y_k``, ``(*layers, out_features, width)``.

    Returns:
        ``Q (*layers, out_features, min(out_features, width))`` float64.

    Raises:
        InputTypeError: no floating tensor.
        InputValueError: fewer than two dimensions, NaN or Inf.

    Cost: one QR of ``out × width``.

    Example:
        >>> import torch
        >>> basis(torch.tensor([[3.0], [4.0]])).abs()
        tensor([[0.6000],
                [0.8000]], dtype=torch.float64)

    Reference: FedASK, arXiv:2507.09990.

    Fidelity: CODE.

    Deviations: none.
    """
    what = "basis: total_sketch"
    total_sketch = as_matrix(total_sketch, what, "(*layers, out_features, width)").detach()
    _check_finite(total_sketch, what)
    with exact_arithmetic(total_sketch.device.type):
        Q, _ = orthonormal_columns(total_sketch)
    return Q


def _read(update: ClientUpdate | tuple[Any, Any], what: str) -> ClientUpdate:
    """One checked update, as tensors."""
    (read,), _ = read_updates([update], what)
    for factor, X in (("lora_A", read.A), ("lora_B", read.B)):
        _check_finite(X, f"{what}: {factor}")
    rank = read.rank or 0
    return replace(read, A=read.A[..., :rank, :], B=read.B[..., :rank])


def _fitting(X: Tensor, rows: int, update: ClientUpdate, what: str, dimension: str) -> Tensor:
    """The matrix in float64, checked against the update."""
    X = as_matrix(X, what, f"(*layers, {dimension}, width)").detach()
    layers = tuple(update.A.shape[:-2])
    if X.shape[-2] != rows or tuple(X.shape[:-2]) not in ((), layers):
        raise InputValueError(
            f"{what}: expected (*layers, {dimension}) = {(*layers, rows)} and a width, got "
            f"{tuple(X.shape)}; all clients take the one the server sent for this layer"
        )
    _check_finite(X, what)
    return X.to(update.A.device, torch.float64)


def _sent(message: Tensor, update: ClientUpdate, what: str) -> Tensor:
    """The message in the dtype it travels in."""
    sent = message.to(wide(torch.promote_types(update.A.dtype, update.B.dtype)))
    _check_finite(sent, f"{what}: message")
    return sent


def _check_finite(X: Tensor, what: str) -> None:
    if not all_finite(X):
        raise InputValueError(
            f"{what}: NaN or Inf; leave this client out of the round, or scale its update down"
        )
