"""Every claim in the registry holds, every claim not made is false, and biases have their form."""

from functools import partial

import pytest
import torch

from hetlora_agg import CLAIMS, METHODS, HetLoRAError, aggregate
from hetlora_agg.testing import Inapplicable, Refuted, check_aggregator
from hetlora_agg.testing.theorems import THEOREMS
from states import aggregator_for, common_of, state_for

# Large enough that no sketch of a few columns more than the rank sees the whole mean.
MIXED, EQUAL = (2, 6, 4, 6), (5, 5, 5)
SIZE = {"out_features": 18, "in_features": 17}

MADE = [(m, claim) for m, entry in METHODS.items() for claim in entry.claims]
NOT_MADE = [(m, claim) for m, entry in METHODS.items() for claim in CLAIMS - entry.claims.keys()]


def ranks_for(name):
    return MIXED if "mixed_ranks" in METHODS[name].claims else EQUAL


def check(name, claim, ranks, **options):
    aggregator = aggregator_for(name, **options)
    check_aggregator(aggregator, [claim], ranks=ranks, common=common_of(name), **SIZE)


def test_every_claim_has_its_theorem():
    assert set(THEOREMS) == set(CLAIMS)
    assert all(theorem.__doc__ for theorem in THEOREMS.values())


@pytest.mark.parametrize(("name", "claim"), MADE)
def test_claim_holds(name, claim):
    check(name, claim, ranks_for(name), **METHODS[name].claims[claim])


def undecided(name, claim):
    """Claims that cannot be tried: on these results, at equal ranks, or on a common factor."""
    if common_of(name) is not None:
        return claim in ("transpose", "gauge")
    entry = METHODS[name]
    idle = claim.startswith("idle")
    updates = [(torch.ones(2, 3), torch.ones(3, 2))] * 2
    result = aggregate(updates, name, **state_for(name))
    restarts = not result.nested and not result.slotted
    return idle and (restarts or ("mixed_ranks" not in entry.claims and claim != "idle_kept"))


@pytest.mark.parametrize(("name", "claim"), [p for p in sorted(NOT_MADE) if not undecided(*p)])
def test_claim_not_made_is_false(name, claim):
    # Appending a component makes equal ranks unequal, which some methods refuse outright.
    refusals = (Refuted, HetLoRAError) if claim == "zero_component" else Refuted
    ranks = MIXED if claim == "mixed_ranks" else ranks_for(name)
    with pytest.raises(refusals):
        check(name, claim, ranks)


@pytest.mark.parametrize(("name", "claim"), [p for p in sorted(NOT_MADE) if undecided(*p)])
def test_claim_that_cannot_be_tried_is_said_to_be_so(name, claim):
    with pytest.raises(Inapplicable, match="cannot be tried"):
        check(name, claim, ranks_for(name))


@pytest.mark.parametrize(("name", "claim"), [p for p in MADE if METHODS[p[0]].claims[p[1]]])
def test_claim_under_options_needs_them(name, claim):
    with pytest.raises(Refuted):
        check(name, claim, ranks_for(name))


def test_fold_rest_makes_flexlora_exact():
    check_aggregator(partial(aggregate, method="flexlora", fold_rest=True, rank=1), ["exact"])


@pytest.mark.parametrize("options", [{"floor": 0.3}, {"quorum": 1}, {"align": "svd"}])
def test_defended_rb_keeps_its_symmetries(options):
    claims = ["mixed_ranks", "order", "rescaling", "homogeneous", "orthogonal", "transpose"]
    check_aggregator(partial(aggregate, method="rb", **options), claims)


def test_exact_and_consensus_exclude_each_other():
    both = [m for m, e in METHODS.items() if {"exact", "consensus"} <= e.claims.keys()]
    assert both == []


def correlated_cohort():
    """Two owners of one slot: b ± e_k with a ± f_k, the same sign; weights 1 and 3."""
    g = torch.Generator().manual_seed(5)
    b, a = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((4, 1), (1, 5)))
    noise = [
        tuple(torch.randn(*s, generator=g, dtype=torch.float64) for s in ((4, 1), (1, 5)))
        for _ in range(2)
    ]
    return b, a, noise, (1.0, 3.0)


@pytest.mark.parametrize("name", ["rbla", "replicate", "fedit"])
def test_factor_space_bias_under_correlated_noise(name):
    # E[result] - E[component] of one slot: cross terms of different clients vanish, so only
    # the mean component's own noise term shrinks, from Σ γ e f to Σ γ² e f.
    b, a, noise, weights = correlated_cohort()
    total = torch.zeros(4, 5, dtype=torch.float64)
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        clients = [
            (a + s * f, b + s * e, 1, n) for s, (e, f), n in zip(signs, noise, weights, strict=True)
        ]
        total += aggregate(clients, name).factors.dense() / 4
    expected = b @ a + sum((n / 4) ** 2 * e @ f for (e, f), n in zip(noise, weights, strict=True))
    assert (total - expected).norm() <= 1e-14 * expected.norm()
    mean_component = b @ a + sum(n / 4 * e @ f for (e, f), n in zip(noise, weights, strict=True))
    assert (total - mean_component).norm() > 0.05 * mean_component.norm()


@pytest.mark.parametrize("name", ["flora", "flexlora", "fedex"])
def test_stack_gain_on_agreeing_components_is_the_coverage(name):
    # If all owners of slot j agree, the exact mean holds q_j of the component.
    b = torch.eye(6, 3, dtype=torch.float64)
    a = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    ranks, weights = (1, 2, 3), (5.0, 10.0, 5.0)
    clients = [(a[:r], b[:, :r], r, n) for r, n in zip(ranks, weights, strict=True)]
    total = aggregate(clients, name).total().dense()
    coverage = torch.tensor([1.0, 15 / 20, 5 / 20], dtype=torch.float64)
    assert (total - b @ (coverage[:, None] * a)).norm() < 1e-14
