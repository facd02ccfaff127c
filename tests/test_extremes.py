"""Extreme sizes, odd slots, a method's own workspace: nothing is lost or exceeded silently."""

import pytest
import torch

from hetlora_agg import (
    METHODS,
    ClientUpdate,
    InputTypeError,
    InputValueError,
    LowRank,
    MemoryLimitError,
    aggregate,
)
from hetlora_agg.clients import merge_and_restart, prune, server_variate, sketch
from hetlora_agg.weighting import client_squared_norms
from states import fitting, run

F32, F64 = torch.float32, torch.float64


def clients(size, dtype, ranks=(2, 2)):
    g = torch.Generator().manual_seed(3)
    return [
        ClientUpdate(
            torch.randn(r, 5, generator=g, dtype=F64).mul(size).to(dtype),
            torch.randn(6, r, generator=g, dtype=F64).mul(size).to(dtype),
            weight=k + 1,
            id=k,
        )
        for k, r in enumerate(ranks)
    ]


def scaled_product(result, size):
    return (result.B.double() / size) @ (result.A.double() / size)


def name_needs_norms(name):
    """Whether the clients' weights are the norms of their updates, whose squares must fit."""
    return METHODS[name].statistic is client_squared_norms


@pytest.mark.parametrize(
    ("dtype", "size"), [(F32, 2.0**-90), (F32, 2.0**40), (F64, 2.0**-330), (F64, 2.0**330)]
)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_unit_does_not_matter(name, dtype, size):
    # factors are far inside the dtype, their products at its edge or beyond it
    usual = scaled_product(run(clients(1.0, dtype), name), 1.0)
    if dtype == F64 and name_needs_norms(name):
        with pytest.raises(InputValueError, match="leaves float64"):
            run(clients(size, dtype), name)
        return
    found = scaled_product(run(clients(size, dtype), name), size)
    tolerance = 100 * torch.finfo(dtype).eps * usual.norm()
    assert (found - usual).norm() <= tolerance


def test_ties_near_the_end_of_float64():
    s = 1e77
    update = ClientUpdate(torch.full((1, 2), s, dtype=F64), torch.full((2, 1), s, dtype=F64))
    assert float(aggregate([update], "ties").singular_values[0]) == pytest.approx(2e154, rel=1e-12)


def test_fedhl_knows_which_components_a_client_had():
    last = LowRank(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3))
    idle = ClientUpdate(last.A[[1]], last.B[:, [1]], slots=[1])
    result = aggregate([idle], "fedhl", previous=last, rank="full")
    torch.testing.assert_close(result.factors.dense(), last.dense())


def test_fedrot_leaves_components_in_their_slots():
    eye = torch.eye(3)
    updates = [ClientUpdate(eye[[0]], eye[:, [0]], slots=[2]), ClientUpdate(eye, eye)]
    first = aggregate(updates, "fedrot", previous=None, round=1)
    later = aggregate(updates, "fedrot", previous=LowRank(eye, eye), round=3, strength=0.0)
    torch.testing.assert_close(later.factors.dense(), first.factors.dense())
    beyond = ClientUpdate(eye[[0]], eye[:, [0]], slots=[2], id="c")
    with pytest.raises(InputValueError, match=r"client 'c' has slot 2 \(from 0\), above the ref"):
        aggregate([beyond], "fedrot", previous=LowRank(eye[:2], eye[:, :2]), round=1)


@pytest.mark.parametrize("name", [n for n, e in METHODS.items() if e.workspace is not None])
def test_a_methods_own_workspace_counts_against_the_limit(name):
    g = torch.Generator().manual_seed(0)
    updates = [
        (torch.randn(64, 512, generator=g), torch.randn(512, 64, generator=g)) for _ in range(12)
    ]
    run(fitting(name, updates), name, memory_limit=10**9)
    with pytest.raises(MemoryLimitError, match="for one layer at a time"):
        run(updates, name, memory_limit=10**8)
    run(updates, "rb", memory_limit=10**8)


@pytest.mark.parametrize("bad", [torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3).to("meta")])
def test_previous_that_is_no_floating_tensor(bad):
    updates = [(torch.ones(2, 3), torch.ones(4, 2))]
    B = torch.ones(4, 2, dtype=bad.dtype, device=bad.device)
    with pytest.raises(InputTypeError, match="previous=: expected factors of floating dtype, got"):
        aggregate(updates, "rb", previous=LowRank(bad, B))


def test_clients_halves_let_no_nan_or_inf_through():
    g = torch.Generator().manual_seed(0)
    large = LowRank(torch.full((1, 2), 100.0), torch.full((2, 1), 100.0))
    with pytest.raises(InputValueError, match=r"merged weight has entries beyond torch.float16"):
        merge_and_restart(torch.full((2, 2), 6e4, dtype=torch.float16), large, 1, generator=g)
    with pytest.raises(InputValueError, match="weight: NaN or Inf"):
        merge_and_restart(torch.full((2, 2), torch.nan), large, 1, generator=g)
    zero = LowRank(torch.zeros(1, 2), torch.zeros(2, 1))
    with pytest.raises(InputValueError, match="NaN or Inf"):
        server_variate(zero, [LowRank(torch.full((1, 2), torch.nan), zero.B)], clients=4)


def test_pruning_at_the_ends_of_float64():
    for size in (1e-170, 1e170):
        received = LowRank(torch.full((4, 3), size, dtype=F64), torch.full((3, 4), size, dtype=F64))
        trained = LowRank(received.A, received.B * torch.tensor([1.0, 1.0, 0.1, 0.1]))
        assert prune(trained, received, decay=0.5) == 2
        assert prune(received, received, decay=0.5) == 4


def test_a_sketch_of_padded_factors_is_of_the_declared_rank():
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    A[1] = 0
    omega = torch.eye(3)
    whole = sketch(ClientUpdate(A[:1], B[:, :1]), omega)
    assert torch.equal(sketch(ClientUpdate(A, B, rank=1), omega), whole)
