"""FedHL (arXiv:2505.18494): steps from the truncation that each client was given."""

from dataclasses import replace

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
    Client,
    arguments,
    array,
    by_layer,
    cohort,
    dense,
    exact_mean,
    previous_factors,
    total,
)
from reference_spaces import fedhl, fedhl_by_components, fedhl_weights, truncation_errors
from tolerance import assert_best_rank, assert_leading_slices, distance, recompressed_gate_of

F64 = torch.float64
BATCHED = {"tall": CASES["tall"], "layers": CASES["layers"]}


def low_rank(factors, dtype=F64):
    A, B = factors
    return LowRank(torch.from_numpy(A).to(dtype), torch.from_numpy(B).to(dtype))


def updates_of(clients, dtype=F64):
    return [ClientUpdate(**arguments(c, dtype)) for c in clients]


def run(clients, previous, dtype=F64, **options):
    last = None if previous is None else low_rank(previous, dtype)
    return aggregate(updates_of(clients, dtype), "fedhl", previous=last, **options)


def weights_of(clients, previous, weighting="truncation", smoothing=0.01):
    errors, size = truncation_errors(clients, previous)
    return fedhl_weights(clients, errors, size, weighting, smoothing)


def stepped_gate(dtype, clients, earlier, weights):
    """The recompressed gate for the weights in use, previous counting as one client more."""
    weighted = [replace(c, n=w) for c, w in zip(clients, weights, strict=True)]
    return recompressed_gate_of(dtype, weighted) + recompressed_gate_of(
        dtype, [Client(*earlier, n=1)]
    )


def assert_step(result, clients, previous, dtype=F64, weighting="truncation", smoothing=0.01):
    """Every layer is the literal step, with one weight per client over all layers."""
    weights = weights_of(clients, previous, weighting, smoothing)
    for index, layer, earlier in by_layer(clients, previous):
        expected = fedhl(layer, earlier, weights=weights)
        gate = stepped_gate(dtype, layer, earlier, weights)
        assert distance(total(result)[index], expected) <= gate


