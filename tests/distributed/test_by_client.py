"""Clients on several processes: merged or reduced, the answer is one process's."""

import math
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from hetlora_agg import InputTypeError, InputValueError, distributed
from hetlora_agg.adapters import Adapter
from hetlora_agg.distributed import by_client, together
from hetlora_agg.distributed.carrying import pack_state
from hetlora_agg.distributed.together import Together
from hetlora_agg.streaming import RunningAggregate
from processes import in_processes, results_of
from streamed import SIZES, STREAMING, assert_same, clients_for, filled, one_shot, told_for

COUNT = 40


def told(name):
    """What a running aggregate has to know to sum up this many clients."""
    return told_for(name) | ({"levels": [1, 2, 4]} if name in ("rb", "raflora") else {})


def roster_of(clients):
    """Who will come."""
    return [(own["q"].id, own["q"].A.shape[-2], own["q"].weight) for own in clients]


def shares(clients, size):
    """Every process's clients, of several counts and never one's next after another's."""
    return [clients[rank::size] for rank in range(size)]


def same_bits(found, expected):
    """Whether two processes' results are one and the same."""
    return all(
        torch.equal(found[layer].A, other.A) and torch.equal(found[layer].B, other.B)
        for layer, other in expected.items()
    )


def how(name, clients, rank, size, options):
    """A process's running aggregate."""
    return filled(name, shares(clients, size)[rank], **options)


def check(monkeypatch, name, clients, size, options, **expected_options):
    """Everybody's result is the one-shot one; nobody's running aggregate has changed."""
    held = []

    def work(rank):
        running = how(name, clients, rank, size, options)
        held.append(running._state.how)
        before = pack_state(running._state)
        found = distributed.result(running)
        assert torch.equal(pack_state(running._state), before)
        return found

    every = results_of(monkeypatch, size, work)
    expected = one_shot(name, clients, **expected_options)
    for found in every:
        assert_same(found, expected, clients)
        assert same_bits(found, every[0])
    return held


@pytest.mark.parametrize("name", STREAMING)
def test_sums_are_reduced_to_the_owners_of_layers(name, monkeypatch):
    clients = clients_for(name, COUNT)
    held = check(monkeypatch, name, clients, 2, told(name))
    assert held == ["summed"] * 2


@pytest.mark.parametrize("size", [1, 3, 5])
def test_more_processes_than_layers(size, monkeypatch):
    clients = clients_for("flexlora", COUNT * 2)
    held = check(monkeypatch, "flexlora", clients, size, {"rank": 3}, rank=3)
    assert set(held) == {"summed"}
    assert size < 4 or size > len(SIZES)


@pytest.mark.parametrize("name", ["flexlora", "rb", "hetlora", "zeropad"])
def test_some_processes_have_nobody(name, monkeypatch):
    clients = clients_for(name, COUNT)
    options = told(name)

    def work(rank):
        running = filled(name, clients if rank == 1 else [], **options)
        return distributed.result(running)

    for found in results_of(monkeypatch, 3, work):
        assert_same(found, one_shot(name, clients), clients)


def test_layers_that_some_processes_clients_lack(monkeypatch):
    for missing in ("zero", "renormalise"):
        for name in ("flexlora", "hetlora", "zeropad"):
            clients = clients_for(name, COUNT)
            for own in clients[1::2]:
                del own["k"]
            held = check(monkeypatch, name, clients, 2, {"missing": missing}, missing=missing)
            assert set(held) == {"summed"}


def test_a_roster_covers_all_processes(monkeypatch):
    clients = clients_for("rb", COUNT)
    options = {"roster": roster_of(clients), "floor": 0.2, "weight_cap": 0.5}
    held = check(monkeypatch, "rb", clients, 2, options, floor=0.2, weight_cap=0.5)
    assert held == ["summed"] * 2

    def one_short(rank):
        return distributed.result(filled("rb", shares(clients, 2)[rank][1 - rank :], **options))

    for error in in_processes(monkeypatch, 2, one_short)[0]:
        assert isinstance(error, InputValueError)
        assert "not here: 0" in str(error)


def test_few_clients_are_kept_and_give_the_one_shot_result_bit_for_bit(monkeypatch):
    clients = clients_for("rb", 5, sizes={"q": (40, 30), "v": (30, 40)})

    def work(rank):
        running = filled("rb", shares(clients, 3)[rank])
        assert running._state.kept is not None
        return distributed.result(running)

    expected = one_shot("rb", clients)
    for found in results_of(monkeypatch, 3, work):
        assert same_bits(found, expected)


