"""Unbiased rank reduction: expectation and error as finite sums over the breakpoints of u.

Between two breakpoints the draw does not change, so ``E f(Q) = Σ length · f(Q at the middle)``. The
oracle is the definition in exact fractions.
"""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetlora_agg import (
    ClientUpdate,
    ConvergenceError,
    HetLoRAError,
    InputTypeError,
    InputValueError,
    LowRank,
    aggregate,
    aggregate_layers,
    distribute,
    unbiased_truncate,
)
from hetlora_agg.compression import compress
from hetlora_agg.reduction import picked
from reference import array, dense
from tolerance import eps, recompressed_gate

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EPS = eps(F64)
LAST = 1 - 2.0**-53
TINY = (0.0, 5e-324, 2.0**-1000, 2.0**-62, 2.0**-61, 2.0**-60, 2.0**-54, 2.0**-53, 2.0**-52, LAST)


# --- the oracle ---------------------------------------------------------------------------------


def plan(sigma, r):
    """Heads k, τ and the cumulative inclusion probabilities, from the definition, exact."""
    sigma = [Fraction(s) for s in sigma]
    k = 0
    while k < r - 1 and sigma[k] * (r - k) >= sum(sigma[k:]):
        k += 1
    tau = sum(sigma[k:]) / (r - k)
    C = [Fraction(0)] * len(sigma)
    for i in range(k, len(sigma)):
        C[i] = (C[i - 1] if i else 0) + sigma[i] / tau
    assert C[-1] == r - k
    return k, tau, C


def exact_picks(sigma, r, u):
    """Positions drawn at the offset u, by the rule ``(C_{i−1}, C_i]`` holds an integer + u."""
    k, _, C = plan(sigma, r)
    below = [Fraction(0), *C[:-1]]
    holds = [math.floor(b - u) > math.floor(a - u) for a, b in zip(below, C, strict=True)]
    return [i for i, held in enumerate(holds) if i < k or held]


def cells(sigma, r, shifts=(0,)):
    """Lengths of the intervals of u on which the draws at u + shift do not change, middles."""
    C = plan(sigma, r)[2]
    ends = sorted({0, 1} | {(c - Fraction(shift)) % 1 for c in C for shift in shifts})
    lengths = [b - a for a, b in pairwise(ends)]
    middles = [(a + b) / 2 for a, b in pairwise(ends)]
    assert sum(lengths) == 1
    return lengths, middles


def offsets(middles):
    return torch.tensor([min(float(m), LAST) for m in middles], dtype=F64)


def least_error(sigma, r):
    """Lower bound on ``E‖Q − P‖²`` over all unbiased Q of rank r, by duality.

    For any Y: ``E‖Q‖² ≥ 2⟨P, Y⟩ − max_{rank r} (2⟨Q, Y⟩ − ‖Q‖²) = 2⟨P, Y⟩ − Σ_{i≤r} σ_i(Y)²``;
    taken over Y with singular values max(σ_i, t), for every t at which a maximum can lie.
    """
    sigma = [Fraction(s) for s in sigma]
    candidates = set(sigma) | {sum(sigma[k:]) / (r - k) for k in range(r)}

    def bound(t):
        y = [max(s, t) for s in sigma]
        return 2 * sum(a * b for a, b in zip(sigma, y, strict=True)) - sum(b * b for b in y[:r])

    return max(map(bound, candidates)) - sum(s * s for s in sigma)


# --- the properties, for any draw (S, r, u) -> positions, values --------------------------------


def drawn_rows(draw, sigma, r, us):
    """The diagonal of Q at every u."""
    index, value = (X.numpy() for X in draw(torch.tensor(sigma, dtype=F64), r, us))
    rows = np.zeros((len(us), len(sigma)))
    np.put_along_axis(rows, index, value, -1)
    return rows


def scaled(sigma):
    """The spectrum relative to its largest entry, and a power of two close to that."""
    unit = 2.0 ** math.frexp(sigma[0])[1]
    return [Fraction(s) / Fraction(unit) for s in sigma], unit


def assert_unbiased(draw, sigma, r):
    lengths, middles = cells(sigma, r)
    rows = drawn_rows(draw, sigma, r, offsets(middles))
    relative, unit = scaled(sigma)
    # τ may have to be a subnormal, and is then rounded to a multiple of the smallest.
    gate = 16 * len(sigma) * EPS * relative[0] + Fraction(5e-324) / Fraction(unit)
    for i, s in enumerate(relative):
        column = (rows[:, i] / unit).tolist()
        mean = math.fsum(float(w) * x for w, x in zip(lengths, column, strict=True))
        assert abs(mean - s) <= gate, f"component {i}"


