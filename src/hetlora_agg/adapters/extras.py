"""What an adapter holds besides factors: full-size tensors, biases, DoRA's magnitudes.

They are averaged with the clients' weights, ``Σ w_k x_k / Σ w_k``, in float64, a slab at a time;
tensors of the base model, which nobody trained, are handed on if they are equal everywhere.
A running aggregate adds them up by the same rule, client by client.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import frexp, fsum, ldexp, prod

import torch
from torch import Tensor

from hetlora_agg.adapters.adapter import Adapter
from hetlora_agg.adapters.keys import BASE, BIAS, MAGNITUDE, Key, listed
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.linalg import all_finite

SLAB = 1 << 22
"""Entries that are averaged at a time: 32 MB in float64, whatever the size of an embedding."""

HEADROOM = 20
"""Powers of two that masses stay below 1: a million of the largest float64 values add up."""


@dataclass(frozen=True)
class Extra:
    """One tensor besides the factors, over all clients.

    Attributes:
        key: what it is, from the first client that has it.
        owners: the clients that have it, and under which key.
        shape: its shape, equal on all of them.
        averaged: whether it was trained; otherwise it must be equal on all of them.
        absent_count: whether owners' weights are taken over all clients: those without it count as
            zero.
    """

    key: Key
    owners: Mapping[Hashable, str]
    shape: tuple[int, ...]
    averaged: bool
    absent_count: bool


def survey(adapters: Mapping[Hashable, Adapter], missing: str) -> dict[str, Extra]:
    """Every tensor besides the factors, shapes and presence checked; none is read.

    Raises:
        InputValueError: a client lacks one, under a policy that does not say what that means;
            shapes that differ; integers.
    """
    owners: dict[str, dict[Hashable, str]] = {}
    for client, adapter in adapters.items():
        for canonical, key in adapter.extras.items():
            owners.setdefault(canonical, {})[client] = key
    return {
        canonical: _extra(canonical, own, adapters, missing) for canonical, own in owners.items()
    }


def _extra(
    canonical: str,
    own: Mapping[Hashable, str],
    adapters: Mapping[Hashable, Adapter],
    missing: str,
) -> Extra:
    first, *others = own
    key = adapters[first].keys[own[first]]
    infos = {client: adapters[client].info(sent) for client, sent in own.items()}
    for client in others:
        if infos[client].shape != infos[first].shape:
            raise InputValueError(
                f"{adapters[client].name}: {canonical!r} has shape {infos[client].shape}, "
                f"{infos[first].shape} at {adapters[first].name}; all clients must have one size"
            )
    bare = [adapters[client].name for client in adapters if client not in own]
    layered = key.part in (BIAS, MAGNITUDE)
    if bare and key.part != BASE:
        _check_absent(canonical, bare, layered, missing)
    floats = all(info.dtype is not None for info in infos.values())
    if layered and not floats:
        raise InputTypeError(
            f"{adapters[first].name}: {canonical!r}: expected a float dtype; convert it"
        )
    averaged = key.part != BASE and floats
    zero = key.part == BIAS and missing == "zero"
    return Extra(key, own, infos[first].shape, averaged, absent_count=zero)


def _check_absent(canonical: str, bare: Sequence[str], layered: bool, missing: str) -> None:
    """What a client without the tensor counts for."""
    if missing == "error":
        raise InputValueError(
            f"{bare[0]}: has no {canonical!r}, which others have; say what that means with "
            'missing="renormalise"'
        )
    if missing == "zero" and not layered:
        raise InputValueError(
            f"{bare[0]}: has no {canonical!r}, a full-size tensor, and missing='zero' has no "
            "meaning for it: the base model's value is not known here; "
            'pass missing="renormalise"'
        )


def bad_extras(
    extras: Mapping[str, Extra], adapters: Mapping[Hashable, Adapter]
) -> dict[Hashable, str]:
    """Clients with NaN or Inf in a tensor that is to be averaged, and where."""
    bad: dict[Hashable, str] = {}
    for canonical, extra in extras.items():
        for client, key in extra.owners.items() if extra.averaged else ():
            if client not in bad and not _finite(adapters[client].tensor(key)):
                bad[client] = f"{adapters[client].name}: {canonical!r}: NaN or Inf entries"
    return bad


def _finite(X: Tensor) -> bool:
    return X.numel() == 0 or all_finite(X)


def combine_extras(
    extras: Mapping[str, Extra],
    adapters: Mapping[Hashable, Adapter],
    weights: Mapping[Hashable, float],
    left_out: frozenset[Hashable],
) -> dict[str, Tensor]:
    """The value of every tensor after the round, effective biases with the scaling in them.

    Args:
        extras: from `survey`.
        adapters: the clients'.
        weights: every client's weight.
        left_out: clients that were dropped.
    """
    exponent = exponent_of(w for client, w in weights.items() if client not in left_out)
    mass = {k: 0.0 if k in left_out else mass_of(w, exponent) for k, w in weights.items()}
    combined = {}
    for canonical, extra in extras.items():
        if not extra.averaged:
            combined[canonical] = _equal(canonical, extra, adapters)
            continue
        total = fsum(mass.values() if extra.absent_count else (mass[k] for k in extra.owners))
        owners = {client: key for client, key in extra.owners.items() if mass[client] > 0}
        if owners:
            combined[canonical] = _mean(extra, owners, adapters, mass, total)
    return combined


def exponent_of(weights: Iterable[float]) -> int:
    """The power of two that weights are taken relative to: neither 1e308 nor 5e-324 is lost."""
    return frexp(max(weights, default=0.0))[1] + HEADROOM


def mass_of(weight: float, exponent: int) -> float:
    """``weight / 2^exponent``; nothing is rounded above the least of float64."""
    return ldexp(weight, -exponent)


def weighed(X: Tensor, factor: float) -> Tensor:
    """``factor · X`` in float64 and memory of its own."""
    return X.to("cpu", torch.float64, copy=True).mul_(factor)


def factor_of(key: Key, adapter: Adapter) -> float:
    """What PEFT multiplies the tensor by: it adds ``scaling * (B A x + bias)``."""
    return adapter.scaling(key.path) if key.part == BIAS else 1.0


def _mean(
    extra: Extra,
    owners: Mapping[Hashable, str],
    adapters: Mapping[Hashable, Adapter],
    mass: Mapping[Hashable, float],
    total: float,
) -> Tensor:
    factor = {k: mass[k] * factor_of(extra.key, adapters[k]) for k in owners}
    kinds = (adapters[client].info(key).dtype for client, key in owners.items())
    dtype = reduce(torch.promote_types, (kind for kind in kinds if kind is not None))
    mean = torch.zeros(extra.shape, dtype=dtype, device="cpu")
    for rows in _slabs(extra.shape):
        slab = torch.zeros_like(mean if rows is None else mean[rows], dtype=torch.float64)
        # One order, whatever that of the clients: the same bits.
        for client in sorted(owners, key=str):
            slab += weighed(adapters[client].tensor(owners[client], rows), factor[client])
        mean[... if rows is None else rows] = (slab / total).to(dtype)
    return mean


def _slabs(shape: tuple[int, ...]) -> Iterator[slice | None]:
    """Rows that are averaged at a time; None for all of a tensor that has none."""
    if not shape:
        yield None
        return
    step = max(1, SLAB // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _equal(canonical: str, extra: Extra, adapters: Mapping[Hashable, Adapter]) -> Tensor:
    """A tensor of the base model: the same bits on all clients."""
    first, *others = extra.owners
    tensor = adapters[first].tensor(extra.owners[first])
    differ = [
        adapters[client].name
        for client in others
        if not torch.equal(adapters[client].tensor(extra.owners[client]), tensor)
    ]
    if differ:
        raise InputValueError(
            f"{canonical!r}: a tensor of the base model that is not what {adapters[first].name} "
            f"has at {listed(differ)}; clients must start from one base model, and what is trained "
            "in full belongs into modules_to_save"
        )
    return tensor
