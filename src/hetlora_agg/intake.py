"""Collect: one layer's checked updates, or a batch of equal layers', as ``Components``."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from hetlora_agg.components import Components
from hetlora_agg.errors import ConvergenceError, InputTypeError, InputValueError
from hetlora_agg.linalg import all_finite, cast_error, component_peaks
from hetlora_agg.types import EXPONENTS, AggregationResult, ClientUpdate, LowRank, result_of
from hetlora_agg.validation import where


@dataclass(frozen=True)
class Folding:
    """Where the scaling goes.

    Attributes:
        unscaled: the factor that stays as sent; None folds the root of the scaling into both.
        common: the unscaled factor must be one and the same on all clients.
        method: who asks for it, for the error.
    """

    unscaled: str | None = None
    common: bool = False
    method: str = ""


SYMMETRIC = Folding()


@dataclass(frozen=True, eq=False)
class Intake:
    """Everything the clients sent, side by side, scaling folded in.

    Attributes:
        updates: the K updates, read and ordered, as views into A and B.
        A: ``(*layers, rows, in_features)`` in the compute dtype.
        B: ``(*layers, out_features, rows)``.
        dtype: dtype of the result; float16 and bfloat16 are computed in float32.
        bad: clients with NaN, Inf or numbers beyond the compute dtype, and where.
        notes: what was accepted but is worth knowing.
        folding: the factor that took no scaling, and whether it must be common.
    """

    updates: Sequence[ClientUpdate]
    A: Tensor
    B: Tensor
    dtype: torch.dtype
    bad: dict[Hashable, str]
    notes: tuple[str, ...]
    folding: Folding

    def components(self, without: frozenset[Hashable] = frozenset()) -> Components:
        """The participating clients' components: no padding, no weight 0, nobody left out."""
        kept: list[tuple[int, ClientUpdate]] = []
        rows: list[int] = []
        start = 0
        for k, update in enumerate(self.updates):
            if name_of(k, update) not in without and update.weight > 0:
                kept.append((k, update))
                rows += range(start, start + _rank(update))
            start += update.A.shape[-2]
        if not kept or not rows:
            raise InputValueError(
                "no client is left: every one has weight 0"
                + " or was dropped for NaN or Inf, its size or its declared rank" * bool(without)
                + ", or lacks the layer" * any(_rank(update) == 0 for update in self.updates)
                + "; pass at least one update with a positive weight"
            )
        A, B = self.A, self.B
        if len(rows) < start:
            index = torch.tensor(rows, device=A.device)
            A, B = A.index_select(-2, index), B.index_select(-1, index)
        weights = [update.weight for _, update in kept]
        c = Components(
            A=A,
            B=B,
            ranks=tuple(_rank(update) for _, update in kept),
            weight=torch.tensor(weights, dtype=torch.float64, device=A.device),
            slots=tuple(slot for _, update in kept for slot in update.slots or ()),
            ids=tuple(name_of(k, update) for k, update in kept),
        )
        if self.folding.common:
            _check_common_factor(c, self.folding)
        return c

    def finish(self, result: AggregationResult | LowRank, name: str) -> AggregationResult:
        """The method's result in the clients' dtype, checked to be finite."""
        if isinstance(result, LowRank):
            result = result_of(result)
        if not isinstance(result, AggregationResult):
            raise InputTypeError(
                f"method {name!r}: expected it to return an AggregationResult or a LowRank, got "
                f"{type(result).__name__}"
            )
        expected = (*self.A.shape[:-2], self.B.shape[-2], self.A.shape[-1])
        for part in filter(None, (result.factors, result.residual)):
            if part.dense_shape != expected:
                raise InputValueError(
                    f"method {name!r}: expected it to return (*layers, out_features, in_features) "
                    f"= {expected}, got {part.dense_shape}"
                )
        factors = self._cast(result.factors, name)
        residual = None if result.residual is None else self._cast(result.residual, name)
        known = result.certificate
        if known is not None and factors.A.dtype != result.A.dtype:
            before, after = result.factors, factors
            lost = cast_error(before.B, before.A, after.B, after.A)
            known = replace(known, rounding=known.rounding + lost)
        return replace(
            result,
            factors=factors,
            residual=residual,
            notes=(*result.notes, *self.notes),
            certificate=known,
        )

    def _cast(self, low_rank: LowRank, name: str) -> LowRank:
        cast = LowRank(low_rank.A.to(self.dtype), low_rank.B.to(self.dtype))
        if not all_finite(cast.A, cast.B):
            raise ConvergenceError(
                f"method {name!r}: the result has entries beyond "
                f"{torch.finfo(self.dtype).max:.3g}, the largest {self.dtype}; pass the updates "
                "in a wider dtype"
            )
        return cast


