"""Whole models: layers in batched calls, one verdict per client, state by layer name."""

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from hetlora_agg import (
    METHODS,
    ClientUpdate,
    InputTypeError,
    InputValueError,
    LowRank,
)
from hetlora_agg.types import result_of
from reference import Client, array, dense, hetlora, padded_means, rb, total, update_norms
from states import fitting
from states import run_certain as aggregate
from states import run_layers as aggregate_layers
from tolerance import averaged_gate, distance, eps, recompressed_gate, recompressed_gate_of

F32, F64 = torch.float32, torch.float64
EVERY = sorted(METHODS)
MIXED = [name for name in EVERY if "mixed_ranks" in METHODS[name].claims]
# the form in which layers do not depend on each other
ALONE = {name: {"per_layer": True} if METHODS[name].statistic else {} for name in EVERY}
WITH_STATE = [name for name in EVERY if "previous" in METHODS[name].options]
SIZES = {"q": (9, 7), "v": (9, 7), "up": (12, 7), "k": (9, 7), "down": (7, 12)}
RANKS = (2, 3, 1)
WEIGHTS = (3.0, 1.0, 2.0)


def client(size, rank, seed, dtype=F64, layers=(), **fields):
    out, in_ = size
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(*layers, rank, in_, generator=g, dtype=F64).to(dtype)
    B = torch.randn(*layers, out, rank, generator=g, dtype=F64).to(dtype)
    return ClientUpdate(A, B, **fields)


def model(ranks=RANKS, sizes=SIZES, ids=None, **options):
    """{layer: updates} with one client per rank, each of its own weight, size and scaling."""
    named = [{} if ids is None else {"id": id} for id in (ids or ranks)]
    return {
        name: [
            client(
                size, r, 100 * i + k, weight=WEIGHTS[k % 3], scaling=k + 0.5, **named[k], **options
            )
            for k, r in enumerate(ranks)
        ]
        for i, (name, size) in enumerate(sizes.items())
    }


def ranks_for(method):
    return RANKS if method in MIXED else (2, 2, 2)


def oracle_clients(updates):
    return [Client(array(u.A), array(u.B), u.weight, u.scaling) for u in updates]


def gate(updates):
    """Products of means and recompressed means of products, whichever the method is."""
    clients = oracle_clients(updates)
    dtype = updates[0].A.dtype
    return averaged_gate(dtype, clients) + recompressed_gate_of(dtype, clients)


def assert_bit_equal(one, other):
    assert torch.equal(one.A, other.A)
    assert torch.equal(one.B, other.B)
    assert (one.residual is None) == (other.residual is None)
    if one.residual is not None:
        assert torch.equal(one.residual.A, other.residual.A)
        assert torch.equal(one.residual.B, other.residual.B)


# --- grouping and order -------------------------------------------------------------------------


