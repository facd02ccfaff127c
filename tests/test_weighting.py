"""Weightings: names are masses, functions give the coefficients themselves."""

from dataclasses import replace

import pytest
import torch

from hetlora_agg import METHODS, ClientUpdate, InputTypeError, InputValueError, aggregate
from hetlora_agg.components import Components
from hetlora_agg.weighting import weighted_share
from states import fitting, state_for

F64 = torch.float64
TAKERS = sorted(
    name
    for name, entry in METHODS.items()
    if "weighting" in entry.options and name not in ("fedhl", "plora")
)
"""Methods with client shares; fedhl and plora have weightings of their own."""


def clients(name, weights):
    ranks = (2, 3, 1) if "mixed_ranks" in METHODS[name].claims else (2, 2, 2)
    g = torch.Generator().manual_seed(3)
    updates = [
        ClientUpdate(
            torch.randn(r, 7, generator=g, dtype=F64),
            torch.randn(6, r, generator=g, dtype=F64),
            weight=n,
            scaling=0.5 + r,
        )
        for r, n in zip(ranks, weights, strict=True)
    ]
    return fitting(name, updates)


def dense(updates, name, weighting):
    # A method that averages A needs its common factor elsewhere: rolora's first round has it in A.
    return aggregate(updates, name, **state_for(name), weighting=weighting).total().dense()


def components():
    return Components(
        A=torch.ones(3, 2, dtype=F64),
        B=torch.ones(2, 3, dtype=F64),
        ranks=(1, 2),
        weight=torch.tensor([3.0, 1.0], dtype=F64),
        slots=(0, 0, 1),
        ids=(0, 1),
    )


@pytest.mark.parametrize("name", TAKERS)
def test_a_function_gives_the_coefficients(name):
    # Coefficients that sum to 1 are what weights in their proportion come to.
    coefficients = torch.tensor([0.5, 0.375, 0.125], dtype=F64)
    found = dense(clients(name, (9, 9, 9)), name, lambda c: coefficients)
    expected = dense(clients(name, (4, 3, 1)), name, "examples")
    assert (found - expected).norm() <= 1e-13 * expected.norm()


@pytest.mark.parametrize("name", TAKERS)
def test_uniform_is_equal_weights(name):
    found = dense(clients(name, (4, 3, 1)), name, "uniform")
    expected = dense(clients(name, (1, 1, 1)), name, "examples")
    assert (found - expected).norm() <= 1e-13 * expected.norm()
    assert (found - dense(clients(name, (4, 3, 1)), name, "examples")).norm() > 1e-3


@pytest.mark.parametrize("name", ["flora", "flexlora", "fedex", "ffa"])
def test_coefficients_are_not_renormalised(name):
    whole = dense(clients(name, (1, 1, 1)), name, "uniform")
    half = dense(clients(name, (1, 1, 1)), name, lambda c: torch.full((3,), 1 / 6, dtype=F64))
    assert (half - whole / 2).norm() <= 1e-13 * whole.norm()


def test_share_of_each_component():
    c = components()
    assert weighted_share(c, "examples").tolist() == [0.75, 0.25, 0.25]
    assert weighted_share(c, "uniform").tolist() == [0.5, 0.5, 0.5]
    assert weighted_share(c, "examples", total=8.0).tolist() == [3 / 8, 1 / 8, 1 / 8]
    share = weighted_share(c, lambda c: torch.tensor([0.25, 0.5]))
    assert share.tolist() == [0.25, 0.5, 0.5]
    assert share.dtype == F64


def test_a_function_may_answer_layer_by_layer():
    c = components()
    c = replace(c, A=c.A.expand(2, 3, 2), B=c.B.expand(2, 2, 3))
    share = weighted_share(c, lambda c: torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert share.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (None, "expected the function to return a tensor of 2 coefficients.*got NoneType"),
        ([0.5, 0.5], "got list"),
        (torch.ones(3), r"got \(3,\)"),
        (torch.tensor(1.0), r"got \(\)"),
    ],
)
def test_what_are_no_coefficients(answer, match):
    with pytest.raises(InputTypeError, match=match):
        weighted_share(components(), lambda c: answer)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_coefficients_are_finite_and_not_negative(value):
    with pytest.raises(InputValueError, match="coefficients that are finite and >= 0"):
        weighted_share(components(), lambda c: torch.tensor([0.5, value]))


def test_coefficients_have_no_total():
    with pytest.raises(InputValueError, match="total=: a weighting function gives"):
        weighted_share(components(), lambda c: torch.ones(2), total=2.0)


@pytest.mark.parametrize("name", TAKERS)
def test_an_unknown_name(name):
    with pytest.raises(InputValueError, match=r"weighting=.*'exmples'; did you mean 'examples'"):
        dense(clients(name, (1, 1, 1)), name, "exmples")
