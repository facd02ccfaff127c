"""raFLoRA (arXiv:2602.13486): partitions of slots between configured rank levels."""

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, LowRank, aggregate, distribute
from reference import (
    CASES,
    DTYPES,
    Case,
    Client,
    arguments,
    by_layer,
    cohort,
    dense,
    previous_factors,
    raflora,
    total,
)
from tolerance import (
    assert_best_rank,
    assert_equals_oracle,
    assert_leading_slices,
    shared_gate_of,
)


def assert_kept_up_to_the_top_level(result, clients, rank, dtype, *, levels=None, previous=None):
    for index, layer, earlier in by_layer(clients, previous):
        W = raflora(layer, levels, earlier)
        gate = shared_gate_of(dtype, layer)
        if earlier is not None:
            gate += shared_gate_of(dtype, [Client(*earlier, n=1)])
        assert_best_rank(dense(result.factors)[index], W, rank, gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_best_of_the_top_level(case, dtype):
    clients = cohort(case, dtype)
    result = aggregate([ClientUpdate(**arguments(c, dtype)) for c in clients], "raflora")
    top = max(case.ranks)
    assert result.rank == top
    assert result.A.dtype == dtype
    assert_kept_up_to_the_top_level(result, clients, top, dtype)


# R = 5 + 2 ≥ min(out, in): nothing is cut, so the product itself can be compared
UNCUT = {
    "tall": Case(11, 5, (5, 2), (1, 3), (2.0, 0.5)),
    "layers": Case(4, 9, (1, 4, 2), (4, 2, 3), (1.0, 2.0, 0.5), layers=(3,)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", UNCUT.values(), ids=UNCUT)
def test_equals_the_oracle(case, dtype):
    clients = cohort(case, dtype)
    result = aggregate([ClientUpdate(**arguments(c, dtype)) for c in clients], "raflora")
    assert_equals_oracle(total(result), raflora, clients, shared_gate_of, dtype)


@pytest.mark.parametrize("levels", [(1, 2, 3, 4, 5), (2, 3, 5), (5, 2)], ids=str)
def test_finer_levels_than_the_participants_change_nothing(levels):
    # slots of partition h are owned by clients of r_k ≥ R_h: a level nobody has splits no owners
    clients = cohort(UNCUT["tall"])
    updates = [ClientUpdate(**arguments(c)) for c in clients]
    result = aggregate(updates, "raflora", levels=levels)
    assert_equals_oracle(
        total(result), raflora, clients, shared_gate_of, torch.float64, levels=(2, 5)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [CASES["tall"], CASES["layers"], CASES["thin"]], ids=["tall", "layers", "thin"]
)
def test_an_unowned_partition_is_carried_over(case, dtype):
    clients = cohort(case, dtype)
    top = max(case.ranks) + 2
    levels = (*case.ranks, top)
    A, B = previous_factors(case, top, dtype)
    updates = [ClientUpdate(**arguments(c, dtype)) for c in clients]
    previous = LowRank(torch.from_numpy(A).to(dtype), torch.from_numpy(B).to(dtype))
    result = aggregate(updates, "raflora", levels=levels, previous=previous)
    kept = min(top, case.out_features, case.in_features)
    assert result.rank == kept
    assert_kept_up_to_the_top_level(result, clients, kept, dtype, levels=levels, previous=(A, B))


def test_worked_by_hand():
    # levels 1 and 2.  partition 1, both own it: ¼·2 + ¾·4 = 3.5;  partition 2, one owner: 6
    first = ClientUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]), weight=1)
    second = ClientUpdate(torch.eye(2), torch.diag(torch.tensor([4.0, 6.0])), weight=3)
    result = aggregate([first, second], "raflora")
    assert result.rank == 2
    np.testing.assert_allclose(dense(result.factors), np.diag([3.5, 6.0]), atol=1e-5)


