"""Gram matrix of the unit columns of ragged blocks, with no concatenated and no float64 copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hetlora_agg.linalg.kernels._triton import gram_finish, gram_tiles, launch
from hetlora_agg.linalg.kernels.backend import Backend, takes_triton
from hetlora_agg.linalg.kernels.ragged import (
    checked,
    columns_of,
    power_below,
    power_of_two_from,
    side_by_side,
)

TILE = 64
"""Largest tile of the Gram matrix: 32 KiB of float64 sums, 64 registers in each of 128 threads."""

STEP = 32
"""Rows taken per turn of the inner loop."""

SLICE_ROWS = 512
"""A slice of the rows is never shorter: below that, writing its sums costs as much as making them.
Like TILE and STEP a count of bytes and registers, not yet a measurement."""


class UnitGram(NamedTuple):
    """``G (members, R, R)`` float64, symmetric to the bit, and ``norm (members, R)`` float64."""

    G: Tensor
    norm: Tensor


@torch.no_grad()
def ragged_gram(
    blocks: Sequence[Tensor], share: Tensor | None = None, *, backend: Backend = "auto"
) -> UnitGram:
    """Gram matrix of the unit columns of ``X = [X_1 … X_K] diag(share)``, and the columns' norms.

    ``norm_j = |share_j| ‖x_j‖``, ``G_ij = ±x_iᵀx_j / ‖x_i‖‖x_j‖`` with the sign of
    ``share_i share_j``, exactly 1 on the diagonal. A column of norm zero is orthogonal to all
    others. Sums are float64; shares enter after them, so their size costs no digits. No gradient.
    Repeats are equal to the bit. NaN and Inf come through in ``norm``.

    Args:
        blocks: client k's factor, ``(members, length, r_k)``, any strides; float16, bfloat16,
            float32 or float64, all of one dtype on one device.
        share: ``(members, R)`` float64 with ``R = Σ r_k``, any sign; None means 1.
        backend: "torch" concatenates; "triton" reads each block where it lies; "auto" takes triton
            where it was measured to win, see `MEASURED_WINS`.

    Returns:
        A `UnitGram` ``(G, norm)``.

    Raises:
        InputTypeError: not floating point, mixed dtypes or devices.
        InputValueError: no blocks, or shapes that do not fit.
        OptionValueError: an unknown backend, or triton where it cannot run.

    Cost: ``length R²/2`` multiply-adds per member in triton, ``length R²`` in torch. Triton reads
    the blocks from L2 ``R/64`` times over and holds ``8 R² (1 + slices)`` bytes per member; torch
    writes ``8 length R`` bytes per member for the float64 copy and as much for the unit columns.

    Example:
        >>> X = torch.tensor([[[3.0], [4.0]]]), torch.tensor([[[0.0], [2.0]]])
        >>> G, norm = ragged_gram(X)
        >>> norm
        tensor([[5., 2.]], dtype=torch.float64)
        >>> round(float(G[0, 0, 1]), 12)
        0.8
    """
    checked("ragged_gram", blocks, share)
    if takes_triton("ragged_gram", backend, blocks[0].device.type):
        return ragged_gram_triton(blocks, share)
    return ragged_gram_torch(blocks, share)


def ragged_gram_torch(blocks: Sequence[Tensor], share: Tensor | None = None) -> UnitGram:
    """`ragged_gram` in plain torch: the reference, and what runs without triton."""
    X = side_by_side(blocks)
    power = _powers(blocks)
    if power is not None:
        X = X / power.unsqueeze(-2)
    raw = torch.linalg.vector_norm(X, dim=-2)
    coefficient, norm = _unit(raw, power, share)
    X = X * coefficient.unsqueeze(-2)
    lower = (X.mT @ X).tril(-1)
    G = lower + lower.mT
    G.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return UnitGram(G, norm)


def ragged_gram_triton(
    blocks: Sequence[Tensor], share: Tensor | None = None, slices: int | None = None
) -> UnitGram:
    """`ragged_gram` by the kernels, with the rows cut into ``slices`` (None: to fill the device).

    Slices are summed in order in a second kernel, never by atomic additions.
    """
    members, length, R = checked("ragged_gram", blocks, share)
    first, columns = blocks[0], columns_of(blocks)
    tile = power_of_two_from(R, 16, TILE)
    side = -(-R // tile)
    tiles = side * (side + 1) // 2
    slices = _slices(members * tiles, length, first.device) if slices is None else slices
    rows = -(-length // (slices * STEP)) * STEP
    power = _powers(blocks)
    partial = first.new_empty((members, slices, R, R), dtype=torch.float64)
    G = first.new_empty((members, R, R), dtype=torch.float64)
    # One warp per 16 columns of a tile; without wide accesses addresses take registers, and twice
    # as many threads keep them from spilling.
    warps = tile // 16 * (1 if columns.vector > 1 or tile < TILE else 2)
    launch(
        gram_tiles,
        members * slices * tiles,
        first,
        columns.table,
        partial if power is None else power.reciprocal(),
        partial,
        length,
        R,
        slices,
        rows,
        tiles,
        TILE=tile,
        STEP=STEP,
        UNIT_ROWS=columns.unit_rows,
        VECTOR=columns.vector,
        SCALED=power is not None,
        NARROW=first.element_size() == 2,
        num_warps=warps,
        num_stages=3,
    )
    raw = partial.diagonal(dim1=-2, dim2=-1).sum(1).sqrt()
    coefficient, norm = _unit(raw, power, share)
    finish = (partial, coefficient, G, R, slices, tiles)
    launch(gram_finish, members * tiles, *finish, TILE=tile, num_warps=4)
    return UnitGram(G, norm)


def _powers(blocks: Sequence[Tensor]) -> Tensor | None:
    """Powers of two near each column's peak, ``(members, R)``, where squares could leave float64.

    Squares of narrower formats cannot.
    """
    if blocks[0].dtype != torch.float64:
        return None
    return power_below(torch.cat([block.abs().amax(-2) for block in blocks], -1))


def _unit(raw: Tensor, power: Tensor | None, share: Tensor | None) -> tuple[Tensor, Tensor]:
    """What makes columns of norm ``raw`` unit columns of the right sign, and their true norms."""
    norm = raw if power is None else raw * power
    sign = torch.ones_like(raw)
    if share is not None:
        norm, sign = norm * share.abs(), share.sign()
    # The kernel reads by position: no strides of a share may come through.
    return torch.where(norm == 0, 0.0, sign / raw).contiguous(), norm.contiguous()


def _slices(programs: int, length: int, device: torch.device) -> int:
    """Enough slices for two programs on every multiprocessor, none shorter than SLICE_ROWS."""
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-wanted // programs), length // SLICE_ROWS))
