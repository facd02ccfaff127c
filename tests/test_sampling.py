"""Who takes part: probabilities and draws against sums over all cohorts, in exact fractions."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

from hetlora_agg import (
    InputTypeError,
    InputValueError,
    draw_midzuno,
    draw_uniform,
    inverse_inclusion,
    midzuno_inclusion,
    uniform_inclusion,
)
from hetlora_agg.sampling import midzuno_cohort, uniform_cohort
from hetlora_agg.simulate import Settings, build_federation, simulate
from hetlora_agg.simulate.federation import Stream, stream

WEIGHTS = [
    [1, 2, 5],
    [4, 4, 4, 4],
    [1, 1, 2, 12],
    [3, 0, 1, 4],
    [1, 2, 3, 4, 6],
    [16, 1, 9, 2, 3, 1],
]
DESIGNS = [(n, m) for n in WEIGHTS for m in range(1, len(n) + 1)]


def cohorts(weights, size):
    """Every cohort with its probability under Midzuno–Sen, from the order of the draws."""
    clients, whole = len(weights), sum(weights)
    rest = 1 / Fraction(math.comb(clients - 1, size - 1))
    return {
        cohort: sum(Fraction(weights[first], whole) * rest for first in cohort)
        for cohort in itertools.combinations(range(clients), size)
    }


def inclusion(probability, clients):
    return [sum(p for cohort, p in probability.items() if k in cohort) for k in range(clients)]


# --- probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "size"), DESIGNS)
def test_inclusion_is_the_sum_over_cohorts(weights, size):
    probability = cohorts(weights, size)
    assert sum(probability.values()) == 1
    wanted = [float(p) for p in inclusion(probability, len(weights))]
    assert midzuno_inclusion(weights, size) == pytest.approx(wanted, rel=4e-16, abs=0)
    assert math.fsum(midzuno_inclusion(weights, size)) == pytest.approx(size, rel=1e-15)
    equal = {cohort: Fraction(1, len(probability)) for cohort in probability}
    assert uniform_inclusion(len(weights), size) == pytest.approx(
        [float(p) for p in inclusion(equal, len(weights))], rel=1e-16, abs=0
    )


@pytest.mark.parametrize(("weights", "size"), DESIGNS)
def test_a_cohort_is_as_probable_as_its_weight(weights, size):
    whole = math.comb(len(weights) - 1, size - 1) * sum(weights)
    for cohort, p in cohorts(weights, size).items():
        assert p == Fraction(sum(weights[k] for k in cohort), whole)


@pytest.mark.parametrize("scale", [1e-308, 5e-324, 1.4e307])
def test_only_ratios_of_weights_count(scale):
    plain = midzuno_inclusion([1, 3, 12], 2)
    assert midzuno_inclusion([scale * n for n in (1, 3, 12)], 2) == pytest.approx(plain, rel=1e-15)


def test_everybody_is_certain_of_the_full_cohort():
    assert midzuno_inclusion([1, 2, 5, 9, 17, 0.1, 0.7], 7) == [1.0] * 7
    assert midzuno_inclusion([5], 1) == uniform_inclusion(1, 1) == [1.0]


# --- draws --------------------------------------------------------------------------------------


def places(*counts):
    """One number in the middle of each of n equal parts of [0, 1), for every n: all tuples."""
    return itertools.product(*([(i + 0.5) / n for i in range(n)] for n in counts))


@pytest.mark.parametrize(
    ("clients", "size"), [(k, m) for k in range(1, 6) for m in range(1, k + 1)]
)
def test_every_cohort_is_drawn_equally_often(clients, size):
    found = Counter(
        uniform_cohort(clients, numbers) for numbers in places(*range(clients, clients - size, -1))
    )
    assert set(found) == set(itertools.combinations(range(clients), size))
    assert len(set(found.values())) == 1


@pytest.mark.parametrize(("weights", "size"), [d for d in DESIGNS if len(d[0]) <= 5])
def test_midzuno_draws_have_their_probabilities(weights, size):
    whole, clients = sum(weights), len(weights)
    shares = [n / whole for n in weights]
    found = Counter()
    # One number per unit of weight: a client's part of [0, 1) has as many as it weighs.
    for numbers in places(whole, *range(clients - 1, clients - size, -1)):
        found[midzuno_cohort(shares, numbers)] += 1
    draws = sum(found.values())
    wanted = {cohort: p for cohort, p in cohorts(weights, size).items() if p}
    assert {cohort: Fraction(n, draws) for cohort, n in found.items()} == wanted


def test_the_parts_of_the_first_draw_begin_where_the_sums_say():
    shares = [0.25, 0.0, 0.5, 0.25]
    for number, first in (
        (0.0, 0),
        (0.2499, 0),
        (0.25, 2),
        (0.7499, 2),
        (0.75, 3),
        (1 - 2**-53, 3),
    ):
        assert midzuno_cohort(shares, [number]) == (first,)
    # Tenths add up to 0.9999999999999999: what lies beyond is the last one's who has any share.
    assert midzuno_cohort([0.1] * 10 + [0.0], [1 - 2**-53]) == (9,)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("clients", [1, 2, 3, 7, 49, 64])
def test_ends_of_the_interval_stay_inside(clients, number):
    cohort = uniform_cohort(clients, [number] * clients)
    assert cohort == tuple(range(clients))


def test_a_draw_takes_its_numbers_from_the_generator_alone():
    state = torch.random.get_rng_state()
    for size in (1, 3, 5):
        numbers = torch.rand(
            size, generator=torch.Generator().manual_seed(7), dtype=torch.float64
        ).tolist()
        generator = torch.Generator().manual_seed(7)
        assert draw_uniform(6, size, generator) == uniform_cohort(6, numbers)
        generator = torch.Generator().manual_seed(7)
        weights = [1.0, 2.0, 3.0, 4.0, 3.0, 3.0]
        shares = [n / 16 for n in weights]
        assert draw_midzuno(weights, size, generator) == midzuno_cohort(shares, numbers)
        cohort = draw_midzuno(weights, size, generator)
        assert len(set(cohort)) == size
        assert cohort == tuple(sorted(cohort))
    assert torch.equal(torch.random.get_rng_state(), state)


# --- weights ------------------------------------------------------------------------------------


def test_weights_over_probabilities():
    assert inverse_inclusion([3, 8], [0.5, 1.0]) == [6.0, 8.0]
    assert inverse_inclusion([0.0], [0.25]) == [0.0]
    chances = midzuno_inclusion([1, 2, 5], 2)
    assert inverse_inclusion([1, 5], [chances[0], chances[2]]) == [1 / chances[0], 5 / chances[2]]


G = torch.Generator()


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (lambda: uniform_inclusion(0, 1), InputValueError, "clients"),
        (lambda: uniform_inclusion(3.0, 1), InputTypeError, "clients"),
        (lambda: uniform_inclusion(3, 0), InputValueError, "size"),
        (lambda: uniform_inclusion(3, 4), InputValueError, "size: expected at most.*3, got 4"),
        (lambda: midzuno_inclusion([], 1), InputValueError, "at least one"),
        (lambda: midzuno_inclusion([0.0, 0.0], 1), InputValueError, "above 0"),
        (lambda: midzuno_inclusion([1.0, -1.0], 1), InputValueError, "client 1"),
        (lambda: midzuno_inclusion([1.0, math.nan], 1), InputValueError, "client 1"),
        (lambda: midzuno_inclusion([1.0, math.inf], 1), InputValueError, "client 1"),
        (lambda: midzuno_inclusion("12", 1), InputTypeError, "list"),
        (lambda: midzuno_inclusion([1.0, "2"], 1), InputTypeError, "client 1"),
        (lambda: midzuno_inclusion([1.0, 2.0], 3), InputValueError, "size"),
        (lambda: midzuno_inclusion([1.0, 2.0], True), InputTypeError, "size"),
        (lambda: draw_uniform(3, 4, G), InputValueError, "size"),
        (lambda: draw_uniform(3, 2, 0), InputTypeError, "generator"),
        (lambda: draw_midzuno([1.0, 2.0], 0, G), InputValueError, "size"),
        (lambda: draw_midzuno([1.0, 2.0], 1, None), InputTypeError, "generator"),
        (lambda: draw_midzuno([0, 0], 1, G), InputValueError, "above 0"),
        (lambda: inverse_inclusion([1.0, 2.0], [0.5]), InputValueError, "1 for 2"),
        (lambda: inverse_inclusion([1.0, 2.0], [0.5, 0.0]), InputValueError, "client 1.*never"),
        (lambda: inverse_inclusion([1.0, 2.0], [0.5, 1.1]), InputValueError, "client 1"),
        (lambda: inverse_inclusion([1.0, 2.0], [0.5, math.nan]), InputValueError, "client 1"),
        (lambda: inverse_inclusion([1.0, -2.0], [0.5, 0.5]), InputValueError, "client 1"),
        (lambda: inverse_inclusion([1e308], [1e-3]), InputValueError, "beyond float64"),
        (lambda: inverse_inclusion(5, [0.5]), InputTypeError, "list"),
    ],
)
def test_what_is_refused(call, kind, match):
    with pytest.raises(kind, match=match):
        call()


# --- the simulator ------------------------------------------------------------------------------

UNIFORM_COHORTS = ((3, 4, 5), (2, 3, 5), (2, 4, 5))
"""Drawn from seed 0 before there was a choice: recorded results depend on them."""

SIX = {"ranks": (2,) * 6, "participation": 0.5, "rounds": 6}


@pytest.fixture
def _untrained(monkeypatch):
    """Who takes part does not depend on the network; its training is most of the time."""
    monkeypatch.setattr("hetlora_agg.simulate.federation.pretrain", lambda *_: None)


@pytest.mark.usefixtures("_untrained")
def test_the_simulator_draws_by_the_clients_examples():
    federation = build_federation(Settings(**SIX, sampling="midzuno"))
    sizes = [len(mine) for mine in federation.clients]
    assert len(set(sizes)) > 1
    generator = stream(0, Stream.COHORT)
    numbers = [
        torch.rand(3, generator=generator, dtype=torch.float64).tolist() for _ in federation.cohorts
    ]
    shares = [n / sum(sizes) for n in sizes]
    assert federation.cohorts == tuple(midzuno_cohort(shares, u) for u in numbers)
    again = build_federation(Settings(**SIX, sampling="midzuno"))
    assert again.cohorts == federation.cohorts
    other = build_federation(Settings(**SIX, sampling="midzuno", seed=1))
    assert other.cohorts != federation.cohorts


@pytest.mark.usefixtures("_untrained")
def test_uniform_cohorts_are_what_they_were():
    plain, named = (build_federation(Settings(**SIX, **s)) for s in ({}, {"sampling": "uniform"}))
    assert plain.cohorts == named.cohorts
    assert plain.cohorts[:3] == UNIFORM_COHORTS
    assert plain.cohorts != build_federation(Settings(**SIX, sampling="midzuno")).cohorts


def test_a_simulation_says_how_it_sampled():
    options = {"ranks": (2, 4, 4), "participation": 0.67, "rounds": 2, "local_epochs": 1}
    first, again = (simulate("rb", sampling="midzuno", **options) for _ in range(2))
    assert first == again
    assert first.settings.sampling == "midzuno"
    assert first.to_dict()["settings"]["sampling"] == "midzuno"
    assert {len(cohort) for cohort in first.participants} == {2}


@pytest.mark.parametrize(
    "wrong", [{"sampling": "poisson"}, {"sampling": "midzuno", "cohorts": [(0, 1)], "rounds": 1}]
)
def test_the_setting_is_checked(wrong):
    with pytest.raises(InputValueError, match="simulate: sampling: expected"):
        Settings(ranks=(2, 2), **wrong)
