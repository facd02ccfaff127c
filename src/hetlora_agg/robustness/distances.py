"""Inner products and distances of clients' updates through their factors, never out×in."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from hetlora_agg.components import Components
from hetlora_agg.errors import InputValueError
from hetlora_agg.linalg import norms, product_norm
from hetlora_agg.weighting import client_squared_norms

WORKING_BYTES = 1 << 26
"""Float64 copies that live at once take about this much, or what one layer needs."""

BLOCK = 256
"""Rows of the Gram matrices that are formed at a time."""

CANCELLED = 1e4 * torch.finfo(torch.float64).eps
"""A squared distance below this part of the clients' scale is mostly rounding."""


LOUD = 1e3
"""An update is lost in its own rounding where its components are this many times as long."""


def client_sizes(c: Components) -> Tensor:
    """``S_k = Σ ‖b‖‖a‖`` over the client's components, ``(*layers, K)``: at least ``‖ΔW_k‖_F``."""
    owner = (torch.arange(len(c.ranks), device=c.A.device)[:, None] == c.client).double()
    return (norms(c.B, -2) * norms(c.A, -1)) @ owner.mT


def seen_norms(c: Components) -> Tensor:
    """``‖ΔW_k‖_F²`` and, for updates that cancel within themselves, what cancelling leaves behind.

    Components that cancel make a harmless product of factors of any size, and whoever multiplies
    them out again meets their rounding, ``ε S_k``. A rule sees it as a step of that length in a
    direction of the client's own.
    """
    squares = client_squared_norms(c)
    return squares + _left_behind(c, squares)


def seen_products(c: Components) -> tuple[Tensor, Tensor]:
    """`pair_products` with what cancelling leaves behind, as in `seen_norms`."""
    products, squares = pair_products(c)
    rest = _left_behind(c, products.diagonal(dim1=-2, dim2=-1))
    apart = squares + rest.unsqueeze(-1) + rest.unsqueeze(-2)
    apart.diagonal(dim1=-2, dim2=-1).zero_()
    return products + torch.diag_embed(rest), apart


def _left_behind(c: Components, squares: Tensor) -> Tensor:
    """``(ε S_k)²`` of updates shorter than a thousandth of their components, else 0."""
    sizes = client_sizes(c)
    rest = (torch.finfo(c.A.dtype).eps * sizes).square()
    rest = torch.where(sizes > LOUD * squares.sqrt(), rest, 0.0)
    if not bool(torch.isfinite(rest).all()):
        id = c.ids[int((~torch.isfinite(rest)).nonzero()[0, -1])]
        raise InputValueError(
            f"distances: client {id!r}: the square of its components' size leaves float64; bring "
            "the updates to a usual size"
        )
    return rest


def squared_distances(c: Components) -> tuple[Tensor, Tensor]:
    """``‖ΔW_k‖_F²`` and ``‖ΔW_i − ΔW_j‖_F²`` for every client and pair, for any ranks.

    ``⟨ΔW_i, ΔW_j⟩ = tr((B_iᵀ B_j)(A_j A_iᵀ))``, sums of blocks of ``(BᵀB) ∘ (A Aᵀ)``. Where
    ``d² < 1e4 ε (S_i² + S_j²)``, ``S_k = Σ ‖b‖‖a‖`` over the client's components, the Gram matrix
    has lost d to rounding and the pair is taken again, through the triangles of
    ``[B_i, −B_j]`` and ``[A_i; A_j]``; so are norms of updates that cancel within themselves.
    Factors that are equal bit for bit are at distance exactly 0.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``;
            clients of rank 0 count as zero.

    Returns:
        ``(*layers, K)`` and ``(*layers, K, K)``, float64, both additive over layers.

    Raises:
        InputValueError: the square of a norm or distance leaves float64.

    Cost: ``(out + in) R²`` multiply-adds and 64 MiB, or ``8 R (out + in + 768)`` bytes if that is
    more; ``(out + in)(r_i + r_j)²`` for every pair that is taken again.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg.intake import collect
        >>> from hetlora_agg.validation import read_updates
        >>> one, three = (ones(1, 2), ones(2, 1)), (ones(2, 2), 1.5 * ones(2, 2))
        >>> squared_distances(collect(read_updates([one, three])[0]).components())[1]
        tensor([[ 0., 16.],
                [16.,  0.]], dtype=torch.float64)

    Reference: none; the trace identity is elementary.

    Fidelity: OURS.
    """
    products, squares = pair_products(c)
    return products.diagonal(dim1=-2, dim2=-1), squares


