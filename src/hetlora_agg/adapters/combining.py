"""From adapters to results: layers in groups, whatever spans layers in one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hetlora_agg.adapters.adapter import Adapter
from hetlora_agg.adapters.extras import Extra, bad_extras, combine_extras, survey
from hetlora_agg.adapters.keys import MAGNITUDE, listed
from hetlora_agg.adapters.outcome import AggregatedAdapters
from hetlora_agg.checks import as_integer, as_list, as_number, check_choice
from hetlora_agg.errors import InputValueError
from hetlora_agg.layers import MISSING, aggregate_layers
from hetlora_agg.registry import Run, resolve
from hetlora_agg.types import AggregationResult

GROUP_BYTES = 64 << 20
"""All clients' factors of one group of layers side by side in float32; several copies of it live
while the group is aggregated."""

DORA = ("error", "mean")

DORA_NOTE = "DoRA: magnitudes are averaged apart from B @ A, which is no mean of the models"

Progress = Callable[[int, int], None]
Clients = Mapping[Hashable, Adapter]


def combine(
    adapters: Clients,
    weights: Any,
    method: str | Run,
    *,
    ranks: Any,
    missing: str,
    dora: str,
    progress: Progress | None,
    options: Mapping[str, Any],
) -> AggregatedAdapters:
    """Aggregates checked adapters; every wrong input is found before the first factor is read.

    Args:
        adapters: client's id -> adapter.
        weights: by position or by id; None is 1 for all.
        method: a name from ``METHODS`` or a function of ``Components``.
        ranks: what clients want back, by position or by id; None is what they sent.
        missing: what a client without a layer counts for.
        dora: what becomes of DoRA's magnitudes.
        progress: called with layers done and layers in all.
        options: those of `aggregate_layers` and of the method.
    """
    check_choice("missing", missing, MISSING)
    check_choice("dora", dora, DORA)
    weight = weights_of(weights, list(adapters))
    wanted = None if ranks is None else ranks_of(ranks, list(adapters))
    headers = check_headers(adapters, missing, dora)
    layers, extras = headers.layers, headers.extras
    notes = headers.notes + differences(a.config for a in adapters.values() if a.config is not None)
    options = {k: v.low_ranks() if isinstance(v, Adapter) else v for k, v in options.items()}
    policy = options.get("on_bad_client", "error")
    check_choice("on_bad_client", policy, ("drop", "error"))
    bad = bad_extras(extras, adapters)
    if bad and policy == "error":
        raise InputValueError(
            f"{next(iter(bad.values()))}; mend the client, or leave it out with "
            'on_bad_client="drop"'
        )
    # A client's verdict, or its weight, then depends on layers of other groups.
    spanning = resolve(method).statistic is not None or policy == "drop"
    spanning = spanning or (missing == "zero" and headers.lacking)
    taking = {client: adapter for client, adapter in adapters.items() if client not in bad}
    results = _results(
        [layers] if spanning else _groups(layers, adapters),
        taking, weight, method, missing, progress, options, len(layers),
    )  # fmt: skip
    excluded = {**bad, **{client: why for r in results.values() for client, why in r.excluded}}
    values = combine_extras(extras, adapters, weight, frozenset(excluded))
    _check_complete(extras, values)
    return AggregatedAdapters(
        results=results,
        clients=dict(adapters),
        extras={name: (extras[name], value) for name, value in values.items()},
        wanted=wanted,
        excluded=tuple(excluded.items()),
        notes=(*notes, *dict.fromkeys(note for r in results.values() for note in r.notes)),
    )


@dataclass(frozen=True, eq=False)
class Headers:
    """What adapters have in common, as their headers say.

    Attributes:
        layers: every layer, in the order in which they came.
        lacking: whether a client lacks one.
        notes: what is worth knowing.
        extras: tensors besides the factors.
    """

    layers: list[str]
    lacking: bool
    notes: tuple[str, ...]
    extras: dict[str, Extra]


def check_headers(adapters: Clients, missing: str, dora: str) -> Headers:
    """Adapters against each other; no tensor is read.

    Raises:
        InputTypeError, InputValueError: whose layer or tensor does not fit the others'.
    """
    layers = list(dict.fromkeys(layer for a in adapters.values() for layer in a.layers))
    lacking = _check_layers(layers, adapters, missing)
    return Headers(layers, lacking, _check_dora(adapters, dora), survey(adapters, missing))


def _results(
    groups: Sequence[list[str]] | Iterator[list[str]],
    adapters: Clients,
    weight: Mapping[Hashable, float],
    method: str | Run,
    missing: str,
    progress: Progress | None,
    options: Mapping[str, Any],
    total: int,
) -> dict[str, AggregationResult]:
    results: dict[str, AggregationResult] = {}
    for group in groups:
        updates = {
            layer: [
                adapter.update(layer, weight=weight[client], id=client)
                for client, adapter in adapters.items()
                if layer in adapter.layers
            ]
            for layer in group
        }
        results.update(aggregate_layers(updates, method, missing=missing, **options))
        if progress is not None:
            progress(len(results), total)
    return results


def _groups(layers: Sequence[str], adapters: Clients) -> Iterator[list[str]]:
    """Layers in their order, as many at a time as fit."""
    group: list[str] = []
    room = GROUP_BYTES
    for layer in layers:
        owners = [a.layers[layer] for a in adapters.values() if layer in a.layers]
        size = 4 * sum(owners[0].size) * sum(owner.rank for owner in owners)
        if group and size > room:
            yield group
            group, room = [], GROUP_BYTES
        group.append(layer)
        room -= size
    yield group


def _check_layers(layers: Sequence[str], adapters: Clients, missing: str) -> bool:
    """Equal sizes and kinds everywhere; whether a client lacks a layer."""
    lacking = False
    for layer in layers:
        shapes = {
            client: (a.layers[layer].in_shape, a.layers[layer].out_shape, a.layers[layer].embedding)
            for client, a in adapters.items()
            if layer in a.layers
        }
        usual, _ = Counter(shapes.values()).most_common(1)[0]
        for client, found in shapes.items():
            if found != usual:
                raise InputValueError(
                    f"{adapters[client].name}, layer {layer!r}: expected A (rank, *{usual[0]}) and "
                    f"B ({usual[1][0]}, rank, …) as the others have, got A (rank, *{found[0]}) and "
                    f"B ({found[1][0]}, rank, …)"
                    + "; one is an embedding's" * (found[2] != usual[2])
                    + "; all clients of a layer must share its base model"
                )
        absent = [client for client in adapters if client not in shapes]
        if absent and missing == "error":
            raise InputValueError(
                f"{adapters[absent[0]].name}: has no layer {layer!r}, which others have; say what "
                'that means with missing="zero" or missing="renormalise"'
            )
        lacking = lacking or bool(absent)
    return lacking


def _check_dora(adapters: Clients, dora: str) -> tuple[str, ...]:
    with_dora = [adapter.name for adapter in adapters.values() if adapter.dora]
    if not with_dora:
        return ()
    if dora == "error":
        raise InputValueError(
            f"{with_dora[0]}: is a DoRA adapter: its update is no B @ A alone, and no rule for its "
            'magnitudes is exact; take their weighted mean with dora="mean", or train plain LoRA'
        )
    if len(with_dora) < len(adapters):
        other = next(adapter.name for adapter in adapters.values() if not adapter.dora)
        raise InputValueError(
            f"{with_dora[0]} is a DoRA adapter, {other} is not; all clients must train the same"
        )
    return (DORA_NOTE,)


def differences(given: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Fields of the configs that are taken from the first client though others differ."""
    configs, notes = list(given), []
    for field in ("base_model_name_or_path", "task_type", "fan_in_fan_out"):
        found = list(dict.fromkeys(str(config.get(field)) for config in configs))
        if len(found) > 1:
            notes.append(f"{field} differs: {listed(found)}; the first client's is written")
    return tuple(notes)


