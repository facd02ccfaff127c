"""Taking clients in: everything that can fail first, then a change that cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hetlora_agg.errors import InputTypeError, MemoryLimitError
from hetlora_agg.linalg import exact_arithmetic
from hetlora_agg.streaming.added import Commit
from hetlora_agg.streaming.alike import total_of
from hetlora_agg.streaming.arriving import (
    ONE,
    Arriving,
    Piece,
    Size,
    Updates,
    check_sizes,
    copied,
    pieces_of,
)
from hetlora_agg.streaming.asking import Question, ask
from hetlora_agg.streaming.besides import bytes_of, check_dora, check_presence, taken_besides
from hetlora_agg.streaming.frozen import share_factor
from hetlora_agg.streaming.group import Group, Masses, by_size
from hetlora_agg.streaming.limits import (
    bytes_of_sums,
    bytes_of_updates,
    bytes_waiting,
    check_parts,
    edges_of,
    truncated_rank,
)
from hetlora_agg.streaming.plan import check_accepted
from hetlora_agg.streaming.receipts import Id, Receipt
from hetlora_agg.streaming.settings import Settings
from hetlora_agg.streaming.state import State

Coming = tuple[Id, Receipt, Sequence[Piece]]
"""A client that counts, laid out."""


def taken(settings: Settings, state: State, clients: Mapping[Id, Arriving]) -> Commit:
    """Everything about taking these clients in that can fail; the rest is handed back."""
    fresh = replace(
        state,
        sizes=dict(state.sizes),
        dtypes=dict(state.dtypes),
        common=dict(state.common),
        accepted=set(state.accepted),
        numpy=state.numpy and all(a.numpy for a in clients.values()),
    )
    forms, receipts = {}, {}
    coming: list[Coming] = []
    besides: list[Commit] = []
    for id, arriving in clients.items():
        receipt = arriving.receipt
        _check(settings, fresh, id, arriving)
        form = state.forms.get(receipt.form, receipt.form)
        forms[form], receipts[id] = form, replace(receipt, form=form)
        if receipt.counts:
            coming.append((id, receipt, arriving.pieces))
            share_factor(settings.door, fresh, id, arriving.pieces)
        at = f"add: client {id!r}"
        fresh.besides, more = taken_besides(fresh.besides, arriving.besides, receipt, at)
        besides += more
    sent = {id: arriving.sent for id, arriving in clients.items()}
    commits = [*held(settings, fresh, coming, sent), *besides]

    def commit() -> None:
        for one in commits:
            one()
        # Only now, in place: a copy of ten thousand receipts for every client would be quadratic.
        state.receipts.update(receipts)
        state.forms.update(forms)
        vars(state).update(vars(fresh))

    return commit


def _check(settings: Settings, fresh: State, id: Id, arriving: Arriving) -> None:
    """The client against those before it, whose layers and dtypes it joins."""
    receipt, roster, besides = arriving.receipt, settings.roster, arriving.besides
    check_dora(besides.dora, fresh.dora, settings.dora, f"add: client {id!r}")
    if fresh.dora is not None:
        check_presence(besides.keys, fresh.besides, settings.missing, f"add: client {id!r}")
    fresh.dora = besides.dora
    one = ONE in arriving.updates
    if fresh.one_layer not in (None, one):
        raise InputTypeError(
            f"add: client {id!r}: expected "
            + ("one update" if fresh.one_layer else "a mapping of updates by layer name")
            + " as from the clients before"
        )
    fresh.one_layer = one
    missing = settings.missing
    if roster is not None:
        roster.check(id, receipt.form, receipt.weight)
        missing = "error" if isinstance(roster.ranks[id], int) else missing
    fresh.sizes = check_sizes(arriving.updates, fresh.sizes, id, missing)
    for layer, u in arriving.updates.items():
        own = torch.promote_types(u.A.dtype, u.B.dtype)
        fresh.dtypes[layer] = torch.promote_types(fresh.dtypes.get(layer, own), own)
    if roster is None and receipt.counts:
        for slots in set(receipt.form.slots) - fresh.accepted:
            donor: Sequence[int] = range(max(settings.levels or [1 + max(slots)]))
            if "mixed_ranks" not in settings.entry.claims:
                donor = min(fresh.accepted, default=slots)
            check_accepted(settings.entry, settings.options, slots, donor)
            fresh.accepted.add(slots)
        check_parts(settings.plan, settings.levels, id, receipt.form)


def held(
    settings: Settings, fresh: State, coming: Sequence[Coming], updates: Mapping[Id, Updates]
) -> list[Commit]:
    """Keep everybody while that is less than sums would be, then add up."""
    if fresh.kept is not None:
        more = sum(map(bytes_of_updates, updates.values()))
        if fresh.kept_bytes + more <= room(settings, fresh):
            fresh.kept = {**fresh.kept, **{id: copied(own) for id, own in updates.items()}}
            fresh.kept_bytes += more
            return []
        begin_sums(settings, fresh)
    else:
        check_room(settings, fresh)
    return added(settings, fresh, coming)


def begin_sums(settings: Settings, fresh: State) -> None:
    """From everybody to sums over everybody."""
    kept, fresh.kept, fresh.kept_bytes = fresh.kept or {}, None, 0
    fresh.most = largest_rank_kept(settings, fresh)
    fresh.groups = {}
    for id, own in kept.items():
        if not fresh.receipts[id].counts:
            continue
        pieces, _ = pieces_of(own, settings.door, True)
        # Nobody else has these sums yet: they may be changed at once.
        for commit in added(settings, fresh, [(id, fresh.receipts[id], pieces)]):
            commit()


def added(settings: Settings, fresh: State, coming: Sequence[Coming]) -> list[Commit]:
    """Clients on their way into the sums."""
    edges = edges_of(settings.plan, settings.levels, settings.entry)
    groups: dict[Size, Group] = {}
    commits: list[Commit] = []
    for size, names in by_size(fresh.sizes).items():
        known = fresh.groups.get(size)
        group = (
            Group.empty(names, size, settings.plan, edges, fresh.most)
            if known is None
            else known.widened(names)
        )
        arrivals = []
        for id, receipt, pieces in coming:
            arrivals += group.arrivals(pieces, masses_of(settings, id, receipt))
        groups[size] = group
        with exact_arithmetic(size.device.type):
            commits.append(group.added.prepared(arrivals))
    fresh.groups = groups
    return commits


def masses_of(settings: Settings, id: Id, receipt: Receipt) -> Masses:
    """What a client's components are multiplied by."""
    entry, options, plan = settings.entry, settings.options, settings.plan

    def of(piece: Piece) -> Tensor:
        shape = (len(piece.names), *[1] * len(piece.size.layers), len(piece.slots))
        if plan.mass == "layer norm":
            assert piece.squares is not None
            return piece.squares.sqrt().unsqueeze(-1).expand(*piece.squares.shape, shape[-1])
        if plan.mass == "share":
            assert settings.roster is not None
            rows = [
                settings.roster.shares(entry, options, name, settings.missing)[id]
                for name in piece.names
            ]
            mass = torch.stack(rows).reshape(shape)
        elif plan.mass == "own":
            _, heard = ask(entry, options, Question([piece.slots], [receipt.weight]))
            mass = next(iter(heard.shares.values())).expand(shape)
        else:
            value = {"weight": receipt.weight, "count": 1.0}
            number = value.get(plan.mass, total_of(receipt) ** 0.5)
            mass = torch.full(shape, number, dtype=torch.float64)
        return mass.to(piece.A.device)

    return of


