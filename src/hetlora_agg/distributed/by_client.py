"""Clients spread over processes: every process adds its own to a running aggregate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch

from hetlora_agg.distributed.by_layer import gathered
from hetlora_agg.distributed.carrying import pack_state, unpack_state
from hetlora_agg.distributed.packing import pack, unpack
from hetlora_agg.distributed.sharing import shared_out
from hetlora_agg.distributed.together import Together, agree, together
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.streaming import Receipt, RunningAggregate
from hetlora_agg.streaming.answering import answer_by_layer
from hetlora_agg.streaming.arriving import ONE
from hetlora_agg.streaming.checkpoint import settings_as_data
from hetlora_agg.streaming.merging import merged
from hetlora_agg.streaming.receipts import Id
from hetlora_agg.streaming.saving import decode_receipts, encode_receipts
from hetlora_agg.streaming.settings import Settings
from hetlora_agg.streaming.state import State


def merge(running: RunningAggregate, *, group: Any = None) -> RunningAggregate:
    """One running aggregate of everybody's clients, on every process.

    Half of the processes that are left send theirs to the other half, until one has all, and that
    one's goes to everybody. Right for any state: clients kept whole, sums, truncated sums, and
    what adapters hold besides factors.

    Args:
        running: this process's, with the settings of everybody's; it stays as it is.
        group: a process group of ``torch.distributed``; None is everybody.

    Returns:
        A new one, the same on every process, as from `RunningAggregate.merge` in that tree.

    Raises:
        InputTypeError, InputValueError: as `RunningAggregate.merge`, on every process: other
            settings, a client in the sums of two processes, layers of other sizes.
        ProcessLostError: another process died or fell silent.

    Cost: ``log2 P`` states sent and merged one after the other, and one sent to everybody.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> running = RunningAggregate("flexlora")
        >>> added = running.add((torch.ones(1, 4), torch.ones(4, 1)), id="phone-1")
        >>> merge(running)
        RunningAggregate('flexlora', 1 clients, kept whole)
        >>> dist.destroy_process_group()

    Fidelity: OURS.
    """
    with together(group, "merge") as call:
        settings, state = _checked(call, running)
        return _with_state(settings, _merged(call, settings, state))


def result(running: RunningAggregate, *, group: Any = None) -> Any:
    """The method's result for everybody's clients, on every process.

    Every layer has one owner. Once all processes have sums, each sends every owner the sums of
    that owner's layers, the owner adds them up as they come and runs the method, and the results
    go to all. Of P processes each holds three P-th of a state beyond its own, then what the method
    takes for its layers. Clients that are kept whole, and what adapters hold besides factors, are
    merged as by `merge`, and every process computes.

    Args:
        running: this process's, with the settings of everybody's; it stays as it is. One without
            clients is right too.
        group: a process group of ``torch.distributed``; None is everybody.

    Returns:
        As `RunningAggregate.result` of all clients: layer name -> `AggregationResult`, or one
        result where clients sent one update; the same bits on every process, of sums always, of
        what every process computes for itself where their machines are alike.

    Raises:
        InputTypeError, InputValueError: as `RunningAggregate.merge` and `RunningAggregate.result`,
            on every process.
        ProcessLostError: another process died or fell silent.

    Cost: a state sent and received once per process, the method on every layer once.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> running = RunningAggregate("flexlora")
        >>> added = running.add((torch.ones(1, 4), torch.ones(4, 1)), id="phone-1")
        >>> result(running).singular_values
        tensor([4.])
        >>> dist.destroy_process_group()

    Fidelity: OURS.
    """
    with together(group, "result") as call:
        settings, state = _checked(call, running)
        heard = call.hear("states", _outline(settings, state))
        sums = [one for one in heard if one["clients"]]
        alike = {(one["summed"], one["most"], one["apart"]) for one in sums}
        if len(alike) == 1 and alike.pop()[::2] == (True, True):
            return _of_sums(call, settings, state, heard)
        return _with_state(settings, _merged(call, settings, state)).result()


def receipts(running: RunningAggregate, *, group: Any = None) -> dict[Id, Receipt]:
    """Who was added on any process, by id, on every process.

    After a restart it tells whom nobody has to send again; who is added twice, on two processes,
    is an error of `merge` and `result`.

    Args:
        running: this process's.
        group: a process group of ``torch.distributed``; None is everybody.

    Returns:
        Id -> `Receipt`, those of process 0 first.

    Raises:
        InputTypeError, InputValueError: other settings than on the other processes.
        ProcessLostError: another process died or fell silent.

    Cost: every receipt goes to every process, some 150 bytes each.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> running = RunningAggregate("flexlora")
        >>> added = running.add((torch.ones(1, 4), torch.ones(4, 1)), id="phone-1")
        >>> list(receipts(running))
        ['phone-1']
        >>> dist.destroy_process_group()

    Fidelity: OURS.
    """
    with together(group, "receipts") as call:
        _, state = _checked(call, running)
        tensors: dict[str, torch.Tensor] = {}
        encode_receipts(state.receipts, tensors)
        heard = call.exchange("receipts", pack(tensors, None))
        return {id: r for one in heard for id, r in decode_receipts(unpack(one)[0]).items()}


def _checked(call: Together, running: Any) -> tuple[Settings, State]:
    """Settings that are everybody's, and a state that is whole."""
    if not isinstance(running, RunningAggregate):
        raise InputTypeError(
            f"{call.what}: expected a RunningAggregate, got {type(running).__name__}"
        )
    settings, state = running._settings, running._whole()
    told = settings_as_data(settings)
    agree(call, "settings", {key: repr(value) for key, value in told.items()})
    return settings, state


