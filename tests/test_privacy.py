"""Clips that hold after rounding, and sensitivities that no neighbour exceeds and some attain."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetlora_agg import METHODS, ClientUpdate, InputTypeError, InputValueError, aggregate
from hetlora_agg.privacy import (
    ADJACENCIES,
    clip_layers,
    clip_message,
    clip_update,
    sensitivity,
)
from reference import array, total

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
FOLDS = {"both": (0.5, 0.5), "into B": (0.0, 1.0), "into A": (1.0, 0.0)}


def exact(X):
    """The entries as fractions."""
    return [[Fraction(float(x)) for x in row] for row in np.asarray(X, dtype=np.float64)]


def exact_square(B, A):
    """‖B A‖_F², nothing rounded."""
    B, A = exact(B), exact(A)
    columns = list(zip(*A, strict=True))
    products = (sum(b * a for b, a in zip(row, c, strict=True)) for row in B for c in columns)
    return sum(x * x for x in products)


def folded(update, powers):
    """The factors with the scaling in them, rounded to the dtype they are computed in."""
    A, B = (array(X.to(F64)) for X in (update.A, update.B))
    kind = np.float64 if F64 in (update.A.dtype, update.B.dtype) else np.float32
    root_A, root_B = (float(update.scaling) ** power for power in powers)
    return (B * root_B).astype(kind), (A * root_A).astype(kind)


# --- clipping -----------------------------------------------------------------------------------


@st.composite
def updates(draw):
    """Small updates of any dtype and size; some of components that cancel but for a trifle."""
    dtype = draw(st.sampled_from([F16, BF16, F32, F64]))
    rank, rows, columns = (draw(st.integers(1, 3)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = 10.0 ** draw(st.integers(-2, 2))
    B, A = size * rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
    if draw(st.booleans()):
        trifle = 10.0 ** draw(st.integers(-9, -1))
        B, A = np.hstack([B, -B]), np.vstack([A, A * (1 + trifle)])
    A, B = (torch.from_numpy(X).to(dtype) for X in (A, B))
    return ClientUpdate(A, B, scaling=draw(st.sampled_from([1.0, 0.5, 4 / 3, 7e-3, 123.0])))


@given(update=updates(), power=st.integers(-6, 6), digits=st.floats(1, 10))
def test_a_clipped_norm_is_never_above_the_clip(update, power, digits):
    clip = digits * 10.0**power
    clipped = clip_update(update, clip)
    assert clipped.A is update.A
    assert clipped.B is update.B
    for powers in FOLDS.values():
        assert exact_square(*folded(clipped, powers)) <= Fraction(clip) ** 2
    # Not lower either than rounding asks for, which is relative to Σ ‖b_j‖ ‖a_j‖.
    A, B = array(update.A.to(F64)), array(update.B.to(F64))
    terms = float(np.linalg.norm(B, axis=0) @ np.linalg.norm(A, axis=1))
    norm = math.sqrt(exact_square(B, A)) * update.scaling
    slack = 1e-14 if update.A.dtype == F64 else 2.5e-7
    # Products through QR: 10 max(out, in) ε64 more.
    slack = (slack + 60 * np.finfo(float).eps) * terms * update.scaling
    if norm + slack <= clip:
        assert clipped.scaling == update.scaling
    assert clipped.scaling * (norm + slack) >= update.scaling * min(clip, norm) * (1 - 1e-14)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_every_rounding_up_is_allowed_for(dtype):
    # Of a single number both factors may be rounded up by nearly half an ulp.
    rng = np.random.default_rng(7)
    for b, a in 1 + rng.uniform(0, 1, (400, 2)):
        number = ClientUpdate(torch.tensor([[a]]).to(dtype), torch.tensor([[b]]).to(dtype))
        for powers in FOLDS.values():
            assert exact_square(*folded(clip_update(number, 1.0), powers)) <= 1


def test_components_that_cancel_are_clipped_by_their_product():
    b, a = torch.ones(2, 1, dtype=F64), torch.ones(1, 2, dtype=F64)
    pair = ClientUpdate(torch.cat([a, 1.001 * a]), torch.cat([1e3 * b, -1e3 * b], dim=1))
    assert clip_update(pair, 2.1).scaling == 1.0
    assert clip_update(pair, 1.0).scaling == pytest.approx(0.5, rel=1e-9)


def test_all_layers_count_together():
    rng = np.random.default_rng(0)
    layers = {
        "q": ClientUpdate(rng.standard_normal((2, 5)), rng.standard_normal((4, 2)), scaling=2.0),
        "v": ClientUpdate(rng.standard_normal((3, 6)), rng.standard_normal((3, 3)), weight=7),
        "zero": (np.zeros((1, 3)), np.ones((3, 1))),
    }
    norms = [2 * np.linalg.norm(layers["q"].B @ layers["q"].A)]
    norms.append(np.linalg.norm(layers["v"].B @ layers["v"].A))
    clipped = clip_layers(layers, 1.5)
    factor = 1.5 / math.hypot(*norms)
    assert list(clipped) == ["q", "v", "zero"]
    assert clipped["q"].scaling == pytest.approx(2 * factor, rel=1e-12)
    assert clipped["v"].scaling == pytest.approx(factor, rel=1e-12)
    assert clipped["zero"].scaling == pytest.approx(factor, rel=1e-12)
    assert isinstance(clipped["zero"].A, np.ndarray)
    assert clipped["v"].weight == 7
    assert clip_layers(layers, 100.0)["q"] is layers["q"]


def test_leading_dimensions_are_layers():
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 3, 2, 5, generator=g), torch.randn(2, 3, 4, 2, generator=g)
    apart = {f"{i}{j}": (A[i, j], B[i, j]) for i in range(2) for j in range(3)}
    batch = clip_update((A, B), 1.0)
    assert clip_layers(apart, 1.0)["12"].scaling == pytest.approx(batch.scaling, rel=1e-13)
    assert np.linalg.norm(batch.scaling * array(B.double() @ A.double())) <= 1.0


def test_the_clip_does_not_depend_on_how_the_update_is_written():
    rng = np.random.default_rng(1)
    A, B, G = (rng.standard_normal(s) for s in ((3, 6), (5, 3), (3, 3)))
    ours = clip_update((A, B), 0.7).scaling
    theirs = clip_update((np.linalg.solve(G, A) * 1e3, B @ G / 1e3), 0.7).scaling
    assert ours == pytest.approx(theirs, rel=1e-11)


def test_zeros_and_extremes_are_clipped_too():
    assert clip_update((torch.zeros(1, 2), torch.ones(2, 1)), 1e-3).scaling == 1.0
    huge = ClientUpdate(torch.full((1, 2), 1e150, dtype=F64), torch.full((2, 1), 1e150, dtype=F64))
    assert clip_update(huge, 1.0).scaling == pytest.approx(0.5e-300, rel=1e-12)


def test_what_cannot_be_clipped():
    good = (torch.ones(1, 2), torch.ones(2, 1))
    with pytest.raises(InputValueError, match=r"clip=: expected a finite number > 0, got 0"):
        clip_update(good, 0)
    with pytest.raises(InputValueError, match=r"clip=: expected a finite number > 0, got nan"):
        clip_message({"A": torch.ones(1)}, math.nan)
    with pytest.raises(InputValueError, match="NaN or Inf in the factors"):
        clip_update((torch.full((1, 2), math.nan), torch.ones(2, 1)), 1)
    with pytest.raises(InputValueError, match="layer 'q': NaN or Inf"):
        clip_layers({"q": (torch.full((1, 2), math.inf), torch.ones(2, 1))}, 1)
    with pytest.raises(InputTypeError, match=r"for one layer call clip_update"):
        clip_layers(good, 1)
    with pytest.raises(InputTypeError, match="expected a ClientUpdate"):
        clip_update(torch.ones(2, 2), 1)
    wide = ClientUpdate(torch.full((1, 2), 1e200, dtype=F64), torch.full((2, 1), 1e200, dtype=F64))
    with pytest.raises(InputValueError, match="leaves float64"):
        clip_update(wide, 1)
    huge = ClientUpdate(torch.full((1, 2), 1e150, dtype=F64), torch.full((2, 1), 1e150, dtype=F64))
    with pytest.raises(InputValueError, match="too small by the norm"):
        clip_update(huge, 1e-30)
    with pytest.raises(InputTypeError, match="floating tensor"):
        clip_message({"A": np.ones(3)}, 1)
    with pytest.raises(InputValueError, match="NaN or Inf"):
        clip_message({"A": torch.tensor([math.nan])}, 1)


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([F32, F64, F16]),
    power=st.integers(-3, 3),
    digits=st.floats(1, 10),
)
def test_a_clipped_message_is_never_above_the_clip(seed, dtype, power, digits):
    rng, clip = np.random.default_rng(seed), digits * 10.0**power
    sizes = {"A": (2, 3), "B": (4, 2)}
    message = {k: torch.from_numpy(rng.standard_normal(s)).to(dtype) for k, s in sizes.items()}
    clipped = clip_message(message, clip)

    def squares(tensors):
        return sum(Fraction(float(x)) ** 2 for X in tensors.values() for x in X.flatten())

    assert squares(clipped) <= Fraction(clip) ** 2
    # the library allows for two roundings and for float64 sums over 14 squares; float16 entries
    # under 6e-5 have fewer digits
    slack = 4 * torch.finfo(dtype).eps + 30 * np.finfo(float).eps
    small = 6e-8 * 4 if dtype == F16 else 0.0
    least = min(clip, math.sqrt(squares(message))) * (1 - slack) - small
    assert math.sqrt(squares(clipped)) >= least
    assert all(clipped[k].dtype == dtype and clipped[k] is not message[k] for k in sizes)


def test_a_message_just_above_the_clip_is_clipped():
    message = {"A": torch.tensor([3.0, 4.0], dtype=F64)}
    clipped = clip_message(message, 5 * (1 - 1e-12))["A"]
    assert exact_square([[1.0]], [clipped.tolist()]) <= (5 * (1 - Fraction(1, 10**12))) ** 2
    assert clip_message(message, 5 * (1 + 1e-12))["A"].tolist() == [3.0, 4.0]


# --- sensitivity: bounds by enumeration ---------------------------------------------------------

OUT = IN = 5
BETA = 0.25
STACKS = [
    ("flora", {}),
    ("fedex", {}),
    ("flexlora", {"rank": "full"}),
    ("fedask", {"rank": "full"}),
]
SLOTTED = ("rb", {"rank": "full", "align": "svd", "floor": BETA})
COHORTS = {
    "equal": ((1, 1, 1), (1.0, 1.0, 1.0), None),
    "one large": ((2, 1, 3, 1), (1.0, 5.0, 2.0, 1.0), None),
    "lone owner": ((1, 1, 1, 4), (3.0, 3.0, 3.0, 1.0), None),
    "slots": ((2, 1, 2, 1), (1.0, 2.0, 2.0, 3.0), ((0, 3), (1,), (0, 2), (3,))),
    "six": ((1, 2, 1, 2, 1, 3), (1.0, 2.0, 1.0, 3.0, 1.0, 1.0), None),
}


def one_direction(rank, sign):
    """All of the norm 1 in one direction, the same for everybody."""
    A, B = np.zeros((rank, IN)), np.zeros((OUT, rank))
    A[0, 0], B[0, 0] = 1.0, sign
    return A, B


def spread(rank, sign):
    """The norm 1 spread evenly over as many directions as there are components."""
    A, B = np.zeros((rank, IN)), np.zeros((OUT, rank))
    for j in range(rank):
        A[j, j], B[j, j] = 1.0, sign / math.sqrt(rank)
    return A, B


def released(name, clients, **options):
    """The total update that is published, dense."""
    return total(aggregate(clients, name, **options))


def client(shape, k, signs, cohort, zero=0.0):
    """Client k's update for every sign in ``signs``, which become leading dimensions."""
    ranks, weights, slots = cohort
    A, B = shape(ranks[k], 1.0)
    signs = np.asarray(signs, dtype=np.float64)[..., None, None]
    A, B = np.broadcast_to(A, (*signs.shape[:-2], *A.shape)), signs * B * (1 - zero)
    own = None if slots is None else slots[k]
    return ClientUpdate(torch.tensor(A), torch.tensor(B), weight=weights[k], slots=own)


