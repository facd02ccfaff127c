"""One safetensors file with its checksum, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hetlora_agg.checks import as_path
from hetlora_agg.errors import InputValueError
from hetlora_agg.streaming.receipts import raw

FORMAT = "hetlora_agg.streaming"

SCHEMA = 2
"""Version of what is in the file; raised with every change that older code cannot read."""

NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.uint8: "U8",
}
"""Dtypes as safetensors spells them."""


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], state: Any, format: str = FORMAT
) -> Path:
    """Writes tensors and a JSON state beside the path and moves them there when complete.

    What is at the path is the old file or the new one, whenever the process or the machine stops.

    Raises:
        InputTypeError: no path.
        OSError: the folder is not there, the disk is full; the old file is as it was.
    """
    target = as_path(path, "save", "file")
    text = json.dumps(state, sort_keys=True)
    metadata = {
        "format": format,
        "schema": str(SCHEMA),
        "sha256": checksum(tensors, text),
        "state": text,
    }
    part = target.with_name(f".{target.name}.part")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for piece in _pieces(tensors, metadata):
            while piece:
                piece = piece[os.write(handle, piece) :]
        os.fsync(handle)
    except BaseException:
        os.close(handle)
        os.unlink(part)
        raise
    os.close(handle)
    os.replace(part, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return target


def _pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The file's bytes: length of the header, header, tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, X in sorted(tensors.items()):
        start, end = end, end + X.numel() * X.element_size()
        kind = {"dtype": NAMES[X.dtype], "shape": list(X.shape)}
        header[name] = {**kind, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, X in sorted(tensors.items()):
        yield raw(X)


def read(path: str | os.PathLike[str], format: str = FORMAT) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the state of a file that `write` wrote.

    Raises:
        InputTypeError, InputValueError: no such file, damaged, another format or version.
    """
    source = as_path(path, "load", "file")
    again = "load an older checkpoint, or add the clients again"
    if not os.path.isfile(source):
        raise InputValueError(f"{source}: no such file; expected what save(path) writes")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputValueError(f"{source}: damaged or no checkpoint: {error}; {again}") from error
    if metadata.get("format") != format:
        raise InputValueError(
            f"{source}: a safetensors file of format {metadata.get('format')!r}, but no checkpoint "
            f"of a running aggregate, format {format!r}; expected what save(path) writes"
        )
    if metadata.get("schema") != str(SCHEMA):
        raise InputValueError(
            f"{source}: schema version {metadata.get('schema')}, this library reads {SCHEMA}; load "
            "it with the version that wrote it, or add the clients again"
        )
    text = metadata.get("state", "")
    if checksum(tensors, text) != metadata.get("sha256"):
        raise InputValueError(f"{source}: the checksum does not fit the contents; {again}")
    return tensors, json.loads(text)


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of the state and of every tensor with its name, dtype and shape."""
    sha = hashlib.sha256(text.encode())
    for name, X in sorted(tensors.items()):
        sha.update(f"\n{name} {NAMES[X.dtype]} {list(X.shape)}\n".encode())
        sha.update(raw(X))
    return sha.hexdigest()
