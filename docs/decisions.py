"""The tables of choosing.md: which methods meet a need, from their claims and from small trials.

What a method claims is read off ``METHODS``. What no claim says (whether sums of factors determine
the result, whether one client can spoil it) is tried on a few small clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetlora_agg import (
    METHODS,
    AggregationResult,
    ClientUpdate,
    InputValueError,
    LowRank,
    MethodEntry,
    aggregate,
)

OUT, IN = 7, 6
RANKS = (1, 2, 2, 3, 3)

Answer = str | None
"""None: the need is not met. Empty: it is. Anything else: the options under which it is."""


def random(*shape: int, seed: int) -> Tensor:
    """Normal numbers in float64 from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def last_round(rank: int = 3) -> LowRank:
    """Factors of a round before."""
    return LowRank(random(rank, IN, seed=90), random(OUT, rank, seed=91))


def options(entry: MethodEntry) -> dict[str, Any]:
    """What a method cannot do without, and no truncation where that is a choice."""
    state = {
        "previous": last_round(),
        "round": 1,
        "generator": torch.Generator().manual_seed(0),
    }
    full = {"rank": "full"} if "rank" in entry.options else {}
    return full | {name: state[name] for name in entry.needs}


def clients(entry: MethodEntry, shift: float = 0.0, factor: float = 1.0) -> list[ClientUpdate]:
    """Five clients of ranks 1 to 3 with equal weights.

    Args:
        entry: its common factor, if it has one, is common here.
        shift: what two clients of equal rank exchange: the sums of their factors stay.
        factor: on the last client's B.
    """
    common = entry.unscaled_factor(options(entry)) if entry.common else None
    updates = []
    for k, rank in enumerate(RANKS):
        A = random(3, IN, seed=80)[:rank] if common == "A" else random(rank, IN, seed=k)
        B = random(OUT, 3, seed=81)[:, :rank] if common == "B" else random(OUT, rank, seed=10 + k)
        sign = {1: shift, 2: -shift}.get(k, 0.0)
        if common != "A":
            A = A + sign * random(rank, IN, seed=82)
        if common != "B":
            B = B + sign * random(OUT, rank, seed=83)
        updates.append(ClientUpdate(A, B * (factor if k == len(RANKS) - 1 else 1.0)))
    return updates


def tried(entry: MethodEntry, updates: list[ClientUpdate], **more: Any) -> AggregationResult | None:
    """The result, or None if the method refuses these clients."""
    try:
        return aggregate(updates, entry.name, **options(entry) | more)
    except InputValueError:
        return None


def claimed(claim: str) -> Callable[[MethodEntry], Answer]:
    """The answer a claim gives."""

    def answer(entry: MethodEntry) -> Answer:
        if claim not in entry.claims:
            return None
        under = [f"`{k}={v!r}`" for k, v in entry.claims[claim].items()]
        if entry.common:
            under.append(f"{entry.unscaled_factor(options(entry))} common to all clients")
        if "mixed_ranks" not in entry.claims:
            under.append("equal ranks only")
        return ", ".join(under)

    return answer


def needs_sums_only(entry: MethodEntry) -> Answer:
    """The clients' messages of one shape add up to the result: `secure.linear_message`."""
    return "" if entry.sums in ("factors", "sketches") else None


def withstands_one(entry: MethodEntry) -> Answer:
    """One client in five sends a million times as much; the result stays of the usual size."""
    usual, spoilt = tried(entry, clients(entry)), tried(entry, clients(entry, factor=1e6))
    if usual is None or spoilt is None:
        return None
    sizes = [float(result.total().dense().norm()) for result in (usual, spoilt)]
    return "" if sizes[1] < 100 * sizes[0] else None


