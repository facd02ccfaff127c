"""Compress: which rank is kept, what is left out, and in which form both come back."""

from fractions import Fraction
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch

from hetlora_agg import InputTypeError, InputValueError, LowRank
from hetlora_agg.compression import compress, divide, truncate

F16, F32, F64 = torch.float16, torch.float32, torch.float64


def diagonal(*spectra, dtype=F64):
    """``diag(σ)``, one layer for each spectrum; a single one without layers."""
    S = torch.tensor(spectra if len(spectra) > 1 else spectra[0], dtype=dtype)
    return LowRank(torch.diag_embed(S), torch.eye(S.shape[-1], dtype=dtype).expand(*S.shape, -1))


def message(error, call, *arguments, **options):
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


# --- the form -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
def test_where_the_singular_values_go(dtype):
    W = diagonal((4.0, 1.0), (1.0, 0.25), dtype=dtype)
    found = {split: compress(W, split=split) for split in ("balanced", "left", "right")}
    eye = torch.eye(2, dtype=dtype).expand(2, 2, 2)
    whole, root = diagonal((4.0, 1.0), (1.0, 0.25)), diagonal((2.0, 1.0), (1.0, 0.5))
    for split, A, B in (
        ("balanced", root.A, root.A),
        ("left", eye, whole.A),
        ("right", whole.A, eye),
    ):
        assert torch.equal(found[split].A, A.to(dtype)), split
        assert torch.equal(found[split].B, B.to(dtype)), split
        assert found[split].A.dtype == found[split].B.dtype == dtype
        # Kept in float64: their roots may lie beyond what float32 holds.
        assert found[split].singular_values.dtype == F64
    assert torch.equal(compress(W).A, found["balanced"].A)


def test_half_precision_comes_back_in_single():
    found = compress(diagonal((4.0, 1.0), dtype=F16))
    assert found.A.dtype == found.B.dtype == F32


@pytest.mark.parametrize("driver", ["gram", "qr", "dense"])
@pytest.mark.parametrize("options", [{}, {"reduction": "unbiased", "u": 0.25}])
def test_the_driver_is_the_callers(driver, options):
    found = compress(diagonal((3.0, 2.0, 1.0)), 2, driver=driver, **options)
    assert found.certificate.driver == driver


def test_truncation_keeps_the_leading_components():
    A, B = torch.arange(12.0).reshape(2, 3, 2), torch.arange(18.0).reshape(2, 3, 3)
    found = truncate(LowRank(A, B), 2)
    assert torch.equal(found.A, A[:, :2])
    assert torch.equal(found.B, B[:, :, :2])


# --- the rank -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({}, 4),
        ({"rank": "full"}, 4),
        ({"rank": 1}, 1),
        ({"rank": 3}, 3),
        ({"rank": 9}, 4),
        ({"rank": np.int64(2)}, 2),
        # The default is for rank=None alone, and energy= lifts it.
        ({"rank": None}, 4),
        ({"rank": None, "default": 2}, 2),
        ({"rank": "full", "default": 2}, 4),
        ({"rank": 3, "default": 2}, 3),
        ({"rank": None, "default": 2, "energy": 1.0}, 4),
        ({"rank": 3, "default": 2, "energy": 1.0}, 3),
        ({"rank": "full", "default": 2, "energy": 1.0}, 4),
        ({"rank": 3, "energy": 0.5}, 1),
    ],
)
def test_the_rank_that_is_kept(options, rank):
    found = compress(diagonal((8.0, 4.0, 2.0, 1.0)), **options)
    assert found.rank == rank
    assert found.singular_values.tolist() == [8.0, 4.0, 2.0, 1.0][:rank]
    assert (found.ranks is None) == ("energy" not in options)


