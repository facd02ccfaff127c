"""FedRot-LoRA (arXiv:2602.23638): factors rotated to last round's before they are averaged."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from hetlora_agg import (
    ClientUpdate,
    HetLoRAError,
    LowRank,
    aggregate,
    aggregate_layers,
    distribute,
)
from reference import (
    CASES,
    DTYPES,
    EQUAL_RANKS,
    Client,
    arguments,
    array,
    by_layer,
    cohort,
    coverage,
    fedit,
    fold,
    previous_factors,
    total,
    zeropad,
)
from reference_spaces import fedrot, rotation_condition
from tolerance import assert_equals_oracle, assert_leading_slices, averaged_gate, distance, eps

F64 = torch.float64
STRENGTHS = (0.0, 0.4, 0.7, 1.0)


def low_rank(factors, dtype=F64):
    A, B = factors
    return LowRank(torch.from_numpy(A).to(dtype), torch.from_numpy(B).to(dtype))


def updates_of(clients, dtype=F64):
    return [ClientUpdate(**arguments(c, dtype)) for c in clients]


def run(clients, previous, dtype=F64, **options):
    last = None if previous is None else low_rank(previous, dtype)
    return aggregate(updates_of(clients, dtype), "fedrot", previous=last, **options)


def rotated_gate(dtype, clients, earlier, round, strength):
    """The gate of averaged factors, and the error of the rotations on top.

    A rotation is off by LAPACK's backward error times its condition, and an error δ of every
    rotation moves the product of the two means by 2δ·sqrt(Σ‖B_k‖²)·sqrt(Σ‖A_k‖²).
    """
    sizes = max(clients[0].B.shape[-2], clients[0].A.shape[-1])
    plain = averaged_gate(dtype, clients)
    norms = plain / ((len(fold(clients)) + 3) * eps(dtype))
    condition = rotation_condition(clients, earlier, round, strength)
    return plain + 2 * 10 * sizes * eps(dtype) * condition * norms


@cache
def clear_draw(case, extra, round, strength, dtype=F64, start=0):
    """Clients and a reference whose rotations are well determined in every layer.

    The last direction of a proper rotation turns freely where σ_{r−1} = σ_r: not what is tested.
    """
    draws = []
    for seed in range(start, start + 30):
        clients = cohort(case, dtype, seed)
        previous = previous_factors(case, max(case.ranks) + extra, dtype, 1000 + seed)
        worst = max(
            rotation_condition(layer, earlier, round, strength)
            for _, layer, earlier in by_layer(clients, previous)
        )
        draws.append((worst, seed, clients, previous))
    worst, _, clients, previous = min(draws, key=lambda draw: draw[:2])
    assert worst < 300
    return clients, previous


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_oracle(case, dtype, extra, strength, round):
    clients, previous = clear_draw(case, extra, round, strength, dtype)
    result = run(clients, previous, dtype, round=round, strength=strength)
    assert result.A.dtype == dtype
    assert result.rank == max(case.ranks) + extra
    assert result.notes == ()
    for index, layer, earlier in by_layer(clients, previous):
        expected = fedrot(layer, earlier, round, strength)
        gate = rotated_gate(dtype, layer, earlier, round, strength)
        assert distance(total(result)[index], expected) <= gate


def test_the_default_strength_is_two_fifths():
    clients, previous = clear_draw(EQUAL_RANKS["tall"], 0, 1, 0.4)
    by_default = run(clients, previous, round=1)
    expected = fedrot(clients, previous, 1, 0.4)
    assert distance(total(by_default), expected) <= rotated_gate(F64, clients, previous, 1, 0.4)
    # negative control: neither end of the scale
    assert distance(expected, fedrot(clients, previous, 1, 0.0)) > 0.1
    assert distance(expected, fedrot(clients, previous, 1, 1.0)) > 0.1


@pytest.mark.parametrize("round", [1, 7])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_first_round_is_a_zero_padded_average(case, round):
    clients = cohort(case)
    result = run(clients, None, round=round)
    assert result.rank == max(case.ranks)
    assert_equals_oracle(total(result), zeropad, clients, averaged_gate, F64)


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_strength_zero_does_not_rotate(case, round):
    clients = cohort(case)
    previous = previous_factors(case, max(case.ranks) + 1)
    result = run(clients, previous, round=round, strength=0.0)
    assert_equals_oracle(total(result), zeropad, clients, averaged_gate, F64)


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("case", EQUAL_RANKS.values(), ids=EQUAL_RANKS)
def test_strength_zero_at_equal_ranks_is_fedit(case, round):
    clients = cohort(case)
    previous = previous_factors(case, case.ranks[0])
    result = run(clients, previous, round=round, strength=0.0)
    assert_equals_oracle(total(result), fedit, clients, averaged_gate, F64)


def orthogonal(rng, r, sign=None):
    """A random orthogonal matrix, of the wanted determinant."""
    Q, _ = np.linalg.qr(rng.standard_normal((r, r)))
    if sign is not None and np.sign(np.linalg.det(Q)) != sign:
        Q[:, 0] *= -1
    return Q


def gauges_of_one_update(ranks, signs=None, seed=3, out=9, in_features=7):
    """(A, B) balanced, and clients that hold its leading components in gauges of their own.

    A and B have orthogonal rows and columns, so that a leading slice is aligned to itself.
    """
    rng = np.random.default_rng(seed)
    r = max(ranks)
    root = np.sqrt(np.linspace(5.0, 1.0, r))
    A = root[:, None] * np.linalg.qr(rng.standard_normal((in_features, r)))[0].T
    B = np.linalg.qr(rng.standard_normal((out, r)))[0] * root
    clients = []
    for k, r_k in enumerate(ranks):
        Q = orthogonal(rng, r_k, None if signs is None else signs[k])
        clients.append(Client(Q @ A[:r_k], B[:, :r_k] @ Q.T, n=k + 1))
    return (A, B), clients


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("signs", [(1, 1, 1, 1), (1, -1, -1, 1)], ids=["proper", "reflected"])
def test_full_strength_averages_rotated_copies_of_one_update_without_loss(signs, round):
    (A, B), clients = gauges_of_one_update((4, 4, 4, 4), signs)
    result = run(clients, (A, B), round=round, strength=1.0)
    gate = rotated_gate(F64, clients, (A, B), round, 1.0)
    assert distance(total(result), B @ A) <= gate
    # negative control: unrotated, most of it cancels
    assert distance(fedit(clients), B @ A) > 1


@pytest.mark.parametrize("round", [1, 2])
def test_short_clients_are_aligned_to_their_own_slots(round):
    # r_k × r_ref with orthonormal rows: slot j comes back as itself, times the share of its owners
    ranks = (1, 2, 4)
    (A, B), clients = gauges_of_one_update(ranks)
    result = run(clients, (A, B), round=round, strength=1.0)
    q = np.array(coverage(clients))
    expected = (B * q**2) @ A
    gate = rotated_gate(F64, clients, (A, B), round, 1.0)
    assert distance(total(result), expected) <= gate
    assert distance(array(result.A), q[:, None] * A) <= gate
    assert distance(array(result.B), B * q) <= gate


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_an_idle_round_multiplies_by_the_squared_coverage(strength, round):
    (A, B), _ = gauges_of_one_update((4,))
    ranks = (1, 2, 2, 4)
    clients = [Client(A[:r], B[:, :r], n) for r, n in zip(ranks, (5, 10, 15, 20), strict=True)]
    result = run(clients, (A, B), round=round, strength=strength)
    # q = 1, 45/50, 20/50, 20/50
    expected = (B * np.array([1.0, 0.81, 0.16, 0.16])) @ A
    gate = rotated_gate(F64, clients, (A, B), round, strength)
    assert distance(total(result), expected) <= gate


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("case", [CASES["tall"], CASES["wide"], CASES["square"]])
def test_a_rotation_leaves_a_clients_product_as_it_is(case, strength, round):
    previous = previous_factors(case, max(case.ranks) + 1)
    for client in cohort(case):
        result = run([client], previous, round=round, strength=strength)
        # whatever R is: only how far it is from orthogonal counts, and that is rounding
        norms = np.linalg.norm(client.folded().A) * np.linalg.norm(client.folded().B)
        gate = 2 * 10 * max(case.out_features, case.in_features) * eps(F64) * norms
        assert distance(total(result), client.update()) <= gate


@pytest.mark.parametrize("round", [1, 3, 2, 4])
def test_odd_rounds_look_at_A_and_even_rounds_at_B(round):
    (A, B), _ = gauges_of_one_update((4,))
    rng = np.random.default_rng(8)
    # one factor is the reference's in another gauge, the other one is anything
    clients = []
    for _ in range(3):
        Q = orthogonal(rng, 4)
        any_A, any_B = rng.standard_normal(A.shape), rng.standard_normal(B.shape)
        clients.append(Client(Q @ A, any_B, 1) if round % 2 else Client(any_A, B @ Q.T, 1))
    result = run(clients, (A, B), round=round, strength=1.0)
    gate = rotated_gate(F64, clients, (A, B), round, 1.0)
    seen, reference = (result.A, A) if round % 2 else (result.B, B)
    assert distance(array(seen), reference) <= gate
    # negative control: by the other factor it would not have been aligned
    other = run(clients, (A, B), round=round + 1, strength=1.0)
    assert distance(array(other.A if round % 2 else other.B), reference) > 0.1


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize(
    ("strength", "kept"),
    [
        # ¼ D (I + Tᵀ)(I + T) = ¼ (2 + 2 cos) D for a second client turned by what is left of 90°:
        # nothing done leaves 90°, half strength leaves polar((I + J)/2) = 45°, full strength none
        (0.0, 0.5),
        (0.5, (2 + np.sqrt(2)) / 4),
        (1.0, 1.0),
    ],
    ids=str,
)
def test_a_quarter_turn_worked_by_hand(strength, kept, round):
    # D = diag(4, 6). The first client sends (I, D), the second (J, D Jᵀ), J the quarter turn.
    # Odd: M = J Iᵀ, R = J. Even: M = (D Jᵀ)ᵀ D = J D², R = J again.
    eye, D = np.eye(2), np.diag([4.0, 6.0])
    J = np.array([[0.0, -1.0], [1.0, 0.0]])
    clients = [Client(eye, D, 1), Client(J, D @ J.T, 1)]
    result = run(clients, (eye, D), round=round, strength=strength)
    np.testing.assert_allclose(total(result), kept * D, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize(
    ("strength", "kept", "noted"),
    [
        # −I is a proper rotation by 180° in the plane. polar(0.6 I − 0.4 I) = I: the copies cancel;
        # polar(0.4 I − 0.6 I) = −I: they agree; halfway the blend is 0, and the full one is taken
        (0.4, 0.0, False),
        (0.6, 1.0, False),
        (0.5, 1.0, True),
    ],
)
def test_a_half_turn_worked_by_hand(strength, kept, noted, round):
    eye, D = np.eye(2), np.diag([4.0, 6.0])
    clients = [Client(eye, D, 1), Client(-eye, -D, 1)]
    result = run(clients, (eye, D), round=round, strength=strength)
    np.testing.assert_allclose(total(result), kept * D, rtol=1e-14, atol=1e-14)
    assert bool(result.notes) == noted


@pytest.mark.parametrize("round", [1, 2])
def test_only_full_strength_may_reflect(round):
    # at rank 1 a reflection is all there is: −1 aligns (−a, −b) at λ = 1, and below that a proper
    # rotation is 1, which leaves ½(1 − 1) = 0 of both factors
    a, b = np.array([[1.0, 2.0]]), np.array([[3.0], [1.0]])
    clients = [Client(a, b, 1), Client(-a, -b, 1)]
    assert distance(total(run(clients, (a, b), round=round, strength=1.0)), b @ a) <= 1e-14
    for strength in (0.4, 0.99):
        assert not total(run(clients, (a, b), round=round, strength=strength)).any()


@pytest.mark.parametrize("round", [1, 2])
def test_a_scaling_does_not_turn_anything(round):
    clients, previous = clear_draw(EQUAL_RANKS["square"], 1, round, 0.4)
    folded = fold(clients)
    one, other = (run(each, previous, round=round) for each in (clients, folded))
    assert distance(total(one), total(other)) <= 2 * rotated_gate(
        F64, clients, previous, round, 0.4
    )


@pytest.mark.parametrize("round", [1, 2])
def test_the_order_in_which_a_client_lists_its_slots_does_not_matter(round):
    clients, previous = clear_draw(EQUAL_RANKS["tall"], 0, round, 0.4)
    listed = [2, 0, 3, 1]
    shuffled = [replace(c, A=c.A[listed], B=c.B[:, listed], slots=tuple(listed)) for c in clients]
    one, other = (run(each, previous, round=round) for each in (clients, shuffled))
    gate = 2 * rotated_gate(F64, clients, previous, round, 0.4)
    assert distance(total(one), total(other)) <= gate


def test_distributes_leading_slots():
    case = CASES["square"]
    clients = cohort(case)
    result = run(clients, previous_factors(case, max(case.ranks)), round=1)
    assert result.nested
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)


def test_a_result_is_the_next_rounds_reference():
    clients, previous = clear_draw(EQUAL_RANKS["tall"], 0, 2, 0.4)
    first = run(clients, previous, round=1)
    again = aggregate(updates_of(clients), "fedrot", previous=first, round=2)
    state = (array(first.A), array(first.B))
    gate = rotated_gate(F64, clients, state, 2, 0.4)
    assert distance(total(again), fedrot(clients, state, 2, 0.4)) <= gate


@pytest.mark.parametrize("round", [1, 2])
def test_named_layers_are_rotated_to_their_own_reference(round):
    # "q" and "v" are of one shape, and so are in one batch; references of another rank are not
    cases = {"q": CASES["tall"], "v": CASES["tall"], "up": CASES["square"]}
    drawn = {
        name: clear_draw(case, extra, round, 0.4, start=100 * extra)
        for name, case, extra in zip(cases, cases.values(), (0, 1, 1), strict=True)
    }
    results = aggregate_layers(
        {name: updates_of(clients) for name, (clients, _) in drawn.items()},
        "fedrot",
        previous={name: low_rank(previous) for name, (_, previous) in drawn.items()},
        round=round,
    )
    for name, (clients, previous) in drawn.items():
        gate = rotated_gate(F64, clients, previous, round, 0.4)
        error = distance(total(results[name]), fedrot(clients, previous, round, 0.4))
        assert error <= gate < 1e-8


def hand():
    eye = torch.eye(2)
    return [ClientUpdate(eye, 2 * eye), ClientUpdate(eye, 4 * eye)], LowRank(eye, eye)


@pytest.mark.parametrize(
    "options",
    [
        {"strength": -0.1},
        {"strength": 1.1},
        {"strength": float("nan")},
        {"strength": "much"},
        {"round": 0},
        {"round": -1},
        {"round": 1.5},
        {"round": True},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    updates, last = hand()
    with pytest.raises(HetLoRAError, match=next(iter(options))):
        aggregate(updates, "fedrot", **{"previous": last, "round": 1, **options})


@pytest.mark.parametrize("options", [{"strength": 2.0}, {"round": 0}], ids=str)
def test_options_are_read_in_a_first_round_too(options):
    updates, _ = hand()
    with pytest.raises(HetLoRAError, match=next(iter(options))):
        aggregate(updates, "fedrot", **{"previous": None, "round": 1, **options})


@pytest.mark.parametrize("lacking", ["previous", "round"])
def test_the_state_must_be_brought(lacking):
    updates, last = hand()
    state = {"previous": last, "round": 1}
    del state[lacking]
    with pytest.raises(HetLoRAError, match=lacking):
        aggregate(updates, "fedrot", **state)


@pytest.mark.parametrize(
    "last",
    [
        LowRank(torch.ones(2, 3), torch.ones(2, 2)),
        LowRank(torch.ones(2, 2), torch.ones(3, 2)),
        LowRank(torch.ones(1, 2, 2), torch.ones(1, 2, 2)),
        LowRank(torch.full((2, 2), float("nan")), torch.ones(2, 2)),
        (torch.eye(2), torch.eye(2)),
    ],
    ids=["in", "out", "layers", "nan", "tuple"],
)
def test_an_ill_fitting_reference_is_refused(last):
    updates, _ = hand()
    with pytest.raises(HetLoRAError, match="previous"):
        aggregate(updates, "fedrot", previous=last, round=1)


def test_a_result_that_is_not_nested_is_no_reference():
    updates, _ = hand()
    stacked = aggregate(updates, "flora")
    with pytest.raises(HetLoRAError, match=r"previous.*not nested"):
        aggregate(updates, "fedrot", previous=stacked, round=1)


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_a_client_above_the_references_rank_is_named(strength, round):
    eye = torch.eye(3)
    updates = [
        ClientUpdate(eye[:1], eye[:, :1], id="short"),
        ClientUpdate(eye, eye, id="phone-7"),
    ]
    last = LowRank(eye[:2], eye[:, :2])
    with pytest.raises(HetLoRAError, match="phone-7"):
        aggregate(updates, "fedrot", previous=last, round=round, strength=strength)
