"""Shut reduced precision out while the mathematics runs, and put the caller's settings back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_arithmetic(device_type: str) -> Iterator[None]:
    """No gradients, no autocast, no TF32 or bfloat16 matrix products inside; restored after.

    Args:
        device_type: "cpu", "cuda", …: the device whose autocast is switched off.
    """
    changed = []
    try:
        for owner, name, exact, inherit in _switches():
            before = getattr(owner, name)
            if before not in (exact, inherit):
                changed.append((owner, name, before, inherit))
                setattr(owner, name, exact)
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        for owner, name, before, inherit in changed:
            # Reading gives the value in effect, which may have been inherited from a wider setting;
            # written back as the owner's own it would stop following that.
            setattr(owner, name, inherit)
            if getattr(owner, name) != before:
                setattr(owner, name, before)


def _switches() -> list[tuple[Any, str, Any, Any]]:
    """Owner, attribute, exact value and inheriting value of each switch this torch has."""
    # torch 2.9 replaced allow_tf32 by fp32_precision and raises when the two are mixed.
    cuda: Any = torch.backends.cuda
    cpu: Any = torch.backends.mkldnn
    if hasattr(cuda.matmul, "fp32_precision"):
        return [(device.matmul, "fp32_precision", "ieee", "none") for device in (cuda, cpu)]
    return [(cuda.matmul, "allow_tf32", False, False)]
