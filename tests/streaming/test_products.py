"""Clients that came together, added to a dense sum in steps of any number of layers."""

import pytest
import torch

from hetlora_agg.streaming import products
from hetlora_agg.streaming.products import Product


def product_of(leading, rank, out=5, columns=6, dtype=torch.float32):
    """Factors with masses and the exact sum of their products, component by component."""
    g = torch.Generator().manual_seed(rank)
    A = torch.randn(*leading, rank, columns, generator=g, dtype=dtype)
    B = torch.randn(*leading, out, rank, generator=g, dtype=dtype)
    mass = torch.rand(*leading, rank, generator=g, dtype=torch.float64)
    exact = torch.zeros(*leading, out, columns, dtype=torch.float64)
    for j in range(rank):
        outer = B[..., :, j, None].double() * A[..., j, None, :].double()
        exact += mass[..., j, None, None] * outer
    return Product(A, B, mass), exact


@pytest.mark.parametrize("together", [0, 1_500, 2**20])
@pytest.mark.parametrize("leading", [(7,), (3, 2), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_step_gives_the_sum(together, leading, dtype, monkeypatch):
    monkeypatch.setitem(products.FACTOR_BYTES, "cpu", together)
    product, exact = product_of(leading, 4, dtype=dtype)
    total = torch.ones(*leading, 5, 6, dtype=torch.float64)
    add = product.adding_to(total)
    assert bool((total == 1).all())
    for times in (1, 2):
        add()
        assert torch.allclose(total, 1 + times * exact, rtol=0, atol=1e-14)
    A, B = product.factors().A, product.factors().B
    assert torch.allclose(B @ A, exact, rtol=0, atol=1e-14)


def test_what_adding_takes_is_there_beforehand(monkeypatch):
    # Four steps of one layer, of a size that BLAS multiplies.
    monkeypatch.setitem(products.FACTOR_BYTES, "cpu", 1)
    product, _ = product_of((4,), 16, 96, 128)
    total = torch.zeros(4, 96, 128, dtype=torch.float64)
    before, add = allocated(lambda: product.adding_to(total))
    assert before >= 8 * 16 * (96 + 128)
    assert allocated(add)[0] <= 16


def allocated(call):
    """Bytes that torch asks for in a call, and what it returns."""
    with torch.profiler.profile(profile_memory=True) as seen:
        result = call()
    return sum(max(0, event.self_cpu_memory_usage) for event in seen.events()), result


def test_factors_in_any_order_of_memory_are_added():
    product, exact = product_of((3, 2), 4, dtype=torch.float64)
    turned = Product(
        product.A.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
        product.B.mT.contiguous().mT,
        product.mass.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not turned.A.is_contiguous()
    total = torch.zeros(3, 2, 5, 6, dtype=torch.float64)
    turned.adding_to(total)()
    assert torch.allclose(total, exact, rtol=0, atol=1e-14)
