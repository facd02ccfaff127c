"""What adapters hold besides factors, added up client by client: means, policies, restarts."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetlora_agg.adapters import Adapter, aggregate_state_dicts
from hetlora_agg.errors import InputTypeError, InputValueError, MemoryLimitError
from hetlora_agg.streaming import RunningAggregate, as_adapters
from hetlora_agg.streaming.checkpoint import dump
from hetlora_agg.streaming.files import checksum

STEM = "base_model.model."
HEAD, BIAS, EMBEDDED, STEPS = "score.weight", "q.lora_B.bias", "embed_tokens.weight", "score.steps"
CONFIG = {"peft_type": "LORA", "lora_alpha": 6, "lora_bias": True, "modules_to_save": ["score"]}


def parts(k, r=2, without=(), **changed):
    """State dict and config of a client: factors of rank r, a head, a bias, base tensors."""
    g = torch.Generator().manual_seed(k)
    tensors = {
        "q.lora_A.weight": torch.randn(r, 5, generator=g),
        "q.lora_B.weight": torch.randn(4, r, generator=g),
        BIAS: torch.randn(4, generator=g),
        HEAD: torch.randn(3, 5, generator=g),
        STEPS: torch.tensor([7, 8]),
        EMBEDDED: torch.arange(12.0).reshape(3, 4),
    } | changed
    return {STEM + key: X for key, X in tensors.items() if key not in without}, {**CONFIG, "r": r}


def sent(k, r=2, without=(), **changed):
    return Adapter.from_state_dict(*parts(k, r, without, **changed), name=f"client {k}")


RANKS = (2, 4, 1, 2, 3, 2, 1)
WEIGHTS = (1.0, 2.5, 0.3, 7.0, 1.0, 0.0, 4.0)


def everybody(**told):
    return {f"c{k}": sent(k, r, **told) for k, r in enumerate(RANKS)}


def filled(clients, weights=WEIGHTS, method="flexlora", **told):
    running = RunningAggregate(method, **told)
    for (id, adapter), weight in zip(clients.items(), weights, strict=False):
        running.add(adapter, id=id, weight=weight)
    return running


def mean(clients, weights, key, absent_count=False):
    """``Σ w x / Σ w`` entry by entry, without rounding in between; biases with their scaling."""
    own = [(w, a) for w, a in zip(weights, clients.values(), strict=False) if w]
    terms = [
        (w * (a.scaling("q") if key == BIAS else 1.0), a.tensor(a.extras[key]).double().numpy())
        for w, a in own
        if key in a.extras
    ]
    total = math.fsum(w for w, a in own if absent_count or key in a.extras)
    columns = zip(*((w * X).ravel() for w, X in terms), strict=True)
    return np.array([math.fsum(c) / total for c in columns]).reshape(terms[0][1].shape)


def assert_is(found, wanted):
    """Equal but for the float32 that is handed out and what float64 loses on the way."""
    assert found.dtype == torch.float32
    assert np.all(np.abs(found.double().numpy() - wanted) <= 2**-24 * np.abs(wanted) + 1e-15)


def test_every_tensor_is_the_weighted_mean():
    clients = everybody()
    running = filled(clients)
    assert running._state.kept is None
    found = running.extras()
    assert sorted(found) == sorted([HEAD, BIAS, EMBEDDED, STEPS])
    for key in (HEAD, BIAS):
        assert_is(found[key], mean(clients, WEIGHTS, key))
    assert torch.equal(found[STEPS], torch.tensor([7, 8]))
    assert torch.equal(found[EMBEDDED], torch.arange(12.0).reshape(3, 4))


def test_one_by_hand():
    """(3·[1 5] + 1·[5 1]) / 4 = [2 4]; biases 3/1·… : (3·6·1 + 1·3·2) / 4 = 6."""
    one = sent(0, 1, **{"score.weight": torch.tensor([[1.0, 5.0]]), BIAS: torch.ones(4)})
    two = sent(1, 2, **{"score.weight": torch.tensor([[5.0, 1.0]]), BIAS: 2 * torch.ones(4)})
    found = filled({"a": one, "b": two}, (3.0, 1.0)).extras()
    assert found[HEAD].tolist() == [[2.0, 4.0]]
    assert found[BIAS].tolist() == [6.0] * 4


def test_the_same_bits_as_everybody_at_once():
    clients = everybody()
    given = {id: parts(k, r) for k, (id, r) in enumerate(zip(clients, RANKS, strict=True))}
    at_once = aggregate_state_dicts(
        {id: state for id, (state, _) in given.items()},
        {id: config for id, (_, config) in given.items()},
        weights=dict(zip(clients, WEIGHTS, strict=True)), method="flexlora",
    )  # fmt: skip
    found = as_adapters(filled(clients), clients)
    for name, (_, value) in at_once.extras.items():
        assert torch.equal(found.extras[name][1], value)
    assert list(found.adapter.keys) == list(at_once.adapter.keys)
    for id in clients:
        mine, wanted = found.client(id).state_dict(), at_once.client(id).state_dict()
        assert list(mine) == list(wanted)
        for key, X in wanted.items():
            assert torch.allclose(mine[key], X, atol=1e-5)
    few = dict(list(clients.items())[:1])
    kept = filled(few)
    assert kept._state.kept is not None
    state = as_adapters(kept, few, ranks=[1]).state_dicts()
    wanted = aggregate_state_dicts(
        [given[id][0] for id in few], [given[id][1] for id in few], weights=WEIGHTS[:1],
        method="flexlora", ranks=[1],
    ).state_dicts()  # fmt: skip
    for one, other in zip(state, wanted, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)


FOUR = dict(list(everybody().items())[:4])


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4), st.integers(0, 23))
def test_any_weights_any_order(weights, seed):
    clients = dict(list(FOUR.items())[: len(weights)])
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = list(clients)
    running = filled({ids[i]: clients[ids[i]] for i in order}, [weights[i] for i in order])
    for key in (HEAD, BIAS):
        assert_is(running.extras()[key], mean(clients, weights, key))


@pytest.mark.parametrize("huge", [1e308, 5e-324])
def test_extreme_weights_are_only_ratios(huge):
    clients = dict(list(everybody().items())[:3])
    for weights in permutations((huge, huge, huge)):
        for key in (HEAD, BIAS):
            assert_is(filled(clients, weights).extras()[key], mean(clients, (1, 1, 1), key))
    # The second is nothing beside the first, whichever comes first.
    for weights in ((1e308, 5e-324), (5e-324, 1e308)):
        two = dict(list(clients.items())[:2])
        alone = [1.0 if w > 1 else 0.0 for w in weights]
        assert_is(filled(two, weights).extras()[HEAD], mean(two, alone, HEAD))


def test_the_largest_numbers_add_up():
    top = torch.full((2, 2), torch.finfo(torch.float64).max, dtype=torch.float64)
    clients = {f"c{k}": sent(k, **{"score.weight": top}) for k in range(5)}
    found = filled(clients, [1.0] * 5).extras()[HEAD]
    assert torch.allclose(found, top, rtol=1e-15)


def test_a_client_counts_once():
    clients = everybody()
    running = filled(clients)
    before = running.extras()
    assert running.add(clients["c1"], id="c1", weight=WEIGHTS[1]) is False
    for name, X in ((HEAD, torch.zeros(3, 5)), (BIAS, torch.ones(4)), (STEPS, torch.ones(2))):
        with pytest.raises(InputValueError, match="'c1' was added before with other content"):
            running.add(sent(1, 4, **{name: X}), id="c1", weight=WEIGHTS[1])
    assert all(torch.equal(X, before[name]) for name, X in running.extras().items())


def state_of(running):
    tensors, data = dump(running._settings, running._whole())
    return checksum(tensors, repr(data))


REFUSED = {
    "another size": (sent(9, **{HEAD: torch.ones(2, 5)}), InputValueError, "one size"),
    "another kind": (sent(9, **{HEAD: torch.ones(3, 5).long()}), InputValueError, "one size"),
    "another base": (sent(9, **{EMBEDDED: torch.ones(3, 4)}), InputValueError, "base model"),
    "other bits": (sent(9, **{STEPS: torch.tensor([7, 9])}), InputValueError, "base model"),
    "an integer bias": (sent(9, **{BIAS: torch.ones(4).long()}), InputTypeError, "float dtype"),
    "no head": (sent(9, without=[HEAD]), InputValueError, "has no 'score.weight'"),
    "more": (sent(9, **{"score.bias": torch.ones(3)}), InputValueError, "clients before have not"),
    "NaN": (sent(9, **{HEAD: torch.full((3, 5), math.nan)}), InputValueError, "NaN or Inf"),
    "Inf in a bias": (sent(9, **{BIAS: torch.full((4,), math.inf)}), InputValueError, "NaN or Inf"),
}


@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_changes_nothing(what, count):
    running = filled(dict(list(everybody().items())[:count]))
    before = state_of(running)
    adapter, kind, match = REFUSED[what]
    with pytest.raises(kind, match=match):
        running.add(adapter, id="z", weight=1e9)
    assert state_of(running) == before


def test_a_full_disk_of_memory_leaves_the_sums(monkeypatch):
    running = filled(everybody())
    before = state_of(running)
    from hetlora_agg.streaming import besides, taking

    for place, name in ((besides, "weighed"), (taking, "check_room"), (taking, "added")):
        with monkeypatch.context() as patched:

            def full(*_, **__):
                raise MemoryError

            patched.setattr(place, name, full)
            with pytest.raises(MemoryError):
                running.add(sent(9), id="z", weight=3.0)
        assert state_of(running) == before
    assert running.add(sent(9), id="z", weight=3.0)


def test_who_lacks_a_tensor_counts_by_policy():
    clients = everybody() | {"z": sent(9, without=[HEAD, BIAS], **{"k.lora_A.weight": torch.ones(2, 5), "k.lora_B.weight": torch.ones(4, 2)})}  # noqa: E501  # fmt: skip
    weights = (*WEIGHTS, 3.0)
    found = filled(clients, weights, missing="renormalise").extras()
    assert_is(found[HEAD], mean(clients, weights, HEAD))
    assert_is(found[BIAS], mean(clients, weights, BIAS))
    with pytest.raises(InputValueError, match="missing='zero' has no meaning"):
        filled(clients, weights, missing="zero")
    clients["z"] = sent(9, without=[BIAS])
    found = filled(clients, weights, missing="zero").extras()
    assert_is(found[BIAS], mean(clients, weights, BIAS, absent_count=True))
    assert_is(found[HEAD], mean(clients, weights, HEAD))


def test_who_is_left_out_is_left_out_of_them_too():
    clients = everybody()
    clients["c3"] = sent(3, 2, **{HEAD: torch.full((3, 5), math.nan)})
    running = filled(clients, on_bad_client="drop")
    left = {id: a for id, a in clients.items() if id != "c3"}
    weights = [w for id, w in zip(clients, WEIGHTS, strict=True) if id != "c3"]
    for key in (HEAD, BIAS):
        assert_is(running.extras()[key], mean(left, weights, key))
    assert "NaN or Inf" in running.receipts["c3"].excluded
    outcome = as_adapters(running, clients)
    assert [id for id, _ in outcome.excluded] == ["c3"]
    only = RunningAggregate("flexlora", missing="renormalise")
    only.add(clients["c0"], id="c0", weight=0)
    only.add(sent(1, without=[HEAD]), id="c1")
    with pytest.raises(InputValueError, match="no client with a positive weight has these"):
        only.extras()


@pytest.mark.parametrize("cut", [1, 4])
def test_merged_and_restored_is_uninterrupted(cut, tmp_path):
    clients = everybody()
    whole = filled(clients)
    pairs = list(clients.items())
    one = filled(dict(pairs[:cut]), WEIGHTS[:cut])
    restored = RunningAggregate.load(one.save(tmp_path / "s"))
    assert state_of(restored) == state_of(one)
    for (id, adapter), weight in zip(pairs[cut:], WEIGHTS[cut:], strict=True):
        restored.add(adapter, id=id, weight=weight)
    assert all(torch.equal(X, restored.extras()[name]) for name, X in whole.extras().items())
    two = filled(dict(pairs[cut:]), WEIGHTS[cut:])
    theirs = state_of(two)
    one.merge(two)
    assert state_of(two) == theirs
    for key in (HEAD, BIAS):
        assert_is(one.extras()[key], mean(clients, WEIGHTS, key))
    assert torch.equal(one.extras()[STEPS], torch.tensor([7, 8]))
    with pytest.raises(InputValueError, match="'c0' is in both"):
        one.merge(filled(dict(pairs[:1]), WEIGHTS))


@pytest.mark.parametrize(
    ("other", "told", "match"),
    [
        (sent(9, **{HEAD: torch.ones(2, 5)}), {}, "expected shape"),
        (sent(9, **{EMBEDDED: torch.ones(3, 4)}), {}, "base model"),
        (sent(9, without=[HEAD]), {}, "has no 'score.weight'"),
        (sent(9, without=[HEAD]), {"missing": "zero"}, "has no meaning"),
    ],
)
def test_merging_refuses_what_adding_would(other, told, match):
    running = filled(everybody(), **told)
    before = state_of(running)
    with pytest.raises(InputValueError, match=match):
        running.merge(filled({"z": other}, [1.0], **told))
    assert state_of(running) == before
    assert filled({"z": other}, [1.0]).extras()


def test_removal_adds_the_others_again():
    clients = everybody()
    clients["c3"] = sent(3, 2, **{HEAD: torch.full((3, 5), 1e30)})
    left = filled(clients).without(["c3"], clients)
    others = {id: a for id, a in clients.items() if id != "c3"}
    assert_is(left.extras()[HEAD], mean(others, [*WEIGHTS[:3], *WEIGHTS[4:]], HEAD))
    forged = clients | {"c1": sent(1, 4, **{HEAD: torch.zeros(3, 5)})}
    with pytest.raises(InputValueError, match="'c1': the source has other content"):
        filled(clients).without(["c3"], forged)


def test_they_count_as_memory():
    clients = everybody()
    needed = filled(clients, memory_limit=10**6).state_bytes
    assert needed >= 8 * (15 + 4) + 4 * 12 + 8 * 2
    large = {id: sent(k, **{HEAD: torch.ones(300, 300)}) for k, id in enumerate(clients)}
    with pytest.raises(MemoryLimitError, match="besides the factors take 720096 bytes"):
        filled(large, memory_limit=700_000)
    assert filled(large, memory_limit=800_000).extras()[HEAD].shape == (300, 300)
    # What they leave is too little for exact sums, and enough for truncated ones.
    assert "summed up to rank 11" in repr(filled(large, memory_limit=722_000))


def test_dora_by_policy(tmp_path):
    def dora(k, magnitude=True):
        tensors, config = parts(k)
        if magnitude:
            tensors[f"{STEM}q.lora_magnitude_vector"] = torch.full((4,), 1.0 + k)
        return Adapter.from_state_dict(tensors, {**config, "use_dora": magnitude})

    with pytest.raises(InputValueError, match="is a DoRA adapter"):
        filled({"a": dora(0)})
    with pytest.raises(InputValueError, match="dora="):
        RunningAggregate("flexlora", dora="sum")
    clients = {id: dora(k) for k, id in enumerate("ab")}
    running = filled(clients, (1.0, 3.0), dora="mean")
    assert running.extras()["q.lora_magnitude_vector"].tolist() == [1.75] * 4
    for k, others in ((0, clients), (1, {"a": dora(0, False)})):
        one = filled(others, (1.0, 1.0), dora="mean", missing="renormalise")
        with pytest.raises(InputValueError, match="must train the same"):
            one.add(dora(9, magnitude=bool(k)), id="z")
    other = filled({"z": dora(9, False)}, (1.0,), dora="mean")
    with pytest.raises(InputValueError, match="must train the same"):
        running.merge(other)
    outcome = as_adapters(RunningAggregate.load(running.save(tmp_path / "s")), clients)
    assert "DoRA" in outcome.notes[0]
    assert outcome.adapter.config["use_dora"] is True


def test_adapters_of_a_running_aggregate_are_those_that_were_added():
    clients = everybody()
    running = filled(clients)
    with pytest.raises(InputValueError, match="no adapter of 'c6', who were added"):
        as_adapters(running, dict(list(clients.items())[:6]))
    with pytest.raises(InputValueError, match="never added: 'z'"):
        as_adapters(running, clients | {"z": sent(9)})
    for wrong in (3, [1], {"a": 3}):
        with pytest.raises(InputTypeError, match="expected a mapping of ids to Adapters"):
            as_adapters(running, wrong)
    with pytest.raises(InputTypeError, match="expected a RunningAggregate, got dict"):
        as_adapters({}, clients)
    single = RunningAggregate("flora")
    single.add((torch.ones(1, 2), torch.ones(2, 1)), id="c0")
    with pytest.raises(InputTypeError, match="single updates"):
        as_adapters(single, {"c0": clients["c0"]})