@pytest.mark.parametrize(
    ("error", "options", "text"),
    [
        (InputValueError, {"rank": 0}, "rank=: expected an integer of at least 1, got 0"),
        (InputValueError, {"rank": -2}, "rank=: expected an integer of at least 1, got -2"),
        (InputTypeError, {"rank": 2.0}, "rank=: expected an integer of at least 1, got 2.0"),
        (InputTypeError, {"rank": True}, "rank=: expected an integer of at least 1, got True"),
        (
            InputValueError,
            {"rank": "half"},
            "rank=: expected an integer, 'full' or None, got 'half'",
        ),
        (InputValueError, {"energy": 0.0}, "energy=: expected a number in (0, 1], got 0.0"),
        (InputValueError, {"energy": 1.5}, "energy=: expected a number in (0, 1], got 1.5"),
        (
            InputValueError,
            {"split": "middle"},
            "unknown split= 'middle'; known: ['balanced', 'left', 'right']",
        ),
        (
            InputValueError,
            {"reduction": "unbias"},
            "unknown reduction= 'unbias'; did you mean 'unbiased'? known: ['truncate', 'unbiased']",
        ),
        (
            InputValueError,
            {"u": 0.5},
            "u=: expected None where nothing is drawn; use reduction='unbiased'",
        ),
        (
            InputValueError,
            {"reduction": "unbiased", "rank": 1, "u": 0.5, "energy": 0.5},
            "energy=: expected None by reduction='unbiased', whose draws all have one rank; give "
            "rank= instead",
        ),
        (
            InputValueError,
            {"reduction": "unbiased", "u": 0.5},
            "rank=: expected an integer by reduction='unbiased', got none, so that nothing is left "
            "to draw; give one, or use reduction='truncate'",
        ),
    ],
)
def test_what_is_refused(error, options, text):
    assert message(error, compress, diagonal((2.0, 1.0)), **options) == text


def test_dividing_refuses_the_same():
    whole = compress(diagonal((2.0, 1.0)))
    text = message(InputValueError, divide, whole, 0, default=1)
    assert text == "rank=: expected an integer of at least 1, got 0"
    text = message(InputValueError, divide, whole, None, default=1, energy=2.0)
    assert text == "energy=: expected a number in (0, 1], got 2.0"


# --- the energy ---------------------------------------------------------------------------------


SPECTRA = [tuple(sorted(s, reverse=True)) for s in combinations_with_replacement((1, 2, 3), 3)]


@pytest.mark.parametrize("unit", [1.0, 1e-300, 1e300])
def test_a_tie_counts_as_reached_whatever_the_unit(unit):
    # Every spectrum of three values is a layer; every prefix of each is aimed at once.
    W = diagonal(*SPECTRA)
    W = LowRank(W.A * unit, W.B)
    for aim in SPECTRA:
        squares = [Fraction(s) ** 2 for s in aim]
        for r in range(1, 3):
            reached = sum(squares[:r]) / sum(squares)
            for off in (-1e-12, 0.0, 1e-12):
                found = compress(W, energy=float(reached) + off)
                expected = [smallest(s, reached + Fraction(off)) for s in SPECTRA]
                assert found.ranks.tolist() == expected, (aim, r, off)


def smallest(spectrum, energy):
    """The first rank that reaches the energy, exactly."""
    squares = [Fraction(s) ** 2 for s in spectrum]
    return next(r for r in (1, 2, 3) if sum(squares[:r]) >= energy * sum(squares))


def test_what_a_capped_svd_never_saw_counts_as_left_out():
    # Σσ² = 21: the SVD of rank 2 knows of the last one by its tail alone.
    for energy, rank in ((16 / 21, 1), (0.7620, 2), (20 / 21, 2), (0.96, 2), (1.0, 2)):
        for unit in (1e-200, 2.0**-10, 1.0, 2.0**10, 1e200):
            W = diagonal((4.0 * unit, 2.0 * unit, 1.0 * unit))
            found = compress(W, 2, energy=energy)
            assert found.ranks.tolist() == rank, (energy, unit)
            left = sum(s**2 for s in (4.0, 2.0, 1.0)[rank:]) ** 0.5
            assert float(found.certificate.tail) == pytest.approx(left * unit, rel=1e-12, abs=0)


