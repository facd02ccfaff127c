"""Tensors and plain data as one tensor of bytes, and back without a copy. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}

ALIGNED = 64
"""Tensors start at multiples of this many bytes, so that any dtype can be read in place."""


def pack(tensors: Mapping[str, Tensor], data: Any) -> Tensor:
    """One buffer: the length of its head, the head as JSON, then the tensors."""
    rows: list[tuple[str, str, list[int], int, int]] = []
    end = 0
    for name, X in tensors.items():
        start = aligned(end)
        end = start + X.numel() * X.element_size()
        rows.append((name, str(X.dtype).removeprefix("torch."), list(X.shape), start, end))
    text = json.dumps([rows, data]).encode()
    first = aligned(8 + len(text))
    buffer = torch.zeros(first + end, dtype=torch.uint8)
    head = bytearray(len(text).to_bytes(8, "little") + text)
    buffer[: len(head)] = torch.frombuffer(head, dtype=torch.uint8)
    for (_, _, _, start, stop), X in zip(rows, tensors.values(), strict=True):
        flat = X.detach().contiguous().reshape(-1).view(torch.uint8)
        buffer[first + start : first + stop] = flat
    return buffer


def unpack(buffer: Tensor) -> tuple[dict[str, Tensor], Any]:
    """What `pack` was given; the tensors are views of the buffer."""
    length = int.from_bytes(bytes(buffer[:8].numpy()), "little")
    rows, data = json.loads(bytes(buffer[8 : 8 + length].numpy()))
    body = buffer[aligned(8 + length) :]
    tensors = {
        name: body[start:end].view(DTYPES[dtype]).reshape(shape)
        for name, dtype, shape, start, end in rows
    }
    return tensors, data


def aligned(length: int) -> int:
    """The next multiple."""
    return -(-length // ALIGNED) * ALIGNED


def here(device: str) -> str:
    """Where a tensor of another process's device belongs on this one: its own card."""
    kind = torch.device(device).type
    return kind if kind == "cpu" else f"{kind}:{torch.get_device_module(kind).current_device()}"
