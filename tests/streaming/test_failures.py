"""Whatever fails, and wherever: the state is what it was, or refuses to go on."""

import json

import pytest
import torch

from hetlora_agg.errors import InputValueError
from hetlora_agg.streaming import (
    RunningAggregate,
    added,
    arriving,
    bounded,
    frozen,
    group,
    merging,
    products,
    taking,
)
from hetlora_agg.streaming.checkpoint import dump
from hetlora_agg.streaming.files import checksum
from streamed import LEVELS, clients_for, filled

TOOLS = {
    "torch.cat": (torch, "cat"),
    "torch.stack": (torch, "stack"),
    "torch.zeros": (torch, "zeros"),
    "torch.tensor": (torch, "tensor"),
    "admit": (arriving, "admit"),
    "collect": (arriving, "collect"),
    "digest": (arriving, "digest_of"),
    "ask": (taking, "check_accepted"),
    "copied": (taking, "copied"),
    "sums begin": (taking, "begin_sums"),
    "terms": (added, "terms_of"),
    "wider": (added, "wider"),
    "cut": (bounded, "leading_svd"),
    "replace": (group, "replace"),
    "factor": (frozen, "shared_factor"),
    "merged factor": (merging, "shared_factor"),
    "joined": (added, "joined"),
}


class Injected(Exception):
    """What the tools fail with."""


def failing(monkeypatch, place, name, when):
    """Make a tool fail at its call number ``when``; tells whether it was reached."""
    real, calls = getattr(place, name), [0]

    def tool(*args, **kwargs):
        calls[0] += 1
        if calls[0] == when:
            raise Injected
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, tool)
    return lambda: calls[0] >= when


def picture(running):
    """Everything that a file would have, as one number."""
    tensors, data = dump(running._settings, running._state)
    return checksum(tensors, json.dumps(data, sort_keys=True))


def refuse_everywhere(change, running, monkeypatch, tmp_path):
    """Let each tool fail at each of its calls during the change; the state must not move."""
    before = picture(running)
    path = running.save(tmp_path / "before")
    reached = set()
    for label, (place, name) in TOOLS.items():
        for when in range(1, 400):
            with monkeypatch.context() as patched:
                was = failing(patched, place, name, when)
                try:
                    change(running)
                except Injected:
                    reached.add(label)
                else:
                    assert not was()
                    break
            assert picture(running) == before, (label, when)
        # It went through for once: begin anew.
        running.__dict__.update(RunningAggregate.load(path).__dict__)
        assert picture(running) == before
    return reached


def before(event, name, clients, **told):
    """A running aggregate and the client with which something happens to it."""
    running = filled(name, [], **told)
    for k, own in enumerate(clients):
        one = summary(running)
        running.add(own, id=k)
        if event(*one, *summary(running)):
            return filled(name, clients[:k], **told), own
    raise AssertionError("it never happens")


def summary(running):
    """Whether everybody is kept, and how many components were multiplied out."""
    groups = running._state.groups.values()
    return running._state.kept is not None, max((g.added.terms for g in groups), default=0)


EVENTS = {
    "kept": lambda kept, terms, still, more: still,
    "sums begin": lambda kept, terms, still, more: kept and not still,
    "product": lambda kept, terms, still, more: more > terms,
    "second product": lambda kept, terms, still, more: more > terms > 0,
}

SMALL = {"q": (9, 7), "v": (6, 8)}
CASES = [
    ("kept", "flexlora", {}, SMALL, {"admit", "collect", "digest", "torch.stack", "torch.cat"}),
    ("kept", "flora", {}, {"q": (90, 70)}, {"copied"}),
    ("sums begin", "flexlora", {}, SMALL, {"sums begin", "collect"}),
    ("product", "flexlora", {}, SMALL, {"terms", "torch.zeros", "torch.cat"}),
    ("product", "rb", {"levels": LEVELS}, SMALL, {"terms", "torch.tensor", "torch.zeros"}),
    ("second product", "flexlora", {}, SMALL, {"terms", "wider"}),
    ("second product", "ffa", {}, SMALL, {"wider", "terms", "factor"}),
    ("second product", "flexlora", {"memory_limit": 9_000}, {"q": (30, 20)}, {"cut", "joined"}),
]


@pytest.mark.parametrize(("event", "name", "told", "sizes", "expected"), CASES)
def test_a_failed_add_leaves_the_state(event, name, told, sizes, expected, monkeypatch, tmp_path):
    clients = clients_for(name, sizes=sizes, count=66)
    running, own = before(EVENTS[event], name, clients, **told)

    def add(one):
        one.add(own, id="new")

    reached = refuse_everywhere(add, running, monkeypatch, tmp_path)
    assert expected <= reached, expected - reached


@pytest.mark.parametrize(
    ("name", "told", "parts"),
    [
        ("flexlora", {}, (25, 33)),
        ("flexlora", {}, (1, 33)),
        ("flexlora", {}, (32, 33)),
        ("ffa", {}, (20, 33)),
        ("flexlora", {"memory_limit": 30_000}, (20, 33)),
    ],
)
def test_a_failed_merge_leaves_both(name, told, parts, monkeypatch, tmp_path):
    clients = clients_for(name, sizes={"q": (9, 7)} if not told else {"q": (60, 70)}, count=33)
    middle, end = parts
    running, other = (
        filled(name, part, **told) for part in (clients[:middle], clients[middle:end])
    )
    theirs = picture(other)

    def merge(one):
        one.merge(other)

    assert refuse_everywhere(merge, running, monkeypatch, tmp_path)
    assert picture(other) == theirs


def test_a_change_that_breaks_off_halfway_is_never_gone_on_with(monkeypatch, tmp_path):
    clients = clients_for("flexlora", sizes={"q": (9, 7)})
    running = filled("flexlora", clients[:26])
    path = running.save(tmp_path / "s")

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(products.Product, "adding_to", lambda *_: interrupted)
        with pytest.raises(KeyboardInterrupt):
            running.merge(filled("flexlora", clients[26:]))
    for use in (
        running.result,
        lambda: running.bound,
        lambda: running.add(clients[0], id="x"),
        lambda: running.save(path),
        lambda: filled("flexlora", clients[:1]).merge(running),
    ):
        with pytest.raises(InputValueError, match=r"broke off in the middle.*KeyboardInterrupt"):
            use()
    assert RunningAggregate.load(path).result()