def _with_state(settings: Settings, state: State) -> RunningAggregate:
    running = RunningAggregate._of(settings)
    running._state = state
    return running


def _merged(call: Together, settings: Settings, state: State) -> State:
    """Everybody's states as one, by a binomial tree and back; a copy on every process."""
    rank, size = call.peers.rank, call.peers.size
    # A copy, since merging adds in place.
    own = unpack_state(pack_state(state), settings)
    step = 1
    while step < size:
        sends = rank % (2 * step) == step
        takes = rank % (2 * step) == 0 and rank + step < size
        sent = (pack_state(own), rank - step) if sends else None
        came = call.pass_on(f"merging over {step}", sent, rank + step if takes else None)
        if came is not None:
            merged(settings, own, unpack_state(came, settings))()
        step *= 2
    whole = pack_state(own) if rank == 0 else torch.empty(0, dtype=torch.uint8)
    return unpack_state(call.exchange("the whole", whole)[0], settings)


def _outline(settings: Settings, state: State) -> dict[str, Any]:
    """What has to be known of everybody's state before sums are sent."""
    generators = any(isinstance(v, torch.Generator) for v in settings.options.values())
    return {
        "clients": len(state.receipts),
        "summed": state.kept is None,
        "most": state.most,
        # A generator draws in the order of all layers, and what adapters hold besides has no owner.
        "apart": not generators and not state.besides,
        "sizes": [
            [name, prod(size.layers) * size.out_features * size.in_features]
            for name, size in state.sizes.items()
        ],
    }


def _of_sums(call: Together, settings: Settings, state: State, heard: list[dict[str, Any]]) -> Any:
    """Each layer's sums to its owner, results from there to all."""
    costs = {name: cost for one in heard for name, cost in one["sizes"]}
    for rank, one in enumerate(heard):
        odd = sorted(set(costs) - {name for name, _ in one["sizes"]})
        if one["sizes"] and odd and settings.missing == "error":
            raise InputValueError(
                f"result: process {call.peers.name(rank)} lacks layer {odd[0]!r}; say what that "
                'means with missing="zero" or missing="renormalise"'
            )
    rank, size = call.peers.rank, call.peers.size
    owners = shared_out(list(costs), list(costs.values()), size)
    # A copy, since merging adds in place.
    whole = unpack_state(pack_state(_sliced(state, owners[rank])), settings)
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        sent = pack_state(_sliced(state, owners[to])), to
        came = call.pass_on(f"sums over {step}", sent, source)
        assert came is not None
        del sent
        merged(settings, whole, unpack_state(came, settings))()
        del came
    results = gathered(call, answer_by_layer(settings, whole, call))
    return results[ONE] if whole.one_layer else {layer: results[layer] for layer in costs}


def _sliced(state: State, layers: Iterable[str]) -> State:
    """The same clients and their sums over some layers; memory is shared."""
    chosen = {name: None for name in layers if name in state.sizes}

    def of(held: Mapping[str, Any]) -> dict[str, Any]:
        return {name: held[name] for name in held if name in chosen}

    groups = {}
    for size, group in state.groups.items():
        if names := [name for name in group.names if name in chosen]:
            groups[size] = group.widened(names)
    return replace(
        state,
        sizes=of(state.sizes),
        dtypes=of(state.dtypes),
        common=of(state.common),
        groups=groups,
    )
