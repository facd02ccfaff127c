"""Expectations over cohorts and over noise as finite sums: nothing is sampled.

Every property comes with a twin that breaks it, and the same check finds the twin out.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hetlora_agg import (
    ClientUpdate,
    aggregate,
    inverse_inclusion,
    midzuno_inclusion,
    uniform_inclusion,
)
from reference import dense
from test_reduction import cells

OUT, IN = 5, 4
FULL = {"rank": "full"}


class Population:
    """K clients of different ranks and weights; everything about cohorts of m of them.

    Args:
        ranks: of the clients, the first of the largest.
        weights: integers.
        size: m.
    """

    def __init__(self, ranks, weights, size):
        rng = np.random.default_rng(len(ranks))
        self.weights, self.size, self.ranks = weights, size, ranks
        self.factors = [
            (rng.standard_normal((r, IN)), rng.standard_normal((OUT, r))) for r in ranks
        ]
        self.cohorts = list(itertools.combinations(range(len(ranks)), size))

    @property
    def clients(self):
        return range(len(self.ranks))

    @property
    def scale(self):
        return max(np.linalg.norm(A) * np.linalg.norm(B) for A, B in self.factors) * max(self.ranks)

    def totals(self):
        """N_j of the whole population."""
        pairs = list(zip(self.ranks, self.weights, strict=True))
        return [float(sum(n for r, n in pairs if r > j)) for j in range(max(self.ranks))]

    def run(self, method, cohort, weights, **options):
        """The dense result of a cohort with these weights."""
        updates = [
            ClientUpdate(torch.tensor(A), torch.tensor(B), weight=n)
            for (A, B), n in zip((self.factors[k] for k in cohort), weights, strict=True)
        ]
        return dense(aggregate(updates, method, **options).factors)

    def whole(self, method, **options):
        return self.run(method, self.clients, self.weights, **options)

    def uniform(self):
        return [Fraction(1, len(self.cohorts))] * len(self.cohorts)

    def midzuno(self):
        """As probable as the cohort's weight; that the draw is, tests/test_sampling.py shows."""
        sums = [Fraction(sum(self.weights[k] for k in cohort)) for cohort in self.cohorts]
        return [s / sum(sums) for s in sums]

    def inclusion(self, design):
        if design == "uniform":
            return uniform_inclusion(len(self.ranks), self.size)
        return midzuno_inclusion(self.weights, self.size)


def expectation(probability, values):
    """Σ p x with one rounding per entry."""
    flat = np.stack([np.asarray(v).ravel() for v in values])
    weights = [float(p) for p in probability]
    sums = [math.fsum(p * x for p, x in zip(weights, column, strict=True)) for column in flat.T]
    return np.array(sums).reshape(np.shape(values[0]))


POPULATIONS = [
    ((3, 1, 2, 2), (5, 1, 2, 4), 2),
    ((2, 1, 2, 1, 2, 2), (1, 9, 4, 3, 3, 12), 1),
    ((2, 1, 2, 1, 2, 2), (1, 9, 4, 3, 3, 12), 4),
    ((4, 1, 2, 3, 2, 2, 1, 1, 3), (7, 1, 30, 2, 5, 9, 14, 3, 1), 4),
]
METHODS_AND_TOTALS = ["flora", "flexlora", "rb"]


def fixed(population, method):
    """The options that give a method the population's denominators."""
    if method == "rb":
        return {"totals": population.totals(), **FULL}
    return {"total": float(sum(population.weights)), **(FULL if method == "flexlora" else {})}


def horvitz_thompson(population, method, design, weigh=inverse_inclusion):
    """The expectation over cohorts, weights n/π over the population's denominators."""
    chances = population.inclusion(design)
    results = []
    for cohort in population.cohorts:
        n, pi = ([values[k] for k in cohort] for values in (population.weights, chances))
        results.append(population.run(method, cohort, weigh(n, pi), **fixed(population, method)))
    return expectation(getattr(population, design)(), results)


def assert_full_cohort(found, population, method, relative=1e-13):
    options = FULL if method in ("rb", "flexlora") else {}
    error = np.linalg.norm(found - population.whole(method, **options))
    assert error <= relative * population.scale, f"off by {error / population.scale:.1e}"