def test_a_flat_spectrum_is_not_kept_whole():
    # Of nine equal values the SVD of rank 8 saw all but one.
    W = diagonal((1.0,) * 9)
    for energy, rank in ((0.1, 1), (2 / 9, 2), (0.3, 3), (8 / 9, 8), (0.9, 8)):
        assert compress(W, 8, energy=energy).ranks.tolist() == rank, energy


def test_a_zero_matrix_keeps_one_component():
    for W in (diagonal((0.0, 0.0)), diagonal((0.0, 0.0), (4.0, 1.0))):
        found = compress(W, energy=1.0)
        assert found.ranks.flatten()[0] == 1
        assert float(found.certificate.tail.flatten()[0]) == 0.0
        assert torch.equal(found.dense(), W.dense())


def test_each_layer_is_cut_at_its_own_rank():
    W = diagonal((8.0, 4.0, 1.0), (1.0, 0.5, 0.25), (2.0, 2.0, 2.0))
    # 64/81 = .79 and 80/81; 16/21 = .762 and 20/21; thirds.
    found = compress(W, energy=0.78)
    assert found.ranks.tolist() == [1, 2, 3]
    assert found.ranks.dtype == torch.int64
    assert found.rank == 3
    assert found.singular_values.tolist() == [[8.0, 0.0, 0.0], [1.0, 0.5, 0.0], [2.0, 2.0, 2.0]]
    assert torch.allclose(found.dense(), torch.diag_embed(found.singular_values), rtol=1e-15)
    assert not found.B[0, :, 1:].any()
    assert found.certificate.kept.tolist() == [1, 2, 3]
    assert found.certificate.tail.tolist() == pytest.approx([17**0.5, 0.25, 0.0], rel=1e-14)
    narrower = compress(W, energy=0.5)
    assert narrower.ranks.tolist() == [1, 1, 2]
    assert narrower.rank == narrower.singular_values.shape[-1] == 2
    assert narrower.A.shape[-2] == narrower.B.shape[-1] == 2


def test_kept_counts_what_is_not_zero():
    # Of rank 1 although 3 were asked for: the others are no components.
    whole = compress(diagonal((5.0, 0.0, 0.0), (3.0, 2.0, 1.0)))
    kept, _ = divide(whole, 2, default=3)
    assert kept.certificate.kept.tolist() == [1, 2]


def test_what_is_left_out_keeps_its_size_at_both_ends_of_float64():
    W = diagonal((9e-300, 4e-300, 3e-300), (9e299, 4e299, 3e299))
    found = compress(W, energy=0.7)
    assert found.ranks.tolist() == [1, 1]
    assert found.certificate.tail.tolist() == pytest.approx([5e-300, 5e299], rel=1e-14, abs=0)


# --- in two -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "default", "energy", "kept"),
    [
        (1, 3, None, 1),
        (2, 3, None, 2),
        (None, 3, None, 3),
        (None, 1, None, 1),
        ("full", 1, None, 4),
        (9, 1, None, 4),
        (None, 1, 0.99, 3),
        ("full", 1, 0.99, 3),
        (2, 1, 0.99, 2),
        (1, 3, 0.99, 1),
        (None, 1, 0.95, 2),
        (None, 3, 0.7, 1),
    ],
)
def test_two_parts_by_hand(rank, default, energy, kept):
    # Σσ² = 354: 256/354 = .723, 337/354 = .952, 353/354 = .997. The roots are integers.
    S = torch.tensor([16.0, 9.0, 4.0, 1.0], dtype=F64)
    whole = compress(diagonal(S.tolist()))
    first, rest = divide(whole, rank, default=default, energy=energy)
    assert first.singular_values.tolist() == S[:kept].tolist()
    assert torch.equal(first.dense(), torch.diag(S * (torch.arange(4) < kept)))
    assert torch.equal(rest.dense(), torch.diag(S * (torch.arange(4) >= kept)))
    assert rest.rank == 4 - kept
    assert float(first.certificate.tail) == pytest.approx(float(S[kept:].norm()), rel=1e-15)
    assert (first.ranks is None) == (energy is None)
    if energy is not None:
        assert first.ranks.tolist() == kept