def test_carry_over_worked_by_hand():
    # The clients of levels 2 and 4 are here, n = 1 and 3; nobody of level 6 is. Partition (0, 2]:
    # ¼·4 + ¾·8 = 7 twice; (2, 4]: the lone owner's 8 twice; (4, 6]: components 5, 6 of previous.
    eye = torch.eye(6)
    low = ClientUpdate(eye[:2], 4 * eye[:, :2], weight=1)
    middle = ClientUpdate(eye[:4], 8 * eye[:, :4], weight=3)
    previous = LowRank(eye, torch.diag(torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])))
    result = aggregate([low, middle], "raflora", levels=(2, 4, 6), previous=previous)
    assert result.rank == 6
    np.testing.assert_allclose(dense(result.factors), np.diag([7, 7, 8, 8, 2, 1]), atol=1e-4)


def test_without_previous_an_unowned_partition_is_zero():
    eye = torch.eye(6)
    low = ClientUpdate(eye[:2], 4 * eye[:, :2])
    result = aggregate([low], "raflora", levels=(2, 4))
    np.testing.assert_allclose(dense(result.factors), np.diag([4, 4, 0, 0, 0, 0]), atol=1e-5)


@pytest.mark.parametrize("split", ["balanced", "left", "right"])
def test_split_decides_which_factor_carries_the_singular_values(split):
    clients = cohort(UNCUT["tall"])
    updates = [ClientUpdate(**arguments(c)) for c in clients]
    result = aggregate(updates, "raflora", split=split)
    assert_equals_oracle(total(result), raflora, clients, shared_gate_of, torch.float64)
    singular = result.singular_values
    power_B, power_A = {"balanced": (1, 1), "left": (2, 0), "right": (0, 2)}[split]
    gate = shared_gate_of(torch.float64, clients) * 2 * float(singular[0])
    torch.testing.assert_close(
        result.B.mT @ result.B, torch.diag(singular**power_B), rtol=0, atol=gate
    )
    torch.testing.assert_close(
        result.A @ result.A.mT, torch.diag(singular**power_A), rtol=0, atol=gate
    )


def test_distributed_pieces_are_nested_and_each_the_best_of_its_rank():
    case = CASES["layers"]
    clients = cohort(case)
    result = aggregate([ClientUpdate(**arguments(c)) for c in clients], "raflora")
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)
    for index, layer, _ in by_layer(clients):
        gate = shared_gate_of(torch.float64, layer)
        for piece, r, s in zip(pieces, case.ranks, case.scalings, strict=True):
            assert_best_rank(s * dense(piece)[index], raflora(layer), r, gate)


def test_a_rank_outside_the_levels_names_the_client():
    eye = torch.eye(6)
    good = ClientUpdate(eye[:2], eye[:, :2], id="clinic-a")
    bad = ClientUpdate(eye[:3], eye[:, :3], id="clinic-b")
    with pytest.raises(HetLoRAError, match="clinic-b") as caught:
        aggregate([good, bad], "raflora", levels=(2, 4))
    assert isinstance(caught.value, ValueError)
    assert "clinic-a" not in str(caught.value)
    with pytest.raises(HetLoRAError, match="1"):
        aggregate([ClientUpdate(g.A, g.B) for g in (good, bad)], "raflora", levels=(2, 4))


def test_previous_needs_the_configured_levels():
    # this round's participants cannot tell which partition is missing
    eye = torch.eye(6)
    previous = LowRank(eye, eye)
    with pytest.raises(HetLoRAError, match="levels"):
        aggregate([ClientUpdate(eye[:2], eye[:, :2])], "raflora", previous=previous)


@pytest.mark.parametrize("levels", [(), (0, 2), (2, 2.5), (-1, 2)], ids=str)
def test_levels_that_are_no_ranks_are_refused(levels):
    eye = torch.eye(6)
    with pytest.raises(HetLoRAError, match="levels"):
        aggregate([ClientUpdate(eye[:2], eye[:, :2])], "raflora", levels=levels)


def test_slots_that_are_no_prefix_are_refused():
    A, B = torch.ones(2, 5), torch.ones(4, 2)
    with pytest.raises(HetLoRAError, match=r"client 0 of rank 2 fills slots \(1, 2\).*use 'rb'"):
        aggregate([ClientUpdate(A, B, slots=(1, 2))], "raflora", levels=[2, 4])