def largest_move(name, options, cohort, adjacency):
    """The largest distance between the releases of two neighbours, clip 1.

    Over all signs of all clients' extremal updates, and over all clients.
    """
    K, largest = len(cohort[0]), 0.0
    signs = np.array(list(itertools.product((1, -1), repeat=K)))
    for shape in (one_direction, spread):
        everybody = [client(shape, k, signs[:, k], cohort) for k in range(K)]
        these = released(name, everybody, **options)
        for k in range(K):
            other = {
                "zeroed": [client(shape, k, signs[:, k], cohort, zero=1.0)],
                "replaced": [client(shape, k, -signs[:, k], cohort)],
                "removed": [],
            }[adjacency]
            those = released(name, everybody[:k] + other + everybody[k + 1 :], **options)
            largest = max(largest, np.linalg.norm(these - those, axis=(-2, -1)).max())
    return largest


def by_hand(weights, adjacency, floor=None):
    """The bounds of the derivations, with fractions, for the clip 1."""
    n = [Fraction(w) for w in weights]
    p = max(n) / sum(n)
    if floor is None:
        return float({"zeroed": p, "replaced": 2 * p, "removed": 2 * p}[adjacency])
    beta = Fraction(floor)
    own = min(Fraction(1), p / beta)
    grown = p / (beta * (beta + (1 - beta) * p))
    return float({"zeroed": own, "replaced": 2 * own, "removed": own + grown}[adjacency])


