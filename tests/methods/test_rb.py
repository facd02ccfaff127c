"""RB-LoRA (acl:2026.findings-eacl.88): components weighted by data share times rank rarity."""

from itertools import product

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, LowRank, aggregate, distribute
from reference import (
    CASES,
    DTYPES,
    SLOTS,
    Case,
    Client,
    arguments,
    by_layer,
    cohort,
    coverage,
    dense,
    energy_rank,
    previous_factors,
    rb,
    total,
)
from tolerance import (
    assert_best_rank,
    assert_equals_oracle,
    assert_leading_slices,
    consensus_gate,
    distance,
    shared_gate_of,
)

ALL = {**CASES, **{f"slots-{name}": case for name, case in SLOTS.items()}}
CROWDS = {name: case for name, case in ALL.items() if len(case.ranks) >= 3}
BATCHED = {"tall": CASES["tall"], "layers": CASES["layers"]}


def run(case, dtype=torch.float64, **options):
    clients = cohort(case, dtype)
    updates = [ClientUpdate(**arguments(c, dtype)) for c in clients]
    return clients, aggregate(updates, "rb", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_equals_the_oracle(case, dtype):
    clients, result = run(case, dtype, rank="full")
    assert result.A.dtype == dtype
    assert result.dropped == ()
    assert_equals_oracle(total(result), rb, clients, shared_gate_of, dtype)


@pytest.mark.parametrize("ranks", list(product((1, 2, 4, 8), repeat=3)), ids=str)
def test_every_pattern_of_three_ranks(ranks):
    clients, result = run(Case(9, 10, ranks, (1, 2, 4), (1.0, 0.5, 2.0)), rank="full")
    assert_equals_oracle(total(result), rb, clients, shared_gate_of, torch.float64)


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_truncation_is_the_best_of_its_rank(case, dtype, rank):
    clients, result = run(case, dtype, rank=rank)
    wanted = max(case.ranks) if rank is None else rank
    expected = min(wanted, sum(case.ranks), case.out_features, case.in_features)
    assert result.rank == expected
    for index, layer, _ in by_layer(clients):
        gate = shared_gate_of(dtype, layer)
        assert_best_rank(dense(result.factors)[index], rb(layer), expected, gate)


@pytest.mark.parametrize("energy", [0.5, 0.9])
@pytest.mark.parametrize("case", BATCHED.values(), ids=BATCHED)
def test_energy_keeps_the_least_rank_per_layer(case, energy):
    clients, result = run(case, rank="full", energy=energy)
    for index, layer, _ in by_layer(clients):
        gate = shared_gate_of(torch.float64, layer)
        W = rb(layer)
        assert_best_rank(dense(result.factors)[index], W, energy_rank(W, energy), gate)


@pytest.mark.parametrize("floor", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_floor_bounds_the_share_of_rare_slots(case, floor):
    clients, result = run(case, rank="full", floor=floor)
    gate = shared_gate_of
    assert_equals_oracle(total(result), rb, clients, gate, torch.float64, floor=floor)


def test_floor_one_is_the_share_of_a_stack():
    # n_k / max(N_j, N) = n_k / N = p_k for every slot
    clients, floored = run(CASES["tall"], rank="full", floor=1.0)
    stacked = aggregate([ClientUpdate(**arguments(c)) for c in clients], "flora")
    gate = shared_gate_of(torch.float64, clients)
    assert distance(total(floored), total(stacked)) <= gate


@pytest.mark.parametrize("quorum", [1, 2, 3])
@pytest.mark.parametrize("case", CROWDS.values(), ids=CROWDS)
def test_quorum_drops_slots_with_too_few_owners(case, quorum):
    clients, result = run(case, rank="full", quorum=quorum)
    gate = shared_gate_of
    assert_equals_oracle(total(result), rb, clients, gate, torch.float64, quorum=quorum)
    few = {
        j
        for client in clients
        for j in client.owned
        if sum(j in other.owned for other in clients) < quorum
    }
    assert few <= set(result.dropped)
    owned = {j for client in clients for j in client.owned}
    assert not (owned - few) & set(result.dropped)


def test_a_quorum_nobody_reaches_drops_everything():
    _, result = run(CASES["tall"], quorum=5)
    assert result.dropped == (0, 1, 2, 3, 4, 5)
    assert not total(result).any()


@pytest.mark.parametrize("case", BATCHED.values(), ids=BATCHED)
def test_a_dropped_slot_is_carried_over_from_previous(case):
    clients = cohort(case)
    top = max(case.ranks)
    A, B = previous_factors(case, top + 1)
    updates = [ClientUpdate(**arguments(c)) for c in clients]
    previous = LowRank(torch.from_numpy(A), torch.from_numpy(B))
    result = aggregate(updates, "rb", rank="full", quorum=2, previous=previous)
    assert top - 1 in result.dropped
    assert_equals_oracle(
        total(result),
        rb,
        clients,
        shared_gate_of,
        torch.float64,
        previous=(A, B),
        quorum=2,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_unowned_slots_are_carried_over_from_previous(case, dtype):
    clients = cohort(case, dtype)
    A, B = previous_factors(case, max(case.ranks) + 3, dtype)
    updates = [ClientUpdate(**arguments(c, dtype)) for c in clients]
    previous = LowRank(torch.from_numpy(A).to(dtype), torch.from_numpy(B).to(dtype))
    result = aggregate(updates, "rb", rank="full", previous=previous)
    assert_equals_oracle(total(result), rb, clients, shared_gate_of, dtype, previous=(A, B))


def test_the_default_rank_does_not_shrink_below_previous():
    case = CASES["thin"]
    clients = cohort(case)
    A, B = previous_factors(case, 5)
    updates = [ClientUpdate(**arguments(c)) for c in clients]
    previous = LowRank(torch.from_numpy(A), torch.from_numpy(B))
    result = aggregate(updates, "rb", previous=previous)
    assert result.rank == 5
    gate = shared_gate_of(torch.float64, clients)
    gate += shared_gate_of(torch.float64, [Client(A, B, n=1)])
    assert_best_rank(dense(result.factors), rb(clients, previous=(A, B)), 5, gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_align_svd_takes_each_clients_own_components(case, dtype):
    clients, result = run(case, dtype, rank="full", align="svd")
    assert_equals_oracle(total(result), rb, clients, shared_gate_of, dtype, align="svd")


def test_align_svd_makes_the_result_independent_of_the_gauge():
    case = CASES["tall"]
    rng = np.random.default_rng(5)
    clients = cohort(case)
    updates, turned = [], []
    for client in clients:
        update = ClientUpdate(**arguments(client))
        G = torch.from_numpy(rng.standard_normal((client.rank, client.rank)))
        updates.append(update)
        turned.append(
            ClientUpdate(
                torch.linalg.solve(G, update.A), update.B @ G, weight=client.n, scaling=client.s
            )
        )
    aligned = [total(aggregate(u, "rb", rank="full", align="svd")) for u in (updates, turned)]
    # re-mixing with a G of condition κ perturbs every B_k A_k by κ(G) roundings
    gate = 50 * shared_gate_of(torch.float64, clients)
    assert distance(*aligned) <= gate
    plain = [total(aggregate(u, "rb", rank="full")) for u in (updates, turned)]
    assert distance(*plain) > 1


def test_equal_components_from_all_owners_come_back():
    # Σ_{S_j} γ_j^(k) = 1 on every owned slot, however few own it
    rng = np.random.default_rng(7)
    A, B = rng.standard_normal((6, 14)), rng.standard_normal((12, 6))
    updates = [
        ClientUpdate(torch.from_numpy(A[:r]), torch.from_numpy(B[:, :r]), weight=n)
        for r, n in ((2, 5), (4, 10), (6, 1))
    ]
    result = aggregate(updates, "rb")
    assert result.rank == 6
    gate = sum(
        consensus_gate(torch.float64, 3, np.linalg.norm(B[:, j]), np.linalg.norm(A[j]))
        for j in range(6)
    )
    # the SVD of the sum adds its own backward error to the components'
    gate += 10 * 14 * np.finfo(np.float64).eps * np.linalg.norm(A) * np.linalg.norm(B)
    assert distance(total(result), B @ A) <= gate


def hand_updates():
    first = ClientUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]), weight=1)
    second = ClientUpdate(torch.eye(2), torch.diag(torch.tensor([4.0, 6.0])), weight=3)
    return [first, second]


def hand_previous():
    return LowRank(torch.eye(2), torch.diag(torch.tensor([9.0, 7.0])))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # slot 1: ¼·2 + ¾·4 = 3.5;  slot 2 has one owner: 3/3·6 = 6
        ({}, (3.5, 6.0)),
        # N = 4, N_2 = 3 < 0.9·4 = 3.6: 3/3.6·6 = 5;  slot 1 has N_1 = 4 and does not change
        ({"floor": 0.9}, (3.5, 5.0)),
        # one owner of slot 2 is below the quorum of two
        ({"quorum": 2}, (3.5, 0.0)),
        # and then slot 2 is that of the previous update
        ({"quorum": 2, "previous": hand_previous()}, (3.5, 7.0)),
        # without the quorum both slots have owners: previous is not used
        ({"previous": hand_previous()}, (3.5, 6.0)),
        # the larger of the two singular values
        ({"rank": 1}, (0.0, 6.0)),
    ],
    ids=str,
)
def test_worked_by_hand(options, expected):
    result = aggregate(hand_updates(), "rb", **options)
    np.testing.assert_allclose(dense(result.factors), np.diag(expected), atol=1e-5)
    assert result.dropped == ((1,) if "quorum" in options else ())


