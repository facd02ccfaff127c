"""FedSA-LoRA (arXiv:2410.01463): A averaged over the owners of a slot, B stays with its client."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, aggregate_layers, distribute
from reference import (
    CASES,
    DTYPES,
    EQUAL_RANKS,
    SLOTS,
    arguments,
    array,
    by_layer,
    cohort,
    dense,
    fractions,
    rbla,
    total,
)
from reference_slots import FIRST, LAYERS, fedsa, into, model, slot_means
from tolerance import assert_equals_oracle, assert_leading_slices, averaged_gate, distance, eps

ALL = {**CASES, **{f"slots-{name}": case for name, case in SLOTS.items()}}
F64 = torch.float64


def updates_of(clients, dtype=F64):
    return [ClientUpdate(**arguments(c, dtype)) for c in clients]


def gate(dtype, clients):
    """The gate of factor means, the whole scaling in B."""
    return averaged_gate(dtype, into(clients, "B"))


def mean_gate(dtype, matrices):
    """(K+3)ε·sqrt(Σ‖X_k‖²): the same for one of the two factors."""
    return (len(matrices) + 3) * eps(dtype) * np.sqrt(sum(np.linalg.norm(X) ** 2 for X in matrices))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_equals_the_oracle(case, dtype):
    clients = cohort(case, dtype)
    result = aggregate(updates_of(clients, dtype), "fedsa")
    assert result.A.dtype == dtype
    assert result.residual is None
    assert_equals_oracle(total(result), fedsa, clients, gate, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_a_is_the_mean_over_the_owners_as_sent(case, dtype):
    # the product alone would not tell in which factor the scaling is
    clients = cohort(case, dtype)
    result = aggregate(updates_of(clients, dtype), "fedsa")
    assert result.rank == 1 + max(j for client in clients for j in client.owned)
    for index, layer, _ in by_layer(clients):
        weights = [client.n for client in layer]
        A, _ = slot_means(layer, weights)
        assert distance(result.A[index], A) <= mean_gate(dtype, [c.A for c in layer])
        _, B = slot_means(into(layer, "B"), weights)
        assert distance(result.B[index], B) <= mean_gate(dtype, [c.s * c.B for c in layer])


@pytest.mark.parametrize("case", [CASES["tall"], SLOTS["gap"]], ids=["tall", "gap"])
def test_the_scaling_does_not_move_the_mean_of_a(case):
    clients = cohort(case)
    unscaled = [replace(client, s=1.0) for client in clients]
    one = aggregate(updates_of(clients), "fedsa")
    two = aggregate(updates_of(unscaled), "fedsa")
    assert torch.equal(one.A, two.A)
    assert distance(one.B, two.B) > 0.1
    # a root of s in both would be rbla
    assert distance(total(one), rbla(clients)) > 0.1
    assert distance(total(two), rbla(unscaled)) <= 2 * gate(F64, unscaled)


@pytest.mark.parametrize("case", EQUAL_RANKS.values(), ids=EQUAL_RANKS)
def test_at_equal_ranks_a_is_the_plain_weighted_mean(case):
    clients = cohort(case)
    result = aggregate(updates_of(clients), "fedsa")
    expected = sum(p * c.A for p, c in zip(fractions(clients), clients, strict=True))
    assert distance(result.A, expected) <= mean_gate(F64, [client.A for client in clients])


def hand_updates():
    first = ClientUpdate(
        torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]), weight=1, scaling=4
    )
    second = ClientUpdate(
        torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([6.0, 5.0])), weight=3
    )
    return [first, second]


def test_worked_by_hand_with_mixed_scalings():
    # slot 1: ¼·1 + ¾·3 = 2.5 whatever the scalings, and ¼·(4·2) + ¾·6 = 6.5 with them;
    # slot 2 has one owner.  Product diag(16.25, 5); the root of 4 in both would give
    # (¼·2 + ¾·3)(¼·4 + ¾·6) = 2.75·5.5 = 15.125
    result = aggregate(hand_updates(), "fedsa")
    assert result.A.tolist() == [[2.5, 0.0], [0.0, 1.0]]
    assert result.B.tolist() == [[6.5, 0.0], [0.0, 5.0]]
    assert dense(result.factors).tolist() == [[16.25, 0.0], [0.0, 5.0]]


def test_only_a_replaces_the_clients_own():
    result = aggregate(hand_updates(), "fedsa")
    assert result.shared == {"A"}
    assert result.unscaled == "A"
    assert result.nested is True
    assert result.slotted is True


def test_a_slot_without_owners_is_empty():
    result = aggregate(updates_of(cohort(SLOTS["gap"])), "fedsa")
    assert result.rank == 5
    assert not result.A[3].any()
    assert not result.B[:, 3].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_distribute_hands_out_the_mean_of_a_as_it_is(case, dtype):
    result = aggregate(updates_of(cohort(case, dtype), dtype), "fedsa")
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)
    for piece, s in zip(pieces, case.scalings, strict=True):
        assert torch.equal(piece.A, result.A[..., : piece.rank, :])
        expected = array(result.B)[..., : piece.rank] / s
        assert distance(piece.B, expected) <= eps(dtype) * np.linalg.norm(expected)


def test_an_idle_round_changes_nothing():
    case = CASES["square"]
    result = aggregate(updates_of(cohort(case)), "fedsa")
    pieces = distribute(result, case.ranks, case.scalings)
    back = [
        ClientUpdate(piece.A, piece.B, weight=n, scaling=s)
        for piece, n, s in zip(pieces, case.n, case.scalings, strict=True)
    ]
    S = np.linalg.norm(array(result.A)) * np.linalg.norm(array(result.B))
    # K+3 as for components that agree, and the division of the way there
    error = distance(total(aggregate(back, "fedsa")), dense(result.factors))
    assert error <= (4 + 4) * eps(F64) * S


def test_layers_of_a_model_equal_the_oracle_one_by_one():
    layers = model(FIRST)
    results = aggregate_layers({name: updates_of(c) for name, c in layers.items()}, "fedsa")
    assert list(results) == list(LAYERS)
    for name, clients in layers.items():
        assert_equals_oracle(total(results[name]), fedsa, clients, gate, F64)
        A, _ = slot_means(clients, [client.n for client in clients])
        assert distance(results[name].A, A) <= mean_gate(F64, [client.A for client in clients])
        assert (results[name].shared, results[name].unscaled) == ({"A"}, "A")


@pytest.mark.parametrize("option", ["previous", "weighting", "round", "rank"])
def test_options_it_does_not_have_are_refused(option):
    with pytest.raises(HetLoRAError, match=option):
        aggregate(hand_updates(), "fedsa", **{option: None})
