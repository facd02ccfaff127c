"""What the claims say of methods besides the matrix of `test_matrix`: defences, biases, gains."""

from functools import partial

import pytest
import torch

from hetlora_agg import CLAIMS, METHODS, aggregate
from hetlora_agg.testing import check_aggregator
from hetlora_agg.testing.theorems import THEOREMS


def test_every_claim_has_its_theorem():
    assert set(THEOREMS) == set(CLAIMS)
    assert all(theorem.__doc__ for theorem in THEOREMS.values())


def test_fold_rest_makes_flexlora_exact():
    check_aggregator(partial(aggregate, method="flexlora", fold_rest=True, rank=1), ["exact"])


@pytest.mark.parametrize("options", [{"floor": 0.3}, {"quorum": 1}, {"align": "svd"}])
def test_defended_rb_keeps_its_symmetries(options):
    claims = ["mixed_ranks", "order", "rescaling", "homogeneous", "orthogonal", "transpose"]
    claims += ["absent", "layers", "component_scale"]
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
