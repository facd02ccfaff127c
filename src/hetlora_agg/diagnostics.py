"""``diagnose`` one result, ``compare`` several methods: how far from the exact mean, and why."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.aggregate import aggregate
from hetlora_agg.checks import as_list
from hetlora_agg.combining import stack
from hetlora_agg.components import Components
from hetlora_agg.errors import (
    InputTypeError,
    InputValueError,
    OptionValueError,
    unknown_name,
)
from hetlora_agg.intake import collect
from hetlora_agg.layers import aggregate_layers, read_layers
from hetlora_agg.linalg import component_inner_products, exact_arithmetic, product_norm, svd_product
from hetlora_agg.registry import METHODS, MethodEntry, Run, resolve
from hetlora_agg.reports import Comparison, LayerReport, Report, Row
from hetlora_agg.types import AggregationResult, ClientUpdate, LowRank
from hetlora_agg.validation import read_updates
from hetlora_agg.weighting import (
    client_share,
    client_squared_norms,
    examples,
    sum_over_layers,
)


def diagnose(
    updates: Iterable[Any] | Mapping[str, Iterable[Any]],
    result: AggregationResult | Mapping[str, AggregationResult],
    *,
    missing: str = "error",
) -> Report:
    """Measures a result against the updates it came from, without a dense matrix.

    The total ``factors + residual`` is judged. Leading dimensions are taken as one layer.

    Args:
        updates: what `aggregate` was given, or what `aggregate_layers` was given.
        result: what it returned.
        missing: the policy that `aggregate_layers` was given.

    Returns:
        A `Report`: relative distance from the exact mean ``Σ p_k ΔW_k``, energy kept, singular
        values, and per client its norm, its cosine to the result and its share ``p_k``.

    Raises:
        InputTypeError, InputValueError: bad updates, or a result that does not fit them.

    Cost: two QR decompositions of ``R + rank`` columns in float64 per layer.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> clients = [(torch.eye(2), torch.eye(2)), (torch.eye(2)[:1], torch.eye(2)[:, :1])]
        >>> diagnose(clients, aggregate(clients, "flora")).relative_distance
        0.0
    """
    if isinstance(updates, Mapping) and isinstance(result, Mapping):
        if set(updates) != set(result):
            odd = sorted(map(str, set(updates) ^ set(result)))
            raise InputValueError(f"diagnose: layers in one of updates and result only: {odd[:5]}")
        read, _ = read_layers(updates, missing)
        return Report(tuple(_layer_report(name, read[name], result[name]) for name in read))
    if isinstance(updates, Mapping) or isinstance(result, Mapping):
        raise InputTypeError(
            "diagnose: pass the updates and result of aggregate, or the mappings of updates and "
            "results of aggregate_layers, not one of each"
        )
    one, _ = read_updates(updates)
    return Report((_layer_report(None, one, result),))


def compare(
    updates: Iterable[Any] | Mapping[str, Iterable[Any]],
    methods: str | Sequence[str | Run] | None = None,
    *,
    missing: str = "error",
    on_bad_client: str = "error",
    workers: int | None = None,
    memory_limit: int | None = None,
    **options: Any,
) -> Comparison:
    """Runs several methods on the same updates and sets them side by side.

    Args:
        updates: as for `aggregate`, or a mapping as for `aggregate_layers`.
        methods: names or functions; None takes every method in ``METHODS``.
        missing: as for `aggregate_layers`.
        on_bad_client: as for `aggregate`.
        workers: as for `aggregate`.
        memory_limit: as for `aggregate`, for each method by itself.
        **options: each goes to the methods that have it.

    Returns:
        A `Comparison`, one row per method: rank, relative distance from the exact mean, energy
        kept, time, or why it was skipped (it needs state, or refuses these clients).

    Raises:
        InputTypeError: an option that none of the methods has.
        InputValueError: bad updates, or an option's value that is wrong for any clients.

    Example:
        >>> import torch
        >>> clients = [(torch.eye(2), torch.eye(2)), (torch.eye(2)[:1], torch.eye(2)[:, :1])]
        >>> [row.method for row in compare(clients, ["flora", "rb"]).rows]
        ['flora', 'rb']
    """
    if isinstance(methods, str):
        methods = [methods]
    entries = [
        resolve(m) for m in (sorted(METHODS) if methods is None else as_list(methods, "methods"))
    ]
    for name in options:
        if not any(name in entry.options for entry in entries):
            known = {option for entry in entries for option in entry.options}
            raise InputTypeError(unknown_name("option of any of these methods", name, known))
    doors: dict[str, Any] = {
        "on_bad_client": on_bad_client,
        "workers": workers,
        "memory_limit": memory_limit,
    }
    if isinstance(updates, Mapping):
        updates = {
            name: as_list(layer, f"layer {name!r}: updates") for name, layer in updates.items()
        }
        doors["missing"] = missing
        read_layers(updates, missing)
    else:
        updates = as_list(updates, "updates")
        read_updates(updates)
    rows = tuple(_row(entry, updates, doors, options) for entry in entries)
    # Of those that were tried: whoever lacks its state has not seen the updates.
    tried = [
        row for entry, row in zip(entries, rows, strict=True) if set(entry.needs) <= set(options)
    ]
    reasons = {row.skipped for row in tried}
    if len(tried) > 1 and len(reasons) == 1 and None not in reasons:
        # What every method refuses for one reason lies with the updates.
        raise InputValueError(tried[0].skipped)
    return Comparison(rows)


def _row(
    entry: MethodEntry, updates: Any, doors: Mapping[str, Any], options: Mapping[str, Any]
) -> Row:
    missing = [need for need in entry.needs if need not in options]
    if missing:
        return Row(entry.name, skipped=f"needs {', '.join(f'{need}=' for need in missing)}")
    own = {name: value for name, value in options.items() if name in entry.options}
    call = aggregate_layers if isinstance(updates, Mapping) else aggregate
    method: str | Run = entry.name if METHODS.get(entry.name) is entry else entry.run
    start = time.perf_counter()
    try:
        result = call(updates, method, **doors, **own)
    except OptionValueError:
        raise
    except InputValueError as error:
        # The method refuses these clients, which is an answer; a wrong option would not be.
        return Row(entry.name, skipped=str(error))
    seconds = time.perf_counter() - start
    report = diagnose(updates, result, missing=doors.get("missing", "error"))
    results = list(result.values()) if isinstance(result, Mapping) else [result]
    return Row(
        method=entry.name,
        rank=max(r.rank for r in results),
        relative_distance=report.relative_distance,
        energy_kept=report.energy_kept,
        nested=all(r.nested for r in results),
        seconds=seconds,
    )


def _layer_report(name: str | None, read: Sequence[ClientUpdate], result: Any) -> LayerReport:
    if not isinstance(result, AggregationResult):
        raise InputTypeError(
            f"diagnose: expected an AggregationResult, got {type(result).__name__}"
        )
    intake = collect(read)
    out = frozenset(client for client, _ in result.excluded)
    unexpected = [reason for client, reason in intake.bad.items() if client not in out]
    if unexpected:
        raise InputValueError(f"{unexpected[0]}; the result was not made from these updates")
    with exact_arithmetic(intake.A.device.type):
        c = intake.components(out)
        total = result.total().to(c.A)
        if total.dense_shape != (*c.layers, c.B.shape[-2], c.A.shape[-1]):
            raise InputValueError(
                f"diagnose: the result has shape {total.dense_shape}, the updates "
                f"{(*c.layers, c.B.shape[-2], c.A.shape[-1])}; it was not made from them"
            )
        return _measured(name, c, total, result)


def _measured(
    name: str | None, c: Components, total: LowRank, result: AggregationResult
) -> LayerReport:
    # In float64 from the updates themselves, so that exact methods show their rounding too.
    c = c.with_factors(c.A.double(), c.B.double())
    total = total.to(c.A)
    mean = stack(c, client_share(c, examples(c)))
    difference = total.minus(mean)
    norms = sum_over_layers(client_squared_norms(c), len(c.layers)).sqrt()
    inner = component_inner_products(c.B, c.A, total.B, total.A)
    owners = (torch.arange(len(c.ranks), device=inner.device)[:, None] == c.client).double()
    per_client = owners @ sum_over_layers(inner, len(c.layers))
    norm = product_norm(total.B, total.A)
    size = norms * norm.square().sum().sqrt()
    relative = c.weight / c.weight.max()
    if result.singular_values is None:
        S = svd_product(total.B, total.A).S
    else:
        S = _tensor(result.singular_values)
    return LayerReport(
        layer=name,
        clients=c.ids,
        ranks=c.ranks,
        rank=result.rank,
        distance=_size(product_norm(difference.B, difference.A)),
        mean_norm=_size(product_norm(mean.B, mean.A)),
        kept=_kept(result),
        singular_values=S.tolist(),
        client_norms=norms.tolist(),
        client_cosines=torch.where(size > 0, per_client / size, 0.0).tolist(),
        client_shares=(relative / relative.sum()).tolist(),
        fallbacks=() if result.certificate is None else result.certificate.fallbacks,
    )


def _kept(result: AggregationResult) -> tuple[float, float]:
    """Squared norm kept and squared norm of everything; equal where nothing was discarded."""
    if result.certificate is None or result.residual is not None:
        return 1.0, 1.0
    norm, tail = _tensor(result.certificate.norm), _tensor(result.certificate.tail)
    whole = float(norm.square().sum())
    # A draw of an unbiased reduction may be farther from the whole than its norm.
    return max(0.0, whole - float(tail.square().sum())), whole


def _tensor(X: Any) -> Tensor:
    """A tensor as it is, an array as one; whatever torch's default device is."""
    return X if isinstance(X, Tensor) else torch.as_tensor(X, device="cpu")


def _size(norms: Tensor) -> float:
    """Frobenius norm of all layers together."""
    return float(norms.square().sum().sqrt())