def error_of(draw, sigma, r):
    """``E‖Q − P‖²`` relative to the unit, and what the theorem says."""
    lengths, middles = cells(sigma, r)
    relative, unit = scaled(sigma)
    rows = drawn_rows(draw, sigma, r, offsets(middles)) / unit
    distances = ((rows - np.array([float(s) for s in relative])) ** 2).sum(-1)
    k, tau, _ = plan(relative, r)
    tail = sum(relative[k:])
    expected = tail * tau - sum(s * s for s in relative[k:])
    found = math.fsum(float(w) * d for w, d in zip(lengths, distances.tolist(), strict=True))
    return found, expected, 16 * len(sigma) * EPS * (tail * tau + relative[0] ** 2)


def edges(sigma, r):
    """Every breakpoint, the doubles next to it, and the ends of [0, 1)."""
    ends = {float(c % 1) for c in plan(sigma, r)[2]}
    near = {math.nextafter(e, to) for e in ends for to in (-1, 2)}
    return torch.tensor(sorted(u for u in {*ends, *near, *TINY} if 0 <= u < 1), dtype=F64)


def assert_exact_count(draw, sigma, r):
    """r distinct components, heads among them, none of size zero, wherever u falls."""
    k, _, _ = plan(sigma, r)
    us = edges(sigma, r)
    index, _ = draw(torch.tensor(sigma, dtype=F64), r, us)
    for u, row in zip(us.tolist(), index.tolist(), strict=True):
        assert len(set(row)) == r, f"u = {u!r}: {row}"
        assert set(range(k)) <= set(row)
        assert all(sigma[i] > 0 for i in row), f"u = {u!r}: {row}"


SPECTRA = {
    "equal": [1.0] * 12,
    "tenths": [0.1] * 10,
    "decaying": [math.exp(-i / 8) for i in range(64)],
    "zeros": [3.0, 1.0, 1.0, 0.5, 0.25, 0.0, 0.0, 0.0],
    "clustered": [5.0] * 3 + [1.0 + i * EPS for i in range(4, 0, -1)] + [1e-9] * 5,
    "one to eps": np.logspace(0, math.log10(EPS), 20).tolist(),
    "one large": [1e6] + [1.0] * 9,
    "sevenths": [i / 7 for i in range(20, 0, -1)],
    "head on tau": [0.6, 0.5, 0.5, 0.4, 0.4],
    "subnormal": [i * 5e-324 for i in range(40, 0, -4)],
    "underflow": [i * 2e-308 for i in range(9, 0, -1)],
    "overflow": [i * 1e306 for i in range(9, 0, -1)],
}
CASES = [
    pytest.param(sigma, r, id=f"{name}-{r}")
    for name, sigma in SPECTRA.items()
    for r in (1, 2, 3, 4, 5)
    if r < sum(s > 0 for s in sigma)
]


@st.composite
def spectra(draw):
    """Descending, log-uniform over 1 to ε with repetitions and zeros, and a rank below theirs."""
    levels = draw(st.lists(st.floats(-52.0, 0.0), min_size=2, max_size=8))
    q = draw(st.integers(2, 24))
    sigma = sorted((2.0 ** draw(st.sampled_from(levels)) for _ in range(q)), reverse=True)
    scale = draw(st.sampled_from([1.0, 2.0**-900, 2.0**900]))
    zeros = draw(st.integers(0, 3))
    return [scale * s for s in sigma] + [0.0] * zeros, draw(st.integers(1, q - 1))


@pytest.mark.parametrize(("sigma", "r"), CASES)
def test_the_expectation_is_the_matrix(sigma, r):
    assert_unbiased(picked, sigma, r)


@given(spectra())
def test_the_expectation_is_the_matrix_on_any_spectrum(case):
    assert_unbiased(picked, *case)


@pytest.mark.parametrize(("sigma", "r"), CASES)
def test_exactly_r_components_at_every_edge(sigma, r):
    assert_exact_count(picked, sigma, r)


@given(spectra())
def test_exactly_r_components_at_every_edge_of_any_spectrum(case):
    assert_exact_count(picked, *case)


@given(spectra())
def test_the_error_is_that_of_the_theorem_and_the_norm_is_one(case):
    sigma, r = case
    found, expected, gate = error_of(picked, sigma, r)
    assert abs(found - expected) <= gate
    relative, unit = scaled(sigma)
    rows = drawn_rows(picked, sigma, r, edges(sigma, r)) / unit
    k, tau, _ = plan(relative, r)
    norm = math.sqrt(sum(s * s for s in relative[:k]) + (r - k) * tau * tau)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), norm, rtol=16 * len(sigma) * EPS)


