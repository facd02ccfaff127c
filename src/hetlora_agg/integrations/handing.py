"""State dicts as frameworks carry them: their factors, and a client's part of a global one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetlora_agg import AggregationResult, InputValueError, LowRank, distribute
from hetlora_agg.adapters import Adapter

Arrays = Mapping[str, Any]
"""A state dict of torch tensors or numpy arrays."""

DIVIDE = {"AB": None, "B": "A", "A": "B"}
"""Factors that the scaling is divided out of -> the one that takes none."""


@dataclass(frozen=True)
class Size:
    """A client's rank and scaling in one layer."""

    rank: int
    scaling: float


def leading(
    arrays: Arrays,
    like: Arrays,
    *,
    scaling: float | Callable[[int], float] | None = None,
    lora_alpha: float | None = None,
    divide: str = "AB",
) -> dict[str, Any]:
    """A global state dict at a client's own ranks, the client's scaling divided out.

    Rows of A whose column of B is zero add nothing whatever the scaling and stay as they are: a
    fresh adapter keeps its initial scale. Missing components are filled as `distribute` does.

    Args:
        arrays: the global state dict, tensors or numpy arrays.
        like: the client's own, whose A's tell its ranks.
        scaling: the client's ``lora_alpha / r``, or a function of r.
        lora_alpha: or its ``lora_alpha``; one of the two.
        divide: the factors to divide, from `Server.divide`.

    Raises:
        InputValueError: a layer that ``like`` lacks, or no scaling, or a wrong one.

    Example:
        >>> from torch import ones
        >>> whole = {"q.lora_A.weight": ones(8, 6), "q.lora_B.weight": ones(5, 8)}
        >>> own = {"q.lora_A.weight": ones(2, 6), "q.lora_B.weight": ones(5, 2)}
        >>> mine = leading(whole, own, lora_alpha=8)
        >>> mine["q.lora_A.weight"][:, 0], mine["q.lora_B.weight"][0]
        (tensor([0.5000, 0.5000]), tensor([0.5000, 0.5000]))
    """
    if divide not in DIVIDE:
        raise InputValueError(f"divide=: expected one of {sorted(DIVIDE)}, got {divide!r}")
    whole = read_factors(arrays, "the global state dict")
    own = read_factors(like, "like=")
    lacking = [layer for layer in whole.layers if layer not in own.layers]
    if lacking:
        raise InputValueError(
            f"like=: {len(lacking)} of {len(whole.layers)} layers are not in it, such as "
            f"{lacking[0]!r}; pass the client's own state dict"
        )
    return handed(arrays, sizes_of(own, scaling, lora_alpha), divide)


def read_factors(arrays: Arrays, name: str) -> Adapter:
    """The factors in a state dict, everything else left out."""
    factors = {key: X for key, X in arrays.items() if "lora_" in key}
    adapter = Adapter.from_state_dict(factors, scalings=1.0, name=name)
    if adapter.extras:
        raise InputValueError(
            f"{name}: {next(iter(adapter.extras))!r} belongs to DoRA or to lora_bias, and its mean "
            "is not the clients' mean; train plain LoRA"
        )
    return adapter


def sizes_of(
    adapter: Adapter, scaling: float | Callable[[int], float] | None, lora_alpha: float | None
) -> dict[str, Size]:
    """Every layer's rank, as sent, and scaling, as said."""
    if (scaling is None) == (lora_alpha is None):
        raise InputValueError(
            f"{adapter.name}: expected scaling or lora_alpha, got "
            f"{'both' if scaling is not None else 'neither'}; where ranks differ a forgotten "
            "lora_alpha / r weighs clients wrongly: say lora_alpha=, or scaling=1.0 if it is 1"
        )
    sizes = {}
    for layer in adapter.layers:
        rank = adapter.rank(layer)
        given = scaling if lora_alpha is None else lora_alpha / rank
        sizes[layer] = Size(rank, given(rank) if callable(given) else given)  # type: ignore[arg-type]
    return sizes


def low_ranks(arrays: Arrays | None) -> dict[str, LowRank] | None:
    """A global state dict as ``previous=`` takes it; None while it stands for no update."""
    if arrays is None:
        return None
    whole = read_factors(arrays, "the global state dict")
    factors = {layer: whole.factors(layer) for layer in whole.layers}
    return factors if any(bool(X.B.any()) for X in factors.values()) else None


def handed(arrays: Arrays, sizes: Mapping[str, Size], divide: str) -> dict[str, Any]:
    """The leading components at these sizes; everything else as it is."""
    whole = read_factors(arrays, "the global state dict")
    made: dict[str, Any] = dict(arrays)
    for layer, part in whole.layers.items():
        given, size = whole.factors(layer), sizes[layer]
        result = AggregationResult(given, next_unscaled=DIVIDE[divide])
        (own,) = distribute(result, [size.rank], [size.scaling])
        kept = min(size.rank, given.rank)
        fresh = (given.A != 0).any(-1) & (given.B == 0).all(-2)
        own.A[:kept] = torch.where(fresh[:kept, None], given.A[:kept], own.A[:kept])
        made.update(zip(part.keys, part.folded(own), strict=True))
    return sent_as(made, arrays)


def sent_as(made: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
    """Numpy arrays where they were sent."""
    numpy = all(isinstance(X, np.ndarray) for X in arrays.values())
    return {key: X.numpy() if numpy and isinstance(X, Tensor) else X for key, X in made.items()}


def require(framework: str, missing: ImportError | None) -> None:
    """Raise what kept a framework from being imported, with the extra that brings it."""
    if missing is not None:
        extra = framework.lower()
        raise ImportError(
            f"hetlora_agg.integrations.{extra} needs {framework}: expected it to be installed, do: "
            f'pip install "hetlora-agg[{extra}]"'
        ) from missing
