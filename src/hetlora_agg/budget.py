"""Budget: what an aggregation takes in memory, known before it starts.

With ``copy = (out + in) · R · itemsize``, R the components of all clients together, a call takes at
most::

    Σ_layers 4 copy  +  max over groups (layers in the group · 4 copy)  +  the SVD's working copies

What all clients sent, side by side, and results of up to three times that stay; while a group of
layers is read and combined, its stack, its folded copy in float64 and its shared copy come on top;
the SVD's own copies are `linalg.predicted_bytes`. Most methods stay well under it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from hetlora_agg.checks import as_integer
from hetlora_agg.errors import MemoryLimitError
from hetlora_agg.linalg import predicted_bytes
from hetlora_agg.types import ClientUpdate

KEPT_COPIES = 4
"""Copies of what the clients sent that live through the call, results of a method included."""

GROUP_COPIES = 4
"""Copies that live while one group of layers is read or combined."""


def check_resources(workers: int | None, memory_limit: int | None) -> None:
    """Refuse counts that are none."""
    if workers is not None:
        as_integer(workers, "workers=", at_least=1)
    if memory_limit is not None:
        as_integer(memory_limit, "memory_limit=", at_least=1)


class Budget(NamedTuple):
    """Most layers per batched call, and bytes that are left for its SVD; None is no limit."""

    max_group: int | None
    for_svd: int | None


def budget(
    memory_limit: int | None,
    layers: Mapping[Any, Sequence[ClientUpdate]],
    max_group: int | None,
    workspace: Callable[[int, int, Sequence[int]], int] | None = None,
) -> Budget:
    """How to keep a call within ``memory_limit`` bytes.

    ``workspace`` is what the method says it needs per layer (`MethodEntry.workspace`).

    Raises:
        MemoryLimitError: not even one layer at a time fits.
    """
    if memory_limit is None:
        return Budget(max_group, None)
    memory_limit = int(memory_limit)
    copies = {layer: copy_bytes(updates) for layer, updates in layers.items()}
    kept = KEPT_COPIES * sum(copies.values())
    largest = max(copies, key=lambda layer: copies[layer])
    solving = max(_solving_bytes(updates) for updates in layers.values())
    # At least a byte: clients that are left out have no components, and then nothing is copied.
    each = max(
        1,
        *(
            GROUP_COPIES * copies[layer] + _method_bytes(updates, workspace)
            for layer, updates in layers.items()
        ),
    )
    room = (memory_limit - kept - solving) // each
    if room < 1:
        needed = kept + solving + each
        at = "" if largest is None else f" (the largest is {largest!r})"
        raise MemoryLimitError(
            f"memory_limit={memory_limit:.3g}: {len(layers)} layers{at} need {needed:.3g} bytes: "
            f"{kept:.3g} for the clients' factors and the results, "
            f"{each:.3g} for one layer at a time and {solving:.3g} for its SVD; raise the limit or "
            "pass fewer layers per call"
        )
    group = min(room, max_group or len(layers), len(layers))
    # The SVD's result, at most one copy of the group, is the last of the group's copies.
    return Budget(group, memory_limit - kept - group * (each - copies[largest]))


def copy_bytes(updates: Sequence[ClientUpdate]) -> int:
    """Bytes of all clients' factors of one entry side by side, in the compute dtype."""
    first = updates[0]
    rows = sum(u.A.shape[-2] for u in updates)
    layers = prod(map(int, first.A.shape[:-2]))
    both = first.B.shape[-2] + first.A.shape[-1]
    return int(layers * both * rows * _dtype(updates).itemsize)


def _method_bytes(
    updates: Sequence[ClientUpdate],
    workspace: Callable[[int, int, Sequence[int]], int] | None,
) -> int:
    """What the method itself needs for one entry."""
    if workspace is None:
        return 0
    first = updates[0]
    layers = prod(map(int, first.A.shape[:-2]))
    ranks = [u.A.shape[-2] for u in updates]
    return layers * workspace(first.B.shape[-2], first.A.shape[-1], ranks)


def _solving_bytes(updates: Sequence[ClientUpdate]) -> int:
    """Working copies of the SVD of one layer."""
    first = updates[0]
    rows = sum(u.A.shape[-2] for u in updates)
    return predicted_bytes(
        first.B.shape[-2],
        first.A.shape[-1],
        max(1, rows),
        dtype=_dtype(updates),
        workers=1,
        device_type=first.A.device.type,
    )


def _dtype(updates: Sequence[ClientUpdate]) -> torch.dtype:
    """What the updates are computed in."""
    exact = any(X.dtype == torch.float64 for u in updates for X in (u.A, u.B))
    return torch.float64 if exact else torch.float32