def test_align_svd_worked_by_hand():
    # The second client lists its components small first: B A = 6 e_1e_1ᵀ + 8 e_2e_2ᵀ. By slots,
    # the first client's 2 e_1e_1ᵀ meets 6 e_1e_1ᵀ: ½·2 + ½·6 = 4, and 8 is owned alone.
    # By own SVD it meets 8 e_2e_2ᵀ: slot 1 is diag(1, 4), slot 2 the lone 6 e_1e_1ᵀ.
    first = ClientUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]))
    second = ClientUpdate(torch.eye(2), torch.diag(torch.tensor([6.0, 8.0])))
    plain = aggregate([first, second], "rb", rank="full")
    np.testing.assert_allclose(dense(plain.factors), np.diag([4.0, 8.0]), atol=1e-5)
    aligned = aggregate([first, second], "rb", rank="full", align="svd")
    np.testing.assert_allclose(dense(aligned.factors), np.diag([7.0, 4.0]), atol=1e-5)


@pytest.mark.parametrize("case", BATCHED.values(), ids=BATCHED)
def test_distributed_pieces_are_nested_and_each_the_best_of_its_rank(case):
    clients, result = run(case)
    assert result.nested
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)
    for index, layer, _ in by_layer(clients):
        gate = shared_gate_of(torch.float64, layer)
        for piece, r, s in zip(pieces, case.ranks, case.scalings, strict=True):
            assert_best_rank(s * dense(piece)[index], rb(layer), r, gate)


