"""FedIT: plain factor means at equal ranks."""

import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, distribute
from reference import CASES, DTYPES, EQUAL_RANKS, arguments, cohort, dense, fedit, total
from tolerance import (
    assert_equals_oracle,
    assert_leading_slices,
    averaged_gate,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EQUAL_RANKS.values(), ids=EQUAL_RANKS)
def test_equals_the_oracle(case, dtype):
    clients = cohort(case, dtype)
    result = aggregate([ClientUpdate(**arguments(c, dtype)) for c in clients], "fedit")
    assert result.rank == case.ranks[0]
    assert result.A.dtype == dtype
    assert_equals_oracle(total(result), fedit, clients, averaged_gate, dtype)


def test_worked_by_hand():
    # p = 1/4, 3/4.  Ā = ¼[1 0] + ¾[0 1] = [¼ ¾],  B̄ = ¼[2 0]ᵀ + ¾[0 4]ᵀ = [½ 3]ᵀ.
    # The mean of the products would be diag(½, 3): the off-diagonal terms are the method's bias.
    first = ClientUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]), weight=1)
    second = ClientUpdate(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [4.0]]), weight=3)
    result = aggregate([first, second], "fedit")
    assert result.A.tolist() == [[0.25, 0.75]]
    assert result.B.tolist() == [[0.5], [3.0]]
    assert dense(result.factors).tolist() == [[0.125, 0.375], [0.75, 2.25]]


def test_opposite_signs_of_one_update_average_to_zero():
    case = EQUAL_RANKS["square"]
    client = cohort(case)[0]
    update = ClientUpdate(**arguments(client))
    mirrored = ClientUpdate(-update.A, -update.B, weight=client.n, scaling=client.s)
    assert not dense(aggregate([update, mirrored], "fedit").factors).any()


def test_distributes_leading_slots():
    case = EQUAL_RANKS["tall"]
    result = aggregate([ClientUpdate(**arguments(c)) for c in cohort(case)], "fedit")
    ranks, scalings = (1, 3, 4), (0.5, 3.0, 1.0)
    assert_leading_slices(distribute(result, ranks, scalings), result, ranks, scalings)


@pytest.mark.parametrize("case", [CASES["tall"], CASES["layers"]], ids=["tall", "layers"])
def test_mixed_ranks_are_refused_naming_zeropad(case):
    updates = [ClientUpdate(**arguments(c)) for c in cohort(case)]
    with pytest.raises(HetLoRAError, match="zeropad") as caught:
        aggregate(updates, "fedit")
    assert isinstance(caught.value, ValueError)
