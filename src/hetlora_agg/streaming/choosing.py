"""Folders at once or one after the other, with a roster or without: told by their headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from hetlora_agg.adapters.combining import GROUP_BYTES
from hetlora_agg.adapters.roll import Roll
from hetlora_agg.errors import HetLoRAError, InputValueError
from hetlora_agg.registry import MethodEntry, Run
from hetlora_agg.streaming.arriving import Size
from hetlora_agg.streaming.limits import bytes_of_sums, bytes_waiting
from hetlora_agg.streaming.plan import check_streamable
from hetlora_agg.streaming.roster import Ranks
from hetlora_agg.streaming.running import RunningAggregate

WHOLE = 256 << 20
"""Bytes of clients' factors that are held at once without a thought."""

FLOAT = 4
"""Bytes of a float32, in which adapters are sent."""


def streams(
    entry: MethodEntry,
    options: Mapping[str, Any],
    told: Mapping[str, Any],
    roll: Roll,
) -> bool:
    """Whether folders are better added up than aggregated at once.

    At once all clients' factors of a group of layers lie side by side, or of all layers where a
    client's part depends on all of them. The sums take as much for any number of clients.
    """
    try:
        check_streamable(entry, options)
    except InputValueError:
        return False
    sizes, components = sizes_of(roll), components_of(roll)
    by_layer = [
        FLOAT * (size.out_features + size.in_features) * components[layer]
        for layer, size in sizes.items()
    ]
    lacking = any(set(own.layers) != set(sizes) for own in roll.kinds.values())
    spanning = entry.statistic is not None or told["on_bad_client"] == "drop"
    spanning = spanning or (told["missing"] == "zero" and lacking)
    whole = sum(by_layer) if spanning else max(max(by_layer), min(sum(by_layer), GROUP_BYTES))
    limit = told["memory_limit"]
    if whole <= (WHOLE if limit is None else min(WHOLE, limit)):
        return False
    if limit is not None:
        return True
    return sums_bytes(entry, options, told, roll) < whole


def sums_bytes(
    entry: MethodEntry, options: Mapping[str, Any], told: Mapping[str, Any], roll: Roll
) -> int:
    """What the sums over these folders would take."""
    roster = roster_of(roll) if takes_roster(entry.run, told, options) else None
    plan = RunningAggregate(entry.run, roster=roster, **told, **options)._settings.plan
    sizes = sizes_of(roll)
    every = {layer.rank for own in roll.kinds.values() for layer in own.layers.values()}
    needed = bytes_of_sums(plan, sizes, 1, max(every), len(every)) + bytes_waiting(sizes)
    components = components_of(roll)
    everybody = FLOAT * sum(
        (size.out_features + size.in_features) * components[layer] for layer, size in sizes.items()
    )
    # A running aggregate keeps everybody while that is less.
    return min(needed, everybody)


def takes_roster(method: str | Run, told: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether a client's part depends on who else comes, so that it must be known beforehand."""
    try:
        plan = RunningAggregate(method, **told, **options)._settings.plan
    except HetLoRAError:
        # With a roster it is asked again, and says what else is wrong.
        return True
    return plan.parts != "all" and "stack" in plan.verbs


def roster_of(roll: Roll) -> list[tuple[Hashable, Ranks, float]]:
    """Rank and weight of everybody who counts; one number where it is the same in all layers."""
    every = {layer for own in roll.kinds.values() for layer in own.layers}
    ranks: dict[bytes, Ranks] = {}
    for kind, own in roll.kinds.items():
        by_layer = {layer: own.rank(layer) for layer in own.layers}
        equal = set(by_layer.values())
        ranks[kind] = equal.pop() if len(equal) == 1 and set(by_layer) == every else by_layer
    there = ((id, row) for id, row in roll.rows.items() if id not in roll.excluded)
    return [(id, ranks[row.kind], row.weight) for id, row in there]


def sizes_of(roll: Roll) -> dict[str, Size]:
    """Layer -> its size."""
    return {
        name: Size((), *layer.size, torch.device("cpu"))
        for own in roll.kinds.values()
        for name, layer in own.layers.items()
    }


def components_of(roll: Roll) -> Counter[str]:
    """Layer -> the ranks of all clients together."""
    found: Counter[str] = Counter()
    for kind, count in Counter(row.kind for row in roll.rows.values()).items():
        for name, layer in roll.kinds[kind].layers.items():
            found[name] += count * layer.rank
    return found
