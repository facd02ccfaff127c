"""Which driver: a pure function of sizes."""

from __future__ import annotations

from typing import Literal

import torch

Driver = Literal["gram", "qr", "dense"]

DENSE_FROM = 1.6
"""Numbers in the factors per number in W, ``R (out + in) / (out in)``, above which W itself is
the quicker thing to decompose (``benchmarks/results/kernel.json``, rows ``crossover``). For a
square matrix that is R = 0.8 min(out, in)."""


def select_driver(
    out_features: int,
    in_features: int,
    R: int,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
) -> Driver:
    """The exact driver for the leading SVD of ``B @ A``, from sizes alone.

    Rules, in the order of the code:

    1. ``R > min(out_features, in_features)``: ``"dense"``. The factors have more directions than
       the matrix, so their Gram matrices are singular and their QR finds nothing to leave out.
    2. ``R (out + in) > 1.6 out in``: ``"dense"``. The factors are larger than the matrix, so it is
       formed (threshold: ``benchmarks/results/kernel.json``, rows ``crossover``; on a square
       matrix R > 0.8 min(out, in), on a long one never before rule 1).
    3. float64 input: ``"qr"``. A Gram matrix would halve the digits the caller paid for.
    4. otherwise ``"gram"``: float64 Gram matrices lose less than the rounding of the input.

    What sizes cannot tell is decided per member, inside the drivers: members whose clients
    duplicate or cancel each other leave `gram` for `qr`, and `dense` for the SVD of W, and are
    named in the certificate. Approximate drivers are never chosen here.

    Args:
        out_features: rows of B.
        in_features: columns of A.
        R: columns of B, rows of A.
        rank: wanted rank. No rule needs it yet: all drivers here are exact.
        dtype: dtype of the factors.
        device_type: "cpu" or "cuda". No rule needs it yet.

    Returns:
        The driver's name, never an approximate one.

    Example:
        >>> select_driver(4096, 4096, 120), select_driver(64, 64, 60)
        ('gram', 'dense')
        >>> select_driver(4096, 4096, 120, dtype=torch.float64)
        'qr'
    """
    del rank, device_type
    if min(out_features, in_features) < R:
        return "dense"
    if DENSE_FROM * out_features * in_features < R * (out_features + in_features):
        return "dense"
    if dtype == torch.float64:
        return "qr"
    return "gram"
