"""Importance, the slots it chooses and the bits it allots."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetlora_agg import InputTypeError, InputValueError, LowRank
from hetlora_agg.clients import allot_bits, importance, important_slots
from reference import array
from tolerance import eps

OUT, IN, RANK = 6, 5, 4
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def factors(seed, layers=(), dtype=F64):
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(*layers, RANK, IN, generator=g, dtype=F64).to(dtype),
        torch.randn(*layers, OUT, RANK, generator=g, dtype=F64).to(dtype),
    )


def by_definition(weights, gradients):
    """Σ |w ∂w| over row j of A and column j of B, one component at a time."""
    A, B, dA, dB = (array(X.double()) for p in (weights, gradients) for X in (p.A, p.B))
    scores = [
        np.abs(A[..., j, :] * dA[..., j, :]).sum(-1) + np.abs(B[..., j] * dB[..., j]).sum(-1)
        for j in range(RANK)
    ]
    return np.stack(scores, axis=-1)


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("layers", [(), (2, 3)])
@pytest.mark.parametrize("decay", [0.85, 0.5])
def test_importance_is_a_moving_average(decay, layers, dtype):
    scores, expected = None, None
    for step in range(4):
        weights, gradients = factors(step, layers, dtype), factors(10 + step, layers, dtype)
        scores = importance(weights, gradients, scores, decay=decay)
        now = by_definition(weights, gradients)
        expected = now if expected is None else decay * expected + (1 - decay) * now
    assert scores.shape == (*layers, RANK)
    assert scores.dtype == torch.promote_types(dtype, F32)
    # a product, a sum of 11 positive terms and three operations of the average
    assert np.abs(array(scores) - expected).max() <= 16 * eps(scores.dtype) * expected.max()


def test_importance_by_hand():
    weights = LowRank(torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([[4.0, 5.0]]))
    gradients = LowRank(torch.tensor([[2.0, 1.0], [9.0, -1.0]]), torch.tensor([[-1.0, 0.0]]))
    # |1·2| + |−2·1| + |4·−1| = 8 and |0·9| + |3·−1| + |5·0| = 3
    first = importance(weights, gradients)
    assert first.tolist() == [8.0, 3.0]
    # ¾ (8, 3) + ¼ (0, 0)
    still = LowRank(0 * gradients.A, 0 * gradients.B)
    assert importance(weights, still, first, decay=0.75).tolist() == [6.0, 2.25]
    assert first.tolist() == [8.0, 3.0]


def test_importance_records_no_gradients():
    weights = factors(0)
    weights.A.requires_grad_()
    assert not importance(weights, factors(1)).requires_grad


def test_importance_of_what_does_not_fit():
    weights, gradients = factors(0), factors(1)
    with pytest.raises(InputValueError, match=r"gradients: expected A .4, 5. and B .6, 4., got"):
        importance(weights, gradients.select(slice(2)))
    with pytest.raises(InputValueError, match=r"earlier: expected \(\*layers, rank\) = \(4,\)"):
        importance(weights, gradients, torch.ones(3))
    with pytest.raises(InputTypeError, match="earlier: expected a tensor or None"):
        importance(weights, gradients, [1.0] * 4)
    with pytest.raises(InputValueError, match="decay: expected a number"):
        importance(weights, gradients, decay=0.0)
    with pytest.raises(InputTypeError, match="weights: expected a LowRank"):
        importance((weights.A, weights.B), gradients)


# --- slots --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([1.0, 5.0, 2.0, 7.0], 2, (1, 3)),
        ([5.0, 1.0, 7.0, 2.0], 4, (0, 1, 2, 3)),
        ([2.0, 2.0, 2.0], 2, (0, 1)),
        ([1.0, 2.0, 2.0, 2.0], 2, (1, 2)),
        ([0.0], 1, (0,)),
        # layers are summed: 1+8, 5+1, 6+2
        ([[1.0, 5.0, 6.0], [8.0, 1.0, 2.0]], 2, (0, 2)),
    ],
)
def test_the_most_important_slots(scores, count, expected):
    assert important_slots(torch.tensor(scores), count) == expected


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_no_slot_left_out_is_better_than_one_chosen(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    chosen = important_slots(torch.tensor(scores, dtype=F64), count)
    # Python's own sort of (score descending, slot ascending)
    best = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count]
    assert chosen == tuple(sorted(best))


def test_slots_that_cannot_be_chosen():
    scores = torch.ones(3)
    with pytest.raises(InputValueError, match=r"count: expected at most the 3 slots.*got 4"):
        important_slots(scores, 4)
    with pytest.raises(InputValueError, match="count: expected an integer of at least 1"):
        important_slots(scores, 0)
    with pytest.raises(InputTypeError, match="scores: expected a floating torch tensor"):
        important_slots([1.0], 1)
    with pytest.raises(InputValueError, match="NaN or Inf"):
        important_slots(torch.tensor([1.0, torch.nan]), 1)
    with pytest.raises(InputValueError, match=r"expected \(\*layers, rank\), got \(\)"):
        important_slots(torch.tensor(1.0), 1)


# --- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "budget", "choices", "expected"),
    [
        # 16 bits for four: 2 each leaves 8; the best takes 6 of them, the next 2, then none
        ([1.0, 9.0, 5.0, 0.0], 4, (2, 4, 8), (2, 8, 4, 2)),
        ([1.0, 9.0, 5.0, 0.0], 8, (2, 4, 8), (8, 8, 8, 8)),
        ([1.0, 9.0, 5.0, 0.0], 2, (8, 2, 4), (2, 2, 2, 2)),
        # 2 each leaves 2: not enough for 8, enough for one 4
        ([3.0, 3.0], 3, (2, 4, 8), (4, 2)),
        ([float(10 - j) for j in range(10)], 3.3, (2, 3, 4), (4,) * 6 + (3,) + (2,) * 3),
        # 2.28 · 25 is 57 bits in decimals and 56.99… in binary: 7 beyond the twos
        ([1.0] * 25, 2.28, (2, 3), (3,) * 7 + (2,) * 18),
        ([[1.0, 0.0], [0.0, 5.0]], 3, (2, 4), (2, 4)),
    ],
)
def test_bits_by_hand(scores, budget, choices, expected):
    assert allot_bits(torch.tensor(scores), budget, choices) == expected


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=30),
    st.sets(st.integers(1, 16), min_size=1, max_size=5),
    st.floats(1, 20),
)
def test_the_budget_holds_and_the_more_important_get_more(scores, choices, budget):
    if budget < min(choices):
        return
    bits = allot_bits(torch.tensor(scores, dtype=F64), budget, sorted(choices))
    assert len(bits) == len(scores)
    assert set(bits) <= choices
    assert sum(bits) / len(bits) <= budget
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    assert [bits[j] for j in order] == sorted(bits, reverse=True)
    # greedy: nobody could have had the next choice with the later ones at the smallest
    spent, rank = 0, len(bits)
    for place, slot in enumerate(order):
        higher = [b for b in choices if b > bits[slot]]
        if higher:
            others = (rank - place - 1) * min(choices)
            assert (spent + min(higher) + others) / rank > budget * (1 - eps(F64))
        spent += bits[slot]


def test_bits_that_cannot_be_allotted():
    scores = torch.ones(3)
    with pytest.raises(InputValueError, match=r"smallest of choices \[2, 4, 8\], got 1.5"):
        allot_bits(scores, 1.5)
    with pytest.raises(InputValueError, match="choices: expected 1 to 16 bits, got 17"):
        allot_bits(scores, 4, (2, 17))
    with pytest.raises(InputValueError, match="budget: expected at least"):
        allot_bits(scores, 4, ())
    with pytest.raises(InputTypeError, match="choices: expected an integer"):
        allot_bits(scores, 4, (2.5,))
    with pytest.raises(InputValueError, match="budget: expected a finite number > 0"):
        allot_bits(scores, 0)