@pytest.mark.parametrize("weighting", ["truncation", "examples"])
@pytest.mark.parametrize("rank", [1, 3, 9], ids=lambda r: f"previous-{r}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_oracle(case, dtype, rank, weighting):
    clients = cohort(case, dtype)
    previous = previous_factors(case, rank, dtype)
    result = run(clients, previous, dtype, rank="full", weighting=weighting)
    assert result.A.dtype == dtype
    assert result.residual is None
    assert_step(result, clients, previous, dtype, weighting)


@pytest.mark.parametrize("smoothing", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("case", BATCHED.values(), ids=BATCHED)
def test_smoothing_is_relative_to_the_previous_update(case, smoothing):
    clients = cohort(case)
    previous = previous_factors(case, 6)
    result = run(clients, previous, rank="full", smoothing=smoothing)
    assert_step(result, clients, previous, smoothing=smoothing)
    # a hundred times the update: every share is the same, so the step scales with it
    larger = (100 * previous[0], previous[1])
    scaled = [replace(c, A=100 * c.A) for c in clients]
    whole = run(scaled, larger, rank="full", smoothing=smoothing)
    for index, layer, earlier in by_layer(scaled, larger):
        gate = 2 * stepped_gate(F64, layer, earlier, weights_of(clients, previous))
        assert distance(total(whole)[index], 100 * total(result)[index]) <= gate


@pytest.mark.parametrize("weighting", ["truncation", "examples"])
@pytest.mark.parametrize("case", BATCHED.values(), ids=BATCHED)
def test_one_slot_at_a_time_it_is_the_same_step(case, weighting):
    # Σ w_k ΔW_k + Σ_j (1 − c_j) b_j a_j: what nobody of weight w_k could hold is kept with it
    clients = cohort(case)
    previous = previous_factors(case, 6)
    weights = weights_of(clients, previous, weighting)
    result = run(clients, previous, rank="full", weighting=weighting)
    for index, layer, earlier in by_layer(clients, previous):
        gate = stepped_gate(F64, layer, earlier, weights)
        by_slot = fedhl_by_components(layer, earlier, weights)
        assert distance(by_slot, fedhl(layer, earlier, weights=weights)) <= gate
        assert distance(total(result)[index], by_slot) <= gate


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_truncation_is_the_best_of_its_rank(case, dtype, rank):
    clients = cohort(case, dtype)
    previous = previous_factors(case, 4, dtype)
    result = run(clients, previous, dtype, rank=rank)
    # by default neither this round's clients nor the previous update lose a slot
    wanted = max(4, *case.ranks) if rank is None else rank
    expected = min(wanted, case.out_features, case.in_features)
    assert result.rank == expected
    weights = weights_of(clients, previous)
    for index, layer, earlier in by_layer(clients, previous):
        gate = stepped_gate(dtype, layer, earlier, weights)
        W = fedhl(layer, earlier, weights=weights)
        assert_best_rank(dense(result.factors)[index], W, expected, gate)


@pytest.mark.parametrize("split", ["balanced", "left", "right"])
def test_split_does_not_change_the_update(split):
    clients = cohort(CASES["tall"])
    previous = previous_factors(CASES["tall"], 4)
    result = run(clients, previous, rank="full", split=split)
    assert_step(result, clients, previous)
    gram = array(result.A) @ array(result.A).T
    power = {"balanced": 1, "left": 0, "right": 2}[split]
    sigma = array(result.singular_values)
    gate = stepped_gate(F64, clients, previous, weights_of(clients, previous))
    assert np.abs(gram - np.diag(sigma**power)).max() <= gate * max(1.0, 2 * sigma[0])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_first_round_is_the_uniform_mean(case):
    clients = cohort(case)
    result = run(clients, None, rank="full")
    for index, layer, _ in by_layer(clients):
        uniform = [replace(c, n=1) for c in layer]
        gate = recompressed_gate_of(F64, uniform)
        assert distance(total(result)[index], exact_mean(uniform)) <= gate


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_first_round_by_examples_is_the_exact_mean(case):
    clients = cohort(case)
    result = run(clients, None, rank="full", weighting="examples")
    for index, layer, _ in by_layer(clients):
        gate = recompressed_gate_of(F64, layer)
        assert distance(total(result)[index], exact_mean(layer)) <= gate


def test_a_previous_update_of_zero_is_as_good_as_none():
    # every e_k and ‖ΔW_t‖ are 0: the weights are 0/0, and their limit is equal ones
    clients = cohort(CASES["tall"])
    A, B = previous_factors(CASES["tall"], 6)
    result = run(clients, (A, 0 * B), rank="full")
    uniform = [replace(c, n=1) for c in clients]
    gate = recompressed_gate_of(F64, uniform)
    assert distance(total(result), exact_mean(uniform)) <= gate


def hand_state():
    """diag(4, 2); the first client held 4 of it, the second all."""
    last = LowRank(torch.diag(torch.tensor([4.0, 2.0], dtype=F64)), torch.eye(2, dtype=F64))
    first = ClientUpdate(
        torch.tensor([[6.0, 0.0]], dtype=F64), torch.tensor([[1.0], [0.0]], dtype=F64), weight=30
    )
    second = ClientUpdate(
        torch.diag(torch.tensor([4.0, 8.0], dtype=F64)), torch.eye(2, dtype=F64), weight=10
    )
    return [first, second], last


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # ‖ΔW_t‖² = 20, e = 2² = 4 and 0, (e/20)² = 0.04 and 0: w ∝ 1/0.05 = 20 and 1/0.01 = 100,
        # w = 1/6 and 5/6.  Slot 1: 4 + 1/6·(6 − 4) + 5/6·(4 − 4) = 13/3.
        # Slot 2: 2 + 5/6·(8 − 2) = 7: the first client was given none of it and takes none away.
        ({}, (13 / 3, 7.0)),
        # ε = 0.16: w ∝ 1/0.2 = 5 and 1/0.16 = 6.25, w = 4/9 and 5/9: 4 + 8/9 and 2 + 30/9
        ({"smoothing": 0.16}, (44 / 9, 48 / 9)),
        # p = ¾ and ¼: 4 + ¾·2 = 5.5 and 2 + ¼·6 = 3.5
        ({"weighting": "examples"}, (5.5, 3.5)),
        # rank 1 of the first: the larger of 13/3 and 7
        ({"rank": 1}, (0.0, 7.0)),
    ],
    ids=str,
)
def test_worked_by_hand(options, expected):
    updates, last = hand_state()
    result = aggregate(updates, "fedhl", previous=last, **options)
    np.testing.assert_allclose(dense(result.factors), np.diag(expected), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("weighting", ["truncation", "examples"])
@pytest.mark.parametrize("ranks", [(1, 2, 2, 5), (1, 2, 3, 3)], ids=str)
def test_an_idle_round_keeps_every_singular_value(ranks, weighting):
    # also the slots 4 and 5, which nobody in the second crowd holds
    sigma = np.array([8.0, 5.0, 3.0, 2.0, 1.0])
    rng = np.random.default_rng(2)
    U, V = (np.linalg.qr(rng.standard_normal((size, 5)))[0] for size in (9, 7))
    start = ClientUpdate(torch.from_numpy(V.T.copy()), torch.from_numpy(U * sigma))
    last = aggregate([start], "flexlora")
    pieces = distribute(last, ranks, (1.0, 2.0, 0.5, 3.0))
    updates = [
        ClientUpdate(piece.A, piece.B, weight=n, scaling=s)
        for piece, n, s in zip(pieces, (5, 10, 15, 20), (1.0, 2.0, 0.5, 3.0), strict=True)
    ]
    for _ in range(3):
        last = aggregate(updates, "fedhl", previous=last, weighting=weighting)
    gate = 10 * recompressed_gate_of(F64, [Client(V.T, U * sigma, 1)])
    assert last.rank == 5
    assert distance(total(last), (U * sigma) @ V.T) <= gate
    assert np.abs(array(last.singular_values) - sigma).max() <= gate


def test_nobody_starves_where_one_client_lost_nothing():
    # Six equal components: a client of rank 1 lost 5/6 of ‖ΔW_t‖², so that its weight is
    # 0.01 / (25/36 + 0.01) of that of a client with everything, and both sum to 1.
    ratio = 0.01 / (25 / 36 + 0.01)
    eye = torch.eye(6, dtype=F64)
    last = LowRank(eye, eye)
    short = ClientUpdate(7 * eye[:1], eye[:, :1])  # what it was given, and 6 more in its slot
    whole = ClientUpdate(eye, eye)
    result = aggregate([short, whole], "fedhl", previous=last)
    gained = 6 * ratio / (1 + ratio)
    np.testing.assert_allclose(total(result), np.diag([1 + gained, 1, 1, 1, 1, 1]), rtol=1e-13)
    # its share is a hundredth at worst, not the 1e-16 of a fixed ε of rounding size
    assert ratio > 0.01


def test_a_weight_does_not_depend_on_the_number_of_examples():
    clients = cohort(CASES["tall"])
    previous = previous_factors(CASES["tall"], 5)
    result = run([replace(c, n=1 + 9 * k) for k, c in enumerate(clients)], previous, rank="full")
    assert_step(result, [replace(c, n=1) for c in clients], previous)


@pytest.mark.parametrize("weighting", ["truncation", "examples"])
@pytest.mark.parametrize("max_group", [None, 1, 2])
def test_named_layers_share_one_weight_per_client(max_group, weighting):
    # (3, 4, 1, 2): errors differ from layer to layer, "q" and "v" are in one batch
    cases = {"q": CASES["tall"], "v": CASES["tall"], "up": CASES["square"]}
    shapes = {name: replace(case, ranks=(2, 4, 1, 3)) for name, case in cases.items()}
    shapes = {name: replace(case, n=(5, 10, 15, 20)) for name, case in shapes.items()}
    drawn = {
        name: (cohort(case, seed=seed), previous_factors(case, rank, seed=50 + seed))
        for seed, (name, case, rank) in enumerate(
            zip(shapes, shapes.values(), (5, 5, 3), strict=True)
        )
    }
    # a layer of its own size, or the errors of all would be about proportional
    drawn["up"] = (drawn["up"][0], (4 * drawn["up"][1][0], drawn["up"][1][1]))
    results = aggregate_layers(
        {name: updates_of(clients) for name, (clients, _) in drawn.items()},
        "fedhl",
        previous={name: low_rank(previous) for name, (_, previous) in drawn.items()},
        rank="full",
        weighting=weighting,
        max_group=max_group,
    )
    every = [truncation_errors(clients, previous) for clients, previous in drawn.values()]
    errors = [sum(layer) for layer in zip(*(errors for errors, _ in every), strict=True)]
    some = drawn["q"][0]
    pooled = fedhl_weights(some, errors, sum(size for _, size in every), weighting)
    for name, (clients, previous) in drawn.items():
        gate = stepped_gate(F64, clients, previous, pooled)
        expected = fedhl(clients, previous, weights=pooled)
        assert distance(total(results[name]), expected) <= gate
        if weighting == "truncation":
            # negative control: with the layer's own errors the step is another one
            assert distance(expected, fedhl(clients, previous)) > 1e-3


def test_leading_dimensions_are_layers_of_one_client():
    # as many stacked matrices as named layers give the same weights
    case = CASES["layers"]
    clients = cohort(case)
    previous = previous_factors(case, 5)
    stacked = run(clients, previous, rank="full")
    names = {str(index): index for index in np.ndindex(case.layers)}
    named = aggregate_layers(
        {
            name: updates_of([replace(c, A=c.A[index], B=c.B[index]) for c in clients])
            for name, index in names.items()
        },
        "fedhl",
        previous={
            name: low_rank((previous[0][index], previous[1][index]))
            for name, index in names.items()
        },
        rank="full",
    )
    weights = weights_of(clients, previous)
    for name, index in names.items():
        layer = [replace(c, A=c.A[index], B=c.B[index]) for c in clients]
        gate = stepped_gate(F64, layer, (previous[0][index], previous[1][index]), weights)
        assert distance(total(named[name]), total(stacked)[index]) <= gate


@pytest.mark.parametrize("case", BATCHED.values(), ids=BATCHED)
def test_distributed_pieces_are_nested_and_each_the_best_of_its_rank(case):
    clients = cohort(case)
    previous = previous_factors(case, 4)
    result = run(clients, previous)
    assert result.nested
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)
    weights = weights_of(clients, previous)
    for index, layer, earlier in by_layer(clients, previous):
        gate = stepped_gate(F64, layer, earlier, weights)
        W = fedhl(layer, earlier, weights=weights)
        for piece, r, s in zip(pieces, case.ranks, case.scalings, strict=True):
            assert_best_rank(s * dense(piece)[index], W, r, gate)


