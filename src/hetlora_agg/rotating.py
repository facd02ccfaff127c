"""Rotate: clients' factors turned towards a reference, every update unchanged."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hetlora_agg.components import Components
from hetlora_agg.errors import InputValueError
from hetlora_agg.linalg import nearest_isometry
from hetlora_agg.types import LowRank


def rotate_to(
    c: Components, reference: LowRank, factor: str, strength: float
) -> tuple[Components, tuple[str, ...]]:
    """``(B_k R_k, R_kᵀ A_k)`` with one factor as near to the reference's as a rotation takes it.

    Procrustes: ``R_k = U Vᵀ`` from ``M = A_k A_refᵀ`` (``B_kᵀ B_ref``) ``= U S Vᵀ``, of shape
    ``r_k × r_ref`` with ``R_k R_kᵀ = I``; blended with doing nothing,
    ``polar((1 − strength) [I 0] + strength R_k)``, ``[I 0]`` with its ones in the client's slots.

    Args:
        c: clients of rank at most that of the reference.
        reference: ``A (*layers, r_ref, in)``, ``B (*layers, out, r_ref)``.
        factor: "A" or "B".
        strength: in [0, 1]; below 1 only proper rotations, since blending with a reflection may
            be singular.

    Returns:
        Components in which every client has rank ``r_ref``, and notes on blends that were singular
        all the same: there ``R_k`` itself is taken.
    """
    for id, rank, slots in zip(c.ids, c.ranks, c.slots_by_client, strict=True):
        if rank > reference.rank or max(slots, default=0) >= reference.rank:
            what = f"rank {rank}" if rank > reference.rank else f"slot {max(slots)} (from 0)"
            raise InputValueError(
                f"client {id!r} has {what}, above the reference's rank {reference.rank}; pass a "
                "reference (previous=) of at least the largest rank, such as what `distribute` "
                "gives a client of that rank"
            )
    A_ref, B_ref = (X.double().unsqueeze(-3) for X in (reference.A, reference.B))
    width, active = reference.rank, [k for k, rank in enumerate(c.ranks) if rank]
    A = c.A.new_zeros(*c.layers, len(active), width, c.A.shape[-1])
    B = c.B.new_zeros(*c.layers, len(active), c.B.shape[-2], width)
    notes: list[str] = []
    for clients, components in c.rank_groups:
        A_k, B_k = (X.double() for X in c.of_clients(components))
        M = A_k @ A_ref.mT if factor == "A" else B_k.mT @ B_ref
        R, singular = _softened(M, _in_slots(c, components, width), strength)
        for name in [c.ids[int(k)] for k in clients[_over_layers(singular)].tolist()]:
            notes.append(f"client {name!r}: the softened rotation is singular, the full one taken")
        at = torch.tensor([active.index(k) for k in clients.tolist()], device=A.device)
        A[..., at, :, :] = (R.mT @ A_k).to(A)
        B[..., at, :, :] = (B_k @ R).to(B)
    turned = replace(
        c,
        A=A.flatten(-3, -2),
        B=B.transpose(-3, -2).flatten(-2),
        ranks=tuple(width if rank else 0 for rank in c.ranks),
        slots=tuple(range(width)) * len(active),
    )
    return turned, tuple(notes)


def _in_slots(c: Components, components: Tensor, width: int) -> Tensor:
    """``(clients, rank, width)``: every component in its own slot, which is doing nothing."""
    every = torch.arange(width, device=components.device)
    return (c.slot_index[components].unsqueeze(-1) == every).double()


def _softened(M: Tensor, identity: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The rotation blended with doing nothing, and where the blend was singular."""
    R, _ = nearest_isometry(M, proper=strength < 1)
    soft, unique = nearest_isometry((1 - strength) * identity + strength * R)
    return torch.where(unique[..., None, None], soft, R), ~unique


def _over_layers(singular: Tensor) -> Tensor:
    """Which clients are affected in any layer, ``(clients,)``."""
    return singular.reshape(-1, singular.shape[-1]).any(0)
