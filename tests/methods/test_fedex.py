"""FedEx-LoRA (arXiv:2410.09432): factor means plus the exact residual, both factored."""

import pytest
import torch

from hetlora_agg import ClientUpdate, aggregate
from reference import (
    CASES,
    DTYPES,
    SLOTS,
    arguments,
    cohort,
    dense,
    fedex,
    fedex_residual,
    total,
    zeropad,
)
from tolerance import assert_equals_oracle, averaged_gate, stack_gate_of

ALL = {**CASES, **{f"slots-{name}": case for name, case in SLOTS.items()}}


def both_gates(dtype, clients):
    """The residual is the stack minus the factor means: it inherits both errors."""
    return stack_gate_of(dtype, clients) + averaged_gate(dtype, clients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_factors_residual_and_total_equal_the_oracle(case, dtype):
    clients = cohort(case, dtype)
    result = aggregate([ClientUpdate(**arguments(c, dtype)) for c in clients], "fedex")
    assert result.A.dtype == dtype
    assert_equals_oracle(dense(result.factors), zeropad, clients, averaged_gate, dtype)
    assert_equals_oracle(dense(result.residual), fedex_residual, clients, both_gates, dtype)
    assert_equals_oracle(total(result), fedex, clients, both_gates, dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_residual_stays_factored(case):
    result = aggregate([ClientUpdate(**arguments(c)) for c in cohort(case)], "fedex")
    assert result.rank == max(case.ranks)
    assert result.residual.rank <= sum(case.ranks) + max(case.ranks)


def test_worked_by_hand():
    # p = ¼, ¾.  Ā = diag(1, ¾),  B̄ = ¼[2 0; 0 0] + ¾[4 2; 0 6] = [3.5 1.5; 0 4.5]
    # factors B̄Ā = [3.5 1.125; 0 3.375];  exact mean = [3.5 1.5; 0 4.5]
    # residual = [0 0.375; 0 1.125], which is not its own transpose
    first = ClientUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]), weight=1)
    second = ClientUpdate(torch.eye(2), torch.tensor([[4.0, 2.0], [0.0, 6.0]]), weight=3)
    result = aggregate([first, second], "fedex")
    assert dense(result.factors).tolist() == [[3.5, 1.125], [0.0, 3.375]]
    assert dense(result.residual).tolist() == [[0.0, 0.375], [0.0, 1.125]]
    assert total(result).tolist() == [[3.5, 1.5], [0.0, 4.5]]


def test_the_residual_of_a_lone_client_is_zero():
    clients = cohort(CASES["lone"])
    result = aggregate([ClientUpdate(**arguments(c)) for c in clients], "fedex")
    rest = 0.0 if result.residual is None else abs(dense(result.residual)).max()
    assert rest <= both_gates(torch.float64, clients)