@pytest.mark.parametrize("size", [2, 3])
def test_truncated_sums_keep_their_bound(size, monkeypatch):
    # Two layers: the third process has the sums of none.
    clients = clients_for("flexlora", COUNT * 2, sizes={"q": (40, 30), "v": (30, 40)})

    def work(rank):
        running = filled("flexlora", shares(clients, size)[rank], memory_limit=40_000)
        assert running._state.most is not None
        return distributed.result(running)

    exact = one_shot("flexlora", clients, rank="full")
    every = results_of(monkeypatch, size, work)
    for found in every:
        assert same_bits(found, every[0])
        for layer, result in found.items():
            known = result.certificate
            difference = exact[layer].factors.minus(result.factors).dense()
            bound = float(known.tail + known.rounding)
            assert "memory_limit" in " ".join(result.notes)
            assert 0 < float(difference.norm()) <= bound * (1 + 1e-9)


def test_single_updates_give_a_single_result(monkeypatch):
    clients = [own["q"] for own in clients_for("flexlora", COUNT)]

    def work(rank):
        running = RunningAggregate("flexlora")
        for u in clients[rank::2]:
            running.add(u, id=u.id)
        return running, distributed.result(running), distributed.merge(running).result()

    for running, reduced, merged in results_of(monkeypatch, 2, work):
        assert running._state.kept is None
        assert reduced.rank == merged.rank
        assert float((reduced.B @ reduced.A - merged.B @ merged.A).norm()) < 1e-10


def tree(runnings):
    """The binomial tree by hand: (0 + 1) + (2 + 3), and so on."""
    while len(runnings) > 1:
        for left, right in zip(runnings[::2], runnings[1::2], strict=False):
            left.merge(right)
        runnings = runnings[::2]
    return runnings[0]


@pytest.mark.parametrize(("count", "size"), [(5, 1), (5, 2), (5, 3), (5, 5), (5, 8), (60, 4)])
def test_merge_is_a_binomial_tree_and_leaves_its_inputs(count, size, monkeypatch):
    clients = clients_for("flexlora", count)
    expected = tree([filled("flexlora", own) for own in shares(clients, size)])

    def work(rank):
        running = filled("flexlora", shares(clients, size)[rank])
        before = pack_state(running._state)
        whole = distributed.merge(running)
        assert torch.equal(pack_state(running._state), before)
        whole.add(clients_for("flexlora", 1, seed=9)[0], id="more")
        assert torch.equal(pack_state(running._state), before)
        return whole.without(["more"], lambda id: clients[id]), distributed.merge(running)

    found, room = in_processes(monkeypatch, size, work)
    for _, whole in found:
        assert whole.receipts == expected.receipts
        assert same_bits(whole.result(), expected.result())
    steps = {step for step in room.sent if step.startswith("merging")}
    assert len(steps) == math.ceil(math.log2(size))


def test_sums_are_sent_in_slices(monkeypatch):
    clients = clients_for("flexlora", COUNT * 3, sizes=dict.fromkeys("qkv", (60, 40)))
    whole, bare = {}, {}

    def work(rank):
        running = filled("flexlora", shares(clients, 3)[rank])
        state = running._state
        nothing = replace(state, sizes={}, dtypes={}, groups={})
        whole[rank], bare[rank] = len(pack_state(state)), len(pack_state(nothing))
        return distributed.result(running)

    found, room = in_processes(monkeypatch, 3, work)
    assert not any(isinstance(one, Exception) for one in found)
    for rank in range(3):
        sent = sum(sizes[rank] for sizes in room.sent.values())
        # Two of three layers go to others, each with all receipts; names and places besides.
        sums = whole[rank] - bare[rank]
        assert 0.66 * sums < sent - 2 * bare[rank] < sums


def test_no_more_than_three_slices_are_held_at_once(monkeypatch):
    size = 4
    clients = clients_for("flexlora", COUNT * size, sizes=dict.fromkeys("qkvo", (60, 40)))
    slices, most = [], [0] * size
    pack = by_client.pack_state

    def packed(state):
        buffer = pack(state)
        slices.append((here.rank, weakref.ref(buffer)))
        return count(buffer)

    def count(buffer):
        held = sum(ref() is not None for rank, ref in slices if rank == here.rank)
        most[here.rank] = max(most[here.rank], held)
        return buffer

    class Passing(Together):
        def pass_on(self, step, sent, source):
            came = super().pass_on(step, sent, source)
            slices.append((here.rank, weakref.ref(came)))
            return count(came)

    here = threading.local()
    monkeypatch.setattr(by_client, "pack_state", packed)
    monkeypatch.setattr(together, "Together", Passing)

    def work(rank):
        here.rank = rank
        running = filled("flexlora", shares(clients, size)[rank])
        assert running._state.kept is None
        return distributed.result(running)

    for found in results_of(monkeypatch, size, work):
        assert_same(found, one_shot("flexlora", clients), clients)
    # What comes, what was sent; one's own are views, counted as the third where they live.
    assert max(most) == 2


def test_who_was_added_anywhere(monkeypatch):
    clients = clients_for("flexlora", 7)

    def work(rank):
        return distributed.receipts(filled("flexlora", shares(clients, 3)[rank]))

    whole = filled("flexlora", clients).receipts
    for found in results_of(monkeypatch, 3, work):
        assert found == dict(whole)


