"""Layers on several processes: every method gives what one process gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import (
    METHODS,
    ClientUpdate,
    InputTypeError,
    InputValueError,
    aggregate_layers,
    distributed,
)
from hetlora_agg.robustness import geomed, multi_krum, nnm, norm_clip
from processes import in_processes, results_of
from states import state_for
from streamed import assert_same, clients_for

SIZES = {"q": (9, 7), "k": (9, 7), "v": (6, 8), "o": (5, 5), "up": (9, 7)}

# What batches and the order of sums over layers may change: LAPACK's own allowance for the largest.
GATE = 10 * 9 * torch.finfo(torch.float64).eps

DRAWING = {"dare"}
"""Methods that need a generator, which draws in the order of all layers."""


def model(name, count=9, **told):
    """``{layer: updates}`` of clients that fit the method, and the clients themselves."""
    clients = clients_for(name, count, sizes=SIZES, **told)
    return {layer: [own[layer] for own in clients] for layer in SIZES}, clients


def shared(layers, rank, size):
    """Every ``size``-th layer, so that equal shapes fall apart."""
    return {name: layers[name] for name in list(layers)[rank::size]}


def everywhere(monkeypatch, size, layers, method, **options):
    """The gathered results of every process."""

    def work(rank):
        own = distributed.aggregate_layers(shared(layers, rank, size), method, **options)
        assert list(own) == list(layers)[rank::size]
        return distributed.gather(own)

    return results_of(monkeypatch, size, work)


def same_bits(one, other):
    """Whether all numbers of two results are."""
    pairs = [(one.A, other.A), (one.B, other.B), (one.singular_values, other.singular_values)]
    return all((X is None and Y is None) or bool((X == Y).all()) for X, Y in pairs)


@pytest.mark.parametrize("name", sorted(set(METHODS) - DRAWING))
def test_every_method_gives_what_one_process_gives(name, monkeypatch):
    layers, clients = model(name)
    expected = aggregate_layers(layers, name, **state_for(name))
    for found in everywhere(monkeypatch, 3, layers, name, **state_for(name)):
        assert set(found) == set(layers)
        assert_same({layer: found[layer] for layer in layers}, expected, clients, gate=GATE)


RULES = [norm_clip(3.0), nnm(1).then(geomed(1)), multi_krum(1)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("size", [2, 7])
def test_rules_judge_clients_by_all_processes_layers(rule, size, monkeypatch):
    layers, clients = model("flexlora")
    # Far away in one layer alone: whoever judges that layer apart sees another client.
    first = layers["q"][0]
    layers["q"][0] = replace(first, B=first.B * 1e3)
    clients[0]["q"] = layers["q"][0]
    expected = aggregate_layers(layers, "flexlora", weighting=rule)
    alone = aggregate_layers({"v": layers["v"]}, "flexlora", weighting=rule)
    assert float((alone["v"].A - expected["v"].A).norm()) > 1e-3
    for found in everywhere(monkeypatch, size, layers, "flexlora", weighting=rule):
        assert_same({layer: found[layer] for layer in layers}, expected, clients, gate=GATE)


def test_rules_need_every_pair_of_clients_on_every_process(monkeypatch):
    layers, _ = model("flexlora")
    # Process 1 never hears of client 4.
    del layers["k"][4]

    def work(rank):
        own = shared(layers, rank, 5)
        told = {"weighting": multi_krum(1), "missing": "renormalise"}
        return distributed.aggregate_layers(own, "flexlora", **told)

    for error in refusals(monkeypatch, work, 5):
        assert isinstance(error, InputValueError)
        assert "client 4 lacks a layer" in str(error)


@pytest.mark.parametrize("name", ["flexlora", "hetlora", "rb"])
def test_a_client_dropped_on_one_process_is_dropped_on_all(name, monkeypatch):
    layers, clients = model(name)
    spoiled = layers["v"][3]
    layers["v"][3] = replace(spoiled, A=torch.full_like(spoiled.A, torch.nan))
    told = {"on_bad_client": "drop", "max_rank": {k: 4 if k != 5 else 1 for k in range(9)}}
    expected = aggregate_layers(layers, name, **told)
    found = everywhere(monkeypatch, 3, layers, name, **told)
    left = [own for k, own in enumerate(clients) if k not in (3, 5)]
    for one in found:
        assert {id for id, _ in one["q"].excluded} == {3, 5}
        assert "layer 'v'" in dict(one["q"].excluded)[3]
        ordered = {
            layer: replace(one[layer], excluded=expected[layer].excluded) for layer in layers
        }
        assert_same(ordered, expected, left, gate=GATE)
        assert all(r.excluded == found[0]["q"].excluded for r in one.values())


@pytest.mark.parametrize("missing", ["zero", "renormalise"])
@pytest.mark.parametrize("name", ["flexlora", "hetlora", "rb", "zeropad"])
def test_a_client_that_another_process_knows_counts_as_missing(name, missing, monkeypatch):
    layers, clients = model(name)
    # Only process 0 ever sees client 4.
    for layer in list(layers)[1:]:
        del layers[layer][4], clients[4][layer]
    expected = aggregate_layers(layers, name, missing=missing)
    for found in everywhere(monkeypatch, 5, layers, name, missing=missing):
        assert_same({layer: found[layer] for layer in layers}, expected, clients, gate=GATE)


def test_state_is_needed_for_ones_own_layers_alone(monkeypatch):
    layers, clients = model("fedhl")
    last = aggregate_layers(layers, "flexlora", rank=2)
    expected = aggregate_layers(layers, "fedhl", previous=last)

    def work(rank):
        own = shared(layers, rank, 2)
        state = {layer: last[layer] for layer in own}
        return distributed.gather(distributed.aggregate_layers(own, "fedhl", previous=state))

    for found in results_of(monkeypatch, 2, work):
        assert_same({layer: found[layer] for layer in layers}, expected, clients, gate=GATE)


def test_a_result_arrives_with_all_its_parts(monkeypatch):
    layers, _ = model("fedex")
    for layer in layers:
        layers[layer] = [
            replace(u, A=np.asarray(u.A), B=np.asarray(u.B), weight=k) for k, u in
            enumerate(layers[layer])
        ]  # fmt: skip
    told = {"energy": 0.7, "quorum": 4}
    for method, options in (("fedex", {}), ("rb", told), ("ffa", {})):
        if method == "ffa":
            layers, _ = model("ffa")
        expected = aggregate_layers(layers, method, **options)
        (found,) = everywhere(monkeypatch, 1, layers, method, **options)
        for layer, one in found.items():
            other = expected[layer]
            assert same_bits(one, other)
            assert type(one.A) is type(other.A)
            for part in ("nested", "shared", "dropped", "notes", "slotted", "unscaled"):
                assert getattr(one, part) == getattr(other, part)
            assert one.next_unscaled == other.next_unscaled
            assert (one.residual is None) == (other.residual is None)
            if other.residual is not None:
                assert (one.residual.A == other.residual.A).all()
            assert (one.ranks is None) == (other.ranks is None)
            assert one.ranks is None or (one.ranks == other.ranks).all()
            assert (one.certificate is None) == (other.certificate is None)
            if other.certificate is not None:
                assert one.certificate.driver == other.certificate.driver
                assert one.certificate.fallbacks == other.certificate.fallbacks
                for name, X in other.certificate.tensors().items():
                    Y = getattr(one.certificate, name)
                    assert type(X) is type(Y)
                    assert (Y == X).all()


def test_arrays_come_back_where_all_processes_sent_arrays(monkeypatch):
    def work(rank, tensors):
        A, B = torch.ones(1, 4), torch.ones(3, 1)
        sent = (A, B) if tensors and rank else (A.numpy(), B.numpy())
        own = {"qv"[rank]: [sent]} if rank < 2 else {}
        return [type(r.A) for r in distributed.aggregate_layers(own).values()]

    arrays = results_of(monkeypatch, 3, lambda rank: work(rank, False))
    assert arrays == [[np.ndarray], [np.ndarray], []]
    mixed = results_of(monkeypatch, 3, lambda rank: work(rank, True))
    assert mixed == [[torch.Tensor], [torch.Tensor], []]


def test_rare_parts_of_a_result_arrive(monkeypatch):
    layers, _ = model("flexlora")
    result = aggregate_layers(layers, "flexlora")["q"]
    rare = {"dropped": (2, 5), "excluded": (("phone", "why"), (3, "why not")), "notes": ("a", "b")}
    known = replace(result.certificate, fallbacks=((0, "gesvd"), (1, "float64")), error=None)
    result = replace(result, certificate=known, shared=frozenset("B"), nested=False, **rare)

    def work(rank):
        return distributed.gather({"q": result} if rank == 1 else {})

    for found in results_of(monkeypatch, 3, work):
        one = found["q"]
        assert {part: getattr(one, part) for part in rare} == rare
        assert one.certificate.fallbacks == known.fallbacks
        assert one.certificate.error is None
        assert one.shared == {"B"}
        assert one.nested is False


def refusals(monkeypatch, work, size=3):
    """Every process's error."""
    found, _ = in_processes(monkeypatch, size, work)
    assert all(isinstance(one, Exception) for one in found), found
    return found


