"""Every method × every claim: it holds, departs from it by a formula, or cannot be tried."""

import inspect
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from departures import FORMULAS, Call
from hetlora_agg import (
    CLAIMS,
    METHODS,
    ClientUpdate,
    HetLoRAError,
    InputValueError,
    aggregate,
    method,
)
from hetlora_agg.claims import DEPARTURES, INAPPLICABLE
from hetlora_agg.testing import Inapplicable, Refuted, check_aggregator
from reference import Client, by_layer, scale, total
from states import aggregator_for, common_of

# Large enough that no sketch of a few columns more than the rank sees the whole mean.
MIXED, EQUAL = (2, 6, 4, 6), (5, 5, 5)
# 2^2K sign patterns of K clients.
FEW = (2, 6, 6)
# More owners of a slot than slots, so that truncation cuts even a single slot.
COHORT = (1, 2, 2, 1, 2)
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
SIZE = {"out_features": 18, "in_features": 17}

CELLS = [(m, claim, entry.cell(claim)) for m, entry in METHODS.items() for claim in CLAIMS]


def cells(wanted):
    return [pytest.param(m, claim, id=f"{m}-{claim}") for m, claim, cell in CELLS if wanted(cell)]


def ranks_for(name, claim):
    if "mixed_ranks" not in METHODS[name].claims and claim != "mixed_ranks":
        return EQUAL
    if claim == "statistical_uncorrelated":
        return FEW
    return COHORT if claim.startswith("cohort") or claim == "slot_ratio" else MIXED


def check(name, claim, aggregator, ranks=None, **options):
    ranks = ranks or ranks_for(name, claim)
    check_aggregator(aggregator, [claim], ranks=ranks, common=common_of(name), **SIZE, **options)


def clients_of(updates):
    return [Client(u.A.numpy(), u.B.numpy(), u.weight, u.scaling) for u in updates if u.weight]


def departing(name, departure, seen):
    """The method, its result compared with the formula on every list of clients it is given."""
    aggregator = aggregator_for(name)

    def run(updates, **told):
        clients = clients_of(updates)
        previous = told.get("previous")
        if previous is not None:
            previous = (previous.A.numpy(), previous.B.numpy())
        fixed = {k: told[k] for k in ("total", "totals") if k in told}
        call = partial(Call, name, clients, previous=previous, **fixed)
        result = aggregator(updates, **told)
        found = total(result)
        for index, layer, _ in by_layer(clients):
            expected = FORMULAS[departure](layer, call(layer=index))
            error = np.linalg.norm(found[index] - expected)
            assert error <= 1e-9 * scale(layer), (error / scale(layer), [c.rank for c in layer])
        seen.append(clients)
        return result

    run.__signature__ = inspect.signature(aggregator)
    return run


def test_no_cell_is_empty():
    assert [(m, c) for m, c, cell in CELLS if cell.verdict == "not stated"] == []
    for entry in METHODS.values():
        assert not set(entry.fails) & {c for c, held in entry.claims.items() if held == {}}


@pytest.mark.parametrize(("name", "claim"), cells(lambda cell: cell.verdict == "holds"))
def test_claim_holds(name, claim):
    check(name, claim, aggregator_for(name, **METHODS[name].cell(claim).options))


@pytest.mark.parametrize(
    ("name", "claim"), cells(lambda cell: cell.departure not in (None, "refusal"))
)
def test_claim_is_missed_by_the_formula_named(name, claim):
    departure, seen = METHODS[name].cell(claim).departure, []
    with pytest.raises(Refuted):
        check(name, claim, departing(name, departure, seen))
    assert seen


@pytest.mark.parametrize(("name", "claim"), cells(lambda cell: cell.departure == "refusal"))
def test_claim_is_missed_by_refusing(name, claim):
    refused = []
    aggregator = departing(name, "refusal", [])

    def run(updates):
        try:
            return aggregator(updates)
        except InputValueError as error:
            refused.append(error)
            raise

    # A theorem that does not ask for clients to be taken lets the refusal through.
    with pytest.raises((Refuted, HetLoRAError)):
        check(name, claim, run, MIXED if claim == "mixed_ranks" else EQUAL)
    assert refused
    assert all("; use '" in str(error) for error in refused)


@pytest.mark.parametrize(("name", "claim"), cells(lambda cell: cell.verdict == "not applicable"))
def test_claim_that_cannot_be_tried_is_said_to_be_so(name, claim):
    assert METHODS[name].cell(claim).reason in [reason for reason, _ in INAPPLICABLE.values()]
    with pytest.raises(Inapplicable, match="cannot be tried"):
        check(name, claim, aggregator_for(name))


@pytest.mark.parametrize(("name", "claim"), cells(lambda cell: cell.options))
def test_claim_under_options_has_its_departure_without(name, claim):
    assert METHODS[name].cell(claim).departure


def test_every_departure_has_its_formula_and_its_cells():
    assert set(FORMULAS) == set(DEPARTURES)
    assert {cell.departure for *_, cell in CELLS} - {None} == set(DEPARTURES)


# --- what is said of a cell ---------------------------------------------------------------------