@pytest.mark.parametrize(("sigma", "r"), CASES)
def test_the_picks_are_those_of_the_definition(sigma, r):
    lengths, middles = cells(sigma, r)
    index, _ = picked(torch.tensor(sigma, dtype=F64), r, offsets(middles))
    wide = 0
    for length, u, row in zip(lengths, middles, index.tolist(), strict=True):
        if length > 64 * len(sigma) * EPS:
            assert row == exact_picks(sigma, r, u)
            wide += 1
    assert wide


@pytest.mark.parametrize(("sigma", "r"), CASES)
def test_values_descend_from_the_heads_to_tau(sigma, r):
    k, tau, _ = plan(sigma, r)
    us = edges(sigma, r)
    _, value = picked(torch.tensor(sigma, dtype=F64), r, us)
    assert (value[:, :k] == torch.tensor(sigma[:k], dtype=F64)).all()
    assert (value[:, :-1] >= value[:, 1:]).all()
    np.testing.assert_allclose(value[:, k:], float(tau), rtol=16 * len(sigma) * EPS, atol=5e-324)


def test_an_offset_of_zero_takes_the_upper_ends():
    # Σ σ = 4 over two places: τ = 2, C = ¾, 1 ½, 2; the integers are 1 and 2
    index, value = picked(torch.tensor([1.5, 1.5, 1.0], dtype=F64), 2, torch.zeros((), dtype=F64))
    assert index.tolist() == [1, 2]
    assert value.tolist() == [2.0, 2.0]


# --- the least error ----------------------------------------------------------------------------


@given(spectra())
def test_no_unbiased_draw_of_that_rank_errs_less(case):
    sigma, r = case
    relative, _ = scaled(sigma)
    found, expected, gate = error_of(picked, sigma, r)
    assert expected == least_error(relative, r)
    assert found <= least_error(relative, r) + gate


@given(spectra(), st.data())
def test_other_inclusion_probabilities_err_more(case, data):
    sigma, r = case
    relative, _ = scaled(sigma)
    alive = [s for s in relative if s > 0]
    q = len(alive)
    found, _, gate = error_of(picked, sigma, r)
    energy = sum(s * s for s in alive)

    def error(p):
        assert sum(p) == r
        assert max(p) <= 1
        return sum(s * s / x for s, x in zip(alive, p, strict=True)) - energy

    k, tau, _ = plan(relative, r)
    best = [Fraction(1)] * k + [s / tau for s in alive[k:]]
    uniform = [Fraction(r, q)] * q
    mixed = Fraction(data.draw(st.integers(1, 99)), 100)
    between = [mixed * a + (1 - mixed) * b for a, b in zip(best, uniform, strict=True)]
    assert found <= error(between) + gate <= error(uniform) + gate
    for more in range(k + 1, r):
        rest = sum(alive[more:]) / (r - more)
        if alive[more] <= rest:
            heads = [Fraction(1)] * more + [s / rest for s in alive[more:]]
            assert found <= error(heads) + gate


def test_uniform_probabilities_err_far_more_on_a_decaying_spectrum():
    sigma, r = SPECTRA["decaying"], 8
    found, _, _ = error_of(picked, sigma, r)
    assert (len(sigma) / r - 1) * sum(s * s for s in sigma) > 5 * found


# --- negative controls --------------------------------------------------------------------------


def truncated(S, r, u):
    """The best of that rank, whatever u."""
    return torch.arange(r).expand(*u.shape, r), S[:r].expand(*u.shape, r)


def bernoulli(S, r, u):
    """Picks of the right probability, independent of each other; the first r slots of them."""
    k, tau, C = plan(S.tolist(), r)
    below = [Fraction(0), *C[:-1]]
    p = [float(b - a) for a, b in zip(below, C, strict=True)]
    rows = []
    for x in u.tolist():
        coins = [(x + i * math.sqrt(2)) % 1 for i in range(len(p))]
        row = [*range(k), *(i for i in range(k, len(p)) if coins[i] < p[i])]
        rows.append((row + [row[-1] if row else 0] * r)[:r])
    return torch.tensor(rows), torch.full((len(rows), r), float(tau), dtype=F64)


def without_heads(S, r, u):
    """Inclusion min(1, rσ/s), value σ over it or τ, as if the largest were never above τ."""
    total = S.sum()
    C = (r * S / total).clamp_max(1.0).cumsum(-1)
    C[-1] = r
    points = torch.arange(r) + u.unsqueeze(-1)
    index = torch.searchsorted(C, points).clamp_max(len(S) - 1)
    return index, torch.full(index.shape, float(total / r), dtype=F64)


