"""What adapters hold besides factors, added up beside them: ``Σ w_k x_k`` in float64.

Full-size tensors, biases and DoRA's magnitudes by the rule of `adapters.extras`: the same masses,
the same roundings; in the order of ids the same bits as all clients at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import fsum, prod
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.adapters import Adapter
from hetlora_agg.adapters.extras import Extra, exponent_of, factor_of, mass_of, weighed
from hetlora_agg.adapters.keys import BASE, BIAS, MAGNITUDE, Key, listed
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.linalg import all_finite
from hetlora_agg.streaming.added import Commit
from hetlora_agg.streaming.receipts import Id, Receipt

NUMBER = 8
"""Bytes of a float64."""


@dataclass(frozen=True, eq=False)
class Besides:
    """What one client sent besides its factors, by key as in files.

    Attributes:
        keys: what each key says.
        tensors: as sent.
        factors: what PEFT multiplies each by: a bias comes with its layer's scaling.
    """

    keys: Mapping[str, Key]
    tensors: Mapping[str, Tensor]
    factors: Mapping[str, float]

    @classmethod
    def of(cls, adapter: Adapter) -> Besides:
        """Everything of an adapter but its factors; read now."""
        keys = {name: adapter.keys[sent] for name, sent in adapter.extras.items()}
        return cls(
            keys,
            {name: adapter.tensor(sent).detach() for name, sent in adapter.extras.items()},
            {name: factor_of(key, adapter) for name, key in keys.items()},
        )

    @property
    def dora(self) -> bool:
        """Whether DoRA's magnitudes belong to it."""
        return any(key.part == MAGNITUDE for key in self.keys.values())

    def bad(self) -> str | None:
        """Where the first NaN or Inf is that would be averaged."""
        for name, X in self.tensors.items():
            if is_averaged(self.keys[name], X) and X.numel() and not all_finite(X):
                return f"{name!r}: NaN or Inf entries"
        return None


NOTHING = Besides({}, {}, {})


@dataclass(frozen=True, eq=False)
class BesidesSum:
    """One tensor over the clients so far.

    Attributes:
        key: what it is.
        shape: its shape, equal on all clients.
        averaged: whether it is averaged; otherwise it must be equal on all clients.
        dtype: of the result; None before a client that counts.
        exponent: masses are weights over ``2^exponent``; None before a client that counts.
        value: ``Σ m_k x_k`` in float64, or the tensor itself; None before a client that counts.
    """

    key: Key
    shape: tuple[int, ...]
    averaged: bool
    dtype: torch.dtype | None = None
    exponent: int | None = None
    value: Tensor | None = None

    @property
    def bytes(self) -> int:
        """What it takes, held already or not."""
        if self.value is not None:
            return self.value.numel() * self.value.element_size()
        return NUMBER * prod(self.shape)

    def plus(self, addend: Tensor, exponent: int, dtype: torch.dtype) -> tuple[BesidesSum, Commit]:
        """With a float64 tensor of its own memory added; the sum changes with the commit."""
        known = exponent if self.exponent is None else self.exponent
        top = max(known, exponent)
        mine, theirs = 2.0 ** (known - top), 2.0 ** (exponent - top)
        addend.mul_(theirs)
        if self.value is None:
            # A sum begins at zero, where -0 is lost.
            total, change = addend.add_(0.0), None
        else:
            total, change = self.value, addend
        new = replace(
            self,
            dtype=dtype if self.dtype is None else torch.promote_types(self.dtype, dtype),
            exponent=top,
            value=total,
        )

        def commit() -> None:
            if change is not None:
                total.mul_(mine).add_(change)

        return new, commit


Sums = dict[str, BesidesSum]


def is_averaged(key: Key, X: Tensor) -> bool:
    """Whether clients trained it; what belongs to the base model, or is no float, is no mean."""
    return key.part != BASE and X.dtype.is_floating_point and X.dtype.itemsize > 1


def check_dora(own: bool, before: bool | None, policy: str, at: str) -> None:
    """DoRA by policy, on all clients or on none.

    Raises:
        InputValueError: DoRA without a policy, or on some clients only.
    """
    if own and policy == "error":
        raise InputValueError(
            f"{at}: is a DoRA adapter: its update is no B @ A alone, and no rule for its "
            'magnitudes is exact; take their weighted mean with dora="mean", or train plain LoRA'
        )
    if before is not None and own != before:
        raise InputValueError(
            f"{at}: is {'a' if own else 'no'} DoRA adapter, unlike the clients before; all "
            "clients must train the same"
        )