class Counted:
    """Stacks the updates, and notes what each call was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, c):
        self.calls.append(c)
        return result_of(LowRank(c.A, c.B), nested=False)


@pytest.mark.parametrize(
    ("max_group", "sizes"),
    [(None, [3, 1, 1]), (1, [1, 1, 1, 1, 1]), (2, [2, 1, 1, 1]), (3, [3, 1, 1]), (9, [3, 1, 1])],
)
def test_layers_of_one_signature_are_one_call(max_group, sizes):
    method = Counted()
    layers = model()
    results = aggregate_layers(layers, method, max_group=max_group)
    assert sorted((len(c.A) for c in method.calls), reverse=True) == sizes
    assert list(results) == list(layers)
    for name, updates in layers.items():
        A = torch.cat([math.sqrt(u.scaling) * u.A for u in updates])
        assert distance(results[name].A, A) <= eps(F64) * np.linalg.norm(A)


CHANGES = {
    "rank": lambda u: replace(u, A=u.A[:1], B=u.B[:, :1]),
    "declared rank": lambda u: replace(u, A=torch.cat([u.A[:1], 0 * u.A[1:]]), B=u.B, rank=1),
    "dtype": lambda u: replace(u, A=u.A.float(), B=u.B.float()),
    "dtype of one factor": lambda u: replace(u, A=u.A.float()),
    "weight": lambda u: replace(u, weight=9),
    "weight 0": lambda u: replace(u, weight=0),
    "scaling": lambda u: replace(u, scaling=9),
    "slots": lambda u: replace(u, slots=(1, 0)),
    "leading dimension": None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_of_other_signatures_are_calls_of_their_own(change):
    sizes = {"one": (6, 5), "two": (6, 5)}
    layers = model((2, 2), sizes)
    if change == "leading dimension":
        layers["two"] = [replace(u, A=u.A[None], B=u.B[None]) for u in layers["two"]]
    else:
        layers["two"][0] = CHANGES[change](layers["two"][0])
    method = Counted()
    results = aggregate_layers(layers, method)
    assert len(method.calls) == 2
    for name, updates in layers.items():
        assert_bit_equal(results[name], aggregate(updates, Counted()))


def test_interleaved_layers_come_back_in_their_order():
    sizes = {f"layer.{i}": (6 + i % 2, 5) for i in range(12)}
    layers = model((2, 1), sizes)
    reverse = dict(reversed(layers.items()))
    one, other = aggregate_layers(layers), aggregate_layers(reverse)
    assert list(one) == list(layers)
    assert list(other) == list(reverse)
    for name, updates in layers.items():
        assert distance(total(one[name]), total(aggregate(updates))) <= gate(updates)
        assert distance(total(one[name]), total(other[name])) <= gate(updates)


# --- batched equals per layer -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("max_group", [None, 2])
@pytest.mark.parametrize("method", EVERY)
def test_batched_equals_layer_by_layer(method, max_group, dtype):
    layers = model(ranks_for(method), dtype=dtype)
    results = aggregate_layers(layers, method, max_group=max_group, **ALONE[method])
    for name, updates in layers.items():
        alone = aggregate(updates, method, **ALONE[method])
        result = results[name]
        assert result.A.shape == alone.A.shape
        assert result.B.shape == alone.B.shape
        assert result.A.dtype == dtype
        assert (result.nested, result.dropped, result.notes, result.excluded) == (
            alone.nested,
            alone.dropped,
            alone.notes,
            alone.excluded,
        )
        assert distance(total(result), total(alone)) <= gate(updates)
        assert distance(dense(result.factors), dense(alone.factors)) <= gate(updates)
        if alone.singular_values is not None:
            error = distance(array(result.singular_values), array(alone.singular_values))
            assert error <= gate(updates)


def of_one_rank(updates):
    return [u for u in updates if u.A.shape[-2] == updates[0].A.shape[-2]]


OPTIONS = {
    "rank": {"rank": 2},
    "full": {"rank": "full"},
    "floor": {"floor": 0.7},
    "quorum": {"quorum": 2},
    "align": {"align": "svd"},
    "split": {"split": "left"},
    "uniform": {"weighting": "uniform"},
    "fold_rest": {"fold_rest": True, "rank": 1},
    "fold_rest by energy": {"fold_rest": True, "energy": 0.7},
    "levels": {"levels": [1, 2, 3, 5]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", EVERY)
def test_every_option_reaches_every_layer(method, options):
    if not set(options) <= set(METHODS[method].options):
        with pytest.raises(InputTypeError, match="unknown option"):
            aggregate_layers(model(), method, **options)
        return
    if "weighting" in options and METHODS[method].statistic:
        pytest.skip("its weights are not those of examples or equal ones")
    layers = model()
    if "mixed_ranks" not in METHODS[method].claims:
        layers = {name: of_one_rank(updates) for name, updates in layers.items()}
    results = aggregate_layers(layers, method, **options)
    for name, updates in layers.items():
        alone = aggregate(updates, method, **options)
        assert results[name].rank == alone.rank
        assert results[name].dropped == alone.dropped
        assert distance(total(results[name]), total(alone)) <= gate(updates)
        assert distance(dense(results[name].factors), dense(alone.factors)) <= gate(updates)


@pytest.mark.parametrize("method", [name for name in EVERY if "energy" in METHODS[name].options])
@pytest.mark.parametrize("cap", [None, 2])
def test_energy_trims_each_layer_to_its_own_rank(method, cap):
    # spectra 1, t, t², t³: t decides how many components hold 95% of the energy
    flatness = {"steep": 0.01, "middle": 0.5, "flat": 1.0, "zero": 0.0}
    layers = {}
    for i, (name, t) in enumerate(flatness.items()):
        u, v = (
            torch.linalg.qr(torch.randn(n, 4, dtype=F64, generator=g)).Q
            for n, g in (
                (9, torch.Generator().manual_seed(i)),
                (7, torch.Generator().manual_seed(50 + i)),
            )
        )
        s = torch.tensor([t**j for j in range(4)], dtype=F64) * (name != "zero")
        layers[name] = [ClientUpdate(v.mT, u * s), ClientUpdate(v.mT, 3 * u * s)]
    results = aggregate_layers(layers, method, energy=0.95, rank=cap)
    wanted = {"steep": 1, "middle": 3, "flat": 4, "zero": 1}
    for name, updates in layers.items():
        result, alone = results[name], aggregate(updates, method, energy=0.95, rank=cap)
        expected = min(wanted[name], cap or 4)
        assert result.rank == alone.rank == int(result.ranks) == expected
        assert result.A.shape == (expected, 7)
        assert result.B.shape == (9, expected)
        assert result.singular_values.shape == (expected,)
        assert distance(total(result), total(alone)) <= gate(updates)
        tail = float(alone.certificate.tail)
        assert abs(float(result.certificate.tail) - tail) <= gate(updates)
        assert abs(float(result.certificate.norm) - float(alone.certificate.norm)) <= gate(updates)


@pytest.mark.parametrize("method", EVERY)
def test_leading_dimensions_inside_layers(method):
    sizes = {"one": (6, 5), "two": (6, 5), "other": (5, 6)}
    layers = model(ranks_for(method), sizes, layers=(2, 3))
    results = aggregate_layers(layers, method, **ALONE[method])
    for name, updates in layers.items():
        alone = aggregate(updates, method, **ALONE[method])
        assert results[name].A.shape == alone.A.shape
        assert results[name].A.shape[:2] == (2, 3)
        for index in np.ndindex(2, 3):
            part = [replace(u, A=u.A[index], B=u.B[index]) for u in updates]
            single = total(aggregate(part, method, **ALONE[method]))
            assert distance(total(results[name])[index], single) <= gate(part)
            assert distance(total(alone)[index], single) <= gate(part)


def test_energy_with_leading_dimensions_trims_to_the_widest_of_the_layer():
    flat = client((6, 5), 4, 0)
    steep = replace(flat, B=flat.B * torch.tensor([1, 1e-6, 1e-9, 1e-12]))
    layers = {
        "steep": [ClientUpdate(torch.stack([steep.A] * 2), torch.stack([steep.B] * 2))],
        "both": [ClientUpdate(torch.stack([steep.A, flat.A]), torch.stack([steep.B, flat.B]))],
    }
    results = aggregate_layers(layers, "flexlora", energy=0.999)
    assert results["steep"].rank == 1
    assert results["both"].rank == int(results["both"].ranks.max()) > 1
    assert results["both"].ranks.tolist()[0] == 1
    # zeros follow where a member needs less
    assert not results["both"].B[0, :, 1:].any()
    assert not results["both"].singular_values[0, 1:].any()


def test_numpy_layers():
    layers = {
        name: [replace(u, A=u.A.numpy(), B=u.B.numpy()) for u in updates]
        for name, updates in model().items()
    }
    results, expected = aggregate_layers(layers), aggregate_layers(model())
    for name, result in results.items():
        assert type(result.A) is type(result.B) is type(result.singular_values) is np.ndarray
        assert np.array_equal(result.A, expected[name].A.numpy())
    # one tensor anywhere, and all layers are torch
    layers["q"] = model()["q"]
    results = aggregate_layers(layers)
    assert all(isinstance(result.A, torch.Tensor) for result in results.values())


def test_results_of_a_group_are_each_others_business_not():
    results = aggregate_layers(model())
    before = results["v"].A.clone(), results["v"].B.clone()
    results["q"].A.fill_(9)
    results["q"].B.fill_(9)
    assert torch.equal(results["v"].A, before[0])
    assert torch.equal(results["v"].B, before[1])


# --- how the SVD was taken ----------------------------------------------------------------------


@pytest.mark.parametrize("max_group", [None, 1, 2])
def test_fallbacks_and_norms_belong_to_their_layer(max_group):
    # an easy layer, one with duplicated clients, one with the duplicate in one member only
    easy = [client((40, 30), 3, seed, F32, layers=(2,)) for seed in range(2)]
    double = [easy[0], easy[0]]
    A, B = easy[1].A.clone(), easy[1].B.clone()
    A[1], B[1] = easy[0].A[1], easy[0].B[1]
    second = [easy[0], ClientUpdate(A, B)]
    layers = {"easy": easy, "double": double, "second": second, "again": easy}
    results = aggregate_layers(layers, "flexlora", rank="full", max_group=max_group)
    members = {name: [m for m, _ in r.certificate.fallbacks] for name, r in results.items()}
    assert members == {"easy": [], "double": [0, 1], "second": [1], "again": []}
    for name, updates in layers.items():
        solve, alone = (
            results[name].certificate,
            aggregate(updates, "flexlora", rank="full").certificate,
        )
        assert solve.driver == alone.driver == "gram"
        assert solve.fallbacks == alone.fallbacks
        assert solve.norm.shape == solve.tail.shape == (2,)
        for index in range(2):
            S = recompressed_gate_of(
                F32, oracle_clients([replace(u, A=u.A[index], B=u.B[index]) for u in updates])
            )
            assert abs(float(solve.norm[index] - alone.norm[index])) <= S
            W = dense(results[name].factors)[index]
            assert abs(float(solve.norm[index]) - np.linalg.norm(W)) <= S


# --- one client in every layer ------------------------------------------------------------------


def column(*values):
    return torch.tensor(values, dtype=F64).unsqueeze(-1)


def test_hetlora_weighs_a_client_by_all_its_layers_by_hand():
    # norms: client 0 has 3 and 4, so 5 in all; client 1 has 12 and 9, so 15; weights 1/4, 3/4
    row = torch.tensor([[1.0, 0.0]], dtype=F64)
    layers = {
        "q": [(row, column(3.0, 0.0, 0.0)), (row, column(0.0, 12.0, 0.0))],
        "up": [(row, column(4.0, 0.0)), (row, column(0.0, 9.0))],
    }
    results = aggregate_layers(layers, "hetlora")
    assert results["q"].B.flatten().tolist() == pytest.approx([0.75, 9, 0], rel=4 * eps(F64))
    assert results["up"].B.flatten().tolist() == pytest.approx([1, 6.75], rel=4 * eps(F64))
    apart = aggregate_layers(layers, "hetlora", per_layer=True)
    # 3 and 12: 1/5 and 4/5; 4 and 9: 4/13 and 9/13
    assert apart["q"].B.flatten().tolist() == pytest.approx([0.6, 9.6, 0], rel=4 * eps(F64))
    assert apart["up"].B.flatten().tolist() == pytest.approx([16 / 13, 81 / 13], rel=4 * eps(F64))


@pytest.mark.parametrize("max_group", [None, 1, 2])
@pytest.mark.parametrize("ids", [None, ("c", "a", "b")])
def test_hetlora_norms_are_summed_over_groups_chunks_and_dtypes(max_group, ids):
    layers = model(ids=ids)
    layers["k"] = [replace(u, A=u.A.float(), B=u.B.float()) for u in layers["k"]]
    norms = [
        math.sqrt(
            sum(update_norms(oracle_clients([updates[k]]))[0] ** 2 for updates in layers.values())
        )
        for k in range(3)
    ]
    results = aggregate_layers(layers, "hetlora", max_group=max_group)
    for name, updates in layers.items():
        clients = oracle_clients(updates)
        # "k" is folded in float32, and its norms are part of the weights of every layer
        allowed = averaged_gate(F32, clients)
        assert distance(total(results[name]), hetlora(clients, norms)) <= allowed


def test_one_call_over_leading_dimensions_is_one_model_too():
    # the layers as leading dimensions of one update, or by name: the same client weights
    layers = model(sizes={"a": (6, 5), "b": (6, 5)})
    stacked = [
        replace(one, A=torch.stack([one.A, two.A]), B=torch.stack([one.B, two.B]))
        for one, two in zip(layers["a"], layers["b"], strict=True)
    ]
    by_name, by_dim = aggregate_layers(layers, "hetlora"), total(aggregate(stacked, "hetlora"))
    assert distance(total(by_name["a"]), by_dim[0]) <= gate(layers["a"])
    assert distance(total(by_name["b"]), by_dim[1]) <= gate(layers["b"])


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("max_group", [None, 1])
@pytest.mark.parametrize("ids", [None, ("c", "a", "b")])
def test_a_dropped_client_is_dropped_from_every_layer(method, max_group, ids):
    layers = {n: fitting(method, u) for n, u in model(ranks_for(method), ids=ids).items()}
    expected = aggregate_layers(
        {name: [updates[0], updates[2]] for name, updates in layers.items()}, method
    )
    A = layers["up"][1].A.clone()
    A[0, 3] = math.nan
    layers["up"][1] = replace(layers["up"][1], A=A)
    results = aggregate_layers(layers, method, max_group=max_group, on_bad_client="drop")
    for name, result in results.items():
        assert [who for who, _ in result.excluded] == [1 if ids is None else "a"]
        assert "layer 'up', lora_A: 1 NaN" in result.excluded[0][1]
        assert distance(total(result), total(expected[name])) <= gate(
            [layers[name][0], layers[name][2]]
        )


def test_clients_bad_in_different_layers_are_all_dropped():
    layers = model(ids=("c", "a", "b"))
    for name, k in (("q", 0), ("down", 1)):
        layers[name][k] = replace(layers[name][k], B=layers[name][k].B * math.inf)
    results = aggregate_layers(layers, on_bad_client="drop")
    for name, result in results.items():
        assert sorted(who for who, _ in result.excluded) == ["a", "c"]
        alone = dense(layers[name][2]) * layers[name][2].scaling
        assert distance(total(result), alone) <= gate([layers[name][2]])


# --- clients that lack a layer ------------------------------------------------------------------


def lacking():
    """Client "b" did not send layer "v"; client "c" did not send "up"."""
    layers = model(ids=("c", "a", "b"))
    layers["v"] = [u for u in layers["v"] if u.id != "b"]
    layers["up"] = [u for u in layers["up"] if u.id != "c"]
    return layers


@pytest.mark.parametrize("method", MIXED)
def test_a_missing_layer_is_an_error_by_default(method):
    match = r"layer 'v': client 'b' sent other layers but not this one; say .*missing=\"zero\" or"
    with pytest.raises(InputValueError, match=match):
        aggregate_layers(lacking(), method)


@pytest.mark.parametrize("missing", ["zero", "renormalise", "error"])
@pytest.mark.parametrize("some", ["none", "one"])
def test_a_missing_layer_needs_ids(missing, some):
    layers = model()
    if some == "one":
        layers = {n: [replace(u[0], id="x"), *u[1:]] for n, u in layers.items()}
    layers["v"] = layers["v"][:2]
    with pytest.raises(InputValueError, match=r"layer 'v': 2 updates where.*every update an id"):
        aggregate_layers(layers, missing=missing)


@pytest.mark.parametrize("missing", ["drop", "Zero", None, True])
def test_an_unknown_policy(missing):
    with pytest.raises(InputValueError, match=r"missing=.*known: \['error', 'renormalise', 'zero'"):
        aggregate_layers(model(), missing=missing)


@pytest.mark.parametrize("method", [name for name in MIXED if not METHODS[name].statistic])
def test_renormalise_leaves_the_client_out_of_that_layer_only(method):
    layers = lacking()
    results = aggregate_layers(layers, method, missing="renormalise")
    for name, updates in layers.items():
        assert distance(total(results[name]), total(aggregate(updates, method))) <= gate(updates)


def test_renormalise_keeps_hetloras_weights_from_the_layers_that_were_sent():
    layers = lacking()
    squares = dict.fromkeys("abc", 0.0)
    for updates in layers.values():
        for u in updates:
            squares[u.id] += update_norms(oracle_clients([u]))[0] ** 2
    for missing in ("renormalise", "zero"):
        results = aggregate_layers(layers, "hetlora", missing=missing)
        for name, updates in layers.items():
            clients = oracle_clients(updates)
            norms = [math.sqrt(squares[u.id]) for u in updates]
            everyone = norms if missing == "renormalise" else np.sqrt(list(squares.values()))
            A, B = padded_means(
                [c.folded() for c in clients], [norm / math.fsum(everyone) for norm in norms]
            )
            assert distance(total(results[name]), B @ A) <= gate(updates)


def zero_client(updates, absent, like):
    """What "zero" means, spelled out: a client of the layer's size whose update is zero."""
    u = updates[0]
    return ClientUpdate(0 * u.A[:1], 0 * u.B[:, :1], weight=like.weight, id=absent)


