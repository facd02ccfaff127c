"""Two running aggregates as one: sums add up, whole clients are added again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from hetlora_agg.errors import InputValueError
from hetlora_agg.linalg import exact_arithmetic
from hetlora_agg.streaming.added import Added, Commit
from hetlora_agg.streaming.arriving import Size, Updates, pieces_of
from hetlora_agg.streaming.besides import Sums, check_dora, check_presence, joined_besides
from hetlora_agg.streaming.frozen import shared_factor
from hetlora_agg.streaming.group import Group, by_size
from hetlora_agg.streaming.limits import edges_of
from hetlora_agg.streaming.receipts import Id, Receipt, in_order
from hetlora_agg.streaming.settings import Settings
from hetlora_agg.streaming.state import State
from hetlora_agg.streaming.taking import check_room, held


def merged(settings: Settings, state: State, other: State) -> Commit:
    """Everything about adding another state that can fail; the rest is handed back.

    Clients that both have, with the same content, count once where one side still keeps them
    whole, and are an error where both have them in their sums.
    """
    both = [id for id in in_order(other.receipts) if id in state.receipts]
    for id in both:
        if state.receipts[id].digest != other.receipts[id].digest:
            raise InputValueError(
                f"merge: client {id!r} was added to both with different content; rebuild one of "
                "them without it"
            )
    twice = [id for id in both if state.receipts[id].counts]
    if twice and state.kept is None and other.kept is None:
        raise InputValueError(
            f"merge: client {twice[0]!r} is in the sums of both, so it would count twice; rebuild "
            "one of them without it"
        )
    if twice and (state.besides or other.besides):
        raise InputValueError(
            f"merge: client {twice[0]!r} is in both, and what adapters hold besides factors is "
            "summed at once, so it would count twice; rebuild one of them without it"
        )
    fresh = _joined(settings, state, other)
    fresh.besides, besides = _joined_besides(settings, state, other)
    new = {id: r for id, r in other.receipts.items() if id not in state.receipts}
    if other.kept is not None:
        theirs = {id: own for id, own in other.kept.items() if id in new}
        commits = _take(settings, fresh, theirs, other.receipts)
    elif state.kept is not None:
        # Their sums, mine added to a copy of them.
        mine = {id: own for id, own in state.kept.items() if id not in other.receipts}
        fresh.kept, fresh.kept_bytes, fresh.most = None, 0, other.most
        fresh.groups = {size: group.cloned() for size, group in other.groups.items()}
        for commit in _take(settings, fresh, mine, state.receipts):
            commit()
        commits = []
    else:
        commits = _sums(settings, fresh, other.groups)

    def commit_all() -> None:
        for one in [*commits, *besides]:
            one()
        receipts, forms = state.receipts, state.forms
        receipts.update(
            {id: replace(r, form=forms.setdefault(r.form, r.form)) for id, r in new.items()}
        )
        late = {**other.late, **state.late}
        vars(state).update(vars(fresh))
        state.late = late

    return commit_all


def _joined(settings: Settings, state: State, other: State) -> State:
    """Sizes, dtypes and common factors of both."""
    fresh = replace(
        state,
        sizes={**state.sizes, **other.sizes},
        dtypes=dict(state.dtypes),
        common=dict(state.common),
        accepted=state.accepted | other.accepted,
        numpy=state.numpy and other.numpy,
    )
    if None not in (state.one_layer, other.one_layer) and state.one_layer != other.one_layer:
        raise InputValueError("merge: one side has single updates, the other layers by name")
    fresh.one_layer = other.one_layer if state.one_layer is None else state.one_layer
    fresh.dora = other.dora if state.dora is None else state.dora
    for layer, size in other.sizes.items():
        known = state.sizes.get(layer, size)
        if known != size:
            raise InputValueError(
                f"merge: layer {layer!r}: expected {known}, got {size}; all clients of a layer "
                "must have its size"
            )
        dtype = other.dtypes[layer]
        fresh.dtypes[layer] = torch.promote_types(state.dtypes.get(layer, dtype), dtype)
    odd = sorted(set(state.sizes) ^ set(other.sizes)) if state.sizes and other.sizes else []
    if odd and settings.missing == "error":
        raise InputValueError(
            f"merge: layer {odd[0]!r} is on one side only; say what that means with "
            'missing="zero" or missing="renormalise"'
        )
    for layer, pair in other.common.items():
        who = next(iter(other.receipts))
        fresh.common[layer] = shared_factor(settings.door, state.common.get(layer), pair, who)
    return fresh


def _joined_besides(settings: Settings, state: State, other: State) -> tuple[Sums, list[Commit]]:
    """What adapters hold besides factors, of both."""
    if None not in (state.dora, other.dora):
        check_dora(bool(other.dora), state.dora, settings.dora, "merge: the other side")
        theirs = {name: one.key for name, one in other.besides.items()}
        check_presence(theirs, state.besides, settings.missing, "merge: the other side")
    return joined_besides(state.besides, other.besides, "merge")


def _take(
    settings: Settings, fresh: State, updates: Mapping[Id, Updates], receipts: Mapping[Id, Receipt]
) -> list[Commit]:
    """Whole clients into a state: kept if there is room, else added."""
    coming = [
        (id, receipts[id], pieces_of(own, settings.door, True)[0])
        for id, own in updates.items()
        if receipts[id].counts
    ]
    return held(settings, fresh, coming, updates)


def _sums(settings: Settings, fresh: State, theirs: Mapping[Size, Group]) -> list[Commit]:
    """Sums of both, layer by layer of each size."""
    check_room(settings, fresh)
    edges = edges_of(settings.plan, settings.levels, settings.entry)
    groups: dict[Size, Group] = {}
    commits: list[Commit] = []
    for size, names in by_size(fresh.sizes).items():
        mine, other = fresh.groups.get(size), theirs.get(size)
        group = mine or Group.empty(names, size, settings.plan, edges, fresh.most)
        groups[size] = group.widened(names)
        with exact_arithmetic(size.device.type):
            more: Added | None = other.widened(names).added if other else None
            commits.append(groups[size].added.prepared([], more))
    fresh.groups = groups
    return commits
