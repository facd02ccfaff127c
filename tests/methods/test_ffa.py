"""FFA-LoRA (arXiv:2403.12313): one frozen A on all clients, zero-padded mean of B, exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, aggregate_layers, distribute
from reference import (
    CASES,
    DTYPES,
    SLOTS,
    arguments,
    array,
    by_layer,
    cohort,
    coverage,
    dense,
    exact_mean,
    total,
)
from reference_slots import FIRST, LAYERS, MIXED, common_rows, ffa, into, model, with_common
from tolerance import assert_equals_oracle, assert_leading_slices, averaged_gate, distance, eps

ALL = {**CASES, **{f"slots-{name}": case for name, case in SLOTS.items()}}
HALVES = (torch.float16, torch.bfloat16)
F64 = torch.float64


def updates_of(clients, dtype=F64):
    return [ClientUpdate(**arguments(c, dtype)) for c in clients]


def frozen(case, dtype=F64, seed=0):
    return with_common(cohort(case, dtype, seed), "A")


def gate(dtype, clients):
    """A mean of B's that took the whole scaling, times A: the gate of factor means, so folded."""
    return averaged_gate(dtype, into(clients, "B"))


@pytest.mark.parametrize("oracle", [ffa, exact_mean])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_equals_the_oracle_and_the_exact_mean(case, dtype, oracle):
    clients = frozen(case, dtype)
    result = aggregate(updates_of(clients, dtype), "ffa")
    assert result.A.dtype == dtype
    assert result.residual is None
    assert_equals_oracle(total(result), oracle, clients, gate, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_the_frozen_a_comes_back_bit_for_bit(case, dtype):
    # weights whose shares are no binary fractions: a mean of equal rows would round
    clients = frozen(case, dtype)
    result = aggregate(updates_of(clients, dtype), "ffa")
    owned = sorted({j for client in clients for j in client.owned})
    assert result.rank == owned[-1] + 1
    for index, layer, _ in by_layer(clients):
        assert np.array_equal(result.A[index].double().numpy()[owned], common_rows(layer)[owned])


@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_distribute_leaves_the_frozen_a_alone(case, dtype):
    clients = frozen(case, dtype)
    result = aggregate(updates_of(clients, dtype), "ffa")
    for piece, sent in zip(distribute(result, case.ranks, case.scalings), clients, strict=True):
        assert np.array_equal(piece.A.double().numpy(), sent.A)


def test_distributes_leading_slots_with_the_scaling_out_of_b():
    case = CASES["layers"]
    result = aggregate(updates_of(frozen(case)), "ffa")
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)
    for piece, s in zip(pieces, case.scalings, strict=True):
        expected = array(result.B)[..., : piece.rank] / s
        assert distance(piece.B, expected) <= eps(F64) * np.linalg.norm(expected)


def hand_updates():
    first = ClientUpdate(
        torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]), weight=1, scaling=4
    )
    second = ClientUpdate(
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        torch.diag(torch.tensor([12.0, 10.0])),
        weight=3,
        scaling=0.5,
    )
    return [first, second]


def test_worked_by_hand_with_mixed_scalings():
    # s_k whole in B: 4·1 = 4 against ½·diag(12, 10) = diag(6, 5); A stays diag(1, 2).
    # B_g = ¼ diag(4, 0) + ¾ diag(6, 5) = diag(5.5, 3.75), product diag(5.5, 7.5): slot 2 is
    # diluted once, and that is the exact mean, ¼·4 + ¾·6 and ¾·5·2.
    result = aggregate(hand_updates(), "ffa")
    assert result.A.tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert result.B.tolist() == [[5.5, 0.0], [0.0, 3.75]]
    assert dense(result.factors).tolist() == [[5.5, 0.0], [0.0, 7.5]]


def test_only_b_replaces_the_clients_own():
    result = aggregate(hand_updates(), "ffa")
    assert result.shared == {"B"}
    assert result.unscaled == "A"
    assert result.nested is True
    assert result.slotted is True


