"""Layers spread over processes: every process has all clients' updates of its own layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch

from hetlora_agg.distributed.carrying import pack_results, unpack_results
from hetlora_agg.distributed.together import Together, agree, comparable, together
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.layers import aggregate_among
from hetlora_agg.registry import Run, resolve
from hetlora_agg.types import AggregationResult


def aggregate_layers(
    layers: Mapping[str, Iterable[Any]],
    method: str | Run = "rb",
    *,
    group: Any = None,
    missing: str = "error",
    max_group: int | None = None,
    workers: int | None = None,
    memory_limit: int | None = None,
    on_bad_client: str = "error",
    max_rank: int | Mapping[Hashable, int] | None = None,
    **options: Any,
) -> dict[str, AggregationResult]:
    """The results of this process's layers, as `aggregate_layers` gives for the whole model.

    All processes of the group call it together, each with layers of its own. What spans layers is
    agreed on: who lacks one, who is left out, and statistics of clients summed over all of them.

    Args:
        layers: layer name -> all clients' updates of it; an empty mapping where there are more
            processes than layers. `own` says which to take.
        method: as in `aggregate_layers`; the same on every process.
        group: a process group of ``torch.distributed``; None is everybody.
        missing: as in `aggregate_layers`, over all processes' layers.
        max_group: most layers in one batched call of this process.
        workers: layers that this process decomposes at a time.
        memory_limit: bytes that the call may allocate on this process.
        on_bad_client: "error", or "drop" to leave a client out of every layer of every process.
        max_rank: as in `aggregate_layers`.
        **options: the method's own, the same on every process; per-layer state needs entries for
            this process's layers alone.

    Returns:
        Layer name -> `AggregationResult`, this process's own, in the order given; `gather` gives
        everybody's.

    Raises:
        InputTypeError, InputValueError: as `aggregate_layers`, on every process, which one refuses
            among them; a layer on two processes; other options than on the others; a generator,
            which would draw in the order of all layers; ids that are neither string nor integer.
        ProcessLostError: another process died or fell silent.

    Cost: `aggregate_layers` of one's own layers; between processes K numbers for a statistic of
    clients, ``K²`` for rules that compare them.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> client = (torch.ones(2, 6), torch.ones(5, 2))
        >>> sorted(aggregate_layers({"q": [client, client], "v": [client, client]}))
        ['q', 'v']
        >>> dist.destroy_process_group()

    Fidelity: OURS.
    """
    with together(group, "aggregate_layers") as call:
        drawn = sorted(k for k, value in options.items() if isinstance(value, torch.Generator))
        if drawn:
            raise InputTypeError(
                f"{drawn[0]}=: a generator draws in the order of all layers, and no process has "
                "them all; aggregate on one process, or take an option that draws nothing"
            )
        # Per-layer state differs from process to process, all else must not.
        plain = {k: v for k, v in options.items() if not isinstance(v, Mapping)}
        told = {"method": resolve(method).name, "missing": missing, "on_bad_client": on_bad_client}
        agree(call, "options", {k: comparable(v) for k, v in {**plain, **told}.items()})
        return aggregate_among(
            call, layers, method, missing, max_group, workers, memory_limit, on_bad_client,
            max_rank, options,
        )  # fmt: skip


def gather(
    results: Mapping[str, AggregationResult], *, group: Any = None
) -> dict[str, AggregationResult]:
    """Everybody's results on every process.

    Args:
        results: this process's, by layer, as `aggregate_layers` of this module returns them.
        group: a process group of ``torch.distributed``; None is everybody.

    Returns:
        Layer name -> `AggregationResult`, those of process 0 first; the same bits on all.

    Raises:
        InputTypeError, InputValueError: no results by layer; a layer on two processes.
        ProcessLostError: another process died or fell silent.

    Cost: every result goes to every process once.

    Example:
        >>> import hetlora_agg, torch, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> client = (torch.ones(2, 6), torch.ones(5, 2))
        >>> gather({"q": hetlora_agg.aggregate([client, client])})
        {'q': AggregationResult(5x6, rank 2, nested)}
        >>> dist.destroy_process_group()

    Fidelity: OURS.
    """
    with together(group, "gather") as call:
        if not isinstance(results, Mapping):
            raise InputTypeError(f"gather: expected results by layer, got {type(results).__name__}")
        for layer, result in results.items():
            if not isinstance(layer, str) or not isinstance(result, AggregationResult):
                raise InputTypeError(
                    f"gather: expected an AggregationResult by layer, got {layer!r}: "
                    f"{type(result).__name__}"
                )
        return gathered(call, results)


def gathered(
    call: Together, results: Mapping[str, AggregationResult]
) -> dict[str, AggregationResult]:
    """Everybody's results, in the order of processes."""
    every = [unpack_results(one) for one in call.exchange("results", pack_results(results))]
    count = Counter(layer for one in every for layer in one)
    if twice := [layer for layer, times in count.items() if times > 1]:
        raise InputValueError(f"gather: layer {twice[0]!r} is on two processes; give it to one")
    return {layer: result for one in every for layer, result in one.items()}
