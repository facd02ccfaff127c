"""Results and running aggregates as buffers of bytes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hetlora_agg.distributed.packing import here, pack, unpack
from hetlora_agg.linalg import Certificate
from hetlora_agg.running import to_numpy
from hetlora_agg.streaming.checkpoint import dump_state, restore_state
from hetlora_agg.streaming.settings import Settings
from hetlora_agg.streaming.state import State
from hetlora_agg.types import AggregationResult, LowRank, from_numpy

PLAIN = ("nested", "slotted", "unscaled", "next_unscaled")
"""Fields of a result that JSON has as they are."""


def pack_results(results: Mapping[str, AggregationResult]) -> Tensor:
    """Results by layer as one buffer."""
    tensors: dict[str, Tensor] = {}
    data = [[layer, _encode(r, f"{i}", tensors)] for i, (layer, r) in enumerate(results.items())]
    return pack(tensors, data)


def unpack_results(buffer: Tensor) -> dict[str, AggregationResult]:
    """What `pack_results` was given, on this process's own card where it was on one."""
    tensors, data = unpack(buffer)
    return {layer: _decode(row, tensors) for layer, row in data}


def _encode(result: AggregationResult, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    known, rest = result.certificate, result.residual
    parts = {
        "A": result.A,
        "B": result.B,
        "S": result.singular_values,
        "ranks": result.ranks,
        **({} if rest is None else {"residual A": rest.A, "residual B": rest.B}),
        **({} if known is None else {f"known {k}": X for k, X in known.tensors().items()}),
    }
    there = {part: X for part, X in parts.items() if X is not None}
    read = {part: X if isinstance(X, Tensor) else from_numpy(X) for part, X in there.items()}
    tensors.update({f"{name} {part}": X for part, X in read.items()})
    return {
        **{field: getattr(result, field) for field in PLAIN},
        "parts": [[part, f"{name} {part}", str(X.device)] for part, X in read.items()],
        "shared": sorted(result.shared),
        "dropped": list(result.dropped),
        "excluded": [list(pair) for pair in result.excluded],
        "notes": list(result.notes),
        "known": None if known is None else [known.driver, [list(f) for f in known.fallbacks]],
        "numpy": not isinstance(result.A, Tensor),
    }


def _decode(row: dict[str, Any], tensors: Mapping[str, Tensor]) -> AggregationResult:
    parts = {part: tensors[name].to(here(device)) for part, name, device in row["parts"]}
    known = None
    if row["known"] is not None:
        driver, fallbacks = row["known"]
        own = {k.removeprefix("known "): X for k, X in parts.items() if k.startswith("known ")}
        known = Certificate(driver, fallbacks=tuple(map(tuple, fallbacks)), **own)
    rest = "residual A" in parts
    result = AggregationResult(
        LowRank(parts["A"], parts["B"]),
        parts.get("S"),
        LowRank(parts["residual A"], parts["residual B"]) if rest else None,
        shared=frozenset(row["shared"]),
        dropped=tuple(row["dropped"]),
        excluded=tuple((id, why) for id, why in row["excluded"]),
        notes=tuple(row["notes"]),
        ranks=parts.get("ranks"),
        certificate=known,
        **{field: row[field] for field in PLAIN},
    )
    return to_numpy(result) if row["numpy"] else result


def pack_state(state: State) -> Tensor:
    """What a running aggregate holds, as one buffer."""
    return pack(*dump_state(state))


def unpack_state(buffer: Tensor, settings: Settings) -> State:
    """What `pack_state` was given, in the buffer's memory, or on this process's own card."""
    tensors, data = unpack(buffer)
    return restore_state(tensors, at_home(data), settings)


def at_home(data: Any) -> Any:
    """What `dump_state` says of a state, every layer on this process's own card."""
    for size in [*(size for _, size in data["sizes"]), *(row["size"] for row in data["groups"])]:
        size[-1] = here(size[-1])
    return data