def test_the_refusal_of_one_is_heard_by_all(monkeypatch):
    layers, _ = model("rb")
    layers["k"][2] = ClientUpdate(torch.ones(2, 3), torch.ones(9, 2), id=2)

    def work(rank):
        return distributed.aggregate_layers(shared(layers, rank, 3))

    errors = refusals(monkeypatch, work)
    assert all(isinstance(error, InputValueError) for error in errors)
    assert "layer 'k'" in str(errors[1])
    assert "process" not in str(errors[1])
    for error in (errors[0], errors[2]):
        assert "process 1 refuses" in str(error)
        assert str(errors[1]) in str(error)


def test_a_foreign_error_of_one_is_heard_by_all(monkeypatch):
    layers, _ = model("rb")

    def broken(c):
        if c.B.shape[-2] == 6:
            raise OSError("the disk is full")
        return METHODS["flexlora"].run(c)

    def work(rank):
        return distributed.aggregate_layers(shared(layers, rank, 3), broken)

    errors = refusals(monkeypatch, work)
    assert isinstance(errors[2], OSError)
    for error in errors[:2]:
        assert isinstance(error, distributed.ProcessLostError)
        assert "process 2 refuses: OSError: the disk is full" in str(error)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda rank, own: (own, "rb", {"rank": rank}), "rank differ between processes 0 and 1"),
        (lambda rank, own: (own, "rb", {"rank": np.int64(1 + rank)}), "rank differ"),
        (lambda rank, own: (own, "rb", {"rank": torch.tensor(1 + rank)}), "rank differ"),
        (lambda rank, own: (own, ("rb", "flora")[rank % 2], {}), "method differ"),
        (lambda rank, own: (own, "rb", {"weighting": (norm_clip(1.0), norm_clip(2.0))[rank % 2]}),
         "weighting differ"),
        (lambda rank, own: (own, "rb", {"on_bad_client": ("error", "drop")[rank % 2]}),
         "on_bad_client differ"),
        (lambda rank, own: ({"q": [1]}, "rb", {}), "'q' is on two processes"),
        (lambda rank, own: ({}, "rb", {}), "no layers"),
        (lambda rank, own: ({k: v[rank:] for k, v in own.items()}, "rb", {}), "sent other layers"),
    ],
)  # fmt: skip
def test_processes_that_do_not_agree_are_told_so(spoil, text, monkeypatch):
    layers, _ = model("rb")

    def work(rank):
        own, method, options = spoil(rank, shared(layers, rank, 3))
        return distributed.aggregate_layers(own, method, **options)

    errors = refusals(monkeypatch, work)
    assert any(text in str(error) for error in errors), errors
    assert all(isinstance(error, InputValueError) for error in errors), errors


