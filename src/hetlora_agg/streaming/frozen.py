"""The factor that all clients keep frozen: one for all, bit for bit, or an error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hetlora_agg.errors import InputValueError
from hetlora_agg.streaming.arriving import Door, Piece
from hetlora_agg.streaming.receipts import Id
from hetlora_agg.streaming.state import State


def share_factor(door: Door, fresh: State, id: Id, pieces: Sequence[Piece]) -> None:
    """A frozen factor must be that of everybody before, bit for bit."""
    if not door.folding.common:
        return
    for piece in pieces:
        X = (piece.A if door.folding.unscaled == "A" else piece.B.mT).double()
        width = 1 + max(piece.slots)
        at = torch.tensor(piece.slots, device=X.device)
        for name, own in zip(piece.names, X, strict=True):
            rows = own.new_zeros(*own.shape[:-2], width, own.shape[-1])
            filled = torch.zeros(width, dtype=torch.bool, device=X.device)
            rows[..., at, :], filled[at] = own, True
            fresh.common[name] = shared_factor(door, fresh.common.get(name), (rows, filled), id)


def shared_factor(
    door: Door, known: tuple[Tensor, Tensor] | None, own: tuple[Tensor, Tensor], id: Id
) -> tuple[Tensor, Tensor]:
    """Two clients' frozen factor as one, or the error that names the slot."""
    if known is None:
        return own
    width = max(len(known[1]), len(own[1]))
    (rows, filled), (more, also) = (_padded(pair, width) for pair in (known, own))
    differ = (rows != more).any(-1).reshape(-1, width).any(0) & filled & also
    if bool(differ.any()):
        factor = f"lora_{door.folding.unscaled}"
        raise InputValueError(
            f"method {door.folding.method!r}: client {id!r}: {factor} in slot "
            f"{int(differ.nonzero()[0])} is not that of the clients before; expected one {factor} "
            "on all clients, frozen while they train; freeze it, or use a method that averages "
            "both, such as 'rb' or 'zeropad'"
        )
    return torch.where(filled.unsqueeze(-1), rows, more), filled | also


def _padded(pair: tuple[Tensor, Tensor], width: int) -> tuple[Tensor, Tensor]:
    pad = torch.nn.functional.pad
    more = width - len(pair[1])
    return pad(pair[0], (0, 0, 0, more)), pad(pair[1], (0, more))
