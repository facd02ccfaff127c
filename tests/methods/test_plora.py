"""Fed-PLoRA (arXiv:2602.16936): one-rank modules, each averaged over the clients that chose it."""

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
    cohort,
    dense,
    previous_factors,
    total,
)
from reference_slots import FIRST, LAYERS, SECOND, model, plora
from tolerance import assert_equals_oracle, averaged_gate, distance, eps

ALL = {**CASES, **{f"slots-{name}": case for name, case in SLOTS.items()}}
F64 = torch.float64


def updates_of(clients, dtype=F64):
    return [ClientUpdate(**arguments(c, dtype)) for c in clients]


def low_rank(factors, dtype=F64):
    return LowRank(*(torch.from_numpy(X).to(dtype) for X in factors))


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_equals_the_oracle(case, dtype, weighting):
    clients = cohort(case, dtype)
    result = aggregate(updates_of(clients, dtype), "plora", weighting=weighting)
    assert result.A.dtype == dtype
    assert_equals_oracle(total(result), plora, clients, averaged_gate, dtype, weighting=weighting)


@pytest.mark.parametrize("case", [CASES["tall"], SLOTS["gap"]], ids=["tall", "gap"])
def test_the_default_weighting_is_the_plain_mean(case):
    clients = cohort(case)
    result = aggregate(updates_of(clients), "plora")
    assert_equals_oracle(total(result), plora, clients, averaged_gate, F64, weighting="uniform")
    assert distance(total(result), plora(clients, weighting="examples")) > 1


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("width", [1, 4, 9])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_modules_nobody_chose_keep_their_previous_value(case, dtype, width, weighting):
    clients = cohort(case, dtype)
    factors = previous_factors(case, width, dtype)
    result = aggregate(
        updates_of(clients, dtype),
        "plora",
        previous=low_rank(factors, dtype),
        weighting=weighting,
    )
    assert_equals_oracle(
        total(result), plora, clients, averaged_gate, dtype, previous=factors, weighting=weighting
    )
    chosen = {j for client in clients for j in client.owned}
    for j in set(range(width)) - chosen:
        assert np.array_equal(array(result.A)[..., j, :], factors[0][..., j, :])
        assert np.array_equal(array(result.B)[..., j], factors[1][..., j])


def hand_updates():
    first = ClientUpdate(torch.eye(2), torch.diag(torch.tensor([2.0, 4.0])), weight=1)
    second = ClientUpdate(
        torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0], [8.0]]), weight=3, slots=[1]
    )
    return [first, second]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # module 0 has one client: 1·2;  module 1: ½(1 + 3) · ½(4 + 8) = 2·6
        ({}, (2.0, 12.0)),
        # (¼·1 + ¾·3)(¼·4 + ¾·8) = 2.5·7
        ({"weighting": "examples"}, (2.0, 17.5)),
        # module 2 was chosen by nobody: e_1 e_1ᵀ · 5 is still there; 0 and 1 are replaced
        (
            {
                "previous": LowRank(
                    torch.tensor([[9.0, 9.0], [9.0, 9.0], [1.0, 0.0]]),
                    torch.tensor([[9.0, 9.0, 5.0], [9.0, 9.0, 0.0]]),
                )
            },
            (7.0, 12.0),
        ),
    ],
    ids=["uniform", "examples", "previous"],
)
def test_worked_by_hand(options, expected):
    result = aggregate(hand_updates(), "plora", **options)
    np.testing.assert_allclose(
        dense(result.factors), np.diag(expected), rtol=4 * eps(torch.float32)
    )


def test_an_absent_client_does_not_count_in_the_plain_mean():
    absent = ClientUpdate(torch.ones(2, 2), torch.ones(2, 2), weight=0)
    result = aggregate([*hand_updates(), absent], "plora")
    assert dense(result.factors).tolist() == [[2.0, 0.0], [0.0, 12.0]]


