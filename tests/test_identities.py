"""Identities between the methods, each through the library and against numbers or the oracle."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from hetlora_agg import METHODS, ClientUpdate, LowRank, aggregate, distribute
from reference import (
    CASES,
    EQUAL_RANKS,
    SLOTS,
    Case,
    arguments,
    by_layer,
    cohort,
    component,
    exact_mean,
    fold,
    fractions,
    mixed,
    mixing_of_factor_means,
    mixing_of_slot_shares,
    mixing_of_stack,
    owners,
    padded,
    previous_factors,
    slot_count,
    total,
)
from tolerance import (
    averaged_gate,
    distance,
    recompressed_gate,
    recompressed_gate_of,
    shared_gate_of,
)

F64 = torch.float64


def updates_of(clients):
    return [ClientUpdate(**arguments(client)) for client in clients]


def run(clients, method, **options):
    return total(aggregate(updates_of(clients), method, **options))


def gate_of(clients):
    """Either side may be a product of means or a recompressed mean of products."""
    return averaged_gate(F64, clients) + shared_gate_of(F64, clients)


def assert_same_update(one, other, clients):
    for index, layer, _ in by_layer(clients):
        assert distance(one[index], other[index]) <= gate_of(layer)


# R ≥ rank ≥ min(out, in): raflora's cut to its top level removes nothing
UNCUT = {
    "tall": Case(11, 5, (5, 2, 3), (1, 3, 2), (2.0, 0.5, 1.0)),
    "square": Case(6, 6, (2, 6), (5, 1), (1.0, 3.0)),
    "layers": Case(4, 9, (1, 4, 2), (4, 2, 3), (1.0, 2.0, 0.5), layers=(3,)),
}


@pytest.mark.parametrize("case", UNCUT.values(), ids=UNCUT)
def test_1_raflora_and_rb_give_the_same_product(case):
    clients = cohort(case)
    assert_same_update(run(clients, "rb"), run(clients, "raflora"), clients)


@pytest.mark.parametrize("case", [CASES["tall"], CASES["thin"]], ids=["tall", "thin"])
def test_1_holds_after_truncation(case):
    # below the gap both are the same projection of nearly the same matrix: compare what the
    # cut commutes with, the singular values
    clients = cohort(case)
    one, other = (aggregate(updates_of(clients), name) for name in ("rb", "raflora"))
    assert one.rank == other.rank
    error = np.abs(one.singular_values.numpy() - other.singular_values.numpy()).max()
    assert error <= gate_of(clients)


@pytest.mark.parametrize("case", [*CASES.values(), *SLOTS.values()], ids=[*CASES, *SLOTS])
def test_2_rbla_is_rb_with_the_cross_terms_of_each_slot(case):
    # mean of products − product of means, slot by slot: ½ Σ_kl γ_k γ_l (b_k − b_l)(a_k − a_l)
    clients = cohort(case)
    gap = run(clients, "rb", rank="full") - run(clients, "rbla")
    for index, layer, _ in by_layer(clients):
        layer = fold(layer)
        expected = np.zeros_like(gap[index])
        for j in range(slot_count(layer)):
            own = owners(layer, j)
            shares = fractions(own)
            for share_k, k in zip(shares, own, strict=True):
                for share_l, other in zip(shares, own, strict=True):
                    a = component(k, j)[0] - component(other, j)[0]
                    b = component(k, j)[1] - component(other, j)[1]
                    expected += 0.5 * share_k * share_l * np.outer(b, a)
        assert distance(gap[index], expected) <= gate_of(layer)


def test_3_replicate_equals_rbla_at_two_rank_levels_and_only_there():
    two = cohort(Case(9, 12, (2, 5, 5, 2), (5, 1, 2, 9), (1.0, 0.5, 2.0, 1.0)))
    assert_same_update(run(two, "replicate"), run(two, "rbla"), two)
    three = cohort(Case(9, 12, (2, 5, 3, 2), (5, 1, 2, 9), (1.0, 0.5, 2.0, 1.0)))
    assert distance(run(three, "replicate"), run(three, "rbla")) > 0.1


@pytest.mark.parametrize("case", [*CASES.values(), *SLOTS.values()], ids=[*CASES, *SLOTS])
def test_4_rbla_hafl_and_plora_are_one_formula(case):
    clients = cohort(case)
    expected = run(clients, "rbla")
    assert_same_update(run(clients, "hafl"), expected, clients)
    assert_same_update(run(clients, "plora", weighting="examples"), expected, clients)


@pytest.mark.parametrize("case", [*CASES.values(), *SLOTS.values()], ids=[*CASES, *SLOTS])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("flora", {}),
        ("flexlora", {"rank": "full"}),
        ("flexlora", {"fold_rest": True}),
        ("fedex", {}),
        ("ilora", {"rank": "full"}),
        ("fedask", {"rank": "full"}),
        ("glora", {"rank": "full"}),
        ("fedhl", {"rank": "full", "weighting": "examples", "previous": None}),
    ],
    ids=["flora", "flexlora", "fold_rest", "fedex", "ilora", "fedask", "glora", "fedhl"],
)
def test_5_the_exact_methods_all_give_the_mean_of_the_updates(case, method, options):
    clients = cohort(case)
    result = run(clients, method, **options)
    for index, layer, _ in by_layer(clients):
        gate = averaged_gate(F64, layer) + recompressed_gate_of(F64, layer)
        assert distance(result[index], exact_mean(layer)) <= gate


@pytest.mark.parametrize("case", [*CASES.values(), *SLOTS.values()], ids=[*CASES, *SLOTS])
@pytest.mark.parametrize(
    ("method", "options", "mixing"),
    [
        ("flora", {}, mixing_of_stack),
        ("rb", {"rank": "full"}, mixing_of_slot_shares),
        ("zeropad", {}, lambda cs: mixing_of_factor_means(cs, fractions(cs))),
        (
            "zeropad",
            {"weighting": "uniform"},
            lambda cs: mixing_of_factor_means(cs, [1 / len(cs)] * len(cs)),
        ),
    ],
    ids=["flora", "rb", "zeropad", "zeropad-uniform"],
)
def test_6_a_method_is_its_mixing_matrix(case, method, options, mixing):
    clients = cohort(case)
    result = run(clients, method, **options)
    for index, layer, _ in by_layer(clients):
        assert distance(result[index], mixed(layer, mixing(layer))) <= gate_of(layer)


def test_6_factor_means_at_equal_ranks_mix_by_a_kronecker_product():
    clients = cohort(EQUAL_RANKS["tall"])
    p = np.array(fractions(clients))
    result = run(clients, "fedit")
    kron = np.kron(np.outer(p, p), np.eye(clients[0].rank))
    assert distance(result, mixed(clients, kron)) <= gate_of(clients)
    stacked = run(clients, "flora")
    kron = np.kron(np.diag(p), np.eye(clients[0].rank))
    assert distance(stacked, mixed(clients, kron)) <= gate_of(clients)


@pytest.mark.parametrize("case", [*CASES.values(), *SLOTS.values()], ids=[*CASES, *SLOTS])
def test_the_bias_of_factor_means_has_its_closed_form(case):
    # Σ g ΔW − B̄ Ā = ½ Σ_ij g_i g_j (B_i − B_j)(A_i − A_j), zero-padded
    clients = cohort(case)
    bias = run(clients, "flora") - run(clients, "zeropad")
    for index, layer, _ in by_layer(clients):
        layer = fold(layer)
        g = fractions(layer)
        pads = [padded(client, slot_count(layer)) for client in layer]
        expected = sum(
            0.5 * g_i * g_j * (B_i - B_j) @ (A_i - A_j)
            for g_i, (A_i, B_i) in zip(g, pads, strict=True)
            for g_j, (A_j, B_j) in zip(g, pads, strict=True)
        )
        assert distance(bias[index], expected) <= gate_of(layer)
        if len(layer) > 1:
            assert np.linalg.norm(expected) > 1e6 * gate_of(layer)


@pytest.mark.parametrize("case", EQUAL_RANKS.values(), ids=EQUAL_RANKS)
@pytest.mark.parametrize(
    "chain",
    [
        [
            ("fedit", {}),
            ("zeropad", {}),
            ("rbla", {}),
            ("replicate", {}),
            ("plora", {"weighting": "examples"}),
            ("hafl", {}),
            ("fedrot", {"previous": None, "round": 1}),
        ],
        [("flexlora", {"rank": "full"}), ("rb", {"rank": "full"}), ("flora", {})],
    ],
    ids=["factor-space", "product-space"],
)
def test_8_equal_ranks_leave_one_method_per_space(case, chain):
    clients = cohort(case)
    results = [run(clients, name, **options) for name, options in chain]
    for one, other in pairwise(results):
        assert_same_update(one, other, clients)


def test_8_fedrot_of_strength_0_is_fedit():
    case = EQUAL_RANKS["tall"]
    clients = cohort(case)
    last = LowRank(*(torch.from_numpy(X) for X in previous_factors(case, 4)))
    for number in (1, 2):
        rotated = run(clients, "fedrot", previous=last, round=number, strength=0.0)
        assert_same_update(rotated, run(clients, "fedit"), clients)
    turned = run(clients, "fedrot", previous=last, round=1, strength=1.0)
    assert distance(turned, run(clients, "fedit")) > 1


def test_8_the_two_spaces_differ_even_at_equal_ranks():
    clients = cohort(EQUAL_RANKS["tall"])
    assert distance(run(clients, "fedit"), run(clients, "flora")) > 1


def test_8_raflora_at_equal_ranks_is_flexlora():
    clients = cohort(Case(9, 4, (4, 4), (3, 1), (1.0, 2.0)))
    assert_same_update(run(clients, "raflora"), run(clients, "flexlora"), clients)


# --- the published β ----------------------------------------------------------------------------

GOLDEN_RANKS = (4, 4, 16, 16, 64, 64, 128, 128, 256, 256)
GOLDEN_N = (500, 500, 1000, 1000, 1500, 1500, 1900, 1900, 2500, 2500)
GOLDEN_BETA = np.repeat(
    # 14800/14800, 14800/13800, 14800/11800, 14800/8800, 14800/5000
    [1.0, 1.072464, 1.254237, 1.681818, 2.96],
    [4, 12, 48, 64, 128],
)


@pytest.mark.parametrize("spokesman", [8, 9])
def test_golden_beta(spokesman):
    # One client of the top rank sends I = Σ_j e_j e_jᵀ and all others send B = 0, so the result is
    # diag(γ_j) = α diag(β_j) with α = 2500/14800: each slot's β can be read off the diagonal.
    eye = torch.eye(256, dtype=F64)
    updates = [
        ClientUpdate(eye[:r], eye[:, :r] if k == spokesman else 0 * eye[:, :r], weight=n)
        for k, (r, n) in enumerate(zip(GOLDEN_RANKS, GOLDEN_N, strict=True))
    ]
    alpha = 2500 / 14800
    result = run_updates(updates, "rb")
    np.testing.assert_allclose(np.diag(result) / alpha, GOLDEN_BETA, atol=5e-7)
    np.testing.assert_allclose(result, np.diag(np.diag(result)), atol=1e-12)


@pytest.mark.parametrize(("client", "alpha"), [(0, 500), (2, 1000), (5, 1500), (7, 1900)])
def test_golden_gamma_of_a_short_client_covers_only_its_slots(client, alpha):
    # the result's smallest singular values are 0: only the first r_k slots carry α_k β_j
    eye = torch.eye(256, dtype=F64)
    updates = [
        ClientUpdate(eye[:r], eye[:, :r] if k == client else 0 * eye[:, :r], weight=n)
        for k, (r, n) in enumerate(zip(GOLDEN_RANKS, GOLDEN_N, strict=True))
    ]
    expected = alpha / 14800 * GOLDEN_BETA
    expected[GOLDEN_RANKS[client] :] = 0
    np.testing.assert_allclose(np.diag(run_updates(updates, "rb")), expected, atol=1e-7)


def run_updates(updates, method, **options):
    return total(aggregate(updates, method, **options))


# --- the idle round -----------------------------------------------------------------------------

IDLE_RANKS = (2, 4, 4, 8)
IDLE_N = (5, 10, 15, 20)
# 50/50 own slots 1-2, 45/50 slots 3-4, 20/50 slots 5-8
Q = np.array([1, 1, 0.9, 0.9, 0.4, 0.4, 0.4, 0.4])
# 4/4, 3/4 and 1/4 of the clients
Q_UNIFORM = np.array([1, 1, 0.75, 0.75, 0.25, 0.25, 0.25, 0.25])
SIGMA = np.array([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
ONE = np.ones(8)
# Σ over the owners of slot j of w_k, w_k ∝ ‖ΔW_k‖ = sqrt(Σ_{i ≤ r_k} σ_i²)
NORMS = np.sqrt(np.cumsum(SIGMA**2))[np.array(IDLE_RANKS) - 1]
NORM_SHARE = np.array([NORMS[np.array(IDLE_RANKS) > j].sum() for j in range(8)]) / NORMS.sum()


def global_update(seed=11):
    """A 12 × 10 global update of rank 8 with the singular values SIGMA, and its (U, Vᵀ)."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((12, 8)))[0]
    V = np.linalg.qr(rng.standard_normal((10, 8)))[0]
    return (U * SIGMA) @ V.T, U, V.T


