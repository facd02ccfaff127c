"""Ragged blocks times a small factor, without the concatenated copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hetlora_agg.linalg.kernels._triton import launch, output_tiles
from hetlora_agg.linalg.kernels.backend import Backend, takes_triton
from hetlora_agg.linalg.kernels.ragged import (
    check_float64,
    checked,
    columns_of,
    power_of_two_from,
    side_by_side,
)

ROWS = 64
"""Rows of a tile of the output."""

COLUMNS = 64
"""Columns of a tile, at most: with 64 rows, 64 registers of sums in each of 128 threads."""

STEP = 32
"""Columns of the blocks taken per turn of the inner loop. Like ROWS and COLUMNS a count of
registers, not yet a measurement."""


@torch.no_grad()
def ragged_output(
    blocks: Sequence[Tensor],
    M: Tensor,
    share: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """``[X_1 … X_K] diag(share) M``, ``(members, length, r)``.

    Accumulated in float64; float64 for float64 blocks, float32 for all others. The share is taken
    into M first, which is small. No gradient. Repeats are equal to the bit.

    Args:
        blocks: client k's factor, ``(members, length, r_k)``, any strides; float16, bfloat16,
            float32 or float64, all of one dtype on one device.
        M: ``(members, R, r)`` float64 with ``R = Σ r_k``.
        share: ``(members, R)`` float64, any sign; None means 1.
        backend: "torch" concatenates; "triton" reads each block where it lies; "auto" takes triton
            where it was measured to win, see `MEASURED_WINS`.

    Returns:
        ``(members, length, r)``, contiguous.

    Raises:
        InputTypeError: not floating point, mixed dtypes or devices, M or share not float64.
        InputValueError: no blocks, or shapes that do not fit.
        OptionValueError: an unknown backend, or triton where it cannot run.

    Cost: ``length R r`` multiply-adds per member. Triton reads the blocks, ``r/64`` times over but
    from L2, and writes the result; torch also writes and reads ``8 length R`` bytes per member.

    Example:
        >>> X = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [4.0]]])
        >>> ragged_output(X, torch.tensor([[[1.0], [-1.0]]]).double())
        tensor([[[-2.],
                 [-2.]]])
    """
    _check(blocks, M, share)
    if takes_triton("ragged_output", backend, blocks[0].device.type):
        return ragged_output_triton(blocks, M, share)
    return ragged_output_torch(blocks, M, share)


def ragged_output_torch(blocks: Sequence[Tensor], M: Tensor, share: Tensor | None = None) -> Tensor:
    """`ragged_output` in plain torch: the reference, and what runs without triton."""
    return (side_by_side(blocks) @ _weighted(M, share)).to(_format(blocks))


def ragged_output_triton(
    blocks: Sequence[Tensor], M: Tensor, share: Tensor | None = None
) -> Tensor:
    """`ragged_output` by the kernel."""
    members, length, R = _check(blocks, M, share)
    first, columns, rank = blocks[0], columns_of(blocks), M.shape[-1]
    out = first.new_empty((members, length, rank), dtype=_format(blocks))
    wide = power_of_two_from(rank, 16, COLUMNS)
    down, across = -(-length // ROWS), -(-rank // wide)
    launch(
        output_tiles,
        members * down * across,
        first,
        columns.table,
        _weighted(M, share).contiguous(),
        out,
        length,
        R,
        rank,
        down,
        across,
        ROWS=ROWS,
        COLUMNS=wide,
        STEP=STEP,
        UNIT_ROWS=columns.unit_rows,
        VECTOR=columns.vector,
        NARROW=first.element_size() == 2,
        num_warps=4,
        num_stages=3,
    )
    return out


def _check(blocks: Sequence[Tensor], M: Tensor, share: Tensor | None) -> tuple[int, int, int]:
    members, length, R = checked("ragged_output", blocks, share)
    check_float64("ragged_output: M", M, (members, R, -1), blocks[0].device)
    return members, length, R


def _weighted(M: Tensor, share: Tensor | None) -> Tensor:
    return M if share is None else share.unsqueeze(-1) * M


def _format(blocks: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if blocks[0].dtype == torch.float64 else torch.float32
