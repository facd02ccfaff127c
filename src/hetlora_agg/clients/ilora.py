"""ILoRA's client: a start from the QR of the base weight, and rank-aware control variates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hetlora_agg.checks import as_integer, as_list, as_number
from hetlora_agg.clients.reading import as_finite_factors, as_matrix, as_slots, check_reach
from hetlora_agg.distribute import distribute
from hetlora_agg.errors import InputValueError
from hetlora_agg.linalg import all_finite, exact_arithmetic, orthonormal_columns
from hetlora_agg.types import AggregationResult, LowRank


@dataclass(frozen=True, eq=False)
class QRStart:
    """An adapter that holds the leading piece of its base weight, and the base without it.

    Attributes:
        adapter: ``A (*layers, rank, in_features)``, ``B (*layers, out_features, rank)``, the
            scaling divided out; this is trained.
        base: ``W_0 − B_0 A_0``, ``(*layers, out_features, in_features)``, frozen.
        initial: ``B_0 A_0`` in units of ΔW. The start of the largest rank is what the server takes
            as `ilora`'s ``initial=`` in the first round.
    """

    adapter: LowRank
    base: Tensor
    initial: LowRank


def qr_start(weight: Tensor, rank: int, *, scaling: float = 1.0) -> QRStart:
    """Starts an adapter from the leading columns of the base weight's unpivoted QR.

    ``W_0 = Q R``, ``B_0 = Q[:, :r]``, ``A_0 = R[:r]``; ``base + scaling · B A = W_0``.

    Args:
        weight: ``W_0 (*layers, out_features, in_features)``.
        rank: the client's; starts of different ranks share their leading slots.
        scaling: the client's ``lora_alpha / rank``; its root is divided out of both factors.

    Returns:
        A `QRStart` in the weight's dtype; computed in float64.

    Raises:
        InputTypeError: no floating weight, a rank that is no integer.
        InputValueError: a rank below 1 or above ``min(out, in)``, a scaling that is not finite
            and > 0, NaN or Inf.

    Cost: ``2 out · in · rank`` multiply-adds and the QR of ``out × rank``: the leading columns of
    Q need no others.

    Example:
        >>> import torch
        >>> start = qr_start(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), 1)
        >>> start.initial.dense()[:, 0], start.base[:, 0].abs().max() < 1e-6
        (tensor([3., 4.]), tensor(True))

    Reference: ILoRA, Zhou, Liu, Shang, arXiv:2511.16069.

    Fidelity: SECOND.

    Deviations: none known.
    """
    what = "qr_start"
    rank = as_integer(rank, f"{what}: rank", at_least=1)
    scaling = as_number(scaling, f"{what}: scaling", zero=False)
    weight = as_matrix(weight, f"{what}: weight", "(*layers, out_features, in_features)").detach()
    if rank > min(weight.shape[-2:]):
        raise InputValueError(
            f"{what}: rank: expected at most min(out_features, in_features) = "
            f"{min(weight.shape[-2:])}, got {rank}"
        )
    if not all_finite(weight):
        raise InputValueError(f"{what}: weight: NaN or Inf in the base weight; load it again")
    with exact_arithmetic(weight.device.type):
        W = weight.double()
        Q, T = orthonormal_columns(W[..., :rank])
        A = torch.cat([T, Q.mT @ W[..., rank:]], dim=-1)
        initial = LowRank(A.to(weight.dtype), Q.to(weight.dtype))
        # Without the factors as they are after the cast, so that their rounding stays in the base.
        base = (W - initial.B.double() @ initial.A.double()).to(weight.dtype)
        (adapter,) = distribute(AggregationResult(initial), [rank], [scaling])
    return QRStart(adapter, base, initial)


def corrected(
    gradient: LowRank,
    own: LowRank,
    server: LowRank,
    slots: Sequence[int] | None = None,
) -> LowRank:
    """The gradient with the client's drift taken out, to be given to the optimiser.

    ``g − c_k + c[slots]``, in A and in B.

    Args:
        gradient: of the client's factors, ``A (*layers, rank, in_features)``,
            ``B (*layers, out_features, rank)``.
        own: the client's variate c_k, in the same shapes; zeros in the first round.
        server: the server's variate c, in the shapes of the global factors.
        slots: which global slots the client's components are; None for the leading ones.

    Returns:
        A new gradient in the old one's dtype.

    Raises:
        InputTypeError: no factors, slots that are no integers.
        InputValueError: shapes that do not fit, slots that repeat or that the server has not.

    Cost: ``2 (out + in) rank`` additions.

    Example:
        >>> import torch
        >>> def variate(a):
        ...     return LowRank(torch.full((1, 2), a), torch.full((2, 1), a))
        >>> corrected(variate(5.0), variate(2.0), variate(1.0)).A
        tensor([[4., 4.]])

    Reference: ILoRA, Zhou, Liu, Shang, arXiv:2511.16069.

    Fidelity: PAPER in words, OURS for the equation.

    Deviations: the correction comes before the moments of AdamW.
    """
    what = "corrected"
    gradient = as_finite_factors(gradient, f"{what}: gradient")
    own = as_finite_factors(own, f"{what}: own", like=gradient)
    with torch.no_grad():
        c = _of_slots(server, slots, own, what)
        moved = LowRank(
            (gradient.A - own.A + c.A).to(gradient.A.dtype),
            (gradient.B - own.B + c.B).to(gradient.B.dtype),
        )
    return check_reach(moved, what)


def client_variate(
    own: LowRank,
    server: LowRank,
    start: LowRank,
    end: LowRank,
    *,
    steps: int,
    learning_rate: float,
    slots: Sequence[int] | None = None,
) -> LowRank:
    """The client's variate after local training: its mean step, less the correction in it.

    ``c_k ← c_k − c[slots] + (start − end) / (steps · learning_rate)``.

    Args:
        own: the variate c_k that training used, ``A (*layers, rank, in_features)``,
            ``B (*layers, out_features, rank)``.
        server: the server's variate c that training used.
        start: the client's factors before local training.
        end: the factors after it.
        steps: optimiser steps in between.
        learning_rate: of these steps; with a schedule their mean.
        slots: which global slots the client's components are; None for the leading ones.

    Returns:
        The new variate in the old one's dtype. The change that the server needs is entry by entry,
        ``LowRank(new.A - own.A, new.B - own.B)``; ``minus`` would put the two side by side.

    Raises:
        InputTypeError: no factors, ``steps`` or slots that are no integers.
        InputValueError: shapes that do not fit, slots that repeat or that the server has not,
            ``steps`` below 1, a learning rate that is not finite and > 0.

    Cost: ``4 (out + in) rank`` additions.

    Example:
        >>> import torch
        >>> def variate(a):
        ...     return LowRank(torch.full((1, 2), a), torch.full((2, 1), a))
        >>> zero = variate(0.0)
        >>> client_variate(zero, zero, variate(3.0), variate(1.0), steps=2, learning_rate=0.5).A
        tensor([[2., 2.]])

    Reference: ILoRA, Zhou, Liu, Shang, arXiv:2511.16069.

    Fidelity: PAPER in words, OURS for the equation.

    Deviations: under AdamW the mean step stands in for the mean gradient, which it is under SGD. A
    step of Adam does not shrink with the gradient, and fed back it has wrecked training in our
    simulator, which passes as ``end`` where plain descent along its gradients would have ended.
    """
    what = "client_variate"
    own = as_finite_factors(own, f"{what}: own")
    start = as_finite_factors(start, f"{what}: start", like=own)
    end = as_finite_factors(end, f"{what}: end", like=own)
    steps = as_integer(steps, f"{what}: steps", at_least=1)
    rate = as_number(learning_rate, f"{what}: learning_rate", zero=False)
    length = as_number(steps, f"{what}: steps", zero=False) * rate
    with torch.no_grad():
        c = _of_slots(server, slots, own, what)
        moved = LowRank(
            (own.A - c.A + (start.A - end.A) / length).to(own.A.dtype),
            (own.B - c.B + (start.B - end.B) / length).to(own.B.dtype),
        )
    return check_reach(moved, what)


def server_variate(
    server: LowRank,
    changes: Sequence[LowRank],
    slots: Sequence[Sequence[int]] | None = None,
    *,
    clients: int,
) -> LowRank:
    """The server's variate after a round: moved by the mean change of all clients' variates.

    ``c ← c + (1/N) Σ_k scatter(change_k)``, where a client that took no part changes nothing.

    Args:
        server: the variate c that the round used, in the shapes of the global factors.
        changes: the participants' ``c_k`` after the round less those before it, each
            ``A (*layers, rank, in_features)``, ``B (*layers, out_features, rank)``.
        slots: each participant's slots; None for the leading ones.
        clients: N, all clients of the federation, present or not.

    Returns:
        The new variate in the old one's dtype.

    Raises:
        InputTypeError: no factors, slots that are no integers.
        InputValueError: shapes that do not fit, slots that repeat or that the server has not, more
            changes than clients.

    Cost: ``(out + in) n_slots Σ r_k`` multiply-adds.

    Example:
        >>> import torch
        >>> def variate(rank, a):
        ...     return LowRank(torch.full((rank, 2), a), torch.full((2, rank), a))
        >>> changes = [variate(1, 4.0), variate(2, 2.0)]
        >>> server_variate(variate(2, 0.0), changes, clients=4).B[0]
        tensor([1.5000, 0.5000])

    Reference: ILoRA, Zhou, Liu, Shang, arXiv:2511.16069.

    Fidelity: PAPER in words, OURS for the equation.

    Deviations: none known.
    """
    what = "server_variate"
    server = as_finite_factors(server, f"{what}: server")
    read = [
        _fitting(change, server, f"{what}: change {k}")
        for k, change in enumerate(as_list(changes, f"{what}: changes"))
    ]
    clients = as_integer(clients, f"{what}: clients", at_least=max(1, len(read)))
    every_client = as_number(clients, f"{what}: clients", zero=False)
    given = [None] * len(read) if slots is None else as_list(slots, f"{what}: slots")
    if len(given) != len(read):
        raise InputValueError(
            f"{what}: expected slots for each of {len(read)} changes, got {len(given)}"
        )
    where = [
        slot
        for k, (own, change) in enumerate(zip(given, read, strict=True))
        for slot in as_slots(own, change.rank, server.rank, f"{what}: change {k}")
    ]
    with torch.no_grad():
        index = torch.tensor(where, dtype=torch.int64, device=server.A.device)
        every = torch.arange(server.rank, device=server.A.device)
        scatter = (every[:, None] == index).double()
        A = torch.cat([server.A[..., :0, :], *(c.A.to(server.A) for c in read)], dim=-2).double()
        B = torch.cat([server.B[..., :0], *(c.B.to(server.B) for c in read)], dim=-1).double()
        moved = LowRank(
            (server.A + scatter @ A / every_client).to(server.A.dtype),
            (server.B + B @ scatter.mT / every_client).to(server.B.dtype),
        )
    return check_reach(moved, what)


def _of_slots(server: LowRank, slots: Sequence[int] | None, own: LowRank, what: str) -> LowRank:
    """``c[slots]``, where the client's components are."""
    server = _fitting(server, own, f"{what}: server")
    return server.select(as_slots(slots, own.rank, server.rank, what))


def _fitting(variate: LowRank, like: LowRank, what: str) -> LowRank:
    """A variate of the same layers, of any rank."""
    variate = as_finite_factors(variate, what)
    if variate.dense_shape != like.dense_shape:
        raise InputValueError(
            f"{what}: expected (*layers, out_features, in_features) = {like.dense_shape}, got "
            f"{variate.dense_shape}; pass the variates of one layer"
        )
    return variate
