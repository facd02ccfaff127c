"""A client counts once: duplicates, forgeries, other rounds, rosters, removal, adapters."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, aggregate, aggregate_layers
from hetlora_agg.adapters import Adapter
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.streaming import RunningAggregate
from streamed import LEVELS, assert_same, clients_for, filled, one_shot, total64


@pytest.mark.parametrize("summed", [False, True])
def test_a_duplicate_changes_nothing_and_other_content_is_refused(summed):
    clients = clients_for("flexlora")[: None if summed else 1]
    running = filled("flexlora", clients)
    assert (running._state.kept is None) == summed
    before = running.result()
    # Equal numbers in other memory are the same content.
    same = {k: replace(u, A=u.A.mT.contiguous().mT, B=u.B.numpy()) for k, u in clients[0].items()}
    assert running.add(same, id=0) is False
    for change in ({"weight": 9.0}, {"scaling": 0.5}, {"A": clients[0]["q"].A * 2}):
        other = {k: replace(u, **change) for k, u in clients[0].items() if "A" not in change}
        other = other or {**clients[0], "q": replace(clients[0]["q"], **change)}
        with pytest.raises(InputValueError, match="client 0 was added before with other content"):
            running.add(other, id=0)
    after = running.result()
    assert all(torch.equal(before[k].A, after[k].A) for k in before)
    assert len(running.receipts) == len(clients)


def test_the_callers_tensors_may_change_afterwards():
    for count in (1, 33):
        clients = clients_for("flexlora", count=count, dtype=torch.float32)
        for own in clients:
            for layer, u in own.items():
                own[layer] = replace(u, scaling=1.0)
        running, expected = filled("flexlora", clients), one_shot("flexlora", clients)
        for own in clients:
            for u in own.values():
                u.A.fill_(float("nan")), u.B.fill_(float("nan"))
        for layer, result in running.result().items():
            assert np.allclose(total64(result), total64(expected[layer]), atol=1e-4)


@pytest.mark.parametrize("id", [None, True, 1.5, ("a", 1)])
def test_ids_have_to_survive_a_checkpoint(id):
    with pytest.raises(InputTypeError, match="id: expected a string or an integer"):
        RunningAggregate("flora").add((torch.ones(1, 2), torch.ones(2, 1)), id=id)


def test_other_rounds():
    update = (torch.ones(1, 2), torch.ones(2, 1))
    strict, lenient = (
        RunningAggregate("flora", round=3),
        RunningAggregate("flora", round=3, stale="skip"),
    )
    for late in (2, 4):
        with pytest.raises(InputValueError, match=f"trained in round {late}, this is round 3"):
            strict.add(update, id="a", round=late)
        assert lenient.add(update, id="a", round=late) is False
    assert dict(lenient.late) == {"a": 4}
    assert not strict.receipts
    assert not lenient.receipts
    # Started again, it is as good as any.
    assert lenient.add(update, id="a", round=3)
    with pytest.raises(InputValueError, match="this is round None"):
        RunningAggregate("flora").add(update, id="a", round=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rb", {"weight_cap": 0.05}),
        ("rb", {"floor": 0.5, "quorum": 20, "weight_cap": 0.04}),
        ("rb", {"align": "svd"}),
        ("raflora", {"weight_cap": 0.05, "levels": LEVELS}),
        ("rbla", {"quorum": 12, "weight_cap": 0.05}),
        ("fedsa", {"weight_cap": 0.05}),
        ("shared_a", {"weight_cap": 0.05}),
        ("flexlora", {}),
        ("replicate", {}),
        ("hetlora", {}),
        ("fedex", {}),
    ],
)
def test_a_roster_makes_one_sum_of_every_method(name, options):
    clients = clients_for(name)
    roster = [(u.id, u.A.shape[-2], u.weight) for u in (own["q"] for own in clients)]
    running = filled(name, clients[:-1], roster=roster[::-1], **options)
    with pytest.raises(InputValueError, match=r"on the roster but not here: 32"):
        running.result()
    running.add(clients[-1], id=32)
    assert running._state.kept is None
    for group in running._state.groups.values():
        assert len(group.added.products) <= 1
    expected = one_shot(name, clients, **options)
    assert_same(running.result(), expected, clients)
    one, two = (filled(name, part, roster=roster, **options) for part in (clients[:5], clients[5:]))
    one.merge(two)
    assert_same(one.result(), expected, clients)


@pytest.mark.parametrize("missing", ["zero", "renormalise"])
def test_a_roster_by_layer(missing):
    clients = clients_for("rb")
    for k, gone in ((2, "q"), (5, "v"), (9, "q")):
        del clients[k][gone]
    roster = [
        (k, {layer: u.A.shape[-2] for layer, u in own.items()}, next(iter(own.values())).weight)
        for k, own in enumerate(clients)
    ]
    options = {"floor": 0.5, "weight_cap": 0.05}
    running = filled("rb", clients, roster=roster, missing=missing, **options)
    expected = one_shot("rb", clients, missing=missing, **options)
    assert_same(running.result(), expected, clients)


def test_who_is_not_what_the_roster_says_is_refused():
    running = RunningAggregate("rb", roster=[("a", 2, 10), ("b", 1, 0), ("c", {"q": 1}, 5)])
    A, B = torch.ones(2, 3), torch.ones(4, 2)

    def refused(match, update, id):
        with pytest.raises(InputValueError, match=match):
            running.add({"q": update}, id=id)

    refused("'d' is not on the roster", ClientUpdate(A, B, weight=10), "d")
    refused("weight 11, on the roster 10", ClientUpdate(A, B, weight=11), "a")
    refused(
        "rank 1 in slots 0 to 0, on the roster rank 2",
        ClientUpdate(A[:1], B[:, :1], weight=10),
        "a",
    )
    refused(r"rank 2 in slots \[0, 2\]", ClientUpdate(A, B, weight=10, slots=(0, 2)), "a")
    with pytest.raises(InputValueError, match="layer 'v' is not on its roster row"):
        running.add({k: ClientUpdate(A[:1], B[:, :1], weight=5) for k in "qv"}, id="c")
    assert not running.receipts
    for rows, match in (
        ([("a", 1)], "expected .id, rank, weight."),
        ([("a", 1, 1), ("a", 1, 1)], "'a' is there twice"),
        ([("a", 1, 0)], "expected a client of positive weight"),
        ([("a", 0, 1)], "at least 1"),
        ([("a", 1, float("nan"))], "finite number"),
    ):
        with pytest.raises((InputTypeError, InputValueError), match=match):
            RunningAggregate("rb", roster=rows)


@pytest.mark.parametrize("kind", ["mapping", "pairs", "function"])
@pytest.mark.parametrize("roster", [False, True])
def test_removal_adds_the_others_again(kind, roster):
    clients = clients_for("flexlora")
    # Next to this one the others are rounding, which no subtraction would bring back.
    clients[3] = {k: replace(u, weight=1e12, B=1e6 * u.B) for k, u in clients[3].items()}
    told = {}
    if roster:
        told["roster"] = [(u.id, u.A.shape[-2], u.weight) for u in (c["q"] for c in clients)]
    running = filled("flexlora", clients, **told)
    known = {own["q"].id: own for own in clients}
    source = {
        "mapping": known,
        "pairs": [*reversed(known.items()), ("stranger", None)],
        "function": known.get,
    }[kind]
    left = running.without([3, 7], source)
    others = [own for k, own in known.items() if k not in (3, 7)]
    assert_same(left.result(), one_shot("flexlora", others), others)
    assert_same(running.result(), one_shot("flexlora", clients), clients)
    with pytest.raises(InputValueError, match="never added: 'x'"):
        running.without(["x"], source)
    short = {k: own for k, own in known.items() if k != 11}
    with pytest.raises(InputValueError, match="the source lacks 11"):
        running.without([3], short)
    forged = known | {11: {k: replace(u, A=-u.A) for k, u in known[11].items()}}
    with pytest.raises(InputValueError, match="client 11: the source has other content"):
        running.without([3], forged)


def test_merging_counts_nobody_twice():
    clients = clients_for("flexlora")
    big, also = filled("flexlora", clients[:20]), filled("flexlora", clients[15:])
    with pytest.raises(InputValueError, match="client 15 is in the sums of both"):
        big.merge(also)
    assert big._state.kept is None
    small = filled("flexlora", clients[19:20])
    assert small._state.kept is not None
    big.merge(small)
    assert len(big.receipts) == 20
    small.merge(filled("flexlora", clients[:20]))
    assert_same(small.result(), one_shot("flexlora", clients[:20]), clients)
    assert_same(big.result(), one_shot("flexlora", clients[:20]), clients)
    forged = filled("flexlora", [{k: replace(u, A=-u.A) for k, u in clients[0].items()}])
    for one, two in ((big, forged), (forged, big)):
        with pytest.raises(InputValueError, match="added to both with different content"):
            one.merge(two)


def test_merging_refuses_other_settings_and_sizes():
    def one(**told):
        return filled("flexlora", clients_for("flexlora", count=2), **told)

    base = one(round=1)
    for told, match in (
        ({"round": 2}, "round"),
        ({"round": 1, "missing": "zero"}, "missing"),
        ({"round": 1, "rank": 2}, "options"),
        ({"round": 1, "memory_limit": 10**9}, "memory_limit"),
    ):
        with pytest.raises(InputValueError, match=f"merge: {match} differ"):
            base.merge(one(**told))
    other = RunningAggregate("flexlora", round=1)
    other.add({"q": (torch.ones(1, 3), torch.ones(2, 1))}, id="x")
    with pytest.raises(InputValueError, match=r"layer 'q': expected \(9, 7\) on cpu, got \(2, 3\)"):
        base.merge(other)
    with pytest.raises(InputTypeError, match="expected a RunningAggregate, got dict"):
        base.merge({})
    single = RunningAggregate("flexlora", round=1)
    single.add((torch.ones(1, 3), torch.ones(2, 1)), id="x")
    with pytest.raises(InputValueError, match="one side has single updates"):
        base.merge(single)


def test_adapters_and_state_dicts():
    g = torch.Generator().manual_seed(0)
    plain, sent = [], []
    for k, r in enumerate((2, 4) * 9):
        A, B = torch.randn(r, 7, generator=g), torch.randn(9, r, generator=g)
        state = {"l.q_proj.lora_A.weight": A, "l.q_proj.lora_B.weight": B}
        sent.append((state, {"r": r, "lora_alpha": 8, "target_modules": ["q_proj"]}))
        plain.append(ClientUpdate(A, B, weight=k + 1, scaling=8 / r, id=k))
    expected = aggregate_layers({"l.q_proj": plain}, "flexlora")["l.q_proj"]
    for kind in ("adapter", "config", "scaling"):
        running = RunningAggregate("flexlora")
        for k, (state, config) in enumerate(sent):
            if kind == "adapter":
                assert running.add(Adapter.from_state_dict(state, config), id=k, weight=k + 1)
            elif kind == "config":
                assert running.add(state, id=k, weight=k + 1, config=config)
            else:
                numbers = {key: X.numpy() for key, X in state.items()}
                assert running.add(numbers, id=k, weight=k + 1, scaling=8 / config["r"])
        (found,) = running.result().values()
        assert np.allclose(total64(found), total64(expected), atol=1e-5)
        assert list(running.result()) == ["l.q_proj"]
    # The other way round: state for the next round from an adapter.
    previous = Adapter.from_state_dict(*sent[1])
    RunningAggregate("rb", previous=previous, levels=[2, 4]).add(
        Adapter.from_state_dict(*sent[0]), id=0
    )


def test_what_add_does_not_take():
    A, B = torch.ones(1, 2), torch.ones(3, 1)
    running = RunningAggregate("flexlora")
    state = {"q.lora_A.weight": A, "q.lora_B.weight": B}
    for update, told, error, match in (
        ((A, B), {"weight": 2}, InputTypeError, "a ClientUpdate has its own"),
        ((A, B), {"scaling": 2}, InputTypeError, "go with a state dict"),
        (state, {}, InputValueError, "expected a config or scalings"),
        ({**state, "head.weight": A}, {"scaling": 1.0}, InputValueError, "head"),
        ({}, {}, (InputTypeError, InputValueError), "."),
        ({1: (A, B)}, {}, InputTypeError, "layers by name, got 1"),
        ({"": (A, B)}, {}, InputTypeError, "layers by name, got ''"),
        ({"q": A, "v": (A, B)}, {}, InputTypeError, "expected a ClientUpdate"),
        ({"q": (A, B), "v": (A, B, 1, 2.0)}, {}, InputValueError, "one weight in all its layers"),
        ((A, B.mT), {}, InputValueError, "looks transposed"),
        ((A * float("inf"), B), {}, InputValueError, "NaN or Inf entries"),
    ):
        with pytest.raises(error, match=match):
            running.add(update, id="a", **told)
    assert not running.receipts
    with pytest.raises(InputValueError, match="no client updates; add at least one"):
        running.result()
    running.add((A, B), id="a")
    with pytest.raises(InputTypeError, match="expected one update as from the clients before"):
        running.add({"q": (A, B)}, id="b")
    with pytest.raises(InputValueError, match=r"expected .* = \(3, 2\) on cpu as the others have"):
        running.add((torch.ones(1, 3), B), id="b")


def test_what_the_method_would_refuse_in_the_end_is_refused_at_once():
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    levels = RunningAggregate("raflora", levels=[1, 2])
    with pytest.raises(InputValueError, match="has rank 3, not one of the levels"):
        levels.add((torch.ones(3, 3), torch.ones(4, 3)), id=0)
    with pytest.raises(InputValueError, match="fills slots"):
        levels.add(ClientUpdate(A, B, slots=(0, 3)), id=0)
    equal = RunningAggregate("fedit")
    equal.add((A, B), id=0)
    with pytest.raises(InputValueError, match="expected clients of equal rank"):
        equal.add((A[:1], B[:, :1]), id=1)
    frozen = RunningAggregate("ffa")
    frozen.add((A, B), id=0)
    frozen.add((A[:1], B[:, :1]), id=1)
    with pytest.raises(InputValueError, match="client 2: lora_A in slot 1 is not that of"):
        frozen.add((torch.tensor([[1.0, 1, 1], [1, 1, 2]]), B), id=2)
    assert len(frozen.receipts) == 2
    with pytest.raises(InputValueError, match="previous= needs levels="):
        RunningAggregate("raflora", previous={}).add({"q": (A, B)}, id=0)


def test_slots_without_a_common_denominator_are_refused_at_the_latest_when_sums_begin():
    clients = clients_for("rb")
    bare = filled("rb", clients[:1])
    refusal = None
    for own in clients[1:]:
        try:
            bare.add(own, id=own["q"].id)
        except InputValueError as error:
            refusal = error
            break
    assert "start with levels=" in str(refusal)
    assert "or with roster=" in str(refusal)
    kept = len(bare.receipts)
    assert_same(bare.result(), one_shot("rb", clients[:kept]), clients)
    for count in (1, 33):
        running = filled(
            "rb", [own for own in clients[:count] if own["q"].A.shape[0] != 2], levels=[1, 4]
        )
        with pytest.raises(InputValueError, match=r"one of the levels \[1, 4\]; add its rank"):
            running.add(clients[1], id="two")


def test_a_cap_takes_a_roster():
    with pytest.raises(InputValueError, match="beforehand with roster="):
        RunningAggregate("rb", weight_cap=0.5)


def test_one_by_hand_with_a_roster():
    """γ = (min(4, t), min(1, t)) with τ = 1/2: both count alike, so the mean is [2 1]."""
    running = RunningAggregate("rb", roster=[("a", 1, 4.0), ("b", 1, 1.0)], weight_cap=0.5)
    one = torch.ones(1, 1)
    running.add(ClientUpdate(torch.tensor([[3.0, 0.0]]), one, weight=4.0), id="a")
    running.add(ClientUpdate(torch.tensor([[1.0, 2.0]]), one, weight=1.0), id="b")
    total = running.result().total().dense()
    assert torch.allclose(total, torch.tensor([[2.0, 1.0]]))
    assert aggregate is not None
