"""Combine: what lands in which slot, in which dtype, on which device, and what is refused."""

import numpy as np
import pytest
import torch

from hetlora_agg import InputValueError, LowRank
from hetlora_agg.combining import (
    average_factors,
    carry_over,
    carry_over_slots,
    cast_balanced,
    common_columns,
    common_rows,
    stack,
)
from hetlora_agg.components import Components

F16, F32, F64 = torch.float16, torch.float32, torch.float64
RANKS, SLOTS, SHARES = (1, 2, 2), (0, 0, 1, 2, 0), (0.5, 0.25, 1.0, 2.0, 0.25)
"""Three clients; the last one fills the slots 2 and 0, in that order."""


def components(ranks=RANKS, slots=SLOTS, layers=(), dtype=F64, seed=0):
    """Small integers over 8: every sum and product of theirs with SHARES is exact."""
    g = torch.Generator().manual_seed(seed)
    R = sum(ranks)
    return Components(
        A=torch.randint(-8, 9, (*layers, R, 4), generator=g).to(dtype) / 8,
        B=torch.randint(-8, 9, (*layers, 3, R), generator=g).to(dtype) / 8,
        ranks=ranks,
        weight=torch.ones(len(ranks), dtype=F64),
        slots=slots,
        ids=tuple(range(len(ranks))),
    )


def layerwise(share, layers):
    """The shares of each layer: the given ones, halved from layer to layer."""
    if not layers:
        return torch.tensor(share, dtype=F64)
    return torch.tensor([[x / 2**i for x in share] for i in range(layers[0])], dtype=F64)


def previous_of(rank, layers=(), dtype=F64):
    """Components that differ from each other and from those of the clients."""
    A = 100 + torch.arange(rank * 4, dtype=dtype).reshape(rank, 4).expand(*layers, rank, 4)
    B = 200 + torch.arange(rank * 3, dtype=dtype).reshape(3, rank).expand(*layers, 3, rank)
    return LowRank(A, B)


def message(call, *arguments):
    with pytest.raises(InputValueError) as caught:
        call(*arguments)
    return str(caught.value)


# --- stack and average --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("layers", [(), (2,), (5,)])
def test_a_stack_scales_each_component_by_its_share(layers, dtype):
    # Five layers are as many as there are components: no dimension fits another's place by luck.
    c, share = components(layers=layers, dtype=dtype), layerwise(SHARES, layers)
    stacked = stack(c, share)
    assert stacked.A.dtype == stacked.B.dtype == dtype
    assert torch.equal(stacked.B, c.B)
    expected = np.einsum("...r,...ri->...ri", share.numpy(), c.A.double().numpy())
    np.testing.assert_array_equal(stacked.A.double().numpy(), expected)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("layers", [(), (2,), (5,)])
def test_an_average_sums_shares_of_each_slot(layers, dtype):
    c, share = components(layers=layers, dtype=dtype), layerwise(SHARES, layers)
    averaged = average_factors(c, share)
    assert averaged.A.dtype == averaged.B.dtype == dtype
    A, B, p = c.A.double().numpy(), c.B.double().numpy(), share.numpy()
    for slot in range(3):
        filled = [j for j, own in enumerate(SLOTS) if own == slot]
        row = sum(p[..., j, None] * A[..., j, :] for j in filled)
        column = sum(p[..., j, None] * B[..., :, j] for j in filled)
        np.testing.assert_array_equal(averaged.A[..., slot, :].double().numpy(), row)
        np.testing.assert_array_equal(averaged.B[..., :, slot].double().numpy(), column)


@pytest.mark.parametrize("combine", [stack, average_factors])
def test_one_share_serves_all_layers(combine):
    c = components(layers=(2,))
    together = combine(c, torch.tensor(SHARES, dtype=F64))
    repeated = combine(c, torch.tensor([SHARES, SHARES], dtype=F64))
    assert torch.equal(together.A, repeated.A)
    assert torch.equal(together.B, repeated.B)


