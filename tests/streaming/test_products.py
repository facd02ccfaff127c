"""Clients that came together, added to a dense sum in steps of any number of layers."""

import pytest
import torch

from hetlora_agg.streaming import products
from hetlora_agg.streaming.products import Product


def product_of(leading, ranks, dtype=torch.float32):
    """Factors of some clients and the exact sum of their products, entry by entry."""
    g = torch.Generator().manual_seed(sum(ranks))
    A = tuple(torch.randn(*leading, r, 6, generator=g, dtype=dtype) for r in ranks)
    B = tuple(torch.randn(*leading, 5, r, generator=g, dtype=dtype) for r in ranks)
    mass = torch.rand(*leading, sum(ranks), generator=g, dtype=torch.float64)
    exact = torch.zeros(*leading, 5, 6, dtype=torch.float64)
    for place, (k, i) in enumerate((k, i) for k, r in enumerate(ranks) for i in range(r)):
        outer = B[k][..., :, i, None].double() * A[k][..., i, None, :].double()
        exact += mass[..., place, None, None] * outer
    return Product(A, B, mass), exact


@pytest.mark.parametrize("at_once", [0, 1_500, 2**20])
@pytest.mark.parametrize("leading", [(7,), (3, 2), (1,)])
@pytest.mark.parametrize("ranks", [(2, 3, 4), (4,), (3, 0, 1), (0,)])
def test_any_step_gives_the_sum(at_once, leading, ranks, monkeypatch):
    monkeypatch.setitem(products.AT_ONCE, "cpu", at_once)
    product, exact = product_of(leading, ranks)
    total = torch.ones(*leading, 5, 6, dtype=torch.float64)
    add = product.adding_to(total)
    assert bool((total == 1).all())
    for times in (1, 2):
        add()
        assert torch.allclose(total, 1 + times * exact, rtol=0, atol=1e-14)
    A, B = product.factors().A, product.factors().B
    assert torch.allclose(B @ A, exact, rtol=0, atol=1e-14)


def test_what_adding_allocates_is_small_and_there_beforehand(monkeypatch):
    # Ten steps of one layer: room for one, and nothing while it adds.
    monkeypatch.setitem(products.AT_ONCE, "cpu", 1)
    product, _ = product_of((10,), (2, 3))
    add = product.adding_to(torch.zeros(10, 5, 6, dtype=torch.float64))
    with torch.profiler.profile(profile_memory=True) as seen:
        add()
    assert sum(max(0, event.self_cpu_memory_usage) for event in seen.events()) <= 16


def test_clients_whose_layers_are_not_contiguous_are_added():
    product, exact = product_of((4,), (3, 2), torch.float64)
    turned = Product(
        tuple(A.mT.contiguous().mT for A in product.A),
        tuple(B.mT.contiguous().mT for B in product.B),
        product.mass,
    )
    total = torch.zeros(4, 5, 6, dtype=torch.float64)
    turned.adding_to(total)()
    assert torch.allclose(total, exact, rtol=0, atol=1e-14)
