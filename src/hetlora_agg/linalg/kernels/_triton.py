"""The device code of the kernels, and the one place where triton is imported.

Reading this file needs no triton: the functions below are plain text to Python until `compiled`
hands them to ``triton.jit``. Offsets are int64 throughout, counted in elements from the first entry
of the first block: the blocks are separate allocations, and one typed base pointer keeps what the
compiler knows about its alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

tl: Any = None
tensor = Any
constexpr = Any
"""``triton.language`` and two of its classes, put here before anything is compiled: device code,
its annotations included, finds names in its own module only. Until then they mean nothing."""


@cache
def compiled(kernel: Callable[..., None]) -> Any:
    """The launchable form of a device function of this file: ``compiled(f)[grid](…)``.

    Interpreted in numpy instead where TRITON_INTERPRET=1 was set before triton was first imported.
    """
    return _jit()(kernel)


@cache
def _jit() -> Any:
    """``triton.jit``, with the names that device code uses in place."""
    language, jit = import_module("triton.language"), import_module("triton").jit
    names = {"tl": language, "tensor": language.tensor, "constexpr": language.constexpr}
    parts = (tile_at, columns_at, entries, partner_of, rotation)
    globals().update(names, **{part.__name__: jit(part) for part in parts})
    return jit


def launch(kernel: Callable[..., None], programs: int, *arguments: Any, **options: Any) -> None:
    """Run so many programs of a device function, on the device of its first argument, a tensor."""
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        compiled(kernel)[(programs,)](*arguments, **options)


def tile_at(t: tensor, TILE: constexpr) -> Any:
    """Rows and columns of the t-th tile of a lower triangle of tiles."""
    # Its rows start at 0, 1, 3, 6, …; the root is exact where it must be, since 8t + 1 is a perfect
    # square there and float64 roots are correctly rounded.
    up = ((tl.sqrt((8 * t + 1).to(tl.float64)) - 1) / 2).to(tl.int32)
    left = t - up * (up + 1) // 2
    return up * TILE + tl.arange(0, TILE), left * TILE + tl.arange(0, TILE)


def columns_at(
    columns: tensor, j: tensor, R: tensor, member: tensor, UNIT_ROWS: constexpr, VECTOR: constexpr
) -> Any:
    """Offsets of columns j of one member from the base, and their row strides.

    ``columns (3, R)`` int64: offset, member stride and row stride of every column.
    """
    at = tl.load(columns + j, mask=j < R, other=0)
    at += member * tl.load(columns + R + j, mask=j < R, other=0)
    stride = tl.load(columns + 2 * R + j, mask=j < R, other=0)
    # What the compiler cannot see through a table: without these every access is one entry wide.
    if UNIT_ROWS:
        at = tl.multiple_of(at, VECTOR)
    else:
        at = tl.max_contiguous(tl.multiple_of(at, VECTOR), VECTOR)
        stride = tl.max_constancy(tl.multiple_of(stride, VECTOR), VECTOR)
    return at, stride


def entries(
    base: tensor,
    at: tensor,
    stride: tensor,
    row: tensor,
    inside: tensor,
    UNIT_ROWS: constexpr,
    NARROW: constexpr,
) -> Any:
    """Entries of the given rows and columns in float64, zero outside."""
    if UNIT_ROWS:
        x = tl.load(base + at[None, :] + row[:, None], mask=inside, other=0.0)
    else:
        here = at[None, :] + row[:, None] * stride[None, :]
        x = tl.load(base + here, mask=inside, other=0.0)
    if NARROW:
        # Triton 3.6 cannot lower a float64 product fed from 16-bit loads (it sizes the operand
        # layout by the load); a sum over an axis of one hides the load and changes no bit.
        x = tl.sum(x.to(tl.float32)[:, :, None], 2)
    return x.to(tl.float64)


def gram_tiles(
    base: tensor,
    columns: tensor,
    scale: tensor,
    partial: tensor,
    length: tensor,
    R: tensor,
    slices: tensor,
    rows: tensor,
    tiles: tensor,
    TILE: constexpr,
    STEP: constexpr,
    UNIT_ROWS: constexpr,
    VECTOR: constexpr,
    SCALED: constexpr,
    NARROW: constexpr,
) -> None:
    """One TILE×TILE tile on or below the diagonal of ``Xᵀ X``, over one slice of the rows.

    ``columns (3, R)``, see `columns_at`; ``scale (members, R)``, read if SCALED; ``partial
    (members, slices, R, R)``, left as it was above the diagonal tiles.
    """
    # Tile fastest: programs that run together share a member and a slice, so panels stay in L2.
    program = tl.program_id(0)
    i, j = tile_at(program % tiles, TILE)
    part = (program // tiles) % slices
    member = (program // (tiles * slices)).to(tl.int64)
    at_i, stride_i = columns_at(columns, i, R, member, UNIT_ROWS, VECTOR)
    at_j, stride_j = columns_at(columns, j, R, member, UNIT_ROWS, VECTOR)
    if SCALED:
        scale_i = tl.load(scale + member * R + i, mask=i < R, other=0.0)[None, :]
        scale_j = tl.load(scale + member * R + j, mask=j < R, other=0.0)[None, :]

    start = part * rows
    stop = tl.minimum(start + rows, length)
    total = tl.full((TILE, TILE), 0.0, tl.float64)
    for k in range(start, stop, STEP):
        row = k + tl.arange(0, STEP)
        inside = row[:, None] < stop
        x = entries(base, at_i, stride_i, row, inside & (i < R)[None, :], UNIT_ROWS, NARROW)
        y = entries(base, at_j, stride_j, row, inside & (j < R)[None, :], UNIT_ROWS, NARROW)
        if SCALED:
            x *= scale_i
            y *= scale_j
        total = tl.dot(tl.trans(x), y, total, input_precision="ieee", out_dtype=tl.float64)

    at = (member * slices + part) * R * R + i.to(tl.int64)[:, None] * R + j[None, :]
    tl.store(partial + at, total, mask=(i < R)[:, None] & (j < R)[None, :])


def gram_finish(
    partial: tensor,
    coefficient: tensor,
    gram: tensor,
    R: tensor,
    slices: tensor,
    tiles: tensor,
    TILE: constexpr,
) -> None:
    """One tile of ``G``: slices summed in order, unit columns, mirrored, 1 on the diagonal.

    ``partial (members, slices, R, R)``; ``coefficient (members, R)``; ``gram (members, R, R)``.
    """
    program = tl.program_id(0)
    i, j = tile_at(program % tiles, TILE)
    member = (program // tiles).to(tl.int64)
    lower = (i < R)[:, None] & (j[None, :] <= i[:, None])

    total = tl.full((TILE, TILE), 0.0, tl.float64)
    for part in range(slices):
        at = (member * slices + part) * R * R + i.to(tl.int64)[:, None] * R + j[None, :]
        total += tl.load(partial + at, mask=lower, other=0.0)
    total *= tl.load(coefficient + member * R + i, mask=i < R, other=0.0)[:, None]
    total *= tl.load(coefficient + member * R + j, mask=j < R, other=0.0)[None, :]
    total = tl.where(i[:, None] == j[None, :], 1.0, total)

    at = member * R * R + i.to(tl.int64)[:, None] * R + j[None, :]
    tl.store(gram + at, total, mask=lower)
    mirrored = member * R * R + j.to(tl.int64)[:, None] * R + i[None, :]
    upper = (i < R)[None, :] & (j[:, None] < i[None, :])
    tl.store(gram + mirrored, tl.trans(total), mask=upper)


def output_tiles(
    base: tensor,
    columns: tensor,
    small: tensor,
    out: tensor,
    length: tensor,
    R: tensor,
    rank: tensor,
    down: tensor,
    across: tensor,
    ROWS: constexpr,
    COLUMNS: constexpr,
    STEP: constexpr,
    UNIT_ROWS: constexpr,
    VECTOR: constexpr,
    NARROW: constexpr,
) -> None:
    """One ROWS×COLUMNS tile of ``X M``, over all R columns of the ragged X.

    ``columns (3, R)``, see `columns_at`; ``small (members, R, rank)`` float64; ``out
    (members, length, rank)``.
    """
    # Tiles of one row of tiles first: they read the same rows of X.
    program = tl.program_id(0)
    n = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    row = (program // across) % down * ROWS + tl.arange(0, ROWS)
    member = (program // (across * down)).to(tl.int64)
    inside = (row < length)[:, None]

    total = tl.full((ROWS, COLUMNS), 0.0, tl.float64)
    for k in range(0, R, STEP):
        j = k + tl.arange(0, STEP)
        at, stride = columns_at(columns, j, R, member, UNIT_ROWS, VECTOR)
        x = entries(base, at, stride, row, inside & (j < R)[None, :], UNIT_ROWS, NARROW)
        of_small = (member * R + j[:, None]) * rank + n[None, :]
        m = tl.load(small + of_small, mask=(j < R)[:, None] & (n < rank)[None, :], other=0.0)
        total = tl.dot(x, m, total, input_precision="ieee", out_dtype=tl.float64)

    at_out = (member * length + row[:, None]) * rank + n[None, :]
    tl.store(out + at_out, total.to(out.dtype.element_ty), mask=inside & (n < rank)[None, :])


def partner_of(i: tensor, turn: tensor, players: tensor) -> Any:
    """Whom each player meets in one of ``players − 1`` turns; no one beyond the last player."""
    # Circle method: j meets the k with j + k = 2·turn modulo players − 1; whoever would meet itself
    # meets the last player.
    k = (2 * turn - i + 2 * players - 2) % (players - 1)
    k = tl.where(k == i, players - 1, k)
    k = tl.where(i == players - 1, turn, k)
    return tl.where(i < players, k, i)


def rotation(diagonal: tensor, entry: tensor, i: tensor, k: tensor) -> Any:
    """Tangent, cosine and sine of the rotations that empty ``entry``, each seen from its own i."""
    idle = entry == 0.0
    theta = 0.5 * (tl.gather(diagonal, k, 0) - diagonal) / tl.where(idle, 1.0, entry)
    # Where θ² is Inf, t is 0: such an entry is lost in the diagonal's rounding.
    t = 1.0 / (tl.abs(theta) + tl.sqrt(1.0 + theta * theta))
    t = tl.where((theta > 0) | ((theta == 0) & (i < k)), t, -t)
    t = tl.where(idle, 0.0, t)
    c = 1.0 / tl.sqrt(1.0 + t * t)
    return t, c, t * c


def jacobi_eigh(
    matrix: tensor,
    values: tensor,
    vectors: tensor,
    converged: tensor,
    R: tensor,
    players: tensor,
    tolerance: tensor,
    MAX_SWEEPS: constexpr,
    P: constexpr,
) -> None:
    """All eigenpairs of one symmetric matrix, held in registers as a P×P block.

    ``matrix (members, R, R)``; ``values (members, R)``, unsorted; ``vectors (members, R, R)``;
    ``converged (members,)`` int32. Rows and columns from R to P are zero and never take part.
    """
    member = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, P)
    row = i[:, None]
    column = i[None, :]
    real = (row < R) & (column < R)
    at = member * R * R + row * R + column
    A = tl.load(matrix + at, mask=real, other=0.0)
    V = tl.where(row == column, 1.0, 0.0).to(tl.float64)

    limit = tolerance * tolerance * tl.sum(tl.sum(A * A, 1), 0)
    # The diagonal lives on its own, where no round has to dig it out of the block.
    diagonal = tl.sum(tl.where(row == column, A, 0.0), 1)
    A = tl.where(row == column, 0.0, A)
    off = tl.sum(tl.sum(A * A, 1), 0)
    sweep = 0
    while (sweep < MAX_SWEEPS) & (off > limit):
        for turn in range(players - 1):
            k = partner_of(i, turn, players)
            met = column == k[:, None]
            entry = tl.sum(tl.where(met, A, 0.0), 1)
            # Both partners must see the same number to the bit, or they turn by different angles.
            entry = 0.5 * (entry + tl.gather(entry, k, 0))
            t, c, s = rotation(diagonal, entry, i, k)
            across = tl.broadcast_to(k[None, :], (P, P))
            down = tl.broadcast_to(k[:, None], (P, P))
            A = c[None, :] * A - s[None, :] * tl.gather(A, across, 1)
            A = c[:, None] * A - s[:, None] * tl.gather(A, down, 0)
            V = c[None, :] * V - s[None, :] * tl.gather(V, across, 1)
            A = tl.where(met | (row == column), 0.0, A)
            diagonal -= t * entry
        off = tl.sum(tl.sum(A * A, 1), 0)
        sweep += 1

    tl.store(values + member * R + i, diagonal, mask=i < R)
    tl.store(vectors + at, V, mask=real)
    tl.store(converged + member, (off <= limit).to(tl.int32))
