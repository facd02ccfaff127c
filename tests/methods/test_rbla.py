"""RBLA (arXiv:2408.08699): each slot's factors averaged over the clients that own it."""

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, LowRank, aggregate, distribute
from reference import (
    CASES,
    DTYPES,
    SLOTS,
    arguments,
    cohort,
    dense,
    previous_factors,
    rb,
    rbla,
    total,
)
from tolerance import (
    assert_equals_oracle,
    assert_leading_slices,
    averaged_gate,
    distance,
)

ALL = {**CASES, **{f"slots-{name}": case for name, case in SLOTS.items()}}
CROWDS = {name: case for name, case in ALL.items() if len(case.ranks) >= 2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_equals_the_oracle(case, dtype):
    clients = cohort(case, dtype)
    result = aggregate([ClientUpdate(**arguments(c, dtype)) for c in clients], "rbla")
    assert result.A.dtype == dtype
    assert_equals_oracle(total(result), rbla, clients, averaged_gate, dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_rank_is_the_largest(case):
    result = aggregate([ClientUpdate(**arguments(c)) for c in cohort(case)], "rbla")
    assert result.rank == max(case.ranks)


@pytest.mark.parametrize("floor", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_floor_bounds_the_share_of_rare_slots(case, floor):
    clients = cohort(case)
    result = aggregate([ClientUpdate(**arguments(c)) for c in clients], "rbla", floor=floor)
    assert_equals_oracle(total(result), rbla, clients, averaged_gate, torch.float64, floor=floor)


@pytest.mark.parametrize("case", CROWDS.values(), ids=CROWDS)
def test_quorum_drops_slots_with_too_few_owners(case):
    clients = cohort(case)
    result = aggregate([ClientUpdate(**arguments(c)) for c in clients], "rbla", quorum=2)
    assert_equals_oracle(total(result), rbla, clients, averaged_gate, torch.float64, quorum=2)
    lone = {
        j
        for client in clients
        for j in client.owned
        if sum(j in other.owned for other in clients) == 1
    }
    assert lone <= set(result.dropped)


@pytest.mark.parametrize("quorum", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_slots_without_owners_are_carried_over_from_previous(case, dtype, quorum):
    clients = cohort(case, dtype)
    A, B = previous_factors(case, max(case.ranks) + 3, dtype)
    updates = [ClientUpdate(**arguments(c, dtype)) for c in clients]
    previous = LowRank(torch.from_numpy(A).to(dtype), torch.from_numpy(B).to(dtype))
    result = aggregate(updates, "rbla", previous=previous, quorum=quorum)
    assert_equals_oracle(
        total(result), rbla, clients, averaged_gate, dtype, previous=(A, B), quorum=quorum
    )


def hand_updates():
    first = ClientUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]), weight=1)
    second = ClientUpdate(
        torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([6.0, 5.0])), weight=3
    )
    return [first, second]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # slot 1: (¼·1 + ¾·3)(¼·2 + ¾·6) = 2.5·5 = 12.5;  slot 2 has one owner: 1·5
        ({}, (12.5, 5.0)),
        # max(3, 0.9375·4) = 3.75: both factors of slot 2 shrink by 3/3.75 = 0.8: 0.64·5 = 3.2
        ({"floor": 0.9375}, (12.5, 3.2)),
        ({"quorum": 2}, (12.5, 0.0)),
        (
            {
                "quorum": 2,
                "previous": LowRank(torch.eye(2), torch.diag(torch.tensor([9.0, 7.0]))),
            },
            (12.5, 7.0),
        ),
    ],
    ids=["plain", "floor", "quorum", "previous"],
)
def test_worked_by_hand(options, expected):
    result = aggregate(hand_updates(), "rbla", **options)
    np.testing.assert_allclose(dense(result.factors), np.diag(expected), rtol=1e-6)
    assert result.dropped == ((1,) if "quorum" in options else ())


def test_the_cross_terms_are_there():
    # the mean of the products on slot 1 would be ¼·2 + ¾·18 = 14
    product_space = total(aggregate(hand_updates(), "rb"))
    np.testing.assert_allclose(product_space, np.diag([14.0, 5.0]), atol=1e-4)
    clients = cohort(CASES["tall"])
    assert distance(rb(clients), rbla(clients)) > 1


def test_distributes_leading_slots():
    case = CASES["layers"]
    result = aggregate([ClientUpdate(**arguments(c)) for c in cohort(case)], "rbla")
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)


@pytest.mark.parametrize(
    "options", [{"floor": -0.1}, {"floor": 1.5}, {"quorum": 0}, {"quorum": 1.5}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(HetLoRAError, match=next(iter(options))):
        aggregate(hand_updates(), "rbla", **options)


def test_previous_of_another_shape_is_refused():
    with pytest.raises(HetLoRAError, match="previous"):
        aggregate(hand_updates(), "rbla", previous=LowRank(torch.ones(2, 2), torch.ones(3, 2)))