@pytest.mark.parametrize("design", ["uniform", "midzuno"])
@pytest.mark.parametrize("method", METHODS_AND_TOTALS)
@pytest.mark.parametrize("case", POPULATIONS, ids=str)
def test_horvitz_thompson_is_the_full_cohort(case, method, design):
    population = Population(*case)
    assert_full_cohort(horvitz_thompson(population, method, design), population, method)


@pytest.mark.parametrize("method", METHODS_AND_TOTALS)
def test_weights_without_their_probabilities_are_found_out(method):
    population = Population(*POPULATIONS[0])
    for weigh in (
        lambda n, pi: n,
        lambda n, pi: [1.02 * x / p for x, p in zip(n, pi, strict=True)],
        lambda n, pi: [x / pi[0] for x in n],
    ):
        found = horvitz_thompson(population, method, "midzuno", weigh)
        with pytest.raises(AssertionError, match="off by"):
            assert_full_cohort(found, population, method)


def test_the_wrong_design_is_found_out():
    population = Population(*POPULATIONS[0])
    population.inclusion = lambda design: uniform_inclusion(4, population.size)
    with pytest.raises(AssertionError, match="off by"):
        assert_full_cohort(horvitz_thompson(population, "flora", "midzuno"), population, "flora")


def test_truncation_is_found_out():
    population = Population(*POPULATIONS[3])
    chances = population.inclusion("uniform")
    options = {"total": float(sum(population.weights)), "rank": 2}
    results = [
        population.run(
            "flexlora",
            cohort,
            inverse_inclusion(
                [population.weights[k] for k in cohort], [chances[k] for k in cohort]
            ),
            **options,
        )
        for cohort in population.cohorts
    ]
    found = expectation(population.uniform(), results)
    with pytest.raises(AssertionError, match="off by"):
        assert_full_cohort(found, population, "flexlora")


@pytest.mark.parametrize("design", ["uniform", "midzuno"])
def test_unbiased_reduction_keeps_what_the_cohorts_give(design):
    population = Population(*POPULATIONS[0])
    chances = population.inclusion(design)
    options = fixed(population, "flexlora")
    draws, probability = [], []
    for cohort, p in zip(population.cohorts, getattr(population, design)(), strict=True):
        n, pi = ([values[k] for k in cohort] for values in (population.weights, chances))
        weights = inverse_inclusion(n, pi)
        whole = population.run("flexlora", cohort, weights, **options)
        rank = sum(population.ranks[k] for k in cohort)
        sigma = np.linalg.svd(whole, compute_uv=False)[: min(rank, OUT, IN)].tolist()
        for length, u in zip(*cells(sigma, 2), strict=True):
            drawn = {**options, "rank": 2, "reduction": "unbiased", "u": float(u)}
            draws.append(population.run("flexlora", cohort, weights, **drawn))
            probability.append(p * length)
    assert_full_cohort(expectation(probability, draws), population, "flexlora", 1e-12)


# --- the ratio estimator: weights normalised by the cohort's own sum ----------------------------


def ratio(population, probability, weights=None):
    """What the plain mean of a cohort does: E R̂ − μ, −Cov(R̂, D)/E D, CV(D)·sd(R̂)."""
    weights = population.weights if weights is None else weights
    results = [
        population.run("flora", cohort, [weights[k] for k in cohort])
        for cohort in population.cohorts
    ]
    D = [float(sum(weights[k] for k in cohort)) for cohort in population.cohorts]
    mean, mean_D = expectation(probability, results), float(expectation(probability, D))
    products = [(d - mean_D) * (R - mean) for d, R in zip(D, results, strict=True)]
    bias = mean - population.run("flora", population.clients, weights)
    spread = math.sqrt(expectation(probability, [np.sum((R - mean) ** 2) for R in results]))
    cv = math.sqrt(expectation(probability, [(d - mean_D) ** 2 for d in D])) / mean_D
    return bias, -expectation(probability, products) / mean_D, cv * spread


@pytest.mark.parametrize("case", POPULATIONS, ids=str)
def test_the_bias_of_the_plain_mean_is_a_covariance(case):
    population = Population(*case)
    bias, formula, bound = ratio(population, population.uniform())
    assert np.linalg.norm(bias - formula) <= 1e-12 * population.scale
    size = np.linalg.norm(bias)
    assert 1e-3 * population.scale < size <= bound