@pytest.mark.parametrize("adjacency", sorted(ADJACENCIES))
@pytest.mark.parametrize("cohort", [COHORTS[k] for k in ("equal", "one large", "slots")])
@pytest.mark.parametrize(("name", "options"), STACKS)
def test_no_neighbour_moves_the_mean_by_more_and_one_by_as_much(name, options, cohort, adjacency):
    bound = sensitivity(name, clip=1.0, weights=cohort[1], adjacency=adjacency, **options)
    assert bound.l2 == pytest.approx(by_hand(cohort[1], adjacency), rel=1e-15)
    moved = largest_move(name, options, cohort, adjacency)
    assert moved <= bound.l2 * (1 + 1e-12)
    assert moved >= bound.l2 * (1 - 1e-12)


@pytest.mark.parametrize("adjacency", sorted(ADJACENCIES))
@pytest.mark.parametrize("cohort", COHORTS.values(), ids=COHORTS)
def test_no_neighbour_moves_aligned_and_floored_slots_by_more(cohort, adjacency):
    name, options = SLOTTED
    bound = sensitivity(name, clip=1.0, weights=cohort[1], adjacency=adjacency, **options)
    assert bound.l2 == pytest.approx(by_hand(cohort[1], adjacency, BETA), rel=1e-15)
    assert largest_move(name, options, cohort, adjacency) <= bound.l2 * (1 + 1e-12)


