"""``aggregate_adapters`` on folders and ``aggregate_state_dicts`` in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hetlora_agg.adapters.adapter import Adapter
from hetlora_agg.adapters.calling import name_of
from hetlora_agg.adapters.combining import by_client, combine
from hetlora_agg.adapters.files import read_adapter
from hetlora_agg.adapters.outcome import AggregatedAdapters
from hetlora_agg.checks import as_list, as_path
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.registry import Run, check_options, resolve

LAYER_OPTIONS = ("max_group", "workers", "memory_limit", "on_bad_client", "max_rank")
"""Options of `aggregate_layers` itself; all others are the method's."""


def aggregate_adapters(
    paths: Iterable[str | os.PathLike[str]] | Mapping[Hashable, str | os.PathLike[str]],
    weights: Sequence[float] | Mapping[Hashable, float] | None = None,
    method: str | Run = "rb",
    *,
    ranks: Sequence[int] | Mapping[Hashable, int] | None = None,
    missing: str = "error",
    dora: str = "error",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> AggregatedAdapters:
    """Aggregates PEFT adapters on disk, each with its own rank, alpha and patterns.

    Factors go layer by layer through `aggregate_layers`; ``modules_to_save``, biases and, by
    policy, DoRA's magnitudes are averaged with the same weights. Layers are read in groups, so that
    the clients' adapters never lie in memory together. All layers are read at once where one
    depends on all others: methods with a client statistic (``hetlora``, ``fedhl``),
    ``on_bad_client="drop"``, and ``missing="zero"`` with a client that lacks a layer.

    Args:
        paths: the clients' folders, whose names become their ids; or a mapping of ids to folders.
        weights: the clients' weights, usually their numbers of examples, in the same order or by
            id; None weighs all alike.
        method: a name from ``METHODS``, or a function ``Components -> AggregationResult``.
        ranks: the ranks that clients want back; None is what each sent, layer by layer. Above the
            result's rank, see the method's ``rank=``, components are filled as `distribute` does.
        missing: what a client counts for in a layer that it lacks: "error", "zero" or
            "renormalise", as in `aggregate_layers`.
        dora: "error" refuses DoRA adapters; "mean" averages their magnitudes apart.
        progress: called with (layers done, layers in all) after each group.
        **options: of the method, and ``workers``, ``memory_limit``, ``max_group``, ``max_rank``,
            ``on_bad_client``; ``previous=`` may be an `Adapter`, such as last round's global one.

    Returns:
        `AggregatedAdapters`: ``.adapter``, ``.client(id)``, ``.results``, ``.write(out)``,
        ``.write_clients(folder)``, ``.notes``.

    Raises:
        InputTypeError, InputValueError: what is wrong, with file, layer, found, expected, remedy.

    Cost: the method's. Memory: one group of layers, the global adapter, and full-size tensors.

    Example:
        >>> import tempfile, torch
        >>> from hetlora_agg.adapters import write_adapter
        >>> def saved(folder, r):
        ...     factors = {"q.lora_A.weight": torch.ones(r, 3), "q.lora_B.weight": torch.ones(4, r)}
        ...     config = {"r": r, "lora_alpha": 8}
        ...     return write_adapter(folder, Adapter.from_state_dict(factors, config))
        >>> with tempfile.TemporaryDirectory() as d:
        ...     paths = [saved(f"{d}/phone", 1), saved(f"{d}/tablet", 2)]
        ...     aggregate_adapters(paths, [500, 900]).write(f"{d}/global").name
        'global'
    """
    _check_options(method, options)
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise InputTypeError(
            f"paths: expected a list of folders or a mapping by id, got one path, {str(paths)!r}"
        )
    folders = _by_id(paths)
    adapters = {id: read_adapter(folder) for id, folder in folders.items()}
    return combine(
        adapters, weights, method,
        ranks=ranks, missing=missing, dora=dora, progress=progress, options=options,
    )  # fmt: skip


def aggregate_state_dicts(
    state_dicts: Iterable[Any] | Mapping[Hashable, Any],
    configs: Sequence[Any] | Mapping[Hashable, Any] | None = None,
    *,
    scalings: Sequence[Any] | Mapping[Hashable, Any] | None = None,
    weights: Sequence[float] | Mapping[Hashable, float] | None = None,
    method: str | Run = "rb",
    keys: Sequence[str] | None = None,
    ranks: Sequence[int] | Mapping[Hashable, int] | None = None,
    missing: str = "error",
    dora: str = "error",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> AggregatedAdapters:
    """Aggregates clients' state dicts in memory and gives each back in its own style.

    Args:
        state_dicts: one per client, or a mapping by id (without, ids are positions): torch tensors
            or numpy arrays by PEFT's keys, with an adapter's name or without; or lists of arrays
            with ``keys``.
        configs: every client's ``adapter_config`` as a dict or ``peft.LoraConfig``.
        scalings: instead of configs: every client's ``lora_alpha / r``, one number or one by layer.
            Full-size tensors then need keys that say ``modules_to_save``.
        weights: as in `aggregate_adapters`.
        method: as in `aggregate_adapters`.
        keys: the keys of lists, in their order.
        ranks: as in `aggregate_adapters`.
        missing: as in `aggregate_adapters`.
        dora: as in `aggregate_adapters`.
        progress: as in `aggregate_adapters`.
        **options: as in `aggregate_adapters`.

    Returns:
        `AggregatedAdapters`: ``.state_dicts()`` for the clients, ``.state_dict()`` the global one.

    Raises:
        InputTypeError, InputValueError: what is wrong, with client, key, found, expected, remedy.

    Cost: the method's, and one copy of what is handed out.

    Example:
        >>> import torch
        >>> def client(r):
        ...     return {"q.lora_A.weight": torch.ones(r, 3), "q.lora_B.weight": torch.ones(4, r)}
        >>> outcome = aggregate_state_dicts([client(1), client(2)], scalings=[8.0, 4.0])
        >>> [tuple(sd["q.lora_A.weight"].shape) for sd in outcome.state_dicts()]
        [(1, 3), (2, 3)]
    """
    _check_options(method, options)
    sent = _state_dicts(state_dicts)
    clients = list(sent)
    if configs is not None and (hasattr(configs, "to_dict") or _is_config(configs)):
        raise InputTypeError(
            "configs: expected one for each client, got a single config; ranks and alphas are each "
            "client's own: [config] * len(state_dicts) if they are all alike"
        )
    by_config = {} if configs is None else by_client(configs, clients, "configs")
    by_scaling = {} if scalings is None else by_client(scalings, clients, "scalings")
    adapters = {
        id: Adapter.from_state_dict(
            sent[id],
            by_config.get(id),
            scalings=by_scaling.get(id),
            keys=keys if not isinstance(sent[id], Mapping) else None,
            name=f"client {id!r}",
        )
        for id in clients
    }
    return combine(
        adapters, weights, method,
        ranks=ranks, missing=missing, dora=dora, progress=progress, options=options,
    )  # fmt: skip


def _check_options(method: str | Run, options: Mapping[str, Any]) -> None:
    """Refuse options that nobody has before any file is opened."""
    check_options(resolve(method), {k: v for k, v in options.items() if k not in LAYER_OPTIONS})


def _by_id(paths: Any) -> dict[Hashable, Path]:
    """Folders by client's id, none of them twice."""
    folders: dict[Hashable, Path]
    if isinstance(paths, Mapping):
        folders = {id: as_path(path, f"client {id!r}", "folder") for id, path in paths.items()}
    else:
        listed = [as_path(path, "paths", "folder") for path in as_list(paths, "paths")]
        folders = {}
        real: dict[str, Path] = {}
        for folder in listed:
            where = os.path.realpath(folder)
            if where in real:
                raise InputValueError(f"paths: {folder} is given twice; give every client once")
            real[where] = folder
            name = name_of(folder)
            if name in folders:
                raise InputValueError(
                    f"paths: {folders[name]} and {folder} are both called {name!r}; pass a mapping "
                    "of ids to folders: {'phone': …, 'tablet': …}"
                )
            folders[name] = folder
    if not folders:
        raise InputValueError("paths: no client adapters; pass at least one folder")
    seen: dict[str, Hashable] = {}
    for id, folder in folders.items():
        where = os.path.realpath(folder)
        if where in seen:
            raise InputValueError(
                f"paths: clients {seen[where]!r} and {id!r} have one folder, {folder}; give every "
                "client its own"
            )
        seen[where] = id
    return folders


def _state_dicts(given: Any) -> dict[Hashable, Any]:
    """State dicts by client's id; a single one is refused."""
    if isinstance(given, Mapping):
        if any(hasattr(value, "dtype") for value in given.values()):
            raise InputTypeError(
                "state_dicts: expected one for each client, got a single state dict; pass a list"
            )
        sent = dict(given)
    else:
        sent = dict(enumerate(as_list(given, "state_dicts")))
    if not sent:
        raise InputValueError("state_dicts: no clients; pass at least one state dict")
    return sent


def _is_config(configs: Any) -> bool:
    return isinstance(configs, Mapping) and "lora_alpha" in configs