@pytest.mark.parametrize("case", POPULATIONS, ids=str)
def test_equal_weights_leave_no_bias(case):
    population = Population(*case)
    bias, _, bound = ratio(population, population.uniform(), [3] * len(population.ranks))
    assert np.linalg.norm(bias) <= 1e-13 * population.scale
    assert bound == 0


@pytest.mark.parametrize("case", POPULATIONS, ids=str)
def test_midzuno_cohorts_leave_no_bias(case):
    population = Population(*case)
    bias, _, _ = ratio(population, population.midzuno())
    assert np.linalg.norm(bias) <= 1e-13 * population.scale


def test_the_bias_falls_with_the_cohort():
    ranks, weights, _ = POPULATIONS[3]
    populations = [Population(ranks, weights, m) for m in range(1, 10)]
    bias = [np.linalg.norm(ratio(p, p.uniform())[0]) for p in populations]
    assert all(a > b for a, b in itertools.pairwise(bias))
    assert bias[-1] <= 1e-13 * populations[-1].scale


# --- rb slot by slot ----------------------------------------------------------------------------


def slot_columns(population, cohort):
    """rb's mean of every slot, as the columns of the result: A is the identity's rows."""
    updates = [
        ClientUpdate(
            torch.eye(IN, dtype=torch.float64)[: population.ranks[k]],
            torch.tensor(population.factors[k][1]),
            weight=population.weights[k],
        )
        for k in cohort
    ]
    return dense(aggregate(updates, "rb", **FULL).factors)


SLOTTED = ((4, 1, 2, 3, 2, 4, 1), (7, 1, 30, 2, 5, 9, 14))


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("weights", [SLOTTED[1], (3,) * 7], ids=["unequal", "equal"])
def test_slots_of_rb_are_ratios_of_their_own(weights, size):
    population = Population(SLOTTED[0], weights, size)
    whole = slot_columns(population, population.clients)
    results = [slot_columns(population, cohort) for cohort in population.cohorts]
    for j in range(4):
        D = [
            float(sum(weights[k] for k in cohort if population.ranks[k] > j))
            for cohort in population.cohorts
        ]
        # Given that somebody owns the slot; an empty one has no mean.
        owned = [i for i, d in enumerate(D) if d > 0]
        even = [Fraction(1, len(owned))] * len(owned)
        columns, D = [results[i][:, j] for i in owned], [D[i] for i in owned]
        mean, mean_D = expectation(even, columns), float(expectation(even, D))
        bias = mean - whole[:, j]
        formula = -expectation(
            even, [(d - mean_D) * (x - mean) for d, x in zip(D, columns, strict=True)]
        )
        assert np.linalg.norm(bias - formula / mean_D) <= 1e-12 * population.scale
        if len(set(weights)) == 1:
            assert np.linalg.norm(bias) <= 1e-13 * population.scale
        elif size < 5:
            assert np.linalg.norm(bias) > 1e-4 * population.scale


@pytest.mark.parametrize("size", [2, 3])
def test_midzuno_helps_the_slot_that_all_own_and_no_other(size):
    population = Population(*SLOTTED, size)
    whole = slot_columns(population, population.clients)
    results = [slot_columns(population, cohort) for cohort in population.cohorts]
    bias = expectation(population.midzuno(), results) - whole
    assert np.linalg.norm(bias[:, 0]) <= 1e-13 * population.scale
    assert all(np.linalg.norm(bias[:, j]) > 1e-3 * population.scale for j in (1, 2, 3))


# --- noise: all sign patterns -------------------------------------------------------------------


def signed(ranks, out, columns, seed=0):
    """Clients ``b_j + s_k e_k^j`` over common a_j, one layer for every pattern of signs s.

    Returns:
        The updates with leading dimension 2^K, and the mean components M_j ``(slots, out, in)``.
    """
    rng = np.random.default_rng(seed)
    slots = max(ranks)
    b, a = rng.standard_normal((out, slots)), rng.standard_normal((slots, columns))
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(ranks))))
    updates = []
    for k, r in enumerate(ranks):
        noise = rng.standard_normal((out, r))
        B = b[:, :r] + signs[:, k, None, None] * noise
        A = np.broadcast_to(a[:r], (len(signs), r, columns)).copy()
        updates.append(ClientUpdate(torch.tensor(A), torch.tensor(B), weight=float(k % 3 + 1)))
    return updates, np.einsum("oj,ji->joi", b, a)


