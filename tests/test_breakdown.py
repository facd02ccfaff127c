"""What a fifth of the clients can do: bounded under robust rules, anything under the mean."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.attacks import ATTACKS, Federation, attacked, dense
from hetlora_agg import ClientUpdate, aggregate, aggregate_layers
from hetlora_agg.robustness import centered_clip, geomed, multi_krum, nnm, norm_clip

SEEDS = range(5)
FEDERATIONS = {
    "6 of 30": Federation(),
    "6 of 30, noisy": Federation(noise=1.0),
    "2 of 10": Federation(clients=10, attackers=2),
}
ROBUST = {
    "nnm, geomed": lambda f: nnm(f).then(geomed(f)),
    "multi_krum": multi_krum,
    "geomed": geomed,
    "centered_clip": lambda f: centered_clip(f=f),
    "nnm, multi_krum": lambda f: nnm(f).then(multi_krum(f)),
}


def errors(federation, weighting, attack, method="flora", seed=0):
    """‖ΔW − truth‖ under the rule and of the honest clients' mean."""
    updates, truth = attacked(federation, attack, seed)
    honest = dense(updates[: federation.clients - federation.attackers]).mean(0)
    options = {"rank": "full"} if method == "flexlora" else {}
    result = aggregate(updates, method, weighting=weighting, on_bad_client="drop", **options)
    total = result.total().dense()
    return float((total - truth).norm()), float((honest - truth).norm())


@pytest.mark.parametrize("attack", [None, *ATTACKS])
@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("federation", FEDERATIONS.values(), ids=FEDERATIONS)
def test_a_fifth_of_the_clients_cannot_spoil_a_robust_rule(federation, rule, attack):
    for seed in SEEDS:
        error, clean = errors(federation, ROBUST[rule](federation.attackers), attack, seed=seed)
        assert error <= 3 * clean, seed


@pytest.mark.parametrize("federation", FEDERATIONS.values(), ids=FEDERATIONS)
@pytest.mark.parametrize("attack", ["scale", "flip", "strong_ipm"])
def test_the_mean_breaks(federation, attack):
    for seed in SEEDS:
        error, clean = errors(federation, "examples", attack, seed=seed)
        assert error > 5 * clean, seed


def test_krum_of_one_costs_much_without_any_attack():
    federation = FEDERATIONS["6 of 30"]
    for seed in SEEDS:
        error, clean = errors(federation, multi_krum(6, keep=1), None, seed=seed)
        assert error > 3 * clean


@pytest.mark.parametrize("method", ["flexlora", "fedex"])
@pytest.mark.parametrize("attack", ["scale", "alie", "subspace", "nan"])
def test_exact_methods_are_protected_alike(method, attack):
    federation = FEDERATIONS["2 of 10"]
    error, clean = errors(federation, ROBUST["nnm, geomed"](2), attack, method)
    assert error <= 3 * clean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("alike", [True, False], ids=["in one direction", "in many"])
def test_values_that_tend_to_infinity_keep_the_result_bounded(rule, alike, dtype):
    """The answer stays among the honest, whatever size the attackers have, up to the dtype's end.

    f of 2f + 3 clients, the fewest that every rule accepts.
    """
    f = 3
    federation = Federation(clients=2 * f + 3, attackers=f, out=12, columns=10, ranks=(1, 2, 4))
    honest, _ = federation.honest(0)
    g = torch.Generator().manual_seed(1)
    directions = [
        (torch.randn(12, 2, generator=g, dtype=torch.float64), torch.randn(2, 10, generator=g))
        for _ in range(f)
    ]
    W = dense(honest)
    reach = 3 * float(W.flatten(1).norm(dim=1).max())
    answers = []
    for power in (3, 6, 9, 12, 20, 37):
        size = 10.0 ** (power / 2)
        bad = [
            ClientUpdate(size * A.double(), size * B, id=100 + k)
            for k, (B, A) in enumerate(directions[:1] * f if alike else directions)
        ]
        sent = [replace(u, A=u.A.to(dtype), B=u.B.to(dtype)) for u in [*honest, *bad]]
        result = aggregate(sent, "flora", weighting=ROBUST[rule](f))
        total = result.A.double(), result.B.double()
        answers.append(total[1] @ total[0])
        assert float(answers[-1].norm()) <= reach, power
    # far enough away, only the direction counts
    assert float((answers[-1] - answers[-2]).norm()) <= 1e-3 * reach
    mean = aggregate(sent, "flora", weighting="uniform").factors.dense()
    assert float(mean.norm()) > 1e30


