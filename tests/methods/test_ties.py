"""TIES-Merging (arXiv:2306.01708): trim, elect signs and merge in the shared core."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, aggregate_layers, distribute
from reference import DTYPES, Client, arguments, by_layer, cohort, dense, total
from reference_spaces import (
    CORE_CASES,
    bases_gate_of,
    core_gate_of,
    regauged,
    sum_scale,
    ties,
    ties_margin,
    ties_seed,
    weighted_core,
)
from tolerance import assert_best_rank, assert_leading_slices, distance, eps

F64 = torch.float64


def updates_of(clients, dtype=F64, ids=None):
    named = [{}] * len(clients) if ids is None else [{"id": id} for id in ids]
    return [
        ClientUpdate(**arguments(c, dtype), **name) for c, name in zip(clients, named, strict=True)
    ]


def run(clients, dtype=F64, **options):
    return aggregate(updates_of(clients, dtype), "ties", **options)


def diagonal(*entries, n=1.0, s=1.0):
    """A client whose update is diagonal, its scaling included."""
    return Client(np.eye(len(entries)), np.diag(np.array(entries, dtype=float)) / s, n, s)


def decided_cohort(case, dtype, density=0.5):
    """Clients none of whose entries is so near to another choice that rounding decides."""
    clients = cohort(case, dtype, ties_seed(case, dtype, density))
    for _, layer, _ in by_layer(clients):
        assert ties_margin(layer, density) > bases_gate_of(layer) + 10 * eps(dtype) * sum_scale(
            layer
        )
    return clients


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CORE_CASES.values(), ids=CORE_CASES)
def test_equals_the_oracle(case, dtype, density):
    clients = decided_cohort(case, dtype, density)
    result = run(clients, dtype, rank="full", density=density)
    assert result.A.dtype == dtype
    assert result.residual is None
    for index, layer, _ in by_layer(clients):
        expected = ties(layer, density)
        assert distance(total(result)[index], expected) <= core_gate_of(dtype, layer)


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CORE_CASES.values(), ids=CORE_CASES)
def test_truncation_is_the_best_of_its_rank(case, dtype, rank):
    clients = decided_cohort(case, dtype)
    result = run(clients, dtype, rank=rank)
    wanted = max(case.ranks) if rank is None else rank
    expected = min(wanted, case.out_features, case.in_features)
    assert result.rank == expected
    for index, layer, _ in by_layer(clients):
        gate = core_gate_of(dtype, layer)
        assert_best_rank(dense(result.factors)[index], ties(layer), expected, gate)


def test_the_default_density_is_one_half():
    clients = decided_cohort(CORE_CASES["square"], F64)
    gate = core_gate_of(F64, clients)
    assert distance(total(run(clients, rank="full")), ties(clients, 0.5)) <= gate
    for other in (0.4, 0.6):
        assert distance(ties(clients, 0.5), ties(clients, other)) > 0.01


def three():
    # p = ¼, ¼, ½: Σ p ΔW_k ΔW_kᵀ = diag(17.5, 3), the core's axes are e_1, e_2 in this order
    return [diagonal(4, 1, n=5), diagonal(-2, 3, n=5, s=2.0), diagonal(5, -1, n=10, s=0.5)]


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        # Two of four entries, both on the diagonal. Slot 1: ¼·4 − ¼·2 + ½·5 = 3 > 0, so 4 and 5
        # count, (¼·4 + ½·5) / ¾ = 14/3. Slot 2: ¼·1 + ¼·3 − ½·1 = ½ > 0, so 1 and 3: 1 / ½ = 2.
        (0.5, (14 / 3, 2.0)),
        # every entry: the others are zero and have no sign
        (1.0, (14 / 3, 2.0)),
        # one entry each, 4, 3 and 5: slot 1 as before, slot 2 is the second client's alone
        (0.25, (14 / 3, 3.0)),
        # a part of an entry counts whole
        (0.01, (14 / 3, 3.0)),
    ],
)
def test_worked_by_hand(density, expected):
    result = run(three(), density=density)
    np.testing.assert_allclose(total(result), np.diag(expected), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(result.singular_values, expected, rtol=1e-13)


def test_a_tie_of_signs_worked_by_hand():
    # slot 2: ½·2 − ½·2 = 0, no sign is elected and nothing is merged
    result = run([diagonal(4, 2), diagonal(6, -2)])
    np.testing.assert_allclose(total(result), np.diag([5.0, 0.0]), rtol=1e-13, atol=1e-13)


def test_the_sign_is_elected_by_examples_and_size():
    # −3 of one client outweighs 1 of another, until that has four times the examples
    first, second = diagonal(9, -3), diagonal(9, 1)
    np.testing.assert_allclose(total(run([first, second])), np.diag([9.0, -3.0]), atol=1e-13)
    second = replace(second, n=4)
    np.testing.assert_allclose(total(run([first, second])), np.diag([9.0, 1.0]), atol=1e-13)


def test_inputs_and_outputs_that_are_turned_turn_the_result():
    # In the core the axes turn along; the rule on the matrices' own entries would not.
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    turned = [replace(c, A=c.A @ turn.T, B=turn @ c.B) for c in three()]
    expected = turn @ np.diag([14 / 3, 2.0]) @ turn.T
    np.testing.assert_allclose(total(run(turned)), expected, rtol=1e-13, atol=1e-13)


def test_clients_that_agree_in_sign_are_averaged_by_examples():
    # at full density nothing is trimmed, and with one sign everywhere merging is the exact mean
    clients = [diagonal(4, 1, n=3), diagonal(2, 1, n=1)]
    np.testing.assert_allclose(
        total(run(clients, density=1.0)), np.diag([3.5, 1.0]), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("copies", [1, 2, 3, 4])
def test_one_repeated_client_comes_back(copies):
    # its core is diagonal: half of at least 3 × 3 entries hold the 3 that are not zero
    rng = np.random.default_rng(2)
    client = Client(rng.standard_normal((3, 8)), rng.standard_normal((5, 3)), 1, 0.7)
    clients = [replace(client, n=k + 1) for k in range(copies)]
    gate = core_gate_of(F64, clients)
    assert distance(total(run(clients, rank="full")), client.update()) <= gate
    assert distance(total(run(clients)), client.update()) <= gate


def test_one_repeated_client_keeps_its_largest_components_at_a_low_density():
    # 3 × 3 entries and a fifth of them, 1.8: of σ = 8, 4, 1 the first two
    client = diagonal(8, 4, 1)
    for copies in (1, 3):
        result = run([client] * copies, density=0.2)
        np.testing.assert_allclose(total(result), np.diag([8.0, 4.0, 0.0]), atol=1e-13)


@pytest.mark.parametrize(
    ("density", "expected"),
    [(0.2, [8, 0]), (0.25, [8, 0]), (0.26, [8, 4]), (0.5, [8, 4])],
)
@pytest.mark.parametrize("copies", [1, 3])
def test_the_share_is_of_the_entries_that_anybody_has(copies, density, expected):
    # Two components in a 10 × 10 matrix: 2 × 2 entries, of which a quarter is one, though R = 6
    # of three copies leaves room for 6 × 6. A copy does not make everybody keep more.
    client = Client(np.eye(2, 10), 4 * np.eye(10, 2) * np.array([2.0, 1.0]), 1)
    result = run([client] * copies, density=density)
    np.testing.assert_allclose(
        total(result), np.diag([*expected, *[0.0] * 8]), rtol=1e-13, atol=1e-13
    )


def test_a_client_of_weight_zero_has_no_vote():
    absent = [diagonal(-70, -50, n=0)] * 2
    assert distance(total(run([*three(), *absent])), np.diag([14 / 3, 2.0])) <= 1e-13


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_a_zero_component_of_a_client_changes_nothing(density):
    # R grows from 5 to 6, below both sizes: no entry of anybody's update is another one for it
    clients = decided_cohort(CORE_CASES["thin"], F64, density)
    first = clients[0]
    longer = replace(
        first,
        A=np.concatenate([first.A, np.zeros((1, 30))]),
        B=np.concatenate([first.B, np.zeros((40, 1))], axis=1),
    )
    one, other = (run([c, *clients[1:]], rank="full", density=density) for c in (first, longer))
    assert distance(total(one), total(other)) <= 2 * core_gate_of(F64, clients)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_a_client_split_into_two_halves_changes_nothing(density):
    clients = decided_cohort(CORE_CASES["thin"], F64, density)
    half = replace(clients[1], n=clients[1].n / 2)
    one = run(clients, rank="full", density=density)
    other = run([clients[0], half, half], rank="full", density=density)
    assert distance(total(one), total(other)) <= 2 * core_gate_of(F64, clients)


@pytest.mark.parametrize("case", [CORE_CASES["tall"], CORE_CASES["thin"]], ids=["tall", "thin"])
def test_gauge_and_order_of_the_clients_do_not_matter(case):
    clients = decided_cohort(case, F64)
    assert weighted_core(clients).condition() < 100
    found = total(run(clients, rank="full"))
    # re-mixing with a G of condition 4 perturbs every B_k A_k by a few roundings more
    gate = 10 * core_gate_of(F64, clients)
    for other in (regauged(clients), clients[::-1], clients[1:] + clients[:1]):
        assert distance(total(run(other, rank="full")), found) <= gate


@pytest.mark.parametrize("split", ["balanced", "left", "right"])
def test_split_decides_which_factor_carries_the_singular_values(split):
    clients = decided_cohort(CORE_CASES["square"], F64)
    result = run(clients, rank="full", split=split)
    gate = core_gate_of(F64, clients)
    assert distance(total(result), ties(clients)) <= gate
    S = result.singular_values
    power = {"balanced": 1, "left": 2, "right": 0}[split]
    held = S > gate  # a vector of no length has no direction
    gram = (result.B.mT @ result.B)[held][:, held]
    size = gate * max(1.0, 2 * float(S[0]))
    torch.testing.assert_close(gram, torch.diag(S[held] ** power), rtol=0, atol=size)


@pytest.mark.parametrize("max_group", [None, 1, 2])
def test_named_layers_have_cores_of_their_own(max_group):
    layers = {
        "q": decided_cohort(CORE_CASES["tall"], F64),
        "up": decided_cohort(CORE_CASES["square"], F64),
        "v": decided_cohort(replace(CORE_CASES["tall"], scalings=(2.0, 0.5, 1.0, 1.0)), F64),
        "k": [replace(c, A=3 * c.A[..., ::-1]) for c in decided_cohort(CORE_CASES["tall"], F64)],
    }
    results = aggregate_layers(
        {name: updates_of(clients) for name, clients in layers.items()},
        "ties",
        rank="full",
        max_group=max_group,
    )
    assert list(results) == list(layers)
    for name, clients in layers.items():
        error = distance(total(results[name]), ties(clients))
        assert error <= core_gate_of(F64, clients) < 1e-6


@pytest.mark.parametrize("case", [CORE_CASES["tall"], CORE_CASES["layers"]], ids=["tall", "layers"])
def test_distributed_pieces_are_nested_and_each_the_best_of_its_rank(case):
    clients = decided_cohort(case, F64)
    result = run(clients)
    assert result.nested
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)
    for index, layer, _ in by_layer(clients):
        gate = core_gate_of(F64, layer)
        for piece, r, s in zip(pieces, case.ranks, case.scalings, strict=True):
            assert_best_rank(s * dense(piece)[index], ties(layer), r, gate)


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.0},
        {"density": -0.5},
        {"density": 1.5},
        {"density": float("nan")},
        {"density": "half"},
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
