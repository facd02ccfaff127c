"""From a sum back to a result: what the server does with the only thing it sees."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.aggregate import aggregate
from hetlora_agg.clients.reading import as_matrix
from hetlora_agg.compression import compress
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.linalg import all_finite, exact_arithmetic
from hetlora_agg.registry import MethodEntry, Run, check_options, named_in, resolve
from hetlora_agg.secure.roster import Roster, frozen_factor, read_roster, summing
from hetlora_agg.types import AggregationResult, LowRank, result_of

SAME = 1e-12
"""Two quotients of shares are one number when they differ by rounding alone."""


def from_sum(
    summed: Mapping[str, Tensor],
    method: str | Run,
    roster: Any,
    *,
    frozen: Tensor | None = None,
    basis: Tensor | None = None,
    present: Iterable[Hashable] | None = None,
    **options: Any,
) -> AggregationResult:
    """The result that `aggregate` would have given, from the sum of the clients' messages.

    ``A_g = Σ_k A^(k)``, ``B_g = Σ_k B^(k)``, with the slots nobody fills carried over as the method
    does it; for sketches the SVD of ``Q P̄ᵀ``.

    Args:
        summed: name -> sum over clients of what `linear_message` gave, noise included if any.
        method: as on the clients.
        roster: as on the clients.
        frozen: the factor that nobody sent because all have it, ``A (*layers, n_slots,
            in_features)`` or ``B (*layers, out_features, n_slots)``; more slots than that do no
            harm.
        basis: for sketches, the one the clients were sent.
        present: ids of the clients whose messages are in the sum, None for all. The shares were
            those of the whole roster; the sum is multiplied slot by slot to make up for who is
            missing.
        **options: as on the clients; ``previous=`` for slots to carry over.

    Returns:
        An `AggregationResult` in the dtype of the sum, equal to that of `aggregate` up to rounding.

    Raises:
        InputTypeError, InputValueError: a method that is no sum, tensors that are not those of its
            messages, a missing frozen factor or basis, shares under which one factor per slot
            cannot make up for the missing clients.

    Cost: that of `aggregate` on updates of zeros; for sketches that of `compress`.

    Example:
        >>> import torch
        >>> from hetlora_agg import ClientUpdate
        >>> from hetlora_agg.secure import linear_message
        >>> roster = [(0, 1, 1), (1, 1, 3)]
        >>> clients = [
        ...     ClientUpdate(k * torch.ones(1, 2), torch.ones(2, 1), weight=n, id=k)
        ...     for k, _, n in roster
        ... ]
        >>> messages = [linear_message(client, "fedit", roster) for client in clients]
        >>> from_sum({name: sum(m[name] for m in messages) for name in "AB"}, "fedit", roster).A
        tensor([[0.7500, 0.7500]])

    Reference: secure aggregation, Bonawitz et al., arXiv:1611.04482.

    Fidelity: OURS.

    Deviations: without ``present=`` a client that drops out counts as one that sent zeros.
    """
    entry = resolve(method)
    check_options(entry, options)
    kind = summing(entry, options, "from_sum")
    everybody = read_roster(roster)
    if kind == "sketches":
        return _from_sketches(entry, summed, everybody, basis, present, options)
    still = frozen_factor(entry, options)
    A, B = _summed_factors(summed, still, frozen, len(_slots_of(everybody)))
    there = everybody if present is None else everybody.only(present)
    if present is not None:
        factor = _making_up(entry, everybody, there, options).to(A.device)
        A = A if still == "A" else (factor[:, None] * A.double()).to(A)
        B = B if still == "B" else (factor * B.double()).to(B)
    A, B = A[..., : len(_slots_of(there)), :], B[..., : len(_slots_of(there))]
    # The method on updates of zeros: what it does to slots nobody fills, and everything that is
    # known of its result without what the clients sent.
    zeros = [
        replace(
            one,
            A=A[..., list(one.slots or ()), :] * (still == "A"),
            B=B[..., list(one.slots or ())] * (still == "B"),
        )
        for one in there.updates
    ]
    result = aggregate(zeros, entry.run, **options)
    with exact_arithmetic(A.device.type):
        factors = LowRank(
            result.A if still == "A" else _added(result.A.mT, A.mT).mT,
            result.B if still == "B" else _added(result.B, B),
        )
    return replace(result, factors=factors)


def _slots_of(roster: Roster) -> range:
    return range(roster.components.n_slots)


def _added(base: Tensor, columns: Tensor) -> Tensor:
    """The base with the summed columns added to its leading ones."""
    width = columns.shape[-1]
    return torch.cat([base[..., :width] + columns, base[..., width:]], dim=-1)


def _summed_factors(
    summed: Mapping[str, Tensor], still: str | None, frozen: Tensor | None, n_slots: int
) -> tuple[Tensor, Tensor]:
    """Both factors over the slots, the frozen one as given."""
    shapes = {"A": "(*layers, n_slots, in_features)", "B": "(*layers, out_features, n_slots)"}
    named = _named(summed, {name: shapes[name] for name in shapes if name != still})
    if (frozen is None) != (still is None):
        raise InputTypeError(
            "from_sum: frozen=: this method sends both factors; leave it out"
            if still is None
            else f"from_sum: frozen=: expected {still} {shapes[still]}, which nobody sent"
        )
    if frozen is not None and still is not None:
        X = as_matrix(frozen, "from_sum: frozen", shapes[still])
        sent = next(iter(named.values()))
        named[still] = (X[..., :n_slots, :] if still == "A" else X[..., :n_slots]).to(sent)
    A, B = named["A"], named["B"]
    if A.shape[-2] != n_slots or B.shape[-1] != n_slots or A.shape[:-2] != B.shape[:-2]:
        raise InputValueError(
            f"from_sum: expected A {shapes['A']} and B {shapes['B']} with n_slots = {n_slots}, as "
            f"the roster has them, got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    return A, B


def _named(summed: Mapping[str, Tensor], shapes: Mapping[str, str]) -> dict[str, Tensor]:
    """Exactly these tensors, finite."""
    found = sorted(summed) if isinstance(summed, Mapping) else type(summed).__name__
    if found != sorted(shapes):
        raise InputTypeError(f"from_sum: expected the sum of {sorted(shapes)}, got {found}")
    read = {name: as_matrix(summed[name], f"from_sum: {name}", shapes[name]) for name in shapes}
    if not all_finite(*read.values()):
        raise InputValueError("from_sum: NaN or Inf in the sum")
    return {name: X.detach() for name, X in read.items()}


def _making_up(
    entry: MethodEntry, everybody: Roster, there: Roster, options: Mapping[str, Any]
) -> Tensor:
    """Per slot: what the present clients' shares are among themselves over what they were."""
    was, now = everybody.shares(entry, options), there.shares(entry, options)
    was = was[[everybody.position(id, "present=") for id in there.ids]]
    was, gone = was[:, : now.shape[-1]], was.shape[-1] - now.shape[-1]
    sent = was > 0
    quotient = torch.where(sent, now / torch.where(sent, was, 1.0), 0.0)
    factor = quotient.amax(0)
    if bool(((quotient - factor).abs() > SAME * factor)[sent].any()) or bool(
        (now > 0)[~sent].any()
    ):
        raise InputValueError(
            f"present=: under these options of {entry.name!r} the missing clients change the "
            "others' shares by different factors; sum again with a roster of those present"
        )
    return torch.nn.functional.pad(factor, (0, gone))


