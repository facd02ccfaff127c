"""HAFL (arXiv:2411.06581): each slot averaged over the clients that did not freeze it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, LowRank, aggregate, aggregate_layers, distribute
from reference import (
    CASES,
    DTYPES,
    EQUAL_RANKS,
    SLOTS,
    arguments,
    array,
    cohort,
    dense,
    previous_factors,
    rbla,
    total,
)
from reference_slots import FIRST, LAYERS, SECOND, hafl, model
from tolerance import assert_equals_oracle, averaged_gate, distance, eps

ALL = {**CASES, **{f"slots-{name}": case for name, case in SLOTS.items()}}
F64 = torch.float64


def updates_of(clients, dtype=F64):
    return [ClientUpdate(**arguments(c, dtype)) for c in clients]


def low_rank(factors, dtype=F64):
    return LowRank(*(torch.from_numpy(X).to(dtype) for X in factors))


@pytest.mark.parametrize("oracle", [hafl, rbla])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_equals_the_oracle_and_that_of_rbla(case, dtype, oracle):
    clients = cohort(case, dtype)
    result = aggregate(updates_of(clients, dtype), "hafl")
    assert result.A.dtype == dtype
    assert_equals_oracle(total(result), oracle, clients, averaged_gate, dtype)


@pytest.mark.parametrize("width", [1, 4, 9])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_slots_everybody_froze_keep_their_previous_value(case, dtype, width):
    clients = cohort(case, dtype)
    factors = previous_factors(case, width, dtype)
    result = aggregate(updates_of(clients, dtype), "hafl", previous=low_rank(factors, dtype))
    assert_equals_oracle(total(result), hafl, clients, averaged_gate, dtype, previous=factors)
    trained = {j for client in clients for j in client.owned}
    for j in set(range(width)) - trained:
        assert np.array_equal(array(result.A)[..., j, :], factors[0][..., j, :])
        assert np.array_equal(array(result.B)[..., j], factors[1][..., j])


def hand_updates():
    first = ClientUpdate(torch.eye(2), torch.diag(torch.tensor([2.0, 4.0])), weight=1)
    second = ClientUpdate(
        torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0], [8.0]]), weight=3, slots=[1]
    )
    return [first, second]


def test_worked_by_hand():
    # slot 0 was frozen by the second client: 1·2, undiluted;  slot 1: (¼·1 + ¾·3)(¼·4 + ¾·8)
    # = 2.5·7, where the mean of the products would be ¼·4 + ¾·24 = 19
    result = aggregate(hand_updates(), "hafl")
    assert result.A.tolist() == [[1.0, 0.0], [0.0, 2.5]]
    assert result.B.tolist() == [[2.0, 0.0], [0.0, 7.0]]
    assert dense(result.factors).tolist() == [[2.0, 0.0], [0.0, 17.5]]


def test_previous_worked_by_hand():
    # only slot 2 is everybody's frozen one: 5·3 at (0, 1) is added, slots 0 and 1 are replaced
    last = LowRank(
        torch.tensor([[9.0, 9.0], [9.0, 9.0], [0.0, 3.0]]),
        torch.tensor([[9.0, 9.0, 5.0], [9.0, 9.0, 0.0]]),
    )
    result = aggregate(hand_updates(), "hafl", previous=last)
    assert dense(result.factors).tolist() == [[2.0, 15.0], [0.0, 17.5]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", ["rbla", "plora"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_prefix_slots_it_is_rbla_and_plora_by_examples(case, other, dtype):
    clients = cohort(case, dtype)
    options = {"weighting": "examples"} if other == "plora" else {}
    one = total(aggregate(updates_of(clients, dtype), "hafl"))
    two = total(aggregate(updates_of(clients, dtype), other, **options))
    for index in np.ndindex(case.layers):
        layer = [replace(c, A=c.A[index], B=c.B[index]) for c in clients]
        assert distance(one[index], two[index]) <= 2 * averaged_gate(dtype, layer)


@pytest.mark.parametrize("case", EQUAL_RANKS.values(), ids=EQUAL_RANKS)
def test_where_nobody_froze_anything_it_is_fedit(case):
    clients = cohort(case)
    one = total(aggregate(updates_of(clients), "hafl"))
    two = total(aggregate(updates_of(clients), "fedit"))
    for index in np.ndindex(case.layers):
        layer = [replace(c, A=c.A[index], B=c.B[index]) for c in clients]
        assert distance(one[index], two[index]) <= 2 * averaged_gate(F64, layer)


def test_slots_are_of_equal_standing():
    result = aggregate(updates_of(cohort(SLOTS["gap"])), "hafl")
    assert result.nested is False
    assert result.slotted is True
    assert result.unscaled is None
    assert result.shared == {"A", "B"}
    assert result.rank == 5
    assert result.residual is None


def test_distribute_refuses_a_slice():
    result = aggregate(updates_of(cohort(SLOTS["gap"])), "hafl")
    with pytest.raises(
        HetLoRAError, match=r"client 0 asks for rank 4 of a result of rank 5.*equal standing"
    ):
        distribute(result, [4])


@pytest.mark.parametrize("scalings", [[1.0, 1.0], [4.0, 0.5]], ids=str)
def test_distribute_hands_every_client_all_slots(scalings):
    result = aggregate(updates_of(cohort(SLOTS["layers"])), "hafl")
    S = np.linalg.norm(array(result.A)) * np.linalg.norm(array(result.B))
    for piece, s in zip(distribute(result, [4, 4], scalings), scalings, strict=True):
        assert piece.rank == 4
        # a root and a division per factor
        assert distance(s * dense(piece), dense(result.factors)) <= 4 * eps(F64) * S


def test_last_round_goes_straight_in_layer_by_layer():
    first, second = model(FIRST), model(SECOND, seed=1)
    last = aggregate_layers({n: updates_of(c) for n, c in first.items()}, "hafl")
    results = aggregate_layers({n: updates_of(c) for n, c in second.items()}, "hafl", previous=last)
    assert list(results) == list(LAYERS)
    for name, clients in second.items():
        assert not last[name].nested
        assert_equals_oracle(total(last[name]), hafl, first[name], averaged_gate, F64)
        previous = array(last[name].A), array(last[name].B)
        assert_equals_oracle(
            total(results[name]), hafl, clients, averaged_gate, F64, previous=previous
        )
        for j in (0, 3):
            assert torch.equal(results[name].A[j], last[name].A[j])
            assert torch.equal(results[name].B[:, j], last[name].B[:, j])


def test_an_idle_round_changes_nothing():
    last = low_rank(previous_factors(FIRST, 5))
    idle = []
    for slots, n in (((0, 2), 5.0), ((1, 2, 4), 1.0), ((2,), 3.0)):
        piece = last.select(list(slots))
        idle.append(ClientUpdate(piece.A, piece.B, weight=n, slots=slots))
    result = aggregate(idle, "hafl", previous=last)
    gate = (3 + 3) * eps(F64) * np.linalg.norm(last.A) * np.linalg.norm(last.B)
    assert distance(total(result), dense(last)) <= gate


@pytest.mark.parametrize("option", ["weighting", "rank"])
def test_options_it_does_not_have_are_refused(option):
    with pytest.raises(HetLoRAError, match=option):
        aggregate(hand_updates(), "hafl", **{option: 1})


@pytest.mark.parametrize(
    ("previous", "why"),
    [
        (LowRank(torch.ones(2, 2), torch.ones(3, 2)), r"\(2, 2\).*got \(3, 2\)"),
        (LowRank(torch.ones(1, 2, 2), torch.ones(1, 2, 2)), r"got \(1, 2, 2\)"),
        (LowRank(torch.full((2, 2), torch.inf), torch.ones(2, 2)), "Inf"),
        ((torch.ones(2, 2), torch.ones(2, 2)), "expected a LowRank"),
    ],
    ids=["shape", "layers", "inf", "tuple"],
)
def test_previous_that_does_not_fit_is_refused(previous, why):
    with pytest.raises(HetLoRAError, match=rf"previous=.*{why}"):
        aggregate(hand_updates(), "hafl", previous=previous)


def test_previous_whose_components_are_no_slots_is_refused():
    stacked = aggregate(hand_updates(), "flora")
    with pytest.raises(HetLoRAError, match=r"previous=.*not nested"):
        aggregate(hand_updates(), "hafl", previous=stacked)


def test_previous_of_a_model_goes_by_layer():
    layers = {name: updates_of(clients) for name, clients in model(SECOND).items()}
    last = low_rank(previous_factors(SECOND, 5))
    with pytest.raises(HetLoRAError, match=r"previous=.*mapping"):
        aggregate_layers(layers, "hafl", previous=last)
    with pytest.raises(HetLoRAError, match=r"previous=.*'down' has none"):
        aggregate_layers(layers, "hafl", previous={"q": last, "v": last})