@pytest.mark.parametrize("twin", [truncated, without_heads])
def test_a_biased_twin_is_found_out(twin):
    with pytest.raises(AssertionError, match="component"):
        assert_unbiased(twin, SPECTRA["one large"], 3)
    with pytest.raises(AssertionError):
        assert_unbiased(twin, SPECTRA["zeros"], 3)


def test_independent_picks_are_found_out():
    with pytest.raises(AssertionError, match="u ="):
        assert_exact_count(bernoulli, SPECTRA["equal"], 5)


@pytest.mark.parametrize("name", ["tenths", "sevenths"])
def test_a_gain_of_two_percent_is_found_out(name):
    def strong(S, r, u):
        index, value = picked(S, r, u)
        return index, 1.02 * value

    with pytest.raises(AssertionError, match="component"):
        assert_unbiased(strong, SPECTRA[name], 5)


def counts(sigma, r, u, pinned):
    """How many a plain sampler in doubles picks, with its last C set to r − k or left alone."""
    k, _, _ = plan(sigma, r)
    tail = np.array(sigma[k:])
    C = np.cumsum(tail / (tail.sum() / (r - k)))
    if pinned:
        C[-1] = r - k
    points = np.arange(r - k) + u
    return k + sum(bool((points <= c).sum() > (points <= b).sum()) for b, c in pairwise([0, *C]))


def test_without_the_last_sum_pinned_the_count_is_wrong():
    # Nine ninths of five places add up to 4.999999999999999, and the last point is beyond.
    sigma, r = [1.0] * 9, 5
    short = [u for u in TINY if counts(sigma, r, u or 1.0, pinned=False) != r]
    assert short
    assert all(counts(sigma, r, u or 1.0, pinned=True) == r for u in short)
    assert_exact_count(picked, sigma, r)


# --- averages over clients ----------------------------------------------------------------------


def mean_error(sigma, r, clients):
    """``E‖mean of the clients' draws − P‖²`` at the offsets (u + j/K) mod 1, a finite sum."""
    shifts = [Fraction(j, clients) for j in range(clients)]
    lengths, middles = cells(sigma, r, shifts)
    rows = sum(
        drawn_rows(picked, sigma, r, offsets([(m + s) % 1 for m in middles])) for s in shifts
    )
    distances = ((rows / clients - np.array(sigma)) ** 2).sum(-1)
    return math.fsum(float(w) * d for w, d in zip(lengths, distances.tolist(), strict=True))


def test_one_draw_is_worse_than_truncation_and_sixteen_are_far_better():
    # σ_i = e^(−i/8), i = 0 … 63, cut to rank 8
    sigma, r = SPECTRA["decaying"], 8
    cut = math.fsum(s * s for s in sigma[r:])
    one, sixteen = mean_error(sigma, r, 1), mean_error(sigma, r, 16)
    tail = math.fsum(sigma)
    assert plan(sigma, r)[0] == 0
    assert one == pytest.approx(tail * tail / r - math.fsum(s * s for s in sigma), rel=1e-12)
    assert one / cut == pytest.approx(7.398, abs=1e-3)
    assert cut / sixteen == pytest.approx(18.555, abs=1e-3)
    # Independent offsets would only divide by 16.
    assert one / 16 > 8 * sixteen


def test_clients_of_equal_rank_start_evenly_spread():
    sigma, ranks = [3.0, 2.0, 1.5, 1.0, 0.5], [2, 3, 2, 1, 2, 3, 2]
    result = whole_result(sigma)
    pieces = distribute(result, ranks, reduction="unbiased", u=0.3)
    for k, (piece, r) in enumerate(zip(pieces, ranks, strict=True)):
        before, n = ranks[:k].count(r), ranks.count(r)
        expected = exact_picks(sigma, r, (Fraction(0.3) + Fraction(before, n)) % 1)
        rows = dense(piece).diagonal()
        assert np.flatnonzero(rows).tolist() == expected


# --- factors ------------------------------------------------------------------------------------

OUT, IN, R = 11, 9, 7


def factors(layers=(), dtype=F64, seed=0, R=R):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(*layers, R, IN, generator=g, dtype=F64)
    B = torch.randn(*layers, OUT, R, generator=g, dtype=F64)
    return LowRank(A.to(dtype), B.to(dtype))


def exact(low_rank):
    """The product in float64, whatever the dtype of the factors."""
    return dense(LowRank(low_rank.A.double(), low_rank.B.double()))