@pytest.mark.parametrize("method", ["flora", "flexlora", "zeropad", "fedex"])
def test_zero_keeps_the_weight_in_the_denominators(method):
    layers = lacking()
    results = aggregate_layers(layers, method, missing="zero")
    everyone = {u.id: u for u in layers["q"]}
    for name, updates in layers.items():
        absent = [id for id in everyone if id not in {u.id for u in updates}]
        whole = [*updates, *(zero_client(updates, id, everyone[id]) for id in absent)]
        expected = total(aggregate(whole, method))
        assert distance(total(results[name]), expected) <= gate(updates)
    # by hand: the others' shares are n_k / Σ n over all three, not over the two
    one, two = layers["v"]
    n = math.fsum(WEIGHTS)
    mean = (one.weight * one.scaling * dense(one) + two.weight * two.scaling * dense(two)) / n
    if method in ("flora", "fedex"):
        assert distance(total(results["v"]), mean) <= gate(layers["v"])


@pytest.mark.parametrize("floor", [0.5, 0.9, 1.0])
def test_zero_counts_against_the_support_floor(floor):
    layers = lacking()
    results = aggregate_layers(layers, "rb", missing="zero", floor=floor, rank="full")
    # γ = n_k / max(N_j, β N) with N over all clients: the absent one owns no slot but counts in N
    present = oracle_clients(layers["v"])
    N = math.fsum(WEIGHTS)
    W = np.zeros((9, 7))
    for c in (c.folded() for c in present):
        for j in range(c.rank):
            N_j = math.fsum(o.n for o in present if o.rank > j)
            W += c.n / max(N_j, floor * N) * np.outer(c.B[:, j], c.A[j])
    assert distance(total(results["v"]), W) <= gate(layers["v"])