def coverage(updates):
    """q_j of every slot."""
    ranks, weights = [u.A.shape[-2] for u in updates], [u.weight for u in updates]
    pairs = list(zip(ranks, weights, strict=True))
    return [sum(n for r, n in pairs if r > j) / sum(weights) for j in range(max(ranks))]


def mean_over_signs(updates, method, **options):
    results = dense(aggregate(updates, method, **options).factors)
    return expectation([Fraction(1, len(results))] * len(results), list(results))


def assert_statistical(updates, M, method, **options):
    """The mean over all signs is the sum of the mean components."""
    found, wanted = mean_over_signs(updates, method, **options), M.sum(0)
    scale = max(float((u.A.norm(dim=(-2, -1)) * u.B.norm(dim=(-2, -1))).max()) for u in updates)
    error = np.linalg.norm(found - wanted)
    assert error <= 1e-13 * scale * len(updates), f"{method}: off by {error / scale:.1e}"


NOISY = [(2, 1), (1, 2, 3), (4, 1, 2, 2, 3, 1), (3, 1, 2, 2, 3, 1, 1, 2, 3, 1)]


@pytest.mark.parametrize("ranks", NOISY, ids=str)
def test_rb_is_unbiased_over_all_signs(ranks):
    updates, M = signed(ranks, 6, 5)
    assert_statistical(updates, M, "rb", **FULL)
    # The twins: padding by zeros, the mean of the updates, a cut.
    for twin, options in (("zeropad", {}), ("flexlora", FULL), ("rb", {"rank": max(ranks) - 1})):
        if max(ranks) > 1:
            with pytest.raises(AssertionError, match="off by"):
                assert_statistical(updates, M, twin, **options)


@pytest.mark.parametrize("ranks", NOISY, ids=str)
def test_what_the_twins_estimate(ranks):
    updates, M = signed(ranks, 6, 5)
    q = np.array(coverage(updates))
    for method, options, gain in (("flexlora", FULL, q), ("zeropad", {}, q**2)):
        found = mean_over_signs(updates, method, **options)
        np.testing.assert_allclose(found, np.einsum("j,joi->oi", gain, M), atol=1e-11)


PATTERNS = [p for k in (1, 2, 3, 4) for p in itertools.product((1, 2, 4, 8), repeat=k)]


def test_rb_is_unbiased_over_all_signs_for_every_pattern_of_ranks():
    assert len(PATTERNS) == 4 + 16 + 64 + 256
    for ranks in PATTERNS:
        updates, M = signed(ranks, 9, 8, seed=len(ranks))
        assert_statistical(updates, M, "rb", **FULL)


def test_zero_padding_is_found_out_for_every_pattern_of_mixed_ranks():
    for ranks in (p for p in PATTERNS if len(set(p)) > 1 and len(p) <= 3):
        updates, M = signed(ranks, 9, 8)
        with pytest.raises(AssertionError, match="zeropad: off by"):
            assert_statistical(updates, M, "zeropad")


@pytest.mark.parametrize("ranks", NOISY, ids=str)
def test_noise_common_to_both_factors_is_squared_by_factor_averages(ranks):
    # b_j + s e_k and a_j + s f_k: the component's mean is b a + e f, and rbla has Σ γ² e f.
    updates, M = signed(ranks, 6, 5)
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(ranks))))
    rng = np.random.default_rng(9)
    slots, weights = max(ranks), [u.weight for u in updates]
    owned = [sum(n for r, n in zip(ranks, weights, strict=True) if r > j) for j in range(slots)]
    both, mean, square = [], M.sum(0), M.sum(0)
    for k, u in enumerate(updates):
        f = rng.standard_normal((ranks[k], 5))
        A = u.A + torch.tensor(signs[:, k, None, None] * f)
        both.append(ClientUpdate(A, u.B, weight=u.weight))
        # The noise e of B: half the difference of the two signs.
        e = (u.B[signs[:, k] > 0][0] - u.B[signs[:, k] < 0][0]).numpy() / 2
        for j in range(ranks[k]):
            share = weights[k] / owned[j]
            mean = mean + share * np.outer(e[:, j], f[j])
            square = square + share**2 * np.outer(e[:, j], f[j])
    np.testing.assert_allclose(mean_over_signs(both, "rb", **FULL), mean, atol=1e-11)
    np.testing.assert_allclose(mean_over_signs(both, "rbla"), square, atol=1e-11)
