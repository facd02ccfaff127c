"""Draw: random numbers from the caller's generator, the same for a layer alone or in a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.components import Components
from hetlora_agg.errors import InputTypeError, InputValueError

Generator = torch.Generator | Sequence[torch.Generator]
"""One for all layers, or one for each."""


def normal(c: Components, generator: Generator | None, *shape: int) -> Tensor:
    """Standard normal numbers, ``(*layers, *shape)`` float64 on the clients' device.

    Without a generator every layer has the same, from seed 0.
    """
    if generator is None:
        seeded = torch.Generator().manual_seed(0)
        drawn = torch.randn(*shape, generator=seeded, dtype=torch.float64, device="cpu")
        return drawn.to(c.A.device).expand(*c.layers, *shape)
    return _draw(c, generator, shape, torch.randn)


def uniform(c: Components, generator: Generator, *shape: int) -> Tensor:
    """Numbers from [0, 1), ``(*layers, *shape)`` float64 on the clients' device."""
    return _draw(c, generator, shape, torch.rand)


def _draw(
    c: Components, generator: Generator, shape: tuple[int, ...], kind: Callable[..., Tensor]
) -> Tensor:
    def one(source: Any, size: tuple[int, ...]) -> Tensor:
        if not isinstance(source, torch.Generator):
            raise InputTypeError(
                f"generator=: expected a torch.Generator, got {type(source).__name__}"
            )
        drawn = kind(*size, generator=source, dtype=torch.float64, device=source.device)
        return drawn.to(c.A.device)

    if isinstance(generator, torch.Generator) or not isinstance(generator, Sequence):
        return one(generator, (*c.layers, *shape))
    if len(generator) != math.prod(c.layers):
        raise InputValueError(
            f"generator=: expected one generator, or one for each of {math.prod(c.layers)} layers, "
            f"got {len(generator)}"
        )
    return torch.stack([one(source, shape) for source in generator]).reshape(*c.layers, *shape)
