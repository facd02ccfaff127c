"""What a method needs of clients that are gone, as the formulas say and as the method is asked."""

import math

import pytest
import torch

from hetlora_agg import METHODS, components
from hetlora_agg.components import Components
from hetlora_agg.errors import InputValueError, OptionValueError
from hetlora_agg.robustness import geomed, norm_clip
from hetlora_agg.streaming import RunningAggregate
from hetlora_agg.streaming.plan import plan_of
from states import state_for
from streamed import STREAMING, told_for

# Read off the formulas: what a component is multiplied by, and what has its own denominator.
PLANS = {
    "fedask": ({"stack"}, "weight", "all"),
    "fedex": ({"stack", "average_factors"}, "weight", "all"),
    "fedit": ({"average_factors"}, "weight", "all"),
    "fedsa": ({"average_factors"}, "weight", "slot"),
    "ffa": ({"average_factors"}, "weight", "all"),
    "flexlora": ({"stack"}, "weight", "all"),
    "flora": ({"stack"}, "weight", "all"),
    "hafl": ({"average_factors"}, "weight", "slot"),
    "hetlora": ({"average_factors"}, "norm", "all"),
    "plora": ({"average_factors"}, "count", "slot"),
    "raflora": ({"stack"}, "weight", "slot"),
    "rb": ({"stack"}, "weight", "slot"),
    "rbla": ({"average_factors"}, "weight", "slot"),
    # p_k + (1 − q_j) d_k, d_k above zero for the largest rank only.
    "replicate": ({"average_factors"}, "weight", "rank"),
    "rolora": ({"average_factors"}, "weight", "all"),
    "shared_a": ({"average_factors"}, "weight", "slot"),
    "zeropad": ({"average_factors"}, "weight", "all"),
}
COMMON = {"ffa": "A", "shared_a": "A", "rolora": "A"}


def planned(name, known=None, **options):
    return plan_of(METHODS[name], state_for(name) | options, known)


def test_every_method_that_streams_is_here():
    assert sorted(PLANS) == STREAMING


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("levels", [None, (2, 5), (4, 8, 16)])
def test_plans(name, levels):
    plan = planned(name, levels, **({"levels": levels} if name == "raflora" and levels else {}))
    verbs, mass, parts = PLANS[name]
    if levels == (2, 5) and name == "replicate":
        # With two ranks every slot below the largest belongs to both, every other to one.
        parts = plan.parts
    assert (plan.verbs, plan.mass, plan.parts) == (frozenset(verbs), mass, parts)
    assert plan.common == COMMON.get(name)


@pytest.mark.parametrize(
    ("name", "options", "mass", "parts"),
    [
        ("flexlora", {"weighting": "uniform"}, "count", "all"),
        ("flexlora", {"total": 7.0}, "own", "all"),
        ("rb", {"totals": [3.0, 2.0, 1.0]}, "own", "all"),
        ("rb", {"floor": 1e-6}, "weight", "slot"),
        ("rb", {"floor": 1.0}, "weight", "all"),
        ("rb", {"quorum": 900}, "weight", "slot"),
        ("plora", {"weighting": "examples"}, "weight", "slot"),
        ("plora", {"weight_cap": 0.001}, "count", "slot"),
        ("hetlora", {"per_layer": True}, "layer norm", "all"),
        ("flexlora", {"weighting": lambda c: c.weight / c.weight.sum()}, "weight", "all"),
        ("flexlora", {"weighting": lambda c: c.weight / 100}, "own", "all"),
    ],
)
def test_plans_under_options(name, options, mass, parts):
    plan = planned(name, **options)
    assert (plan.mass, plan.parts) == (mass, parts)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("rb", {"weight_cap": 0.999}, "beforehand with roster="),
        ("rbla", {"weight_cap": 1e-3}, "beforehand with roster="),
        ("flexlora", {"weighting": lambda c: c.weight**2 / c.weight.square().sum()}, "roster="),
        ("flexlora", {"weighting": lambda c: c.A[0, :1].expand(len(c.ranks))}, "one by one"),
        ("flexlora", {"weighting": geomed(1)}, "compares the clients' updates"),
        ("flexlora", {"weighting": norm_clip(1.0)}, "compares the clients' updates"),
        ("flexlora", {"rank": 0}, "rank="),
        ("rb", {"quorum": 10**6}, "leave a slot without a share"),
    ],
)
def test_what_cannot_be_planned(name, options, match):
    with pytest.raises((InputValueError, OptionValueError), match=match):
        RunningAggregate(name, **told_for(name), **options)


def test_a_question_moves_no_generator():
    generator = torch.Generator().manual_seed(4)
    before = generator.get_state()
    RunningAggregate("fedask", generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("block", [1, 3, 100])
@pytest.mark.parametrize("layers", [(), (2,)])
def test_sums_over_slots_do_not_depend_on_blocks(block, layers, monkeypatch):
    monkeypatch.setattr(components, "BLOCK", block)
    slots = (0, 1, 2, 0, 1, 0, 4)
    c = Components(
        A=torch.zeros(*layers, 7, 2),
        B=torch.zeros(*layers, 2, 7),
        ranks=(3, 2, 2),
        weight=torch.ones(3, dtype=torch.float64),
        slots=slots,
        ids=(0, 1, 2),
    )
    values = torch.arange(1.0, 8.0).double().expand(*layers, 7) ** 2
    top, total = c.over_slots(values)
    assert top.shape == total.shape == (*layers, 5)
    for j in range(5):
        own = [float((i + 1) ** 2) for i, slot in enumerate(slots) if slot == j]
        assert (top[..., j] == max(own, default=0.0)).all()
        assert (total[..., j] == math.fsum(own)).all()