def name_of(position: int, update: ClientUpdate) -> Hashable:
    """What a client is called: its id, or its position in the list."""
    return position if update.id is None else update.id


def collect(
    updates: Sequence[ClientUpdate],
    layers: Sequence[str] | None = None,
    folding: Folding = SYMMETRIC,
) -> Intake:
    """Put checked updates side by side, fold the scaling in, look at every entry once.

    Args:
        updates: from `read_updates`; with ``layers``, stacked on a leading dimension.
        layers: names along the first leading dimension, for errors.
        folding: where the scaling goes; by default the root of it into both factors.

    Raises:
        InputValueError: components under the declared rank that are not zero. NaN, Inf and products
            beyond the compute dtype are not raised but listed in ``.bad``.
    """
    dtype = reduce(torch.promote_types, (X.dtype for u in updates for X in (u.A, u.B)))
    compute = dtype if dtype == torch.float64 else torch.float32
    A = torch.cat([u.A.to(compute) for u in updates], dim=-2)
    B = torch.cat([u.B.to(compute) for u in updates], dim=-1)
    peaks_B, peaks_A = (peaks.double() for peaks in component_peaks(B, A))
    bad = _bad_clients(updates, A, B, peaks_A, peaks_B, layers)
    _check_padding(updates, peaks_A * peaks_B, layers)
    # Into both factors alike: product-space methods do not mind, factor-space ones need it.
    into_A, into_B = (
        _per_component(updates, [u.scaling**exponent for u in updates], A.device)
        for exponent in EXPONENTS[folding.unscaled]
    )
    large = _beyond_range(updates, peaks_A, peaks_B, into_A, into_B, compute, layers)
    bad = {**large, **bad}
    if any(u.scaling != 1 for u in updates):
        # In float64, since the root of a scaling may lie outside the dtype though A and B do not.
        A, B = (A * into_A.unsqueeze(-1)).to(compute), (B * into_B).to(compute)
    size = min(B.shape[-2], A.shape[-1])
    notes = tuple(
        f"client {name_of(k, u)!r}: rank {_rank(u)} is above min(out, in) = {size}"
        for k, u in enumerate(updates)
        if _rank(u) > size
    )
    # Views into what was put side by side: nobody's tensors, nor a stack of them, are held on to.
    rows = [u.A.shape[-2] for u in updates]
    pieces = zip(updates, torch.split(A, rows, -2), torch.split(B, rows, -1), strict=True)
    return Intake([replace(u, A=a, B=b) for u, a, b in pieces], A, B, dtype, bad, notes, folding)


def _rank(update: ClientUpdate) -> int:
    return update.rank or 0


def _per_component(
    updates: Sequence[ClientUpdate], values: Sequence[float], device: torch.device
) -> Tensor:
    """A number per client, repeated for each of its components, float64."""
    repeated = [v for u, v in zip(updates, values, strict=True) for _ in range(u.A.shape[-2])]
    return torch.tensor(repeated, dtype=torch.float64, device=device)


def _first(
    updates: Sequence[ClientUpdate], failing: Tensor, layers: Sequence[str] | None
) -> tuple[int, str | None, int]:
    """Client, layer's name and component of the first True in ``(*layers, rows)``."""
    index = failing.nonzero()[0].tolist()
    client, component = 0, index[-1]
    while component >= updates[client].A.shape[-2]:
        component -= updates[client].A.shape[-2]
        client += 1
    return client, layers[index[0]] if layers else None, component