def test_a_cell_says_what_is_known():
    rb, ffa, flora = METHODS["rb"], METHODS["ffa"], METHODS["flora"]
    assert rb.cell("consensus").verdict == "holds"
    assert rb.cell("consensus").formula is None
    statistical = rb.cell("statistical")
    assert (statistical.verdict, statistical.options) == ("holds", {"rank": "full"})
    assert statistical.formula == DEPARTURES["cut owner means"]
    assert rb.cell("exact").verdict == "fails"
    assert ffa.cell("gauge").reason == "a factor is one and the same on all clients"
    assert flora.cell("idle_kept").verdict == "not applicable"
    assert rb.describe()["fails"]["exact"] == DEPARTURES["cut owner means"]
    with pytest.raises(InputValueError, match="unknown claim 'exakt'; did you mean 'exact'"):
        rb.cell("exakt")


def test_of_an_own_method_only_what_is_stated_is_known(monkeypatch):
    entered = {}
    monkeypatch.setattr("hetlora_agg.registry.METHODS", entered)

    @method(reference="arXiv:0000.00000", claims={"order": {}}, fails={"exact": "stack"})
    def mine(c):
        """Mine."""

    entry = entered["mine"]
    verdicts = [entry.cell(claim).verdict for claim in ("order", "exact", "gauge")]
    assert verdicts == ["holds", "fails", "not stated"]
    with pytest.raises(InputValueError, match="unknown departures \\['somehow'\\]; known: "):
        method(reference="", claims={}, fails={"exact": "somehow"})(lambda c: None)
    with pytest.raises(InputValueError, match="unknown claims \\['exakt'\\]; known: "):
        method(reference="", claims={}, fails={"exakt": "stack"})(lambda c: None)


# --- how exactly ----------------------------------------------------------------------------------

SUMS = [("flora", {}), ("fedex", {}), ("ffa", {}), ("rolora", {}), ("shared_a", {})]
CUTS = [("flexlora", {"rank": "full"}), ("rb", {"rank": "full"}), ("raflora", {"rank": "full"})]
EXACTLY = ("exact", "cohort", "cohort_equal", "cohort_ratio", "slot_ratio", "absent")


@pytest.mark.parametrize(
    ("name", "options", "claim"),
    [
        pytest.param(name, options, claim, id=f"{name}-{claim}")
        for name, options in (*SUMS, *CUTS)
        for claim in EXACTLY
        if METHODS[name].holds(claim, options)
    ],
)
def test_finite_sums_leave_rounding_only(name, options, claim):
    # Two divisions and a covariance on top of the sums: ten times the room for a ratio.
    rtol = 1e-12 if claim.endswith("ratio") else 1e-13
    check(name, claim, aggregator_for(name, **options), rtol=rtol)


# --- everybody's denominators --------------------------------------------------------------------

PAIR = [
    ClientUpdate(np.eye(2)[:1], np.ones((3, 1)), weight=2.0),
    ClientUpdate(np.eye(2), np.ones((3, 2)), weight=6.0),
]


@pytest.mark.parametrize("name", ["flora", "fedex", "flexlora"])
def test_a_given_total_takes_the_place_of_the_sum_of_weights(name):
    found = aggregate(PAIR, name, total=32.0).total().dense()
    assert np.allclose(found, [[8 / 32, 6 / 32]] * 3, rtol=0, atol=1e-15)
    with pytest.raises(InputValueError, match="total"):
        aggregate(PAIR, name, total=0.0)
    with pytest.raises(InputValueError, match="total=: a weighting function gives"):
        aggregate(PAIR, name, total=32.0, weighting=lambda c: c.weight / 8)


def test_given_totals_take_the_place_of_the_sums_over_owners():
    found = aggregate(PAIR, "rb", totals=[16.0, 12.0]).factors.dense()
    assert np.allclose(found, [[8 / 16, 6 / 12]] * 3, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"totals": [16.0]}, "totals=: expected a number for each of 2 slots, got 1"),
        ({"totals": [16.0, 0.0]}, "totals"),
        ({"totals": 16.0}, "totals=: expected a list"),
        ({"totals": [16.0, 12.0], "floor": 0.5}, "floor= is relative"),
        ({"totals": [16.0, 12.0], "weight_cap": 0.5}, "weight_cap= is relative"),
    ],
)
def test_totals_that_are_none_are_refused(options, said):
    with pytest.raises(HetLoRAError, match=said):
        aggregate(PAIR, "rb", **options)


# --- twins that are wrong -------------------------------------------------------------------------


def mean(updates, total=None):
    """Σ n_k ΔW_k over the given denominator or its own: what the twins are variations of."""
    whole = sum(u.weight for u in updates) if total is None else total
    return sum(u.weight / whole * u.scaling * (u.B @ u.A) for u in updates)


def without_inclusion(updates, total=None):
    """Forgets 1/π_k: the trial's four clients come as n_k 4/m."""
    part = len(updates) / 4 if total is not None else 1.0
    return part * mean(updates, total)


def by_own_weights(updates, total=None):
    return mean(updates)


