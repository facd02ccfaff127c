"""Shut reduced precision out while the mathematics runs, and put the caller's settings back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def exact_arithmetic(device_type: str) -> Iterator[None]:
    """No gradients, no autocast, no TF32 or bfloat16 matrix products inside; restored after.

    Args:
        device_type: "cpu", "cuda", …: the device whose autocast is switched off.
    """
    # torch 2.9 replaced the one switch by one per backend and raises when the two are mixed.
    per_backend = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    switch = _per_backend if per_backend else _for_all
    with _SHARED.held(switch), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


class _Shared:
    """A setting of the process that concurrent callers hold together.

    The first to come changes it and the last to go puts it back: whoever left earlier would put it
    back under the others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._held = ExitStack()

    @contextmanager
    def held(self, switch: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        with self._lock:
            if self._holders == 0:
                self._held.enter_context(switch())
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._held.close()


_SHARED = _Shared()


def _after_fork() -> None:
    """A forked process has no callers but its own."""
    global _SHARED
    _SHARED = _Shared()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _per_backend() -> Iterator[None]:
    cuda: Any = torch.backends.cuda
    cpu: Any = torch.backends.mkldnn
    lowered = [
        (device.matmul, device.matmul.fp32_precision)
        for device in (cuda, cpu)
        if device.matmul.fp32_precision not in ("ieee", "none")
    ]
    try:
        for matmul, _ in lowered:
            matmul.fp32_precision = "ieee"
        yield
    finally:
        for matmul, before in lowered:
            # Reading gives the value in effect, which may have been inherited from a wider setting;
            # written back as the backend's own it would stop following that.
            matmul.fp32_precision = "none"
            if matmul.fp32_precision != before:
                matmul.fp32_precision = before


@contextmanager
def _for_all() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