def _from_sketches(
    entry: MethodEntry,
    summed: Mapping[str, Tensor],
    roster: Roster,
    basis: Tensor | None,
    present: Iterable[Hashable] | None,
    options: Mapping[str, Any],
) -> AggregationResult:
    """The SVD of ``Q P̄ᵀ`` at the rank that the method would take."""
    shape = "(*layers, out_features, width)"
    P = _named(summed, {"projection": "(*layers, in_features, width)"})["projection"]
    Q = as_matrix(basis, "from_sum: basis", shape).detach()
    if Q.shape[-1] != P.shape[-1] or Q.shape[:-2] != P.shape[:-2]:
        raise InputValueError(
            f"from_sum: basis: expected {shape} with the width of the projections, "
            f"{tuple(P.shape)}, got {tuple(Q.shape)}"
        )
    there = roster if present is None else roster.only(present)
    was = roster.fractions(entry, options)
    part = float(was[[roster.position(id, "present=") for id in there.ids]].sum() / was.sum())
    sketched = LowRank((P.double() / part).mT.to(P), Q.to(P))
    wanted = {"rank": None, **named_in(compress, options)}
    with exact_arithmetic(P.device.type):
        factors = compress(sketched, default=there.components.max_rank, **wanted)
    return result_of(factors, slotted=not entry.holds("gauge", options))