@pytest.mark.parametrize("call", [distributed.merge, distributed.result])
@pytest.mark.parametrize("count", [4, COUNT * 2])
def test_a_client_on_two_processes_counts_once_or_is_an_error(call, count, monkeypatch):
    clients = clients_for("flexlora", count, sizes={"q": (40, 30)} if count == 4 else None)

    def work(rank):
        return call(filled("flexlora", [*shares(clients, 2)[rank], clients[0]]))

    found, _ = in_processes(monkeypatch, 2, work)
    if count == 4:
        for one in found:
            results = one.result() if isinstance(one, RunningAggregate) else one
            assert_same(results, one_shot("flexlora", clients), clients)
    else:
        for error in found:
            assert isinstance(error, InputValueError)
            assert "client 0 is in the sums of both" in str(error)


@pytest.mark.parametrize("call", [distributed.merge, distributed.result])
@pytest.mark.parametrize("count", [4, COUNT * 2])
def test_a_client_with_other_content_is_an_error_on_all(call, count, monkeypatch):
    clients = clients_for("flexlora", count)
    forged = clients_for("flexlora", 1, seed=5)

    def work(rank):
        return call(filled("flexlora", shares(clients, 4)[rank] + forged * (rank == 3)))

    for error in in_processes(monkeypatch, 4, work)[0]:
        assert isinstance(error, InputValueError)
        assert "client 0 was added to both with different content" in str(error)


def test_layers_of_one_process_alone_are_an_error_on_all(monkeypatch):
    clients = clients_for("flexlora", COUNT * 2)
    for own in clients[1::2]:
        del own["k"]

    def work(rank):
        return distributed.result(filled("flexlora", shares(clients, 2)[rank]))

    for error in in_processes(monkeypatch, 2, work)[0]:
        assert isinstance(error, InputValueError)
        assert "process 1 lacks layer 'k'" in str(error)


@pytest.mark.parametrize(
    "call", [distributed.merge, distributed.result, distributed.receipts], ids=lambda f: f.__name__
)
def test_other_settings_or_none_are_refused(call, monkeypatch):
    clients = clients_for("flexlora", 4)

    def other(rank):
        return call(filled("flexlora", clients, rank=2 + rank // 2))

    for error in in_processes(monkeypatch, 3, other)[0]:
        assert isinstance(error, InputValueError)
        assert "options differ between processes 0 and 2" in str(error)

    def none(rank):
        return call(filled("flexlora", clients) if rank else {})

    found = in_processes(monkeypatch, 2, none)[0]
    assert all(isinstance(error, InputTypeError) for error in found)
    assert "process 0 refuses" in str(found[1])


def test_a_generator_draws_on_every_process_alike(monkeypatch):
    clients = clients_for("fedask", COUNT)
    # So narrow a sketch that the answer depends on what was drawn.
    narrow = {"rank": 1, "sketch": 1}

    def work(rank):
        generator = torch.Generator().manual_seed(3)
        running = filled("fedask", shares(clients, 2)[rank], generator=generator, **narrow)
        first = distributed.result(running)
        return first, distributed.result(running)

    generator = torch.Generator().manual_seed(3)
    whole = filled("fedask", clients, generator=generator, **narrow)
    expected, again = whole.result(), whole.result()
    assert float((expected["q"].A - again["q"].A).norm()) > 1e-3
    for first, second in results_of(monkeypatch, 2, work):
        assert_same(first, expected, clients)
        assert_same(second, again, clients)


def adapter(k):
    """A client with a head besides its factors."""
    g = torch.Generator().manual_seed(k)
    stem = "base_model.model."
    tensors = {
        f"{stem}q.lora_A.weight": torch.randn(2, 5, generator=g),
        f"{stem}q.lora_B.weight": torch.randn(4, 2, generator=g),
        f"{stem}score.weight": torch.randn(3, 5, generator=g),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["score"]}
    return Adapter.from_state_dict(tensors, config, name=f"client {k}")


def with_heads(numbers):
    running = RunningAggregate("flexlora")
    for k in numbers:
        running.add(adapter(k), id=k, weight=1 + k)
    return running


def test_what_adapters_hold_besides_factors_is_merged(monkeypatch):
    whole = with_heads(range(30))
    assert whole._state.kept is None

    def work(rank):
        running = with_heads(range(rank, 30, 2))
        before = pack_state(running._state)
        merged, results = distributed.merge(running), distributed.result(running)
        assert torch.equal(pack_state(running._state), before)
        return merged.extras(), results, merged.result()

    for extras, results, again in results_of(monkeypatch, 2, work):
        assert extras.keys() == whole.extras().keys()
        for name, X in whole.extras().items():
            assert torch.allclose(extras[name], X, rtol=1e-6, atol=0)
        for layer, expected in whole.result().items():
            for found in (results[layer], again[layer]):
                error = found.factors.minus(expected.factors).dense().norm()
                assert float(error) < 1e-5 * float(expected.factors.dense().norm())
