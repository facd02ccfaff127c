"""Rank self-pruning: the penalty, its gradient, and the decision."""

import math

import numpy as np
import pytest
import torch

from hetlora_agg import InputTypeError, InputValueError, LowRank
from hetlora_agg.clients import prune, tail_penalty
from reference import array
from tolerance import eps

OUT, IN, RANK = 6, 5, 4
F16, F32, F64 = torch.float16, torch.float32, torch.float64


def factors(dtype=F64, layers=(), seed=0, rank=RANK):
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(*layers, rank, IN, generator=g, dtype=F64).to(dtype),
        torch.randn(*layers, OUT, rank, generator=g, dtype=F64).to(dtype),
    )


def by_definition(adapter, keep):
    """‖B[:, keep:]‖ ‖A[keep:]‖, layer by layer."""
    A, B = array(adapter.A), array(adapter.B)
    A, B = A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:])
    return sum(
        np.sqrt((b[:, keep:] ** 2).sum()) * np.sqrt((a[keep:] ** 2).sum())
        for a, b in zip(A, B, strict=True)
    )


@pytest.mark.parametrize("dtype", [F16, F32, F64])
@pytest.mark.parametrize("layers", [(), (2, 3)])
@pytest.mark.parametrize("keep", [0, 1, 3, 4])
def test_the_penalty_by_definition(keep, layers, dtype):
    adapter = factors(dtype, layers)
    found = tail_penalty(adapter, keep)
    assert found.shape == ()
    assert found.dtype == torch.promote_types(dtype, F32)
    expected = by_definition(adapter, keep)
    # float64 sums of at most 24 squares and 6 layers, then one cast
    assert abs(float(found) - expected) <= (eps(found.dtype) + 40 * eps(F64)) * expected


def test_the_penalty_by_hand():
    adapter = LowRank(torch.tensor([[9.0, 9.0], [3.0, 4.0]]), torch.tensor([[9.0, 2.0]]))
    assert float(tail_penalty(adapter, 1)) == 10.0


def test_the_gradient_is_that_of_the_product_of_norms():
    adapter = factors()
    A, B = adapter.A.clone().requires_grad_(), adapter.B.clone().requires_grad_()
    tail_penalty(LowRank(A, B), 1).backward()
    norm_A, norm_B = float(A[1:].detach().norm()), float(B[:, 1:].detach().norm())
    expected_A, expected_B = torch.zeros_like(A), torch.zeros_like(B)
    expected_A[1:] = norm_B / norm_A * A.detach()[1:]
    expected_B[:, 1:] = norm_A / norm_B * B.detach()[:, 1:]
    # two norms of at most 18 entries, a quotient and a product
    gate = 24 * eps(F64)
    assert float((A.grad - expected_A).abs().max()) <= gate * norm_B
    assert float((B.grad - expected_B).abs().max()) <= gate * norm_A
    assert torch.autograd.gradcheck(lambda a, b: tail_penalty(LowRank(a, b), 2), (A, B))


@pytest.mark.parametrize("dtype", [F16, F32, F64])
@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_the_gradient_is_finite_where_a_tail_is_zero(zero, dtype):
    adapter = factors(dtype)
    A, B = adapter.A.clone(), adapter.B.clone()
    if zero in ("A", "both"):
        A[2:] = 0
    if zero in ("B", "both"):
        B[:, 2:] = 0
    A.requires_grad_()
    B.requires_grad_()
    penalty = tail_penalty(LowRank(A, B), 2)
    assert float(penalty.detach()) == 0.0
    penalty.backward()
    for grad in (A.grad, B.grad):
        assert bool(torch.isfinite(grad).all())


def test_one_zero_tail_among_layers_spoils_nothing():
    adapter = factors(layers=(2,))
    A, B = adapter.A.clone(), adapter.B.clone()
    B[0, :, 2:] = 0
    A.requires_grad_()
    B.requires_grad_()
    tail_penalty(LowRank(A, B), 2).backward()
    assert bool(torch.isfinite(A.grad).all() and torch.isfinite(B.grad).all())
    assert bool(A.grad[1, 2:].any())


def test_no_tail_no_penalty():
    A, B = (X.requires_grad_() for X in (factors().A, factors().B))
    penalty = tail_penalty(LowRank(A, B), RANK)
    penalty.backward()
    assert float(penalty.detach()) == 0.0
    assert not A.grad.any()