def gate_of(P, dtype):
    """The kernel's gate and the finite sum's."""
    B, A = array(P.B.double()), array(P.A.double())
    S = sum(np.linalg.norm(b) * np.linalg.norm(a) for b, a in zip(B.T, A, strict=True))
    return recompressed_gate(dtype, OUT, IN, S) + 16 * len(A) * EPS * S


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("r", [1, 3, 6])
def test_the_mean_over_u_is_the_product(r, dtype):
    P = factors(dtype=dtype)
    W = exact(P)
    sigma = np.linalg.svd(W, compute_uv=False)[:R].tolist()
    lengths, middles = cells(sigma, r)
    mean = np.zeros_like(W)
    for length, u in zip(lengths, offsets(middles), strict=True):
        Q = unbiased_truncate(P, r, float(u))
        assert Q.A.dtype == Q.B.dtype == dtype
        assert (Q.rank, Q.dense_shape) == (r, P.dense_shape)
        mean += float(length) * exact(Q)
    # τ/σ_i times the casts of a component that is drawn with probability σ_i/τ: twice over, at most
    assert np.linalg.norm(mean - W) <= 2 * gate_of(P, dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_singular_values_of_a_draw(dtype):
    P = factors(dtype=dtype)
    sigma = np.linalg.svd(dense(P), compute_uv=False)[:R].tolist()
    k, tau, _ = plan(sigma, 3)
    for u in (0.0, 0.2, 0.7, LAST):
        Q = dense(unbiased_truncate(P, 3, u))
        found = np.linalg.svd(Q, compute_uv=False)
        wanted = [*sigma[:k], *[float(tau)] * (3 - k)]
        np.testing.assert_allclose(found[:3], wanted, rtol=0, atol=gate_of(P, dtype))
        assert found[3] <= gate_of(P, dtype)


@pytest.mark.parametrize("layers", [(3,), (2, 3)])
def test_a_batch_is_each_layer_alone(layers):
    P = factors(layers)
    # Layers of different standing: one of rank 2, one with heads, one of zeros.
    A, B = P.A.clone().reshape(-1, R, IN), P.B.clone().reshape(-1, OUT, R)
    B[0, :, 2:] = 0
    B[1, :, 0] *= 100
    B[2] = 0
    P = LowRank(A.reshape(P.A.shape), B.reshape(P.B.shape))
    u = torch.linspace(0.05, 0.95, math.prod(layers), dtype=F64).reshape(layers)
    together = unbiased_truncate(P, 3, u)
    assert together.rank == 3
    for at in np.ndindex(*layers):
        alone = unbiased_truncate(LowRank(P.A[at], P.B[at]), 3, float(u[at]))
        scale = float(P.B[at].norm() * P.A[at].norm())
        torch.testing.assert_close(
            together.dense()[at], alone.dense(), rtol=0, atol=10 * OUT * EPS * scale
        )
    one = unbiased_truncate(P, 3, 0.4)
    each = unbiased_truncate(P, 3, torch.full(layers, 0.4))
    gate = 1e-6 * float(P.B.norm() * P.A.norm())
    torch.testing.assert_close(one.dense(), each.dense(), rtol=0, atol=gate)


def test_what_has_the_rank_already_comes_back():
    P = factors()
    for r in (R, R + 1, 100):
        assert unbiased_truncate(P, r, 0.5) is P
    low = LowRank(torch.cat([P.A[:2], P.A[:2]]), torch.cat([P.B[:, :2], P.B[:, :2]], -1))
    for u in (0.0, 0.5, LAST):
        Q = unbiased_truncate(low, 3, u)
        assert Q.rank == 3
        assert np.linalg.norm(dense(Q) - dense(low)) <= gate_of(low, F64)
    assert not compress(low, 3, reduction="unbiased", u=0.5).certificate.tail
    wide = LowRank(torch.randn(9, 4, dtype=F64), torch.randn(2, 9, dtype=F64))
    assert unbiased_truncate(wide, 5, 0.5).rank == 2
    zero = LowRank(torch.ones(4, 3), torch.zeros(5, 4))
    assert not unbiased_truncate(zero, 2, 0.5).dense().any()


def test_numpy_in_numpy_out_and_nothing_is_changed():
    P = factors(dtype=F32)
    Q = unbiased_truncate(P.numpy(), 2, np.float64(0.3))
    assert isinstance(Q.A, np.ndarray)
    assert Q.A.dtype == np.float32
    np.testing.assert_array_equal(Q.A, unbiased_truncate(P, 2, 0.3).A.numpy())
    grown = LowRank(P.A.clone().requires_grad_(), P.B.clone().requires_grad_())
    again = unbiased_truncate(grown, 2, 0.3)
    assert not again.A.requires_grad
    assert torch.equal(grown.A, P.A)
    assert torch.equal(grown.B, P.B)


P1, P2 = factors(), factors((2,))


@pytest.mark.parametrize(
    ("low_rank", "rank", "u", "kind", "match"),
    [
        (P1, 2, 1.0, InputValueError, r"u=.*\[0, 1\)"),
        (P1, 2, -1e-9, InputValueError, r"u=.*\[0, 1\)"),
        (P1, 2, math.nan, InputValueError, r"u=.*\[0, 1\)"),
        (P1, 2, None, InputValueError, "u=.*anew"),
        (P1, 2, "half", InputTypeError, "u="),
        (P1, 2, True, InputTypeError, "u="),
        (P1, 2, 0.5j, InputTypeError, "u="),
        (P1, 2, torch.zeros(2), InputValueError, r"shape \(2,\)"),
        (P2, 2, torch.zeros(3), InputValueError, r"\(2,\).*shape \(3,\)"),
        (P2, 2, torch.tensor([0.5, 1.0]), InputValueError, "u="),
        (P1, 0, 0.5, InputValueError, "rank"),
        (P1, 2.0, 0.5, InputTypeError, "rank"),
        (P1, True, 0.5, InputTypeError, "rank"),
        ((P1.A, P1.B), 2, 0.5, InputTypeError, "LowRank"),
        (
            ClientUpdate(P1.A, P1.B),
            2,
            0.5,
            InputTypeError,
            r"got ClientUpdate; .*of an update pass LowRank\(update\.A, update\.B\)$",
        ),
        (LowRank(P1.A.float(), P1.B), 2, 0.5, InputTypeError, "dtype"),
        (LowRank(P1.A.long(), P1.B.long()), 2, 0.5, InputTypeError, "dtype"),
        (LowRank(P1.A * math.nan, P1.B), 2, 0.5, InputValueError, "NaN"),
        (LowRank(P1.A[:, :0], P1.B), 2, 0.5, InputValueError, "dimension of 0"),
    ],
)
def test_what_is_refused(low_rank, rank, u, kind, match):
    with pytest.raises(kind, match=match):
        unbiased_truncate(low_rank, rank, u)


def test_a_draw_beyond_its_dtype_is_an_error():
    # sixty-four equal values of 6e4 in one: τ is 64 times as large, and its root fits; not so 6e9
    fits = LowRank(6e4 * torch.eye(64, dtype=F16), torch.eye(64, dtype=F16))
    assert torch.isfinite(unbiased_truncate(fits, 1, 0.5).A).all()
    big = LowRank(6e4 * torch.eye(64, dtype=F16), 6e4 * torch.eye(64, dtype=F16))
    with pytest.raises(ConvergenceError, match="float16"):
        unbiased_truncate(big, 1, 0.5)


# --- compress, flexlora -------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["balanced", "left", "right"])
def test_compress_says_how_far_the_draw_is(split):
    P = factors((2,), F32)
    W = dense(P)
    u = torch.tensor([0.1, 0.8])
    drawn = compress(P, 3, split=split, reduction="unbiased", u=u)
    far = np.linalg.norm(dense(drawn) - W, axis=(-2, -1))
    known = drawn.certificate
    gate = gate_of(LowRank(P.A[0], P.B[0]), F32)
    np.testing.assert_allclose(known.tail, far, atol=gate)
    assert (far <= known.bound.numpy()).all()
    # The best of that rank is nearer: the tail is no claim that this is the best.
    assert (known.tail > compress(P, 3).certificate.tail).all()
    assert drawn.ranks is None
    np.testing.assert_array_equal(known.kept, [3, 3])
    found = np.linalg.svd(dense(drawn), compute_uv=False)[:, :3]
    np.testing.assert_allclose(drawn.singular_values, found, atol=gate)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": "full", "u": 0.5}, "rank=.*integer"),
        ({"rank": 2}, "u=.*anew"),
        ({"rank": 2, "energy": 0.9, "u": 0.5}, "energy="),
        ({"rank": 2, "u": 0.5, "reduction": "unbiassed"}, "reduction=.*unbiased"),
        ({"rank": 2, "u": 0.5, "reduction": "truncate"}, "u=.*nothing is drawn"),
        ({"rank": 2, "u": 1.5}, "u="),
    ],
)
def test_options_that_exclude_each_other(options, match):
    with pytest.raises(InputValueError, match=match):
        compress(P1, **{"reduction": "unbiased", **options})
    with pytest.raises(InputValueError, match=match):
        aggregate(clients(), "flexlora", **{"reduction": "unbiased", **options})