def room(settings: Settings, fresh: State) -> float:
    """Bytes below which everybody is kept."""
    sums = _bytes(settings, fresh, _parts(settings))
    limit = limit_of(settings, fresh)
    return sums if limit is None else min(sums, limit)


def limit_of(settings: Settings, fresh: State) -> int | None:
    """What full-size tensors leave of the limit for factors."""
    limit, taken = settings.memory_limit, bytes_of(fresh.besides)
    if limit is not None and taken >= limit:
        raise MemoryLimitError(
            f"memory_limit={limit:.3g}: sums of tensors besides the factors take {taken} bytes; "
            "raise the limit"
        )
    return None if limit is None else limit - taken


def check_room(settings: Settings, fresh: State) -> None:
    """Refuse layers or slots for which there is no room beside the sums that are there."""
    limit = limit_of(settings, fresh)
    # Who holds the sums of some layers alone may hold those of none.
    if limit is None or not fresh.sizes:
        return
    parts, largest = _parts(settings), _largest(settings, fresh)
    if fresh.most is not None:
        if truncated_rank(settings.plan, fresh.sizes, parts, limit, 0) < fresh.most:
            raise MemoryLimitError(
                f"memory_limit={limit:.3g}: {len(fresh.sizes)} layers at rank {fresh.most} take "
                "more; name all layers with the first client, or raise the limit"
            )
    elif (needed := _needed(settings, fresh, parts)) > limit:
        raise MemoryLimitError(
            f"memory_limit={limit:.3g}: sums over {len(fresh.sizes)} layers and {largest} slots "
            f"take {needed:.3g} bytes; raise the limit"
        )


def largest_rank_kept(settings: Settings, fresh: State) -> int | None:
    """The rank of truncated sums where exact ones do not fit, else None."""
    limit, parts = (
        limit_of(settings, fresh),
        len(edges_of(settings.plan, settings.levels, settings.entry)),
    )
    if limit is None or _needed(settings, fresh, parts) <= limit:
        return None
    return truncated_rank(settings.plan, fresh.sizes, parts, limit, _largest(settings, fresh))


def _needed(settings: Settings, fresh: State, parts: int) -> int:
    """What exact sums take, clients that wait for their product included."""
    return _bytes(settings, fresh, parts) + bytes_waiting(fresh.sizes)


def _parts(settings: Settings) -> int:
    sliced = settings.plan.parts != "all" and settings.levels is not None
    return len(set(settings.levels or ())) if sliced else 1


def _largest(settings: Settings, fresh: State) -> int:
    """One more than the highest slot that is known of."""
    known = [1 + max(slots) for slots in fresh.accepted if slots]
    known += [settings.roster.largest()] if settings.roster else []
    return max([*known, *(settings.levels or ()), 1])


def _bytes(settings: Settings, fresh: State, parts: int) -> int:
    ranks = len(settings.levels or {len(slots) for slots in fresh.accepted} or (1,))
    return bytes_of_sums(settings.plan, fresh.sizes, parts, _largest(settings, fresh), ranks)
