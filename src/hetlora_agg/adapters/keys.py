"""Keys of PEFT state dicts: which layer and part a tensor is, with or without an adapter's name.

=====================  =====================================  ================================
part                   in ``model.state_dict()``              in ``adapter_model.safetensors``
=====================  =====================================  ================================
factors                ``….lora_A.<name>.weight``             ``….lora_A.weight``
of an embedding        ``….lora_embedding_A.<name>``          ``….lora_embedding_A``
bias of B              ``….lora_B.<name>.bias``               ``….lora_B.bias``
DoRA's magnitudes      ``….lora_magnitude_vector.<name>.…``   ``….lora_magnitude_vector``
modules_to_save        ``….modules_to_save.<name>.…``         ``…``
biases, base layers    as they are                            as they are
=====================  =====================================  ================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hetlora_agg.errors import InputValueError, shown

PREFIX = "base_model.model."
"""What PEFT puts before a module's own path."""

FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
BIAS, MAGNITUDE, SAVED, PLAIN, BASE = "lora_bias", "magnitude", "saved", "plain", "base"
"""Parts besides the factors; BASE belongs to the base model and must be equal on all clients."""

EMBEDDINGS = frozenset(
    {"embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out"}
)
"""Modules that PEFT saves whole beside the adapter when the vocabulary was resized."""

_LINEAR = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_[AB])(\.(?P<name>[^.]+))?\.(?P<leaf>weight|bias)"
)
_EMBEDDING = re.compile(r"(?P<path>.+)\.(?P<part>lora_embedding_[AB])(\.(?P<name>[^.]+))?")
_MAGNITUDE = re.compile(
    r"(?P<path>.+)\.lora_magnitude_vector(\.(?!weight$)(?P<name>[^.]+))?(\.weight)?"
)
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<name>[^.]+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class Key:
    """What a key says.

    Attributes:
        part: one of ``FACTORS`` or of the parts above.
        path: the layer's path in the base model; of a full-size tensor its own.
        name: the adapter's name, None in files and for tensors that carry none.
        prefix: ``PREFIX`` or nothing.
        module: of a saved module's tensor, the module's path.
    """

    part: str
    path: str
    name: str | None = None
    prefix: str = ""
    module: str = ""

    def spelled(self, name: str | None = None, prefix: str = "") -> str:
        """The key under that adapter's name (None: as in files)."""
        dot = "" if name is None else f".{name}"
        stem = prefix + self.path
        if self.part in FACTORS:
            weight = "" if "embedding" in self.part else ".weight"
            return f"{stem}.{self.part}{dot}{weight}"
        if self.part == BIAS:
            return f"{stem}.lora_B{dot}.bias"
        if self.part == MAGNITUDE:
            return f"{stem}.lora_magnitude_vector{dot}{'.weight' if dot else ''}"
        if self.part == SAVED and dot:
            rest = self.path.removeprefix(self.module)
            return f"{prefix}{self.module}.modules_to_save{dot}{rest}"
        return stem

    @property
    def canonical(self) -> str:
        """The key as in files, without the prefix: the same on every client."""
        return self.spelled()


def read_keys(keys: Iterable[str], config: Mapping[str, Any], where: str) -> dict[str, Key]:
    """What every key says.

    Args:
        keys: the tensors' names.
        config: the adapter's; its ``modules_to_save`` and ``bias`` say which full-size tensors
            belong to it.
        where: who sent them, for errors.

    Raises:
        InputValueError: keys that match nothing, or of more than one adapter.
    """
    read = {key: read_key(key, config) for key in keys}
    unknown = [key for key, said in read.items() if said is None]
    if unknown:
        raise InputValueError(
            f"{where}: {len(unknown)} keys are no part of a LoRA adapter: {listed(unknown)}; pass "
            "get_peft_model_state_dict(model), or what save_pretrained wrote, with the config that "
            "belongs to it (modules_to_save= and bias= say which full-size tensors are trained)"
        )
    known = {key: said for key, said in read.items() if said is not None}
    if not any(said.part in FACTORS for said in known.values()):
        raise InputValueError(
            f"{where}: no LoRA factors among {len(known)} keys; expected keys such as "
            "'base_model.model.….lora_A.weight'"
        )
    names = {said.name for said in known.values() if said.part in (*FACTORS, BIAS, MAGNITUDE)}
    if len(names) > 1:
        found = sorted("none" if name is None else name for name in names)
        raise InputValueError(
            f"{where}: expected the keys of one adapter, got {len(names)}: {found}; pass "
            "get_peft_model_state_dict(model, adapter_name=…)"
        )
    twice = {said.canonical for said in known.values()}
    if len(twice) < len(known):
        raise InputValueError(
            f"{where}: {len(known)} keys stand for {len(twice)} tensors: some come with and "
            f"without {PREFIX!r} or an adapter's name; pass one of the two"
        )
    return known


def read_key(key: str, config: Mapping[str, Any]) -> Key | None:
    """What one key says, None if nothing that is known."""
    prefix = PREFIX if key.startswith(PREFIX) else ""
    rest = key.removeprefix(PREFIX)
    if found := _LINEAR.fullmatch(rest):
        part = found["part"] if found["leaf"] == "weight" else BIAS
        if part == BIAS and found["part"] == "lora_A":
            return None
        return Key(part, found["path"], found["name"], prefix)
    if found := _EMBEDDING.fullmatch(rest):
        return Key(found["part"], found["path"], found["name"], prefix)
    if found := _MAGNITUDE.fullmatch(rest):
        return Key(MAGNITUDE, found["path"], found["name"], prefix)
    if found := _SAVED.fullmatch(rest):
        path = f"{found['path']}.{found['rest']}"
        return Key(SAVED, path, found["name"], prefix, found["path"])
    return _full_size(rest, prefix, config)


def _full_size(rest: str, prefix: str, config: Mapping[str, Any]) -> Key | None:
    """A tensor without lora in its key: the config says whether it belongs to the adapter."""
    if "lora_" in rest.rpartition(".")[2] or ".original_module." in rest:
        return None
    if module := _saved_module(rest, config.get("modules_to_save") or ()):
        return Key(SAVED, rest, None, prefix, module)
    if rest.endswith(".base_layer.weight"):
        return Key(BASE, rest, None, prefix)
    if rest.endswith(".bias") and config.get("bias", "none") != "none":
        return Key(PLAIN, rest, None, prefix)
    parts = rest.split(".")
    if parts[-1] == "weight" and len(parts) > 1 and parts[-2] in EMBEDDINGS:
        return Key(BASE, rest, None, prefix)
    return None


def _saved_module(rest: str, names: Iterable[str]) -> str | None:
    """The path of the saved module that the tensor is in, by PEFT's rule: it ends in the name."""
    parts = rest.split(".")
    for end in range(1, len(parts)):
        module = ".".join(parts[:end])
        if any(module.endswith(name) for name in names):
            return module
    return None


def listed(names: Iterable[Any], most: int = 5) -> str:
    """Up to five names, and how many more."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more