def rare_slots(floor, p):
    """The first client owns a slot alone, and with each group of others one that is just common.

    Leaving, it takes its own share along, and frees as much of every other slot as can be: the
    others' slots are held by β of the weight each, without it. A group is as many clients as it
    takes for the first to have the largest weight of all.
    """
    groups = round(1 / floor)
    members = math.ceil((1 - p) / groups / p)
    each = (1 - p) / groups / members
    others = [(j,) for j in range(1, groups + 1) for _ in range(members)]
    slots = (tuple(range(groups + 1)), *others)
    return (groups + 1, *(1,) * len(others)), (p, *(each for _ in others)), slots


@pytest.mark.parametrize("p", [0.01, 0.1])
@pytest.mark.parametrize("floor", [0.5, 1 / 3, 0.25])
def test_some_neighbour_attains_every_bound_of_slots(floor, p):
    cohort = rare_slots(floor, p)
    options = {"rank": "full", "align": "svd", "floor": floor}
    assert max(cohort[1]) == p
    signs = (-1, *(1,) * (len(cohort[1]) - 1))
    everybody = [client(one_direction, k, s, cohort) for k, s in enumerate(signs)]
    for adjacency, other in {
        "zeroed": [client(one_direction, 0, -1, cohort, zero=1.0)],
        "replaced": [client(one_direction, 0, 1, cohort)],
        "removed": [],
    }.items():
        there = released("rb", everybody, **options)
        moved = np.linalg.norm(there - released("rb", other + everybody[1:], **options))
        bound = sensitivity("rb", clip=1.0, weights=cohort[1], adjacency=adjacency, **options)
        assert bound.l2 == pytest.approx(by_hand(cohort[1], adjacency, floor), rel=1e-12)
        assert moved == pytest.approx(bound.l2, rel=1e-9)
        if adjacency == "removed":
            # What the others gain grows as 1/β², not as β^-3/2.
            assert moved > p / floor * (1 + floor**-0.5)