def test_half_of_the_clients_break_the_geometric_median():
    # the breakdown point is exact: 4 of 9 cannot, 5 of 9 can
    one = torch.ones(1, 1, dtype=torch.float64)
    for bad, bounded in ((4, True), (5, False)):
        sent = [ClientUpdate(one, (1e9 if k < bad else k) * one, id=k) for k in range(9)]
        found = float(aggregate(sent, "flora", weighting=geomed()).factors.dense())
        assert (found < 10) == bounded


def test_clipping_bounds_every_client_by_its_part_of_the_bound():
    federation = FEDERATIONS["2 of 10"]
    honest, _ = federation.honest(0)
    quiet = aggregate(honest, "flora", weighting=norm_clip(1.0)).factors.dense() * 8 / 10
    for attack in ("scale", "flip", "inflation"):
        updates, _ = attacked(federation, attack, 0)
        found = aggregate(updates, "flora", weighting=norm_clip(1.0)).factors.dense()
        assert float((found - quiet).norm()) <= 2 / 10 * (1 + 1e-9)


@pytest.mark.parametrize("attack", ["scale", "strong_ipm", "inflation"])
@pytest.mark.parametrize("rule", ["nnm, geomed", "multi_krum"])
def test_an_attack_on_one_layer_of_four_is_left_out_of_all(rule, attack):
    federation = FEDERATIONS["2 of 10"]
    layers = {name: attacked(federation, None, seed)[0] for seed, name in enumerate("qkvo")}
    idle = {
        name: [*updates, *(replace(updates[k], id=8 + k) for k in range(2))]
        for name, updates in layers.items()
    }
    loud = {**idle, "k": attacked(federation, attack, 1)[0]}
    results = aggregate_layers(loud, "flora", weighting=ROBUST[rule](2))
    for name, updates in layers.items():
        expected = dense(updates).mean(0)
        error = float((results[name].factors.dense() - expected).norm())
        assert error <= 1e-9 * float(expected.norm()), name


def test_an_attacked_federation_is_what_it_says():
    for name, federation in itertools.product(ATTACKS, FEDERATIONS.values()):
        updates, truth = attacked(federation, name, 0)
        assert len(updates) == federation.clients
        assert len({u.id for u in updates}) == federation.clients
        assert truth.shape == (federation.out, federation.columns)
        assert attacked(federation, name, 1)[0][0].B.ne(updates[0].B).any()
    honest, truth = Federation(noise=0.0).honest(0)
    np.testing.assert_allclose(dense(honest).mean(0), truth, atol=1e-15)


RULES = [geomed(2), nnm(2).then(geomed(2)), multi_krum(2), norm_clip(50.0)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["zeropad", "fedit"])
def test_averages_of_factors_are_not_held_and_say_so(method, rule):
    # One honest product in factors of 1e-4 and 1e4 times the size: no rule on products can tell.
    g = torch.Generator().manual_seed(4)
    A, B = torch.randn(4, 16, generator=g), torch.randn(12, 4, generator=g)
    near = [
        ClientUpdate(A + 0.1 * torch.randn(4, 16, generator=g), B, id=f"phone-{k}")
        for k in range(9)
    ]
    thief = replace(near[0], A=near[0].A / 1e4, B=near[0].B * 1e4, id="thief")
    sent = [*near, thief]
    # The product is honest, whoever looks at products keeps it, and whoever uses them is safe.
    held = aggregate(sent, "flexlora", weighting=rule)
    assert held.total().dense().norm() < 2 * (B @ A).norm()
    assert held.notes == ()
    loose = aggregate(sent, method, weighting=rule)
    assert loose.total().dense().norm() > 10 * (B @ A).norm()
    assert any("averages A's and B's apart" in note for note in loose.notes)
    assert aggregate(sent, method).notes == ()