def _bad_clients(
    updates: Sequence[ClientUpdate],
    A: Tensor,
    B: Tensor,
    peaks_A: Tensor,
    peaks_B: Tensor,
    layers: Sequence[str] | None,
) -> dict[Hashable, str]:
    """Clients with NaN or Inf: which layer, factor, how many, where first."""
    if all_finite(peaks_A, peaks_B):
        return {}
    bad: dict[Hashable, str] = {}
    for factor, X, dim in (("lora_A", A, -2), ("lora_B", B, -1)):
        pieces = torch.split(X, [u.A.shape[-2] for u in updates], dim=dim)
        for k, (update, piece) in enumerate(zip(updates, pieces, strict=True)):
            wrong = ~torch.isfinite(piece)
            if bool(wrong.any()) and name_of(k, update) not in bad:
                layer = None
                if layers:
                    place = int(wrong.nonzero()[0, 0])
                    layer, wrong = layers[place], wrong[place]
                first = wrong.nonzero()[0].tolist()
                bad[name_of(k, update)] = (
                    f"{where(k, update.id, layer, factor)}{int(wrong.sum())} NaN or Inf entries, "
                    f"first at {tuple(first)}"
                )
    return bad


def _check_padding(
    updates: Sequence[ClientUpdate], products: Tensor, layers: Sequence[str] | None
) -> None:
    """Components beyond the declared rank must be exactly zero, or they would be lost."""
    beyond = [j >= _rank(u) for u in updates for j in range(u.A.shape[-2])]
    if not any(beyond):
        return
    failing = (products > 0) & torch.tensor(beyond, device=products.device)
    if bool(failing.any()):
        k, layer, component = _first(updates, failing, layers)
        raise InputValueError(
            f"{where(k, updates[k].id, layer)}declares rank {updates[k].rank} with "
            f"{updates[k].A.shape[-2]} rows, but component {component} is not zero; declare the "
            "full rank, or zero the padding"
        )


def _beyond_range(
    updates: Sequence[ClientUpdate],
    peaks_A: Tensor,
    peaks_B: Tensor,
    into_A: Tensor,
    into_B: Tensor,
    compute: torch.dtype,
    layers: Sequence[str] | None,
) -> dict[Hashable, str]:
    """Clients with a component, or a folded factor, that the compute dtype cannot hold: where."""
    largest = torch.finfo(compute).max
    # In logarithms: the product itself may leave float64. NaN and Inf were reported already.
    finite = torch.isfinite(peaks_A) & torch.isfinite(peaks_B)
    log_A, log_B = peaks_A.log2() + into_A.log2(), peaks_B.log2() + into_B.log2()
    exceeds = torch.maximum(torch.maximum(log_A, log_B), log_A + log_B) > math.log2(largest)
    failing = finite & exceeds
    bad: dict[Hashable, str] = {}
    while bool(failing.any()):
        k, layer, component = _first(updates, failing, layers)
        bad[name_of(k, updates[k])] = (
            f"{where(k, updates[k].id, layer)}component {component} of scaling * B @ A exceeds "
            f"{largest:.3g}, the largest {compute}; scale the update down or pass float64"
        )
        start = sum(u.A.shape[-2] for u in updates[:k])
        failing[..., start : start + updates[k].A.shape[-2]] = False
    return bad


def _check_common_factor(c: Components, folding: Folding) -> None:
    """Every client's component in a slot must have the row of A (column of B) of the first's."""
    factor = f"lora_{folding.unscaled}"
    X = c.A if folding.unscaled == "A" else c.B.mT
    first = [c.slots.index(slot) for slot in c.slots]
    # One number per component, read once: which one differs, if any.
    same = X == X.index_select(-2, torch.tensor(first, device=X.device))
    odd = (~same.all(-1)).reshape(-1, len(first)).any(0).nonzero().flatten().tolist()
    if odd:
        own, other = (c.ids[int(c.client[i])] for i in (odd[0], first[odd[0]]))
        raise InputValueError(
            f"method {folding.method!r}: client {own!r}: {factor} in slot {c.slots[odd[0]]} is not "
            f"that of client {other!r}; expected one {factor} on all clients, frozen while they "
            "train; freeze it, or use a method that averages both, such as 'rb' or 'zeropad'"
        )