@pytest.mark.parametrize(
    "options",
    [
        {"smoothing": 0.0},
        {"smoothing": -1.0},
        {"smoothing": float("nan")},
        {"smoothing": float("inf")},
        {"weighting": "uniform-ish"},
        {"rank": 0},
        {"rank": "some"},
        {"rank": 2.0},
        {"split": "even"},
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [False, True])
def test_options_out_of_range_are_refused(options, first):
    updates, last = hand_state()
    with pytest.raises(HetLoRAError, match=next(iter(options))):
        aggregate(updates, "fedhl", previous=None if first else last, **options)


def test_an_unknown_weighting_lists_the_choices():
    updates, last = hand_state()
    with pytest.raises(HetLoRAError, match=r"examples.*truncation"):
        aggregate(updates, "fedhl", previous=last, weighting="norm")


def test_the_previous_update_must_be_brought():
    updates, _ = hand_state()
    with pytest.raises(HetLoRAError, match="previous"):
        aggregate(updates, "fedhl")


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
def test_an_ill_fitting_previous_update_is_refused(last):
    updates, _ = hand_state()
    with pytest.raises(HetLoRAError, match="previous"):
        aggregate(updates, "fedhl", previous=last)


def test_a_result_that_is_not_nested_is_no_previous_update():
    # a slice of a stack is no truncation of it
    updates, _ = hand_state()
    stacked = aggregate(updates, "flora")
    with pytest.raises(HetLoRAError, match=r"previous.*not nested"):
        aggregate(updates, "fedhl", previous=stacked)


def test_a_layer_without_a_previous_update_is_named():
    updates, last = hand_state()
    with pytest.raises(HetLoRAError, match=r"previous.*'v'"):
        aggregate_layers({"q": updates, "v": updates}, "fedhl", previous={"q": last})