def idle_round(W, method, **options):
    """Clients receive the leading pieces of the rank-8 matrix W and send them back untouched."""
    U, sigma, Vh = np.linalg.svd(W)
    root = np.sqrt(sigma[:8])
    whole = ClientUpdate(
        torch.from_numpy(root[:, None] * Vh[:8]), torch.from_numpy(U[:, :8] * root)
    )
    last = aggregate([whole], "rb")
    held = distribute(last, IDLE_RANKS)
    idle = [ClientUpdate(piece.A, piece.B, weight=n) for piece, n in zip(held, IDLE_N, strict=True)]
    known = {"previous": last, "generator": torch.Generator().manual_seed(0), "round": 1}
    state = {name: known[name] for name in METHODS[method].needs}
    return run_updates(idle, method, **(state | options))


IDLE = [
    ("zeropad", {}, Q**2),
    ("zeropad", {"weighting": "uniform"}, Q_UNIFORM**2),
    ("flexlora", {}, Q),
    ("flexlora", {"rank": 3, "fold_rest": True}, Q),
    ("fedex", {}, Q),
    ("rb", {}, ONE),
    ("rb", {"rank": "full"}, ONE),
    ("rb", {"align": "svd"}, ONE),
    ("raflora", {}, ONE),
    ("rbla", {}, ONE),
    ("replicate", {}, ONE),
    # with a floor β: 1 where q_j ≥ β, else q_j/β, once per factor in factor space
    ("rb", {"floor": 0.5}, np.minimum(1, Q / 0.5)),
    ("rbla", {"floor": 0.5}, np.minimum(1, Q / 0.5) ** 2),
    # slots 5-8 have one owner
    ("rb", {"quorum": 2}, np.where(Q > 0.5, 1, 0)),
    ("rbla", {"quorum": 2}, np.where(Q > 0.5, 1, 0)),
    ("fedrot", {}, Q**2),
    ("fedrot", {"round": 2, "strength": 1.0}, Q**2),
    ("fair", {"regularisation": 0.0}, Q),
    ("fedask", {}, Q),
    ("glora", {}, Q),
    ("ffa", {}, Q),
    ("rolora", {}, Q),
    ("rolora", {"round": 2}, Q),
    ("dare", {"drop": 0.0}, Q),
    ("fedhl", {}, ONE),
    ("fedhl", {"weighting": "examples"}, ONE),
    ("plora", {}, ONE),
    ("hafl", {}, ONE),
    ("shared_a", {}, ONE),
    ("fedsa", {}, ONE),
    ("ties", {}, ONE),
    # 4, 3 and 1 of the 4 clients own a slot: zeros are the majority in the last
    ("median", {}, np.where(Q_UNIFORM > 0.5, 1, 0)),
    ("trimmed_mean", {}, np.where(Q_UNIFORM > 0.5, 1, 0)),
]


