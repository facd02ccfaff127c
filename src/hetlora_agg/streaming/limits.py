"""What a running aggregate takes in memory, known before it is allocated.

With ``D = out + in`` and 8 bytes a number, per layer:

* everybody kept: ``D · Σ r_k`` numbers in the clients' own dtype;
* sums of factors: ``D · n_slots`` numbers, times the ranks where denominators depend on them;
* sums of products: ``out · in`` numbers, times the parts that have a denominator of their own;
* truncated sums of rank m: ``D · m`` numbers per part;
* clients that wait for their product: ``D`` numbers for each of 64 components, or of m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod

from hetlora_agg.errors import InputValueError, MemoryLimitError
from hetlora_agg.registry import MethodEntry
from hetlora_agg.streaming.added import BUFFER
from hetlora_agg.streaming.arriving import Size, Updates
from hetlora_agg.streaming.plan import Plan
from hetlora_agg.streaming.receipts import Form, Id

NUMBER = 8
"""Bytes of a float64."""

LEAST = 2
"""A truncated state keeps at least this many times the largest client's rank."""


def edges_of(plan: Plan, levels: Sequence[int] | None, entry: MethodEntry) -> tuple[int, ...]:
    """First slots of the parts that have a denominator of their own.

    Raises:
        InputValueError: there are such parts and nobody said where.
    """
    if plan.parts == "all" or "stack" not in plan.verbs:
        return (0,)
    if levels is None:
        raise InputValueError(
            f"method {entry.name!r}: slots are divided by what their owners weigh, which nobody "
            "knows before the end. The clients so far were kept, and result() is right for them; "
            "for more, start with levels=, the ranks that clients may have, for one sum per level, "
            "or with roster= for a single one"
        )
    return (0, *sorted(set(levels))[:-1])


def check_parts(plan: Plan, levels: Sequence[int] | None, id: Id, form: Form) -> None:
    """A client owns each part whole or not at all, or its slots have no common denominator.

    Raises:
        InputValueError: a rank that is not one of the levels.
    """
    if levels is None or plan.parts == "all":
        return
    parts = [range(a, b) for a, b in pairwise((0, *sorted(set(levels))))]
    for layer, slots in zip(form.layers, form.slots, strict=True):
        owned = set(slots)
        if sum(len(part) for part in parts if owned.issuperset(part)) != len(owned):
            raise InputValueError(
                f"add: client {id!r}"
                + (f", layer {layer!r}" if layer else "")
                + f": {len(owned)} components that are not the slots up to one of the levels "
                f"{sorted(set(levels))}; add its rank to levels=, or give a roster="
            )


def bytes_of_sums(plan: Plan, sizes: Mapping[str, Size], parts: int, slots: int, ranks: int) -> int:
    """What float64 sums over these layers take."""
    total = 0
    for size in sizes.values():
        each = NUMBER * prod(size.layers)
        if "stack" in plan.verbs:
            total += each * parts * size.out_features * size.in_features
        if "average_factors" in plan.verbs:
            keys = ranks if plan.parts == "rank" else 1
            total += each * keys * slots * (size.out_features + size.in_features)
    return total


def truncated_rank(
    plan: Plan, sizes: Mapping[str, Size], parts: int, limit: int, largest: int
) -> int:
    """The largest rank at which truncated sums over these layers fit a limit of bytes.

    Raises:
        MemoryLimitError: it is below twice the largest client's, or only factors are summed.
    """
    if "average_factors" in plan.verbs:
        raise MemoryLimitError(
            f"memory_limit={limit:.3g}: sums of factors have no smaller form; raise the limit"
        )
    # Sums and clients that wait, with their masses; two bounds for every sum.
    each = (parts + 1) * _numbers(sizes)
    fixed = 2 * NUMBER * parts * sum(prod(size.layers) for size in sizes.values())
    rank = (limit - fixed) // each
    if rank < LEAST * largest:
        raise MemoryLimitError(
            f"memory_limit={limit:.3g}: truncated sums of rank {LEAST * largest}, twice the "
            f"largest client's, take {each * LEAST * largest + fixed} bytes; raise the limit"
        )
    return rank


def bytes_waiting(sizes: Mapping[str, Size]) -> int:
    """What clients that wait for their product take beside exact sums."""
    return BUFFER * _numbers(sizes)


def _numbers(sizes: Mapping[str, Size]) -> int:
    """Bytes of one component of every layer, and of its mass."""
    return sum(
        NUMBER * prod(size.layers) * (size.out_features + size.in_features + 1)
        for size in sizes.values()
    )


def bytes_of_updates(updates: Updates) -> int:
    """What one client's factors take as they were sent."""
    return sum(X.numel() * X.element_size() for u in updates.values() for X in (u.A, u.B))
