"""Common A, columns of B averaged over the owners of their slot: the nearest piece to AFLoRA."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, LowRank, aggregate, aggregate_layers, distribute
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
    exact_mean,
    previous_factors,
    rb,
    total,
)
from reference_slots import (
    FIRST,
    LAYERS,
    MIXED,
    SECOND,
    common_rows,
    into,
    model,
    shared_a,
    with_common,
)
from tolerance import (
    assert_equals_oracle,
    assert_leading_slices,
    averaged_gate,
    distance,
    eps,
    shared_gate_of,
)

ALL = {**CASES, **{f"slots-{name}": case for name, case in SLOTS.items()}}
HALVES = (torch.float16, torch.bfloat16)
F64 = torch.float64


def updates_of(clients, dtype=F64):
    return [ClientUpdate(**arguments(c, dtype)) for c in clients]


def low_rank(factors, dtype=F64):
    return LowRank(*(torch.from_numpy(X).to(dtype) for X in factors))


def frozen(case, dtype=F64, seed=0):
    return with_common(cohort(case, dtype, seed), "A")


def gate(dtype, clients):
    """A mean of B's that took the whole scaling, times A: the gate of factor means, so folded."""
    return averaged_gate(dtype, into(clients, "B"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_equals_the_oracle(case, dtype):
    clients = frozen(case, dtype)
    result = aggregate(updates_of(clients, dtype), "shared_a")
    assert result.A.dtype == dtype
    assert result.residual is None
    assert_equals_oracle(total(result), shared_a, clients, gate, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_the_product_is_that_of_rb(case, dtype):
    # nothing is averaged against anything, so factor space and product space agree
    clients = frozen(case, dtype)
    updates = updates_of(clients, dtype)
    result = total(aggregate(updates, "shared_a"))
    assert_equals_oracle(result, rb, clients, gate, dtype)
    product_space = total(aggregate(updates, "rb", rank="full"))
    for index, layer, _ in by_layer(clients):
        allowed = gate(dtype, layer) + shared_gate_of(dtype, layer)
        assert distance(result[index], product_space[index]) <= allowed


@pytest.mark.parametrize("case", EQUAL_RANKS.values(), ids=EQUAL_RANKS)
def test_exact_where_every_slot_is_owned_by_all(case):
    clients = frozen(case)
    result = aggregate(updates_of(clients), "shared_a")
    assert_equals_oracle(total(result), exact_mean, clients, gate, F64)


def test_not_the_exact_mean_where_a_slot_lacks_an_owner():
    clients = frozen(CASES["tall"])
    result = total(aggregate(updates_of(clients), "shared_a"))
    assert distance(result, exact_mean(clients)) > 1


@pytest.mark.parametrize("width", [1, 4, 9])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_slots_without_owners_are_carried_over_from_previous(case, dtype, width):
    clients = frozen(case, dtype)
    factors = previous_factors(case, width, dtype)
    result = aggregate(updates_of(clients, dtype), "shared_a", previous=low_rank(factors, dtype))
    assert_equals_oracle(total(result), shared_a, clients, gate, dtype, previous=factors)
    owned = {j for client in clients for j in client.owned}
    for j in set(range(width)) - owned:
        assert np.array_equal(array(result.A)[..., j, :], factors[0][..., j, :])
        assert np.array_equal(array(result.B)[..., j], factors[1][..., j])


@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_the_common_a_comes_back_bit_for_bit(case, dtype):
    # weights whose shares are no binary fractions: a mean of equal rows would round
    clients = frozen(case, dtype)
    result = aggregate(updates_of(clients, dtype), "shared_a")
    owned = sorted({j for client in clients for j in client.owned})
    assert result.rank == owned[-1] + 1
    for index, layer, _ in by_layer(clients):
        assert np.array_equal(result.A[index].double().numpy()[owned], common_rows(layer)[owned])


@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_distribute_leaves_the_common_a_alone(case, dtype):
    clients = frozen(case, dtype)
    result = aggregate(updates_of(clients, dtype), "shared_a")
    for piece, sent in zip(distribute(result, case.ranks, case.scalings), clients, strict=True):
        assert np.array_equal(piece.A.double().numpy(), sent.A)


def test_distributes_leading_slots_with_the_scaling_out_of_b():
    case = CASES["layers"]
    result = aggregate(updates_of(frozen(case)), "shared_a")
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
    # Slot 1: ¼·4 + ¾·6 = 5.5.  Slot 2 has one owner: 5, undiluted.  Product diag(5.5, 10).
    result = aggregate(hand_updates(), "shared_a")
    assert result.A.tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert result.B.tolist() == [[5.5, 0.0], [0.0, 5.0]]
    assert dense(result.factors).tolist() == [[5.5, 0.0], [0.0, 10.0]]


def test_a_diagonal_between_the_factors_goes_into_b():
    # Λ = diag(3, 0): the pruned slot is sent as a zero column and pulls the mean of slot 2 down,
    # ½(0 + 8) = 4, while slot 1 is ½(3·2 + 8) = 7
    A = torch.eye(2)
    pruned = ClientUpdate(
        A, torch.diag(torch.tensor([2.0, 5.0])) @ torch.diag(torch.tensor([3.0, 0.0]))
    )
    other = ClientUpdate(A, 8 * torch.eye(2))
    result = aggregate([pruned, other], "shared_a")
    assert dense(result.factors).tolist() == [[7.0, 0.0], [0.0, 4.0]]
    # sent without its pruned slot the client does not count there
    without = ClientUpdate(A[:1], pruned.B[:, :1], slots=[0])
    result = aggregate([without, other], "shared_a")
    assert dense(result.factors).tolist() == [[7.0, 0.0], [0.0, 8.0]]


def test_a_is_common_and_unscaled_and_b_is_handed_back():
    result = aggregate(hand_updates(), "shared_a")
    # both, since a slot that was carried over, or is new to a client, comes with its row of A
    assert result.shared == {"A", "B"}
    assert result.unscaled == "A"
    assert result.nested is True
    assert result.slotted is True


def test_an_idle_round_changes_nothing():
    case = CASES["square"]
    result = aggregate(updates_of(frozen(case)), "shared_a")
    pieces = distribute(result, case.ranks, case.scalings)
    back = [
        ClientUpdate(piece.A, piece.B, weight=n, scaling=s)
        for piece, n, s in zip(pieces, case.n, case.scalings, strict=True)
    ]
    S = np.linalg.norm(array(result.A)) * np.linalg.norm(array(result.B))
    # K+3 as for components that agree, and the division of the way there
    error = distance(total(aggregate(back, "shared_a")), dense(result.factors))
    assert error <= (4 + 4) * eps(F64) * S


def test_last_round_goes_straight_in_layer_by_layer():
    first, second = model(FIRST, common="A"), model(SECOND, seed=1, common="A")
    last = aggregate_layers({n: updates_of(c) for n, c in first.items()}, "shared_a")
    results = aggregate_layers(
        {n: updates_of(c) for n, c in second.items()}, "shared_a", previous=last
    )
    assert list(results) == list(LAYERS)
    for name, clients in second.items():
        assert_equals_oracle(total(last[name]), shared_a, first[name], gate, F64)
        previous = array(last[name].A), array(last[name].B)
        assert_equals_oracle(total(results[name]), shared_a, clients, gate, F64, previous=previous)
        for j in (0, 3):
            assert torch.equal(results[name].A[j], last[name].A[j])
            assert torch.equal(results[name].B[:, j], last[name].B[:, j])


@pytest.mark.parametrize(
    ("client", "component", "slot"), [(1, 0, 0), (1, 3, 3), (2, 0, 0)], ids=str
)
@pytest.mark.parametrize("names", [(0, 1, 2), ("a", "b", "c")], ids=["positions", "ids"])
def test_an_unequal_a_is_refused_naming_client_and_slot(client, component, slot, names):
    # ranks 4, 4, 2 and the least difference there is, in one entry
    updates = updates_of(frozen(replace(MIXED, ranks=(4, 4, 2))))
    A = updates[client].A.clone()
    A[component, 2] = torch.nextafter(A[component, 2], torch.tensor(torch.inf, dtype=F64))
    updates[client] = replace(updates[client], A=A)
    if names[0] == "a":
        updates = [replace(u, id=id) for u, id in zip(updates, names, strict=True)]
    with pytest.raises(
        HetLoRAError, match=rf"'shared_a'.*client {names[client]!r}: lora_A in slot {slot} "
    ) as caught:
        aggregate(updates, "shared_a")
    assert isinstance(caught.value, ValueError)


def test_one_unequal_layer_is_enough_to_refuse():
    updates = updates_of(frozen(CASES["layers"]))
    A = updates[2].A.clone()
    A[1, 2, 1, 3] += 1
    updates[2] = replace(updates[2], A=A)
    with pytest.raises(HetLoRAError, match=r"client 2: lora_A in slot 1 .*client 1"):
        aggregate(updates, "shared_a")
    layers = {name: updates_of(clients) for name, clients in model(MIXED, common="A").items()}
    A = layers["down"][1].A.clone()
    A[1] *= 2
    layers["down"][1] = replace(layers["down"][1], A=A)
    with pytest.raises(HetLoRAError, match=r"client 1: lora_A in slot 1 .*client 0"):
        aggregate_layers(layers, "shared_a")


@pytest.mark.parametrize(
    ("previous", "why"),
    [
        (LowRank(torch.ones(2, 2), torch.ones(3, 2)), r"\(2, 2\).*got \(3, 2\)"),
        (LowRank(torch.ones(1, 2, 2), torch.ones(1, 2, 2)), r"got \(1, 2, 2\)"),
        (LowRank(torch.full((2, 2), torch.nan), torch.ones(2, 2)), "NaN"),
        ((torch.ones(2, 2), torch.ones(2, 2)), "expected a LowRank"),
    ],
    ids=["shape", "layers", "nan", "tuple"],
)
def test_previous_that_does_not_fit_is_refused(previous, why):
    with pytest.raises(HetLoRAError, match=rf"previous=.*{why}"):
        aggregate(hand_updates(), "shared_a", previous=previous)


def test_previous_of_a_model_goes_by_layer():
    layers = {name: updates_of(clients) for name, clients in model(SECOND, common="A").items()}
    last = low_rank(previous_factors(SECOND, 5))
    with pytest.raises(HetLoRAError, match=r"previous=.*mapping"):
        aggregate_layers(layers, "shared_a", previous=last)
    with pytest.raises(HetLoRAError, match=r"previous=.*'down' has none"):
        aggregate_layers(layers, "shared_a", previous={"q": last, "v": last})


@pytest.mark.parametrize("option", ["weighting", "rank"])
def test_options_it_does_not_have_are_refused(option):
    with pytest.raises(HetLoRAError, match=option):
        aggregate(hand_updates(), "shared_a", **{option: 1})
