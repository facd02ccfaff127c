"""A running aggregate as tensors and plain data, and back, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetlora_agg.adapters.keys import Key
from hetlora_agg.errors import InputValueError
from hetlora_agg.streaming.added import Added, Arrival
from hetlora_agg.streaming.arriving import Size, Updates
from hetlora_agg.streaming.besides import BesidesSum
from hetlora_agg.streaming.bounded import Bounded
from hetlora_agg.streaming.group import Group
from hetlora_agg.streaming.plan import Plan
from hetlora_agg.streaming.receipts import Form, Id, Receipt
from hetlora_agg.types import AggregationResult, ClientUpdate, LowRank

Tensors = dict[str, Tensor]


def encode_option(value: Any, name: str, tensors: Tensors) -> Any:
    """An option as plain data, its tensors put under its name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, torch.Generator):
        tensors[name] = value.get_state()
        return {"generator": name, "device": str(value.device)}
    if isinstance(value, AggregationResult):
        inner = encode_option(value.factors, name, tensors)
        return {"result": inner, "nested": value.nested, "slotted": value.slotted}
    if isinstance(value, LowRank):
        factors = value.torch()
        tensors[f"{name}/A"], tensors[f"{name}/B"] = factors.A, factors.B
        return {"low_rank": name}
    if isinstance(value, Mapping):
        return {"map": [[k, encode_option(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [encode_option(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
    raise InputValueError(
        f"save: option {name!r} is a {type(value).__name__}, which no file can hold; use an option "
        "that has a name"
    )


def decode_option(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode_option` was given."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "generator" in value:
        generator = torch.Generator(value["device"])
        generator.set_state(tensors[value["generator"]])
        return generator
    if "result" in value:
        factors = decode_option(value["result"], tensors)
        return AggregationResult(factors, nested=value["nested"], slotted=value["slotted"])
    if "low_rank" in value:
        name = value["low_rank"]
        return LowRank(tensors[f"{name}/A"], tensors[f"{name}/B"])
    if "map" in value:
        return {k: decode_option(v, tensors) for k, v in value["map"]}
    return [decode_option(v, tensors) for v in value["list"]]


def encode_receipts(receipts: Mapping[Id, Receipt], tensors: Tensors) -> None:
    """The receipts as JSON in a tensor: a file's header has no room for a million of them."""
    forms = list(dict.fromkeys(receipt.form for receipt in receipts.values()))
    index = {form: i for i, form in enumerate(forms)}
    rows = [
        [id, r.digest, r.weight, index[r.form], r.norms, r.excluded] for id, r in receipts.items()
    ]
    text = json.dumps([[[f.layers, f.ranks, f.slots, f.extras] for f in forms], rows])
    tensors["receipts"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def decode_receipts(tensors: Mapping[str, Tensor]) -> dict[Id, Receipt]:
    """What `encode_receipts` was given."""
    listed, rows = json.loads(bytes(tensors["receipts"].numpy()))
    forms = [
        Form(tuple(layers), tuple(ranks), tuple(map(tuple, slots)), tuple(extras))
        for layers, ranks, slots, extras in listed
    ]
    return {
        id: Receipt(digest, weight, forms[form], tuple(map(tuple, norms)), excluded)
        for id, digest, weight, form, norms, excluded in rows
    }


def encode_updates(kept: Mapping[Id, Updates], tensors: Tensors) -> list[Any]:
    """Clients that are kept whole."""
    rows = []
    for k, (id, updates) in enumerate(kept.items()):
        layers = []
        for i, (layer, u) in enumerate(updates.items()):
            tensors[f"kept/{k}/{i}/A"], tensors[f"kept/{k}/{i}/B"] = u.A, u.B
            layers.append([layer, u.rank, u.weight, u.scaling, u.slots])
        rows.append([id, layers])
    return rows


def decode_updates(
    rows: Sequence[Any], tensors: Mapping[str, Tensor], sizes: Mapping[str, Size]
) -> dict[Id, Updates]:
    """What `encode_updates` was given."""
    return {
        id: {
            layer: ClientUpdate(
                tensors[f"kept/{k}/{i}/A"].to(sizes[layer].device),
                tensors[f"kept/{k}/{i}/B"].to(sizes[layer].device),
                rank,
                weight,
                scaling,
                None if slots is None else tuple(slots),
                id,
            )
            for i, (layer, rank, weight, scaling, slots) in enumerate(layers)
        }
        for k, (id, layers) in enumerate(rows)
    }


def encode_besides(sums: Mapping[str, BesidesSum], tensors: Tensors) -> list[Any]:
    """Sums of what adapters hold besides factors; raw bytes, since not all are floats."""
    rows = []
    for i, (name, one) in enumerate(sums.items()):
        kind = None
        if one.value is not None:
            kind = str(one.value.dtype).removeprefix("torch.")
            tensors[f"besides/{i}"] = one.value.contiguous().reshape(-1).view(torch.uint8)
        dtype = None if one.dtype is None else str(one.dtype).removeprefix("torch.")
        key = [one.key.part, one.key.path, one.key.name, one.key.prefix, one.key.module]
        rows.append([name, key, one.shape, one.averaged, dtype, one.exponent, kind])
    return rows


def decode_besides(rows: Sequence[Any], tensors: Mapping[str, Tensor]) -> dict[str, BesidesSum]:
    """What `encode_besides` was given."""
    sums = {}
    for i, (name, key, shape, averaged, dtype, exponent, kind) in enumerate(rows):
        value = None
        if kind is not None:
            # Bytes of a file may lie anywhere; a wider dtype wants its own boundaries.
            value = tensors[f"besides/{i}"].clone().view(getattr(torch, kind)).reshape(shape)
        kept = None if dtype is None else getattr(torch, dtype)
        sums[name] = BesidesSum(Key(*key), tuple(shape), averaged, kept, exponent, value)
    return sums


def encode_size(size: Size) -> list[Any]:
    """A layer's size as plain data."""
    return [list(size.layers), size.out_features, size.in_features, str(size.device)]


def decode_size(row: Sequence[Any]) -> Size:
    """What `encode_size` was given."""
    layers, out, columns, device = row
    return Size(tuple(layers), out, columns, torch.device(device))


def encode_group(group: Group, name: str, tensors: Tensors) -> dict[str, Any]:
    """A group of sums, clients that wait for their product included."""
    added = group.added
    for part, P in added.products.items():
        if isinstance(P, Bounded):
            for key, X in (("A", P.A), ("B", P.B), ("tail", P.tail)):
                tensors[f"{name}/products/{part}/{key}"] = X
        else:
            tensors[f"{name}/products/{part}"] = P
    for kind in ("rows", "columns"):
        tensors.update({f"{name}/{kind}/{k}": X for k, X in getattr(added, kind).items()})
    tensors.update({f"{name}/sizes/{what}/{k}": X for (what, k), X in added.sizes.items()})
    for i, arrival in enumerate(added.waiting):
        for key, X in zip(("A", "B", "mass"), arrival.tensors, strict=True):
            tensors[f"{name}/waiting/{i}/{key}"] = X
    return {
        "names": group.names,
        "size": encode_size(group.size),
        "edges": added.edges,
        "most": added.most,
        "terms": added.terms,
        "exponent": added.exponent,
        "products": list(added.products),
        "keys": list(added.rows),
        "sizes": list(added.sizes),
        "waiting": [[a.slots, a.key] for a in added.waiting],
    }


def decode_group(
    row: Mapping[str, Any], name: str, plan: Plan, tensors: Mapping[str, Tensor]
) -> Group:
    """What `encode_group` was given."""
    size = decode_size(row["size"])

    def at(key: str) -> Tensor:
        return tensors[f"{name}/{key}"].to(size.device)

    def product(part: int) -> Tensor | Bounded:
        where = f"products/{part}"
        if row["most"] is None:
            return at(where)
        return Bounded(at(f"{where}/A"), at(f"{where}/B"), at(f"{where}/tail"))

    shape = (len(row["names"]), *size.layers, size.out_features, size.in_features)
    added = Added(
        plan,
        shape,
        tuple(row["edges"]),
        row["most"],
        {part: product(part) for part in row["products"]},
        {key: at(f"rows/{key}") for key in row["keys"]},
        {key: at(f"columns/{key}") for key in row["keys"]},
        {(what, k): at(f"sizes/{what}/{k}") for what, k in row["sizes"]},
        row["terms"],
        row["exponent"],
        [
            Arrival(
                at(f"waiting/{i}/A"), at(f"waiting/{i}/B"), at(f"waiting/{i}/mass"), tuple(own), key
            )
            for i, (own, key) in enumerate(row["waiting"])
        ],
    )
    return Group(tuple(row["names"]), size, added)