@pytest.mark.parametrize("other", ["rbla", "hafl"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_by_examples_on_prefix_slots_it_is_rbla_and_hafl(case, dtype, other):
    # one formula, three rules to pick slots
    clients = cohort(case, dtype)
    one = aggregate(updates_of(clients, dtype), "plora", weighting="examples")
    two = aggregate(updates_of(clients, dtype), other)
    for index in np.ndindex(case.layers):
        layer = [replace(c, A=c.A[index], B=c.B[index]) for c in clients]
        error = distance(total(one)[index], total(two)[index])
        assert error <= 2 * averaged_gate(dtype, layer)


@pytest.mark.parametrize("case", EQUAL_RANKS.values(), ids=EQUAL_RANKS)
def test_by_examples_at_equal_ranks_it_is_fedit(case):
    clients = cohort(case)
    one = aggregate(updates_of(clients), "plora", weighting="examples")
    two = aggregate(updates_of(clients), "fedit")
    for index in np.ndindex(case.layers):
        layer = [replace(c, A=c.A[index], B=c.B[index]) for c in clients]
        error = distance(total(one)[index], total(two)[index])
        assert error <= 2 * averaged_gate(F64, layer)


def test_the_noise_of_a_module_is_the_mean_of_products_of_deviations():
    # A = B = ±3: mean of products 9, product of means 0, the noise 9 is more than 3 + 3
    three = torch.tensor([[3.0]])
    pair = [ClientUpdate(three, three), ClientUpdate(-three, -three)]
    assert not total(aggregate(pair, "plora")).any()
    assert float(total(aggregate(pair, "rb"))[0, 0]) == pytest.approx(9.0, rel=1e-6)
    clients = [replace(client, n=1.0, s=1.0) for client in cohort(EQUAL_RANKS["tall"])]
    result = aggregate(updates_of(clients), "plora")
    A, B = array(result.A), array(result.B)
    deviations = sum((c.B - B) @ (c.A - A) for c in clients) / len(clients)
    products = sum(c.B @ c.A for c in clients) / len(clients)
    gate = 4 * averaged_gate(F64, clients)
    assert distance(products - total(result), deviations) <= gate
    assert np.linalg.norm(deviations) > 1


def test_modules_are_of_equal_standing():
    result = aggregate(updates_of(cohort(SLOTS["gap"])), "plora")
    assert result.nested is False
    assert result.slotted is True
    assert result.unscaled is None
    assert result.shared == {"A", "B"}
    assert result.rank == 5
    assert result.residual is None


def test_distribute_refuses_a_slice_and_names_the_way_out():
    result = aggregate(updates_of(cohort(SLOTS["gap"])), "plora")
    with pytest.raises(HetLoRAError, match=r"client 1 asks for rank 3.*select_and_fold"):
        distribute(result, [5, 3])


@pytest.mark.parametrize("scalings", [[1.0, 1.0], [4.0, 0.5]], ids=str)
def test_distribute_hands_out_all_modules(scalings):
    result = aggregate(updates_of(cohort(SLOTS["layers"])), "plora")
    S = np.linalg.norm(array(result.A)) * np.linalg.norm(array(result.B))
    for piece, s in zip(distribute(result, [4, 4], scalings), scalings, strict=True):
        assert piece.rank == 4
        # a root and a division per factor
        assert distance(s * dense(piece), dense(result.factors)) <= 4 * eps(F64) * S


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_last_round_goes_straight_in_layer_by_layer(weighting):
    first, second = model(FIRST), model(SECOND, seed=1)
    last = aggregate_layers(
        {name: updates_of(clients) for name, clients in first.items()}, "plora", weighting=weighting
    )
    results = aggregate_layers(
        {name: updates_of(clients) for name, clients in second.items()},
        "plora",
        previous=last,
        weighting=weighting,
    )
    assert list(results) == list(LAYERS)
    for name, clients in second.items():
        previous = array(last[name].A), array(last[name].B)
        assert not last[name].nested
        assert_equals_oracle(
            total(last[name]), plora, first[name], averaged_gate, F64, weighting=weighting
        )
        assert_equals_oracle(
            total(results[name]),
            plora,
            clients,
            averaged_gate,
            F64,
            previous=previous,
            weighting=weighting,
        )
        for j in (0, 3):
            assert torch.equal(results[name].A[j], last[name].A[j])
            assert torch.equal(results[name].B[:, j], last[name].B[:, j])


def test_an_idle_round_changes_nothing():
    # everybody sends its choice back as it came; module 3 was chosen by nobody
    last = low_rank(previous_factors(FIRST, 5))
    idle = []
    for slots in ((0, 2), (1, 2, 4), (2,)):
        piece = last.select(list(slots))
        idle.append(ClientUpdate(piece.A, piece.B, slots=slots))
    result = aggregate(idle, "plora", previous=last)
    gate = (3 + 3) * eps(F64) * np.linalg.norm(last.A) * np.linalg.norm(last.B)
    assert distance(total(result), dense(last)) <= gate


@pytest.mark.parametrize("weighting", ["norm", "Examples", ""])
def test_an_unknown_weighting_lists_the_choices(weighting):
    with pytest.raises(HetLoRAError, match=r"weighting.*examples.*uniform") as caught:
        aggregate(hand_updates(), "plora", weighting=weighting)
    assert isinstance(caught.value, ValueError)


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
        aggregate(hand_updates(), "plora", previous=previous)


def test_previous_whose_components_are_no_slots_is_refused():
    stacked = aggregate(hand_updates(), "flora")
    with pytest.raises(HetLoRAError, match=r"previous=.*not nested"):
        aggregate(hand_updates(), "plora", previous=stacked)


def test_previous_of_a_model_goes_by_layer():
    layers = {name: updates_of(clients) for name, clients in model(SECOND).items()}
    last = low_rank(previous_factors(SECOND, 5))
    with pytest.raises(HetLoRAError, match=r"previous=.*mapping"):
        aggregate_layers(layers, "plora", previous=last)
    with pytest.raises(HetLoRAError, match=r"previous=.*'down' has none"):
        aggregate_layers(layers, "plora", previous={"q": last, "v": last})