def test_zero_owns_no_slot():
    # owners share a slot among themselves, so the absent client dilutes nothing in rb
    layers = lacking()
    results = aggregate_layers(layers, "rb", missing="zero", rank="full")
    for name, updates in layers.items():
        assert distance(total(results[name]), rb(oracle_clients(updates))) <= gate(updates)


def test_zero_and_equal_ranks():
    # every rank that was sent is 2; the average with a zero update is well defined
    layers = {
        "q": [client((6, 5), 2, k, id=k) for k in range(2)],
        "v": [client((6, 5), 2, 9, id=0)],
    }
    results = aggregate_layers(layers, "fedit", missing="zero")
    expected = aggregate_layers(layers, "zeropad", missing="zero")
    assert distance(total(results["v"]), total(expected["v"])) <= gate(layers["v"])


def test_a_layer_left_with_absent_clients_only():
    layers = {n: [client((6, 5), 2, k, id=k) for k in range(3)] for n in "qv"}
    layers["v"] = [replace(u, weight=0) for u in layers["v"][:2]]
    with pytest.raises(InputValueError, match="no client is left"):
        aggregate_layers(layers, missing="zero")


def test_a_client_that_lacks_a_layer_has_one_weight():
    layers = {n: [client((6, 5), 2, k, id=k) for k in range(3)] for n in "quv"}
    layers["q"][2] = replace(layers["q"][2], weight=9)
    layers["v"] = layers["v"][:2]
    with pytest.raises(InputValueError, match=r"layer 'v': client 2 lacks it.*give it one weight"):
        aggregate_layers(layers, missing="zero")


