"""Faults found in published code, one regression test each.

Every test holds its negative control: the faulty formula, computed here on the same data, is
clearly somewhere else, so that the test would fail if the library had the fault.
"""

import math

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, LowRank, aggregate, aggregate_layers, distribute
from reference import (
    CASES,
    Case,
    Client,
    arguments,
    array,
    best_rank,
    by_layer,
    cohort,
    dense,
    exact_mean,
    fedex_residual,
    fold,
    fractions,
    hetlora,
    own_svd,
    rb,
    rbla,
    total,
    update_norms,
)
from tolerance import (
    assert_best_rank,
    averaged_gate,
    distance,
    recompressed_gate_of,
    shared_gate_of,
    stack_gate_of,
)

F64 = torch.float64
SQUARE = Case(8, 8, (2, 3, 5), (3, 1, 4), (1.0, 2.0, 0.5))
SVD_METHODS = ["flexlora", "rb", "raflora"]


def updates_of(clients, dtype=F64):
    return [ClientUpdate(**arguments(client, dtype)) for client in clients]


def run(clients, method, **options):
    return aggregate(updates_of(clients), method, **options)


def relative(actual, expected):
    return distance(actual, expected) / float(np.linalg.norm(expected))


def truncated(W, r):
    """U, σ, Vᵀ of the leading r components."""
    U, sigma, Vh = np.linalg.svd(W)
    return U[:, :r], sigma[:r], Vh[:r]


def before_truncation(method, clients):
    return exact_mean(clients) if method == "flexlora" else rb(clients)


def test_fault_1_rslora_scaling_is_alpha_over_root_rank():
    alpha, rank = 32, 16
    client = cohort(Case(24, 20, (rank,), (1,), (alpha / math.sqrt(rank),)))[0]
    expected = alpha / math.sqrt(rank) * client.B @ client.A
    merged = total(run([client], "flora"))
    assert distance(merged, expected) <= stack_gate_of(F64, [client])
    # the fault: α/r where the adapter was trained with α/√r, √16 = 4 times too small
    faulty = alpha / rank * client.B @ client.A
    assert math.isclose(np.linalg.norm(merged) / np.linalg.norm(faulty), 4.0, rel_tol=1e-12)


def test_fault_1_rslora_clients_get_back_what_they_would_merge():
    ranks, alpha = (4, 16), 32
    scalings = [alpha / math.sqrt(r) for r in ranks]
    clients = cohort(Case(24, 20, ranks, (1, 1), tuple(scalings)))
    result = run(clients, "rb")
    for piece, r, s in zip(distribute(result, ranks, scalings), ranks, scalings, strict=True):
        wanted = array(result.B)[:, :r] @ array(result.A)[:r]
        assert relative(s * dense(piece), wanted) < 1e-14
        assert relative(alpha / r * dense(piece), wanted) > 0.4


@pytest.mark.parametrize("method", ["flora", "flexlora", "fedex"])
def test_fault_2_alpha_over_rank_counts_when_ranks_differ(method):
    # one α for all: the clients' scalings are 16/2, 16/4 and 16/16
    clients = cohort(Case(14, 12, (2, 4, 16), (1, 2, 1), (8.0, 4.0, 1.0)))
    options = {"rank": "full"} if method == "flexlora" else {}
    result = total(run(clients, method, **options))
    gate = recompressed_gate_of(F64, clients) + averaged_gate(F64, clients)
    assert distance(result, exact_mean(clients)) <= gate
    unscaled = exact_mean([Client(c.A, c.B, c.n) for c in clients])
    assert relative(unscaled, exact_mean(clients)) > 0.5
    # nor can one common factor repair it
    best = np.vdot(unscaled, result) / np.vdot(unscaled, unscaled)
    assert relative(best * unscaled, result) > 0.2


@pytest.mark.parametrize("method", ["zeropad", "hetlora", "replicate", "rbla", "rb"])
def test_fault_2_factor_space_weighs_by_the_root_of_the_scaling(method):
    # the same ΔW_k, its scaling written in front or folded into both factors
    clients = cohort(CASES["tall"])
    folded = [client.folded() for client in clients]
    one, other = total(run(clients, method)), total(run(folded, method))
    gate = averaged_gate(F64, clients) + shared_gate_of(F64, clients)
    assert distance(one, other) <= gate
    ignored = total(run([Client(c.A, c.B, c.n) for c in clients], method))
    assert relative(ignored, one) > 0.1


