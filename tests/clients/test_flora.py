"""Merge and restart: the base takes the update, the adapter is a fresh LoRA."""

import math

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, InputTypeError, InputValueError, LowRank, aggregate
from hetlora_agg.clients import merge_and_restart
from reference import array, total
from tolerance import distance, eps

OUT, IN = 6, 5
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def updates(dtype=F64, layers=()):
    g = generator(1)
    return [
        ClientUpdate(
            torch.randn(*layers, r, IN, generator=g, dtype=F64).to(dtype),
            torch.randn(*layers, OUT, r, generator=g, dtype=F64).to(dtype),
            weight=r,
            scaling=0.5,
        )
        for r in (1, 3)
    ]


def weight(dtype=F64, layers=()):
    return torch.randn(*layers, OUT, IN, generator=generator(2), dtype=F64).to(dtype)


@pytest.mark.parametrize("method", ["flora", "flexlora"])
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("layers", [(), (2, 3)])
def test_the_weight_takes_the_whole_update(layers, dtype, method):
    base = weight(dtype, layers)
    if method == "flora":
        result = aggregate(updates(F32, layers), "flora")
    else:
        # a method that leaves a residual beside its factors
        result = aggregate(updates(F32, layers), "flexlora", rank=1, fold_rest=True)
        assert result.residual is not None
    restart = merge_and_restart(base, result, 2, generator=generator())
    expected = array(base.double()) + total(result)
    R = result.total().rank
    size = np.linalg.norm(array(result.total().A)) * np.linalg.norm(array(result.total().B))
    # R products and their sum in float32, the addition, and the cast to the weight's dtype
    gate = (R + 1) * eps(F32) * size + eps(dtype) * np.linalg.norm(expected)
    assert distance(restart.weight.double(), expected) <= gate
    assert restart.weight.dtype == dtype
    assert restart.adapter.A.dtype == F32


def test_worked_by_hand():
    base = torch.tensor([[1.0, 2.0]])
    update = LowRank(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]))
    restart = merge_and_restart(base, update, 1, generator=generator())
    assert restart.weight.tolist() == [[7.0, 10.0]]
    assert base.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("layers", [(), (2,)])
def test_the_adapter_is_a_fresh_lora(layers):
    result = aggregate(updates(F64, layers), "flora")
    adapter = merge_and_restart(weight(F64, layers), result, 600, generator=generator()).adapter
    assert adapter.A.shape == (*layers, 600, IN)
    assert adapter.B.shape == (*layers, OUT, 600)
    assert not adapter.B.any()
    bound, n = 1 / math.sqrt(IN), adapter.A.numel()
    assert float(adapter.A.abs().max()) <= bound
    # mean 0 and variance 1/3 of a uniform on (-1, 1), six standard errors
    rows = adapter.A / bound
    assert abs(float(rows.mean())) <= 6 * math.sqrt(1 / 3 / n)
    assert abs(float(rows.square().mean()) - 1 / 3) <= 6 * math.sqrt(4 / 45 / n)


def test_the_generator_decides_and_ranks_agree_on_their_slots():
    result, before = aggregate(updates(), "flora"), torch.get_rng_state()
    small, large = (
        merge_and_restart(weight(), result, r, generator=generator(5)).adapter for r in (2, 4)
    )
    other = merge_and_restart(weight(), result, 2, generator=generator(6)).adapter
    assert torch.equal(small.A, large.A[:2])
    assert not torch.equal(small.A, other.A)
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_are_left_alone():
    base, result = weight(), aggregate(updates(), "flora")
    before = base.clone(), result.A.clone(), result.B.clone()
    restart = merge_and_restart(base, result, 2, generator=generator())
    restart.weight.fill_(0)
    assert all(torch.equal(X, Y) for X, Y in zip((base, result.A, result.B), before, strict=True))


def test_a_weight_that_is_trained_elsewhere_records_nothing():
    base = weight().requires_grad_()
    restart = merge_and_restart(base, aggregate(updates(), "flora"), 2, generator=generator())
    assert not restart.weight.requires_grad


def test_what_does_not_fit():
    result = aggregate(updates(), "flora")
    with pytest.raises(InputValueError, match=r"= \(5, 6\) as the weight has, got \(6, 5\)"):
        merge_and_restart(weight().mT, result, 2, generator=generator())
    with pytest.raises(InputTypeError, match="weight: expected a floating torch tensor"):
        merge_and_restart(weight().to(torch.int8), result, 2, generator=generator())
    with pytest.raises(InputTypeError, match="result: expected a LowRank"):
        merge_and_restart(weight(), weight(), 2, generator=generator())
    with pytest.raises(InputValueError, match="rank: expected an integer of at least 1, got 0"):
        merge_and_restart(weight(), result, 0, generator=generator())
    with pytest.raises(InputTypeError, match=r"expected a torch.Generator"):
        merge_and_restart(weight(), result, 2, generator=None)
    wrong = LowRank(torch.full((1, IN), torch.inf, dtype=F64), torch.ones(OUT, 1, dtype=F64))
    with pytest.raises(InputValueError, match="NaN or Inf"):
        merge_and_restart(weight(), wrong, 2, generator=generator())