def test_a_dropped_client_that_lacks_a_layer():
    layers = lacking()
    layers["q"] = [replace(u, A=u.A * math.nan) if u.id == "b" else u for u in layers["q"]]
    for missing in ("zero", "renormalise"):
        results = aggregate_layers(layers, "flora", missing=missing, on_bad_client="drop")
        # "b" lacks "v" and is dropped everywhere: nothing of it is left in the denominators
        expected = total(aggregate(layers["v"], "flora"))
        assert distance(total(results["v"]), expected) <= gate(layers["v"])
        assert all([who for who, _ in r.excluded] == ["b"] for r in results.values())


# --- state by layer -----------------------------------------------------------------------------


def state_options(method):
    return {"levels": [1, 2, 3, 5]} if method == "raflora" else ALONE[method]


@pytest.mark.parametrize("method", WITH_STATE)
@pytest.mark.parametrize("form", ["LowRank", "AggregationResult", "numpy"])
def test_previous_by_layer_equals_layer_by_layer(method, form):
    layers, options = model(), state_options(method)
    # ranks differ between layers of equal size: they cannot share a call
    previous = {
        name: LowRank(earlier.A, earlier.B)
        for name, size, rank in zip(SIZES, SIZES.values(), (5, 5, 4, 3, 6), strict=True)
        for earlier in [client(size, rank, 7)]
    }
    given = previous
    if form == "AggregationResult":
        given = {name: result_of(factors) for name, factors in previous.items()}
    if form == "numpy":
        given = {name: factors.numpy() for name, factors in previous.items()}
    results = aggregate_layers(layers, method, previous=given, **options)
    for name, updates in layers.items():
        alone = aggregate(updates, method, previous=previous[name], **options)
        assert results[name].rank == alone.rank
        S = np.linalg.norm(previous[name].A) * np.linalg.norm(previous[name].B)
        allowed = gate(updates) + recompressed_gate(F64, *SIZES[name], S)
        assert distance(total(results[name]), total(alone)) <= allowed


