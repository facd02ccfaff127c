"""Rank inflation: what each defence guarantees, alone and together, and where it does not.

The oracles are fractions and plain NumPy. Shares are read off results, not off the library's own
verbs: where every client's component in every slot is a unit matrix of its own, the entries of the
global update are the shares.
"""

import math
from dataclasses import replace
from itertools import chain, combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bench_inflation import ATTACKS as MEASURED
from benchmarks.bench_inflation import (
    CLEAN,
    DEFENCES,
    RANKS,
    attacked,
    cohort,
    error_under,
    options_of,
)
from hetlora_agg import (
    METHODS,
    ClientUpdate,
    HetLoRAError,
    InputValueError,
    LowRank,
    aggregate,
    aggregate_layers,
)
from hetlora_agg.adapters import aggregate_state_dicts
from reference import water_filling

EPS = 2.0**-52
OUT, IN = 9, 8

GUARDED = {
    "rb": {"rank": "full"},
    "raflora": {"rank": "full"},
    "rbla": {},
    "hafl": {},
    "plora": {"weighting": "examples"},
    "shared_a": {},
}
"""Methods with all three options, and what makes their result what the formula says."""
PRODUCTS = ("rb", "raflora")


# ---- the weight cap ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*GUARDED, "fedsa"])
def test_a_cap_that_cannot_hold_names_the_clients_and_itself(method):
    updates = [ClientUpdate(torch.ones(1, 2), torch.ones(2, 1)) for _ in range(4)]
    with pytest.raises(InputValueError, match=r"weight_cap=.*0\.25 for K = 4.*τ = 0\.2$"):
        aggregate(updates, method, weight_cap=0.2)
    for wrong in (0, -1, 1.5, float("nan")):
        with pytest.raises(InputValueError, match=r"weight_cap=.*\(0, 1\]"):
            aggregate(updates, method, weight_cap=wrong)


# ---- what the options do, on every method that has them ------------------------------------------


