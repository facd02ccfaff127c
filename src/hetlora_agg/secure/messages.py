"""Messages: what one client adds to the sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.clients import project, sketch
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.intake import collect
from hetlora_agg.linalg import all_finite, exact_arithmetic
from hetlora_agg.registry import Run, check_options, resolve
from hetlora_agg.running import folding_of
from hetlora_agg.secure.roster import Roster, frozen_factor, read_roster, summing
from hetlora_agg.types import ClientUpdate
from hetlora_agg.validation import read_updates


def linear_message(
    update: ClientUpdate,
    method: str | Run,
    roster: Any,
    *,
    omega: Tensor | None = None,
    basis: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """What one client sends so that the sum over all clients is the method's result.

    ``A[j] = γ_kj A_k[j]``, ``B[:, j] = γ_kj B_k[:, j]`` in the client's slots and 0 in all others,
    with the share γ_kj that the method gives it. Or ``p_k ΔW_k Ω`` and ``p_k ΔW_kᵀ Q``, for a
    method that sums sketches.

    Args:
        update: a `ClientUpdate` of one layer, or of a batch of equal layers, with its id,
            ``A (*layers, rank, in_features)``, ``B (*layers, out_features, rank)``.
        method: a name from ``METHODS`` whose ``sums`` is "factors" or "sketches".
        roster: everybody's ``(id, rank, weight)``, or ``(id, rank, weight, slots)``: public, and
            the same for all clients.
        omega: for the first message of sketches, ``(*layers, in_features, width)``.
        basis: for the second, `clients.basis` of the sum of the first.
        **options: the method's own; the same for all clients.

    Returns:
        ``{"A": (*layers, n_slots, in_features), "B": (*layers, out_features, n_slots)}`` without
        the factor that is frozen, ``{"sketch": (*layers, out_features, width)}`` or
        ``{"projection": (*layers, in_features, width)}``: of one shape on all clients, whatever
        their ranks; float64 for float64 factors, else float32.

    Raises:
        InputTypeError, InputValueError: a method that is no sum, a client that is not in the
            roster or not as it says there, a bad update, NaN or Inf.

    Cost: ``(out + in) rank n_slots`` multiply-adds, and ``K R n_slots`` for the shares of a roster
    of K clients.

    Example:
        >>> import torch
        >>> roster = [("phone", 1, 30), ("tablet", 2, 10)]
        >>> phone = ClientUpdate(torch.ones(1, 2), torch.ones(3, 1), weight=30, id="phone")
        >>> linear_message(phone, "zeropad", roster)["A"]
        tensor([[0.7500, 0.7500],
                [0.0000, 0.0000]])

    Reference: secure aggregation, Bonawitz et al., arXiv:1611.04482; sketches from FedASK,
    arXiv:2507.09990.

    Fidelity: OURS.

    Deviations: the sum is the server's only view, and the protocol that makes it is not ours.
    Ranks, weights and slots are public by design. Under 'fedsa' B is summed too, as in `aggregate`.
    """
    entry = resolve(method)
    check_options(entry, options)
    what = "linear_message"
    kind = summing(entry, options, what)
    everybody = read_roster(roster)
    (read,), _ = read_updates([update], what)
    position = _enrolled(read, everybody, what)
    if kind == "sketches":
        fraction = float(everybody.fractions(entry, options)[position])
        weighted = replace(read, scaling=read.scaling * fraction)
        if omega is not None and basis is None:
            return {"sketch": sketch(weighted, omega)}
        if basis is not None and omega is None:
            return {"projection": project(weighted, basis)}
        raise InputTypeError(f"{what}: a message of {entry.name!r} takes omega= or basis=")
    if omega is not None or basis is not None:
        raise InputTypeError(f"{what}: a message of {entry.name!r} takes neither omega= nor basis=")
    intake = collect([read], folding=folding_of(entry, options))
    if intake.bad:
        (why,) = intake.bad.values()
        raise InputValueError(f"{why}; leave this client out of the round")
    share = everybody.shares(entry, options)[position].to(intake.A.device)
    with exact_arithmetic(intake.A.device.type):
        c = intake.components()
        every = torch.arange(len(share), device=share.device)
        place = (every[:, None] == c.slot_index) * share[:, None]
        message = {"A": place @ c.A.double(), "B": c.B.double() @ place.mT}
        frozen = frozen_factor(entry, options)
        sent = {name: X.to(c.A.dtype) for name, X in message.items() if name != frozen}
    if not all_finite(*sent.values()):
        raise InputValueError(f"{what}: beyond its dtype; scale the update down or pass float64")
    return sent


def _enrolled(update: ClientUpdate, roster: Roster, what: str) -> int:
    """The client's place in the roster, once it is what it says there."""
    if update.id is None:
        raise InputValueError(f"{what}: expected an update with the id it has in the roster")
    position = roster.position(update.id, what)
    line = roster.updates[position]
    for name in ("rank", "weight", "slots"):
        found, said = getattr(update, name), getattr(line, name)
        if found != said:
            raise InputValueError(
                f"{what}: client {update.id!r} has {name} {found!r}, the roster says {said!r}; "
                "all clients must compute with one roster"
            )
    return position
