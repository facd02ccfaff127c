"""Coordinate-wise trimmed mean (arXiv:1803.01498): the extreme clients of every entry left out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, aggregate_layers, distribute
from reference import DTYPES, Client, arguments, by_layer, dense, exact_mean, total
from reference_spaces import (
    CORE_CASES,
    clear_cohort,
    core_gate_of,
    equal_core,
    median,
    regauged,
    trimmed_mean,
)
from tolerance import assert_best_rank, assert_leading_slices, distance

F64 = torch.float64


def updates_of(clients, dtype=F64, ids=None):
    named = [{}] * len(clients) if ids is None else [{"id": id} for id in ids]
    return [
        ClientUpdate(**arguments(c, dtype), **name) for c, name in zip(clients, named, strict=True)
    ]


def run(clients, dtype=F64, **options):
    return aggregate(updates_of(clients, dtype), "trimmed_mean", **options)


def diagonal(*entries, n=1.0, s=1.0):
    """A client whose update is diagonal, its scaling included."""
    return Client(np.eye(len(entries)), np.diag(np.array(entries, dtype=float)) / s, n, s)


@pytest.mark.parametrize("trim", [0.0, 0.1, 0.25, 1 / 3, 0.49])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CORE_CASES.values(), ids=CORE_CASES)
def test_equals_the_oracle(case, dtype, trim):
    clients = clear_cohort(case, dtype)
    result = run(clients, dtype, rank="full", trim=trim)
    assert result.A.dtype == dtype
    assert result.residual is None
    for index, layer, _ in by_layer(clients):
        expected = trimmed_mean(layer, trim)
        assert distance(total(result)[index], expected) <= core_gate_of(dtype, layer)


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
        assert_best_rank(dense(result.factors)[index], trimmed_mean(layer), expected, gate)


def test_the_default_trim_is_a_quarter():
    # of four clients one at either end; of "square", with K = 4
    clients = clear_cohort(CORE_CASES["square"])
    gate = core_gate_of(F64, clients)
    assert distance(total(run(clients, rank="full")), trimmed_mean(clients, 0.25)) <= gate
    assert distance(trimmed_mean(clients, 0.25), trimmed_mean(clients, 0.0)) > 0.1


def five():
    # Σ ΔW_k ΔW_kᵀ is diagonal, its first entry the larger: the core's axes are e_1, e_2
    return [
        diagonal(9, 1, n=100),
        diagonal(7, -5),
        diagonal(5, 2, s=2.0),
        diagonal(3, 3),
        diagonal(-90, 60, s=0.5),
    ]


@pytest.mark.parametrize(
    ("trim", "expected"),
    [
        # ⌊0.25 · 5⌋ = 1 at either end: (3 + 5 + 7)/3 of −90, 3, 5, 7, 9; (1 + 2 + 3)/3 of
        # −5, 1, 2, 3, 60. The weight of 100 is that client's own word and counts for nothing.
        (0.25, (5.0, 2.0)),
        # ⌊0.4 · 5⌋ = 2: only the middle one is left
        (0.4, (5.0, 2.0)),
        # nobody: (9 + 7 + 5 + 3 − 90)/5 = −13.2 and (1 − 5 + 2 + 3 + 60)/5 = 12.2
        (0.1, (-13.2, 12.2)),
    ],
)
def test_worked_by_hand(trim, expected):
    result = run(five(), trim=trim)
    np.testing.assert_allclose(total(result), np.diag(expected), rtol=1e-12, atol=1e-12)


def test_four_clients_worked_by_hand():
    # −70, 1, 2, 900 → 1.5 and 8, 1, 4, 6 → 5
    clients = [diagonal(-70, 8), diagonal(1, 1), diagonal(2, 4), diagonal(900, 6)]
    np.testing.assert_allclose(total(run(clients)), np.diag([1.5, 5.0]), rtol=1e-12, atol=1e-11)


def test_a_note_says_so_when_nobody_was_left_out():
    three = five()[:3]
    # ⌊0.25 · 3⌋ = 0: what was meant as a defence is the mean of all
    undefended = run(three)
    assert len(undefended.notes) == 1
    np.testing.assert_allclose(total(undefended), np.diag([7.0, -2 / 3]), rtol=1e-12, atol=1e-12)
    assert run(three, trim=0.34).notes == ()
    assert run(five()).notes == ()
    np.testing.assert_allclose(
        total(run(three, trim=0.34)), np.diag([7.0, 1.0]), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("trim", [0.25, 0.4])
def test_an_outlier_at_either_end_is_left_out(trim):
    rng = np.random.default_rng(1)
    honest = Client(rng.standard_normal((2, 6)), rng.standard_normal((7, 2)), 1)
    outlier = Client(1e4 * rng.standard_normal((3, 6)), rng.standard_normal((7, 3)), 1e9, 5.0)
    clients = [honest, outlier, replace(honest, n=3), honest]
    result = run(clients, rank="full", trim=trim)
    assert distance(total(result), honest.update()) <= core_gate_of(F64, clients)
    # negative control: the mean is the outlier's
    assert distance(exact_mean(clients), honest.update()) > 1


@pytest.mark.parametrize("case", [CORE_CASES["tall"], CORE_CASES["wide"]], ids=["tall", "wide"])
def test_with_nearly_half_left_out_it_is_the_median(case):
    clients = clear_cohort(case)
    one = total(run(clients, rank="full", trim=0.49))
    other = total(aggregate(updates_of(clients), "median", rank="full"))
    gate = 2 * core_gate_of(F64, clients)
    assert distance(one, other) <= gate
    assert distance(median(clients), trimmed_mean(clients, 0.49)) <= gate


@pytest.mark.parametrize("case", [CORE_CASES["tall"], CORE_CASES["layers"]], ids=["tall", "layers"])
def test_with_nobody_left_out_it_is_the_plain_mean(case):
    clients = clear_cohort(case)
    result = run(clients, rank="full", trim=0.0)
    for index, layer, _ in by_layer(clients):
        equal = [replace(c, n=1) for c in layer]
        assert distance(total(result)[index], exact_mean(equal)) <= core_gate_of(F64, layer)


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 8])
def test_one_repeated_client_comes_back(copies):
    rng = np.random.default_rng(2)
    client = Client(rng.standard_normal((3, 8)), rng.standard_normal((5, 3)), 1, 0.7)
    clients = [replace(client, n=k + 1) for k in range(copies)]
    gate = core_gate_of(F64, clients)
    assert distance(total(run(clients, rank="full")), client.update()) <= gate
    assert distance(total(run(clients)), client.update()) <= gate


def test_a_client_of_weight_zero_is_nobodys_extreme():
    absent = [diagonal(-1000, 500, n=0)] * 3
    one, other = run(five()), run([*five(), *absent])
    assert distance(total(one), total(other)) <= 1e-12


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
    assert distance(total(result), trimmed_mean(clients)) <= gate
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
        "trimmed_mean",
        rank="full",
        max_group=max_group,
    )
    assert list(results) == list(layers)
    for name, clients in layers.items():
        error = distance(total(results[name]), trimmed_mean(clients))
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
            assert_best_rank(s * dense(piece)[index], trimmed_mean(layer), r, gate)


@pytest.mark.parametrize(
    "options",
    [
        {"trim": -0.1},
        {"trim": 0.5},
        {"trim": 1.0},
        {"trim": float("nan")},
        {"trim": "some"},
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