def pair_products(c: Components) -> tuple[Tensor, Tensor]:
    """``⟨ΔW_i, ΔW_j⟩`` and ``‖ΔW_i − ΔW_j‖_F²``, ``(*layers, K, K)`` float64 each, additive.

    Either tells the other, but not in floating point: a distance of near ones is lost in their
    products, a product of small with large ones in their distances. See `squared_distances`.
    """
    K = len(c.ranks)
    own_norms = client_squared_norms(c).reshape(-1, K)
    A, B = (X.reshape(-1, *X.shape[-2:]) for X in (c.A, c.B))
    owner = (torch.arange(K, device=A.device)[:, None] == c.client).double()
    size = max(1, WORKING_BYTES // (8 * A.shape[-2] * (B.shape[-2] + A.shape[-1] + 3 * BLOCK)))
    members = range(0, len(A), size)
    products = torch.cat([_block_sums(B[m : m + size], A[m : m + size], owner) for m in members])
    # The origin is one more client, of rank 0: its distances are the norms.
    padded = torch.nn.functional.pad(products, (0, 1, 0, 1))
    own = padded.diagonal(dim1=-2, dim2=-1)
    own[:, :K] = own_norms
    squares = own.unsqueeze(-1) + own.unsqueeze(-2) - 2 * padded
    squares.diagonal(dim1=-2, dim2=-1).zero_()
    scale = ((norms(B, -2) * norms(A, -1)) @ owner.mT).square()
    _mend(c, A, B, torch.nn.functional.pad(scale, (0, 1)), squares.clamp_min_(0))
    if not bool(torch.isfinite(squares).all()):
        id = c.ids[int((~torch.isfinite(squares)).nonzero()[0, -1]) % K]
        raise InputValueError(
            f"distances: client {id!r}: the square of a distance leaves float64; bring the updates "
            "to a usual size"
        )
    products.diagonal(dim1=-2, dim2=-1).copy_(squares[:, K, :K])
    shape = (*c.layers, K, K)
    return products.reshape(shape), squares[:, :K, :K].reshape(shape)


def _block_sums(B: Tensor, A: Tensor, owner: Tensor) -> Tensor:
    """``⟨ΔW_i, ΔW_j⟩`` of a few layers, ``(members, K, K)``, a block of components at a time."""
    A, B = A.double(), B.double()
    total = A.new_zeros((len(A), len(owner), len(owner)))
    for start in range(0, A.shape[-2], BLOCK):
        stop = min(start + BLOCK, A.shape[-2])
        left, right = B[..., :stop], A[..., :stop, :]
        terms = (left[..., start:].mT @ left) * (right[..., start:, :] @ right.mT)
        rows = owner[:, start:stop] @ terms
        # What lies before the block is met once and stands for its mirror image too.
        rows[..., :start] *= 2
        total += rows @ owner[:, :stop].mT
    return (total + total.mT) / 2


def _mend(c: Components, A: Tensor, B: Tensor, scale: Tensor, squares: Tensor) -> None:
    """Take the pairs whose distance is lost to rounding again, in place of ``squares``."""
    lost = squares < CANCELLED * (scale.unsqueeze(-1) + scale.unsqueeze(-2))
    layer, one, other = lost.triu(1).nonzero(as_tuple=True)
    if not len(layer):
        return
    rows, held = _rows_of_clients(c)
    bytes_each = 64 * rows.shape[-1] * (A.shape[-1] + B.shape[-2])
    size = max(1, WORKING_BYTES // bytes_each)
    for start in range(0, len(layer), size):
        at, i, j = (index[start : start + size] for index in (layer, one, other))
        A_i, A_j, B_i, B_j = (_of_clients(X, at, k, rows, held) for X in (A, B.mT) for k in (i, j))
        equal = (A_i == A_j).flatten(1).all(-1) & (B_i == B_j).flatten(1).all(-1)
        far = product_norm(torch.cat([B_i, -B_j], 1).mT, torch.cat([A_i, A_j], 1))
        squares[at, i, j] = torch.where(equal, 0.0, far.square())
        squares[at, j, i] = squares[at, i, j]


def _rows_of_clients(c: Components) -> tuple[Tensor, Tensor]:
    """Each client's components, ``(K + 1, r_max)``, and which are its own; the last has none."""
    starts = accumulate(c.ranks, initial=0)
    places = torch.arange(c.max_rank, device=c.A.device)
    ranks = torch.tensor([*c.ranks, 0], device=c.A.device)
    held = places < ranks.unsqueeze(-1)
    first = torch.tensor(list(starts), device=c.A.device)
    return torch.where(held, first.unsqueeze(-1) + places, 0), held


def _of_clients(X: Tensor, layer: Tensor, client: Tensor, rows: Tensor, held: Tensor) -> Tensor:
    """These clients' rows of these layers of X, ``(n, r_max, length)``, zero beyond their rank."""
    own = X[layer.unsqueeze(-1), rows[client]].double()
    return own.masked_fill_(~held[client].unsqueeze(-1), 0.0)
