"""The nouns: what a client sends and what comes back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.linalg import Certificate, as_dtype

BOTH = frozenset({"A", "B"})

EXPONENTS: Mapping[str | None, tuple[float, float]] = {
    None: (0.5, 0.5),
    "A": (0.0, 1.0),
    "B": (1.0, 0.0),
}
"""Unscaled factor -> the powers of the scaling that go into A and into B."""


@dataclass(frozen=True, eq=False, repr=False)
class ClientUpdate:
    """One client's LoRA update of one layer, or of a batch of equal layers.

    The matrix it stands for is ``scaling * B @ A``. Plain tuples ``(A, B)``, ``(A, B, rank)`` and
    ``(A, B, rank, weight)`` are accepted wherever a ``ClientUpdate`` is.

    Attributes:
        A: lora_A, ``(*layers, rank, in_features)``; torch tensor or numpy array, any float dtype.
        B: lora_B, ``(*layers, out_features, rank)``.
        rank: the client's rank; None reads it off ``A``. Smaller than A's rows is accepted when the
            trailing components are exactly zero (padding).
        weight: the client's weight, usually its number of examples; finite, >= 0. A client of
            weight 0 is validated and then counts as absent.
        scaling: PEFT's ``lora_alpha / r`` (rsLoRA: ``lora_alpha / sqrt(r)``); finite, > 0.
        slots: which slot each component fills, distinct integers from 0; None means ``0..rank-1``.
        id: anything hashable and sortable. With ids on every update results are bit-equal whatever
            the order of the clients.

    Example:
        >>> import torch
        >>> ClientUpdate(torch.ones(2, 3), torch.ones(4, 2), weight=120, id="phone-7").weight
        120
    """

    A: Any
    B: Any
    rank: int | None = None
    weight: float = 1.0
    scaling: float = 1.0
    slots: Sequence[int] | None = None
    id: Hashable | None = None

    def __repr__(self) -> str:
        """One line: shapes instead of tensors."""
        shapes = (
            f"{n} {tuple(getattr(X, 'shape', ()))}" for n, X in (("A", self.A), ("B", self.B))
        )
        rest = (("weight", self.weight, 1.0), ("scaling", self.scaling, 1.0), ("id", self.id, None))
        notes = (f"{name} {value!r}" for name, value, usual in rest if value != usual)
        return f"ClientUpdate({', '.join((*shapes, *notes))})"


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ``B @ A`` kept as its factors.

    Attributes:
        A: ``(*layers, rank, in_features)``. Numpy in, numpy out: arrays when the updates were.
        B: ``(*layers, out_features, rank)``.

    Example:
        >>> import torch
        >>> LowRank(torch.ones(1, 3), torch.ones(2, 1)).minus(LowRank(torch.ones(1, 3),
        ...     torch.ones(2, 1))).dense().abs().max().item()
        0.0
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        """Refuse factors that do not fit each other."""
        shapes = [tuple(getattr(X, "shape", ())) for X in (self.A, self.B)]
        (*layers_A, rows, _), (*layers_B, _, columns) = (
            shape if len(shape) >= 2 else (None, None, shape) for shape in shapes
        )
        if rows != columns or layers_A != layers_B or None in (rows, columns):
            raise InputValueError(
                "LowRank: expected A (*layers, rank, in_features) and B (*layers, out_features, "
                f"rank), got {shapes[0]} and {shapes[1]}"
            )

    @property
    def rank(self) -> int:
        """Number of components, the width of ``B``."""
        return int(self.B.shape[-1])

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return int(self.A.shape[-1])

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return int(self.B.shape[-2])

    @property
    def layers(self) -> tuple[int, ...]:
        """Leading dimensions, ``()`` for a single layer."""
        return tuple(self.B.shape[:-2])

    def dense(self) -> Tensor:
        """The matrix itself, ``(*layers, out_features, in_features)``; for small ones."""
        return self.B @ self.A

    def plus(self, other: LowRank) -> LowRank:
        """``self + other`` by putting the components side by side: exact, ranks add up."""
        return self._beside(other, 1)

    def minus(self, other: LowRank) -> LowRank:
        """``self - other`` by putting the components side by side: exact, ranks add up."""
        return self._beside(other, -1)

    def select(self, components: Sequence[int] | slice) -> LowRank:
        """The named components only, in the order given."""
        return LowRank(self.A[..., components, :], self.B[..., :, components])

    def _beside(self, other: LowRank, sign: int) -> LowRank:
        mine, theirs = self.torch(), other.torch()
        if mine.dense_shape != theirs.dense_shape:
            raise InputValueError(
                f"LowRank: expected the same (*layers, out_features, in_features), got "
                f"{mine.dense_shape} and {theirs.dense_shape}; combine results of the same layers"
            )
        both = LowRank(
            torch.cat([mine.A, theirs.A], dim=-2), torch.cat([mine.B, sign * theirs.B], dim=-1)
        )
        return both if isinstance(self.A, Tensor) else both.numpy()

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape ``dense()`` would have, without forming it."""
        return (*self.layers, self.out_features, self.in_features)

    def torch(self) -> LowRank:
        """The same factors as torch tensors; shares memory with numpy arrays."""
        if isinstance(self.A, Tensor) and isinstance(self.B, Tensor):
            return self
        A, B = (X if isinstance(X, Tensor) else from_numpy(X) for X in (self.A, self.B))
        return LowRank(A, B)

    def numpy(self) -> LowRank:
        """The same factors as numpy arrays."""
        return LowRank(self.A.numpy(force=True), self.B.numpy(force=True))  # type: ignore[arg-type]

    def to(self, like: Tensor) -> LowRank:
        """The same factors in the dtype and on the device of ``like``."""
        factors = self.torch()
        return LowRank(factors.A.to(like), factors.B.to(like))

    def __repr__(self) -> str:
        """One line: type, size, rank."""
        return f"{type(self).__name__}({'x'.join(map(str, self.dense_shape))}, rank {self.rank})"