def check_presence(own: Mapping[str, Key], sums: Mapping[str, Any], missing: str, at: str) -> None:
    """A tensor that some clients have and others lack, under the policy for that.

    Raises:
        InputValueError: the policy does not say what it means.
    """
    known = {name: one.key for name, one in sums.items()}
    for name in sorted(set(own) ^ set(known)):
        part = (own.get(name) or known[name]).part
        lacks = f"has no {name!r}, which others have" if name in known else (
            f"has {name!r}, which the clients before have not"
        )  # fmt: skip
        if part == BASE:
            continue
        if missing == "error":
            raise InputValueError(f'{at}: {lacks}; say what that means with missing="renormalise"')
        if missing == "zero" and part not in (BIAS, MAGNITUDE):
            raise InputValueError(
                f"{at}: {lacks}: a full-size tensor, for which missing='zero' has no meaning: the "
                'base model\'s value is not known here; pass missing="renormalise"'
            )


def taken_besides(sums: Sums, own: Besides, receipt: Receipt, at: str) -> tuple[Sums, list[Commit]]:
    """One client's tensors on their way into the sums; all that can fail is done.

    Raises:
        InputTypeError, InputValueError: other shapes or kinds than before; tensors of the base
            model that differ.
    """
    fresh, commits = dict(sums), []
    for name, X in own.tensors.items():
        key = own.keys[name]
        averaged = is_averaged(key, X)
        if key.part in (BIAS, MAGNITUDE) and not averaged:
            raise InputTypeError(f"{at}: {name!r}: expected a float dtype; convert it")
        one = fresh.get(name) or BesidesSum(key, tuple(X.shape), averaged)
        if one.shape != tuple(X.shape) or one.averaged != averaged:
            raise InputValueError(
                f"{at}: {name!r} has shape {tuple(X.shape)} in {X.dtype}, {one.shape} at the "
                "clients before; all clients must have one size"
            )
        if not averaged:
            one = replace(one, value=_equal(one, X, name, at))
        elif receipt.counts:
            exponent = exponent_of([receipt.weight])
            addend = weighed(X, mass_of(receipt.weight, exponent) * own.factors[name])
            one, commit = one.plus(addend, exponent, X.dtype)
            commits.append(commit)
        fresh[name] = one
    return fresh, commits


def joined_besides(sums: Sums, other: Sums, at: str) -> tuple[Sums, list[Commit]]:
    """Two sums as one; the other stays as it is.

    Raises:
        InputValueError: other shapes, or tensors of the base model that differ.
    """
    fresh, commits = dict(sums), []
    for name, theirs in other.items():
        mine = fresh.get(name) or replace(theirs, value=None, exponent=None, dtype=None)
        if (mine.shape, mine.averaged) != (theirs.shape, theirs.averaged):
            raise InputValueError(
                f"{at}: {name!r}: expected shape {mine.shape}, got {theirs.shape}; all clients "
                "must have one size"
            )
        if not mine.averaged and theirs.value is not None:
            mine = replace(mine, value=_equal(mine, theirs.value, name, at))
        elif theirs.value is not None and theirs.exponent is not None and theirs.dtype is not None:
            mine, commit = mine.plus(theirs.value.clone(), theirs.exponent, theirs.dtype)
            commits.append(commit)
        fresh[name] = mine
    return fresh, commits


def _equal(one: BesidesSum, X: Tensor, name: str, at: str) -> Tensor:
    """A tensor of the base model: the same bits on all clients."""
    known = one.value
    if known is None:
        return X.cpu().clone()
    if known.dtype != X.dtype or not torch.equal(known, X.cpu()):
        raise InputValueError(
            f"{at}: {name!r}: a tensor of the base model that is not what the clients before have; "
            "clients must start from one base model, and what is trained in full belongs into "
            "modules_to_save"
        )
    return known


def values_of(
    sums: Sums, receipts: Mapping[Id, Receipt], missing: str
) -> dict[str, tuple[Extra, Tensor]]:
    """Every tensor after the round, biases with the scaling in them.

    Raises:
        InputValueError: nobody who counts has some tensor.
    """
    if lost := [name for name, one in sums.items() if one.value is None]:
        raise InputValueError(
            f"no client with a positive weight has these tensors: {listed(lost)}; give one weight"
        )
    values = {}
    for name, one in sums.items():
        zero = one.key.part == BIAS and missing == "zero"
        extra = Extra(one.key, {}, one.shape, one.averaged, absent_count=zero)
        value = one.value
        assert value is not None
        if one.averaged:
            assert one.exponent is not None
            assert one.dtype is not None
            counting = (r for r in receipts.values() if r.counts)
            weights = [r.weight for r in counting if zero or name in r.form.extras]
            top = exponent_of(weights)
            total = fsum(mass_of(weight, top) for weight in weights)
            value = (value * 2.0 ** (one.exponent - top) / total).to(one.dtype)
        values[name] = (extra, value)
    return values


def bytes_of(sums: Sums) -> int:
    """What the sums take."""
    return sum(one.bytes for one in sums.values())