@pytest.mark.parametrize("combine", [stack, average_factors])
@pytest.mark.parametrize(
    ("share", "found"),
    [
        (torch.ones(3), "(3,)"),
        (torch.ones(5, 1), "(5, 1)"),
        (torch.tensor(1.0), "()"),
        ([1.0] * 5, "list"),
        (np.ones(5), "ndarray"),
    ],
)
def test_a_mass_is_no_share(combine, share, found):
    assert message(combine, components(), share) == (
        "share: expected a tensor (*layers, R) with R = 5 components, got "
        f"{found}; client_share and slot_share make one of a mass"
    )


# --- one size for both factors ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_A", "size_B", "expected"),
    [
        # The ratio's root, or the power of two next to it; of two as near the even one.
        (2.0**-20, 2.0**20, 1.0),
        (2.0**20, 2.0**-20, 1.0),
        (0.25, 0.0625, 0.125),
        (1.0, 8.0, 4.0),
        (8.0, 1.0, 2.0),
        (1.0, 2.0, 1.0),
        (1.0, 1.0, 1.0),
        (3.0, 3.0 * 2**10, 96.0),
    ],
)
def test_balancing_moves_a_power_of_two(size_A, size_B, expected):
    pair = LowRank(torch.tensor([[-size_A, size_A / 2]]), torch.tensor([[size_B / 4], [size_B]]))
    found = cast_balanced(pair, torch.empty(0, dtype=F64))
    assert found.A.dtype == found.B.dtype == F64
    assert float(found.A.abs().max()) == expected
    assert float(found.A.abs().max() * found.B.abs().max()) == size_A * size_B
    assert torch.equal(found.dense(), pair.dense().double())


def test_a_product_that_fits_half_precision_comes_through_it():
    # 1e6 is beyond float16 and 1e-9 below it, their product is not.
    pair = LowRank(torch.full((1, 2), 2.0**-30), torch.full((2, 1), 2.0**20))
    assert not torch.isfinite(pair.B.to(F16)).any()
    found = cast_balanced(pair, torch.empty(0, dtype=F16))
    assert found.A.dtype == found.B.dtype == F16
    assert torch.equal(found.dense().double(), torch.full((2, 2), 2.0**-10, dtype=F64))


def test_every_layer_is_balanced_by_itself():
    A = torch.tensor([2.0**-40, 1.0, 2.0**40], dtype=F64)[:, None, None].expand(3, 2, 4)
    B = torch.tensor([2.0**40, 1.0, 2.0**-44], dtype=F64)[:, None, None].expand(3, 5, 2)
    found = cast_balanced(LowRank(A, B), A)
    assert found.A[:, 0, 0].tolist() == [1.0, 1.0, 0.25]
    assert found.B[:, 0, 0].tolist() == [1.0, 1.0, 0.25]


def test_a_zero_factor_leaves_the_other_as_it_is():
    one, none = torch.full((1, 2), 0.25), torch.zeros(1, 2)
    for A, B in ((one, none.mT), (none, one.mT), (none, none.mT)):
        found = cast_balanced(LowRank(A, B), A)
        assert torch.equal(found.A, A)
        assert torch.equal(found.B, B)


# --- what all clients share ---------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(), (2,), (3,)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_common_factors_are_the_first_owners_bit_for_bit(layers, dtype):
    # Slot 1 is empty. The others' copies differ here to tell whose were taken.
    c = components(slots=(2, 0, 2, 0, 3), layers=layers, dtype=dtype)
    A, B = common_rows(c), common_columns(c)
    assert A.dtype == B.dtype == dtype
    for slot, first in {0: 1, 2: 0, 3: 4}.items():
        assert torch.equal(A[..., slot, :], c.A[..., first, :])
        assert torch.equal(B[..., :, slot], c.B[..., :, first])
    assert A.shape[-2] == B.shape[-1] == 4
    assert not A[..., 1, :].any()
    assert not B[..., :, 1].any()


