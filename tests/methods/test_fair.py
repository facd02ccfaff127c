"""LoRA-FAIR's aim (arXiv:2411.14961): factor means, B corrected towards the exact mean."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, aggregate_layers, distribute
from reference import (
    CASES,
    DTYPES,
    SLOTS,
    arguments,
    array,
    by_layer,
    cohort,
    coverage,
    exact_mean,
    fold,
    fractions,
    padded_means,
    total,
    zeropad,
)
from reference_slots import FIRST, LAYERS, fair, fair_penalty, model, with_common
from tolerance import (
    assert_equals_oracle,
    assert_leading_slices,
    averaged_gate,
    distance,
    recompressed_gate_of,
)

ALL = {**CASES, **{f"slots-{name}": case for name, case in SLOTS.items()}}
F64 = torch.float64


def updates_of(clients, dtype=F64):
    return [ClientUpdate(**arguments(c, dtype)) for c in clients]


def means(clients):
    """Ā, B̄."""
    folded = fold(clients)
    return padded_means(folded, fractions(folded))


def condition(clients, regularisation):
    """κ of [Āᵀ; √λ I] on the directions that it does not lose."""
    A, _ = means(clients)
    penalty = fair_penalty(A, regularisation)
    spectrum = np.linalg.svd(A, compute_uv=False)
    spectrum = spectrum[spectrum > len(A) * np.finfo(float).eps * spectrum[0]]
    return float(np.sqrt((spectrum[0] ** 2 + penalty) / (spectrum[-1] ** 2 + penalty)))


def gate_of(regularisation):
    """κ·(gate of the exact mean + gate of the factor means): a fit moves by κ times its data."""

    def gate(dtype, clients):
        data = recompressed_gate_of(dtype, clients) + averaged_gate(dtype, clients)
        return condition(clients, regularisation) * data

    return gate


@pytest.mark.parametrize("regularisation", [0.0, 0.01, 1.0, 50.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_equals_the_oracle(case, dtype, regularisation):
    clients = cohort(case, dtype)
    result = aggregate(updates_of(clients, dtype), "fair", regularisation=regularisation)
    assert result.A.dtype == dtype
    assert result.residual is None
    assert result.rank == 1 + max(j for client in clients for j in client.owned)
    gate = gate_of(regularisation)
    oracle = partial(fair, regularisation=regularisation)
    assert_equals_oracle(total(result), oracle, clients, gate, dtype)


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_the_default_regularisation_is_a_hundredth(case):
    clients = cohort(case)
    result = aggregate(updates_of(clients), "fair")
    oracle = partial(fair, regularisation=0.01)
    assert_equals_oracle(total(result), oracle, clients, gate_of(0.01), F64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_a_is_the_zero_padded_mean(case, dtype):
    clients = cohort(case, dtype)
    result = aggregate(updates_of(clients, dtype), "fair")
    for index, layer, _ in by_layer(clients):
        A, _ = means(layer)
        size = np.sqrt(sum(np.linalg.norm(client.A) ** 2 for client in fold(layer)))
        gate = (len(layer) + 3) * torch.finfo(dtype).eps * size
        assert distance(result.A[index], A) <= gate


def objective(B, layer, regularisation):
    """‖ΔW* − B Ā‖² + λ ‖B − B̄‖²."""
    A, B_mean = means(layer)
    penalty = fair_penalty(A, regularisation)
    fit = np.linalg.norm(exact_mean(layer) - B @ A) ** 2
    return fit + penalty * np.linalg.norm(B - B_mean) ** 2


@pytest.mark.parametrize("regularisation", [0.0, 0.01, 1.0, 50.0])
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_the_normal_equations_hold(case, regularisation):
    # half the gradient: (B Ā − ΔW*) Āᵀ + λ (B − B̄) = 0
    clients = cohort(case)
    result = aggregate(updates_of(clients), "fair", regularisation=regularisation)
    for index, layer, _ in by_layer(clients):
        A, B_mean = means(layer)
        B, penalty = array(result.B)[index], fair_penalty(A, regularisation)
        gradient = (B @ A - exact_mean(layer)) @ A.T + penalty * (B - B_mean)
        # an error of the fit comes back times ‖Ā‖, one of B times λ; λ ≤ regularisation·‖Ā‖²
        size = np.linalg.norm(A) * (1 + np.sqrt(regularisation))
        assert np.linalg.norm(gradient) <= size * gate_of(regularisation)(F64, layer)


@pytest.mark.parametrize("regularisation", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_no_other_b_does_better(case, regularisation):
    clients = cohort(case)
    result = aggregate(updates_of(clients), "fair", regularisation=regularisation)
    rng = np.random.default_rng(3)
    for index, layer, _ in by_layer(clients):
        B = array(result.B)[index]
        best = objective(B, layer, regularisation)
        # at λ = 0 directions that Ā does not see cost nothing: neither better nor worse
        slack = 1e-12 * objective(0 * B, layer, regularisation)
        for size in (1e-3, 0.1, 1.0, 10.0):
            for _ in range(8):
                other = B + size * rng.standard_normal(B.shape)
                assert objective(other, layer, regularisation) >= best - slack
        # the plain means are one of the others
        assert best <= objective(means(layer)[1], layer, regularisation) + slack


@pytest.mark.parametrize("case", [CASES["tall"], CASES["wide"]], ids=["tall", "wide"])
def test_it_is_nearer_the_exact_mean_than_the_means_apart(case):
    clients = cohort(case)
    exact, plain = exact_mean(clients), zeropad(clients)
    errors = [
        distance(total(aggregate(updates_of(clients), "fair", regularisation=x)), exact)
        for x in (0.0, 0.01, 1.0, 1e3)
    ]
    # less penalty, better fit; and none of them as bad as no correction
    assert errors[0] <= errors[1] <= errors[2] <= errors[3] < distance(plain, exact)


@pytest.mark.parametrize("case", [CASES["tall"], CASES["layers"]], ids=["tall", "layers"])
def test_endless_regularisation_leaves_the_plain_means(case):
    clients = cohort(case)
    result = aggregate(updates_of(clients), "fair", regularisation=1e18)
    for index, layer, _ in by_layer(clients):
        assert distance(total(result)[index], zeropad(layer)) <= 2 * gate_of(1e18)(F64, layer)


def test_exact_where_the_mean_of_a_spans_all_inputs():
    # six slots over six inputs: some B fits anything, and λ = 0 finds it
    clients = cohort(CASES["tall"])
    result = aggregate(updates_of(clients), "fair", regularisation=0.0)
    assert_equals_oracle(total(result), exact_mean, clients, gate_of(0.0), F64)


@pytest.mark.parametrize("case", [CASES["tall"], CASES["layers"]], ids=["tall", "layers"])
def test_exact_under_a_common_a_of_equal_scalings(case):
    clients = [replace(client, s=2.0) for client in with_common(cohort(case), "A")]
    result = aggregate(updates_of(clients), "fair", regularisation=0.0)
    assert_equals_oracle(total(result), exact_mean, clients, gate_of(0.0), F64)


@pytest.mark.parametrize("power", [-3, -1, 1, 3])
def test_lambda_goes_with_the_size_of_a(power):
    # A_k times c, B_k by c: the same updates, and the same answer since λ is relative
    c = 10.0**power
    clients = cohort(CASES["wide"])
    other = [replace(client, A=c * client.A, B=client.B / c) for client in clients]
    one, two = (total(aggregate(updates_of(x), "fair")) for x in (clients, other))
    assert distance(one, two) <= 2 * gate_of(0.01)(F64, clients)


def one_by_one(value_A, value_B, weight=1.0):
    return ClientUpdate(
        torch.tensor([[value_A]], dtype=F64), torch.tensor([[value_B]], dtype=F64), weight=weight
    )


@pytest.mark.parametrize(
    ("regularisation", "expected"),
    [
        # Ā = 2, B̄ = 4, ΔW* = ½(1·2 + 3·6) = 10, and ½(2·1·2 + 6·3·2) − 4·4 = 4
        # λ = 0: ΔB = 4/4 = 1, 5·2 = 10, the exact mean
        (0.0, 10.0),
        # λ = ¼ of 4: ΔB = 4/(4 + 1) = 0.8, 4.8·2
        (0.25, 9.6),
        # λ = 4: ΔB = 4/8, 4.5·2
        (1.0, 9.0),
    ],
)
def test_worked_by_hand(regularisation, expected):
    pair = [one_by_one(1.0, 2.0), one_by_one(3.0, 6.0)]
    result = aggregate(pair, "fair", regularisation=regularisation)
    assert float(result.A) == pytest.approx(2.0)
    assert float(total(result)[0, 0]) == pytest.approx(expected, rel=1e-14)


def test_mixed_ranks_worked_by_hand():
    # p = ¼, ¾.  Ā = diag(1, ¾), B̄ = ΔW* = diag(3.5, 4.5); the rows of Ā have mean square
    # ½(1 + 9/16) = 25/32, so that 0.32 is λ = ¼.  ΔB_22 = (4.5·¾ − 4.5·9/16)/(9/16 + ¼)
    # = (27/32)/(13/16) = 27/26, and (9/2 + 27/26)·¾ = 54/13: slot 2 is diluted less than the 3.375
    # of plain means.
    first = ClientUpdate(
        torch.tensor([[1.0, 0.0]], dtype=F64), torch.tensor([[2.0], [0.0]], dtype=F64), weight=1
    )
    second = ClientUpdate(
        torch.eye(2, dtype=F64), torch.diag(torch.tensor([4.0, 6.0], dtype=F64)), weight=3
    )
    result = aggregate([first, second], "fair", regularisation=0.32)
    np.testing.assert_allclose(total(result), np.diag([3.5, 54 / 13]), rtol=1e-13, atol=1e-13)
    # without penalty nothing is diluted beyond the exact mean
    result = aggregate([first, second], "fair", regularisation=0.0)
    np.testing.assert_allclose(total(result), np.diag([3.5, 4.5]), rtol=1e-13, atol=1e-13)


def a_dead_slot(client, k):
    """Row 1 is zero on everybody who has it."""
    return np.where(np.arange(client.rank)[:, None] == 1, 0.0, client.A)


def a_repeated_row(client, k):
    """Rows 0 and 1 are one on every client."""
    return client.A[[0, *range(client.rank - 1)]]


def more_slots_than_inputs(client, k):
    """Six slots over four inputs."""
    return client.A[:, :4]


def rows_that_cancel(client, k):
    """Slot 0 of Ā is zero though no client's is."""
    return client.A * np.where(np.arange(client.rank)[:, None] == 0, (-1) ** k, 1.0)


