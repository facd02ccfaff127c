"""Settings and state of a running aggregate as a file has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.errors import InputValueError
from hetlora_agg.registry import METHODS
from hetlora_agg.streaming.arriving import Size
from hetlora_agg.streaming.files import NAMES
from hetlora_agg.streaming.receipts import digest_of_tensor
from hetlora_agg.streaming.saving import (
    Tensors,
    decode_besides,
    decode_group,
    decode_option,
    decode_receipts,
    decode_size,
    decode_updates,
    encode_besides,
    encode_group,
    encode_option,
    encode_receipts,
    encode_size,
    encode_updates,
)
from hetlora_agg.streaming.settings import Settings, settings_of
from hetlora_agg.streaming.state import State

DTYPES = {name: dtype for dtype, name in NAMES.items()}


def dump(settings: Settings, state: State) -> tuple[Tensors, dict[str, Any]]:
    """Tensors by name, and everything else as plain data."""
    tensors, data = dump_state(state)
    return tensors, {**data, "settings": _settings(settings, tensors)}


def dump_state(state: State) -> tuple[Tensors, dict[str, Any]]:
    """The same without the settings, for who has them."""
    tensors: Tensors = {}
    encode_receipts(state.receipts, tensors)
    for layer, (rows, filled) in state.common.items():
        tensors[f"common/{layer}"] = rows
        tensors[f"filled/{layer}"] = filled.to(torch.uint8)
    data = {
        "late": list(state.late.items()),
        "sizes": [[layer, encode_size(size)] for layer, size in state.sizes.items()],
        "dtypes": {layer: NAMES[dtype] for layer, dtype in state.dtypes.items()},
        "numpy": state.numpy,
        "one_layer": state.one_layer,
        "common": list(state.common),
        "accepted": sorted(state.accepted),
        "kept": None if state.kept is None else encode_updates(state.kept, tensors),
        "kept_bytes": state.kept_bytes,
        "most": state.most,
        "groups": [
            encode_group(group, f"group/{i}", tensors)
            for i, group in enumerate(state.groups.values())
        ],
        "besides": encode_besides(state.besides, tensors),
        "dora": state.dora,
    }
    return tensors, data


def restore(
    tensors: Mapping[str, Tensor], data: Mapping[str, Any], where: str
) -> tuple[Settings, State]:
    """What `dump` was given."""
    told = {k: decode_option(v, tensors) for k, v in data["settings"].items()}
    if told["method"] not in METHODS:
        raise InputValueError(
            f"{where}: of method {told['method']!r}, which is not registered here; import the "
            "module that registers it, then load"
        )
    own = {k: v for k, v in told.pop("options").items() if k not in ("round", "levels")}
    settings = settings_of(**told, given=own)
    return settings, restore_state(tensors, data, settings)


def restore_state(
    tensors: Mapping[str, Tensor], data: Mapping[str, Any], settings: Settings
) -> State:
    """What `dump_state` was given."""
    sizes: dict[str, Size] = {layer: decode_size(row) for layer, row in data["sizes"]}
    receipts = decode_receipts(tensors)
    kept = data["kept"]
    groups = [
        decode_group(row, f"group/{i}", settings.plan, tensors)
        for i, row in enumerate(data["groups"])
    ]
    return State(
        receipts=receipts,
        forms={r.form: r.form for r in receipts.values()},
        late=dict(data["late"]),
        sizes=sizes,
        dtypes={layer: DTYPES[name] for layer, name in data["dtypes"].items()},
        numpy=data["numpy"],
        one_layer=data["one_layer"],
        common={
            layer: (
                tensors[f"common/{layer}"].to(sizes[layer].device),
                tensors[f"filled/{layer}"].bool().to(sizes[layer].device),
            )
            for layer in data["common"]
        },
        accepted=set(map(tuple, data["accepted"])),
        kept=None if kept is None else decode_updates(kept, tensors, sizes),
        kept_bytes=data["kept_bytes"],
        most=data["most"],
        groups={group.size: group for group in groups},
        besides=decode_besides(data["besides"], tensors),
        dora=data["dora"],
    )


def settings_as_data(settings: Settings) -> dict[str, Any]:
    """The settings as plain data, tensors by their digests: two of them can be compared."""
    tensors: Tensors = {}
    told = _settings(settings, tensors)
    return {**told, "tensors": {name: digest_of_tensor(X) for name, X in tensors.items()}}


def differences(settings: Settings, other: Settings) -> list[str]:
    """What two aggregates were told differently."""
    mine, theirs = settings_as_data(settings), settings_as_data(other)
    odd = sorted(key for key in mine if mine[key] != theirs[key] and key != "tensors")
    return odd or ["tensors"] * (mine != theirs)


def check_same(settings: Settings, other: Settings) -> None:
    """Refuse to merge what was told something else."""
    if odd := differences(settings, other):
        raise InputValueError(
            f"merge: {', '.join(odd)} differ; only aggregates with the same settings add up"
        )


def _settings(settings: Settings, tensors: Tensors) -> dict[str, Any]:
    roster = settings.roster
    told = {
        "method": settings.entry.name,
        "round": settings.round,
        "roster": None if roster is None else roster.without(()),
        "levels": settings.levels,
        "missing": settings.missing,
        "stale": settings.stale,
        "memory_limit": settings.memory_limit,
        "max_rank": settings.door.max_rank,
        "on_bad_client": settings.door.on_bad_client,
        "dora": settings.dora,
        "options": dict(settings.options),
    }
    return {k: encode_option(v, f"settings/{k}", tensors) for k, v in told.items()}
