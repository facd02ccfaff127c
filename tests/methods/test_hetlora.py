"""HetLoRA (arXiv:2401.06432): factor means weighted by the size of the update."""

import math

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, aggregate, aggregate_layers, distribute
from reference import (
    CASES,
    DTYPES,
    SLOTS,
    Client,
    arguments,
    cohort,
    dense,
    hetlora,
    total,
    update_norms,
)
from tolerance import (
    assert_equals_oracle,
    assert_leading_slices,
    averaged_gate,
    distance,
    recompressed_gate_of,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES.values(), *SLOTS.values()], ids=[*CASES, *SLOTS])
def test_one_weight_per_client_over_all_layers(case, dtype):
    clients = cohort(case, dtype)
    result = aggregate([ClientUpdate(**arguments(c, dtype)) for c in clients], "hetlora")
    assert result.A.dtype == dtype
    assert_equals_oracle(
        total(result), hetlora, clients, averaged_gate, dtype, norms=update_norms(clients)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_layer_weighs_each_layer_by_its_own_norms(dtype):
    clients = cohort(CASES["layers"], dtype)
    updates = [ClientUpdate(**arguments(c, dtype)) for c in clients]
    result = aggregate(updates, "hetlora", per_layer=True)
    assert_equals_oracle(total(result), hetlora, clients, averaged_gate, dtype)
    # negative control: on these layers the two readings are far apart
    pooled = aggregate(updates, "hetlora")
    assert distance(total(pooled), total(result)) > 0.01


def test_named_layers_of_unequal_shape_share_one_weight_per_client():
    first, second = cohort(CASES["tall"]), cohort(CASES["square"])
    layers = {
        name: [ClientUpdate(**arguments(c), id=str(k)) for k, c in enumerate(clients)]
        for name, clients in (("first", first), ("second", second))
    }
    norms = list(np.hypot(update_norms(first), update_norms(second)))
    results = aggregate_layers(layers, "hetlora")
    for name, clients in (("first", first), ("second", second)):
        pooled = total(results[name])
        assert_equals_oracle(pooled, hetlora, clients, averaged_gate, torch.float64, norms=norms)
        assert distance(pooled, hetlora(clients)) > 0.01
    apart = aggregate_layers(layers, "hetlora", per_layer=True)
    for name, clients in (("first", first), ("second", second)):
        assert_equals_oracle(total(apart[name]), hetlora, clients, averaged_gate, torch.float64)


def test_worked_by_hand():
    # ‖ΔW_1‖ = 5, ‖ΔW_2‖ = ‖diag(9, 12)‖ = 15, so w = ¼, ¾ whatever n is.
    # Ā = diag(1, ¾),  B̄ = diag(¼·5 + ¾·9, ¾·12) = diag(8, 9),  product diag(8, 6.75).
    first = ClientUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0], [0.0]]), weight=10)
    second = ClientUpdate(torch.eye(2), torch.diag(torch.tensor([9.0, 12.0])), weight=1)
    result = aggregate([first, second], "hetlora")
    torch.testing.assert_close(result.A, torch.tensor([[1.0, 0.0], [0.0, 0.75]]), rtol=4e-7, atol=0)
    torch.testing.assert_close(result.B, torch.tensor([[8.0, 0.0], [0.0, 9.0]]), rtol=4e-7, atol=0)
    np.testing.assert_allclose(dense(result.factors), [[8, 0], [0, 6.75]], rtol=8e-7)


def test_the_scaling_counts_in_the_norm():
    # s = 3 triples the first norm to 15: w = ½, ½.  Folded factors are √3 A and √3 B, so
    # Ā = diag(½√3 + ½, ½),  B̄ = diag(½·5√3 + ½·9, ½·12):
    # slot 1: (√3 + 1)(5√3 + 9)/4 = (24 + 14√3)/4 = 12.062178,  slot 2: 3.
    first = ClientUpdate(
        torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        torch.tensor([[5.0], [0.0]], dtype=torch.float64),
        scaling=3.0,
    )
    second = ClientUpdate(
        torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([9.0, 12.0]).double())
    )
    result = aggregate([first, second], "hetlora")
    np.testing.assert_allclose(dense(result.factors), [[12.062177826491071, 0], [0, 3]], rtol=1e-14)


def test_a_cohort_of_zero_updates_stays_zero():
    # the weights are 0/0 here; a fresh LoRA init (B = 0) everywhere must not become NaN
    clients = [Client(c.A, 0 * c.B, c.n, c.s) for c in cohort(CASES["tall"])]
    result = aggregate([ClientUpdate(**arguments(c)) for c in clients], "hetlora")
    assert torch.isfinite(result.A).all()
    assert not total(result).any()


def test_an_idle_round_multiplies_by_the_squared_weight_of_the_owners():
    # clients hold the leading 2, 4, 4, 8 components of diag(8, 7, …, 1) and send them back;
    # w_k ∝ ‖leading r_k components‖, and singular value j shrinks by (Σ_{S_j} w_k)²
    sigma = np.arange(8.0, 0.0, -1.0)
    ranks = (2, 4, 4, 8)
    start = ClientUpdate(torch.eye(8).double(), torch.diag(torch.from_numpy(sigma)))
    pieces = distribute(aggregate([start], "rb"), ranks)
    updates = [ClientUpdate(piece.A, piece.B) for piece in pieces]
    norms = [np.sqrt((sigma[:r] ** 2).sum()) for r in ranks]
    share = [
        sum(v for v, r in zip(norms, ranks, strict=True) if r > j) / sum(norms) for j in range(8)
    ]
    expected = np.diag(sigma * np.square(share))
    result = total(aggregate(updates, "hetlora"))
    sent = [Client(p.A.numpy(), p.B.numpy(), 1.0) for p in pieces]
    assert distance(result, expected) <= recompressed_gate_of(torch.float64, sent)
    # the top client's weight is not its quarter of the cohort: its norm is the largest
    assert share[7] > 0.27


def test_distributes_leading_slots():
    case = CASES["wide"]
    result = aggregate([ClientUpdate(**arguments(c)) for c in cohort(case)], "hetlora")
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_that_cancels_to_zero_has_no_weight(dtype):
    A = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=dtype)
    cancels = ClientUpdate(A, torch.tensor([[1.0, -1.0], [2.0, -2.0]], dtype=dtype))
    eye = torch.eye(2, dtype=dtype)
    result = aggregate([cancels, ClientUpdate(eye, eye)], "hetlora")
    assert dense(result.factors).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_a_component_far_below_the_others_is_no_reason_to_refuse():
    tiny = torch.diag(torch.tensor([1.0, 1e-200], dtype=torch.float64))
    eye = torch.eye(2, dtype=torch.float64)
    result = aggregate([ClientUpdate(eye, tiny), ClientUpdate(eye, eye)], "hetlora")
    # Norms 1 and √2: the first entry agrees, the second is the second client's share.
    expected = [1.0, math.sqrt(2) / (1 + math.sqrt(2))]
    assert dense(result.factors).diagonal().tolist() == pytest.approx(expected, rel=1e-15)