@pytest.mark.parametrize("dtype", [F32, F64])
def test_two_parts_of_layers_of_different_ranks(dtype):
    spectra = ((8.0, 4.0, 1.0), (1.0, 0.5, 0.25), (2.0, 2.0, 2.0))
    whole = compress(diagonal(*spectra, dtype=dtype))
    first, rest = divide(whole, None, default=1, energy=0.78)
    assert first.ranks.tolist() == [1, 2, 3]
    for part in (first, rest):
        assert part.A.dtype == part.B.dtype == dtype
    kept = torch.tensor([[8.0, 0.0, 0.0], [1.0, 0.5, 0.0], [2.0, 2.0, 2.0]], dtype=dtype)
    assert torch.allclose(first.dense(), torch.diag_embed(kept), rtol=1e-6)
    others = torch.tensor(spectra, dtype=dtype) - kept
    assert torch.allclose(rest.dense(), torch.diag_embed(others), rtol=1e-6)
    # What no layer leaves out is not carried along.
    assert rest.rank == 2
    capped, more = divide(whole, 2, default=1, energy=0.78)
    assert capped.ranks.tolist() == [1, 2, 2]
    assert more.dense().diagonal(dim1=-2, dim2=-1).count_nonzero(-1).tolist() == [2, 1, 1]


# --- one unbiased draw --------------------------------------------------------------------------


def test_a_draw_by_hand():
    # σ = 3, 1.5, .5 at rank 2: the first is kept surely, one of the others in place of both, 2.
    W = diagonal((3.0, 1.5, 0.5))
    for u, place in ((0.25, 1), (0.70, 1), (0.80, 2)):
        found = compress(W, 2, reduction="unbiased", u=u)
        expected = torch.zeros(3, dtype=F64)
        expected[0], expected[place] = 3.0, 2.0
        assert torch.allclose(found.dense(), torch.diag(expected), rtol=1e-14)
        assert found.singular_values.tolist() == pytest.approx([3.0, 2.0], rel=1e-14)
        assert found.ranks is None
        # 1.5 and .5 became 2 and 0, or 0 and 2.
        away = 0.5**0.5 if place == 1 else 4.5**0.5
        assert float(found.certificate.tail) == pytest.approx(away, rel=1e-14)


def test_a_draw_takes_its_options():
    W = diagonal((3.0, 1.5, 0.5), (3.0, 1.5, 0.5))
    u = torch.tensor([0.25, 0.8], dtype=F64)
    found = compress(W, None, default=2, reduction="unbiased", u=u, split="left")
    expected = torch.tensor([[3.0, 2.0, 0.0], [3.0, 0.0, 2.0]], dtype=F64)
    assert torch.allclose(found.dense(), torch.diag_embed(expected), rtol=1e-14)
    assert torch.allclose(found.A.square().sum(-1), torch.ones(2, 2, dtype=F64), rtol=1e-14)


def test_a_draw_needs_its_offset():
    text = message(InputValueError, compress, diagonal((2.0, 1.0)), 1, reduction="unbiased")
    assert text.startswith("u=: reduction='unbiased' expected a number in [0, 1)")
    for u in (1.0, -0.1, float("nan"), torch.tensor([0.5, 0.5])):
        with pytest.raises(InputValueError, match="u=: expected a number"):
            compress(diagonal((2.0, 1.0)), 1, reduction="unbiased", u=u)


# --- the device is that of the inputs -----------------------------------------------------------


def test_a_foreign_default_device_does_not_matter():
    W = diagonal((8.0, 4.0, 1.0), (1.0, 0.5, 0.25))
    with torch.device("meta"):
        whole = compress(W)
        cut = compress(W, energy=0.78)
        two = divide(whole, 2, default=1)
        uneven = divide(whole, None, default=1, energy=0.78)
        draw = compress(W, 2, reduction="unbiased", u=0.25)
    for found in (whole, cut, *two, *uneven, draw):
        assert found.A.device == found.B.device == W.A.device
        assert torch.isfinite(found.dense()).all()
    assert cut.ranks.device == W.A.device
    assert cut.ranks.tolist() == uneven[0].ranks.tolist() == [1, 2]