def test_fault_3_ranks_added_at_distribution_can_learn():
    case = CASES["tall"]
    result = run(cohort(case), "rb", rank=3)
    piece = distribute(result, [5], generator=torch.Generator().manual_seed(0))[0]
    A, B = array(piece.A), array(piece.B)
    assert A.shape[0] == 5
    assert distance(B @ A, dense(result.factors)) <= shared_gate_of(F64, cohort(case))
    assert not B[:, 3:].any()
    bound = 1 / math.sqrt(case.in_features)
    assert (np.abs(A[3:]) <= bound).all()
    assert np.linalg.matrix_rank(A[3:]) == 2

    def gradients(A, B):
        # of ½‖X − B A‖² for a target X: dB = −(X − B A) Aᵀ, dA = −Bᵀ(X − B A)
        rest = np.random.default_rng(0).standard_normal((B.shape[0], A.shape[1])) - B @ A
        return rest @ A.T, B.T @ rest

    grad_B, grad_A = gradients(A, B)
    assert (np.linalg.norm(grad_B[:, 3:], axis=0) > 0.1).all()
    # the fault: zero rows and zero columns, and neither ever moves
    dead_A = A.copy()
    dead_A[3:] = 0
    grad_B, grad_A = gradients(dead_A, B)
    assert not grad_B[:, 3:].any()
    assert not grad_A[3:].any()


def test_fault_4_the_residual_of_a_square_layer_is_not_transposed():
    clients = cohort(SQUARE)
    result = run(clients, "fedex")
    expected = fedex_residual(clients)
    gate = averaged_gate(F64, clients) + stack_gate_of(F64, clients)
    assert distance(dense(result.residual), expected) <= gate
    assert relative(expected.T, expected) > 1
    faulty = dense(result.factors) + dense(result.residual).T
    assert relative(faulty, exact_mean(clients)) > 0.5
    assert distance(total(result), exact_mean(clients)) <= gate


def test_fault_4_fold_rest_on_a_square_layer():
    clients = cohort(SQUARE)
    result = run(clients, "flexlora", rank=2, fold_rest=True)
    gate = recompressed_gate_of(F64, clients)
    assert distance(total(result), exact_mean(clients)) <= gate
    rest = exact_mean(clients) - best_rank(exact_mean(clients), 2)
    assert relative(rest.T, rest) > 1


@pytest.mark.parametrize("split", ["balanced", "left", "right"])
@pytest.mark.parametrize("method", SVD_METHODS)
def test_fault_5_the_factors_multiply_to_the_singular_values(method, split):
    # U√S must meet √S Vᵀ: pairing it with V alone leaves √σ_i in place of σ_i
    clients = cohort(SQUARE)
    result = run(clients, method, split=split)
    W = before_truncation(method, clients)
    U, sigma, Vh = truncated(W, result.rank)
    gate = shared_gate_of(F64, clients)
    got = np.linalg.svd(dense(result.factors), compute_uv=False)[: result.rank]
    assert np.abs(got - sigma).max() <= gate
    assert_best_rank(dense(result.factors), W, result.rank, gate)
    faulty = (U * np.sqrt(sigma)) @ Vh
    assert relative(faulty, best_rank(W, result.rank)) > 0.3


@pytest.mark.parametrize("method", SVD_METHODS)
def test_fault_6_the_svd_of_the_transpose_is_not_returned(method):
    # wide and tall both ways round, and square where the shape would not give it away
    for case in (SQUARE, CASES["wide"], CASES["tall"]):
        clients = cohort(case)
        result = run(clients, method)
        W = before_truncation(method, clients)
        gate = shared_gate_of(F64, clients)
        assert dense(result.factors).shape == W.shape
        assert_best_rank(dense(result.factors), W, result.rank, gate)
    clients = cohort(SQUARE)
    W = before_truncation(method, clients)
    assert relative(best_rank(W.T, 5), best_rank(W, 5)) > 1


@pytest.mark.parametrize("method", SVD_METHODS)
def test_fault_6_transposing_every_client_transposes_the_result(method):
    clients = cohort(SQUARE)
    flipped = [Client(c.B.T, c.A.T, c.n, c.s) for c in clients]
    one, other = (total(run(cs, method)) for cs in (clients, flipped))
    W = before_truncation(method, clients)
    # two truncations meet across the gap at r: a perturbation E turns the leading subspaces by
    # ‖E‖/(gap − ‖E‖) at most, on both sides
    sigma = np.linalg.svd(W, compute_uv=False)
    r = run(clients, method).rank
    gate, gap = shared_gate_of(F64, clients), sigma[r - 1] - sigma[r]
    assert distance(one, other.T) <= gate * (1 + 2 * sigma[0] / (gap - gate))