def test_the_bound_of_slots_is_that_of_the_largest_share():
    # Lone owner of a slot with the largest share, under the floor: γ = p / β for it.
    cohort = ((2, 1, 1, 1), (1.2, 1.0, 1.0, 1.0), None)
    options = {"rank": "full", "align": "svd", "floor": 0.5}
    these = [ClientUpdate(*_in_slot_one(), None, 1.2), *_others(cohort)]
    those = [ClientUpdate(*_in_slot_one(zero=1.0), None, 1.2), *_others(cohort)]
    moved = np.linalg.norm(released("rb", these, **options) - released("rb", those, **options))
    bound = sensitivity("rb", clip=1.0, weights=cohort[1], **options).l2
    # Its own SVD puts half of the square of its norm into the slot that it owns alone.
    shares = (1.2 / 4.2, (1.2 / 4.2) / 0.5)
    assert moved == pytest.approx(math.hypot(*shares) / math.sqrt(2), rel=1e-12)
    assert bound == pytest.approx(shares[1], rel=1e-15)


def _in_slot_one(zero=0.0):
    A, B = spread(2, 1.0)
    return torch.from_numpy(A), torch.from_numpy(B * (1 - zero))


def _others(cohort):
    return [client(one_direction, k, 1.0, cohort) for k in (1, 2, 3)]


# --- what has no bound --------------------------------------------------------------------------

M, DELTA = 1e3, 1e-3


def cancelling(zero=0.0):
    """B = [M b, −M b], A = [a; (1 + δ) a]: the product has norm M δ = 1, the components M."""
    A, B = np.zeros((2, IN)), np.zeros((OUT, 2))
    A[:, 0], B[0] = (1.0, 1.0 + DELTA), (M * (1 - zero), -M * (1 - zero))
    return ClientUpdate(torch.from_numpy(A), torch.from_numpy(B))


@pytest.mark.parametrize("floor", [None, BETA])
def test_components_that_cancel_pass_the_clip_and_break_unaligned_slots(floor):
    others = [client(one_direction, 0, 1, ((1,), (1.0,), None)) for _ in range(9)]
    assert clip_update(cancelling(), 1.001).scaling == 1.0
    moved = {}
    for align in (None, "svd"):
        options = {"rank": "full", "align": align, "floor": floor}
        with_it = released("rb", [cancelling(), *others], **options)
        zeroed = released("rb", [cancelling(zero=1.0), *others], **options)
        moved[align] = float(np.linalg.norm(with_it - zeroed))
    bound = sensitivity(
        "rb", clip=1.001, weights=[1.0] * 10, rank="full", align="svd", floor=floor or 1.0
    )
    # Shares 0.1 of slot 0 and 1, or 0.1 / β, of slot 1: M (γ_1 (1 + δ) − γ_0).
    shares = (0.1, 1.0 if floor is None else 0.1 / floor)
    assert moved[None] == pytest.approx(M * (shares[1] * (1 + DELTA) - shares[0]), rel=1e-9)
    assert moved[None] > 300 * bound.l2
    assert moved["svd"] <= bound.l2


@pytest.mark.parametrize("name", ["flexlora", "rb"])
def test_truncation_has_no_bound(name):
    """Where two singular values meet the least change exchanges what is kept."""

    def diagonal(x, y):
        return ClientUpdate(torch.eye(2, dtype=F64), torch.diag(torch.tensor([x, y], dtype=F64)))

    half = math.sqrt(0.5)
    for K in (6, 60):
        others = [diagonal(half, half)] * (K - 1)
        moved = np.linalg.norm(
            released(name, [diagonal(1.0, 0.0), *others], rank=1)
            - released(name, [diagonal(0.0, 1.0), *others], rank=1)
        )
        # What is not truncated moves by p √2, within the bound 2 p.
        bound = sensitivity(
            "flexlora", clip=1.0, weights=[1] * K, adjacency="replaced", rank="full"
        )
        assert moved > (K / 6) * 3 * bound.l2
        assert moved > 1.0


