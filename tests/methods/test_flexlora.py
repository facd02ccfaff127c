"""FlexLoRA (arXiv:2402.11505): the exact mean and its best approximation of a rank."""

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, distribute
from reference import (
    CASES,
    DTYPES,
    SLOTS,
    Client,
    arguments,
    array,
    by_layer,
    cohort,
    dense,
    energy_rank,
    flexlora,
    rounded,
    tail,
    total,
)
from tolerance import (
    assert_best_rank,
    assert_equals_oracle,
    assert_leading_slices,
    recompressed_gate_of,
)


def run(case, dtype=torch.float64, **options):
    clients = cohort(case, dtype)
    updates = [ClientUpdate(**arguments(c, dtype)) for c in clients]
    return clients, aggregate(updates, "flexlora", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES.values(), *SLOTS.values()], ids=[*CASES, *SLOTS])
def test_without_truncation_it_is_the_exact_mean(case, dtype):
    clients, result = run(case, dtype, rank="full")
    assert result.A.dtype == dtype
    assert result.residual is None
    assert_equals_oracle(total(result), flexlora, clients, recompressed_gate_of, dtype)


@pytest.mark.parametrize("rank", [None, 1, 3, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_truncation_is_the_best_of_its_rank(case, dtype, rank):
    clients, result = run(case, dtype, rank=rank)
    wanted = max(case.ranks) if rank is None else rank
    expected = min(wanted, sum(case.ranks), case.out_features, case.in_features)
    assert result.rank == expected
    for index, layer, _ in by_layer(clients):
        gate = recompressed_gate_of(dtype, layer)
        assert_best_rank(dense(result.factors)[index], flexlora(layer), expected, gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_singular_values_are_those_of_the_mean(case, dtype):
    clients, result = run(case, dtype)
    for index, layer, _ in by_layer(clients):
        sigma = np.linalg.svd(flexlora(layer), compute_uv=False)[: result.rank]
        # Weyl: singular values move by at most the norm of the perturbation
        gate = recompressed_gate_of(dtype, layer)
        assert np.abs(array(result.singular_values)[index] - sigma).max() <= gate


@pytest.mark.parametrize("split", ["balanced", "left", "right"])
@pytest.mark.parametrize("case", [CASES["tall"], CASES["layers"]], ids=["tall", "layers"])
def test_split_decides_which_factor_carries_the_singular_values(case, split):
    clients, result = run(case, split=split)
    power_B, power_A = {"balanced": (1, 1), "left": (2, 0), "right": (0, 2)}[split]
    for index, layer, _ in by_layer(clients):
        sigma = np.linalg.svd(flexlora(layer), compute_uv=False)[: result.rank]
        B, A = array(result.B)[index], array(result.A)[index]
        gate = recompressed_gate_of(torch.float64, layer)
        # a Gram entry of B is σ^power, so an error δ of the product shows as power·σ^(power−1)·δ
        size = max(1.0, 2 * sigma[0])
        np.testing.assert_allclose(B.T @ B, np.diag(sigma**power_B), rtol=0, atol=size * gate)
        np.testing.assert_allclose(A @ A.T, np.diag(sigma**power_A), rtol=0, atol=size * gate)
        assert_best_rank(B @ A, flexlora(layer), result.rank, gate)


@pytest.mark.parametrize("energy", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_energy_keeps_the_least_rank_per_layer(case, dtype, energy):
    clients, result = run(case, dtype, rank="full", energy=energy)
    wanted = []
    for index, layer, _ in by_layer(clients):
        W = flexlora(layer)
        wanted.append(energy_rank(W, energy))
        gate = recompressed_gate_of(dtype, layer)
        assert_best_rank(dense(result.factors)[index], W, wanted[-1], gate)
    assert result.rank == max(wanted)


def test_energy_one_keeps_everything():
    clients, result = run(CASES["thin"], rank="full", energy=1.0)
    assert_equals_oracle(total(result), flexlora, clients, recompressed_gate_of, torch.float64)


def test_rank_caps_energy():
    clients, result = run(CASES["tall"], rank=2, energy=0.99)
    assert energy_rank(flexlora(clients), 0.99) > 2
    assert result.rank == 2
    gate = recompressed_gate_of(torch.float64, clients)
    assert_best_rank(dense(result.factors), flexlora(clients), 2, gate)


def test_a_zero_mean_keeps_rank_one_under_energy():
    updates = [ClientUpdate(torch.ones(2, 5), torch.zeros(4, 2)) for _ in range(2)]
    result = aggregate(updates, "flexlora", energy=0.9)
    assert result.rank == 1
    assert torch.isfinite(result.A).all()
    assert not total(result).any()


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fold_rest_makes_the_total_exact(case, dtype, rank):
    clients, result = run(case, dtype, rank=rank, fold_rest=True)
    assert_equals_oracle(total(result), flexlora, clients, recompressed_gate_of, dtype)
    for index, layer, _ in by_layer(clients):
        gate = recompressed_gate_of(dtype, layer)
        W = flexlora(layer)
        assert_best_rank(dense(result.factors)[index], W, result.rank, gate)
        if tail(W, result.rank) > gate:
            assert 1 <= result.residual.rank <= sum(case.ranks)


SIZES = {"low-rank": (60, 50, 3), "lopsided": (120, 9, 5), "over-full": (12, 10, 9)}


def cancelling(rng, out_features, in_features, rank):
    """Two updates that cancel to a millionth: ‖ΔW‖ is far below S."""
    A, B = rng.standard_normal((rank, in_features)), rng.standard_normal((out_features, rank))
    nearby = A + 1e-6 * rng.standard_normal(A.shape)
    return [(A, B), (nearby, -B)]


def graded(rng, out_features, in_features, rank):
    """Components from 1 down to 1e-12: squaring them would lose every one below √ε."""
    grades = np.logspace(0, -12, rank)
    return [
        (grades[:, None] * rng.standard_normal((rank, in_features)), B)
        for B in rng.standard_normal((2, out_features, rank))
    ]


@pytest.mark.parametrize("options", [{"rank": "full"}, {"fold_rest": True}], ids=str)
@pytest.mark.parametrize("kind", [cancelling, graded])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_spectra_stay_within_the_gate(dtype, size, kind, options):
    pairs = kind(np.random.default_rng(4), *size)
    clients = [Client(rounded(A, dtype), rounded(B, dtype), 1.0) for A, B in pairs]
    result = aggregate(
        [ClientUpdate(**arguments(c, dtype)) for c in clients], "flexlora", **options
    )
    assert_equals_oracle(total(result), flexlora, clients, recompressed_gate_of, dtype)


def hand_updates():
    first = ClientUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]), weight=1)
    second = ClientUpdate(torch.eye(2), torch.diag(torch.tensor([4.0, 6.0])), weight=3)
    return [first, second]


def test_worked_by_hand():
    # ¼ diag(2, 0) + ¾ diag(4, 6) = diag(3.5, 4.5): σ = 4.5, 3.5, and the leading direction is e_2
    full = aggregate(hand_updates(), "flexlora")
    np.testing.assert_allclose(full.singular_values, [4.5, 3.5], rtol=1e-6)
    np.testing.assert_allclose(dense(full.factors), np.diag([3.5, 4.5]), atol=1e-5)
    one = aggregate(hand_updates(), "flexlora", rank=1)
    np.testing.assert_allclose(dense(one.factors), np.diag([0.0, 4.5]), atol=1e-5)


def test_energy_worked_by_hand():
    # σ² = 20.25, 12.25 of 32.5: the first alone holds 0.6231 of the energy
    assert aggregate(hand_updates(), "flexlora", energy=0.62).rank == 1
    assert aggregate(hand_updates(), "flexlora", energy=0.63).rank == 2


def test_fold_rest_worked_by_hand():
    result = aggregate(hand_updates(), "flexlora", rank=1, fold_rest=True)
    np.testing.assert_allclose(dense(result.factors), np.diag([0.0, 4.5]), atol=1e-5)
    np.testing.assert_allclose(dense(result.residual), np.diag([3.5, 0.0]), atol=1e-5)


@pytest.mark.parametrize("case", [CASES["tall"], CASES["layers"]], ids=["tall", "layers"])
def test_distributed_pieces_are_nested_and_each_the_best_of_its_rank(case):
    clients, result = run(case)
    assert result.nested
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)
    for index, layer, _ in by_layer(clients):
        gate = recompressed_gate_of(torch.float64, layer)
        for piece, r, s in zip(pieces, case.ranks, case.scalings, strict=True):
            assert_best_rank(s * dense(piece)[index], flexlora(layer), r, gate)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": "some"},
        {"energy": 0.0},
        {"energy": 1.5},
        {"energy": float("nan")},
        {"split": "even"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(HetLoRAError, match=next(iter(options))):
        aggregate(hand_updates(), "flexlora", **options)


@pytest.mark.parametrize("rank", [True, 2.0])
def test_a_rank_that_is_no_integer_is_refused(rank):
    with pytest.raises(HetLoRAError, match="rank"):
        aggregate(hand_updates(), "flexlora", rank=rank)
