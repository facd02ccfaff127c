"""Which driver: a pure function of sizes."""

from __future__ import annotations

from typing import Literal

import torch

Driver = Literal["gram", "qr", "dense"]

DENSE_FROM = 0.8
"""R / min(out, in) above which W itself is the smallest thing to decompose
(``benchmarks/results/kernel.json``, rows ``crossover``)."""


def select_driver(
    out_features: int,
    in_features: int,
    R: int,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
) -> Driver:
    """The exact driver for the leading SVD of ``B @ A``, from sizes alone.

    Rules, in the order of the code, with ``D = min(out_features, in_features)``:

    1. ``R > 0.8 D``: ``"dense"``. The factors are no smaller than the matrix, so it is formed
       (threshold: ``benchmarks/results/kernel.json``, rows ``crossover``).
    2. float64 input: ``"qr"``. A Gram matrix would halve the digits the caller paid for.
    3. otherwise ``"gram"``: float64 Gram matrices lose less than the rounding of the input.

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
    if DENSE_FROM * min(out_features, in_features) < R:
        return "dense"
    if dtype == torch.float64:
        return "qr"
    return "gram"