# --- slots that nobody filled -------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(), (2,)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_empty_slots_come_from_the_previous_round_in_place(layers, dtype):
    # Slots 1, 3 and 4 of the previous five are empty now; 0 and 2 are not.
    c = components(slots=(0, 0, 2, 2, 0), layers=layers, dtype=dtype)
    averaged = average_factors(c, torch.tensor(SHARES, dtype=F64))
    previous = previous_of(5, layers, dtype)
    found = carry_over_slots(averaged, c, previous)
    assert found.rank == 5
    assert found.A.dtype == found.B.dtype == dtype
    for slot in range(5):
        source = averaged if slot in (0, 2) else previous
        assert torch.equal(found.A[..., slot, :], source.A[..., slot, :])
        assert torch.equal(found.B[..., :, slot], source.B[..., :, slot])


def test_one_empty_slot_below_the_new_rank():
    # The previous update is of lower rank than this round's: nothing is cut off.
    c = components(slots=(0, 0, 2, 3, 0))
    averaged = average_factors(c, torch.tensor(SHARES, dtype=F64))
    found = carry_over_slots(averaged, c, previous_of(2))
    assert found.rank == 4
    assert torch.equal(found.A[1], previous_of(2).A[1])
    assert torch.equal(found.B[:, 1], previous_of(2).B[:, 1])
    for slot in (0, 2, 3):
        assert torch.equal(found.A[slot], averaged.A[slot])
        assert torch.equal(found.B[:, slot], averaged.B[:, slot])


def test_dropped_slots_count_as_empty():
    c = components(slots=(0, 0, 1, 2, 0))
    share = torch.tensor((0.5, 0.25, 1.0, 0.0, 0.25), dtype=F64)
    averaged = average_factors(c, share)
    found = carry_over_slots(averaged, c, previous_of(3), dropped=(2,))
    assert torch.equal(found.A[:2], averaged.A[:2])
    assert torch.equal(found.A[2], previous_of(3).A[2])
    assert torch.equal(found.B[:, 2], previous_of(3).B[:, 2])


@pytest.mark.parametrize("layers", [(), (2,)])
def test_a_stack_gets_the_empty_slots_as_further_components(layers):
    c = components(slots=(0, 0, 2, 2, 0), layers=layers)
    stacked, previous = stack(c, torch.tensor(SHARES, dtype=F64)), previous_of(4, layers)
    found = carry_over(stacked, c, previous)
    assert torch.equal(found.A[..., :5, :], stacked.A)
    assert torch.equal(found.B[..., :5], stacked.B)
    assert torch.equal(found.A[..., 5:, :], previous.A[..., [1, 3], :])
    assert torch.equal(found.B[..., 5:], previous.B[..., [1, 3]])
    dropped = carry_over(stacked, c, previous, (2,))
    assert torch.equal(dropped.A[..., 5:, :], previous.A[..., [1, 2, 3], :])


@pytest.mark.parametrize("carry", [carry_over, carry_over_slots])
def test_where_nothing_is_empty_nothing_changes(carry):
    c = components()
    whole = average_factors(c, torch.tensor(SHARES, dtype=F64))
    assert carry(whole, c, None) is whole
    assert carry(whole, c, None, (0,)) is whole
    assert carry(whole, c, previous_of(3)) is whole
    assert carry(whole, c, previous_of(2)) is whole


# --- the device is that of the inputs -----------------------------------------------------------


def test_a_foreign_default_device_does_not_matter():
    c, share = components(slots=(0, 0, 2, 2, 0)), torch.tensor(SHARES, dtype=F64)
    previous = previous_of(4)
    with torch.device("meta"):
        results = [
            stack(c, share),
            average_factors(c, share),
            carry_over(stack(c, share), c, previous),
            carry_over_slots(average_factors(c, share), c, previous),
            cast_balanced(stack(c, share), c.A),
            LowRank(common_rows(c), common_columns(c)),
        ]
    for found in results:
        assert found.A.device == found.B.device == c.A.device
        assert torch.isfinite(found.dense()).all()