@pytest.mark.parametrize("split", ["balanced", "left", "right"])
def test_split_does_not_change_the_update(split):
    clients, result = run(CASES["wide"], rank="full", split=split)
    assert_equals_oracle(total(result), rb, clients, shared_gate_of, torch.float64)
    singular = result.singular_values
    gram_B, gram_A = result.B.mT @ result.B, result.A @ result.A.mT
    power_B, power_A = {"balanced": (1, 1), "left": (2, 0), "right": (0, 2)}[split]
    gate = shared_gate_of(torch.float64, clients) * 2 * float(singular[0])
    torch.testing.assert_close(gram_B, torch.diag(singular**power_B), rtol=0, atol=gate)
    torch.testing.assert_close(gram_A, torch.diag(singular**power_A), rtol=0, atol=gate)


def test_a_lone_owner_gets_weight_one_unless_a_defence_is_on():
    # one client of 100 declares a higher rank: its slot carries 1/100 under a stack, 1 under rb
    rng = np.random.default_rng(3)
    A, B = torch.from_numpy(rng.standard_normal((2, 6))), torch.from_numpy(np.eye(6)[:, :2])
    honest = [ClientUpdate(A[:1], B[:, :1]) for _ in range(99)]
    inflated = [*honest, ClientUpdate(A, B)]
    size = float(A[1].norm())

    def second_slot(**options):
        # B = [e_1 e_2]: row 2 of the update is the share of slot 2 times a^2
        return np.linalg.norm(total(aggregate(inflated, "rb", rank="full", **options))[1]) / size

    assert coverage(cohort(Case(6, 6, (1, 2), (99, 1), (1.0, 1.0))))[1] == 0.01
    np.testing.assert_allclose(second_slot(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(second_slot(floor=0.1), 0.1, rtol=1e-12)
    np.testing.assert_allclose(second_slot(quorum=2), 0.0, atol=1e-12)
    with pytest.raises(HetLoRAError, match="rank"):
        second_slot(max_rank=1)


@pytest.mark.parametrize(
    "options",
    [
        {"floor": -0.1},
        {"floor": 1.5},
        {"floor": float("nan")},
        {"quorum": 0},
        {"quorum": -1},
        {"quorum": 1.5},
        {"align": "qr"},
        {"rank": 0},
        {"energy": 2.0},
        {"split": "even"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(HetLoRAError, match=next(iter(options))):
        aggregate(hand_updates(), "rb", **options)


def test_previous_of_another_shape_is_refused():
    with pytest.raises(HetLoRAError, match="previous") as caught:
        aggregate(hand_updates(), "rb", previous=LowRank(torch.ones(2, 3), torch.ones(2, 2)))
    assert isinstance(caught.value, ValueError)


def test_slots_that_are_no_prefix_are_all_kept():
    eye = torch.eye(4)
    apart = [ClientUpdate(eye[s], eye[:, s], slots=s) for s in ([0, 1], [2, 3])]
    assert dense(aggregate(apart, "rb").factors).tolist() == eye.tolist()
    graded = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    agreeing = [ClientUpdate(graded[s], eye[:, s], slots=s) for s in ([0, 2], [1, 3], [0, 1])]
    found = dense(aggregate(agreeing, "rb").factors)
    assert np.abs(found - graded.numpy()).max() <= 1e-6
    previous = LowRank(3 * eye[:2], eye[:, :2])
    carried = dense(aggregate(apart[1:], "rb", previous=previous).factors)
    assert np.abs(carried - np.diag([3, 3, 1, 1])).max() <= 1e-6
