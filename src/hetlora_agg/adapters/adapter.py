"""``Adapter``: one LoRA adapter in PEFT's layout, its tensors read when they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hetlora_agg.adapters.config import read_config
from hetlora_agg.adapters.keys import FACTORS, MAGNITUDE, Key, read_keys
from hetlora_agg.adapters.layout import check_parts, pair_up
from hetlora_agg.adapters.tensors import Info, Tensors, in_memory
from hetlora_agg.checks import as_list
from hetlora_agg.errors import InputValueError
from hetlora_agg.types import ClientUpdate, LowRank


class Adapter:
    """One LoRA adapter: layers, ranks, scalings, and tensors that are read when asked for.

    From a folder by `read_adapter`, from memory by `Adapter.from_state_dict`.

    Attributes:
        name: what errors call it: the folder, or "client 3".
        config: ``adapter_config.json`` as a dict, or None where only scalings are known.
        layers: path in the base model -> `Layer`, in the order sent.
        extras: every other tensor, by its key as in files -> the key as sent.
        folder: where it was read from, None in memory.
    """

    def __init__(
        self,
        tensors: Tensors,
        config: Mapping[str, Any] | None,
        name: str,
        scalings: float | Mapping[str, float] | None = None,
    ) -> None:
        """Checks keys, shapes and config against each other; reads no tensor."""
        self.name = name
        self.config = None if config is None else read_config(config, name)
        self._tensors = tensors
        self.keys: dict[str, Key] = read_keys(tensors.infos, self.config or {}, name)
        self.layers = pair_up(name, tensors, self.keys, self.config, scalings)
        self.extras = {
            said.canonical: key for key, said in self.keys.items() if said.part not in FACTORS
        }
        self.folder: Path | None = None
        self._sent_list = self._sent_numpy = False
        check_parts(name, self.keys, self.layers, self.config)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any] | Sequence[Any],
        config: Any = None,
        *,
        scalings: float | Mapping[str, float] | None = None,
        keys: Sequence[str] | None = None,
        name: str = "adapter",
    ) -> Adapter:
        """An adapter in memory: a state dict in either key style, or a list with its keys.

        Args:
            state_dict: torch tensors or numpy arrays by key, with an adapter's name in the keys (as
                in ``model.state_dict()``) or without (``get_peft_model_state_dict``, files); or a
                list of them in the order of ``keys``.
            config: ``adapter_config`` as a dict or a ``peft.LoraConfig``.
            scalings: instead of a config: ``lora_alpha / r``, one number or one by layer.
            keys: the keys of a list.
            name: what errors call it.

        Raises:
            InputTypeError, InputValueError: what is wrong, with key, found, expected and remedy.

        Example:
            >>> import torch
            >>> factors = {"q.lora_A.weight": torch.ones(2, 3), "q.lora_B.weight": torch.ones(4, 2)}
            >>> adapter = Adapter.from_state_dict(factors, {"r": 2, "lora_alpha": 4})
            >>> adapter, adapter.scaling("q")
            (Adapter(1 layers, ranks 2), 2.0)
        """
        as_sent = isinstance(state_dict, Mapping)
        named = state_dict if isinstance(state_dict, Mapping) else _named(state_dict, keys, name)
        if (config is None) == (scalings is None):
            raise InputValueError(
                f"{name}: expected a config or scalings, got "
                f"{'neither' if config is None else 'both'}; lora_alpha and r are not in a state "
                "dict, and an update without them is off by that factor"
            )
        adapter = cls(in_memory(named, name), config, name, scalings)
        adapter._sent_list = not as_sent
        adapter._sent_numpy = all(isinstance(X, np.ndarray) for X in named.values())
        return adapter

    def rank(self, layer: str) -> int:
        """The rank of a layer."""
        return self.layers[layer].rank

    def scaling(self, layer: str) -> float:
        """The scaling of a layer: the update is ``scaling * B @ A``."""
        return self.layers[layer].scaling

    def factors(self, layer: str) -> LowRank:
        """A layer's factors as sent, unscaled, a convolution's kernel laid flat; read now."""
        A, B = (self.tensor(key) for key in self.layers[layer].keys)
        out, columns = self.layers[layer].size
        return LowRank(A.reshape(A.shape[0], columns), B.reshape(out, B.shape[1]))

    def update(self, layer: str, weight: float = 1.0, id: Hashable | None = None) -> ClientUpdate:
        """A layer as `aggregate` takes it; read now."""
        factors = self.factors(layer)
        scaling = self.scaling(layer)
        return ClientUpdate(factors.A, factors.B, weight=weight, scaling=scaling, id=id)

    def low_ranks(self) -> dict[str, LowRank]:
        """Every layer's update with the scaling in B: what ``previous=`` takes; all read now."""
        return {
            layer: LowRank(factors.A, factors.B * self.scaling(layer))
            for layer, factors in ((layer, self.factors(layer)) for layer in self.layers)
        }

    def info(self, key: str) -> Info:
        """Shape and dtype of the tensor that was sent under this key; not read."""
        return self._tensors.infos[key]

    def tensor(self, key: str, rows: slice | None = None) -> Tensor:
        """The tensor that was sent under this key, or some of its rows; read now."""
        return self._tensors.load(key, rows)

    @property
    def dora(self) -> bool:
        """Whether DoRA's magnitudes belong to it."""
        return any(said.part == MAGNITUDE for said in self.keys.values())

    def state_dict(self) -> Any:
        """Every tensor as sent: the same keys, list or dict, numpy arrays or tensors."""
        tensors = {key: self.tensor(key) for key in self.keys}
        sent = {k: X.numpy(force=True) for k, X in tensors.items()} if self._sent_numpy else tensors
        return list(sent.values()) if self._sent_list else sent

    def replaced(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Adapter:
        """The same keys in the same style with these tensors, all of them, in their place."""
        scalings = None if config is not None else {k: v.scaling for k, v in self.layers.items()}
        ordered = {key: tensors[key] for key in self.keys}
        new = Adapter(in_memory(ordered, self.name), copy.deepcopy(config), self.name, scalings)
        return self.styled(new)

    def styled(self, other: Adapter) -> Adapter:
        """The other adapter, which is to come out as this one was sent: list or dict, numpy."""
        other._sent_list, other._sent_numpy = self._sent_list, self._sent_numpy
        return other

    def __repr__(self) -> str:
        """One line: layers and ranks."""
        ranks = sorted({layer.rank for layer in self.layers.values()})
        return f"Adapter({len(self.layers)} layers, ranks {', '.join(map(str, ranks))})"


def _named(arrays: Sequence[Any], keys: Sequence[str] | None, name: str) -> dict[str, Any]:
    """A list's items under their keys."""
    listed_arrays = as_list(arrays, f"{name}: state dict")
    if keys is None:
        raise InputValueError(
            f"{name}: a list of {len(listed_arrays)} arrays needs keys=, in the order in which "
            "they were sent: list(get_peft_model_state_dict(model))"
        )
    names = as_list(keys, f"{name}: keys")
    if len(names) != len(listed_arrays) or len(set(names)) != len(names):
        raise InputValueError(
            f"{name}: expected one key for each of {len(listed_arrays)} arrays, got {len(names)} "
            f"keys, {len(set(names))} of them different"
        )
    return dict(zip(names, listed_arrays, strict=True))