def test_a_tail_too_small_to_be_squared_in_float32():
    tiny = 1e-25
    adapter = LowRank(torch.full((1, 1), tiny), torch.full((1, 1), 1 / tiny))
    # tiny and 1/tiny rounded to float32, and the product cast to it
    assert float(tail_penalty(adapter, 0)) == pytest.approx(1.0, rel=2 * eps(F32))


@pytest.mark.parametrize("rank", [1, 2, 5, 99, 100, 101, 250])
@pytest.mark.parametrize("decay", [0.99, 0.5, 0.29, 1.0])
@pytest.mark.parametrize("min_rank", [1, 3])
def test_a_faded_tail_is_dropped(rank, decay, min_rank):
    received = LowRank(torch.ones(rank, 2), torch.ones(2, rank))
    trained = LowRank(torch.ones(rank, 2), 0.5 * torch.ones(2, rank))
    # whole numbers, so that floor(0.29 · 100) is 29 and not 28
    keep = max(min_rank, round(100 * decay) * rank // 100)
    expected = min(rank, keep)
    assert prune(trained, received, decay=decay, min_rank=min_rank) == expected
    assert prune(received, trained, decay=decay, min_rank=min_rank) == rank
    assert prune(received, received, decay=decay, min_rank=min_rank) == rank


def test_the_usual_decay_always_drops_one_slot_below_100():
    for rank in range(2, 100):
        received = LowRank(torch.ones(rank, 1), torch.ones(1, rank))
        assert prune(LowRank(0.9 * received.A, received.B), received) == rank - 1


def test_only_the_tail_decides_and_by_the_product():
    received = factors()
    trained = LowRank(received.A.clone(), received.B.clone())
    trained.A[:3] *= 1e-3
    assert prune(trained, received, decay=0.8) == RANK
    # B's tail halves, A's grows by less: the product has faded
    trained.B[:, 3:] *= 0.5
    trained.A[3:] *= 1.9
    assert prune(trained, received, decay=0.8) == 3
    trained.A[3:] *= 2.1 / 1.9
    assert prune(trained, received, decay=0.8) == RANK


def test_layers_decide_together():
    received = factors(layers=(2,))
    trained = LowRank(received.A, received.B.clone())
    trained.B[0] *= 0.9
    trained.B[1] *= 1.1
    smaller = by_definition(trained, 2) < by_definition(received, 2)
    assert prune(trained, received, decay=0.5) == (2 if smaller else RANK)


def test_a_fresh_adapter_is_not_pruned():
    received = LowRank(factors().A, torch.zeros(OUT, RANK, dtype=F64))
    assert prune(factors(seed=1), received) == RANK
    assert prune(received, received) == RANK


def test_inputs_are_left_alone():
    trained, received = factors(seed=1), factors()
    before = [X.clone() for X in (trained.A, trained.B, received.A, received.B)]
    prune(trained, received)
    tail_penalty(trained, 1)
    for X, Y in zip((trained.A, trained.B, received.A, received.B), before, strict=True):
        assert torch.equal(X, Y)


def test_what_does_not_fit():
    with pytest.raises(InputValueError, match="keep: expected at most the adapter's rank 4, got 5"):
        tail_penalty(factors(), 5)
    with pytest.raises(InputValueError, match="keep: expected an integer of at least 0"):
        tail_penalty(factors(), -1)
    with pytest.raises(InputTypeError, match="keep: expected an integer"):
        tail_penalty(factors(), 1.0)
    with pytest.raises(InputTypeError, match="adapter: expected a LowRank"):
        tail_penalty((factors().A, factors().B), 1)
    with pytest.raises(InputValueError, match=r"received: expected A .4, 5. and B .6, 4., got"):
        prune(factors(), factors(rank=3))
    with pytest.raises(InputValueError, match=r"decay: expected a number in \(0, 1\]"):
        prune(factors(), factors(), decay=1.5)
    with pytest.raises(InputValueError, match="min_rank: expected an integer of at least 1"):
        prune(factors(), factors(), min_rank=0)
    bad = factors()
    bad.A[0, 0] = math.nan
    with pytest.raises(InputValueError, match="trained: NaN or Inf"):
        prune(bad, factors())
