"""Named tensors whose shapes are known at once and whose entries are read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hetlora_agg.checks import FLOATS
from hetlora_agg.errors import InputTypeError, InputValueError, quoted
from hetlora_agg.types import from_numpy

STORED = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Names of float dtypes in safetensors files; others are kept as None and never averaged."""

PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""How files of ``torch.save`` begin."""


class Info(NamedTuple):
    """Shape and dtype of a tensor that was not read; None for a dtype that is no float."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True, eq=False)
class Tensors:
    """What an adapter consists of.

    Attributes:
        infos: key -> shape and dtype, in the order sent.
        load: reads one tensor, or a slice of its rows; nothing of it is kept.
    """

    infos: Mapping[str, Info]
    load: Callable[[str, slice | None], Tensor]


def in_memory(given: Mapping[str, Any], where: str) -> Tensors:
    """A state dict of torch tensors or numpy arrays."""
    tensors: dict[str, Tensor] = {}
    for key, X in given.items():
        if isinstance(X, np.ndarray):
            X = from_numpy(X)
        if not isinstance(X, Tensor):
            raise InputTypeError(
                f"{where}: {key!r}: expected a torch tensor or a numpy array, got "
                f"{type(X).__name__}"
            )
        if X.is_nested or X.layout != torch.strided or X.is_meta:
            kind = "meta" if X.is_meta else "nested" if X.is_nested else f"{X.layout}"
            raise InputTypeError(f"{where}: {key!r}: expected a dense tensor, got a {kind} one")
        tensors[str(key)] = X.detach()
    infos = {
        key: Info(tuple(X.shape), X.dtype if X.dtype in FLOATS else None)
        for key, X in tensors.items()
    }
    return Tensors(infos, lambda key, rows: tensors[key] if rows is None else tensors[key][rows])


def in_file(path: Path, where: str) -> Tensors:
    """A safetensors file: its header is read now, its tensors one by one.

    Raises:
        InputValueError: no regular file, a pickle under that name, or a damaged file.
    """
    if not path.is_file():
        raise InputValueError(f"{where}: {path} is no regular file")
    pickle = False
    try:
        with path.open("rb") as file:
            pickle = file.read(4).startswith(PICKLES)
        handle: Any = safe_open(path, framework="pt")
        names = list(handle.keys())
        slices = ((name, handle.get_slice(name)) for name in names)
        infos = {
            name: Info(tuple(part.get_shape()), STORED.get(part.get_dtype()))
            for name, part in slices
        }
    except (SafetensorError, OSError) as error:
        raise InputValueError(
            f"{where}: {path} is no intact safetensors file: "
            + (
                "it is a pickle under another name; convert it where it is trusted"
                if pickle
                else f"{quoted(error)}; send or download it again"
            )
        ) from error

    def load(name: str, rows: slice | None) -> Tensor:
        tensor: Tensor = handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows]
        return tensor

    return Tensors(infos, load)
