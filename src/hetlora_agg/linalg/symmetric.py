"""Products whose symmetry or triangles halve the work, in float64, block by block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 100
"""Block rows are about this wide: narrower ones waste the matrix units, wider ones compute more of
the half that is known already (``benchmarks/results/kernel.json``, rows ``blocks``)."""

MOST_BLOCKS = 6
"""More block rows than this save less than a tenth of what is left."""

HALVED_FROM = 150
"""Smaller cores cost more in calls than leaving half of them out saves."""

FEW_BLOCKS = 2
"""Up to so many block rows a long product is shared out among threads by hand."""

CAST_BYTES = 1 << 22
"""Float64 copies of a tall matrix are made in row chunks of this many bytes, which stay in cache
(``benchmarks/results/kernel.json``, rows ``blocks``)."""


LEAST_ROWS = 256
"""A piece is no shorter than this, however wide X is."""


def gram_matrix(X: Tensor, dim: int = -2) -> Tensor:
    """``XᵀX`` (``dim=-2``) or ``X Xᵀ`` (``dim=-1``) in float64, summed over ``dim``.

    float32 products are exact in float64, so columns of any size keep their relative accuracy.

    Args:
        X: ``(members, length, R)`` or, with ``dim=-1``, ``(members, R, length)``.
        dim: which dimension is summed over; the other is R.

    Returns:
        ``(members, R, R)``, both triangles. Cost ``length·R²/2`` multiply-adds per member and no
        float64 copy of the whole of X.
    """
    R = X.shape[-1] if dim == -2 else X.shape[-2]
    edges = _edges(R, X.device.type)
    if len(edges) == 1 and len(pieces(X, dim)) == 1:
        (exact,) = casts(X, dim)
        return exact.mT @ exact if dim == -2 else exact @ exact.mT
    G = X.new_zeros((*X.shape[:-2], R, R), dtype=torch.float64)
    for piece in casts(X, dim):
        rows = _shared_out(piece if dim == -2 else piece.mT, len(edges))
        for start, stop in edges:
            block, left, right = (
                G[..., start:stop, :stop],
                rows[..., start:stop].mT,
                rows[..., :stop],
            )
            if len(rows) == len(X):
                block.baddbmm_(left, right)
            else:
                block += (left @ right).sum(0)
    for start, stop in edges:
        G[..., :start, start:stop] = G[..., start:stop, :start].mT
    return G


def _shared_out(rows: Tensor, blocks: int) -> Tensor:
    """One long matrix as a batch of shorter ones, one for each thread, to be summed over.

    A product of few rows and columns that is long within is what BLAS shares out worst.
    """
    threads = torch.get_num_threads() if rows.device.type == "cpu" else 1
    if len(rows) > 1 or blocks > FEW_BLOCKS or rows.shape[-2] % threads:
        return rows
    shared: Tensor = torch.unflatten(rows[0], 0, (threads, -1))
    return shared


def congruence(M: Tensor, G: Tensor) -> Tensor:
    """Upper triangle of ``M G Mᵀ``, M upper triangular, G symmetric; what is below is undefined.

    Cost ``R³/2`` multiply-adds where ``M @ G @ M.mT`` takes ``2 R³``.
    """
    edges = _edges(M.shape[-1], M.device.type)
    if M.shape[-1] < HALVED_FROM:
        return M @ G @ M.mT
    H = torch.empty_like(G)
    for i, (start, stop) in enumerate(edges):
        row = M[..., start:stop, start:] @ G[..., start:, start:]
        for begin, end in edges[i:]:
            H[..., start:stop, begin:end] = row[..., begin - start :] @ M[..., begin:end, begin:].mT
    return H


def exact_product(P: Tensor, Q: Tensor) -> Tensor:
    """``P @ Q`` in float64, without a float64 copy of all of the longer factor."""
    product = P.new_empty((*P.shape[:-1], Q.shape[-1]), dtype=torch.float64)
    start = 0
    if P.shape[-2] >= Q.shape[-1]:
        Q = Q.double()
        for rows in casts(P, -2):
            stop = start + rows.shape[-2]
            torch.matmul(rows, Q, out=product[..., start:stop, :])
            start = stop
    else:
        P = P.double()
        for columns in casts(Q, -1):
            stop = start + columns.shape[-1]
            torch.matmul(P, columns, out=product[..., start:stop])
            start = stop
    return product


def pieces(X: Tensor, dim: int) -> range:
    """Where the pieces along ``dim`` start that are cast at a time; the step is their length."""
    length = X.shape[dim]
    if X.dtype == torch.float64 or X.device.type != "cpu":
        return range(0, length, length)
    row = 8 * X.numel() // length
    return range(0, length, max(LEAST_ROWS, CAST_BYTES // row))


def casts(X: Tensor, dim: int) -> Iterator[Tensor]:
    """X in float64, a piece along ``dim`` at a time; each piece is overwritten by the next."""
    if X.dtype == torch.float64 or X.device.type != "cpu":
        yield X.double()
        return
    starts, length = pieces(X, dim), X.shape[dim]
    scratch = _scratch(X.numel() // length * min(starts.step, length))
    for start in starts:
        piece = X.narrow(dim, start, min(starts.step, length - start))
        yield scratch[: piece.numel()].view(piece.shape).copy_(piece)


_OWN = threading.local()


def _scratch(numbers: int) -> Tensor:
    """This thread's float64 scratch; kept, since the first touch of fresh memory costs more than
    the cast that goes into it.
    """
    kept: Tensor | None = getattr(_OWN, "scratch", None)
    if kept is not None and len(kept) >= numbers:
        return kept
    # Made as an ordinary tensor: one made in inference mode could not be written to outside.
    with torch.inference_mode(False):
        fresh = torch.empty(numbers, dtype=torch.float64, device="cpu")
    if 8 * numbers <= CAST_BYTES:
        _OWN.scratch = fresh
    return fresh


def _edges(R: int, device_type: str) -> list[tuple[int, int]]:
    """Block rows of an R×R matrix."""
    # One large call wins on a GPU as long as nothing else was measured there.
    blocks = min(MOST_BLOCKS, -(-R // BLOCK)) if device_type == "cpu" else 1
    ends = [R * i // blocks for i in range(blocks + 1)]
    return list(pairwise(ends))