@dataclass(frozen=True, eq=False, repr=False)
class Compressed(LowRank):
    """An ordered, balanced or one-sided SVD with what it left out: what ``compress`` returns.

    Attributes:
        singular_values: ``(*layers, rank)`` float64, descending; zero beyond a layer's own rank.
        ranks: components kept per layer, ``(*layers,)`` int64, when ``energy=`` chose them.
        certificate: how the SVD was taken and what was discarded.
    """

    singular_values: Tensor
    ranks: Tensor | None
    certificate: Certificate


@dataclass(frozen=True, eq=False, repr=False)
class AggregationResult:
    """What a method returns: the total update is ``factors + residual``, both in units of ΔW.

    Attributes:
        factors: the global low-rank factorization.
        singular_values: ``(*layers, rank)`` where the method took an SVD, else None.
        residual: what the server folds into the base weight besides, always factored; or None.
        nested: the leading r components are this method's rank-r answer, so `distribute` may slice;
            those of an unbiased draw are not.
        shared: which factors replace the client's own: both, for all but frozen-factor methods.
        dropped: slots left empty by a quorum, from 0; carried over where ``previous=`` was given.
        excluded: clients left out by ``on_bad_client="drop"``, as ``(client, reason)``.
        notes: what was accepted but is worth knowing, in words; usually empty.
        ranks: components kept per layer when ``energy=`` chose them, ``(*layers,)``, else None.
        certificate: driver, discarded tail and fallbacks of the SVD, where one was taken.
        slotted: slot j means one and the same component on every client, and the next round
            depends on it; False for methods that give the same whatever a client's gauge.
        unscaled: the factor that took no scaling in this round, or None.
        next_unscaled: the one that takes none in the next round, which `distribute` therefore hands
            out as it is. Another one only where clients train A and B in turns.
    """

    factors: LowRank
    singular_values: Tensor | None = None
    residual: LowRank | None = None
    nested: bool = True
    shared: frozenset[str] = field(default=BOTH)
    dropped: tuple[int, ...] = ()
    excluded: tuple[tuple[Hashable, str], ...] = ()
    notes: tuple[str, ...] = ()
    ranks: Tensor | None = None
    certificate: Certificate | None = None
    slotted: bool = True
    unscaled: str | None = None
    next_unscaled: str | None = None

    @property
    def A(self) -> Tensor:
        """``factors.A``, ``(*layers, rank, in_features)``."""
        return self.factors.A

    @property
    def B(self) -> Tensor:
        """``factors.B``, ``(*layers, out_features, rank)``."""
        return self.factors.B

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.factors.rank

    def total(self) -> LowRank:
        """``factors + residual``, the whole update."""
        return self.factors if self.residual is None else self.factors.plus(self.residual)

    def __repr__(self) -> str:
        """One line for notebooks and logs."""
        size = "x".join(map(str, self.factors.dense_shape))
        notes = [f"rank {self.rank}", "nested" if self.nested else "not nested"]
        if self.residual is not None:
            notes.append(f"residual of rank {self.residual.rank}")
        if self.dropped:
            notes.append(f"slots dropped: {len(self.dropped)}")
        if self.excluded:
            notes.append(f"clients excluded: {len(self.excluded)}")
        return f"AggregationResult({size}, {', '.join(notes)})"


def from_numpy(X: Any) -> Tensor:
    """The array as a tensor; shares its memory unless torch cannot take it as it is.

    Raises:
        InputTypeError: no array, or one of no dtype that torch has.
    """
    if not isinstance(X, np.ndarray):
        raise InputTypeError(f"expected a torch tensor or a numpy array, got {type(X).__name__}")
    # torch takes no negative or odd strides, no foreign byte order, and warns of read-only arrays.
    odd = any(stride < 0 or stride % X.itemsize for stride in X.strides)
    if odd or not X.flags.writeable or not X.dtype.isnative:
        X = np.array(X, dtype=X.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(X)
    except TypeError as error:
        raise InputTypeError(f"expected an array of numbers, got one of {X.dtype}") from error


def result_of(factors: LowRank, **fields: Any) -> AggregationResult:
    """An `AggregationResult`, with the singular values and cut of a `Compressed` carried along."""
    if isinstance(factors, Compressed):
        fields = {
            "singular_values": as_dtype(factors.singular_values, factors.A.dtype),
            "ranks": factors.ranks,
            "certificate": factors.certificate,
            **fields,
        }
    return AggregationResult(LowRank(factors.A, factors.B), **fields)
