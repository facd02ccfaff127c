"""Ragged blocks: one factor per client, side by side in meaning only.

The kernels read every client's memory where it lies. What they need to find column j of the matrix
``[X_1 … X_K]`` is three integers, and what makes the reads wide is a promise about them; both are
worked out here from strides alone, without touching a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hetlora_agg.errors import InputTypeError, InputValueError

FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

ACCESS_BYTES = 16
"""The widest access one GPU thread makes."""


class Columns(NamedTuple):
    """Where the columns of ragged blocks lie.

    ``table (3, R)`` int64 on the device: offset from the first entry of the first block, member
    stride, row stride, in elements. ``unit_rows``: every column is contiguous. ``vector``: entries
    that one access may take, along the rows if ``unit_rows``, else along groups of neighbouring
    columns.
    """

    table: Tensor
    unit_rows: bool
    vector: int


def checked(where: str, blocks: Sequence[Tensor], share: Tensor | None) -> tuple[int, int, int]:
    """``(members, length, R)`` of blocks that fit together; an error naming the one that does not.

    Raises:
        InputTypeError: not floating-point tensors, or mixed dtypes or devices.
        InputValueError: no blocks, or shapes that do not fit.
    """
    if not blocks:
        raise InputValueError(f"{where}: expected at least one block, got none")
    first = blocks[0]
    for k, block in enumerate(blocks):
        if not isinstance(block, Tensor) or block.dtype not in FORMATS:
            got = block.dtype if isinstance(block, Tensor) else type(block).__name__
            raise InputTypeError(f"{where}: block {k}: expected a floating-point tensor, got {got}")
        if block.dtype != first.dtype or block.device != first.device:
            raise InputTypeError(
                f"{where}: block {k} is {block.dtype} on {block.device}, block 0 {first.dtype} "
                f"on {first.device}; pass them all alike"
            )
        if block.dim() != 3 or block.shape[:2] != first.shape[:2] or 0 in block.shape:
            raise InputValueError(
                f"{where}: block {k}: expected (members, length, columns), none of them 0 and the "
                f"first two alike in all blocks, got {tuple(block.shape)}, block 0 is "
                f"{tuple(first.shape)}"
            )
    members, length = first.shape[:2]
    R = sum(block.shape[-1] for block in blocks)
    if share is not None:
        check_float64(f"{where}: share", share, (members, R), first.device)
    return members, length, R


def check_float64(what: str, given: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Raise unless a tensor is float64, of one shape and on one device; −1 stands for any size."""
    if not isinstance(given, Tensor) or given.dtype != torch.float64 or given.device != device:
        got = f"{given.dtype} on {given.device}" if isinstance(given, Tensor) else type(given)
        raise InputTypeError(f"{what}: expected a float64 tensor on {device}, got {got}")
    fits = given.dim() == len(shape) and all(
        a == b or b == -1 for a, b in zip(given.shape, shape, strict=True)
    )
    if not fits or 0 in given.shape:
        raise InputValueError(f"{what}: expected shape {tuple(shape)}, got {tuple(given.shape)}")


def columns_of(blocks: Sequence[Tensor]) -> Columns:
    """The table of all columns, in one transfer, and the width of access it allows."""
    first = blocks[0]
    size = first.element_size()
    members, length, _ = first.shape
    facts = torch.tensor(
        [
            [
                (block.data_ptr() - first.data_ptr()) // size,
                block.stride(0) if members > 1 else 0,
                block.stride(1) if length > 1 else 1,
                block.stride(2) if block.shape[2] > 1 else 1,
                block.shape[2],
            ]
            for block in blocks
        ],
        device="cpu",
    )
    start, member, row, column, rank = facts.unbind(-1)
    before = rank.cumsum(0) - rank
    local = torch.arange(int(rank.sum()), device="cpu") - before.repeat_interleave(rank)
    offset = start.repeat_interleave(rank) + local * column.repeat_interleave(rank)
    table = torch.stack([offset, member.repeat_interleave(rank), row.repeat_interleave(rank)])

    unit_rows = bool((row == 1).all())
    if unit_rows:
        groups, follow = torch.stack([start, member, column * (rank > 1)]), True
    else:
        groups, follow = torch.stack([start, member, row, rank]), bool((column == 1).all())
    widest = ACCESS_BYTES // size
    vector = widest if follow and not (groups % widest).any() else 1
    if first.is_cuda:
        table = table.pin_memory()
    return Columns(table.to(first.device, non_blocking=True), unit_rows, vector)


def power_below(peak: Tensor) -> Tensor:
    """The largest power of two not above ``peak``, ``peak``'s shape; 1 where it is 0.

    Dividing by it is exact. Never below 2⁻¹⁰⁰⁰, so that its reciprocal is finite.
    """
    mantissa, _ = torch.frexp(peak)
    power = peak / (2 * mantissa)
    return torch.where(peak == 0, 1.0, power).clamp_min(2.0**-1000)


def side_by_side(blocks: Sequence[Tensor], share: Tensor | None = None) -> Tensor:
    """``[X_1 … X_K] diag(share)`` in float64, ``(members, length, R)``: the copy kernels avoid."""
    joined = torch.cat(list(blocks), -1).double()
    return joined if share is None else joined * share.unsqueeze(-2)


def power_of_two_from(n: int, least: int, most: int) -> int:
    """The smallest power of two that holds n, between two bounds."""
    return min(most, max(least, 1 << (n - 1).bit_length()))