def two_percent_more(updates, total=None):
    return 1.02 * mean(updates, total) if len(updates) < 4 else mean(updates, total)


def uniform(updates):
    return sum(u.scaling * (u.B @ u.A) for u in updates) / len(updates)


def counts_the_absent(updates):
    return mean(updates) * sum(u.weight > 0 for u in updates) / len(updates)


def owner_mean(updates):
    return aggregate(updates, "rb", rank="full")


def largest_takes_all(updates):
    size = [float((u.B @ u.A).norm()) for u in updates]
    return sum(s * u.scaling * (u.B @ u.A) for s, u in zip(size, updates, strict=True)) / sum(size)


def one_mass_for_all_layers(updates):
    size = [float((u.B @ u.A).norm()) for u in updates]
    return sum(s / sum(size) * (u.B @ u.A) for s, u in zip(size, updates, strict=True))


def loudest_over_all_layers(updates):
    return max((u.scaling * (u.B @ u.A) for u in updates), key=lambda W: float(W.norm()))


def by_absolute_b(updates):
    return mean(updates) * sum(float(u.B.sum()) for u in updates)


TWINS = [
    (without_inclusion, "cohort"),
    (by_own_weights, "cohort"),
    (two_percent_more, "cohort"),
    (partial(aggregate, method="zeropad"), "cohort_equal"),
    (two_percent_more, "cohort_equal"),
    (lambda updates: mean(updates, total=50.0), "cohort_equal"),
    (uniform, "cohort_ratio"),
    (two_percent_more, "cohort_ratio"),
    (owner_mean, "cohort_ratio"),
    (partial(aggregate, method="zeropad"), "slot_ratio"),
    (mean, "slot_ratio"),
    (two_percent_more, "slot_ratio"),
    (partial(aggregate, method="rb"), "slot_ratio"),
    (uniform, "bounded_share"),
    (owner_mean, "bounded_share"),
    (largest_takes_all, "bounded_share"),
    (lambda updates: 1.02 * mean(updates), "bounded_share"),
    (counts_the_absent, "absent"),
    (uniform, "absent"),
    (one_mass_for_all_layers, "layers"),
    (loudest_over_all_layers, "layers"),
    (lambda updates: mean(updates).sum(0) if updates[0].A.dim() > 2 else mean(updates), "layers"),
    (lambda updates: mean(updates).flip(0), "layers"),
    (by_absolute_b, "component_scale"),
    (partial(aggregate, method="zeropad"), "component_scale"),
    (partial(aggregate, method="rbla"), "component_scale"),
    (owner_mean, "component_order"),
    (lambda updates: mean(updates[:1]) + updates[1].B[:, :1] @ updates[1].A[:1], "component_order"),
]


@pytest.mark.parametrize(("twin", "claim"), TWINS)
def test_wrong_twin_is_refuted(twin, claim):
    with pytest.raises(Refuted, match=f"claim '{claim}' is refuted"):
        check_aggregator(twin, claim)


HELD = [
    *[(mean, claim) for claim in ("cohort", "cohort_equal", "cohort_ratio", "bounded_share")],
    *[(mean, claim) for claim in ("absent", "layers", "component_scale", "component_order")],
    *[(owner_mean, claim) for claim in ("cohort_equal", "slot_ratio", "component_scale")],
    (uniform, "cohort_equal"),
    (partial(aggregate, method="zeropad"), "bounded_share"),
]


@pytest.mark.parametrize(("right", "claim"), HELD)
def test_right_aggregator_is_not_refuted(right, claim):
    check_aggregator(right, claim)


@pytest.mark.parametrize("claim", ["cohort", "cohort_equal", "cohort_ratio", "slot_ratio"])
def test_one_client_has_no_cohorts(claim):
    with pytest.raises(Inapplicable, match="pass"):
        check_aggregator(mean, claim, ranks=(3,))


@pytest.mark.parametrize("claim", ["cohort_equal", "slot_ratio"])
def test_lone_owner_leaves_a_slot_empty_in_some_cohort(claim):
    with pytest.raises(Inapplicable, match="pass the largest rank twice"):
        check_aggregator(mean, claim, ranks=(1, 2, 4))


def test_an_aggregator_without_leading_dimensions_is_refuted_with_what_it_raised():
    def of_matrices(updates):
        return sum(u.weight * u.A.t() @ u.B.t() for u in updates).t()

    with pytest.raises(Refuted, match="a leading dimension: the aggregator raised RuntimeError"):
        check_aggregator(of_matrices, "layers")


def test_packages_were_examined_on_every_claim():
    record = json.loads((RESULTS / "published.json").read_text())["results"]
    for found in record.values():
        assert set(found["verdicts"]) == set(CLAIMS)
        marks = {verdict.split(":")[0] for verdict in found["verdicts"].values()}
        assert marks <= {"holds", "refuted", "cannot be tried"}
    # Known from their formulas: a stack is exact, averages of factors are not.
    assert record["peft `add_weighted_adapter`, `cat`"]["verdicts"]["exact"] == "holds"
    assert record["chorus-fl `FedAvg`"]["verdicts"]["exact"].startswith("refuted")