def clients(layers=(), ranks=(3, 2, 4), dtype=F64):
    return [
        ClientUpdate(p.A, p.B, weight=n, id=k)
        for k, (r, n) in enumerate(zip(ranks, (3.0, 1.0, 2.0), strict=True))
        for p in [factors(layers, dtype, seed=k, R=r)]
    ]


def test_fold_rest_has_nothing_to_draw():
    with pytest.raises(InputValueError, match="fold_rest="):
        aggregate(clients(), "flexlora", fold_rest=True, reduction="unbiased", u=0.5)
    with pytest.raises(InputValueError, match="fold_rest="):
        aggregate(clients(), "flexlora", fold_rest=True, u=0.5)


def test_flexlora_is_the_exact_mean_in_expectation():
    whole = aggregate(clients(), "flexlora", rank="full")
    W = dense(whole.factors)
    sigma = whole.singular_values.tolist()
    lengths, middles = cells(sigma, 3)
    mean, cut = np.zeros_like(W), aggregate(clients(), "flexlora", rank=3)
    for length, u in zip(lengths, offsets(middles), strict=True):
        result = aggregate(clients(), "flexlora", rank=3, reduction="unbiased", u=float(u))
        assert not result.nested
        assert result.rank == 3
        mean += float(length) * dense(result.factors)
    gate = 2 * gate_of(whole.factors, F64)
    assert np.linalg.norm(mean - W) <= gate
    assert np.linalg.norm(dense(cut.factors) - W) > 1e6 * gate


