"""Which implementation of a kernel runs: what is installed, what was measured, what was asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Literal

from hetlora_agg.errors import OptionValueError, unknown_name

Backend = Literal["auto", "triton", "torch"]

# A row enters only when benchmarks/results/gpu.json shows the kernel ahead of its torch twin on the
# sizes it would be used for. No kernel has been measured on a GPU yet.
MEASURED_WINS: Mapping[str, str] = {}
"""Kernel name → the benchmark row that shows it ahead. Only these are ever chosen by "auto"."""


def available(device_type: str) -> bool:
    """Whether the Triton kernels can run on such a device.

    True when triton is installed and the device is a GPU, or a CPU with ``TRITON_INTERPRET=1`` in
    the environment (set before anything imports triton). The interpreter reads host memory only, so
    with it on the answer for a GPU is False.

    Args:
        device_type: "cpu", "cuda", …

    Example:
        >>> available("meta")
        False
    """
    where = "cpu" if _interpreting() else "cuda"
    return device_type == where and _installed()


def selected(name: str, device_type: str) -> bool:
    """Whether ``backend="auto"`` takes the Triton kernel: available, and measured to win on a GPU.

    Args:
        name: the kernel's public name, "ragged_gram", "ragged_output" or "jacobi".
        device_type: "cpu", "cuda", …

    Example:
        >>> selected("jacobi", "cpu")
        False
    """
    return name in MEASURED_WINS and device_type == "cuda" and available(device_type)


def takes_triton(name: str, backend: str, device_type: str) -> bool:
    """The answer to a caller's ``backend=``.

    Raises:
        OptionValueError: an unknown backend, or "triton" where it cannot run.
    """
    if backend == "auto":
        return selected(name, device_type)
    if backend == "torch":
        return False
    if backend != "triton":
        raise OptionValueError(
            f"{name}: {unknown_name('backend', backend, ('auto', 'torch', 'triton'))}"
        )
    if not _installed():
        raise OptionValueError(
            f'{name}: backend="triton" needs the package triton, which is not installed; '
            '`pip install triton`, or pass backend="torch"'
        )
    if not available(device_type):
        raise OptionValueError(
            f'{name}: backend="triton" runs on CUDA tensors, or on CPU tensors under '
            f"TRITON_INTERPRET=1, got {device_type} with the interpreter "
            f'{"on" if _interpreting() else "off"}; move the tensors or pass backend="torch"'
        )
    return True


def _installed() -> bool:
    return find_spec("triton") is not None


def _interpreting() -> bool:
    # The words triton itself takes for yes.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
