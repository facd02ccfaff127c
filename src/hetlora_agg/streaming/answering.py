"""The answer so far: from everybody while they are kept, else from the sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetlora_agg.adapters.extras import Extra
from hetlora_agg.aggregate import aggregate
from hetlora_agg.errors import InputValueError
from hetlora_agg.layers import aggregate_layers
from hetlora_agg.running import ALONE, Others, to_numpy
from hetlora_agg.streaming.alike import Sums
from hetlora_agg.streaming.arriving import ONE
from hetlora_agg.streaming.besides import values_of
from hetlora_agg.streaming.receipts import absent
from hetlora_agg.streaming.settings import Settings, state_options
from hetlora_agg.streaming.state import State
from hetlora_agg.streaming.summing import bounds_of, results_of
from hetlora_agg.types import AggregationResult


def answer(settings: Settings, state: State) -> Any:
    """The method's result by layer, or for the one layer there is."""
    results = answer_by_layer(settings, state)
    return results[ONE] if state.one_layer else results


def answer_by_layer(
    settings: Settings, state: State, others: Others = ALONE
) -> dict[str, AggregationResult]:
    """The method's result by layer; others have the sums of further layers, or nobody has."""
    _check_complete(settings, state)
    if state.kept is not None:
        results = _of_everybody(settings, state)
    else:
        results = results_of(sums_of(settings, state), state.order, others)
    if state.numpy:
        results = {layer: to_numpy(result) for layer, result in results.items()}
    return results


def bound_of(settings: Settings, state: State) -> Any:
    """What adding up lost, by layer or for the one layer there is."""
    _check_complete(settings, state)
    if state.kept is not None:
        bounds = {
            layer: torch.zeros(size.layers, dtype=torch.float64)
            for layer, size in state.sizes.items()
        }
    else:
        bounds = bounds_of(sums_of(settings, state), state.order)
    return bounds[ONE] if state.one_layer else bounds


def extras_of(settings: Settings, state: State) -> dict[str, tuple[Extra, Tensor]]:
    """What adapters held besides factors, after the round."""
    _check_complete(settings, state)
    return values_of(state.besides, state.receipts, settings.missing)


def sums_of(settings: Settings, state: State) -> Sums:
    """The sums with everything that the method wants to know besides."""
    return Sums(
        settings.entry,
        state_options(settings, bool(state.one_layer), ONE),
        settings.plan,
        settings.missing,
        state.receipts,
        list(state.groups.values()),
        state.dtypes,
        {layer: rows for layer, (rows, _) in state.common.items()},
    )


def _of_everybody(settings: Settings, state: State) -> dict[str, Any]:
    """The one-shot call."""
    everybody = (state.kept or {}).values()
    door = settings.door
    same = {"on_bad_client": door.on_bad_client, "max_rank": door.max_rank, **settings.options}
    if state.one_layer:
        updates = [own[ONE] for own in everybody]
        return {ONE: aggregate(updates, settings.entry.run, **same)}
    layers = {layer: [own[layer] for own in everybody if layer in own] for layer in state.order}
    return aggregate_layers(layers, settings.entry.run, missing=settings.missing, **same)


def _check_complete(settings: Settings, state: State) -> None:
    """Somebody must have come, and with a roster everybody."""
    roster, receipts = settings.roster, state.receipts
    if roster is not None:
        there = {id: r for id, r in receipts.items() if r.counts}
        wanted = (id for id, weight in roster.weights.items() if weight > 0)
        if missing := absent(wanted, there):
            raise InputValueError(
                f"result: on the roster but not here: {missing}; every share was computed with "
                "them. Wait for them, or rebuild with the roster of those who came"
            )
    if not receipts:
        raise InputValueError("result: no client updates; add at least one")
