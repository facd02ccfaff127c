"""A running aggregate of adapters as adapters again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from hetlora_agg.adapters import Adapter, AggregatedAdapters
from hetlora_agg.adapters.combining import DORA_NOTE, differences, ranks_of
from hetlora_agg.adapters.roll import Roll, one_of_each
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.streaming.answering import extras_of
from hetlora_agg.streaming.receipts import absent, checked_id
from hetlora_agg.streaming.running import RunningAggregate


def as_adapters(
    running: RunningAggregate,
    clients: Mapping[Any, Adapter],
    *,
    ranks: Any = None,
) -> AggregatedAdapters:
    """The result of a running aggregate of adapters, as `aggregate_adapters` returns it.

    Args:
        running: everybody was added to it as an `Adapter`.
        clients: id -> the adapter that was added; tensors are read only where a method leaves a
            client its own factor.
        ranks: the ranks that clients want back, in the order of ``clients`` or by id; None is what
            each sent.

    Returns:
        `AggregatedAdapters`: ``.adapter``, ``.client(id)``, ``.results``, ``.write(out)``.

    Raises:
        InputTypeError, InputValueError: whatever `RunningAggregate.result` has against these
            clients; an id that was added and is not among ``clients``, or the other way round.

    Cost: that of ``running.result()``.

    Example:
        >>> import torch
        >>> def sent(r):
        ...     factors = {"q.lora_A.weight": torch.ones(r, 3), "q.lora_B.weight": torch.ones(4, r)}
        ...     return Adapter.from_state_dict(factors, {"r": r, "lora_alpha": 8})
        >>> clients = {"phone": sent(1), "tablet": sent(2)}
        >>> running = RunningAggregate("flexlora")
        >>> all(running.add(adapter, id=id) for id, adapter in clients.items())
        True
        >>> as_adapters(running, clients).adapter
        Adapter(1 layers, ranks 2)
    """
    if not isinstance(running, RunningAggregate):
        raise InputTypeError(
            f"as_adapters: expected a RunningAggregate, got {type(running).__name__}"
        )
    if not isinstance(clients, Mapping) or not (
        isinstance(clients, Roll) or all(isinstance(a, Adapter) for a in clients.values())
    ):
        raise InputTypeError("as_adapters: clients: expected a mapping of ids to Adapters")
    if unknown := absent(running.receipts, clients):
        raise InputValueError(f"as_adapters: clients: no adapter of {unknown}, who were added")
    if unknown := absent(map(checked_id, clients), running.receipts):
        raise InputValueError(f"as_adapters: clients: never added: {unknown}")
    wanted = None if ranks is None else ranks_of(ranks, list(clients))
    return outcome_of(running, clients, wanted, one_of_each(clients))


def outcome_of(
    running: RunningAggregate,
    clients: Mapping[Hashable, Adapter],
    wanted: Mapping[Hashable, int] | None,
    kinds: Mapping[Hashable, Adapter],
    more: Iterable[str] = (),
) -> AggregatedAdapters:
    """The outcome, with notes on what the clients' configs differ in."""
    results = running.result()
    if not isinstance(results, dict) or not kinds:
        raise InputTypeError("as_adapters: the clients sent single updates, not adapters")
    extras = extras_of(running._settings, running._whole())
    order = dict.fromkeys(layer for own in kinds.values() for layer in own.layers)
    if unknown := [layer for layer in results if layer not in order]:
        raise InputValueError(f"as_adapters: no client has layer {unknown[0]!r}, which was added")
    configs = [own.config for own in kinds.values() if own.config is not None]
    told = clients.told.values() if isinstance(clients, Roll) else configs
    notes = (DORA_NOTE,) if any(own.dora for own in kinds.values()) else ()
    said = dict.fromkeys(note for r in results.values() for note in r.notes)
    excluded = {id: r.excluded for id, r in running.receipts.items() if r.excluded}
    return AggregatedAdapters(
        results={layer: results[layer] for layer in order if layer in results},
        clients=clients,
        extras=extras,
        wanted=wanted,
        excluded=tuple(excluded.items()),
        notes=(*notes, *differences(told), *more, *said),
    )
