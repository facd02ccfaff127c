"""Coordinate-wise median (arXiv:1803.01498): the middle client of every core entry."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, aggregate_layers, distribute
from reference import DTYPES, Client, arguments, by_layer, dense, exact_mean, total
from reference_spaces import CORE_CASES, clear_cohort, core_gate_of, equal_core, median, regauged
from tolerance import assert_best_rank, assert_leading_slices, distance

F64 = torch.float64


def updates_of(clients, dtype=F64, ids=None):
    named = [{}] * len(clients) if ids is None else [{"id": id} for id in ids]
    return [
        ClientUpdate(**arguments(c, dtype), **name) for c, name in zip(clients, named, strict=True)
    ]


def run(clients, dtype=F64, **options):
    return aggregate(updates_of(clients, dtype), "median", **options)


def diagonal(*entries, n=1.0, s=1.0):
    """A client whose update is diagonal, its scaling included."""
    return Client(np.eye(len(entries)), np.diag(np.array(entries, dtype=float)) / s, n, s)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CORE_CASES.values(), ids=CORE_CASES)
def test_equals_the_oracle(case, dtype):
    clients = clear_cohort(case, dtype)
    result = run(clients, dtype, rank="full")
    assert result.A.dtype == dtype
    assert result.residual is None
    for index, layer, _ in by_layer(clients):
        assert distance(total(result)[index], median(layer)) <= core_gate_of(dtype, layer)


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CORE_CASES.values(), ids=CORE_CASES)
def test_truncation_is_the_best_of_its_rank(case, dtype, rank):
    clients = clear_cohort(case, dtype)
    result = run(clients, dtype, rank=rank)
    wanted = max(case.ranks) if rank is None else rank
    expected = min(wanted, case.out_features, case.in_features)
    assert result.rank == expected
    for index, layer, _ in by_layer(clients):
        gate = core_gate_of(dtype, layer)
        assert_best_rank(dense(result.factors)[index], median(layer), expected, gate)


def test_worked_by_hand():
    # Σ ΔW_k ΔW_kᵀ = diag(64 + 36 + 1, 1 + 9 + 4): the core's axes are e_1, e_2, in this order.
    # Middle of 8, 6, 1 and of 1, 3, 2; the weights are the clients' own word and count for nothing.
    clients = [diagonal(8, 1, n=100), diagonal(6, 3), diagonal(1, 2)]
    result = run(clients)
    np.testing.assert_allclose(total(result), np.diag([6.0, 2.0]), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(result.singular_values, [6.0, 2.0], rtol=1e-13)
    assert_best_rank(total(run(clients, rank=1)), np.diag([6.0, 2.0]), 1, 1e-13)


def test_an_even_number_of_clients_worked_by_hand():
    # the mean of the two in the middle: of 8, 6, 1, −5 it is 3.5, of 1, 3, 2, 2 it is 2
    clients = [diagonal(8, 1), diagonal(6, 3), diagonal(1, 2), diagonal(-5, 2)]
    np.testing.assert_allclose(total(run(clients)), np.diag([3.5, 2.0]), rtol=1e-13, atol=1e-13)


def test_scalings_worked_by_hand():
    # 2 · 4 = 8, ½ · 12 = 6 and 1: as above, whatever the scaling
    clients = [diagonal(8, 1, s=2.0), diagonal(6, 3, s=0.5), diagonal(1, 2, s=4 / 3)]
    np.testing.assert_allclose(total(run(clients)), np.diag([6.0, 2.0]), rtol=1e-13, atol=1e-13)


def test_inputs_and_outputs_that_are_turned_turn_the_median():
    # In the core the axes turn along; the median of the matrices' own entries would not.
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    clients = [diagonal(8, 1), diagonal(6, 3), diagonal(1, 2)]
    turned = [replace(c, A=c.A @ turn.T, B=turn @ c.B) for c in clients]
    expected = turn @ np.diag([6.0, 2.0]) @ turn.T
    np.testing.assert_allclose(total(run(turned)), expected, rtol=1e-13, atol=1e-13)
    entrywise = np.median([c.update() for c in turned], axis=0)
    assert distance(entrywise, expected) > 0.1


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_one_outlier_among_three_is_ignored(size):
    # two agree: whatever the third sends, in whatever direction, they are the middle of every entry
    rng = np.random.default_rng(1)
    honest = Client(rng.standard_normal((2, 6)), rng.standard_normal((7, 2)), 1)
    outlier = Client(size * rng.standard_normal((3, 6)), rng.standard_normal((7, 3)), 1e9, 5.0)
    clients = [honest, outlier, replace(honest, n=3)]
    result = run(clients, rank="full")
    assert distance(total(result), honest.update()) <= core_gate_of(F64, clients)
    # negative control: the mean is the outlier's
    assert distance(exact_mean(clients), honest.update()) > 1


@pytest.mark.parametrize("copies", [1, 2, 3, 4])
def test_one_repeated_client_comes_back(copies):
    rng = np.random.default_rng(2)
    client = Client(rng.standard_normal((3, 8)), rng.standard_normal((5, 3)), 1, 0.7)
    clients = [replace(client, n=k + 1) for k in range(copies)]
    gate = core_gate_of(F64, clients)
    assert distance(total(run(clients, rank="full")), client.update()) <= gate
    assert distance(total(run(clients)), client.update()) <= gate


def test_a_direction_that_few_clients_have_is_zero_in_the_middle():
    # two of five own slot 2: the middle of 5, 5, 0, 0, 0 is 0; with three of five it is theirs
    short, tall = Client(np.eye(2)[:1], 9 * np.eye(2)[:, :1], 1), diagonal(9, 5)
    np.testing.assert_allclose(
        total(run([tall, short, short, tall, short])), np.diag([9.0, 0.0]), atol=1e-13
    )
    np.testing.assert_allclose(
        total(run([tall, short, tall, tall, short])), np.diag([9.0, 5.0]), atol=1e-13
    )


def test_a_client_of_weight_zero_is_not_in_the_middle_of_anything():
    clients = [diagonal(8, 1), diagonal(6, 3), diagonal(1, 2)]
    absent = [diagonal(-70, 50, n=0)] * 2
    assert distance(total(run([*clients, *absent])), np.diag([6.0, 2.0])) <= 1e-13


def test_a_zero_component_of_a_client_changes_nothing():
    # R grows from 5 to 6, and the core with it, by directions in which nobody has anything
    clients = clear_cohort(CORE_CASES["thin"])
    first = clients[0]
    longer = replace(
        first,
        A=np.concatenate([first.A, np.zeros((1, 30))]),
        B=np.concatenate([first.B, np.zeros((40, 1))], axis=1),
    )
    one, other = (run([c, *clients[1:]], rank="full") for c in (first, longer))
    assert distance(total(one), total(other)) <= 2 * core_gate_of(F64, clients)


@pytest.mark.parametrize("case", [CORE_CASES["tall"], CORE_CASES["thin"]], ids=["tall", "thin"])
def test_gauge_and_order_of_the_clients_do_not_matter(case):
    clients = clear_cohort(case)
    assert equal_core(clients).condition() < 100
    found = total(run(clients, rank="full"))
    # re-mixing with a G of condition 4 perturbs every B_k A_k by a few roundings more
    gate = 10 * core_gate_of(F64, clients)
    for other in (regauged(clients), clients[::-1], clients[1:] + clients[:1]):
        assert distance(total(run(other, rank="full")), found) <= gate


@pytest.mark.parametrize("split", ["balanced", "left", "right"])
def test_split_decides_which_factor_carries_the_singular_values(split):
    clients = clear_cohort(CORE_CASES["square"])
    result = run(clients, rank="full", split=split)
    gate = core_gate_of(F64, clients)
    assert distance(total(result), median(clients)) <= gate
    S = result.singular_values
    power = {"balanced": 1, "left": 2, "right": 0}[split]
    held = S > gate  # a vector of no length has no direction
    gram = (result.B.mT @ result.B)[held][:, held]
    size = gate * max(1.0, 2 * float(S[0]))
    torch.testing.assert_close(gram, torch.diag(S[held] ** power), rtol=0, atol=size)


@pytest.mark.parametrize("max_group", [None, 1, 2])
def test_named_layers_have_cores_of_their_own(max_group):
    layers = {
        "q": clear_cohort(CORE_CASES["tall"]),
        "up": clear_cohort(CORE_CASES["square"]),
        "v": clear_cohort(replace(CORE_CASES["tall"], scalings=(2.0, 0.5, 1.0, 1.0))),
        "k": [replace(c, A=3 * c.A[..., ::-1]) for c in clear_cohort(CORE_CASES["tall"])],
    }
    results = aggregate_layers(
        {name: updates_of(clients) for name, clients in layers.items()},
        "median",
        rank="full",
        max_group=max_group,
    )
    assert list(results) == list(layers)
    for name, clients in layers.items():
        error = distance(total(results[name]), median(clients))
        assert error <= core_gate_of(F64, clients) < 1e-6


@pytest.mark.parametrize("case", [CORE_CASES["tall"], CORE_CASES["layers"]], ids=["tall", "layers"])
def test_distributed_pieces_are_nested_and_each_the_best_of_its_rank(case):
    clients = clear_cohort(case)
    result = run(clients)
    assert result.nested
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)
    for index, layer, _ in by_layer(clients):
        gate = core_gate_of(F64, layer)
        for piece, r, s in zip(pieces, case.ranks, case.scalings, strict=True):
            assert_best_rank(s * dense(piece)[index], median(layer), r, gate)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": "some"},
        {"rank": 2.0},
        {"split": "even"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(HetLoRAError, match=next(iter(options))):
        run([diagonal(4, 1), diagonal(2, 3)], **options)
