"""From results to adapters: the global one, and every client's at its rank and scaling."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from hetlora_agg.adapters.adapter import Adapter
from hetlora_agg.adapters.config import resized
from hetlora_agg.adapters.extras import Extra
from hetlora_agg.adapters.keys import BIAS, FACTORS, Key
from hetlora_agg.adapters.tensors import in_memory
from hetlora_agg.clients import continue_from
from hetlora_agg.distribute import distribute
from hetlora_agg.errors import InputValueError
from hetlora_agg.linalg import all_finite
from hetlora_agg.types import BOTH, AggregationResult, LowRank

Results = Mapping[str, AggregationResult]
Extras = Mapping[str, tuple[Extra, Tensor]]


def global_adapter(
    clients: Mapping[Hashable, Adapter], factors: Mapping[str, LowRank], extras: Extras
) -> Adapter:
    """Factors in units of ΔW, and all other tensors, in the first client's style; scaling 1.

    Args:
        clients: the adapters sent.
        factors: layer -> factors.
        extras: the other tensors.
    """
    first, *_ = clients.values()
    style = next(said for said in first.keys.values() if said.part in FACTORS)
    tensors: dict[str, Tensor] = {}
    for path, low_rank in factors.items():
        layer = next(a.layers[path] for a in clients.values() if path in a.layers)
        pair = FACTORS[2:] if layer.embedding else FACTORS[:2]
        for part, X in zip(pair, layer.folded(low_rank), strict=True):
            tensors[Key(part, path).spelled(style.name, style.prefix)] = X
    for extra, value in extras.values():
        # Unnamed full-size tensors stay so: what has a name in memory was sent with one, which may
        # be all that says what it is.
        own = extra.key.name
        name = style.name if extra.key.module == "" else own and (style.name or own)
        tensors[extra.key.spelled(name, style.prefix)] = value
    config = _config(clients, {path: low_rank.rank for path, low_rank in factors.items()})
    scalings = 1.0 if config is None else None
    return first.styled(Adapter(in_memory(tensors, "global"), config, "global", scalings))


def residual_adapter(
    clients: Mapping[Hashable, Adapter], factors: Mapping[str, LowRank]
) -> Adapter:
    """What is to be merged into the base weights: factors only, of no task and no variant."""
    rest = global_adapter(clients, factors, {})
    if rest.config is not None:
        # A task type would make PEFT look for that task's head.
        rest.config.update(task_type=None, modules_to_save=None, bias="none")
    return rest


def _config(
    clients: Mapping[Hashable, Adapter], ranks: Mapping[str, int]
) -> dict[str, object] | None:
    """The first client's config for these ranks; what another one trained besides is added."""
    first, *_ = clients.values()
    configs = [adapter.config for adapter in clients.values() if adapter.config is not None]
    if first.config is None:
        return None
    config = resized(first.config, ranks, None, first.layers)
    for field in ("use_dora", "lora_bias"):
        config[field] = any(c.get(field) for c in configs)
    config["bias"] = next((c["bias"] for c in configs if c.get("bias", "none") != "none"), "none")
    modules = dict.fromkeys(m for c in configs for m in c.get("modules_to_save") or ())
    config["modules_to_save"] = list(modules) or None
    return config


def client_adapter(own: Adapter, results: Results, extras: Extras, wanted: int | None) -> Adapter:
    """A client's next adapter: its layers, its keys, its scaling, at its rank or the wanted one."""
    check_cut(own, results, wanted)
    tensors: dict[str, Tensor] = {}
    ranks = {path: wanted or layer.rank for path, layer in own.layers.items()}
    for path, layer in own.layers.items():
        factors = _handed(own, path, ranks[path], results[path])
        for key, X in zip(layer.keys, layer.folded(factors), strict=True):
            tensors[key] = _cast(X, own.info(key).dtype, own.name, key)
    for canonical, key in own.extras.items():
        extra, value = extras[canonical]
        # A bias is held with the scaling in it.
        divisor = own.scaling(extra.key.path) if extra.key.part == BIAS else 1.0
        tensors[key] = _cast(value / divisor if divisor != 1 else value, own.info(key).dtype,
                             own.name, key)  # fmt: skip
    config = own.config
    if config is not None and any(ranks[path] != layer.rank for path, layer in own.layers.items()):
        alphas = {path: own.scaling(path) * rank for path, rank in ranks.items()}
        config = resized(config, ranks, alphas, own.layers)
    return own.replaced(tensors, config)


def check_cut(own: Adapter, results: Results, wanted: int | None) -> None:
    """Refuse, with the remedy, results that are no answer at the client's rank."""
    for path, layer in own.layers.items():
        result = results[path]
        if result.residual is not None:
            raise InputValueError(
                f"{own.name}, layer {path!r}: the result has a residual, without which a client's "
                "adapter would not be the method's: write() puts it into 'residual' beside the "
                "global adapter; merge it into every client's base model, then hand out the global "
                "adapter, or distribute(result, ranks, scalings) of .results layer by layer"
            )
        rank = wanted or layer.rank
        if rank < result.rank and not result.nested:
            _handed(own, path, rank, result)
        if rank != layer.rank and result.shared != BOTH:
            (shared,) = result.shared
            raise InputValueError(
                f"{own.name}, layer {path!r}: rank {rank} is wanted, but the method shares only "
                f"lora_{shared} and leaves the client its own other factor of rank {layer.rank}; "
                "leave ranks= out"
            )


def _handed(own: Adapter, path: str, rank: int, result: AggregationResult) -> LowRank:
    """One layer at the client's rank and scaling; what the method does not share stays its own."""
    try:
        if result.shared != BOTH:
            return continue_from(result, own.factors(path), scaling=own.scaling(path))
        (factors,) = distribute(result, [rank], [own.scaling(path)])
    except InputValueError as error:
        raise InputValueError(f"{own.name}, layer {path!r}: {error}") from error
    return factors


def _cast(X: Tensor, dtype: torch.dtype | None, name: str, key: str) -> Tensor:
    """In the dtype that the client sent, which must hold it."""
    if dtype is None or X.dtype == dtype:
        return X
    cast = X.to(dtype)
    if not all_finite(cast):
        raise InputValueError(
            f"{name}: {key!r}: the new values are beyond {dtype}, the client's dtype; let it send "
            "a wider one"
        )
    return cast
