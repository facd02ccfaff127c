"""Mass (what a client counts for) and share (what each component gets of it).

A mass is ``(K,)`` or ``(*layers, K)`` float64, a share ``(R,)`` or ``(*layers, R)`` float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from hetlora_agg.checks import as_fraction, as_integer, as_list, as_number, check_choice
from hetlora_agg.components import Components
from hetlora_agg.errors import InputTypeError, InputValueError, OptionValueError
from hetlora_agg.linalg import component_peaks, squared_norms
from hetlora_agg.registry import Statistic


def examples(c: Components) -> Tensor:
    """Mass: the clients' own weights, ``(K,)``."""
    return c.weight


def uniform(c: Components) -> Tensor:
    """Mass: one for every client, ``(K,)``."""
    return torch.ones_like(c.weight)


WEIGHTINGS: Mapping[str, Callable[[Components], Tensor]] = MappingProxyType(
    {"examples": examples, "uniform": uniform}
)
"""The masses that methods offer by name."""

Weighting = str | Callable[[Components], Tensor]
"""A mass by its name, or a function that gives every client's coefficient itself, ``(K,)``."""


def layer_update_norm(c: Components) -> Tensor:
    """Mass: ``‖ΔW_k‖_F`` of each layer apart, ``(*layers, K)``."""
    return client_squared_norms(c).sqrt()


def update_norm(c: Components) -> Tensor:
    """Mass: ``‖ΔW_k‖_F`` over all layers together, ``(K,)``."""
    return over_all_layers(c, client_squared_norms)[0].sqrt()


def client_squared_norms(c: Components) -> Tensor:
    """``‖ΔW_k‖_F²``, ``(*layers, K)`` float64, blockwise: cost ``(out + in) Σ r_k²``."""
    if c.sums is not None:
        return c.sums.squared_norms()
    squares = c.weight.new_zeros((*c.layers, len(c.ranks)))
    for clients, components in c.rank_groups:
        A, B = c.of_clients(components)
        squares[..., clients] = squared_norms(B, A)
    if c.A.dtype == torch.float64:
        _check_squares(c, squares)
    return squares


def _check_squares(c: Components, squares: Tensor) -> None:
    """By the largest term, since an update may cancel: squares of float32 cannot leave float64."""
    peaks_B, peaks_A = component_peaks(c.B, c.A)
    owners = torch.arange(len(c.ranks), device=c.A.device)[:, None] == c.client
    largest = (owners * (peaks_B * peaks_A).unsqueeze(-2)).amax(-1)
    vanish = (largest > 0) & (largest.square() < torch.finfo(torch.float64).tiny)
    outside = vanish | ~torch.isfinite(squares)
    if bool(outside.any()):
        raise InputValueError(
            f"update norms: client {c.ids[int(outside.nonzero()[0, -1])]!r}: the square of its "
            "norm leaves float64; bring the updates to a usual size"
        )


def over_all_layers(c: Components, statistic: Statistic) -> tuple[Tensor, ...]:
    """Client statistics summed over every layer: the given totals, or this batch's own."""
    if c.statistic is not None:
        return c.statistic
    own = statistic(c)
    parts = own if isinstance(own, tuple) else (own,)
    return tuple(sum_over_layers(part, len(c.layers)) for part in parts)


def sum_over_layers(value: Tensor, layers: int) -> Tensor:
    """Sum over that many leading dimensions; none is the value itself."""
    return value.sum(tuple(range(layers))) if layers else value


def client_share(c: Components, mass: Tensor, total: float | None = None) -> Tensor:
    """Share ``m_k / Σ m`` for every component of client k; a given total replaces the sum.

    If all masses are zero, as those of `update_norm` can be, clients share equally: the limit.
    """
    share = normalised(mass) if total is None else mass / as_number(total, "total", zero=False)
    return share[..., c.client]


