"""Replication padding (arXiv:2406.17477): short clients borrow the tallest clients' slots."""

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, LowRank, aggregate, distribute
from reference import (
    CASES,
    DTYPES,
    arguments,
    cohort,
    dense,
    previous_factors,
    replicate,
    total,
    zeropad,
)
from tolerance import (
    assert_equals_oracle,
    assert_leading_slices,
    averaged_gate,
    distance,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_oracle(case, dtype):
    clients = cohort(case, dtype)
    result = aggregate([ClientUpdate(**arguments(c, dtype)) for c in clients], "replicate")
    assert result.rank == max(case.ranks)
    assert result.A.dtype == dtype
    assert_equals_oracle(total(result), replicate, clients, averaged_gate, dtype)


@pytest.mark.parametrize("case", [CASES["tall"], CASES["layers"]], ids=["tall", "layers"])
def test_slots_above_the_tallest_participant_come_from_previous(case):
    clients = cohort(case)
    A, B = previous_factors(case, 6)
    previous = LowRank(torch.from_numpy(A), torch.from_numpy(B))
    updates = [ClientUpdate(**arguments(c)) for c in clients if c.rank < 6]
    result = aggregate(updates, "replicate", previous=previous)
    assert result.rank == 6
    assert_equals_oracle(
        total(result),
        replicate,
        [c for c in clients if c.rank < 6],
        averaged_gate,
        torch.float64,
        previous=(A, B),
    )


def test_worked_by_hand():
    # ranks 1, 2, 3 and n = 1, 1, 2: p = ¼, ¼, ½ and the donor is the third client alone.
    # slot 1, everybody's:      A: ¼·1 + ¼·1 + ½·2 = 1.5    B: ¼·8 + ¼·4 + ½·4 = 5   → 7.5
    # slot 2, client 1 borrows: A: ¼·2 + ¼·1 + ½·2 = 1.75   B: ¼·4 + ¼·8 + ½·4 = 5   → 8.75
    # slot 3, two borrow:       A: 2                        B: 4                     → 8
    eye = torch.eye(3)
    updates = [
        ClientUpdate(eye[:1], 8 * eye[:, :1], weight=1),
        ClientUpdate(eye[:2], torch.tensor([[4.0, 0.0], [0.0, 8.0], [0.0, 0.0]]), weight=1),
        ClientUpdate(2 * eye, 4 * eye, weight=2),
    ]
    result = aggregate(updates, "replicate")
    np.testing.assert_allclose(
        dense(result.factors), np.diag([7.5, 8.75, 8.0]), rtol=1e-6, atol=1e-6
    )


def test_the_tail_is_rescued_where_zero_padding_dilutes_it():
    # one client in ten holds the slots 2-4; its tail keeps its full length under replication
    # and a hundredth of it (q² = 0.01) under zero-padding
    tall = ClientUpdate(
        torch.eye(4).double(), torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])).double()
    )
    short = ClientUpdate(tall.A[:1], tall.B[:, :1])
    updates = [tall] + [short] * 9
    np.testing.assert_allclose(
        total(aggregate(updates, "replicate")), np.diag([8.0, 4.0, 2.0, 1.0]), rtol=1e-14
    )
    np.testing.assert_allclose(
        total(aggregate(updates, "zeropad")), np.diag([8.0, 0.04, 0.02, 0.01]), rtol=1e-14
    )


def test_it_is_not_zero_padding():
    clients = cohort(CASES["tall"])
    result = aggregate([ClientUpdate(**arguments(c)) for c in clients], "replicate")
    assert distance(total(result), zeropad(clients)) > 1


def test_distributes_leading_slots():
    case = CASES["square"]
    result = aggregate([ClientUpdate(**arguments(c)) for c in cohort(case)], "replicate")
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)


def test_a_donor_must_fill_every_slot():
    A, B = torch.ones(2, 5), torch.ones(4, 2)
    clients = [ClientUpdate(A, B, slots=(0, 1)), ClientUpdate(A, B, slots=(2, 3))]
    with pytest.raises(HetLoRAError, match=r"client 0 has the largest rank.*slot 2.*use 'rbla'"):
        aggregate(clients, "replicate")