@pytest.mark.parametrize("method", WITH_STATE)
@pytest.mark.parametrize("energy", [None, 0.9])
def test_the_last_return_value_is_the_next_previous(method, energy):
    options = state_options(method)
    first = model((3, 5, 1)) if energy is None else model((3, 3, 1))
    energetic = (
        {} if energy is None or "energy" not in METHODS[method].options else {"energy": energy}
    )
    last = aggregate_layers(first, method, **options, **energetic)
    second = model((2, 1, 1))
    results = aggregate_layers(second, method, previous=last, **options)
    for name, updates in second.items():
        alone = aggregate(updates, method, previous=last[name], **options)
        assert results[name].rank == alone.rank
        S = np.linalg.norm(last[name].A) * np.linalg.norm(last[name].B)
        allowed = gate(updates) + recompressed_gate(F64, *SIZES[name], S)
        assert distance(total(results[name]), total(alone)) <= allowed
        # slots above the largest rank of this round are still there
        assert results[name].rank >= last[name].rank


@pytest.mark.parametrize("method", WITH_STATE)
def test_previous_lacks_a_layer_or_has_the_wrong_shape(method):
    layers, options = model(), state_options(method)
    good = {n: LowRank(c.A, c.B) for n, s in SIZES.items() for c in [client(s, 4, 1)]}
    missing = {name: factors for name, factors in good.items() if name != "up"}
    with pytest.raises(InputValueError, match=r"previous=: expected an entry for every.* 'up' has"):
        aggregate_layers(layers, method, previous=missing, **options)
    with pytest.raises(InputValueError, match=r"previous=, layer 'up': .*\(12, 7\).*got \(9, 7\)"):
        aggregate_layers(layers, method, previous={**good, "up": good["q"]}, **options)
    with pytest.raises(
        InputTypeError, match=r"previous=, layer 'v': expected a LowRank.*got tuple"
    ):
        aggregate_layers(layers, method, previous={**good, "v": (1, 2)}, **options)
    stacked = aggregate_layers(layers, "flora")
    with pytest.raises(InputValueError, match=r"previous=, layer 'q': .*not nested.*distributed"):
        aggregate_layers(layers, method, previous=stacked, **options)
    with pytest.raises(InputValueError, match="expected an entry for every layer, layer 'q'"):
        aggregate_layers(layers, method, previous={}, **options)


