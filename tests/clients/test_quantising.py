"""Quantised uploads: codes, exactness, and a bound that holds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetlora_agg import ClientUpdate, InputTypeError, InputValueError, LowRank, aggregate
from hetlora_agg.clients import allot_bits, important_slots, quantise
from reference import array
from tolerance import eps

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [F16, BF16, F32, F64]


def factors(out=9, columns=7, rank=3, layers=(), seed=0, dtype=F32, offset=0.0):
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        (torch.randn(*layers, rank, columns, generator=g, dtype=F64) + offset).to(dtype),
        (torch.randn(*layers, out, rank, generator=g, dtype=F64) + offset).to(dtype),
    )


def long(X):
    """In extended precision, so that the check itself adds no rounding that matters."""
    return X.double().numpy().astype(np.longdouble)


def change(adapter, back):
    """‖B A − B̂ Â‖_F of every layer."""
    D = long(back.B) @ long(back.A) - long(adapter.B) @ long(adapter.A)
    return np.sqrt((D**2).sum((-2, -1)))


def test_worked_by_hand():
    # 2 bits: levels 0..3. Row (0, 1, 3): step 1, exact. Column (−1, 0.4, 2): step 1, codes 0 1 3
    adapter = LowRank(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[-1.0], [0.4], [2.0]]))
    sent = quantise(adapter, 2)
    assert sent.codes.A.tolist() == [[0, 1, 3]]
    assert sent.codes.B.tolist() == [[0], [1], [3]]
    assert (sent.minimum.A.item(), sent.step.A.item()) == (0.0, 1.0)
    assert (sent.minimum.B.item(), sent.step.B.item()) == (-1.0, 1.0)
    back = sent.dequantise()
    assert torch.equal(back.A, adapter.A)
    assert back.B.flatten().tolist() == [-1.0, 0.0, 2.0]
    assert sent.bits == (2,)
    # six codes of 2 bits are 12 bits, 2 bytes; four float32 numbers are 16
    assert sent.payload_bytes == 18


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [(), (2, 3)])
@pytest.mark.parametrize("bits", [1, 3, 8, 9, 16, [1, 8, 4], (16, 2, 5)])
def test_codes_are_the_nearest_levels(bits, layers, dtype):
    adapter = factors(layers=layers, dtype=dtype)
    sent = quantise(adapter, bits)
    each = [bits] * 3 if isinstance(bits, int) else list(bits)
    assert sent.codes.A.dtype == (torch.uint8 if max(each) <= 8 else torch.uint16)
    assert sent.bits == tuple(each)
    for j, b in enumerate(each):
        rows = (
            (adapter.A[..., j, :], sent.codes.A[..., j, :]),
            (adapter.B[..., j], sent.codes.B[..., j]),
        )
        for X, codes in rows:
            x, c = array(X.double()), array(codes.double())
            low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
            t = (x - low) / (high - low) * (2**b - 1)
            # within half a level, up to the step's rounding in float32 over 2^b levels
            assert np.abs(c - t).max() <= 0.5 + 2**b * eps(F32)
            assert (c.min(-1) == 0).all()
            assert (c.max(-1) == 2**b - 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 8, 16])
def test_an_entry_is_off_by_half_a_step(bits, dtype):
    adapter = factors(dtype=dtype, out=40, columns=50)
    sent = quantise(adapter, bits)
    back, error = sent.dequantise(), sent.factor_error
    assert back.A.dtype == back.B.dtype == dtype
    for X, Y, e, step in (
        (adapter.A, back.A, error.A, sent.step.A),
        (adapter.B, back.B, error.B, sent.step.B),
    ):
        assert bool(((X.double() - Y.double()).abs() <= e).all())
        # half a step and the rounding of the largest entry: half an ε of the dtype on the way
        # back, and a handful of float64's before; nothing else
        slack = (eps(dtype) + 5 * eps(F64)) * float(X.double().abs().max())
        assert bool((e <= step.double() / 2 + slack).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3e-5, 1234.567])
@pytest.mark.parametrize("bits", [1, 8, 16])
def test_constant_rows_are_exact(bits, value, dtype):
    adapter = factors(dtype=dtype)
    adapter.A[1] = value
    adapter.B[:, 2] = -value
    sent = quantise(adapter, bits)
    back = sent.dequantise()
    assert torch.equal(back.A[1], adapter.A[1])
    assert torch.equal(back.B[:, 2], adapter.B[:, 2])
    assert float(sent.factor_error.A[1]) == float(sent.factor_error.B[:, 2]) == 0.0


def test_an_adapter_of_constant_rows_costs_nothing():
    adapter = LowRank(torch.full((2, 3), 0.1), torch.full((4, 2), 0.7))
    sent = quantise(adapter, 4)
    assert torch.equal(sent.dequantise().dense(), adapter.dense())
    assert float(sent.error_bound) == 0.0


@settings(max_examples=300)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5)),
    layers=st.sampled_from([(), (2,)]),
    bits=st.integers(1, 16),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
    size=st.integers(-6, 3),
    offset=st.sampled_from([0.0, 1.0, 30.0, -1000.0]),
)
def test_the_bound_holds(shape, layers, bits, dtype, seed, size, offset):
    out, columns, rank = shape
    adapter = factors(out, columns, rank, layers, seed, F64, offset)
    # entries down to subnormal float16, up to 4e4: rows far from zero are narrow in their dtype
    adapter = LowRank((10.0**size * adapter.A).clamp(-4e4, 4e4).to(dtype), adapter.B.to(dtype))
    sent = quantise(adapter, bits)
    bound = sent.error_bound
    assert bound.shape == layers
    assert bound.dtype == F64
    # the sum of the bound itself is in float64, of at most 2·5 terms of norms over 12 entries
    assert (change(adapter, sent.dequantise()) <= (1 + 40 * eps(F64)) * array(bound)).all()
    back, error = sent.dequantise(), sent.factor_error
    assert bool(((back.A.double() - adapter.A.double()).abs() <= error.A).all())
    assert bool(((back.B.double() - adapter.B.double()).abs() <= error.B).all())


@pytest.mark.parametrize("bits", [4, 8, 12])
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_bound_is_of_the_size_of_the_error(rank, bits, dtype):
    adapter = factors(out=60, columns=50, rank=rank, dtype=dtype)
    sent = quantise(adapter, bits)
    actual, bound = float(change(adapter, sent.dequantise())), float(sent.error_bound)
    # Errors uniform within half a step have a third of the square bounded: √3. 2·rank independent
    # terms add up as squares where the bound adds norms: √(2 rank). A half more for chance and for
    # what is of second order at 4 bits.
    assert actual <= bound <= 1.5 * np.sqrt(3) * np.sqrt(2 * rank) * actual


def test_more_bits_cost_less():
    adapter = factors()
    bounds = [float(quantise(adapter, b).error_bound) for b in range(1, 17)]
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize("bits", [1, 2, 16])
def test_entries_at_the_ends_of_the_dtype(bits):
    for dtype in (F16, F32):
        top = torch.finfo(dtype).max
        half = LowRank(
            torch.tensor([[0.0, top, top / 3]], dtype=dtype), torch.ones(2, 1, dtype=dtype)
        )
        back = quantise(half, bits).dequantise()
        assert bool(torch.isfinite(back.A).all())
        # in units of the least number, 5 in 3 steps: the level 1⅔ for 1 is rounded on, to 2
        unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        small = LowRank(
            torch.tensor([[0.0, 1.0, 5.0]], dtype=dtype) * unit, torch.ones(2, 1, dtype=dtype)
        )
        sent = quantise(small, bits)
        off = (sent.dequantise().A.double() - small.A.double()).abs()
        assert bool((off <= sent.factor_error.A).all())


@pytest.mark.parametrize("dtype", [F32, F64])
def test_rows_wider_than_the_step_can_be(dtype):
    top = torch.finfo(dtype).max
    wide = LowRank(torch.tensor([[-top, top]], dtype=dtype), torch.ones(2, 1, dtype=dtype))
    with pytest.raises(InputValueError, match="further apart than"):
        quantise(wide, 1)


@pytest.mark.parametrize(("dtype", "number"), [(F16, 4), (BF16, 4), (F32, 4), (F64, 8)])
@pytest.mark.parametrize("layers", [(), (2, 3)])
def test_the_payload(layers, dtype, number):
    sent = quantise(factors(out=9, columns=8, layers=layers, dtype=dtype), (2, 3, 9))
    n = int(np.prod(layers, dtype=int))
    # 17 entries in each component, 14 bits in all components; a pair for 3 rows and 3 columns
    assert sent.payload_bytes == -(-17 * 14 * n // 8) + 2 * 6 * n * number


def test_inputs_are_left_alone():
    adapter = factors()
    before = adapter.A.clone(), adapter.B.clone()
    adapter.A.requires_grad_()
    sent = quantise(adapter, 4)
    assert not sent.dequantise().A.requires_grad
    assert not sent.minimum.A.requires_grad
    assert torch.equal(adapter.A.detach(), before[0])
    assert torch.equal(adapter.B, before[1])


def test_an_upload_from_end_to_end():
    clients, rank, budget = 3, 6, 6
    full = [factors(out=20, columns=16, rank=rank, seed=k, dtype=F32) for k in range(clients)]
    whole, uploads, bounds = [], [], []
    for k, own in enumerate(full):
        scores = (own.A.abs().sum(-1) + own.B.abs().sum(-2)).double()
        slots = important_slots(scores, 3 + k)
        chosen = own.select(list(slots))
        sent = quantise(chosen, allot_bits(scores[list(slots)], budget, (2, 4, 8)))
        assert sum(sent.bits) <= budget * len(slots)
        back = sent.dequantise()
        whole.append(ClientUpdate(chosen.A, chosen.B, slots=slots, scaling=0.5))
        uploads.append(ClientUpdate(back.A, back.B, slots=slots, scaling=0.5))
        bounds.append(0.5 * float(sent.error_bound))
        assert sent.payload_bytes < chosen.A.nbytes + chosen.B.nbytes
    # the mean of products moves by at most the mean of the bounds
    exact, coded = (aggregate(u, "flora").factors for u in (whole, uploads))
    off = np.linalg.norm(array(coded.B) @ array(coded.A) - array(exact.B) @ array(exact.A))
    size = np.linalg.norm(array(exact.A)) * np.linalg.norm(array(exact.B))
    assert off <= np.mean(bounds) + 8 * eps(F32) * size
    # and slots that are averaged come out at the mean of what was sent
    previous = factors(out=20, columns=16, rank=rank, seed=9)
    result = aggregate(uploads, "hafl", previous=previous)
    for j in range(rank):
        rows = [array(u.A)[u.slots.index(j)] for u in uploads if j in u.slots]
        expected = np.sqrt(0.5) * np.mean(rows, 0) if rows else array(previous.A)[j]
        # fold, share, sum of three, of entries under 4
        assert np.abs(array(result.A)[j] - expected).max() <= 7 * eps(F32) * 4


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_bits_out_of_range(bits):
    with pytest.raises(InputValueError, match="bits: expected"):
        quantise(factors(), bits)
    with pytest.raises(InputValueError, match="bits: expected"):
        quantise(factors(), [4, bits, 4])


def test_what_cannot_be_quantised():
    with pytest.raises(InputValueError, match="one for each of 3 components, got 2"):
        quantise(factors(), [4, 4])
    for bits in (4.0, "4", None, [4.0, 4, 4]):
        with pytest.raises(InputTypeError, match="bits: expected an integer"):
            quantise(factors(), bits)
    with pytest.raises(InputTypeError, match="adapter: expected a LowRank"):
        quantise((factors().A, factors().B), 4)
    bad = factors()
    bad.A[0, 0] = torch.inf
    with pytest.raises(InputValueError, match="adapter: NaN or Inf"):
        quantise(bad, 4)
