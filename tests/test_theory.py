"""Rank collapse, and dilution with its rescue, against closed forms and margins set beforehand."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks import bench_theory, report_theory
from hetlora_agg import METHODS, HetLoRAError, InputTypeError, InputValueError
from hetlora_agg.plotting import plot_collapse, plot_rescue
from hetlora_agg.simulate import (
    Collapse,
    Rescue,
    Settings,
    StrongAndWeak,
    collapse_in_training,
    dilution_and_rescue,
    idle_recursion,
    simulate,
)
from tolerance import recompressed_gate

RANKS, WEIGHTS = (2, 4, 4, 8), (5, 10, 15, 20)
# 50/50 own slots 1-2, 45/50 slots 3-4, 20/50 slots 5-8
Q = np.array([1, 1, 0.9, 0.9, 0.4, 0.4, 0.4, 0.4])
SIGMA = np.arange(8.0, 0, -1)
ROUNDS = 40


def rho(power, rounds=ROUNDS, sigma=SIGMA, q=Q, smallest=2):
    """The closed form: every round multiplies singular value j by q_j ** power."""
    ratios = []
    for t in range(rounds + 1):
        squares = (sigma * q ** (power * t)) ** 2
        ratios.append(squares[:smallest].sum() / squares.sum())
    return np.array(ratios)


def gate(rounds, sigma=SIGMA):
    """4tg/‖σ_leading‖ after t rounds that each move the update by at most g.

    Numerator and denominator of ρ move by 2‖σ‖tg each, and ‖σ‖ stays above that of the leading
    components, whose coverage is 1.
    """
    one = recompressed_gate(torch.float64, 2 * 8 + 1, 2 * 8, float(np.sum(sigma)))
    return 4 * rounds * one / float(np.linalg.norm(sigma[:2]))


# ---- idle rounds ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "power"),
    [
        ("flexlora", {}, 1),
        ("zeropad", {}, 2),
        ("rb", {}, 0),
        ("raflora", {}, 0),
        ("replicate", {}, 0),
        ("fedhl", {}, 0),
        ("fedrot", {}, 2),
        ("dare", {"drop": 0.0}, 1),
    ],
)
def test_idle_rounds_follow_the_closed_form(method, options, power):
    found = idle_recursion(method, RANKS, WEIGHTS, ROUNDS, **options)
    assert found.method == method
    assert found.coverage == pytest.approx(Q, rel=1e-15)
    deviation = np.abs(np.array(found.energy_ratio) - rho(power))
    assert (deviation <= gate(np.maximum(1, np.arange(ROUNDS + 1)))).all()
    theirs = np.array(found.closed_form(power).energy_ratio)
    assert theirs == pytest.approx(rho(power), rel=1e-14)


def test_idle_flexlora_collapses_at_the_square_of_the_largest_coverage_beyond():
    odds = np.array(idle_recursion("flexlora", RANKS, WEIGHTS, ROUNDS).odds)
    rates = odds[1:] / odds[:-1]
    # ever slower: what shrinks faster, at 0.4², has gone first
    assert (np.diff(rates) > -gate(ROUNDS) / odds[1:-1]).all()
    assert rates[0] < 0.7
    # Σ σ² over slots 3-4 is 61 and over 5-8 is 30: the latter have 30/61 (0.16/0.81)^t left
    left = 30 / 61 * (0.16 / 0.81) ** (ROUNDS - 1)
    assert left < 1e-27
    assert abs(rates[-1] - 0.9**2) <= 2 * gate(ROUNDS) / odds[-2]


@pytest.mark.parametrize("smallest_weight", [1, 10, 30])
def test_the_rate_is_set_by_the_weight_of_the_smallest_clients(smallest_weight):
    # all slots beyond the first have one coverage: the rate is there from the first round on
    found = idle_recursion("flexlora", (1, 3, 3), (smallest_weight, 10, 10), 6)
    q = 20 / (20 + smallest_weight)
    assert found.odds[-1] / found.odds[-2] == pytest.approx(q**2, rel=1e-9)
    padded = idle_recursion("zeropad", (1, 3, 3), (smallest_weight, 10, 10), 6)
    assert padded.odds[-1] / padded.odds[-2] == pytest.approx(q**4, rel=1e-9)


def test_rho_stays_where_it_is_under_rank_sharing():
    for method in ("rb", "raflora"):
        ratio = np.array(idle_recursion(method, RANKS, WEIGHTS, ROUNDS).energy_ratio)
        assert np.abs(ratio - 113 / 204).max() <= gate(ROUNDS)


def test_other_singular_values_and_other_vectors_follow_the_same_law():
    sigma = 2.0 ** -np.arange(8)
    found = idle_recursion("flexlora", RANKS, WEIGHTS, 5, singular_values=sigma, seed=3)
    expected = rho(1, 5, sigma)
    assert np.abs(np.array(found.energy_ratio) - expected).max() <= gate(5, sigma)


def test_no_rounds_leave_the_start():
    assert idle_recursion("rb", (1, 2), (1, 1), 0).singular_values == ((2.0, 1.0),)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weights": (1, 2)}, "weights: expected 4, got 2"),
        ({"singular_values": (3.0, 2.0)}, "singular_values: expected 8, got 2"),
        ({"method": "fedex"}, "'fedex', which leaves a residual"),
        ({"method": "flora"}, "asks for rank 2 of a result of rank 18"),
        ({"method": "fedit"}, "equal rank"),
    ],
)
def test_what_has_no_idle_recursion_is_refused(wrong, message):
    call = {"method": "rb", "ranks": RANKS, "weights": WEIGHTS, "rounds": 2} | wrong
    with pytest.raises(HetLoRAError, match=message):
        idle_recursion(**call)


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    return collapse_in_training(seed=0, rounds=18)


def test_training_collapses_the_exact_mean_and_not_rank_sharing(trained):
    assert list(trained) == ["flexlora", "rb", "raflora"]
    assert trained["flexlora"].tail_left <= bench_theory.COLLAPSES
    assert trained["flexlora"].energy_ratio[-1] > 0.99
    for method in ("rb", "raflora"):
        assert trained[method].tail_left >= bench_theory.STAYS
        assert trained[method].energy_ratio[-1] < 0.9


def test_the_change_of_a_round_does_not_collapse(trained):
    for run in trained.values():
        assert run.change_tail_left > bench_theory.COLLAPSES
        assert max(run.change_energy_ratio[-6:]) < 0.99


def test_the_total_is_what_the_simulator_records(trained):
    settings = trained["rb"].settings
    alone = simulate("rb", ranks=settings.ranks, rounds=2, seed=0)
    assert trained["rb"].energy_ratio[:2] == alone.energy_ratio
    assert trained["rb"].accuracy[:3] == alone.accuracy
    # nothing came before the first round: all of the update is change, in float32 weights
    assert trained["rb"].change_energy_ratio[0] == pytest.approx(alone.energy_ratio[0], abs=1e-5)


def test_what_is_left_of_the_tail_compares_the_last_third_with_the_one_before():
    ratio = (0.0, 0.0, 0.2, 0.4, 0.8, 0.9)
    run = Collapse("m", Settings(), ratio, ratio[::-1], ())
    assert run.tail_left == pytest.approx((0.2 + 0.1) / (0.8 + 0.6))
    assert run.change_tail_left == pytest.approx(2 / (0.6 + 0.8))


def test_wrong_settings_of_the_training_are_named():
    with pytest.raises(InputTypeError, match=r"no settings \['round'\]"):
        collapse_in_training(round=3)
    with pytest.raises(InputValueError, match="rounds: expected at least 6"):
        collapse_in_training(rounds=5)
    with pytest.raises(InputValueError, match="lora_alpha: expected a number > 0"):
        collapse_in_training(lora_alpha=0.0)


# ---- dilution and rescue -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rescued():
    return [dilution_and_rescue(seed) for seed in bench_theory.SEEDS[:2]]


def test_zero_padding_loses_what_the_strong_client_knows(rescued):
    for found in rescued:
        assert found.strong > found.start + 0.3
        assert found.weak < found.start + 0.05
        for label in ("zeropad", "zeropad, uniform"):
            assert found.fall(label) >= bench_theory.CLEAR_FALL


def test_replication_and_rank_sharing_keep_it(rescued):
    for label in ("replicate", "rb", "raflora"):
        falls = [found.fall(label) for found in rescued]
        assert np.mean(falls) <= bench_theory.SMALL_FALL


def test_equal_seeds_give_equal_results_and_others_do_not(rescued):
    assert dilution_and_rescue(0) == rescued[0]
    assert rescued[1].after != rescued[0].after


def test_contenders_may_be_functions_and_have_options():
    found = dilution_and_rescue(
        contenders={"a": (METHODS["rb"].run, {"rank": "full"}), "b": ("rb", {"rank": "full"})},
        clients=StrongAndWeak(weak=3, strong_epochs=1),
    )
    assert found.after["a"] == found.after["b"]
    assert found.clients.ranks == (16, 2, 2, 2)


def test_alone_the_strong_client_is_not_diluted():
    # one weak client of no more than the examples it must have: p is nearly 1
    one = dilution_and_rescue(clients=StrongAndWeak(weak=1, strong_share=0.99))
    assert one.fall("zeropad") == pytest.approx(0, abs=0.03)


# ---- record, page, pictures ----------------------------------------------------------------------


def test_results_are_ready_for_json(trained, rescued):
    idle = idle_recursion("flexlora", RANKS, WEIGHTS, 2)
    for result in (idle, trained["rb"], rescued[0]):
        told = json.loads(json.dumps(result.to_dict()))
        assert set(told) >= {item.name for item in dataclasses.fields(result)}
    assert len(json.loads(json.dumps(idle.to_dict()))["energy_ratio"]) == 3


def test_the_bench_says_what_was_seen(trained, rescued):
    rows = {name: bench_theory.training_row([run]) for name, run in trained.items()}
    assert (rows["flexlora"]["collapses"], rows["flexlora"]["stays"]) == (1, 0)
    assert (rows["rb"]["collapses"], rows["rb"]["stays"]) == (0, 1)
    after = bench_theory.rescue_rows(rescued)["after"]
    assert [after[n]["falls"] for n in ("zeropad", "rb")] == [True, False]
    assert [after[n]["rescued"] for n in ("zeropad", "rb")] == [False, True]
    for name, run in bench_theory.idle_runs().items():
        row = bench_theory.idle_row(name, run)
        assert row["largest_deviation"] <= gate(bench_theory.IDLE_ROUNDS)
        assert row["last_rate"] == pytest.approx(row["limit"], rel=1e-9)


@pytest.mark.parametrize("table", report_theory.TABLES.values(), ids=report_theory.TABLES)
def test_the_page_has_every_table(table):
    text = (bench_theory.IMAGES.parent / "theory.md").read_text()
    assert f"<!-- table: {table.__name__} -->" in text
    assert len(table().splitlines()) > 3


def test_reported_seeds_are_not_those_that_settings_were_chosen_on():
    assert not set(bench_theory.SEEDS) & set(bench_theory.TUNING_SEEDS)
    assert len(bench_theory.SEEDS) >= 5


def test_tails_are_drawn_as_means_over_seeds(trained):
    run = trained["rb"]
    other = dataclasses.replace(run, energy_ratio=(0.5,) * len(run.energy_ratio))
    idle = {"rb": idle_recursion("rb", RANKS, WEIGHTS, 3)}
    figure = plot_collapse(idle, {"rb": [run, other]})
    left, middle, right = figure.axes
    assert left.lines[0].get_xdata().tolist() == [0, 1, 2, 3]
    assert left.lines[0].get_ydata() == pytest.approx([1 - 113 / 204] * 4)
    assert middle.lines[0].get_xdata()[0] == 1
    expected = 1 - (np.array(run.energy_ratio) + 0.5) / 2
    assert middle.lines[0].get_ydata() == pytest.approx(expected)
    assert right.lines[0].get_ydata() == pytest.approx(1 - np.array(run.change_energy_ratio))
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}


def test_rescues_are_drawn_seed_by_seed_with_their_mean():
    found = [Rescue(s, StrongAndWeak(), 0.5, 0.9, 0.5, {"rb": 0.8 + 0.1 * s}) for s in (0, 1)]
    (axes,) = plot_rescue(found).axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["start", "weak clients, mean", "strong client alone", "rb"]
    dots, mean = axes.lines[6], axes.lines[7]
    assert dots.get_xdata() == pytest.approx([0.8, 0.9])
    assert mean.get_xdata() == pytest.approx([0.85])
    assert "20 of rank 2" in axes.get_title(loc="left")


def test_nothing_to_draw_is_an_error(trained):
    with pytest.raises(InputValueError, match="plot_rescue: expected at least one result"):
        plot_rescue([])
    with pytest.raises(InputValueError, match="plot_collapse: expected idle and training runs"):
        plot_collapse({}, {"rb": [trained["rb"]]})
