"""Alignment of one round's factors to the last one's: another basis, the same update."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import (
    METHODS,
    ClientUpdate,
    InputTypeError,
    InputValueError,
    LowRank,
    aggregate,
    align_rounds,
    distribute,
)
from reference import dense
from states import run
from tolerance import distance

F32, F64 = torch.float32, torch.float64
OUT, IN = 9, 7


def clients(seed=0, layers=(), dtype=F64, ranks=(3, 3)):
    g = torch.Generator().manual_seed(seed)
    return [
        ClientUpdate(
            torch.randn(*layers, r, IN, generator=g, dtype=F64).to(dtype),
            torch.randn(*layers, OUT, r, generator=g, dtype=F64).to(dtype),
        )
        for r in ranks
    ]


def size(factors):
    return float(torch.as_tensor(factors.B).norm() * torch.as_tensor(factors.A).norm())


def misfit(factors, last):
    """‖B − B_prev‖² + ‖A − A_prev‖²."""
    return float((factors.B - last.B).square().sum() + (factors.A - last.A).square().sum())


def rotation(rank, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rank, rank, generator=g, dtype=F64)).Q


@pytest.mark.parametrize("by", ["rotation", "signs"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("layers", [(), (2, 2)])
def test_the_product_does_not_change(by, dtype, layers):
    result = aggregate(clients(0, layers, dtype), "flexlora")
    last = aggregate(clients(1, layers, dtype), "flexlora")
    aligned = align_rounds(result, last, by)
    assert aligned.A.dtype == dtype
    # a rotation of each factor is one product of r terms, rounded once into the dtype
    gate = 4 * torch.finfo(dtype).eps * size(result)
    assert distance(dense(aligned.factors), dense(result.factors)) <= gate
    assert misfit(aligned.factors, last) <= misfit(result.factors, last) * (1 + 1e-6)


def test_no_rotation_comes_nearer():
    result, last = (aggregate(clients(seed), "flexlora") for seed in (0, 1))
    best = misfit(align_rounds(result, last).factors, last)
    for seed in range(200):
        Q = rotation(3, seed)
        turned = LowRank(Q.mT @ result.A, result.B @ Q)
        assert best <= misfit(turned, last) * (1 + 1e-12)
    for signs in np.ndindex(2, 2, 2):
        sign = 1.0 - 2 * torch.tensor(signs, dtype=F64)
        flipped = LowRank(sign[:, None] * result.A, sign * result.B)
        by_signs = misfit(align_rounds(result, last, "signs").factors, last)
        assert by_signs <= misfit(flipped, last) * (1 + 1e-12)
        assert best <= by_signs


def test_last_rounds_own_factors_in_another_basis_come_back():
    last = aggregate(clients(), "flexlora")
    Q = rotation(3, 5)
    turned = align_rounds(
        aggregate([(Q.mT @ last.A, last.B @ Q)], "flora"), LowRank(last.A, last.B)
    )
    torch.testing.assert_close(turned.A, last.A, rtol=0, atol=1e-13)
    torch.testing.assert_close(turned.B, last.B, rtol=0, atol=1e-13)


def test_signs_by_hand():
    result = aggregate([(torch.eye(2), torch.diag(torch.tensor([4.0, 2.0])))], "flexlora")
    last = LowRank(torch.tensor([[-1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-9.0, 0], [0, 1]]))
    aligned = align_rounds(result, last, "signs")
    # component 0 points against last round's in both factors, component 1 does not
    assert torch.equal(aligned.A, torch.tensor([[-1.0], [1.0]]) * result.A)
    assert torch.equal(aligned.B, torch.tensor([-1.0, 1.0]) * result.B)
    assert aligned.nested
    assert torch.equal(aligned.singular_values, result.singular_values)


def test_a_rotation_gives_up_nesting_and_says_so():
    result, last = (aggregate(clients(seed), "flexlora") for seed in (0, 1))
    aligned = align_rounds(result, last)
    assert not aligned.nested
    assert aligned.singular_values is None
    assert len(distribute(aligned, [3, 3])) == 2
    with pytest.raises(InputValueError, match="leading components are not an answer"):
        distribute(aligned, [2, 3])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_rotation_is_for_methods_whose_slots_mean_nothing(name):
    result = run(clients(), name)
    last = LowRank(torch.ones(3, IN, dtype=F64), torch.ones(OUT, 3, dtype=F64))
    if result.shared != {"A", "B"}:
        # the client's own factor would keep the old sign
        with pytest.raises(InputValueError, match="one factor of this result stays"):
            align_rounds(result, last, "signs")
        return
    signed = align_rounds(result, last, "signs")
    assert distance(dense(signed.factors), dense(result.factors)) <= 1e-15 * size(result)
    if result.slotted:
        with pytest.raises(InputValueError, match="use by='signs'"):
            align_rounds(result, last)
    else:
        turned = align_rounds(result, last)
        assert distance(dense(turned.factors), dense(result.factors)) <= 1e-14 * size(result)


def test_why_slots_are_not_rotated():
    # a client of rank 1 would be handed less than the best rank-1 piece, by signs it is not
    whole = aggregate(clients(ranks=(3,)), "rb")
    last = aggregate(clients(1, ranks=(3,)), "rb")
    best = float(whole.singular_values[0])
    turned = align_rounds(replace(whole, slotted=False), last).factors
    signed = align_rounds(whole, last, "signs").factors
    pieces = [np.linalg.norm(dense(f.select(slice(0, 1)))) for f in (turned, signed)]
    assert pieces[0] < 0.9 * best
    assert abs(pieces[1] - best) <= 1e-13 * best


@pytest.mark.parametrize("rank", [1, 5])
def test_last_round_may_have_had_another_rank(rank):
    result = aggregate(clients(), "flexlora")
    last = aggregate(clients(1, ranks=(5,)), "flexlora", rank=rank)
    aligned = align_rounds(result, last)
    assert aligned.rank == 3
    assert distance(dense(aligned.factors), dense(result.factors)) <= 1e-14 * size(result)


def test_numpy_stays_numpy():
    arrays = [(u.A.numpy(), u.B.numpy()) for u in clients()]
    result = aggregate(arrays, "flexlora")
    aligned = align_rounds(result, result)
    assert isinstance(aligned.A, np.ndarray)
    np.testing.assert_allclose(aligned.A, result.A, atol=1e-13)


def test_what_does_not_fit_is_refused():
    result = aggregate(clients(), "flexlora")
    with pytest.raises(InputTypeError, match="expected an AggregationResult, got LowRank"):
        align_rounds(result.factors, result)
    with pytest.raises(InputValueError, match=r"by=.*known: \['rotation', 'signs'"):
        align_rounds(result, result, "rotations")
    with pytest.raises(InputValueError, match=r"previous=: expected .*\(9, 7\).*got \(7, 9\)"):
        align_rounds(result, LowRank(result.B.mT, result.A.mT))
    with pytest.raises(InputTypeError, match="previous=: expected a LowRank"):
        align_rounds(result, None)