@pytest.mark.parametrize("method", WITH_STATE)
def test_previous_that_is_no_mapping_is_refused(method):
    # also where its leading dimension happens to be the number of layers in a group
    layers = model(sizes={"q": (9, 7), "v": (9, 7)})
    one = client((9, 7), 4, 1)
    for previous in (
        LowRank(one.A, one.B),
        LowRank(torch.stack([one.A] * 2), torch.stack([one.B] * 2)),
    ):
        with pytest.raises((InputTypeError, InputValueError), match=r"previous=.*mapping"):
            aggregate_layers(layers, method, previous=previous, **state_options(method))


def test_state_is_not_changed():
    layers = model()
    previous = {n: LowRank(c.A, c.B) for n, s in SIZES.items() for c in [client(s, 4, 1)]}
    before = {n: (p.A.clone(), p.B.clone()) for n, p in previous.items()}
    for method in WITH_STATE:
        results = aggregate_layers(layers, method, previous=previous, **state_options(method))
        for result in results.values():
            result.A.zero_()
            result.B.zero_()
    for name, (A, B) in before.items():
        assert torch.equal(previous[name].A, A)
        assert torch.equal(previous[name].B, B)


# --- ids: the order of the clients --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, F32, F64])
@pytest.mark.parametrize("method", EVERY)
def test_with_ids_every_order_of_the_clients_is_bit_equal(method, dtype):
    ranks = (2, 4, 1, 2) if method in MIXED else (2, 2, 2, 2)
    sizes = {"q": (9, 7), "v": (9, 7), "up": (30, 20)}
    layers = model(ranks, sizes, ids=("d", 3, (1, 2), "a"), dtype=dtype)
    expected = aggregate_layers(layers, method)
    for order in permutations(range(4)):
        shuffled = {name: [updates[k] for k in order] for name, updates in layers.items()}
        results = aggregate_layers(shuffled, method)
        for name, result in results.items():
            assert_bit_equal(result, expected[name])
        assert_bit_equal(aggregate(shuffled["up"], method), aggregate(layers["up"], method))


@pytest.mark.parametrize("missing", ["zero", "renormalise"])
@pytest.mark.parametrize("method", ["hetlora", "rb", "zeropad"])
def test_with_ids_orders_that_differ_between_layers_are_bit_equal(method, missing):
    layers = lacking()
    expected = aggregate_layers(layers, method, missing=missing)
    for order in permutations(range(3)):
        shuffled = dict(layers)
        shuffled["q"] = [layers["q"][k] for k in order]
        shuffled["v"] = layers["v"][:: 1 if order[0] else -1]
        results = aggregate_layers(shuffled, method, missing=missing)
        for name, result in results.items():
            assert_bit_equal(result, expected[name])


def test_repeats_are_bit_equal():
    for method in EVERY:
        one, two = (aggregate_layers(model(ranks_for(method)), method) for _ in range(2))
        for name, result in one.items():
            assert_bit_equal(result, two[name])


# --- what a method hands back -------------------------------------------------------------------


def test_a_method_that_loses_the_layers_is_told_so():
    with pytest.raises((InputTypeError, InputValueError), match=r"method 'first'.*expected"):
        aggregate_layers(model(), first)


def first(c):
    """A user's method that forgot about leading dimensions."""
    return LowRank(c.A[0], c.B[0])
