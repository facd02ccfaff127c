"""A hypothesis strategy of client updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from hetlora_agg.types import ClientUpdate

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def client_updates(
    *,
    clients: tuple[int, int] = (1, 5),
    max_rank: int = 5,
    max_features: int = 12,
    layers: tuple[int, ...] = (),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    equal_ranks: bool = False,
    common: str | None = None,
) -> SearchStrategy[list[ClientUpdate]]:
    """A hypothesis strategy of lists of valid `ClientUpdate`s that fit together.

    Shapes, ranks, a dtype and a seed are drawn; entries follow from the seed, so that examples
    shrink to small shapes. Weights and scalings vary over several orders of magnitude; now and
    then a client is zero, repeats another, or shares its A.

    Args:
        clients: fewest and most clients.
        max_rank: largest rank.
        max_features: largest out_features and in_features.
        layers: leading dimensions of all factors.
        dtypes: one is drawn for all clients.
        equal_ranks: one rank for all.
        common: "A" or "B" for clients that all have the leading slots of one such factor.

    Example:
        >>> from hypothesis import given
        >>> @given(client_updates(max_rank=3))
        ... def test_something(updates):
        ...     assert all(update.A.shape[-2] <= 3 for update in updates)
        >>> test_something()
    """
    from hypothesis import strategies as st

    @st.composite
    def draw_updates(draw: Any) -> list[ClientUpdate]:
        count = draw(st.integers(*clients))
        out, columns = (draw(st.integers(1, max_features)) for _ in range(2))
        rank = st.integers(1, max_rank)
        ranks = [draw(rank)] * count if equal_ranks else [draw(rank) for _ in range(count)]
        dtype = draw(st.sampled_from(list(dtypes)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
        special = [draw(st.sampled_from(["", "", "", "zero", "repeat", "shared"])) for _ in ranks]
        updates: list[ClientUpdate] = []
        for r, kind in zip(ranks, special, strict=True):
            A = torch.randn(*layers, r, columns, generator=generator, dtype=torch.float64)
            B = torch.randn(*layers, out, r, generator=generator, dtype=torch.float64)
            B = B * (kind != "zero")
            alike = [u for u in updates if u.A.shape[-2] == r]
            if kind in ("repeat", "shared") and alike:
                A, B = alike[-1].A, alike[-1].B if kind == "repeat" else B
            size = 10.0 ** draw(st.integers(-2, 2))
            weight, scaling = draw(st.integers(1, 5000)), 2.0 ** draw(st.integers(-3, 3))
            updates.append(ClientUpdate(A.to(dtype), (size * B).to(dtype), r, weight, scaling))
        widest = max(updates, key=lambda u: u.A.shape[-2])
        if common == "A":
            return [replace(u, A=widest.A[..., : u.rank, :]) for u in updates]
        if common == "B":
            return [replace(u, B=widest.B[..., : u.rank]) for u in updates]
        return updates

    return draw_updates()
