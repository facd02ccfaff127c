"""What a running aggregate is told once, checked before the first client comes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hetlora_agg.adapters import Adapter
from hetlora_agg.checks import as_integer, as_list, check_choice
from hetlora_agg.layers import MISSING
from hetlora_agg.registry import MethodEntry, Run, check_options, resolve
from hetlora_agg.running import folding_of
from hetlora_agg.streaming.arriving import Door
from hetlora_agg.streaming.asking import Question, ask
from hetlora_agg.streaming.plan import Plan, check_streamable, plan_of
from hetlora_agg.streaming.receipts import Id
from hetlora_agg.streaming.roster import Roster
from hetlora_agg.types import AggregationResult, LowRank

DORA = ("error", "mean")
"""What becomes of DoRA's magnitudes."""

STALE = ("error", "skip")
"""What becomes of clients of another round."""


@dataclass(frozen=True, eq=False)
class Settings:
    """What stays as it is.

    Attributes:
        entry: the method.
        options: its own options.
        round: the number of the round, or None.
        levels: the ranks that clients may have, or None.
        missing: what a client counts for in a layer that it lacks.
        stale: what becomes of clients of another round.
        memory_limit: bytes of the state, or None.
        door: how clients are read.
        roster: who will come, or None.
        plan: how clients are added up.
        dora: what becomes of DoRA's magnitudes.
    """

    entry: MethodEntry
    options: Mapping[str, Any]
    round: int | None
    levels: Sequence[int] | None
    missing: str
    stale: str
    memory_limit: int | None
    door: Door
    roster: Roster | None
    plan: Plan
    dora: str = "error"


def settings_of(
    method: str | Run,
    round: int | None,
    roster: Iterable[Sequence[Any]] | None,
    levels: Sequence[int] | None,
    missing: str,
    stale: str,
    memory_limit: int | None,
    max_rank: int | Mapping[Hashable, int] | None,
    on_bad_client: str,
    given: Mapping[str, Any],
    dora: str = "error",
) -> Settings:
    """Everything checked, and the method asked what it needs of clients.

    Raises:
        InputTypeError, InputValueError: see `RunningAggregate`.
    """
    entry = resolve(method)
    options = {k: v.low_ranks() if isinstance(v, Adapter) else v for k, v in given.items()}
    if round is not None:
        round = as_integer(round, "round=", at_least=0)
    if "round" in entry.options:
        options["round"] = round
    if levels is not None:
        listed = as_list(levels, "levels=")
        levels = sorted({as_integer(level, "levels=", at_least=1) for level in listed})
        if "levels" in entry.options:
            options["levels"] = levels
    check_options(entry, options)
    check_streamable(entry, options)
    check_choice("missing", missing, MISSING)
    check_choice("stale", stale, STALE)
    check_choice("dora", dora, DORA)
    check_choice("on_bad_client", on_bad_client, ("drop", "error"))
    if memory_limit is not None:
        memory_limit = as_integer(memory_limit, "memory_limit=", at_least=1)
    known = None if roster is None else Roster.read(roster)
    plan = plan_of(entry, options, levels) if known is None else rostered(entry, options, known)
    door = Door(
        folding_of(entry, options),
        plan.align,
        plan.mass in ("norm", "layer norm"),
        max_rank,
        on_bad_client,
    )
    return Settings(
        entry, options, round, levels, missing, stale, memory_limit, door, known, plan, dora
    )


def rostered(entry: MethodEntry, options: Mapping[str, Any], roster: Roster) -> Plan:
    """The plan where every share is known: one sum, whatever the options.

    Raises:
        InputValueError: the shares depend on the updates themselves.
    """
    if entry.statistic is not None:
        return plan_of(entry, options, None)
    counting = [id for id, weight in roster.weights.items() if weight > 0]
    slots = [range(roster.announced(id)) for id in counting]
    weights = [roster.weights[id] for id in counting]
    _, heard = ask(entry, options, Question(slots, weights, ids=counting))
    return Plan(frozenset(heard.shares), "share", "all", heard.align, heard.common_factor)


def without_rows(settings: Settings, ids: Iterable[Id]) -> Settings:
    """The same settings, a roster without these clients."""
    if settings.roster is None:
        return settings
    return replace(settings, roster=Roster.read(settings.roster.without(ids)))


def state_options(settings: Settings, one_layer: bool, name: str) -> dict[str, Any]:
    """The method's options with its state by layer, where clients send one update."""
    return {
        k: {name: v} if one_layer and isinstance(v, (LowRank, AggregationResult)) else v
        for k, v in settings.options.items()
    }
