"""Results from sums: the registered method itself, run on everybody who was added."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.layers import layer_state, layer_streams, stack_layers, take_apart
from hetlora_agg.running import ALONE, Batch, Others, folding_of, run
from hetlora_agg.streaming.alike import Summed, Sums, alike, totals_of
from hetlora_agg.streaming.asking import Question, ask
from hetlora_agg.streaming.shares import Shares
from hetlora_agg.types import AggregationResult, ClientUpdate


def results_of(
    sums: Sums, order: Sequence[str], others: Others = ALONE
) -> dict[str, AggregationResult]:
    """Layer -> the method's result, in the given order of layers; others may have further ones.

    Raises:
        InputValueError: whatever the method has against these clients.
    """
    read = {layer: [_nobody(sums, layer)] for layer in order}
    options = sums.options
    state = {k: layer_state(k, v, read) for k, v in options.items() if isinstance(v, Mapping)}
    streams = {
        k: layer_streams(v, read) for k, v in options.items() if isinstance(v, torch.Generator)
    }
    plain = {k: v for k, v in options.items() if k not in state and k not in streams}
    folding = folding_of(sums.entry, options)
    names: list[list[str]] = []
    batches: list[Batch] = []
    for some in alike(sums, state):
        for at in some.steps():
            layers = some.layers[at]
            own = {k: stack_layers([s[name] for name in layers]) for k, s in state.items()}
            drawn = {k: [g for name in layers for g in s[name]] for k, s in streams.items()}
            told = {k: some.told(k, value, at) for k, value in plain.items()}
            names.append(layers)
            batches.append(Batch(some.at(at, folding), {**told, **own, **drawn}))
    refused: dict[Hashable, str] = {id: r.excluded for id, r in sums.receipts.items() if r.excluded}
    results: dict[str, AggregationResult] = {}
    ran = run(sums.entry, batches, "error", refused, others)
    for layers, batch, result in zip(names, batches, ran, strict=True):
        assert isinstance(batch.intake, Summed)
        error = lost(batch.intake.c.sums, result)
        known = result.certificate
        if known is not None:
            result = replace(result, certificate=replace(known, rounding=known.rounding + error))
        apart = zip(layers, error, take_apart(result, len(layers)), strict=True)
        results.update({name: _noted(one, e, sums) for name, e, one in apart})
    return {layer: results[layer] for layer in order}


def bounds_of(sums: Sums, order: Sequence[str]) -> dict[str, Tensor]:
    """Layer -> bound on what adding up lost of the sum that the method combines."""
    bounds: dict[str, Tensor] = {}
    for some in alike(sums, {}):
        c = some.c
        squares = None if some.squares is None else some.squares.reshape(-1, len(c.ids))
        asked = Question(
            c.slots_by_client,
            c.weight.tolist(),
            None if squares is None else totals_of(sums, c.ids).sqrt().tolist(),
            c.ids,
        )
        _, heard = ask(sums.entry, sums.options, asked, squares)
        for at in some.steps():
            shares = some.at(at, folding_of(sums.entry, sums.options)).c.sums
            assert isinstance(shares, Shares)
            for verb, share in heard.shares.items():
                by_layer = share.dim() > 1
                own = share.reshape(*c.layers, -1)[at] if by_layer else share
                getattr(shares, verb)(own)
            bounds.update(zip(some.layers[at], lost(shares), strict=True))
    return {layer: bounds[layer] for layer in order}


def lost(shares: Any, result: AggregationResult | None = None) -> Tensor:
    """What was lost in the sums that a method asked for, ``(n, *layers)``."""
    assert isinstance(shares, Shares)
    error = torch.stack([e.expand(shares.lead) for e in shares.error.values()]).sum(0)
    return error if result is None else error.to(result.A.device)


def _noted(result: AggregationResult, error: Tensor, sums: Sums) -> AggregationResult:
    """The result, with a word on what truncating its sum lost."""
    if all(group.added.most is None for group in sums.groups):
        return result
    note = (
        "memory_limit=: the sum was truncated as clients came; its Frobenius distance from the "
        f"exact one is at most {float(error.max()):.3g}"
    )
    return replace(result, notes=(*result.notes, note))


def _nobody(sums: Sums, layer: str) -> ClientUpdate:
    """An update without components, for its sizes."""
    size = next(group.size for group in sums.groups if layer in group.names)
    kind = {"dtype": sums.dtypes[layer], "device": size.device}
    A = torch.zeros(*size.layers, 0, size.in_features, **kind)  # type: ignore[call-overload]
    B = torch.zeros(*size.layers, size.out_features, 0, **kind)  # type: ignore[call-overload]
    return ClientUpdate(A, B)