def _check_complete(extras: Mapping[str, Extra], values: Mapping[str, Any]) -> None:
    """Nobody whose weight counts has some tensor: there is nothing to hand out."""
    lost = [name for name in extras if name not in values]
    if lost:
        kinds = {extras[name].key.part for name in lost}
        what = "magnitudes" if kinds == {MAGNITUDE} else "tensors"
        raise InputValueError(
            f"no client with a positive weight has these {what}: {listed(lost)}; give one weight"
        )


def weights_of(given: Any, clients: Sequence[Hashable]) -> dict[Hashable, float]:
    """Every client's weight, 1 where none is given."""
    if given is None:
        return dict.fromkeys(clients, 1.0)
    return {
        client: as_number(value, f"client {client!r}: weight", zero=True)
        for client, value in by_client(given, clients, "weights").items()
    }


def ranks_of(given: Any, clients: Sequence[Hashable]) -> dict[Hashable, int]:
    """The rank that every client wants back."""
    return {
        client: as_integer(value, f"client {client!r}: rank", at_least=1)
        for client, value in by_client(given, clients, "ranks").items()
    }


def by_client(given: Any, clients: Sequence[Hashable], what: str) -> dict[Hashable, Any]:
    """One value for each client, from a list in their order or a mapping by id."""
    if isinstance(given, Mapping):
        known = set(clients)
        odd = [client for client in clients if client not in given]
        unknown = [client for client in given if client not in known]
        if odd or unknown:
            raise InputValueError(
                f"{what}: expected one entry for each of {listed(clients)}"
                + (f", none for {listed(odd)}" if odd else "")
                + (f", got {listed(unknown)} besides" if unknown else "")
            )
        return {client: given[client] for client in clients}
    values = as_list(given, what)
    if len(values) != len(clients):
        raise InputValueError(
            f"{what}: expected one for each of {len(clients)} clients, got {len(values)}"
        )
    return dict(zip(clients, values, strict=True))
