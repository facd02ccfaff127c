"""What a method needs of clients that are gone: found out by asking the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hetlora_agg.components import Components
from hetlora_agg.errors import HetLoRAError, InputValueError
from hetlora_agg.registry import METHODS, MethodEntry
from hetlora_agg.streaming.asking import Mass, Question, Recorder, ask
from hetlora_agg.weighting import client_squared_norms

Parts = Literal["all", "slot", "rank"]

PARTS: tuple[Parts, ...] = ("all", "slot", "rank")
"""From the coarsest to the finest."""

DOMINANT = 1e9
"""Weight of one client against a few of the others: any cap on a client's part shows."""

COPIES = (1, 1_000, 50_000)
"""How many clients of each kind are asked about, until no quorum is above them."""

DONORS = (1, 1_000)
"""Clients of the largest rank that stand beside a new one when the method is asked about it."""

SAME = 1e-9
"""Largest relative difference of what should be one and the same."""


@dataclass(frozen=True)
class Plan:
    """How clients are added up for one method.

    Attributes:
        verbs: the combining verbs that the method calls, "stack", "average_factors".
        mass: what a client is multiplied by on its way in: its weight, 1, the norm of its update
            over all layers or in each; "own", its final share, where that depends on nobody else;
            "share", the same where a roster tells it.
        parts: what has a denominator of its own: nothing ("all"), every slot, or the slots of
            every rank.
        align: the alignment that the method asks for.
        common: the factor that all clients share, if the method takes it whole.
    """

    verbs: frozenset[str]
    mass: Mass
    parts: Parts
    align: str | None = None
    common: str | None = None


def streamable(entry: MethodEntry) -> bool:
    """Whether the method is a sum over clients once ranks and weights, or norms, are known."""
    return entry.sums is not None or entry.statistic is client_squared_norms


def check_streamable(entry: MethodEntry, options: Mapping[str, Any]) -> None:
    """Refuse what needs all clients at once, whatever is known of them.

    Raises:
        InputValueError: the method's result is no sum over clients, or its weighting compares them.
    """
    if not streamable(entry):
        known = sorted(name for name, e in METHODS.items() if streamable(e))
        raise InputValueError(
            f"method {entry.name!r} looks at all clients at once, so it cannot take them one by "
            f"one; collect them for aggregate_layers, or choose one of {known}"
        )
    if entry.statistic is None and entry.statistic_for(options) is not None:
        raise InputValueError(
            f"method {entry.name!r}: weighting= compares the clients' updates, so it cannot take "
            "them one by one; collect them for aggregate_layers, or name a weighting"
        )


def plan_of(entry: MethodEntry, options: Mapping[str, Any], levels: Sequence[int] | None) -> Plan:
    """How to add up clients whose number, ranks and weights nobody knows yet.

    Raises:
        InputValueError: what a client counts for depends on the others, so it takes a roster.
    """
    known = sorted(levels or (1, 2, 3))
    # Two clients of the largest rank: what tells them apart is their mass.
    kinds = [known[0], known[len(known) // 2], known[-1], known[-1]]
    if "mixed_ranks" not in entry.claims:
        kinds = [known[-1]] * 4
    # Against a giant every cap shows, without one every small difference.
    answers = [_answer(entry, options, kinds, giant) for giant in (True, False)]
    heard = answers[0][2]

    def found(mass: Mass, parts: Parts) -> Plan:
        return Plan(frozenset(heard.shares), mass, parts, heard.align, heard.common_factor)

    if all(_own(entry, options, *answer) for answer in answers):
        return found("own", "all")
    masses: tuple[Mass, ...] = ("weight", "count", "layer norm" if heard.by_layer else "norm")
    for mass in masses:
        parts = [_parts(c, said, asked.mass(mass)) for asked, c, said in answers]
        fitting = [part for part in parts if part is not None]
        if len(fitting) == len(answers):
            return found(mass, max(fitting, key=PARTS.index))
    raise InputValueError(
        f"method {entry.name!r}: what a client counts for depends on the others under these "
        "options; give every client's id, rank and weight beforehand with roster="
    )


def _answer(
    entry: MethodEntry, options: Mapping[str, Any], kinds: Sequence[int], giant: bool
) -> tuple[Question, Components, Recorder]:
    """What the method says of clients of these ranks, so many that no quorum leaves any out."""
    refusal: HetLoRAError | None = None
    for copies in COPIES:
        ranks = [*kinds] * copies
        weights = [1.0 + k % 7 for k in range(len(ranks))]
        if giant:
            weights[-1] = DOMINANT * copies
        norms = [1.0 + 5 * k % 11 for k in range(len(ranks))]
        asked = Question([range(rank) for rank in ranks], weights, norms)
        try:
            c, heard = ask(entry, options, asked)
        except HetLoRAError as error:
            # A cap that few clients cannot keep, many can; anything else is the same for many.
            refusal = refusal or error
            continue
        if not heard.shares:
            break
        if all(bool((share > 0).all()) for share in heard.shares.values()):
            return asked, c, heard
    if refusal:
        raise refusal
    raise InputValueError(
        f"method {entry.name!r}: {len(ranks)} clients leave a slot without a share under these "
        "options; collect them for aggregate_layers"
    )


def _own(
    entry: MethodEntry,
    options: Mapping[str, Any],
    asked: Question,
    c: Components,
    heard: Recorder,
) -> bool:
    """Whether a client alone gets the share that it has among others: fixed denominators."""
    for k in range(4):
        alone = Question([asked.slots[k]], [asked.weights[k]], [(asked.norms or (1.0,))[k]])
        try:
            _, own = ask(entry, options, alone)
        except HetLoRAError:
            return False
        for verb, share in heard.shares.items():
            among = share[..., c.client == k]
            if not torch.allclose(own.shares[verb], among, rtol=SAME, atol=0.0):
                return False
    return True


def _parts(c: Components, heard: Recorder, mass: Sequence[float]) -> Parts | None:
    """What has a denominator of its own if clients count by this mass; None if they do not."""
    of = torch.tensor(list(mass), dtype=torch.float64)[c.client]
    rank = torch.tensor(c.ranks)[c.client]
    ratios = torch.cat([(share / of).reshape(-1, len(of)) for share in heard.shares.values()])
    if _same(ratios):
        return "all"
    slots = range(c.n_slots)
    if all(_same(ratios[:, c.slot_index == j]) for j in slots):
        return "slot"
    cells = ((c.slot_index == j) & (rank == r) for j in slots for r in sorted(set(c.ranks)))
    return "rank" if all(_same(ratios[:, cell]) for cell in cells) else None


def _same(ratios: Tensor) -> bool:
    """Whether each row's numbers are one and the same."""
    if not ratios.numel():
        return True
    high, low = ratios.amax(-1), ratios.amin(-1)
    return bool((high - low <= SAME * high.abs()).all())


def check_accepted(
    entry: MethodEntry, options: Mapping[str, Any], slots: Sequence[int], donor: Sequence[int]
) -> None:
    """Let the method refuse a client now that it would refuse at the end.

    Raises:
        HetLoRAError: what the method has against these slots beside those of the donor.
    """
    refusal: HetLoRAError | None = None
    for donors in DONORS:
        everybody = [slots, *[donor] * donors]
        ones = [1.0] * len(everybody)
        try:
            ask(entry, options, Question(everybody, ones, ones))
        except HetLoRAError as error:
            refusal = refusal or error
        else:
            return
    assert refusal is not None
    raise refusal