def clients_of(ranks, weights, seed=0, common=False):
    """Clients with random factors; with one A if it has to be common."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((max(ranks), IN))
    return [
        ClientUpdate(
            shared[:r] if common else rng.standard_normal((r, IN)),
            rng.standard_normal((OUT, r)),
            weight=weight,
        )
        for r, weight in zip(ranks, weights, strict=True)
    ]


def naive(method, updates, previous=None, floor=None, quorum=None, weight_cap=None):
    """The guarded method, slot by slot and client by client, dense, and the dropped slots."""
    weights = [float(u.weight) for u in updates]
    if weight_cap is not None:
        weights = water_filling(weights, weight_cap)
    total, dropped = math.fsum(weights), []
    W = np.zeros((OUT, IN))
    n_slots = max(u.A.shape[0] for u in updates)
    for j in range(max(n_slots, 0 if previous is None else previous.rank)):
        owners = [k for k, u in enumerate(updates) if u.A.shape[0] > j]
        if quorum is not None and 0 < len(owners) < quorum:
            dropped.append(j)
            owners = []
        if not owners:
            if previous is not None and j < previous.rank:
                W += np.outer(previous.B[:, j], previous.A[j])
            continue
        whole = math.fsum(weights[k] for k in owners)
        share = [weights[k] / whole for k in owners]
        if floor is not None:
            share = [min(s, weights[k] / total / floor) for s, k in zip(share, owners, strict=True)]
        rows = [
            (s, updates[k].A[j], updates[k].B[:, j]) for s, k in zip(share, owners, strict=True)
        ]
        if method in PRODUCTS:
            W += sum(s * np.outer(b, a) for s, a, b in rows)
            continue
        b_mean = sum(s * b for s, _, b in rows)
        a_mean = rows[0][1] if method == "shared_a" else sum(s * a for s, a, _ in rows)
        W += np.outer(b_mean, a_mean)
    return W, tuple(dropped)


SWITCHES = {
    "floor": {"floor": 0.4},
    "quorum": {"quorum": 2},
    "cap": {"weight_cap": 0.3},
    "floor-cap": {"floor": 0.4, "weight_cap": 0.3},
    "quorum-cap": {"quorum": 3, "weight_cap": 0.3},
    "all": {"floor": 0.6, "quorum": 2, "weight_cap": 0.25},
}
COHORTS = {"inflated": ((2, 2, 3, 3, 6), (5, 9, 2, 4, 50)), "even": ((3, 3, 3, 3), (1, 2, 3, 4))}


@pytest.mark.parametrize("with_previous", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("options", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("ranks_weights", COHORTS.values(), ids=COHORTS)
@pytest.mark.parametrize("method", GUARDED)
def test_guards_are_what_the_formula_says(method, ranks_weights, options, with_previous):
    updates = clients_of(*ranks_weights, common=method == "shared_a")
    previous, state = None, {}
    if with_previous:
        (last,) = clients_of((7,), (1,), seed=9)
        if method == "shared_a":
            last = replace(last, A=np.concatenate([updates[-1].A, last.A[len(updates[-1].A) :]]))
        previous = LowRank(last.A, last.B)
        state = {"previous": previous}
        state |= {"levels": (2, 3, 6, 7)} if method == "raflora" else {}
    result = aggregate(updates, method, **GUARDED[method], **options, **state)
    W, dropped = naive(method, updates, previous, **options)
    scale = math.fsum(np.linalg.norm(u.A) * np.linalg.norm(u.B) for u in updates) + 50
    assert np.linalg.norm(result.B @ result.A - W) <= 10 * OUT * EPS * scale
    assert result.dropped == dropped


@pytest.mark.parametrize("weight_cap", [0.2, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("method", [*GUARDED, "fedsa"])
def test_a_cap_is_the_method_on_other_weights(method, weight_cap):
    ranks, weights = COHORTS["inflated"]
    updates = clients_of(ranks, weights, common=method == "shared_a")
    other = water_filling(weights, weight_cap)
    fairer = [replace(u, weight=w) for u, w in zip(updates, other, strict=True)]
    options = GUARDED.get(method, {})
    found = aggregate(updates, method, weight_cap=weight_cap, **options)
    expected = aggregate(fairer, method, **options)
    for X, Y in ((found.A, expected.A), (found.B, expected.B)):
        if method not in PRODUCTS:
            assert np.allclose(X, Y, rtol=1e-13, atol=1e-13)
    assert np.allclose(found.B @ found.A, expected.B @ expected.A, rtol=1e-12, atol=1e-12)
    if weight_cap < 0.5:
        uncapped = aggregate(updates, method, **options)
        assert np.linalg.norm(found.A - uncapped.A) + np.linalg.norm(found.B - uncapped.B) > 0.1


def test_uniform_modules_have_no_use_for_a_cap():
    updates = clients_of(*COHORTS["inflated"])
    plain, cap = (aggregate(updates, "plora", **o) for o in ({}, {"weight_cap": 0.2}))
    assert np.allclose(plain.A, cap.A, rtol=1e-14)
    assert np.allclose(plain.B, cap.B, rtol=1e-14)


def test_a_frozen_A_stays_where_a_quorum_drops_its_slot():
    updates = clients_of((1, 1, 3), (1, 1, 1), common=True)
    first = aggregate(updates, "shared_a", quorum=2)
    assert first.dropped == (1, 2)
    assert not first.B[:, 1:].any()
    assert np.array_equal(first.A, updates[2].A)
    previous = LowRank(updates[2].A, np.ones((OUT, 3)))
    later = aggregate(updates, "shared_a", quorum=2, previous=previous)
    assert np.array_equal(later.A, updates[2].A)
    assert np.array_equal(later.B[:, 1:], np.ones((OUT, 2)))


def test_batched_guards_are_those_of_each_layer():
    ranks, weights = COHORTS["inflated"]
    for method in [*GUARDED, "fedsa"]:
        models = {
            str(seed): clients_of(ranks, weights, seed, common=method == "shared_a")
            for seed in range(2)
        }
        options = {"weight_cap": 0.3} | ({} if method == "fedsa" else {"quorum": 2, "floor": 0.6})
        results = aggregate_layers(models, method, **options)
        for name, updates in models.items():
            alone = aggregate(updates, method, **options)
            assert results[name].dropped == alone.dropped
            gap = results[name].B @ results[name].A - alone.B @ alone.A
            assert np.abs(gap).max() <= 1e-12, method


# ---- coalitions ----------------------------------------------------------------------------------


def shares(method, ranks, weights, **options):
    """Each client's share of each slot, `(K, slots)`, read off the factors.

    Component (k, j) has the unit vector number k·n + j in A and in B; the methods that average
    factors hold a slot's shares in its row of A.
    """
    K, n = len(ranks), max(ranks)
    every = torch.eye(K * n, dtype=torch.float64)
    updates = [
        ClientUpdate(every[k * n : k * n + r], every[:, k * n : k * n + r], weight=float(w))
        for k, (r, w) in enumerate(zip(ranks, weights, strict=True))
    ]
    result = aggregate(updates, method, **GUARDED[method], **options)
    if method in PRODUCTS:
        return result.factors.dense().diagonal().reshape(K, n).numpy()
    return result.A.sum(0).reshape(K, n).numpy()


def coalitions(K):
    everybody = range(K)
    return chain.from_iterable(combinations(everybody, size) for size in range(1, K + 1))


@st.composite
def federations(draw):
    """Ranks, weights, a floor, and a cap that so many clients can keep."""
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    weights = [draw(st.integers(1, 1000)) for _ in ranks]
    floor = draw(st.integers(1, 20)) / 20
    cap = max(draw(st.integers(1, 20)) / 20, 1 / len(ranks))
    return ranks, weights, floor, cap


@pytest.mark.parametrize("method", ["rb", "rbla"])
def test_no_coalition_exceeds_its_bound(method):
    @given(federations())
    def bounded(case):
        ranks, weights, floor, cap = case
        p = np.array(weights) / sum(weights)
        gamma = shares(method, ranks, weights, floor=floor)
        both = shares(method, ranks, weights, floor=floor, weight_cap=cap)
        slack = 1 + 100 * EPS
        for members in map(list, coalitions(len(ranks))):
            assert gamma[members].sum(0).max() <= p[members].sum() / floor * slack + 100 * EPS
            assert both[members].sum(0).max() <= len(members) * cap / floor * slack + 100 * EPS

    bounded()


@given(federations())
def test_a_lone_owner_attains_the_bound(case):
    ranks, weights, floor, cap = case
    ranks = [min(r, 3) for r in ranks]
    ranks[0] = 4
    p = weights[0] / sum(weights)
    gamma = shares("rb", ranks, weights, floor=floor)[0, 3]
    assert math.isclose(gamma, min(1, p / floor), rel_tol=200 * EPS)
    exact = water_filling(weights, cap)[0]
    both = shares("rb", ranks, weights, floor=floor, weight_cap=cap)[0, 3]
    assert math.isclose(both, min(1, exact / floor), rel_tol=200 * EPS)
    # Without a floor it is 1 whatever the cap, above any bound below 1.
    for options in ({}, {"weight_cap": cap}):
        assert math.isclose(shares("rb", ranks, weights, **options)[0, 3], 1, rel_tol=200 * EPS)


def test_the_cap_is_attained_by_a_lone_owner_who_lies():
    gamma = shares("rb", (4, 1, 1, 1), (10**9, 1, 1, 1), floor=0.5, weight_cap=0.3)
    assert math.isclose(gamma[0, 3], 0.3 / 0.5, rel_tol=100 * EPS)
    # The floor alone bounds nothing by a number that the client declares itself.
    assert shares("rb", (4, 1, 1, 1), (10**9, 1, 1, 1), floor=0.5)[0, 3] == 1


def test_one_of_a_hundred_and_one_has_101_times_its_fair_influence():
    fair = shares("rb", (2,) * 101, (1,) * 101)[0]
    gained = shares("rb", (3,) + (2,) * 100, (1,) * 101)[0]
    assert np.allclose(fair, 1 / 101, rtol=1e-13)
    assert math.isclose(gained[2] / fair[0], 101, rel_tol=1e-12)


# ---- the quorum ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rb", "rbla", "raflora"])
@pytest.mark.parametrize("attackers", [1, 2])
def test_a_quorum_leaves_attackers_outnumbered_on_every_slot(method, attackers):
    K = 5
    for honest in product((1, 2, 4), repeat=K - attackers):
        for inflated in (1, 2, 4, 8):
            ranks = (inflated,) * attackers + honest
            options = {"quorum": 2 * attackers + 1}
            gamma = shares(method, ranks, (1,) * K, **options)
            kept = gamma.sum(0) > 0
            theirs, others = (gamma[:attackers] > 0).sum(0), (gamma[attackers:] > 0).sum(0)
            assert (others >= theirs + 1)[kept].all(), ranks
            assert (gamma[:attackers].sum(0) < 0.5)[kept].all(), ranks
            # Beyond the honest clients' ranks there is nothing.
            assert not gamma[:, max(honest) :].any(), ranks


def test_without_a_quorum_attackers_open_slots_of_their_own():
    gamma = shares("rb", (8, 2, 4, 4, 2), (1,) * 5)
    assert np.allclose(gamma[0, 4:], 1)


@pytest.mark.parametrize("method", GUARDED)
def test_dropped_slots_are_listed_and_carried_over(method):
    updates = clients_of((2, 2, 2, 5), (1, 1, 1, 1), common=method == "shared_a")
    A = updates[-1].A if method == "shared_a" else np.ones((5, IN))
    previous = LowRank(A, np.arange(5.0) * np.ones((OUT, 5)))
    state = {"levels": (2, 5)} if method == "raflora" else {}
    result = aggregate(updates, method, quorum=3, previous=previous, **GUARDED[method], **state)
    assert result.dropped == (2, 3, 4)
    honest = [replace(u, A=u.A[:2], B=u.B[:, :2]) for u in updates]
    below = aggregate(honest, method, **GUARDED[method])
    expected = below.B @ below.A + previous.B[:, 2:] @ previous.A[2:]
    assert np.allclose(result.B @ result.A, expected, rtol=1e-12, atol=1e-11)


# ---- the registry, where bad clients are dropped -------------------------------------------------


def sent(ranks, ids=None, weights=None, seed=0):
    updates = clients_of(ranks, weights or range(1, len(ranks) + 1), seed)
    return [replace(u, id=None if ids is None else ids[k]) for k, u in enumerate(updates)]


def same(found, expected):
    return np.array_equal(found.A, expected.A) and np.array_equal(found.B, expected.B)


@pytest.mark.parametrize("method", ["rb", "rbla", "replicate", "flora", "hetlora", "zeropad"])
def test_who_declares_too_much_is_dropped_and_listed(method):
    updates = sent((2, 3, 8, 2), "abcd")
    result = aggregate(updates, method, max_rank=4, on_bad_client="drop")
    ((who, why),) = result.excluded
    assert who == "c"
    assert "client 2 (id 'c'): declares rank 8, above the registered 4" in why
    assert same(result, aggregate([u for u in updates if u.id != "c"], method))
    with pytest.raises(InputValueError, match=r"client 2 .*declares rank 8"):
        aggregate(updates, method, max_rank=4)


def test_positions_do_not_shift_without_ids():
    updates = sent((8, 2, 9, 3))
    result = aggregate(updates, max_rank={0: 2, 1: 2, 2: 3, 3: 3}, on_bad_client="drop")
    assert [who for who, _ in result.excluded] == [0, 2]
    assert [why.split(":")[0] for _, why in result.excluded] == ["client 0", "client 2"]
    assert same(result, aggregate([updates[1], updates[3]]))
    # the last client is still client 3 for everything else that is said of it
    bad = replace(updates[3], B=updates[3].B * np.nan)
    result = aggregate([*updates[:3], bad], max_rank=3, on_bad_client="drop")
    assert sorted(who for who, _ in result.excluded) == [0, 2, 3]
    assert same(result, aggregate([updates[1]]))


def test_slots_and_strangers_are_refused_like_ranks():
    updates = sent((2, 2, 2), "abc")
    far = replace(updates[1], slots=(0, 10**9))
    registry = {"a": 2, "b": 2}
    result = aggregate([updates[0], far, updates[2]], max_rank=registry, on_bad_client="drop")
    reasons = dict(result.excluded)
    assert "fills slot 1000000000 (from 0), above the registered 2" in reasons["b"]
    assert "not in max_rank=; register its rank under 'c'" in reasons["c"]
    assert same(result, aggregate([updates[0]]))
    # the first slot that nobody is registered for, and the last that somebody is
    for slot, left_out in ((2, ["b"]), (1, [])):
        near = [updates[0], replace(updates[1], slots=(0, slot))]
        found = aggregate(near, max_rank=registry, on_bad_client="drop")
        assert [who for who, _ in found.excluded] == left_out


def test_a_client_above_its_rank_in_one_layer_is_dropped_from_all():
    layers = {"q": sent((2, 3, 2), "abc"), "v": sent((2, 8, 2), "abc", seed=1)}
    results = aggregate_layers(layers, max_rank=4, on_bad_client="drop")
    for name, result in results.items():
        ((who, why),) = result.excluded
        assert who == "b"
        assert "layer 'v': declares rank 8" in why
        assert same(result, aggregate([u for u in layers[name] if u.id != "b"]))
    with pytest.raises(InputValueError, match="layer 'v': declares rank 8"):
        aggregate_layers(layers, max_rank=4)


def test_every_layer_has_its_say_and_the_first_gives_the_reason():
    layers = {"q": sent((8, 9, 2), "abc"), "v": sent((2, 8, 2), "abc", seed=1)}
    results = aggregate_layers(layers, max_rank=4, on_bad_client="drop")
    for name, result in results.items():
        reasons = dict(result.excluded)
        assert sorted(reasons) == ["a", "b"]
        assert "layer 'q': declares rank 9" in reasons["b"]
        assert same(result, aggregate(layers[name][2:]))


@pytest.mark.parametrize("missing", ["zero", "renormalise"])
def test_a_client_that_lacks_a_layer_and_inflates_another_is_dropped(missing):
    layers = {"q": sent((2, 3), "ab"), "v": sent((2, 2, 8), "abc", seed=1)}
    options = {"missing": missing, "max_rank": 4, "on_bad_client": "drop"}
    results = aggregate_layers(layers, **options)
    for name, result in results.items():
        assert [who for who, _ in result.excluded] == ["c"]
        assert same(result, aggregate(layers[name][:2]))


def test_statistics_over_layers_leave_the_dropped_out():
    layers = {"q": sent((2, 3, 2), "abc"), "v": sent((2, 8, 2), "abc", seed=1)}
    honest = {name: [u for u in own if u.id != "b"] for name, own in layers.items()}
    found = aggregate_layers(layers, "hetlora", max_rank=4, on_bad_client="drop")
    expected = aggregate_layers(honest, "hetlora")
    for name in layers:
        assert np.allclose(found[name].A, expected[name].A, rtol=1e-13)


def test_the_reason_is_the_rank_where_there_is_also_nan():
    updates = sent((2, 8), "ab")
    nan = replace(updates[1], A=updates[1].A * np.nan)
    result = aggregate([updates[0], nan], max_rank=4, on_bad_client="drop")
    assert ["declares rank 8" in why for _, why in result.excluded] == [True]
    other = {"q": [updates[0], replace(nan, A=nan.A[:2], B=nan.B[:, :2])], "v": updates}
    results = aggregate_layers(other, max_rank=4, on_bad_client="drop")
    assert all("declares rank 8" in why for r in results.values() for _, why in r.excluded)


def test_when_all_are_dropped_nobody_is_left():
    with pytest.raises(InputValueError, match=r"no client is left.*dropped.*declared rank"):
        aggregate(sent((8, 9)), max_rank=4, on_bad_client="drop")


def test_dropped_clients_cost_nothing():
    # what a client sends above its rank is neither stacked nor decomposed
    honest, huge = sent((2, 2), "ab"), replace(sent((2,))[0], id="c")
    huge = replace(huge, A=np.ones((5000, IN)), B=np.ones((OUT, 5000)))
    limit = 400_000
    with pytest.raises(MemoryError):
        aggregate([*honest, huge], memory_limit=limit)
    result = aggregate([*honest, huge], memory_limit=limit, max_rank=4, on_bad_client="drop")
    assert same(result, aggregate(honest))


def test_the_registry_reaches_adapters():
    dicts = [
        {
            f"{layer}.lora_{X}.weight": torch.randn(
                shape, generator=torch.Generator().manual_seed(r)
            )
            for layer in ("q", "v")
            for X, shape in (("A", (r, 4)), ("B", (5, r)))
        }
        for r in (2, 2, 4)
    ]
    ids = ["a", "b", "c"]
    found = aggregate_state_dicts(
        dict(zip(ids, dicts, strict=True)),
        scalings=dict.fromkeys(ids, 1.0),
        max_rank={"a": 2, "b": 2, "c": 2},
        on_bad_client="drop",
    )
    assert [who for who, _ in found.excluded] == ["c"]
    assert {result.rank for result in found.results.values()} == {2}


# ---- what the benchmark says ---------------------------------------------------------------------

TRIED = range(12)
INFLATING = [label for label, attack in MEASURED.items() if attack.rank is not None]


@pytest.fixture(scope="module")
def cohorts():
    return {seed: cohort(seed) for seed in TRIED}


@pytest.fixture(scope="module")
def clean(cohorts):
    return {seed: error_under("rb", own, own.updates, {}) for seed, own in cohorts.items()}


def ratios(cohorts, clean, label, defence, attackers=1):
    options = options_of(defence, attackers)
    return [
        error_under("rb", own, attacked(own.updates, MEASURED[label], attackers, seed), options)
        / clean[seed]
        for seed, own in cohorts.items()
    ]


@pytest.mark.parametrize("label", INFLATING)
@pytest.mark.parametrize("defence", ["registry + quorum", "registry + quorum + cap"])
def test_one_attacker_of_thirty_costs_at_most_half_the_clean_error(cohorts, clean, label, defence):
    assert len(RANKS) == 30
    assert max(ratios(cohorts, clean, label, defence)) <= 1.5


@pytest.mark.parametrize("label", INFLATING)
def test_without_a_defence_one_attacker_costs_more(cohorts, clean, label):
    assert min(ratios(cohorts, clean, label, "none")) > 1.5


def test_what_each_defence_does_not_do(cohorts, clean):
    bold, allowed, liar = "rank above all others", "largest allowed rank", "own rank, weight lie"
    # one number for all lets a small client declare the largest rank
    assert max(ratios(cohorts, clean, bold, "one max_rank")) <= 1.5
    assert min(ratios(cohorts, clean, allowed, "one max_rank")) > 1.5
    # nor is a quorum against it: it joins owners that are there
    assert ratios(cohorts, clean, allowed, "quorum") == ratios(cohorts, clean, allowed, "none")
    # ranks say nothing about weights
    assert min(ratios(cohorts, clean, liar, "registry + quorum")) > 10
    assert max(ratios(cohorts, clean, liar, "registry + quorum + cap")) <= 2
    # the floor costs consensus though nobody attacks
    own = cohorts[0]
    assert error_under("rb", own, own.updates, options_of("floor", 1)) > 3 * clean[0]
    assert error_under("rb", own, own.updates, options_of("quorum", 1)) == clean[0]


def test_the_benchmark_names_options_that_there_are():
    for defence in DEFENCES:
        own = set(options_of(defence, 1)) - {"max_rank", "on_bad_client"}
        assert own <= set(METHODS["rb"].options)
    assert CLEAN not in MEASURED


def test_replicate_has_no_option_and_says_so():
    assert not {"floor", "quorum", "weight_cap"} & set(METHODS["replicate"].options)
    assert "max_rank" in METHODS["replicate"].paragraph("Deviations")
    with pytest.raises(HetLoRAError, match="quorum"):
        aggregate(sent((2, 2)), "replicate", quorum=2)