def test_a_generator_is_refused_with_the_reason(monkeypatch):
    layers, _ = model("flora")

    def work(rank):
        own = shared(layers, rank, 3)
        return distributed.aggregate_layers(own, "dare", generator=torch.Generator())

    for error in refusals(monkeypatch, work):
        assert isinstance(error, InputTypeError)
        assert "order of all layers" in str(error)


def test_ids_that_cannot_be_told_are_refused(monkeypatch):
    layers, _ = model("rb")
    layers = {k: [replace(u, id=(u.id,)) for u in v] for k, v in layers.items()}

    def work(rank):
        return distributed.aggregate_layers(shared(layers, rank, 2))

    for error in refusals(monkeypatch, work, 2):
        assert isinstance(error, InputTypeError)
        assert "strings or integers" in str(error)


def test_other_calls_on_other_processes_are_named(monkeypatch):
    layers, _ = model("rb")

    def work(rank):
        if rank == 1:
            return distributed.gather({})
        return distributed.aggregate_layers(shared(layers, rank, 2))

    for error in refusals(monkeypatch, work, 2):
        assert "process 0 is in 'aggregate_layers: options', process 1 in 'gather" in str(error)


def test_gather_refuses_what_is_no_result_or_there_twice(monkeypatch):
    layers, _ = model("rb")
    result = aggregate_layers(layers)["q"]
    for given, text in (([], "by layer"), ({"q": 1}, "'q'"), ({"q": result}, "on two processes")):
        for error in refusals(monkeypatch, lambda rank, given=given: distributed.gather(given), 2):
            assert text in str(error)