def test_an_idle_round_multiplies_slots_by_their_coverage():
    case = CASES["square"]
    result = aggregate(updates_of(frozen(case)), "ffa")
    pieces = distribute(result, case.ranks, case.scalings)
    back = [
        ClientUpdate(piece.A, piece.B, weight=n, scaling=s)
        for piece, n, s in zip(pieces, case.n, case.scalings, strict=True)
    ]
    q = np.array(coverage(cohort(case)))
    expected = (array(result.B) * q) @ array(result.A)
    S = np.linalg.norm(array(result.A)) * np.linalg.norm(array(result.B))
    # K+3 as for components that agree, and the division of the way there
    assert distance(total(aggregate(back, "ffa")), expected) <= (4 + 4) * eps(F64) * S
    assert distance(expected, dense(result.factors)) > 1


def test_layers_of_a_model_equal_the_oracle_one_by_one():
    layers = model(FIRST, common="A")
    results = aggregate_layers({name: updates_of(c) for name, c in layers.items()}, "ffa")
    assert list(results) == list(LAYERS)
    for name, clients in layers.items():
        assert_equals_oracle(total(results[name]), ffa, clients, gate, F64)
        owned = [0, 1, 2, 3, 4]
        assert np.array_equal(array(results[name].A)[owned], common_rows(clients)[owned])
        assert (results[name].shared, results[name].unscaled) == ({"B"}, "A")


def named(clients):
    return [replace(u, id=id) for u, id in zip(updates_of(clients), "abc", strict=True)]


@pytest.mark.parametrize(
    ("client", "component", "slot"), [(1, 0, 0), (1, 3, 3), (2, 0, 0)], ids=str
)
@pytest.mark.parametrize("names", [(0, 1, 2), ("a", "b", "c")], ids=["positions", "ids"])
def test_an_unequal_a_is_refused_naming_client_and_slot(client, component, slot, names):
    # ranks 4, 4, 2 and the least difference there is, in one entry
    case = replace(MIXED, ranks=(4, 4, 2))
    updates = updates_of(frozen(case))
    A = updates[client].A.clone()
    A[component, 2] = torch.nextafter(A[component, 2], torch.tensor(torch.inf, dtype=F64))
    updates[client] = replace(updates[client], A=A)
    if names[0] == "a":
        updates = [replace(u, id=id) for u, id in zip(updates, names, strict=True)]
    with pytest.raises(
        HetLoRAError, match=rf"'ffa'.*client {names[client]!r}: lora_A in slot {slot} "
    ) as caught:
        aggregate(updates, "ffa")
    assert isinstance(caught.value, ValueError)


def test_slots_are_compared_and_not_positions():
    # the rows are the same in the same order, but the clients put them into other slots
    clients = cohort(replace(MIXED, ranks=(2, 2, 2)))
    same = [
        replace(c, A=clients[0].A, slots=slots)
        for c, slots in zip(clients, ((0, 1), (1, 0), (0, 1)), strict=True)
    ]
    with pytest.raises(HetLoRAError, match=r"client 1: lora_A in slot [01] "):
        aggregate(updates_of(same), "ffa")


def test_one_unequal_layer_is_enough_to_refuse():
    case = CASES["layers"]
    updates = updates_of(frozen(case))
    A = updates[2].A.clone()
    A[1, 2, 0, 3] += 1
    updates[2] = replace(updates[2], A=A)
    with pytest.raises(HetLoRAError, match=r"client 2: lora_A in slot 0 .*client 0"):
        aggregate(updates, "ffa")
    layers = {name: named(clients) for name, clients in model(MIXED, common="A").items()}
    A = layers["down"][1].A.clone()
    A[1] *= 2
    layers["down"][1] = replace(layers["down"][1], A=A)
    with pytest.raises(HetLoRAError, match=r"client 'b': lora_A in slot 1 .*client 'a'"):
        aggregate_layers(layers, "ffa")


def test_a_dropped_client_need_not_share_the_frozen_a():
    clients = frozen(MIXED)
    updates = updates_of(clients)
    updates[0] = replace(updates[0], A=updates[0].A * torch.nan)
    result = aggregate(updates, "ffa", on_bad_client="drop")
    assert [who for who, _ in result.excluded] == [0]
    assert_equals_oracle(total(result), ffa, clients[1:], gate, F64)


@pytest.mark.parametrize("option", ["previous", "weighting", "round", "rank"])
def test_options_it_does_not_have_are_refused(option):
    with pytest.raises(HetLoRAError, match=option):
        aggregate(hand_updates(), "ffa", **{option: None})