def test_fault_7_sizes_are_measured_on_the_product_not_on_the_factors():
    # B c and A/c are the same update: ‖ΔW‖ does not move, ‖A‖ and ‖B‖ do
    clients = cohort(CASES["tall"])
    scaled = [Client(c.A / 4, 4 * c.B, c.n, c.s) if c is clients[0] else c for c in clients]
    factor_norms = [
        [float(np.hypot(np.linalg.norm(c.A), np.linalg.norm(c.B))) for c in cs]
        for cs in (clients, scaled)
    ]
    for cs in (clients, scaled):
        result = total(run(cs, "hetlora"))
        assert distance(result, hetlora(cs, update_norms(cs))) <= averaged_gate(F64, cs)
    np.testing.assert_allclose(update_norms(clients), update_norms(scaled), rtol=1e-14)
    assert factor_norms[1][0] > 2 * factor_norms[0][0]
    faulty = hetlora(scaled, factor_norms[1])
    assert relative(faulty, hetlora(scaled, update_norms(scaled))) > 0.1


@pytest.mark.parametrize("method", SVD_METHODS)
def test_fault_9_v_is_not_taken_for_its_transpose(method):
    # only a square layer lets the wrong product through
    clients = cohort(SQUARE)
    result = run(clients, method)
    W = before_truncation(method, clients)
    gate = shared_gate_of(F64, clients)
    assert_best_rank(dense(result.factors), W, result.rank, gate)
    U, sigma, Vh = np.linalg.svd(W)
    r = result.rank
    faulty = (U[:, :r] * sigma[:r]) @ Vh.T[:r]
    assert relative(faulty, best_rank(W, r)) > 1


def test_fault_9_in_the_alignment_by_each_clients_own_svd():
    clients = cohort(Case(6, 6, (6, 6, 3), (1, 2, 3), (1.0, 0.5, 2.0)))
    result = total(run(clients, "rb", rank="full", align="svd"))
    gate = shared_gate_of(F64, clients)
    assert distance(result, rb(clients, align="svd")) <= gate

    def with_v_for_its_transpose(client):
        U, sigma, Vh = np.linalg.svd(client.update())
        return Client(np.sqrt(sigma)[:, None] * Vh.T, U * np.sqrt(sigma), client.n)

    faulty = [with_v_for_its_transpose(client) for client in clients[:2]]
    assert (
        relative(rb([*faulty, clients[2]]), rb([*map(own_svd, fold(clients[:2])), clients[2]]))
        > 0.5
    )


def layers_with_a_gap():
    """Three clients in two layers; client "c" sends nothing for the second."""
    first = cohort(Case(7, 6, (2, 3, 4), (1, 2, 5), (1.0, 2.0, 0.5)), seed=1)
    second = cohort(Case(5, 8, (2, 3, 4), (1, 2, 5), (1.0, 2.0, 0.5)), seed=2)
    names = "abc"
    layers = {
        "first": [ClientUpdate(**arguments(c), id=i) for c, i in zip(first, names, strict=True)],
        "second": [
            ClientUpdate(**arguments(c), id=i) for c, i in zip(second[:2], names[:2], strict=True)
        ],
    }
    return layers, first, second


def test_fault_10_a_missing_layer_is_an_error_by_default():
    layers, _, _ = layers_with_a_gap()
    with pytest.raises(HetLoRAError, match="second") as caught:
        aggregate_layers(layers, "flora")
    assert isinstance(caught.value, ValueError)
    assert "c" in str(caught.value)


