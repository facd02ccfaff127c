"""``read_adapter`` and ``write_adapter``: folders as PEFT's ``save_pretrained`` writes them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hetlora_agg.adapters.adapter import Adapter
from hetlora_agg.adapters.keys import PREFIX, listed
from hetlora_agg.adapters.tensors import in_file
from hetlora_agg.checks import as_path
from hetlora_agg.errors import InputTypeError, InputValueError, quoted

CONFIG, WEIGHTS, RESIDUAL = "adapter_config.json", "adapter_model.safetensors", "residual"
"""What an adapter's folder holds; the last is a folder of its own, where there is a residual."""

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter's config and the header of its tensors; tensors follow when asked for.

    Args:
        path: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The `Adapter`. Nothing is imported, evaluated or fetched, and no pickle is opened.

    Raises:
        InputValueError: a file is missing, damaged or a pickle; the config is no LoRA's or does not
            fit the tensors; keys that belong to nothing; A without B.

    Cost: two headers, whatever the size.

    Example:
        >>> import tempfile, torch
        >>> factors = {"q.lora_A.weight": torch.ones(2, 3), "q.lora_B.weight": torch.ones(4, 2)}
        >>> adapter = Adapter.from_state_dict(factors, {"r": 2, "lora_alpha": 4})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_adapter(write_adapter(f"{folder}/phone", adapter))
        Adapter(1 layers, ranks 2)
    """
    folder = as_path(path, "read_adapter", "folder")
    # Unlike its namesake of Path it is False for names that no system takes, too.
    if not os.path.isdir(folder):
        raise InputValueError(
            f"{str(folder)[:1000]}: no such folder; expected one with {CONFIG} and {WEIGHTS}, as "
            "model.save_pretrained(folder) writes it"
        )
    config = _read_json(folder / CONFIG)
    if config.get("peft_type") is None:
        raise InputValueError(f"{folder / CONFIG}: no peft_type; expected 'LORA'")
    weights = folder / WEIGHTS
    if not os.path.lexists(weights):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        raise InputValueError(
            f"{folder}: no {WEIGHTS}"
            + (
                f", only {listed(pickles)}: a pickle can run any code and is never opened here. "
                "Where it is trusted, convert it: load it with torch and weights_only=True, then "
                f"safetensors.torch.save_file(tensors, {WEIGHTS!r}); or save_pretrained again"
                if pickles
                else "; save with model.save_pretrained(folder)"
            )
        )
    adapter = Adapter(in_file(weights, str(folder)), config, str(folder))
    adapter.folder = folder
    return adapter


def write_adapter(path: str | os.PathLike[str], adapter: Adapter, *, force: bool = False) -> Path:
    """Writes a folder that ``PeftModel.from_pretrained`` loads, whole or not at all.

    It is written beside its place and moved there when complete. A folder that stood there keeps
    its other files (a model card, a tokenizer); only at the moment of the exchange, between two
    renames, is nothing there.

    Args:
        path: the folder to be made; parents are made too.
        adapter: from `read_adapter`, `aggregate_adapters` or `Adapter.from_state_dict`.
        force: replace an adapter that is there.

    Returns:
        The folder.

    Raises:
        InputValueError: the folder is there and ``force`` is not set, it holds folders of others,
            or the adapter has no config.

    Cost: the adapter once in memory.
    """
    if not isinstance(adapter, Adapter):
        raise InputTypeError(
            f"write_adapter: expected an Adapter, got {type(adapter).__name__}; make one with "
            "Adapter.from_state_dict(state_dict, config)"
        )
    target = as_path(path, "write_adapter", "folder")
    with staged(target, force=force) as folder:
        save(folder, adapter)
    return target


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or the error that names the file."""
    if not path.is_file():
        raise InputValueError(
            f"{path.parent}: no {path.name}; without it rank, alpha and rsLoRA are not known. Copy "
            "it from where the client called model.save_pretrained(folder)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputValueError(f"{path}: no JSON: {quoted(error)}") from error
    if not isinstance(config, dict):
        raise InputValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def save(folder: Path, adapter: Adapter) -> None:
    """Write an adapter's two files into a folder and onto the disk."""
    if adapter.config is None:
        raise InputValueError(
            f"{adapter.name}: no config to write; aggregate with configs= instead of scalings="
        )
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {
        said.spelled(None, PREFIX): adapter.tensor(key).contiguous().cpu()
        for key, said in adapter.keys.items()
    }
    save_file(_apart(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(adapter.config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    for name in (WEIGHTS, CONFIG, ""):
        _flush(folder / name)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where one shares its memory with an earlier one."""
    seen: set[int] = set()
    apart = {}
    for key, X in tensors.items():
        apart[key] = X.clone() if X.data_ptr() in seen else X
        seen.add(X.data_ptr())
    return apart


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staged(target: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """A temporary folder beside the target that takes its place when the block ends well.

    Args:
        target: the folder to be.
        force: replace the one that is there.
        inputs: folders that must not be written to.
    """
    check_target(target, force, inputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        # mkdtemp's folder is its owner's alone; others get what the user's umask gives.
        inner = folder / target.name
        inner.mkdir()
        yield inner
        _publish(inner, target, folder / "replaced", force)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_target(target: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse to write over what is not to be written over."""
    real = os.path.realpath(target)
    for name in inputs:
        if os.path.realpath(name) == real:
            raise InputValueError(
                f"{target}: is the folder of an input, {name}; choose another one"
            )
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputValueError(f"{target}: is there and no folder; choose another path")
    if not force:
        raise InputValueError(f"{target}: is there already; set force to replace the adapter in it")
    others = sorted(p.name for p in target.iterdir() if p.is_dir() and p.name != RESIDUAL)
    if others:
        raise InputValueError(
            f"{target}: holds other folders, {listed(others)}, which would be lost; choose another"
        )


def _publish(folder: Path, target: Path, aside: Path, force: bool) -> None:
    """Move the complete folder to its place; put the old one back if that fails."""
    if not os.path.lexists(target):
        os.replace(folder, target)
    else:
        check_target(target, force)
        for old in target.iterdir():
            if old.is_file() and not (folder / old.name).exists():
                shutil.copy2(old, folder / old.name)
        place = Path(os.path.realpath(target))
        os.replace(place, aside)
        try:
            os.replace(folder, place)
        except BaseException:
            os.replace(aside, place)
            raise
    _flush(target.parent)