def keeps_idle_slots(entry: MethodEntry) -> Answer:
    """Nobody fills the third slot; what it had last round is in the total still."""
    if "previous" not in entry.options:
        return None
    whole = last_round()
    few = clients(entry)[:3]
    configured = {"levels": sorted(set(RANKS))} if "levels" in entry.options else {}
    without = LowRank(whole.A[:2], whole.B[:, :2])
    kept, gone = (tried(entry, few, previous=p, **configured) for p in (whole, without))
    if kept is None or gone is None:
        return None
    gained = kept.total().dense() - gone.total().dense()
    same = torch.allclose(gained, whole.select([2]).dense(), rtol=1e-8, atol=1e-8)
    return ", ".join(f"`{name}=`" for name in ("previous", *configured)) if same else None


def needs_no_state(entry: MethodEntry) -> Answer:
    """The server may forget everything between two rounds."""
    return None if entry.needs else ""


def adapters_only(entry: MethodEntry) -> Answer:
    """Every client gets its leading slots and nobody touches a base weight."""
    result = tried(entry, clients(entry))
    sliced = result is not None and result.nested and result.residual is None
    return "" if sliced and entry.client not in ("restart", "select", "qr_start") else None


def one_factor(entry: MethodEntry) -> Answer:
    """Only one of A and B is sent in a round, the other is common or stays at home."""
    return "" if entry.client in ("train_B", "alternate", "keep_B") else None


def own_B(entry: MethodEntry) -> Answer:
    """Clients share A and go on with a B of their own."""
    return "" if entry.client == "keep_B" else None


class Need(NamedTuple):
    """A line of the decision table, a column of the matrix."""

    short: str
    text: str
    answer: Callable[[MethodEntry], Answer]


NEEDS = (
    Need("exact", "The result must be the exact mean of what was sent.", claimed("exact")),
    Need(
        "undiluted",
        "High ranks must not be diluted: a slot that a client lacks counts as missing, not as "
        "zero.",
        claimed("consensus"),
    ),
    Need(
        "idle",
        "A round in which nobody trains must shrink nothing.",
        claimed("idle_kept"),
    ),
    Need(
        "noise",
        "The result must be unbiased whatever the noise of the clients' components.",
        claimed("statistical"),
    ),
    Need(
        "any basis",
        "Clients may write one update in different bases: own inits, own optimisers.",
        claimed("gauge"),
    ),
    Need(
        "split",
        "A client that splits in two, half its weight each, must change nothing.",
        claimed("split_client"),
    ),
    Need(
        "idle slots",
        "Slots may be missing in a round and must keep what they had.",
        keeps_idle_slots,
    ),
    Need("stateless", "The server must need nothing from the last round.", needs_no_state),
    Need(
        "adapters",
        "Adapters only: clients take their leading slots, no base weight is touched.",
        adapters_only,
    ),
    Need("one factor", "Only one of A and B may be trained and sent in a round.", one_factor),
    Need("own B", "Clients keep a B of their own (personalisation).", own_B),
    Need(
        "sums",
        "The server sees sums over clients only, as under secure aggregation.",
        needs_sums_only,
    ),
    Need("one bad", "One client that sends nonsense must not decide the result.", withstands_one),
)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def answers(need: Need) -> Iterator[tuple[str, Answer]]:
    """Every method's answer, by name."""
    for name, entry in sorted(METHODS.items()):
        yield name, need.answer(entry)


def decisions() -> str:
    """One line per need: who meets it."""
    rows = []
    for need in NEEDS:
        met = [
            f"[`{name}`](methods.md#{name})" + (f" ({answer})" if answer else "")
            for name, answer in answers(need)
            if answer is not None
        ]
        rows.append([need.text, ", ".join(met)])
    return markdown(["you need", "methods"], rows)


def decision_matrix() -> str:
    """One line per method: yes, yes with an option, or no."""
    columns = [dict(answers(need)) for need in NEEDS]
    rows = [
        [
            f"[`{name}`](methods.md#{name})",
            *("–" if c[name] is None else "(✓)" if c[name] else "✓" for c in columns),
        ]
        for name in sorted(METHODS)
    ]
    return markdown(["method", *(need.short for need in NEEDS)], rows)


TABLES: dict[str, Callable[[], str]] = {f.__name__: f for f in (decisions, decision_matrix)}