def weighted_share(c: Components, weighting: Weighting, total: float | None = None) -> Tensor:
    """Share of every component under a weighting, ``(*layers or (), R)``.

    A name is a mass, divided by its sum or by ``total``. What a function returns are the
    coefficients themselves, used as they are: a rule that clips gives less than the whole.

    Raises:
        InputTypeError, InputValueError: a weighting or total that is none; a function and a total.

    Example:
        >>> c = Components(torch.eye(2), torch.eye(2), (1, 1), torch.ones(2), (0, 0), (0, 1))
        >>> weighted_share(c, "uniform"), weighted_share(c, "examples", total=8.0)
        (tensor([0.5000, 0.5000]), tensor([0.1250, 0.1250]))

    Reference: the denominator after Horvitz and Thompson 1952.

    Fidelity: OURS.
    """
    if not callable(weighting):
        check_choice("weighting", weighting, sorted(WEIGHTINGS))
        return client_share(c, WEIGHTINGS[weighting](c), total)
    if total is not None:
        raise InputValueError("total=: a weighting function gives the coefficients themselves")
    given = weighting(c)
    if not isinstance(given, Tensor) or given.shape[-1:] != (len(c.ranks),):
        found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise InputTypeError(
            f"weighting: expected the function to return a tensor of {len(c.ranks)} coefficients, "
            f"one for each client, got {found}"
        )
    if not bool((torch.isfinite(given) & (given >= 0)).all()):
        raise InputValueError("weighting: expected coefficients that are finite and >= 0")
    return given.to(c.weight)[..., c.client]


def normalised(mass: Tensor) -> Tensor:
    """``m_k / Σ m`` for every client, ``(*layers or (), K)``; equal if all are zero."""
    # Over the largest first, so that 1e308 does not overflow the sum nor 5e-324 vanish in it.
    top = mass.amax(-1, keepdim=True)
    relative = torch.where(top > 0, mass / top, 1.0)
    return relative / relative.sum(-1, keepdim=True)


def capped(mass: Tensor, cap: float) -> Tensor:
    """Mass: the given one as fractions of the whole, none above the cap.

    ``m'_k = min(m_k, t) / Σ_i min(m_i, t)`` with the level t at which the largest fraction is the
    cap τ, by water-filling: who is above it stands at τ, the others share the rest as before.

    Args:
        mass: ``(*layers or (), K)``, at least 0; where only zeros are left, they share equally.
        cap: τ in (0, 1], at least 1/K; at 1/K all clients count alike.

    Returns:
        ``(*layers or (), K)`` float64, sums to 1.

    Raises:
        OptionValueError: K clients cannot all stay at or below τ, since ``K τ < 1``.

    Cost: one sort of K numbers.

    Example:
        >>> capped(torch.tensor([8.0, 1.0, 1.0], dtype=torch.float64), 0.5)
        tensor([0.5000, 0.2500, 0.2500], dtype=torch.float64)

    Fidelity: OURS; water-filling is elementary and has no reference.
    """
    clients, cap = mass.shape[-1], as_fraction(cap, "weight_cap=")
    if cap < 1 / clients:
        raise OptionValueError(
            f"weight_cap=: expected at least 1/K = {1 / clients:.6g} for K = {clients} clients, "
            f"since K τ >= 1 or their fractions cannot add up to 1, got τ = {cap:g}"
        )
    fraction = normalised(mass)
    largest = fraction.sort(dim=-1, descending=True).values
    # What the largest j leave: once they stand at the cap, the rest share 1 - jτ as they did.
    rest = largest.flip(-1).cumsum(-1).flip(-1)
    open_part = 1 - cap * torch.arange(clients, device=mass.device, dtype=torch.float64)
    # Rounding may say of the last client too that it has to be capped; then all are equal.
    count = (open_part * largest > cap * rest).sum(-1, keepdim=True).clamp_max(clients - 1)
    above = fraction > largest.gather(-1, count)
    below = torch.where(above, 0.0, fraction)
    below = torch.where(below.amax(-1, keepdim=True) > 0, below, (~above).to(fraction))
    left = 1 - cap * above.sum(-1, keepdim=True, dtype=torch.float64)
    # Filled in, since torch.where would round a Python number to float32.
    return (left * normalised(below)).clamp_max(cap).masked_fill(above, cap)


