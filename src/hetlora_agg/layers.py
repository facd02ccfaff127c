"""``aggregate_layers``: whole models. The only place that knows layers by name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

import hetlora_agg.methods  # noqa: F401  (enters every method in METHODS)
from hetlora_agg.budget import budget, check_resources
from hetlora_agg.checks import as_integer, as_state, check_choice
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.intake import collect, name_of
from hetlora_agg.linalg import limited
from hetlora_agg.registry import Run, check_options, resolve
from hetlora_agg.running import ALONE, Batch, Others, folding_of, run, to_numpy
from hetlora_agg.types import AggregationResult, ClientUpdate, LowRank
from hetlora_agg.validation import admit, id_order

Layers = dict[str, list[ClientUpdate]]

MISSING = ("error", "renormalise", "zero")


def aggregate_layers(
    layers: Mapping[str, Iterable[Any]],
    method: str | Run = "rb",
    *,
    missing: str = "error",
    max_group: int | None = None,
    workers: int | None = None,
    memory_limit: int | None = None,
    on_bad_client: str = "error",
    max_rank: int | Mapping[Hashable, int] | None = None,
    **options: Any,
) -> dict[str, AggregationResult]:
    """Aggregates every layer of a model, layers of equal signature in one batched call.

    A client is one client in every layer: weights that depend on its data are computed over all
    its layers, and a client that is dropped is dropped from all of them.

    Args:
        layers: layer name -> that layer's updates, as `aggregate` takes them.
        method: a name from ``METHODS``, or a function ``Components -> AggregationResult``.
        missing: what a client counts for in a layer it did not send. "error"; "zero": its update
            there is zero and its weight counts; "renormalise": it is absent there and the others
            make up the whole. Anything but "error" needs ids on all updates.
        max_group: most layers in one batched call; None is one call per group, or as many as
            ``memory_limit`` has room for.
        workers: layers decomposed at a time on a CPU, each with its share of torch's threads; None
            is one per thread, fewer for little work.
        memory_limit: bytes that the call may allocate, results included; see `budget`.
        on_bad_client: "error", or "drop" to leave out of every layer who has NaN, Inf or products
            beyond the compute dtype, or what ``max_rank`` refuses, in one of them; listed with the
            reason in ``.excluded``.
        max_rank: refuse clients that declare more or fill a slot beyond it, one number or one by
            client id; a client that is not in the mapping is refused too.
        **options: the method's own; per-layer state, such as ``previous=``, is a mapping by layer
            name (last round's return value will do). From a ``generator=`` every layer gets a
            stream of its own, in the order of the mapping.

    Returns:
        Layer name -> `AggregationResult`, in the order given.

    Raises:
        InputTypeError, InputValueError: what is wrong, with which client and layer.
        MemoryLimitError: ``memory_limit`` is too small for one layer at a time.
        ConvergenceError: an SVD that no driver could take, or a result beyond its dtype.

    Cost: the method's, once per group of layers of equal signature, and one copy of the factors.

    Example:
        >>> import torch
        >>> client = (torch.ones(2, 6), torch.ones(5, 2))
        >>> sorted(aggregate_layers({"q": [client, client], "v": [client, client]}))
        ['q', 'v']
    """
    return aggregate_among(
        ALONE, layers, method, missing, max_group, workers, memory_limit, on_bad_client, max_rank,
        options,
    )  # fmt: skip


def aggregate_among(
    others: Others,
    layers: Mapping[str, Iterable[Any]],
    method: str | Run,
    missing: str,
    max_group: int | None,
    workers: int | None,
    memory_limit: int | None,
    on_bad_client: str,
    max_rank: int | Mapping[Hashable, int] | None,
    options: Mapping[str, Any],
) -> dict[str, AggregationResult]:
    """`aggregate_layers` of one's own layers of a model; others hold the rest, or nobody does."""
    entry = resolve(method)
    check_options(entry, options)
    if max_group is not None:
        max_group = as_integer(max_group, "max_group=", at_least=1)
    check_resources(workers, memory_limit)
    for name, value in options.items():
        if isinstance(value, (LowRank, AggregationResult)):
            raise InputTypeError(
                f"{name}=: expected a mapping by layer name, got one {type(value).__name__}"
            )
    read, numpy, refused = admit_layers(layers, missing, max_rank, on_bad_client, others)
    state = {k: layer_state(k, v, read) for k, v in options.items() if isinstance(v, Mapping)}
    streams = {
        k: layer_streams(v, read) for k, v in options.items() if isinstance(v, torch.Generator)
    }
    plain = {k: v for k, v in options.items() if k not in state and k not in streams}
    folding = folding_of(entry, options)
    max_group, for_svd = budget(memory_limit if read else None, read, max_group, entry.workspace)
    names: list[list[str]] = []
    batches: list[Batch] = []
    for group, stacked, own in _grouped(read, state, max_group):
        names.append(group)
        drawn = {k: [g for name in group for g in s[name]] for k, s in streams.items()}
        batches.append(Batch(collect(stacked, group, folding), {**plain, **own, **drawn}))
        # Or the last group's stack would be held through the whole call.
        del stacked
    results: dict[str, AggregationResult] = {}
    with limited(workers, for_svd):
        ran = run(entry, batches, on_bad_client, refused, others)
        for group, result in zip(names, ran, strict=True):
            results.update(zip(group, take_apart(result, len(group)), strict=True))
    return {name: to_numpy(results[name]) if numpy else results[name] for name in read}


def read_layers(layers: Mapping[str, Iterable[Any]], missing: str) -> tuple[Layers, bool]:
    """Every layer's checked updates, and whether all were numpy; see `admit_layers`."""
    return admit_layers(layers, missing)[:2]


def admit_layers(
    layers: Mapping[str, Iterable[Any]],
    missing: str,
    max_rank: int | Mapping[Hashable, int] | None = None,
    on_bad_client: str = "error",
    others: Others = ALONE,
) -> tuple[Layers, bool, dict[Hashable, str]]:
    """Every layer's checked updates under the policy for clients that lack one.

    Returns:
        Layer name -> updates (a client that counts as zero has rank 0); whether all were numpy; who
        is above ``max_rank`` in some layer, with the reason.
    """
    if not isinstance(layers, Mapping):
        raise InputTypeError(
            f"expected a mapping of layer names to updates, got {type(layers).__name__}; for one "
            "layer call aggregate"
        )
    every = [name for names in others.hear("layers", list(layers)) for name in names]
    if not every:
        raise InputValueError("no layers; pass at least one {name: updates}")
    if twice := [name for name, count in Counter(every).items() if count > 1]:
        raise InputValueError(f"layer {twice[0]!r} is on two processes; give it to one, see own()")
    checked = {
        name: admit(updates, name, max_rank, on_bad_client) for name, updates in layers.items()
    }
    read = {name: updates for name, (updates, _, _) in checked.items()}
    refused: dict[Hashable, str] = {}
    for _, _, above in checked.values():
        refused = {**above, **refused}
    numpy = all(others.hear("numpy", all(numpy for _, numpy, _ in checked.values())))
    return _complete(read, missing, others), numpy, refused


def _complete(layers: Layers, missing: str, others: Others) -> Layers:
    """Apply the policy for clients that lack a layer."""
    check_choice("missing", missing, MISSING)
    weights: dict[Hashable, set[float]] = {}
    for updates in layers.values():
        for k, update in enumerate(updates):
            weights.setdefault(name_of(k, update), set()).add(update.weight)
    own = [[name, sorted(found)] for name, found in weights.items()]
    weights = {}
    for told in others.hear("clients", own):
        for name, found in told:
            weights.setdefault(name, set()).update(found)
    completed: Layers = {}
    for layer, updates in layers.items():
        present = {name_of(k, u) for k, u in enumerate(updates)}
        absent = [name for name in weights if name not in present]
        if absent and any(u.id is None for u in updates):
            raise InputValueError(
                f"layer {layer!r}: {len(updates)} updates where other layers have {len(weights)}; "
                "give every update an id, to tell who is missing, and choose missing="
            )
        if not absent or missing == "renormalise":
            completed[layer] = updates
        elif missing == "error":
            raise InputValueError(
                f"layer {layer!r}: client {absent[0]!r} sent other layers but not this one; say "
                'what that means with missing="zero" or missing="renormalise"'
            )
        else:
            zeros = [_zero_update(updates[0], layer, name, weights[name]) for name in absent]
            completed[layer] = sorted([*updates, *zeros], key=id_order)
    return completed


def _zero_update(
    like: ClientUpdate, layer: str, name: Hashable, weights: set[float]
) -> ClientUpdate:
    """A client that counts in a layer but has no component there."""
    if len(weights) > 1:
        raise InputValueError(
            f"layer {layer!r}: client {name!r} lacks it and has different weights in other layers, "
            f"{sorted(weights)}; give it one weight"
        )
    (weight,) = weights
    return ClientUpdate(
        like.A[..., :0, :], like.B[..., :0], rank=0, weight=weight, slots=(), id=name
    )


def layer_state(option: str, given: Mapping[str, Any], layers: Layers) -> dict[str, LowRank]:
    """Per-layer state checked against the layers, results of an earlier round unwrapped."""
    state: dict[str, LowRank] = {}
    for layer, updates in layers.items():
        if layer not in given:
            raise InputValueError(
                f"{option}=: expected an entry for every layer, layer {layer!r} has none"
            )
        first = updates[0]
        shape = (*first.B.shape[:-1], first.A.shape[-1])
        state[layer] = as_state(given[layer], f"{option}=, layer {layer!r}", shape)
    return state


def layer_streams(generator: torch.Generator, layers: Layers) -> dict[str, list[torch.Generator]]:
    """Independent streams for every layer, one per matrix, seeded in the order of the layers.

    What a layer draws then depends on neither the grouping nor the layers after it.
    """
    children = {}
    for name, updates in layers.items():
        seeds = [
            int(torch.randint(2**62, (), generator=generator, device=generator.device))
            for _ in range(math.prod(updates[0].A.shape[:-2]))
        ]
        children[name] = [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]
    return children


def _grouped(
    layers: Layers, state: Mapping[str, Mapping[str, LowRank]], max_group: int | None
) -> Iterator[tuple[list[str], list[ClientUpdate], dict[str, LowRank]]]:
    """Layers of equal signature: their names, updates and state stacked on a new leading dim."""
    alike: dict[Any, list[str]] = {}
    for layer, updates in layers.items():
        kept = tuple((s[layer].rank, s[layer].A.dtype, s[layer].A.device) for s in state.values())
        alike.setdefault((*map(_signature, updates), kept), []).append(layer)
    for every in alike.values():
        size = max_group or len(every)
        for names in (every[i : i + size] for i in range(0, len(every), size)):
            columns = zip(*(layers[name] for name in names), strict=True)
            own = {k: stack_layers([s[name] for name in names]) for k, s in state.items()}
            yield names, [stack_layers(list(column)) for column in columns], own


def _signature(update: ClientUpdate) -> tuple[Any, ...]:
    A, B = update.A, update.B
    kinds = (A.shape, A.dtype, A.device, B.shape, B.dtype)
    return (*kinds, update.rank, update.weight, update.scaling, update.slots, update.id)


def stack_layers(items: list[Any]) -> Any:
    """The same client's, or the same state's, factors of several layers on a new leading dim."""
    # One layer needs no copy.
    join = torch.stack if len(items) > 1 else lambda one: one[0].unsqueeze(0)
    return replace(items[0], A=join([x.A for x in items]), B=join([x.B for x in items]))


def take_apart(result: AggregationResult, layers: int) -> list[AggregationResult]:
    """One result per layer, each trimmed to its own rank where energy chose it."""
    widths = [result.rank] * layers
    if result.ranks is not None:
        widths = result.ranks.reshape(layers, -1).amax(-1).tolist()
    return [_one_layer(result, i, width, layers) for i, width in enumerate(widths)]


def _one_layer(result: AggregationResult, i: int, width: int, layers: int) -> AggregationResult:
    S, ranks, rest = result.singular_values, result.ranks, result.residual
    known = result.certificate
    return replace(
        result,
        factors=LowRank(result.A[i, ..., :width, :], result.B[i, ..., :width]),
        singular_values=None if S is None else S[i, ..., :width],
        residual=None if rest is None else LowRank(rest.A[i], rest.B[i]),
        ranks=None if ranks is None else ranks[i],
        certificate=None if known is None else known.layer(i, layers),
    )