def test_a_drawn_result_is_not_sliced():
    result = aggregate(clients(), "flexlora", rank=4, reduction="unbiased", u=0.5)
    (piece,) = distribute(result, [4])
    assert piece.rank == 4
    with pytest.raises(InputValueError, match="not an answer; it was drawn at its rank"):
        distribute(result, [2])
    with pytest.raises(InputValueError, match=r"certificate.tail.*rank='full'"):
        distribute(result, [2], reduction="unbiased", u=0.5)


def test_every_layer_of_a_model_is_drawn():
    layers = {"q": clients(), "v": clients(ranks=(2, 2, 3)), "k": clients()}
    results = aggregate_layers(layers, "flexlora", rank=3, reduction="unbiased", u=0.35)
    for name, updates in layers.items():
        alone = aggregate(updates, "flexlora", rank=3, reduction="unbiased", u=0.35)
        gate = gate_of(alone.factors, F64)
        found, wanted = (dense(r.factors) for r in (results[name], alone))
        assert np.linalg.norm(found - wanted) <= 100 * gate
        assert not results[name].nested


# --- distribute ---------------------------------------------------------------------------------


def whole_result(sigma, dtype=F64):
    """A result with these singular values on the diagonal."""
    S = torch.tensor(sigma, dtype=dtype)
    update = ClientUpdate(torch.diag(S), torch.eye(len(sigma), dtype=dtype))
    return aggregate([update], "flexlora", rank="full")


@pytest.mark.parametrize("method", ["flexlora", "flora"])
def test_every_client_gets_the_whole_in_expectation(method):
    options = {"rank": "full"} if method == "flexlora" else {}
    result = aggregate(clients(), method, **options)
    W, ranks, scalings = dense(result.factors), [2, 4, 4, 1, 4], [2.0, 0.5, 1.0, 3.0, 1e-3]
    sigma = np.linalg.svd(W, compute_uv=False)[:9].tolist()
    means = [np.zeros_like(W) for _ in ranks]
    shifts = {Fraction(j, 3) for j in range(3)} | {0}
    ends = {Fraction(0), Fraction(1)}
    for r in set(ranks):
        ends |= {(c - shift) % 1 for c in plan(sigma, r)[2] for shift in shifts}
    ends = sorted(ends)
    for a, b in pairwise(ends):
        u = min(float((a + b) / 2), LAST)
        pieces = distribute(result, ranks, scalings, reduction="unbiased", u=u)
        for mean, piece, r, s in zip(means, pieces, ranks, scalings, strict=True):
            assert piece.rank == r
            mean += float(b - a) * s * dense(piece)
    gate = 2 * gate_of(result.factors, F64)
    for mean in means:
        assert np.linalg.norm(mean - W) <= gate


