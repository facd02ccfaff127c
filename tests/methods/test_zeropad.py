"""Zero-padded factor means, by examples and uniform."""

import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, distribute
from reference import CASES, DTYPES, SLOTS, arguments, cohort, dense, total, zeropad
from tolerance import (
    assert_equals_oracle,
    assert_leading_slices,
    averaged_gate,
)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES.values(), *SLOTS.values()], ids=[*CASES, *SLOTS])
def test_equals_the_oracle(case, dtype, weighting):
    clients = cohort(case, dtype)
    updates = [ClientUpdate(**arguments(c, dtype)) for c in clients]
    result = aggregate(updates, "zeropad", weighting=weighting)
    assert result.A.dtype == dtype
    assert_equals_oracle(total(result), zeropad, clients, averaged_gate, dtype, weighting=weighting)


def test_the_default_weighting_is_by_examples():
    clients = cohort(CASES["tall"])
    result = aggregate([ClientUpdate(**arguments(c)) for c in clients], "zeropad")
    assert_equals_oracle(
        total(result), zeropad, clients, averaged_gate, torch.float64, weighting="examples"
    )


def hand_updates():
    first = ClientUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]), weight=1)
    second = ClientUpdate(torch.eye(2), torch.diag(torch.tensor([4.0, 6.0])), weight=3)
    return [first, second]


def test_worked_by_hand_by_examples():
    # p = ¼, ¾.  Ā = ¼ diag(1, 0) + ¾ I = diag(1, ¾),  B̄ = ¼ diag(2, 0) + ¾ diag(4, 6)
    # = diag(3.5, 4.5).  Slot 2, owned by ¾ of the data, is diluted twice: ¾ · ¾ · 6 = 3.375.
    result = aggregate(hand_updates(), "zeropad")
    assert result.A.tolist() == [[1.0, 0.0], [0.0, 0.75]]
    assert result.B.tolist() == [[3.5, 0.0], [0.0, 4.5]]
    assert dense(result.factors).tolist() == [[3.5, 0.0], [0.0, 3.375]]


def test_worked_by_hand_uniform():
    # w = ½, ½.  Ā = diag(1, ½),  B̄ = ½ diag(2 + 4, 6) = diag(3, 3),  product diag(3, 1.5).
    result = aggregate(hand_updates(), "zeropad", weighting="uniform")
    assert dense(result.factors).tolist() == [[3.0, 0.0], [0.0, 1.5]]


def test_a_client_of_weight_zero_does_not_count_in_the_uniform_mean():
    absent = ClientUpdate(torch.ones(2, 2), torch.ones(2, 2), weight=0)
    result = aggregate([*hand_updates(), absent], "zeropad", weighting="uniform")
    assert dense(result.factors).tolist() == [[3.0, 0.0], [0.0, 1.5]]


def test_distributes_leading_slots():
    case = CASES["layers"]
    result = aggregate([ClientUpdate(**arguments(c)) for c in cohort(case)], "zeropad")
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)


def test_an_unknown_weighting_lists_the_choices():
    with pytest.raises(HetLoRAError, match=r"examples.*uniform") as caught:
        aggregate(hand_updates(), "zeropad", weighting="norm")
    assert isinstance(caught.value, ValueError)