def singular(change, dtype):
    """The cohort with A_k changed so that Ā Āᵀ is singular."""
    clients = cohort(CASES["tall"], dtype)
    if change is rows_that_cancel:
        # one row, one weight, one scaling, and signs that alternate over four clients
        row = clients[0].A[0]
        clients = [
            replace(c, A=np.concatenate([row[None], c.A[1:]]), n=1.0, s=1.0) for c in clients
        ]
    return [replace(client, A=change(client, k)) for k, client in enumerate(clients)]


@pytest.mark.parametrize("regularisation", [0.0, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change",
    [a_dead_slot, a_repeated_row, more_slots_than_inputs, rows_that_cancel],
    ids=lambda f: f.__name__,
)
def test_a_singular_gram_matrix_is_no_obstacle(change, dtype, regularisation):
    clients = singular(change, dtype)
    A, B_mean = means(clients)
    assert np.linalg.matrix_rank(A) < len(A)
    result = aggregate(updates_of(clients, dtype), "fair", regularisation=regularisation)
    oracle = partial(fair, regularisation=regularisation)
    assert_equals_oracle(total(result), oracle, clients, gate_of(regularisation), dtype)
    # ΔB is the least one: nothing is added in directions that Ā does not have
    lost = np.eye(len(A)) - A @ np.linalg.pinv(A)
    change_of_B = array(result.B) - B_mean
    spectrum = np.linalg.svd(A, compute_uv=False)
    smallest = spectrum[spectrum > 1e-10 * spectrum[0]][-1]
    allowed = gate_of(regularisation)(dtype, clients) / smallest
    assert np.linalg.norm(change_of_B @ lost) <= allowed


@pytest.mark.parametrize("regularisation", [0.0, 0.01])
def test_all_a_zero_gives_zero(regularisation):
    # mean squared row norm 0: λ is 0 in any unit
    pair = [one_by_one(0.0, 2.0), one_by_one(0.0, 6.0)]
    result = aggregate(pair, "fair", regularisation=regularisation)
    assert torch.isfinite(result.B).all()
    assert float(result.B) == pytest.approx(4.0)
    assert not total(result).any()


def test_the_result_is_nested_and_symmetrically_scaled():
    result = aggregate(updates_of(cohort(CASES["tall"])), "fair")
    assert result.shared == {"A", "B"}
    assert result.unscaled is None
    assert result.nested is True
    assert result.slotted is True


def test_distributes_leading_slots():
    case = CASES["layers"]
    result = aggregate(updates_of(cohort(case)), "fair")
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)