def test_fault_10_a_missing_layer_follows_the_stated_policy():
    layers, first, second = layers_with_a_gap()
    p = fractions(second)
    as_zero = p[0] * second[0].update() + p[1] * second[1].update()
    renormalised = exact_mean(second[:2])
    gate = stack_gate_of(F64, second)
    for policy, expected in (("zero", as_zero), ("renormalise", renormalised)):
        results = aggregate_layers(layers, "flora", missing=policy)
        assert distance(total(results["second"]), expected) <= 2 * gate
        assert distance(total(results["first"]), exact_mean(first)) <= stack_gate_of(F64, first)
    # the two readings are 8/3 apart: neither may be taken in silence
    assert math.isclose(np.linalg.norm(renormalised) / np.linalg.norm(as_zero), 8 / 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("method", ["rbla", "rb", "flora", "zeropad"])
def test_fault_11_a_diverged_client_is_named_not_masked(method, factor, value):
    clients = cohort(CASES["tall"])
    getattr(clients[2], factor)[1, 0] = value
    updates = [ClientUpdate(**arguments(c), id=f"clinic-{k}") for k, c in enumerate(clients)]
    with pytest.raises(HetLoRAError, match="clinic-2") as caught:
        aggregate(updates, method)
    assert isinstance(caught.value, ValueError)
    assert factor in str(caught.value)


def test_fault_11_dropping_a_diverged_client_drops_all_of_it():
    # a NaN mask would lose one entry and keep the diverged rest in the mean
    clients = cohort(CASES["tall"])
    clients[2].A[1:] *= 1e6
    clients[2].A[0, 0] = math.nan
    healthy = [c for k, c in enumerate(clients) if k != 2]
    updates = [ClientUpdate(**arguments(c), id=f"clinic-{k}") for k, c in enumerate(clients)]
    result = aggregate(updates, "rbla", on_bad_client="drop")
    assert "clinic-2" in str(result.excluded)
    assert distance(total(result), rbla(healthy)) <= averaged_gate(F64, healthy)
    masked = Client(np.nan_to_num(clients[2].A), clients[2].B, clients[2].n, clients[2].s)
    faulty = rbla([*clients[:2], masked, clients[3]])
    assert relative(faulty, rbla(healthy)) > 1


def test_fault_12_one_ordered_svd_serves_every_client(monkeypatch):
    case = CASES["layers"]
    clients = cohort(case)
    result = run(clients, "rb")

    def refuse(*args, **kwargs):
        raise AssertionError("a decomposition ran")

    for name in ("svd", "svdvals", "eigh", "eigvalsh", "eig", "qr", "lu", "cholesky"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    for name in ("svd", "qr", "svd_lowrank", "pca_lowrank", "lobpcg"):
        monkeypatch.setattr(torch, name, refuse)
    # the control: an aggregation does decompose, and the trap catches it
    with pytest.raises(AssertionError, match="decomposition"):
        run(clients, "rb")
    ranks = [1, 2, 4] * 20
    pieces = distribute(result, ranks)
    monkeypatch.undo()
    for index, layer, _ in by_layer(clients):
        gate = shared_gate_of(F64, layer)
        for piece, r in zip(pieces, ranks, strict=True):
            assert_best_rank(dense(piece)[index], rb(layer), r, gate)


def test_fault_12_the_order_of_the_components_is_what_makes_it_work():
    # negative control: leading slots of an unordered factorization are far from the best rank
    clients = cohort(CASES["tall"])
    result = run(clients, "rb")
    backwards = LowRank(result.A.flip(-2), result.B.flip(-1))
    W = rb(clients)
    best = distance(W, best_rank(W, 2))
    leading = distance(W, array(result.B)[:, :2] @ array(result.A)[:2])
    trailing = distance(W, array(backwards.B)[:, :2] @ array(backwards.A)[:2])
    assert leading <= best + shared_gate_of(F64, clients)
    assert trailing > 1.5 * best


def dead(adapter):
    """Slots that are zero in both factors: their gradients are zero for ever."""
    return ((adapter.A == 0).all(-1) & (adapter.B == 0).all(-2)).tolist()


@pytest.mark.parametrize("method", ["rb", "rbla"])
def test_fault_3_slots_emptied_by_a_quorum_can_be_trained(method):
    clients = [ClientUpdate(torch.ones(r, 6), torch.ones(5, r)) for r in (4, 2, 2)]
    result = aggregate(clients, method, quorum=2)
    assert any(dead(result.factors))
    (adapter,) = distribute(result, [4], [2.0])
    assert not any(dead(adapter))
    # A's new rows are PEFT's, whatever the client's scaling; the update stays what it was.
    assert bool((adapter.A[2:].abs() <= 1 / math.sqrt(6)).all())
    update = 2.0 * adapter.dense()
    assert torch.allclose(update, result.factors.dense(), atol=1e-5)


def test_fault_3_zero_singular_values_can_be_trained():
    B = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    B[:, 2:] = 0
    result = aggregate([ClientUpdate(torch.eye(4, 6), B)], "rb")
    assert dead(result.factors) == [False, False, True, True]
    small, large = distribute(result, [3, 6])
    assert not any(dead(small))
    assert not any(dead(large))
    assert torch.equal(small.A[2], large.A[2])
    assert torch.allclose(large.dense(), result.factors.dense(), atol=1e-6)


def test_fault_3_only_the_empty_layer_of_a_batch_is_filled():
    A, B = torch.ones(2, 1, 6), torch.ones(2, 5, 1)
    B[1] = 0
    result = aggregate([ClientUpdate(A, B)], "rb")
    (adapter,) = distribute(result, [1])
    assert torch.equal(adapter.A[0], result.A[0])
    assert not any(dead(LowRank(adapter.A[1], adapter.B[1])))
