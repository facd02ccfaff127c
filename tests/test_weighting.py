"""Masses and shares: weightings, norms, guards, and the ends of float64."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetlora_agg import METHODS, ClientUpdate, InputTypeError, InputValueError, aggregate
from hetlora_agg.components import Components
from hetlora_agg.weighting import (
    capped,
    client_share,
    client_squared_norms,
    coverage,
    dropped_slots,
    examples,
    guarded_share,
    layer_update_norm,
    over_all_layers,
    slot_share,
    top_share,
    update_norm,
    weighted_share,
)
from reference import water_filling
from states import fitting, state_for

F32, F64 = torch.float32, torch.float64
EPS = 2.0**-52
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


# --- shares by hand -----------------------------------------------------------------------------


def message(call, *arguments, error=InputValueError, **options):
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


def exact_slot_shares(c, mass):
    """``m_k / N_j`` in fractions; equal shares where all owners of a slot have none."""
    owner = [k for k, rank in enumerate(c.ranks) for _ in range(rank)]
    mass = [Fraction(m) for m in mass]
    owned = [
        [mass[k] for k, j in zip(owner, c.slots, strict=True) if j == slot] for slot in c.slots
    ]
    return [
        float(mass[k] / sum(own)) if any(own) else 1 / len(own)
        for k, own in zip(owner, owned, strict=True)
    ]


ENDS = (0.0, 5e-324, 1e-300, 0.5, 1e308)


def test_slot_shares_from_end_to_end_of_float64():
    c = components()
    every = torch.tensor(list(product(ENDS, repeat=2)), dtype=F64)
    expected = [exact_slot_shares(c, mass.tolist()) for mass in every]
    # Whether each mass stands alone or is a layer among others of quite another size.
    alone = torch.stack([slot_share(c, mass) for mass in every])
    torch.testing.assert_close(alone, torch.tensor(expected, dtype=F64), rtol=1e-15, atol=0)
    assert torch.equal(slot_share(c, every), alone)


def test_client_shares_from_end_to_end_of_float64():
    c = components()
    every = torch.tensor(list(product(ENDS, repeat=2)), dtype=F64)
    expected = [
        [float(Fraction(m) / (Fraction(first) + Fraction(second))) for m in (first, second, second)]
        if first or second
        else [0.5] * 3
        for first, second in every.tolist()
    ]
    alone = torch.stack([client_share(c, mass) for mass in every])
    torch.testing.assert_close(alone, torch.tensor(expected, dtype=F64), rtol=1e-15, atol=0)
    assert torch.equal(client_share(c, every), alone)


def test_coverage_and_top_share_by_hand():
    c = replace(components(), ranks=(2, 1), slots=(0, 2, 0))
    mass = torch.tensor([[3.0, 1.0], [0.0, 2.0]], dtype=F64)
    assert coverage(c, mass).tolist() == [[1.0, 0.75, 1.0], [1.0, 0.0, 1.0]]
    assert top_share(c, mass[0]).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"totals": [8.0, 0.5]}, [3 / 8, 1 / 8, 2.0]),
        ({"totals": [8.0, 0.5, 99.0]}, [3 / 8, 1 / 8, 2.0]),
        ({"floor": 1.0}, [0.75, 0.25, 0.25]),
        ({"floor": 0.5}, [0.75, 0.25, 0.5]),
        ({"floor": 0.25}, [0.75, 0.25, 1.0]),
        ({"quorum": 1}, [0.75, 0.25, 1.0]),
        ({"quorum": 2}, [0.75, 0.25, 0.0]),
        ({"quorum": 3}, [0.0, 0.0, 0.0]),
        ({"quorum": 2, "totals": [8.0, 0.5]}, [3 / 8, 1 / 8, 0.0]),
        ({"quorum": 2, "floor": 0.5}, [0.75, 0.25, 0.0]),
    ],
)
def test_guarded_slots_by_hand(options, expected):
    c = components()
    share = slot_share(c, examples(c), **options)
    assert share.tolist() == expected
    assert share.dtype == F64
    dropped = {None: (), 1: (), 2: (1,), 3: (0, 1)}[options.get("quorum")]
    found, gone = guarded_share(c, examples(c), **options)
    assert found.tolist() == expected
    assert gone == dropped
    layers = torch.tensor([[3.0, 1.0], [3.0, 1.0]], dtype=F64)
    assert slot_share(c, layers, **options).tolist() == [expected, expected]


@pytest.mark.parametrize(
    ("error", "options", "text"),
    [
        (
            InputValueError,
            {"totals": [1.0, 2.0], "floor": 0.5},
            "floor= is relative to the owners' sum; leave out totals=",
        ),
        (
            InputValueError,
            {"totals": [1.0]},
            "totals=: expected a number for each of 2 slots, got 1",
        ),
        (InputTypeError, {"totals": 3.0}, "totals=: expected a list, got 3.0"),
        (InputValueError, {"floor": 0.0}, "floor=: expected a number in (0, 1], got 0.0"),
        (InputValueError, {"floor": 1.5}, "floor=: expected a number in (0, 1], got 1.5"),
        (InputValueError, {"quorum": 0}, "quorum=: expected an integer of at least 1, got 0"),
        (InputTypeError, {"quorum": 1.5}, "quorum=: expected an integer of at least 1, got 1.5"),
    ],
)
def test_what_no_guard_is(error, options, text):
    c = components()
    assert message(slot_share, c, examples(c), error=error, **options) == text
    assert message(guarded_share, c, examples(c), error=error, **options) == text


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_each_total_is_positive(value):
    c = components()
    with pytest.raises(InputValueError, match=r"^totals=: expected a finite number > 0, got \S+$"):
        slot_share(c, examples(c), totals=[1.0, value])


@pytest.mark.parametrize("total", [0.0, -1.0, float("inf")])
def test_what_no_total_is(total):
    c = components()
    text = f"total: expected a finite number > 0, got {total}"
    assert message(client_share, c, examples(c), total) == text
    assert message(weighted_share, c, "uniform", total) == text


def test_refusals_of_weightings_in_full():
    c = components()
    assert message(weighted_share, c, lambda c: c.weight, 2.0) == (
        "total=: a weighting function gives the coefficients themselves"
    )
    assert message(weighted_share, c, lambda c: -c.weight) == (
        "weighting: expected coefficients that are finite and >= 0"
    )
    assert weighted_share(c, lambda c: c.weight).tolist() == [3.0, 1.0, 1.0]


# --- weight caps --------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1.0, 1e-300, 1e300])
@pytest.mark.parametrize("clients", [1, 2, 3, 4])
def test_caps_by_water_filling(clients, unit):
    every = list(product((0.0, 1.0, 2.0, 7.0), repeat=clients))
    mass = torch.tensor(every, dtype=F64) * unit
    for cap in (1 / clients, 0.26, 0.375, 0.5, 0.6, 0.75, 0.99, 1.0):
        if cap < 1 / clients:
            continue
        found = capped(mass, cap)
        expected = torch.tensor([water_filling(m, cap) for m in every], dtype=F64)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
        assert bool((found <= cap).all())
        assert torch.equal(capped(mass[-1], cap), found[-1])


def cap_of(masses, cap):
    return capped(torch.tensor(masses, dtype=torch.float64), float(cap)).numpy()


@st.composite
def masses_and_cap(draw, most=8):
    masses = draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=most))
    least = Fraction(1, len(masses))
    step = draw(st.integers(0, 64))
    return masses, least + (1 - least) * Fraction(step, 64)


@given(masses_and_cap())
def test_the_cap_is_water_filling(case):
    masses, cap = case
    found, expected = cap_of(masses, cap), water_filling(masses, Fraction(float(cap)))
    # What the capped ones leave is a difference, 1 - cap times their number: its rounding is
    # relative to 1, and what the others get is a part of it.
    left = 1 - float(cap) * sum(share == float(cap) for share in expected)
    lost = 1 / left if left > EPS else 1
    assert np.allclose(found, expected, rtol=4 * len(masses) * EPS * lost, atol=0)
    assert found.max() <= float(cap) * (1 + 4 * EPS)
    assert math.isclose(math.fsum(found), 1, rel_tol=2 * len(masses) * EPS)


@pytest.mark.parametrize("clients", range(1, 60))
def test_a_cap_of_one_over_the_clients_makes_all_equal(clients):
    found = cap_of([2.0**k for k in range(clients)], 1 / clients)
    assert np.allclose(found, 1 / clients, rtol=4 * clients * EPS, atol=0)


def test_the_cap_by_hand():
    # 8 of 10 is above 1/2: t = 2, so 2, 1, 1 of 4
    assert cap_of([8, 1, 1], 0.5).tolist() == [0.5, 0.25, 0.25]
    # 8 and 6 of 16 are above 1/3: both stand at it and the rest fill up the last third
    assert np.allclose(cap_of([8, 6, 1, 1], 1 / 3), [1 / 3, 1 / 3, 1 / 6, 1 / 6], rtol=4 * EPS)
    assert cap_of([8, 1, 1], 0.8).tolist() == [0.8, 0.1, 0.1]
    assert cap_of([8, 1, 1], 1).tolist() == [0.8, 0.1, 0.1]


def test_the_cap_of_equal_masses_treats_them_equally():
    found = cap_of([5, 5, 5, 1], 0.3)
    assert len(set(found[:3])) == 1
    assert math.isclose(found[0], 0.3, rel_tol=4 * EPS)


def test_the_cap_at_the_ends_of_float64():
    assert np.allclose(cap_of([1e308, 1e308, 1e308], 0.5), 1 / 3)
    assert np.allclose(cap_of([1e308, 5e-324, 5e-324], 0.5), [0.5, 0.25, 0.25])
    assert np.allclose(cap_of([1, 0, 0], 0.5), [0.5, 0.25, 0.25])
    assert np.allclose(cap_of([3, 1, 0], 0.4), [0.4, 0.4, 0.2])


def test_the_cap_of_a_batch_is_that_of_each_row():
    rows = torch.tensor([[1.0, 2, 9], [1, 1, 1], [9, 2, 1]], dtype=torch.float64)
    batch = capped(rows.reshape(3, 1, 3), 0.5)
    assert batch.shape == (3, 1, 3)
    for row, found in zip(rows, batch[:, 0], strict=True):
        assert torch.equal(found, capped(row, 0.5))


def test_the_cap_is_as_sharp_as_float64():
    # Once the first stands at .4, the second has .4 (1 + 1e-9 / 3): a hair above it, or below.
    for hair in (1e-9, -1e-9):
        mass = torch.tensor([10.0, 2.0 * (1 + hair), 1.0], dtype=F64)
        expected = torch.tensor(water_filling(mass.tolist(), 0.4), dtype=F64)
        torch.testing.assert_close(capped(mass, 0.4), expected, rtol=1e-15, atol=0)


def test_a_cap_that_nobody_reaches_changes_nothing():
    mass = torch.tensor([5.0, 3.0, 2.0], dtype=F64)
    for cap in (0.5, 0.7, 1.0):
        assert torch.equal(capped(mass, cap), torch.tensor([0.5, 0.3, 0.2], dtype=F64))


@pytest.mark.parametrize(
    ("options", "expected", "slots"),
    [
        ({}, [0.625, 0.375, 1.0], ()),
        ({"floor": 0.5}, [0.625, 0.375, 0.75], ()),
        ({"floor": 0.5, "quorum": 2}, [0.625, 0.375, 0.0], (1,)),
    ],
)
def test_a_cap_comes_before_the_shares(options, expected, slots):
    # Masses 3, 1 under a cap of 5/8: 5, 3. The second owns slot 1 alone.
    c = components()
    share, dropped = guarded_share(c, examples(c), weight_cap=0.625, **options)
    assert share.tolist() == pytest.approx(expected, rel=1e-15)
    assert dropped == slots


def test_what_no_cap_is():
    c = components()
    for cap, shown in ((0.0, "0.0"), (1.5, "1.5"), (float("nan"), "nan")):
        text = f"weight_cap=: expected a number in (0, 1], got {shown}"
        assert message(guarded_share, c, examples(c), weight_cap=cap) == text
    assert message(guarded_share, c, examples(c), weight_cap=0.25) == (
        "weight_cap=: expected at least 1/K = 0.5 for K = 2 clients, since K τ >= 1 or their "
        "fractions cannot add up to 1, got τ = 0.25"
    )
    text = message(guarded_share, c, examples(c), weight_cap=0.5, totals=[4.0, 1.0])
    assert text == (
        "weight_cap= is relative to the weight of those who take part; leave out totals="
    )


# --- norms --------------------------------------------------------------------------------------


def sized(*sizes, layers=(), dtype=F64):
    """Clients of rank 1 with ``ΔW = [[size, 0]]``; in every layer the same."""
    K = len(sizes)
    A = torch.tensor([[1.0, 0.0]], dtype=dtype).expand(*layers, K, 2).clone()
    B = torch.tensor([sizes], dtype=dtype).expand(*layers, 1, K).clone()
    weight, ids = torch.ones(K, dtype=F64), tuple("abcd"[:K])
    return Components(A=A, B=B, ranks=(1,) * K, weight=weight, slots=(0,) * K, ids=ids)


def test_norms_of_all_layers_and_of_each():
    # Client a has 3 and 4 in its two layers, client b 5 and 12.
    c = sized(1.0, 1.0, layers=(2,))
    c = replace(c, B=torch.tensor([[[3.0, 5.0]], [[4.0, 12.0]]], dtype=F64))
    assert layer_update_norm(c).tolist() == [[3.0, 5.0], [4.0, 12.0]]
    assert update_norm(c).tolist() == [5.0, 13.0]
    single = sized(3.0, 4.0)
    assert update_norm(single).tolist() == layer_update_norm(single).tolist() == [3.0, 4.0]


def test_totals_that_are_given_replace_the_batchs_own():
    c = replace(sized(3.0, 4.0), statistic=(torch.tensor([4.0, 9.0], dtype=F64),))
    assert update_norm(c).tolist() == [2.0, 3.0]


def test_a_statistic_may_have_several_parts():
    c = sized(1.0, 2.0, layers=(2,))
    squares, doubled = over_all_layers(
        c, lambda c: (client_squared_norms(c), 2 * client_squared_norms(c))
    )
    assert squares.tolist() == [2.0, 8.0]
    assert doubled.tolist() == [4.0, 16.0]


@pytest.mark.parametrize("layers", [(), (2,)])
@pytest.mark.parametrize(
    ("sizes", "culprit"),
    [
        ((1e-170, 1.0, 1.0), "a"),
        ((1.0, 1e-170, 1.0), "b"),
        ((1.0, 0.0, 1e-170), "c"),
        ((1.0, 1e170, 1.0), "b"),
        ((1.0, 1e170, 1e-170), "b"),
        ((1.0, -1e170, 1.0), "b"),
    ],
)
def test_norms_whose_squares_leave_float64(sizes, culprit, layers):
    assert message(client_squared_norms, sized(*sizes, layers=layers)) == (
        f"update norms: client {culprit!r}: the square of its norm leaves float64; bring the "
        "updates to a usual size"
    )


@pytest.mark.parametrize(("size_A", "size_B"), [(2.0**250, 2.0**-250), (2.0**-250, 2.0**250)])
def test_the_size_that_counts_is_that_of_the_product(size_A, size_B):
    c = sized(3.0 * size_B, 1.0)
    c = replace(c, A=torch.tensor([[size_A, 0.0], [1.0, 0.0]], dtype=F64))
    assert client_squared_norms(c).tolist() == [9.0, 1.0]


def test_two_small_factors_make_a_product_whose_square_is_lost():
    c = sized(2.0**-300, 1.0)
    c = replace(c, A=torch.tensor([[2.0**-300, 0.0], [1.0, 0.0]], dtype=F64))
    assert "client 'a'" in message(client_squared_norms, c)


def test_squares_at_the_very_end_and_zeros_are_fine():
    # 2^-1022 is the smallest normal number.
    assert client_squared_norms(sized(2.0**-511, 0.0)).tolist() == [2.0**-1022, 0.0]
    text = message(client_squared_norms, sized(2.0**-511 * (1 - 2.0**-52), 1.0))
    assert text.startswith("update norms: client 'a'")


@pytest.mark.parametrize("layers", [(), (4,)])
def test_updates_that_cancel_are_not_small(layers):
    # Two components of one client, each of size 1, whose sum is zero.
    c = sized(1.0, -1.0, 1.0, layers=layers)
    c = replace(c, ranks=(2, 1), ids=("a", "b"), weight=torch.ones(2, dtype=F64), slots=(0, 1, 0))
    assert torch.equal(
        client_squared_norms(c), torch.tensor([0.0, 1.0], dtype=F64).expand(*layers, 2)
    )


@pytest.mark.parametrize("size", [1e-38, 1e38])
def test_squares_of_single_precision_always_fit(size):
    c = sized(size, 0.0, dtype=F32)
    assert client_squared_norms(c).tolist() == pytest.approx([size**2, 0.0], rel=1e-6, abs=0)


# --- the device is that of the inputs -----------------------------------------------------------


def test_a_foreign_default_device_does_not_matter():
    c = sized(3.0, 4.0, layers=(2,))
    mass = torch.tensor([3.0, 1.0], dtype=F64)
    with torch.device("meta"):
        found = [
            client_squared_norms(c),
            update_norm(c),
            slot_share(c, mass, totals=[2.0], quorum=1),
            slot_share(c, mass, floor=0.5),
            guarded_share(c, mass, weight_cap=0.625)[0],
            coverage(c, mass),
            top_share(c, mass),
        ]
    for values in found:
        assert values.device == c.A.device
        assert torch.isfinite(values).all()
    assert dropped_slots(c, 3) == (0,)


def test_norms_of_lopsided_factors():
    # A tiny column beside a huge row: the Gram matrices of the two by themselves leave float64.
    lopsided = [(1e100, 1e-200), (1e-200, 1e100), (1e170, 1e-170)]
    for a, b in lopsided:
        c = replace(components(), A=torch.full((3, 2), a, dtype=F64))
        c = replace(c, B=torch.full((2, 3), b, dtype=F64), weight=torch.ones(2, dtype=F64))
        # Client 0 has one component of four equal entries, client 1 two of them.
        expected = [4 * (a * b) ** 2, 16 * (a * b) ** 2]
        assert client_squared_norms(c).tolist() == pytest.approx(expected, rel=1e-14, abs=0.0)
