"""FLoRA (arXiv:2409.05976): stacking, exact and uncompressed."""

import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, distribute
from reference import CASES, DTYPES, SLOTS, arguments, by_layer, cohort, dense, flora, scale, total
from tolerance import assert_equals_oracle, distance, order_gate, split_gate, stack_gate_of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES.values(), *SLOTS.values()], ids=[*CASES, *SLOTS])
def test_equals_the_oracle(case, dtype):
    clients = cohort(case, dtype)
    result = aggregate([ClientUpdate(**arguments(c, dtype)) for c in clients], "flora")
    assert result.rank == sum(case.ranks)
    assert result.A.dtype == dtype
    assert result.residual is None
    assert_equals_oracle(total(result), flora, clients, stack_gate_of, dtype)


def test_worked_by_hand():
    # p = ¼, ¾:  ¼ diag(2, 0) + ¾ diag(4, 6) = diag(3.5, 4.5), kept as a stack of 1 + 2 components
    first = ClientUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]), weight=1)
    second = ClientUpdate(torch.eye(2), torch.diag(torch.tensor([4.0, 6.0])), weight=3)
    result = aggregate([first, second], "flora")
    assert result.rank == 3
    assert dense(result.factors).tolist() == [[3.5, 0.0], [0.0, 4.5]]


def test_opposite_updates_cancel():
    # S is large and ΔW is 0: the error must be small against S, not against ΔW
    client = cohort(CASES["lone"])[0]
    update = ClientUpdate(**arguments(client))
    opposite = ClientUpdate(update.A, -update.B, weight=client.n, scaling=client.s)
    result = total(aggregate([update, opposite], "flora"))
    assert distance(result, 0 * result) <= stack_gate_of(torch.float64, [client])


def test_client_order_does_not_matter():
    clients = cohort(CASES["tall"])
    updates = [ClientUpdate(**arguments(c)) for c in clients]
    there, back = total(aggregate(updates, "flora")), total(aggregate(updates[::-1], "flora"))
    assert distance(there, back) <= order_gate(torch.float64, len(clients), scale(clients))


def test_a_client_split_into_two_halves_counts_once():
    clients = cohort(CASES["layers"])
    whole = [ClientUpdate(**arguments(c)) for c in clients]
    halves = [ClientUpdate(**{**arguments(c), "weight": c.n / 2}) for c in clients for _ in "ab"]
    one, two = total(aggregate(whole, "flora")), total(aggregate(halves, "flora"))
    for index, layer, _ in by_layer(clients):
        gate = split_gate(torch.float64, len(clients), scale(layer))
        assert distance(one[index], two[index]) <= gate


def test_a_stack_is_not_sliced():
    case = CASES["tall"]
    result = aggregate([ClientUpdate(**arguments(c)) for c in cohort(case)], "flora")
    assert not result.nested
    with pytest.raises(HetLoRAError, match=r"nested|fold|merge|residual"):
        distribute(result, case.ranks)
