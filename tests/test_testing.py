"""The public checker finds planted bugs, and its strategy draws what it promises."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given

from hetlora_agg import (
    CLAIMS,
    ClientUpdate,
    InputTypeError,
    InputValueError,
    LowRank,
    aggregate,
)
from hetlora_agg.testing import (
    Inapplicable,
    Refuted,
    check_aggregator,
    client_updates,
    examine,
    parametrize_with_checks,
)


def exact_mean(updates):
    """The right answer, densely: what the planted bugs are variations of."""
    whole = sum(u.weight for u in updates)
    return sum(u.weight / whole * u.scaling * (u.B @ u.A) for u in updates)


def forgets_scaling(updates):
    return exact_mean([replace(u, scaling=1.0) for u in updates])


def forgets_weights(updates):
    return exact_mean([replace(u, weight=1.0) for u in updates])


def does_not_normalise(updates):
    return sum(u.weight * u.scaling * (u.B @ u.A) for u in updates)


def first_client_only(updates):
    return exact_mean(updates[:1])


def off_by_two_percent(updates):
    return 1.02 * exact_mean(updates)


def drops_sqrt_of_sigma(updates):
    U, S, Vh = torch.linalg.svd(exact_mean(updates), full_matrices=False)
    return LowRank(Vh, U * S.sqrt())


def takes_v_for_its_transpose(updates):
    square = exact_mean(updates)[:8, :8]
    U, S, Vh = torch.linalg.svd(square)
    return torch.cat([U @ torch.diag(S) @ Vh.mT, exact_mean(updates)[8:]])


def truncates(updates):
    U, S, Vh = torch.linalg.svd(exact_mean(updates), full_matrices=False)
    return (U[:, :2] * S[:2]) @ Vh[:2]


def divides_by_the_number_of_clients(updates):
    return exact_mean(updates) * 4 / len(updates)


def absolute_values(updates):
    return exact_mean([replace(u, B=u.B.abs()) for u in updates])


def hides_nan(updates):
    return exact_mean(updates) * math.nan


def averages_factors(updates):
    rank = max(u.rank for u in updates)
    whole = sum(u.weight for u in updates)
    A = torch.zeros(rank, updates[0].A.shape[1], dtype=torch.float64)
    B = torch.zeros(updates[0].B.shape[0], rank, dtype=torch.float64)
    for u in updates:
        root = math.sqrt(u.scaling)
        A[: u.rank] += u.weight / whole * root * u.A
        B[:, : u.rank] += u.weight / whole * root * u.B
    return A, B


def mixes_layers(updates):
    return exact_mean(updates) + (exact_mean(updates).mean(0) if updates[0].A.dim() > 2 else 0)


def counts_who_is_absent(updates):
    return exact_mean(updates) * sum(u.weight > 0 for u in updates) / len(updates)


def divides_by_the_cohort(updates, total=None):
    return exact_mean(updates)


def forgets_to_weight_the_cohort(updates):
    return exact_mean([replace(u, weight=u.weight**2) for u in updates])


def minds_signs(updates):
    return exact_mean([replace(u, A=u.A.clamp_min(0)) for u in updates])


def first_component_twice(updates):
    return exact_mean(updates) + sum(u.B[..., :1] @ u.A[..., :1, :] for u in updates)


def largest_wins(updates):
    return max((u.scaling * (u.B @ u.A) for u in updates), key=lambda W: float(W.norm()))


PLANTED = [
    (mixes_layers, "layers"),
    (takes_v_for_its_transpose, "layers"),
    (counts_who_is_absent, "absent"),
    (divides_by_the_number_of_clients, "absent"),
    (divides_by_the_cohort, "cohort"),
    (forgets_to_weight_the_cohort, "cohort_ratio"),
    (exact_mean, "slot_ratio"),
    (averages_factors, "slot_ratio"),
    (averages_factors, "cohort_equal"),
    (minds_signs, "component_scale"),
    (averages_factors, "component_scale"),
    (first_component_twice, "component_order"),
    (largest_wins, "bounded_share"),
    (does_not_normalise, "bounded_share"),
    (forgets_scaling, "exact"),
    (forgets_weights, "split_client"),
    (does_not_normalise, "rescaling"),
    (first_client_only, "order"),
    (off_by_two_percent, "exact"),
    (drops_sqrt_of_sigma, "homogeneous"),
    (takes_v_for_its_transpose, "exact"),
    (truncates, "exact"),
    (divides_by_the_number_of_clients, "single_client"),
    (absolute_values, "orthogonal"),
    (hides_nan, "exact"),
    (averages_factors, "gauge"),
    (averages_factors, "consensus"),
    (averages_factors, "statistical_uncorrelated"),
    (exact_mean, "consensus"),
    (exact_mean, "statistical"),
    (exact_mean, "idle_kept"),
]


@pytest.mark.parametrize(("aggregator", "claim"), PLANTED)
def test_planted_bug_is_found(aggregator, claim):
    with pytest.raises(Refuted, match=f"claim '{claim}' is refuted"):
        check_aggregator(aggregator, [claim])


HELD = (
    "cohort_equal cohort_ratio bounded_share absent layers component_scale component_order "
    "mixed_ranks exact order split_client rescaling homogeneous orthogonal transpose "
    "single_client gauge zero_component idle_coverage"
)


@pytest.mark.parametrize("claim", HELD.split())
def test_right_answer_is_not_refuted(claim):
    check_aggregator(exact_mean, [claim])


@parametrize_with_checks(
    {
        "rb": (partial(aggregate, method="rb"), ["consensus", "order"]),
        "mine": (averages_factors, ["idle_coverage_squared", "transpose"]),
    }
)
def test_parametrize_with_checks(check):
    check()


def test_parametrize_names_its_cases():
    mark = parametrize_with_checks({"mine": (exact_mean, ["exact", "order"])})
    assert [case.id for case in mark.args[1]] == ["mine-exact", "mine-order"]


def test_examination_finds_what_the_single_trials_find():
    found = examine(exact_mean)
    assert set(found.verdicts) == set(CLAIMS)
    assert set(found.holds) == set(HELD.split())
    assert {"consensus", "statistical", "cohort", "slot_ratio", "idle_kept"} < set(found.refuted)
    assert found.untried == ()
    assert set(found.holds) | set(found.refuted) == set(CLAIMS)
    assert found.verdicts["exact"] == "holds"
    assert found.verdicts["consensus"].startswith("refuted: all owners agree: off by 0.")


def test_examination_reports_what_it_cannot_try():
    flora = examine(partial(aggregate, method="flora"), ["idle_kept", "order"])
    assert flora.untried == ("idle_kept",)
    assert "not nested" in flora.verdicts["idle_kept"]
    fedit = examine(partial(aggregate, method="fedit"), ["mixed_ranks", "order"])
    assert fedit.refuted == ("mixed_ranks",)
    assert "raised InputValueError('fedit: expected clients" in fedit.verdicts["order"].replace(
        '"', "'"
    )


def test_summary_has_one_short_line_for_every_claim():
    lines = examine(averages_factors, ["exact", "gauge", "order"]).summary().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["order", "holds"],
        ["exact", "refuted:"],
        ["gauge", "refuted:"],
    ]
    assert max(map(len, lines)) <= 102


def test_examination_refuses_what_it_cannot_examine():
    with pytest.raises(InputTypeError, match="expected a function of updates, got 'rb'"):
        examine("rb")
    with pytest.raises(InputValueError, match="unknown claim 'exakt'; did you mean 'exact'"):
        examine(exact_mean, ["exakt"])


def test_unknown_claim_names_the_nearest():
    with pytest.raises(InputValueError, match="unknown claim 'exakt'; did you mean 'exact'"):
        check_aggregator(exact_mean, ["exakt"])


def test_trial_refuses_ranks_it_cannot_use():
    with pytest.raises(InputValueError, match="1 to 5 ranks of at most 8"):
        check_aggregator(exact_mean, ["exact"], ranks=(1, 9))


def test_aggregator_that_raises_on_mixed_ranks():
    with pytest.raises(Refuted, match="the aggregator raised"):
        check_aggregator(partial(aggregate, method="fedit"), ["mixed_ranks"])
    with pytest.raises(Inapplicable, match="equal ranks, pass others"):
        check_aggregator(exact_mean, ["mixed_ranks"], ranks=(2, 2))


@given(client_updates(layers=(2,), max_rank=4, max_features=6))
def test_strategy_draws_valid_updates(updates):
    assert 1 <= len(updates) <= 5
    first = updates[0]
    for u in updates:
        assert isinstance(u, ClientUpdate)
        assert u.A.shape == (2, u.rank, first.A.shape[-1])
        assert u.B.shape == (2, first.B.shape[-2], u.rank)
        assert u.rank <= 4
        assert u.weight >= 1
        assert u.scaling > 0
        assert u.A.dtype == first.A.dtype
        assert bool(torch.isfinite(u.A).all() and torch.isfinite(u.B).all())


@given(client_updates(equal_ranks=True))
def test_strategy_draws_equal_ranks(updates):
    assert len({u.rank for u in updates}) == 1


def test_nothing_to_check_is_refused():
    with pytest.raises(InputValueError, match="at least one claim"):
        check_aggregator(exact_mean, [])
    check_aggregator(exact_mean, "exact")


@pytest.mark.parametrize(
    ("method", "options", "claim"),
    [("flora", {}, "cohort"), ("rb", {"rank": "full"}, "cohort"), ("fedex", {}, "cohort")],
)
def test_a_method_is_asked_for_options_of_its_own(method, options, claim):
    # As the errors advise, though `aggregate` itself names neither total= nor totals=.
    aggregator = partial(aggregate, method=method, **options)
    check_aggregator(aggregator, [claim])
    assert examine(aggregator, claim).holds == (claim,)
    with pytest.raises(Refuted):
        check_aggregator(lambda updates: aggregator(updates), [claim])


@pytest.mark.parametrize("what", [check_aggregator, examine])
def test_one_mistake_has_one_error(what):
    with pytest.raises(InputTypeError, match="expected a function of updates, got 'rb'"):
        what("rb", ["exact"])
    with pytest.raises(InputValueError, match="expected at least one claim"):
        what(exact_mean, [])
    with pytest.raises(InputValueError, match="unknown claim 'exakt'"):
        what(exact_mean, "exakt")


@pytest.mark.parametrize(
    "claim", ["order", "split_client", "gauge", "rescaling", "absent", "exact"]
)
def test_what_is_no_matrix_of_the_clients_size_passes_nothing(claim):
    with pytest.raises(
        InputTypeError, match=r"expected it to return an AggregationResult.*NoneType"
    ):
        check_aggregator(lambda updates: None, claim)
    with pytest.raises(
        InputValueError, match=r"expected a matrix \(9, 8\), got one of shape \(2, 2\)"
    ):
        check_aggregator(lambda updates: torch.zeros(2, 2), claim)
