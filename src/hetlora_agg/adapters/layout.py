"""`Layer`: factors paired up, their shapes and scalings, checked against the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from hetlora_agg.adapters.config import rank_and_alpha, scaling_of
from hetlora_agg.adapters.keys import BIAS, FACTORS, MAGNITUDE, Key, listed
from hetlora_agg.adapters.tensors import Tensors
from hetlora_agg.checks import as_number
from hetlora_agg.errors import InputTypeError, InputValueError, shown
from hetlora_agg.types import LowRank


@dataclass(frozen=True)
class Layer:
    """One layer of an adapter: where its factors are and how they are shaped.

    Attributes:
        keys: the keys of A and of B as sent.
        rank: the rank.
        scaling: ``alpha / r``, or ``alpha / √r`` under rsLoRA, by the config's patterns.
        in_shape: A's shape without the rank, ``(in_features,)``; a convolution's ``(in, *kernel)``.
        out_shape: B's without the rank, ``(out_features,)``; a convolution's ``(out, 1, …)``.
        embedding: whether the layer is an embedding.
    """

    keys: tuple[str, str]
    rank: int
    scaling: float
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    embedding: bool

    @property
    def size(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of ``B @ A``, a kernel's entries among the inputs."""
        return self.out_shape[0], prod(self.in_shape)

    def folded(self, low_rank: LowRank) -> tuple[Tensor, Tensor]:
        """Factors in the shapes that the layer has in files, contiguous."""
        factors = low_rank.torch()
        rank = factors.rank
        A = factors.A.reshape(rank, *self.in_shape)
        B = factors.B.reshape(self.out_shape[0], rank, *self.out_shape[1:])
        return A.contiguous(), B.contiguous()


def pair_up(
    name: str,
    tensors: Tensors,
    keys: Mapping[str, Key],
    config: Mapping[str, Any] | None,
    scalings: Any,
) -> dict[str, Layer]:
    """Pairs of factors by layer, checked against each other and the config.

    Args:
        name: what errors call the adapter.
        tensors: shapes and dtypes; none is read.
        keys: what every key says.
        config: the adapter's, or None with scalings.
        scalings: ``alpha / r``, one number or one by layer, or None with a config.
    """
    parts: dict[str, dict[str, str]] = {}
    for key, said in keys.items():
        if said.part in FACTORS:
            parts.setdefault(said.path, {})[said.part] = key
    layers = {}
    for path, found in parts.items():
        embedding = any("embedding" in part for part in found)
        pair = FACTORS[2:] if embedding else FACTORS[:2]
        if set(found) != set(pair):
            raise InputValueError(
                f"{name}, layer {path!r}: expected {pair[0]} and {pair[1]}, got only "
                f"{listed(found)}; send both"
            )
        at = f"{name}, layer {shown(path)}"
        A, B = _shapes(at, tensors, found[pair[0]], found[pair[1]])
        if config is None:
            scaling = _given_scaling(at, path, scalings)
        else:
            scaling = _scaling(at, path, config, A)
        ends = (A[1:], (B[0], *B[2:]))
        layers[path] = Layer((found[pair[0]], found[pair[1]]), A[0], scaling, *ends, embedding)
    odd = sorted(set(scalings) - set(layers)) if isinstance(scalings, Mapping) else []
    if odd:
        raise InputValueError(
            f"{name}: scalings: no such layers: {listed(odd)}; it has {listed(layers)}"
        )
    return layers


def _shapes(at: str, tensors: Tensors, *keys: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B that make a product."""
    for key in keys:
        if tensors.infos[key].dtype is None:
            raise InputTypeError(
                f"{at}: {key!r}: expected float16, bfloat16, float32 or float64; quantised or "
                "integer factors cannot be averaged, convert them with .float()"
            )
    A, B = (tensors.infos[key].shape for key in keys)
    if min(len(A), len(B)) < 2 or 0 in (*A, *B) or any(n != 1 for n in B[2:]):
        raise InputValueError(
            f"{at}: expected A (rank, in_features) and B (out_features, rank), of a convolution "
            f"(rank, in, *kernel) and (out, rank, 1, …), got {A} and {B}; 1-D or empty factors "
            "were saved from a sharded model before it was gathered"
        )
    if A[0] != B[1]:
        grouped = len(A) > 2 and A[0] % B[1] == 0
        why = (
            "it is a grouped convolution, whose update is not B @ A: leave it out of target_modules"
            if grouped
            else "check which adapter sent which"
        )
        raise InputValueError(f"{at}: A {A} has rank {A[0]}, B {B} has rank {B[1]}; {why}")
    return A, B


def _given_scaling(at: str, path: str, scalings: Any) -> float:
    given = scalings.get(path) if isinstance(scalings, Mapping) else scalings
    if given is None:
        raise InputValueError(f"{at}: scalings has no entry for it; give lora_alpha / r")
    return as_number(given, f"{at}: scaling", zero=False)


def _scaling(at: str, path: str, config: Mapping[str, Any], A: tuple[int, ...]) -> float:
    rank, alpha = rank_and_alpha(config, path)
    if rank != A[0]:
        raise InputValueError(
            f"{at}: the config says rank {rank} (alpha {alpha:g}), A {A} has {A[0]} rows; pass the "
            "config that belongs to these tensors, rank_pattern included"
        )
    return scaling_of(config, path)


def check_parts(
    name: str,
    keys: Mapping[str, Key],
    layers: Mapping[str, Layer],
    config: Mapping[str, Any] | None,
) -> None:
    """Magnitudes and biases must be what the config says and belong to a layer."""
    for part, field in ((MAGNITUDE, "use_dora"), (BIAS, "lora_bias")):
        own = [key for key, said in keys.items() if said.part == part]
        stray = [key for key in own if keys[key].path not in layers]
        if stray:
            raise InputValueError(f"{name}: no factors belong to {listed(stray)}")
        if config is not None and own and not config.get(field):
            raise InputValueError(
                f"{name}: {listed(own)} do not fit {field}={config.get(field)!r}; pass "
                "the config that belongs to these tensors"
            )
        if config is not None and part == MAGNITUDE and config.get(field):
            bare = sorted(set(layers) - {keys[key].path for key in own})
            if bare:
                raise InputValueError(
                    f"{name}: use_dora is set, but these layers have no magnitudes: "
                    f"{listed(bare)}; send lora_magnitude_vector too"
                )