def test_an_idle_round_multiplies_slots_by_their_coverage_once():
    # plain zero-padded means would multiply by q_j²
    case = CASES["square"]
    result = aggregate(updates_of(cohort(case)), "fair")
    pieces = distribute(result, case.ranks, case.scalings)
    back = [
        ClientUpdate(piece.A, piece.B, weight=n, scaling=s)
        for piece, n, s in zip(pieces, case.n, case.scalings, strict=True)
    ]
    q = np.array(coverage(cohort(case)))
    expected = (array(result.B) * q) @ array(result.A)
    clients = [
        replace(c, A=array(u.A), B=array(u.B)) for c, u in zip(cohort(case), back, strict=True)
    ]
    found = total(aggregate(back, "fair", regularisation=0.0))
    assert distance(found, expected) <= gate_of(0.0)(F64, clients)


@pytest.mark.parametrize("regularisation", [0.0, 0.01])
def test_layers_of_a_model_equal_the_oracle_one_by_one(regularisation):
    layers = model(FIRST)
    results = aggregate_layers(
        {name: updates_of(clients) for name, clients in layers.items()},
        "fair",
        regularisation=regularisation,
    )
    assert list(results) == list(LAYERS)
    for name, clients in layers.items():
        oracle = partial(fair, regularisation=regularisation)
        # λ belongs to its layer
        assert_equals_oracle(total(results[name]), oracle, clients, gate_of(regularisation), F64)


@pytest.mark.parametrize(
    "regularisation", [-0.1, -1e-300, float("nan"), float("inf"), "0.1", None], ids=repr
)
def test_options_out_of_range_are_refused(regularisation):
    pair = [one_by_one(1.0, 2.0), one_by_one(3.0, 6.0)]
    with pytest.raises(HetLoRAError, match="regularisation"):
        aggregate(pair, "fair", regularisation=regularisation)


@pytest.mark.parametrize("option", ["previous", "weighting", "rank"])
def test_options_it_does_not_have_are_refused(option):
    with pytest.raises(HetLoRAError, match=option):
        aggregate([one_by_one(1.0, 2.0)], "fair", **{option: None})
