"""FedASK (arXiv:2507.09990): two linear sketches whose messages are plain sums."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, aggregate_layers, distribute
from reference import (
    CASES,
    DTYPES,
    SLOTS,
    Case,
    Client,
    arguments,
    by_layer,
    cohort,
    dense,
    exact_mean,
    total,
)
from reference_spaces import (
    fedask,
    fedask_messages,
    full_rank,
    gaussian,
    regauged,
    sketch_condition,
    sketch_width,
)
from tolerance import (
    assert_best_rank,
    assert_equals_oracle,
    assert_leading_slices,
    distance,
    recompressed_gate_of,
)

F64 = torch.float64
# R = 26 above every default width: what is left out is left out in earnest
CROWD = Case(33, 29, (4, 10, 12), (3, 1, 2), (1.0, 0.5, 2.0))
CROWDED = Case(24, 21, (2, 9, 12), (3, 1, 2), (1.0, 0.5, 2.0), layers=(2,))


def updates_of(clients, dtype=F64):
    return [ClientUpdate(**arguments(c, dtype)) for c in clients]


def run(clients, dtype=F64, **options):
    return aggregate(updates_of(clients, dtype), "fedask", **options)


def sketched_gate(dtype, clients, omega):
    """The recompressed gate times how far the sketched range can turn."""
    return sketch_condition(clients, omega) * recompressed_gate_of(dtype, clients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES.values(), *SLOTS.values()], ids=[*CASES, *SLOTS])
def test_without_truncation_it_is_the_exact_mean(case, dtype):
    clients = cohort(case, dtype)
    result = run(clients, dtype, rank="full")
    assert result.A.dtype == dtype
    assert result.residual is None
    assert_equals_oracle(total(result), exact_mean, clients, recompressed_gate_of, dtype)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_sketch_of_the_rank_is_the_oracles_without_truncation(case, dtype, width):
    # Q P̄ᵀ has rank `width` already: nothing is cut off it
    clients = cohort(case, dtype)
    result = run(clients, dtype, rank=width, sketch=width)
    omega = gaussian(clients, width, width)
    for index, layer, _ in by_layer(clients):
        gate = sketched_gate(dtype, layer, omega[index])
        assert distance(total(result)[index], fedask(layer, omega=omega[index])) <= gate
        # negative control: it is a sketch, unless it is as wide as there is to see
        if width < full_rank(layer):
            assert distance(fedask(layer, omega=omega[index]), exact_mean(layer)) > gate


@pytest.mark.parametrize(("rank", "sketch"), [(None, None), (1, 3), (3, 5), (2, None), (1, 1000)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [*CASES.values(), CROWD, CROWDED], ids=[*CASES, "crowd", "crowded"]
)
def test_truncation_is_the_best_of_its_rank(case, dtype, rank, sketch):
    clients = cohort(case, dtype)
    wanted = max(case.ranks) if rank is None else rank
    expected = min(wanted, sum(case.ranks), case.out_features, case.in_features)
    result = run(clients, dtype, rank=rank, sketch=sketch)
    assert result.rank == expected
    omega = gaussian(clients, rank, sketch)
    for index, layer, _ in by_layer(clients):
        gate = sketched_gate(dtype, layer, omega[index])
        W = fedask(layer, omega=omega[index])
        assert_best_rank(dense(result.factors)[index], W, expected, gate)


@pytest.mark.parametrize("case", [CROWD, CROWDED], ids=["crowd", "crowded"])
def test_the_default_sketch_is_eight_wider_than_the_rank(case):
    clients = cohort(case)
    assert sketch_width(clients, 3) == 11 < full_rank(clients)
    by_default, spelt_out = run(clients, rank=3), run(clients, rank=3, sketch=11)
    assert torch.equal(by_default.A, spelt_out.A)
    assert torch.equal(by_default.B, spelt_out.B)
    # negative control: one column more or less is another result
    other = run(clients, rank=3, sketch=12)
    assert distance(total(by_default), total(other)) > 1e-6


def test_the_default_generator_is_a_fresh_one_with_seed_zero():
    clients = cohort(CROWD)
    one, again = run(clients, rank=3), run(clients, rank=3)
    given = run(clients, rank=3, generator=torch.Generator().manual_seed(0))
    other = run(clients, rank=3, generator=torch.Generator().manual_seed(1))
    for same in (again, given):
        assert torch.equal(one.A, same.A)
        assert torch.equal(one.B, same.B)
    assert distance(total(one), total(other)) > 1e-6


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", [CROWD, CROWDED], ids=["crowd", "crowded"])
def test_a_generator_draws_the_gaussian_matrix(case, seed):
    clients = cohort(case)
    generator = torch.Generator().manual_seed(seed)
    result = run(clients, rank=4, sketch=6, generator=generator)
    omega = gaussian(clients, 4, 6, seed)
    for index, layer, _ in by_layer(clients):
        gate = sketched_gate(F64, layer, omega[index])
        W = fedask(layer, omega=omega[index])
        assert_best_rank(dense(result.factors)[index], W, 4, gate)


def test_a_generator_for_each_layer_draws_for_that_layer_alone():
    clients = cohort(CROWDED)
    seeds = (7, 8)
    each = [torch.Generator().manual_seed(seed) for seed in seeds]
    result = run(clients, rank=4, sketch=6, generator=each)
    for index, layer, _ in by_layer(clients):
        omega = gaussian(layer, 4, 6, seeds[index[0]])
        gate = sketched_gate(F64, layer, omega)
        W = fedask(layer, omega=omega)
        assert_best_rank(dense(result.factors)[index], W, 4, gate)


@pytest.mark.parametrize("case", [CROWD, CASES["square"]], ids=["crowd", "square"])
def test_messages_are_of_one_size_and_their_sums_are_all_the_server_needs(case):
    clients = cohort(case)
    omega = gaussian(clients, 3, 5)
    Y, Q, P = fedask_messages(clients, omega)
    # whatever the rank: who has which is not to be seen
    assert {message.shape for message in Y} == {(case.out_features, 5)}
    assert {message.shape for message in P} == {(case.in_features, 5)}
    gate = sketched_gate(F64, clients, omega)
    assert_best_rank(total(run(clients, rank=3, sketch=5)), Q @ sum(P).T, 3, gate)
    # Q is determined up to a turn of its columns, and the product not even by that
    turned = Q @ np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    assert distance(turned @ (turned.T @ exact_mean(clients)), Q @ sum(P).T) <= gate


def agreeing(ranks, true_rank, seed=6):
    """Clients whose mean has a lower rank than their stack: they share two matrices."""
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((true_rank, 19)), rng.standard_normal((21, true_rank))
    return [
        Client(rng.standard_normal((r, true_rank)) @ A, B @ rng.standard_normal((true_rank, r)), 1)
        for r in ranks
    ]


def test_exact_once_sketch_and_rank_reach_the_rank_of_the_mean():
    clients = agreeing((3, 5, 4), 3)
    W = exact_mean(clients)
    gate = recompressed_gate_of(F64, clients)
    # the clients' stack has R = 12, their mean has rank 3
    for options in ({"rank": 3, "sketch": 3}, {"rank": 3}, {"rank": 5, "sketch": 8}):
        omega = gaussian(clients, **options)
        small = np.linalg.svd(W @ omega, compute_uv=False)[2]
        turned = np.linalg.norm(omega, 2) * np.linalg.norm(W) / small
        assert distance(total(run(clients, **options)), W) <= gate * (1 + turned)
    assert distance(total(run(clients, rank=2, sketch=2)), W) > 1e-3
    # generic clients: the rank of the mean is R, and nothing short of it will do
    crowd = cohort(CROWD)
    R = sum(CROWD.ranks)
    assert distance(total(run(crowd, rank=R)), exact_mean(crowd)) <= recompressed_gate_of(
        F64, crowd
    )
    assert distance(total(run(crowd, rank=R - 1, sketch=R - 1)), exact_mean(crowd)) > 1e-3


def test_worked_by_hand():
    # ¼ · 4 e_1e_1ᵀ + ¾ · 2 (e_1e_1ᵀ + … ) in numbers: ¼ diag(4, 0) + ¾ diag(4, 4) = diag(4, 3).
    # One column Ω = (g, h)ᵀ: Ȳ = (4g, 3h), q = Ȳ / |Ȳ|, and the sketch is q qᵀ diag(4, 3).
    one = ClientUpdate(
        torch.tensor([[1.0, 0.0]], dtype=F64), torch.tensor([[4.0], [0.0]], dtype=F64), weight=1
    )
    two = ClientUpdate(torch.eye(2, dtype=F64), 4 * torch.eye(2, dtype=F64), weight=3)
    generator = torch.Generator().manual_seed(0)
    g, h = torch.randn(2, 1, generator=generator, dtype=F64).ravel().tolist()
    y = np.array([4 * g, 3 * h])
    expected = np.outer(y, [4 * y[0], 3 * y[1]]) / (y @ y)
    result = aggregate([one, two], "fedask", rank=1, sketch=1)
    np.testing.assert_allclose(dense(result.factors), expected, rtol=1e-13)
    # two columns see everything, whatever they are
    whole = aggregate([one, two], "fedask")
    np.testing.assert_allclose(dense(whole.factors), np.diag([4.0, 3.0]), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(whole.singular_values, [4.0, 3.0], rtol=1e-13)


def test_gauge_and_order_of_the_clients_do_not_matter():
    clients = cohort(CROWD)
    omega = gaussian(clients, 4, 6)
    # re-mixing with a G of condition 4 perturbs every B_k A_k by a few roundings more
    gate = 10 * sketched_gate(F64, clients, omega)
    found = total(run(clients, rank=4, sketch=6))
    for other in (regauged(clients), clients[::-1]):
        assert distance(total(run(other, rank=4, sketch=6)), found) <= gate


@pytest.mark.parametrize("split", ["balanced", "left", "right"])
def test_split_decides_which_factor_carries_the_singular_values(split):
    clients = cohort(CASES["tall"])
    result = run(clients, rank="full", split=split)
    assert_equals_oracle(total(result), exact_mean, clients, recompressed_gate_of, F64)
    S = result.singular_values
    power = {"balanced": 1, "left": 2, "right": 0}[split]
    gate = recompressed_gate_of(F64, clients) * max(1.0, 2 * float(S[0]))
    torch.testing.assert_close(result.B.mT @ result.B, torch.diag(S**power), rtol=0, atol=gate)


def named_layers():
    """Two layers of one signature with another between them, and one more at the end."""
    other = replace(CROWD, out_features=31)
    cases = {"q": CROWD, "up": other, "v": CROWD, "k": CROWD}
    return {name: cohort(case, seed=seed) for seed, (name, case) in enumerate(cases.items())}


def drawn_for(layers, **options):
    return aggregate_layers(
        {name: updates_of(clients) for name, clients in layers.items()},
        "fedask",
        **{"rank": 3, "sketch": 4, "generator": torch.Generator().manual_seed(5), **options},
    )


@pytest.mark.parametrize("max_group", [1, 2, 3])
def test_what_a_layer_draws_does_not_depend_on_the_grouping(max_group):
    layers = named_layers()
    one, other = drawn_for(layers), drawn_for(layers, max_group=max_group)
    for name, clients in layers.items():
        # Ω is not known here, so no condition: that of any other draw serves
        gate = 10 * sketched_gate(F64, clients, gaussian(clients, 3, 4))
        assert distance(total(one[name]), total(other[name])) <= gate < 1e-6


def test_what_a_layer_draws_does_not_depend_on_the_layers_after_it():
    layers = named_layers()
    whole = drawn_for(layers)
    for kept in (1, 2, 3):
        part = drawn_for(dict(list(layers.items())[:kept]))
        for name in part:
            gate = 10 * sketched_gate(F64, layers[name], gaussian(layers[name], 3, 4))
            assert distance(total(part[name]), total(whole[name])) <= gate < 1e-6


@pytest.mark.parametrize("max_group", [1, 2])
def test_without_a_generator_a_layers_draw_does_not_depend_on_the_grouping_either(max_group):
    # how many layers fit into one call is a matter of memory, not of the result
    layers = named_layers()
    one, other = (drawn_for(layers, generator=None, max_group=most) for most in (None, max_group))
    for name, clients in layers.items():
        gate = 10 * sketched_gate(F64, clients, gaussian(clients, 3, 4))
        assert distance(total(one[name]), total(other[name])) <= gate < 1e-6


def test_layers_have_streams_of_their_own():
    clients = cohort(CROWD)
    twins = drawn_for({"q": clients, "v": clients})
    assert distance(total(twins["q"]), total(twins["v"])) > 1e-3


@pytest.mark.parametrize("case", [CASES["tall"], CASES["layers"]], ids=["tall", "layers"])
def test_distributed_pieces_are_nested_and_each_the_best_of_its_rank(case):
    clients = cohort(case)
    result = run(clients)
    assert result.nested
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)
    omega = gaussian(clients)
    for index, layer, _ in by_layer(clients):
        gate = sketched_gate(F64, layer, omega[index])
        W = fedask(layer, omega=omega[index])
        for piece, r, s in zip(pieces, case.ranks, case.scalings, strict=True):
            assert_best_rank(s * dense(piece)[index], W, r, gate)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sketch": 0}, "sketch"),
        ({"sketch": -3}, "sketch"),
        ({"sketch": 2.5}, "sketch"),
        ({"sketch": True}, "sketch"),
        ({"rank": 0}, "rank"),
        ({"rank": "some"}, "rank"),
        ({"rank": 2.0}, "rank"),
        ({"split": "even"}, "split"),
        ({"generator": 3}, "generator"),
        ({"generator": []}, "generator"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, named):
    with pytest.raises(HetLoRAError, match=named):
        run(cohort(CASES["tall"]), **options)


@pytest.mark.parametrize("options", [{"rank": 3, "sketch": 2}, {"sketch": 5}], ids=str)
def test_a_sketch_below_the_rank_is_refused(options):
    # in the second the rank is the largest client's, 6
    with pytest.raises(HetLoRAError, match="sketch"):
        run(cohort(CASES["tall"]), **options)