def test_7_hetlora_shares_by_the_norms_of_the_pieces():
    # of one round: the norms, and with them the multipliers, change from round to round
    W, U, Vh = global_update()
    expected = (U * SIGMA * NORM_SHARE**2) @ Vh
    gate = recompressed_gate(F64, 12, 10, float(SIGMA.sum()))
    assert distance(idle_round(W, "hetlora"), expected) <= gate


def test_7_ilora_multiplies_the_rows_of_its_own_triangle():
    W = global_update()[0]
    Qr, T = np.linalg.qr(W)
    pieces = [
        ClientUpdate(torch.from_numpy(T[:r].copy()), torch.from_numpy(Qr[:, :r].copy()), weight=n)
        for r, n in zip(IDLE_RANKS, IDLE_N, strict=True)
    ]
    expected = Qr[:, :8] @ (Q[:, None] * T[:8])
    gate = recompressed_gate(F64, 12, 10, float(np.linalg.norm(W) * np.sqrt(8)))
    assert distance(run_updates(pieces, "ilora"), expected) <= gate
    start = LowRank(torch.from_numpy(T[:8].copy()), torch.from_numpy(Qr[:, :8].copy()))
    assert np.linalg.norm(run_updates(pieces, "ilora", initial=start)) <= gate


def test_7_an_idle_round_of_fedit():
    W = global_update()[0]
    U, sigma, Vh = np.linalg.svd(W)
    piece = (
        torch.from_numpy(np.sqrt(sigma[:8, None]) * Vh[:8]),
        torch.from_numpy(U[:, :8] * np.sqrt(sigma[:8])),
    )
    assert distance(run_updates([piece, piece], "fedit"), W) <= recompressed_gate(F64, 12, 10, 36)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(
    ("method", "options", "multiplier"), IDLE, ids=[f"{name}-{opts}" for name, opts, _ in IDLE]
)
def test_7_an_idle_round_multiplies_each_singular_value(method, options, multiplier, rounds):
    W, U, Vh = global_update()
    for _ in range(rounds):
        W = idle_round(W, method, **options)
    expected = (U * SIGMA * multiplier.astype(float) ** rounds) @ Vh
    # Σ p_k ‖B_k‖ ‖A_k‖ = Σ p_k ‖ΔW_k‖_* ≤ Σ σ for balanced halves of an ordered SVD
    gate = rounds * recompressed_gate(F64, 12, 10, float(SIGMA.sum()))
    assert distance(W, expected) <= gate
    singular = np.linalg.svd(W, compute_uv=False)[:8]
    assert np.abs(singular - np.sort(SIGMA * multiplier**rounds)[::-1]).max() <= gate


def test_7_rank_collapse_shows_for_the_exact_mean_and_not_for_rank_sharing():
    # ρ(t) = Σ_{i ≤ 2} σ² / Σ σ² tends to 1 as the shared slots outlive the rare ones

    def share_of_the_first_two(method):
        W = global_update()[0]
        shares = []
        for _ in range(6):
            squares = np.linalg.svd(W, compute_uv=False) ** 2
            shares.append(squares[:2].sum() / squares.sum())
            W = idle_round(W, method)
        return np.array(shares)

    collapsing = share_of_the_first_two("flexlora")
    assert (np.diff(collapsing) > 0).all()
    # after five rounds: (8² + 7²) / (113 + 61·0.9^10 + 30·0.4^10) = 0.841572
    np.testing.assert_allclose(collapsing[[0, -1]], [113 / 204, 0.841572], atol=1e-6)
    np.testing.assert_allclose(share_of_the_first_two("rb"), 113 / 204, rtol=1e-12)
    np.testing.assert_allclose(share_of_the_first_two("raflora"), 113 / 204, rtol=1e-12)
