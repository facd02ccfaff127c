"""DARE (arXiv:2311.03099): entries of the shared core dropped at random, the others scaled up."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, aggregate_layers, distribute
from reference import DTYPES, Case, Client, arguments, by_layer, cohort, dense, exact_mean, total
from reference_spaces import (
    CORE_CASES,
    clear_cohort,
    core_gate_of,
    core_shape,
    dare,
    keep_masks,
    regauged,
)
from tolerance import assert_best_rank, assert_leading_slices, distance

F64 = torch.float64


def updates_of(clients, dtype=F64, ids=None):
    named = [{}] * len(clients) if ids is None else [{"id": id} for id in ids]
    return [
        ClientUpdate(**arguments(c, dtype), **name) for c, name in zip(clients, named, strict=True)
    ]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(clients, dtype=F64, seed=0, ids=None, **options):
    return aggregate(
        updates_of(clients, dtype, ids), "dare", **{"generator": seeded(seed), **options}
    )


def masks_of(clients, drop=0.5, seed=0):
    return keep_masks(clients, drop, seeded(seed), clients[0].A.shape[:-2])


def scaled_gate(dtype, clients, drop=0.5):
    """What is kept is scaled up, and its error with it."""
    return core_gate_of(dtype, clients) / (1 - drop)


def diagonal(*entries, n=1.0, s=1.0):
    """A client whose update is diagonal, its scaling included."""
    return Client(np.eye(len(entries)), np.diag(np.array(entries, dtype=float)) / s, n, s)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("drop", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CORE_CASES.values(), ids=CORE_CASES)
def test_equals_the_oracle_of_the_masks_drawn(case, dtype, drop, seed):
    clients = clear_cohort(case, dtype)
    result = run(clients, dtype, seed, rank="full", drop=drop)
    assert result.A.dtype == dtype
    assert result.residual is None
    keep = masks_of(clients, drop, seed)
    for index, layer, _ in by_layer(clients):
        expected = dare(layer, keep[index], drop)
        assert distance(total(result)[index], expected) <= scaled_gate(dtype, layer, drop)


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CORE_CASES.values(), ids=CORE_CASES)
def test_truncation_is_the_best_of_its_rank(case, dtype, rank):
    clients = clear_cohort(case, dtype)
    result = run(clients, dtype, rank=rank)
    wanted = max(case.ranks) if rank is None else rank
    expected = min(wanted, case.out_features, case.in_features)
    assert result.rank == expected
    keep = masks_of(clients)
    for index, layer, _ in by_layer(clients):
        gate = scaled_gate(dtype, layer)
        W = dare(layer, keep[index])
        assert_best_rank(dense(result.factors)[index], W, expected, gate)


@pytest.mark.parametrize("case", CORE_CASES.values(), ids=CORE_CASES)
def test_with_nothing_dropped_it_is_the_exact_mean(case):
    clients = cohort(case)  # whatever the gaps: the whole core is the mean in any bases
    result = run(clients, rank="full", drop=0.0)
    for index, layer, _ in by_layer(clients):
        assert distance(total(result)[index], exact_mean(layer)) <= core_gate_of(F64, layer)


def test_the_default_drops_one_half():
    clients = clear_cohort(CORE_CASES["square"])
    one, other = run(clients, rank="full"), run(clients, rank="full", drop=0.5)
    assert torch.equal(one.A, other.A)
    assert torch.equal(one.B, other.B)


def test_another_draw_is_another_result_and_the_same_draw_the_same():
    clients = clear_cohort(CORE_CASES["square"])
    one, again, other = (run(clients, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.A, again.A)
    assert torch.equal(one.B, again.B)
    assert distance(total(one), total(other)) > 0.1


def seed_of(pattern, clients, drop):
    """The first seed whose masks are this pattern, (K, m, n)."""
    shape = core_shape(clients)
    wanted = np.array(pattern).reshape(shape)
    return next(s for s in range(10_000) if np.array_equal(masks_of(clients, drop, s), wanted))


def expectation(clients, drop):
    """E[total] over every pattern of masks, each found by a seed and weighed by its probability."""
    entries = int(np.prod(core_shape(clients)))
    mean = 0.0
    for pattern in product((False, True), repeat=entries):
        probability = np.prod([1 - drop if kept else drop for kept in pattern])
        found = run(clients, seed=seed_of(pattern, clients, drop), rank="full", drop=drop)
        mean = mean + probability * total(found)
    return mean


@pytest.mark.parametrize("drop", [0.25, 0.5])
def test_the_mean_over_all_masks_is_the_exact_mean(drop):
    # One entry for each of three clients: 2³ patterns. No sampling, so no luck.
    rng = np.random.default_rng(0)
    three = [
        Client(rng.standard_normal((1, 1)), rng.standard_normal((1, 1)), n, s)
        for n, s in ((1, 2.0), (2, 0.5), (5, 1.0))
    ]
    gate = scaled_gate(F64, three, drop)
    assert distance(expectation(three, drop), exact_mean(three)) <= 8 * gate
    # A core of 2 × 2 for one client: 2⁴ patterns, off the diagonal to no effect.
    lone = [diagonal(4, 1, n=3, s=2.0)]
    gate = scaled_gate(F64, lone, drop)
    assert distance(expectation(lone, drop), np.diag([4.0, 1.0])) <= 16 * gate
    # Two clients whose one core entry each lies in a larger matrix.
    a, b = rng.standard_normal((1, 5)), rng.standard_normal((4, 1))
    pair = [Client(a, b, 1), Client(-3 * a, b, 2)]
    assert core_shape(pair) == (2, 2, 2)
    one_each = [Client(a[:, :1], b, 1), Client(-3 * a[:, :1], b, 2)]
    assert core_shape(one_each) == (2, 2, 1)
    gate = scaled_gate(F64, one_each, drop)
    assert distance(expectation(one_each, drop), exact_mean(one_each)) <= 16 * gate


def test_worked_by_hand():
    # p = ¼ and ¾; what is kept is doubled. Of the first 4 and 1, of the second 2 and 3: whichever
    # the generator keeps, entry j is ¼ · 2 · (4 or 0) + ¾ · 2 · (2 or 0), and so on.
    clients = [diagonal(4, 1, n=1, s=2.0), diagonal(2, 3, n=3)]
    # Σ p ΔW_k ΔW_kᵀ = diag(¼·16 + ¾·4, ¼·1 + ¾·9) = diag(7, 7): no order, so 6 in place of 4,
    # diag(¼·36 + ¾·4, 7) = diag(12, 7)
    clients[0] = diagonal(6, 1, n=1, s=2.0)
    seen = set()
    for seed in range(40):
        keep = torch.rand(2, 2, 2, generator=seeded(seed), dtype=F64) >= 0.5
        first, second = keep[0].tolist(), keep[1].tolist()
        one = 0.25 * 2 * 6 * first[0][0] + 0.75 * 2 * 2 * second[0][0]
        two = 0.25 * 2 * 1 * first[1][1] + 0.75 * 2 * 3 * second[1][1]
        seen.add((one, two))
        found = total(run(clients, seed=seed, rank="full"))
        np.testing.assert_allclose(found, np.diag([one, two]), rtol=1e-13, atol=1e-13)
    # 3 and 3 on slot 1: 0, 3 or 6; ½ and 4½ on slot 2: 0, ½, 4½ or 5
    assert seen <= set(product((0.0, 3.0, 6.0), (0.0, 0.5, 4.5, 5.0)))
    assert len(seen) >= 8


@pytest.mark.parametrize("copies", [1, 3])
def test_one_repeated_client_keeps_a_share_of_each_component(copies):
    # its core is diagonal: σ_i times Σ p_k m_k[i, i] / (1 − drop), in its own singular vectors
    rng = np.random.default_rng(2)
    client = Client(rng.standard_normal((3, 8)), rng.standard_normal((5, 3)), 1, 0.7)
    clients = [replace(client, n=k + 1) for k in range(copies)]
    U, sigma, Vh = np.linalg.svd(client.update())
    p = np.arange(1, copies + 1) / sum(range(1, copies + 1))
    for seed in range(4):
        diagonals = np.array([np.diagonal(mask)[:3] for mask in masks_of(clients, 0.25, seed)])
        share = (p @ diagonals) / 0.75
        expected = (U[:, :3] * (sigma[:3] * share)) @ Vh[:3]
        found = total(run(clients, seed=seed, rank="full", drop=0.25))
        assert distance(found, expected) <= scaled_gate(F64, clients, 0.25)


def test_a_client_of_weight_zero_draws_nothing():
    clients = clear_cohort(CORE_CASES["thin"])
    absent = replace(clients[0], n=0)
    one, other = run(clients), run([clients[0], absent, clients[1]])
    assert torch.equal(one.A, other.A)
    assert torch.equal(one.B, other.B)


@pytest.mark.parametrize("case", [CORE_CASES["tall"], CORE_CASES["thin"]], ids=["tall", "thin"])
def test_the_gauge_of_the_clients_does_not_matter(case):
    clients = clear_cohort(case)
    one, other = (total(run(each, rank="full")) for each in (clients, regauged(clients)))
    # re-mixing with a G of condition 4 perturbs every B_k A_k by a few roundings more
    assert distance(one, other) <= 10 * scaled_gate(F64, clients)


def test_with_ids_the_order_of_the_clients_does_not_matter():
    # masks go to the clients in the order of their ids
    case = CORE_CASES["square"]
    clients, ids = clear_cohort(case), ["c", "a", "d", "b"]
    one = run(clients, ids=ids, rank="full")
    for listed in ([3, 2, 1, 0], [1, 3, 0, 2]):
        again = run([clients[k] for k in listed], ids=[ids[k] for k in listed], rank="full")
        assert torch.equal(one.A, again.A)
        assert torch.equal(one.B, again.B)
    by_id = [clients[k] for k in (1, 3, 0, 2)]
    assert distance(total(one), dare(by_id, masks_of(by_id))) <= scaled_gate(F64, clients)


def test_a_generator_for_each_layer_draws_for_that_layer_alone():
    case = Case(5, 4, (1, 2, 3), (4, 2, 3), (1.0, 2.0, 0.5), layers=(2,))
    clients = clear_cohort(case)
    seeds = (7, 8)
    each = [seeded(seed) for seed in seeds]
    result = run(clients, rank="full", generator=each)
    for index, layer, _ in by_layer(clients):
        expected = dare(layer, masks_of(layer, seed=seeds[index[0]]))
        assert distance(total(result)[index], expected) <= scaled_gate(F64, layer)


def named_layers():
    """Two layers of one signature with another between them, and one more at the end."""
    other = replace(CORE_CASES["square"], out_features=7)
    cases = {"q": CORE_CASES["square"], "up": other, "v": CORE_CASES["square"]}
    layers = {name: clear_cohort(case) for name, case in cases.items()}
    layers["v"] = [replace(c, A=2 * c.A[:, ::-1]) for c in layers["v"]]
    layers["k"] = [replace(c, B=3 * c.B[::-1]) for c in layers["q"]]
    return layers


def drawn_for(layers, **options):
    return aggregate_layers(
        {name: updates_of(clients) for name, clients in layers.items()},
        "dare",
        rank="full",
        generator=seeded(5),
        **options,
    )


@pytest.mark.parametrize("max_group", [1, 2, 3])
def test_what_a_layer_draws_does_not_depend_on_the_grouping(max_group):
    layers = named_layers()
    one, other = drawn_for(layers), drawn_for(layers, max_group=max_group)
    for name, clients in layers.items():
        gate = 2 * scaled_gate(F64, clients)
        assert distance(total(one[name]), total(other[name])) <= gate < 1e-6


def test_what_a_layer_draws_does_not_depend_on_the_layers_after_it():
    layers = named_layers()
    whole = drawn_for(layers)
    for kept in (1, 2, 3):
        part = drawn_for(dict(list(layers.items())[:kept]))
        for name in part:
            gate = 2 * scaled_gate(F64, layers[name])
            assert distance(total(part[name]), total(whole[name])) <= gate < 1e-6


def test_layers_have_masks_of_their_own():
    clients = clear_cohort(CORE_CASES["square"])
    twins = drawn_for({"q": clients, "v": clients})
    assert distance(total(twins["q"]), total(twins["v"])) > 0.1


@pytest.mark.parametrize("split", ["balanced", "left", "right"])
def test_split_decides_which_factor_carries_the_singular_values(split):
    clients = clear_cohort(CORE_CASES["square"])
    result = run(clients, rank="full", split=split)
    gate = scaled_gate(F64, clients)
    assert distance(total(result), dare(clients, masks_of(clients))) <= gate
    S = result.singular_values
    power = {"balanced": 1, "left": 2, "right": 0}[split]
    held = S > gate  # a vector of no length has no direction
    gram = (result.B.mT @ result.B)[held][:, held]
    size = gate * max(1.0, 2 * float(S[0]))
    torch.testing.assert_close(gram, torch.diag(S[held] ** power), rtol=0, atol=size)


@pytest.mark.parametrize("case", [CORE_CASES["tall"], CORE_CASES["layers"]], ids=["tall", "layers"])
def test_distributed_pieces_are_nested_and_each_the_best_of_its_rank(case):
    clients = clear_cohort(case)
    result = run(clients)
    assert result.nested
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)
    keep = masks_of(clients)
    for index, layer, _ in by_layer(clients):
        gate = scaled_gate(F64, layer)
        W = dare(layer, keep[index])
        for piece, r, s in zip(pieces, case.ranks, case.scalings, strict=True):
            assert_best_rank(s * dense(piece)[index], W, r, gate)


@pytest.mark.parametrize(
    "options",
    [
        {"drop": -0.1},
        {"drop": 1.0},
        {"drop": 1.5},
        {"drop": float("nan")},
        {"drop": "half"},
        {"generator": 3},
        {"generator": None},
        {"generator": []},
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


def test_a_generator_must_be_brought():
    # no default: whoever calls twice with one seed would drop the same entries every round
    updates = updates_of([diagonal(4, 1), diagonal(2, 3)])
    with pytest.raises(HetLoRAError, match="generator"):
        aggregate(updates, "dare")


def test_as_many_generators_as_layers_are_expected():
    clients = clear_cohort(Case(5, 4, (1, 2, 3), (4, 2, 3), (1.0, 2.0, 0.5), layers=(2,)))
    with pytest.raises(HetLoRAError, match="generator"):
        run(clients, generator=[seeded(1)] * 3)