CALL = {"clip": 1.0, "weights": [1, 2]}


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("rb", {}, "truncation has no bound"),
        ("flexlora", {}, "truncation has no bound"),
        ("flexlora", {"rank": 8}, "truncation has no bound"),
        ("flexlora", {"rank": "full", "energy": 0.9}, "no bound is known with energy="),
        ("rb", {"rank": "full"}, "take each client's own SVD with align='svd'"),
        ("rb", {"rank": "full", "floor": 0.5}, "take each client's own SVD with align='svd'"),
        ("rb", {"rank": "full", "align": "svd"}, "owns a slot alone counts there in full"),
        ("raflora", {"rank": "full"}, "a clip of the product does not bound"),
        ("zeropad", {}, r"a clip of the product does not bound .* fedex, .*flora.* rb"),
        ("hetlora", {}, "a clip of the product does not bound"),
        ("median", {}, "a clip of the product does not bound"),
    ],
)
def test_what_has_no_bound_says_why(name, options, why):
    with pytest.raises(InputValueError, match=f"sensitivity of {name!r}: .*{why}"):
        sensitivity(name, **CALL, **options)


def test_options_whose_effect_is_not_derived_are_refused():
    floored = {"rank": "full", "align": "svd", "floor": 0.5}
    assert sensitivity("rb", **CALL, **floored, quorum=2).l2 == 1.0
    with pytest.raises(InputValueError, match="no bound is known with quorum= for adjacency 'rem"):
        sensitivity("rb", **CALL, **floored, quorum=2, adjacency="removed")
    with pytest.raises(InputValueError, match="weight_cap="):
        sensitivity("rb", **CALL, **floored, weight_cap=0.5)
    with pytest.raises(InputTypeError, match="unknown option"):
        sensitivity("flora", **CALL, rank="full")
    assert sensitivity("rb", **CALL, **floored, weight_cap=None).l2 == 1.0


def test_every_method_that_is_the_exact_mean_has_the_bound_of_the_mean():
    for name, entry in METHODS.items():
        if "exact" in entry.claims and not entry.needs:
            assert sensitivity(name, **CALL, **entry.claims["exact"]).l2 == 2 / 3


def test_a_fixed_denominator():
    call = {"clip": 3.0, "weights": [0, 2.0, 4.0], "total": 100.0}
    assert sensitivity("flora", **call).l2 == pytest.approx(0.12, rel=1e-15)
    assert sensitivity("flora", **call, adjacency="removed").l2 == pytest.approx(0.12, rel=1e-15)
    assert sensitivity("flora", **call, adjacency="replaced").l2 == pytest.approx(0.24, rel=1e-15)
    with pytest.raises(InputValueError, match="total=: 'rb' divides by slot"):
        sensitivity("rb", **call, rank="full", align="svd", floor=0.5)


def test_wrong_numbers():
    with pytest.raises(InputValueError, match="weights: expected at least one above 0"):
        sensitivity("flora", clip=1.0, weights=[0.0])
    with pytest.raises(InputValueError, match="weights: expected a finite number >= 0"):
        sensitivity("flora", clip=1.0, weights=[1.0, -1.0])
    with pytest.raises(InputTypeError, match="weights: expected a list"):
        sensitivity("flora", clip=1.0, weights=3)
    with pytest.raises(InputValueError, match="removing the only client"):
        sensitivity("flora", clip=1.0, weights=[3.0, 0.0], adjacency="removed")
    with pytest.raises(InputValueError, match="did you mean 'zeroed'"):
        sensitivity("flora", **CALL, adjacency="zero")
    assert sensitivity("flora", clip=1.0, weights=[1e308, 1e308]).l2 == 0.5


def test_what_an_accountant_needs():
    found = sensitivity("flora", clip=2.0, weights=[1, 3])
    assert (found.clip, found.largest_share, found.l2) == (2.0, 0.75, 1.5)
    assert found.deviation(1.2) == pytest.approx(1.8)
    assert any("before any truncation" in line for line in found.conditions)
    assert ADJACENCIES["zeroed"] in found.conditions
    with pytest.raises(InputValueError, match="noise_multiplier"):
        found.deviation(0.0)