def guarded_share(
    c: Components,
    mass: Tensor,
    *,
    totals: Sequence[float] | None = None,
    floor: float | None = None,
    quorum: int | None = None,
    weight_cap: float | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """`slot_share` under the guards against rank inflation, and the slots that the quorum drops.

    With a floor β a coalition T has at most ``p_T / β`` of any slot, with a cap τ besides at most
    ``|T| τ / β``. A quorum of 2f + 1 leaves f clients no slot in which they are not outnumbered.

    Args:
        c: the components.
        mass: ``(K,)`` or ``(*layers, K)``.
        totals: fixed denominators, see `slot_share`.
        floor: β in (0, 1], see `slot_share`.
        quorum: fewest owners of a slot, see `slot_share`.
        weight_cap: τ in (0, 1], see `capped`; taken before the shares.

    Returns:
        The share ``(R,)`` or ``(*layers, R)``, and the dropped slots, from 0.

    Raises:
        InputValueError: an option outside its range, or a cap that these clients cannot keep.

    Cost: that of `slot_share`.

    Example:
        >>> n = torch.tensor([3.0, 1.0], dtype=torch.float64)
        >>> c = Components(torch.ones(3, 2), torch.ones(2, 3), (1, 2), n, (0, 0, 1), (0, 1))
        >>> guarded_share(c, examples(c), quorum=2)  # who owns slot 1 is alone there
        (tensor([0.7500, 0.2500, 0.0000], dtype=torch.float64), (1,))

    Fidelity: OURS, with no reference for the guards.
    """
    if weight_cap is not None:
        if totals is not None:
            raise OptionValueError(
                "weight_cap= is relative to the weight of those who take part; leave out totals="
            )
        mass = capped(mass, weight_cap)
    return slot_share(c, mass, totals=totals, floor=floor, quorum=quorum), dropped_slots(c, quorum)


def slot_share(
    c: Components,
    mass: Tensor,
    *,
    totals: Sequence[float] | None = None,
    floor: float | None = None,
    quorum: int | None = None,
) -> Tensor:
    """Share ``m_k / N_j`` for client k's component in slot j, ``N_j`` over the slot's owners.

    Args:
        c: the components.
        mass: ``(K,)`` or ``(*layers, K)``.
        totals: fixed denominators in place of ``N_j``, one positive number per slot.
        floor: β in (0, 1]: the denominator is at least ``β Σ m``, nobody's share above ``p_k / β``.
        quorum: slots with fewer owners than this get share 0 (see `dropped_slots`).

    Raises:
        InputTypeError, InputValueError: an option outside its range; a floor by totals.

    Example:
        >>> n = torch.tensor([3.0, 1.0], dtype=torch.float64)
        >>> c = Components(torch.ones(3, 2), torch.ones(2, 3), (1, 2), n, (0, 0, 1), (0, 1))
        >>> slot_share(c, n)
        tensor([0.7500, 0.2500, 1.0000], dtype=torch.float64)
    """
    of_component = mass[..., c.client]
    if totals is not None:
        if floor is not None:
            raise InputValueError("floor= is relative to the owners' sum; leave out totals=")
        fixed = [as_number(value, "totals=", zero=False) for value in as_list(totals, "totals=")]
        if len(fixed) < c.n_slots:
            raise OptionValueError(
                f"totals=: expected a number for each of {c.n_slots} slots, got {len(fixed)}"
            )
        share = of_component / of_component.new_tensor([fixed[slot] for slot in c.slots])
    else:
        top = c.over_slots(of_component)[0][..., c.slot_index]
        relative = torch.where(top > 0, of_component / top, 1.0)
        share = relative / c.over_slots(relative)[1][..., c.slot_index]
    if floor is not None:
        share = torch.minimum(share, client_share(c, mass) / as_fraction(floor, "floor="))
    if quorum is not None:
        empty = set(dropped_slots(c, quorum))
        share = share * share.new_tensor([slot not in empty for slot in c.slots])
    return share


def coverage(c: Components, mass: Tensor) -> Tensor:
    """``q_j``, the part of all mass that owns a component's slot, ``(*layers or (), R)``."""
    return c.over_slots(client_share(c, mass))[1][..., c.slot_index]


def top_share(c: Components, mass: Tensor) -> Tensor:
    """Share ``m_k / Σ m`` among the clients of the largest rank only; 0 for the others."""
    top = mass.new_tensor([rank == c.max_rank for rank in c.ranks])
    return client_share(c, mass * top)


def dropped_slots(c: Components, quorum: int | None) -> tuple[int, ...]:
    """Slots somebody fills, but fewer clients than the quorum."""
    if quorum is None:
        return ()
    least = as_integer(quorum, "quorum=", at_least=1)
    return tuple(sorted(slot for slot, owners in Counter(c.slots).items() if owners < least))