def test_the_mean_over_many_clients_is_far_nearer_than_a_slice():
    sigma = SPECTRA["decaying"]
    result = whole_result(sigma)
    pieces = distribute(result, [8] * 16, reduction="unbiased", u=0.6)
    mean = sum(dense(piece) for piece in pieces) / 16
    (slice_,) = distribute(result, [8])
    W = np.diag(sigma)
    far = np.linalg.norm(dense(slice_) - W)
    assert np.linalg.norm(mean - W) < far / 3
    assert all(np.linalg.norm(dense(piece) - W) > 2 * far for piece in pieces)


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_the_dtype_of_the_result_is_kept(dtype):
    result = aggregate(clients((2,), dtype=dtype), "flexlora", rank="full")
    u = torch.tensor([0.2, 0.9])
    pieces = distribute(result, [3, 12], reduction="unbiased", u=u)
    for piece, r in zip(pieces, (3, 12), strict=True):
        assert piece.A.dtype == piece.B.dtype == dtype
        assert (piece.A.shape, piece.B.shape) == ((2, r, IN), (2, OUT, r))
    W, whole = exact(result.factors), exact(pieces[1])
    for i in range(2):
        P = LowRank(result.A[i].double(), result.B[i].double())
        assert np.linalg.norm(W[i] - whole[i]) <= gate_of(P, dtype)
    as_numpy = aggregate([numpy_of(c) for c in clients()], "flexlora", rank="full")
    (piece,) = distribute(as_numpy, [2], reduction="unbiased", u=0.3)
    assert isinstance(piece.A, np.ndarray)


def numpy_of(update):
    return ClientUpdate(update.A.numpy(), update.B.numpy(), weight=update.weight, id=update.id)


def test_empty_slots_are_filled_as_ever():
    result = whole_result([3.0, 2.0, 1.0])
    drawn = distribute(result, [5, 2, 4], reduction="unbiased", u=0.5)
    sliced = distribute(result, [5, 3, 4])
    for k, r in ((0, 5), (2, 4)):
        assert torch.equal(drawn[k].A[3:r], sliced[k].A[3:r])
        assert drawn[k].A[3:r].any(-1).all()
        assert not drawn[k].B[:, 3:].any()
    assert distribute(result, [], reduction="unbiased", u=0.5) == []


def test_a_generator_draws_u_and_nothing_else_does():
    result = aggregate(clients((2,)), "flexlora", rank="full")
    u = torch.rand(2, generator=torch.Generator().manual_seed(5), dtype=F64)
    wanted = distribute(result, [2, 2], reduction="unbiased", u=u)
    generator = torch.Generator().manual_seed(5)
    found = distribute(result, [2, 2], reduction="unbiased", generator=generator)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.A, b.A)
        assert torch.equal(a.B, b.B)
    state = torch.random.get_rng_state()
    with pytest.raises(InputValueError, match=r"u=.*anew"):
        distribute(result, [2, 2], reduction="unbiased")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("flexlora", {}, "rank='full'"),
        ("flexlora", {"rank": "full", "energy": 0.5}, "rank='full'"),
        ("flexlora", {"fold_rest": True}, "rank='full'"),
        ("rb", {"rank": "full"}, "slot"),
        ("hetlora", {}, "slot"),
    ],
)
def test_results_that_cannot_be_drawn_from(method, options, match):
    result = aggregate(clients(), method, **options)
    with pytest.raises(InputValueError, match=match):
        distribute(result, [2], reduction="unbiased", u=0.5)


def test_a_frozen_factor_is_not_mixed():
    A = factors().A[:3]
    updates = [ClientUpdate(A, factors(seed=k, R=3).B) for k in range(2)]
    result = replace(aggregate(updates, "ffa"), slotted=False)
    with pytest.raises(HetLoRAError, match=r"shared = \['B'\]"):
        distribute(result, [2], reduction="unbiased", u=0.5)


def test_options_of_distribute_are_checked():
    result = whole_result([3.0, 2.0, 1.0])
    with pytest.raises(InputValueError, match=r"reduction=.*truncate"):
        distribute(result, [2], reduction="unbias")
    with pytest.raises(InputValueError, match=r"u=.*nothing is drawn"):
        distribute(result, [2], u=0.5)
    with pytest.raises(InputValueError, match="u="):
        distribute(result, [2], reduction="unbiased", u=1.0)
    # Nothing was cut from a result that has the rank anyway, and its draws are itself.
    fitting = aggregate(clients(ranks=(1, 1, 1)), "flexlora", rank=3)
    (piece,) = distribute(fitting, [3], reduction="unbiased", u=0.5)
    gate = gate_of(fitting.factors, F64)
    assert np.linalg.norm(dense(piece) - dense(fitting.factors)) <= gate
