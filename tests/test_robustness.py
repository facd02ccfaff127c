"""Distances through the factors, and what every rule does with them, against dense oracles."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from hetlora_agg import (
    METHODS,
    ClientUpdate,
    aggregate,
    aggregate_layers,
)
from hetlora_agg.errors import (
    ConvergenceError,
    InputTypeError,
    InputValueError,
    OptionValueError,
)
from hetlora_agg.intake import collect
from hetlora_agg.layers import read_layers
from hetlora_agg.robustness import (
    Rule,
    centered_clip,
    distances,
    geomed,
    multi_krum,
    nnm,
    norm_clip,
    squared_distances,
    trimmed_core,
)
from hetlora_agg.robustness.distances import pair_products, seen_norms, seen_products
from hetlora_agg.robustness.points import points_of
from hetlora_agg.validation import read_updates

F32, F64 = torch.float32, torch.float64
EPS = np.finfo(np.float64).eps

RULES = {
    "norm_clip": norm_clip(9.0),
    "nnm": nnm(2),
    "multi_krum": multi_krum(2),
    "krum": multi_krum(2, keep=1),
    "geomed": geomed(2),
    "centered_clip": centered_clip(f=2),
    "nnm, geomed": nnm(2).then(geomed(2)),
    "clip, nnm, clip": norm_clip(9.0).then(nnm(2)).then(centered_clip(3.0)),
    "clip, nnm": norm_clip(9.0).then(nnm(1)),
}


def clients(ranks=(4, 1, 9, 3, 2, 2, 6), layers=(), out=8, columns=7, dtype=F64, seed=0):
    """Clients of mixed ranks, weights, scalings and slots, with ids."""
    g = torch.Generator().manual_seed(seed)
    return [
        ClientUpdate(
            torch.randn(*layers, r, columns, generator=g, dtype=dtype),
            torch.randn(*layers, out, r, generator=g, dtype=dtype),
            weight=1.0 + k,
            scaling=(1.0, 0.5, 2.0)[k % 3],
            slots=tuple(reversed(range(k, k + r))),
            id=k,
        )
        for k, r in enumerate(ranks)
    ]


def components(updates):
    return collect(read_updates(updates)[0]).components()


def dense(updates):
    """(*layers, K, out, columns), float64, by NumPy."""
    return np.stack([u.scaling * u.B.double().numpy() @ u.A.double().numpy() for u in updates], -3)


def vectors(updates):
    """One long vector per client, all layers, (K, ·)."""
    W = dense(updates)
    return np.moveaxis(W, -3, 0).reshape(W.shape[-3], -1)


def answer(rule, updates):
    """Σ α_k ΔW_k as one long vector, and the coefficients."""
    alpha = rule(components(updates)).numpy()
    return alpha @ vectors(updates), alpha


# --- distances ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("layers", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(8, 7), (40, 30)], ids=["R above both", "R below both"])
def test_distances_equal_the_dense_ones(sizes, layers, dtype):
    updates = clients(layers=layers, out=sizes[0], columns=sizes[1], dtype=dtype)
    norms, squares = squared_distances(components(updates))
    W = dense(updates)
    assert norms.shape == (*layers, 7)
    assert squares.shape == (*layers, 7, 7)
    assert norms.dtype == squares.dtype == F64
    np.testing.assert_allclose(norms, (W**2).sum((-2, -1)), rtol=1e3 * torch.finfo(dtype).eps)
    expected = ((W[..., :, None, :, :] - W[..., None, :, :, :]) ** 2).sum((-2, -1))
    # the scalings' roots are folded in, in the clients' dtype
    np.testing.assert_allclose(squares, expected, rtol=1e3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("ranks", list(itertools.product((1, 2, 5), repeat=3)), ids=str)
def test_distances_do_not_mind_mixed_ranks(ranks):
    updates = clients(ranks)
    _, squares = squared_distances(components(updates))
    X = vectors(updates)
    np.testing.assert_allclose(squares, ((X[:, None] - X) ** 2).sum(-1), rtol=1e-13, atol=1e-13)


def test_a_client_of_rank_zero_counts_as_zero():
    updates = clients((2, 3))
    read, _ = read_layers({"q": updates, "v": updates[1:]}, "zero")
    c = collect(read["v"]).components()
    assert c.ranks == (0, 3)
    norms, squares = squared_distances(c)
    size = (vectors(updates)[1] ** 2).sum()
    np.testing.assert_allclose(norms, [0, size], rtol=1e-14)
    np.testing.assert_allclose(squares, [[0, size], [size, 0]], rtol=1e-14)


@pytest.mark.parametrize("block", [1, 2, 5, 26, 27, 100])
@pytest.mark.parametrize("bytes_", [1, 40_000], ids=["one layer at a time", "some"])
def test_blocks_and_chunks_change_nothing(monkeypatch, block, bytes_):
    updates = clients(layers=(5,))
    updates.append(replace(updates[0], A=updates[0].A * (1 + 1e-9), id=7))
    whole = squared_distances(components(updates))
    monkeypatch.setattr(distances, "BLOCK", block)
    monkeypatch.setattr(distances, "WORKING_BYTES", bytes_)
    for one, other in zip(squared_distances(components(updates)), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def exact(one, other):
    """‖ΔW_i − ΔW_j‖² in fractions, rounded once."""

    def entries(update):
        B, A = (
            [[Fraction(x) for x in row] for row in X.double().tolist()]
            for X in (update.B, update.A)
        )
        return [
            [sum(b * a[j] for b, a in zip(row, A, strict=True)) for j in range(len(A[0]))]
            for row in B
        ]

    return float(
        sum(
            (x - y) ** 2
            for left, right in zip(entries(one), entries(other), strict=True)
            for x, y in zip(left, right, strict=True)
        )
    )


def by_gram(one, other, dtype=np.float64):
    """The same from inner products alone, in that precision."""

    def inner(x, y):
        B = x.B.numpy().astype(dtype).T @ y.B.numpy().astype(dtype)
        return (B * (x.A.numpy().astype(dtype) @ y.A.numpy().astype(dtype).T)).sum(dtype=dtype)

    return float(inner(one, one) + inner(other, other) - 2 * inner(one, other))


def near(dtype, distance, out=6, columns=5, r=2):
    """Two clients whose updates differ by that part of their size."""
    g = torch.Generator().manual_seed(1)
    A, B = (torch.randn(*s, generator=g, dtype=F64) for s in ((r, columns), (out, r)))
    change = torch.randn(out, r, generator=g, dtype=F64) * distance
    return ClientUpdate(A.to(dtype), B.to(dtype), id=0), ClientUpdate(
        A.to(dtype), (B + change).to(dtype), id=1
    )


def test_near_duplicates_in_float32_survive():
    pair = near(F32, 1e-4)
    truth = exact(*pair)
    # a Gram matrix in the clients' own precision has lost them
    assert abs(by_gram(*pair, np.float32) - truth) > 0.5 * truth
    _, squares = squared_distances(components(pair))
    assert abs(float(squares[0, 1]) - truth) < 1e-7 * truth


@pytest.mark.parametrize("distance", [1e-7, 1e-9, 1e-10, 1e-12])
def test_near_duplicates_in_float64_go_through_triangles(distance, monkeypatch):
    pair = near(F64, distance)
    truth = exact(*pair)
    _, squares = squared_distances(components(pair))
    # rounding of the triangles is relative to the updates, not to their difference
    allowed = 100 * EPS / distance
    assert abs(math.sqrt(float(squares[0, 1])) - math.sqrt(truth)) < allowed * math.sqrt(truth)
    # negative controls: NumPy's Gram matrix, and ours without the second try
    monkeypatch.setattr(distances, "CANCELLED", 0.0)
    _, alone = squared_distances(components(pair))
    for found in (by_gram(*pair), float(alone[0, 1])):
        assert abs(found - truth) > 10 * allowed * truth


def test_near_duplicates_written_in_other_ways():
    one, other = near(F64, 1e-10)
    turned = replace(
        other,
        # powers of two, an exchange and a third component that is almost nothing: all exact
        A=torch.cat([other.A[1:] * 2**20, other.A[:1] / 2**20, torch.full((1, 5), 2.0**-45)]),
        B=torch.cat([other.B[:, 1:] / 2**20, other.B[:, :1] * 2**20, torch.ones(6, 1)], -1),
    )
    truth = exact(one, turned)
    assert truth > 0
    _, squares = squared_distances(components([one, turned]))
    assert abs(math.sqrt(float(squares[0, 1])) - math.sqrt(truth)) < 1e-4 * math.sqrt(truth)


def test_an_update_that_cancels_within_itself_has_its_norm():
    one, other = near(F64, 1e-10)
    both = ClientUpdate(torch.cat([one.A, other.A]), torch.cat([one.B, -other.B], -1), id=2)
    truth = exact(one, other)
    norms, _ = squared_distances(components([both, replace(one, id=0)]))
    assert abs(math.sqrt(float(norms[1])) - math.sqrt(truth)) < 1e-4 * math.sqrt(truth)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_equal_factors_are_at_distance_exactly_zero(dtype):
    updates = clients((3, 3, 2), layers=(2,), dtype=dtype)
    twice = [*updates, replace(updates[0], id=7), replace(updates[2], weight=9.0, id=8)]
    _, squares = squared_distances(components(twice))
    zero = squares == 0
    assert zero[:, 0, 3].all()
    assert zero[:, 2, 4].all()
    assert zero.sum() == 2 * (5 + 4)


def test_only_the_pairs_that_need_it_are_taken_again(monkeypatch):
    taken = []
    product_norm = distances.product_norm

    def counted(B, A):
        taken.append(len(B))
        return product_norm(B, A)

    monkeypatch.setattr(distances, "product_norm", counted)
    squared_distances(components(clients(layers=(4,))))
    assert taken == []
    pair = near(F64, 1e-9)
    squared_distances(components(pair))
    assert taken == [1]


@pytest.mark.parametrize(("left", "right"), [(1e80, 1e80), (1.0, 1e160), (1.0, 1e-165)])
def test_squares_that_leave_float64_are_refused(left, right):
    one, other = near(F64, 1.0)
    odd = replace(other, A=right * other.A, B=left * other.B, id="phone")
    with pytest.raises(InputValueError, match=r"'phone'.*float64"):
        squared_distances(components([one, odd]))


def test_distances_alone_may_leave_float64():
    # each norm fits, twice as much does not
    A, B = torch.ones(1, 1, dtype=F64), torch.full((1, 1), 1.2e154, dtype=F64)
    with pytest.raises(InputValueError, match="distance"):
        squared_distances(components([ClientUpdate(A, B, id=0), ClientUpdate(A, -B, id=1)]))


# --- rules against naive dense ones --------------------------------------------------------------


def oracle_clip(X, weight, bound):
    return np.stack([x * min(1.0, bound / np.linalg.norm(x)) for x in X])


def oracle_nnm(X, f):
    mixed = []
    for x in X:
        order = np.argsort([np.linalg.norm(x - y) for y in X], kind="stable")
        mixed.append(np.mean(X[order[: len(X) - f]], axis=0))
    return np.stack(mixed)


def oracle_krum(X, f, keep):
    scores = []
    for k, x in enumerate(X):
        others = sorted(np.sum((x - y) ** 2) for j, y in enumerate(X) if j != k)
        scores.append(math.fsum(others[: len(X) - f - 2]))
    return np.mean(X[np.argsort(scores, kind="stable")[:keep]], axis=0)


def oracle_centred(X, radius, iterations):
    medians = [sorted(np.linalg.norm(x - y) for y in X)[(len(X) - 1) // 2] for x in X]
    v = X[int(np.argmin(medians))]
    radius = min(medians) if radius is None else radius
    for _ in range(iterations):
        v = v + np.mean([(x - v) * min(1, radius / (np.linalg.norm(x - v) or 1)) for x in X], 0)
    return v


def imbalance(X, v):
    """‖Σ unit vectors‖ / n; those at v itself hold back with force one each."""
    far = [x - v for x in X if np.linalg.norm(x - v) > 1e-12 * np.linalg.norm(X, axis=1).max()]
    force = np.linalg.norm(np.sum([x / np.linalg.norm(x) for x in far], 0)) if far else 0.0
    return max(0.0, force - (len(X) - len(far))) / len(X)


@pytest.mark.parametrize("layers", [(), (3,)], ids=str)
@pytest.mark.parametrize("seed", range(4))
class TestAgainstDense:
    def test_norm_clip(self, seed, layers):
        updates = clients(layers=layers, seed=seed)
        X, p = vectors(updates), np.array([u.weight for u in updates])
        for bound in (0.1, float(np.median(np.linalg.norm(X, axis=1))), 1e6):
            found, alpha = answer(norm_clip(bound), updates)
            expected = p @ oracle_clip(X, p, bound) / p.sum()
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
            assert alpha.sum() <= 1 + 1e-15

    def test_nnm(self, seed, layers):
        updates = clients(layers=layers, seed=seed)
        p = np.array([u.weight for u in updates])
        for f in range(4):
            found, alpha = answer(nnm(f), updates)
            expected = p @ oracle_nnm(vectors(updates), f) / p.sum()
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
            assert abs(alpha.sum() - 1) < 1e-14

    def test_multi_krum(self, seed, layers):
        updates = clients(layers=layers, seed=seed)
        for f in range(3):
            for keep in range(1, 8 - f):
                found, _ = answer(multi_krum(f, keep), updates)
                expected = oracle_krum(vectors(updates), f, keep)
                np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
            standard, _ = answer(multi_krum(f), updates)
            np.testing.assert_array_equal(standard, answer(multi_krum(f, 7 - f), updates)[0])

    def test_centered_clip(self, seed, layers):
        updates = clients(layers=layers, seed=seed)
        for radius in (None, 2.0, 1e6):
            for iterations in (1, 3, 10):
                found, alpha = answer(centered_clip(radius, iterations=iterations), updates)
                expected = oracle_centred(vectors(updates), radius, iterations)
                np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
                assert abs(alpha.sum() - 1) < 1e-14

    def test_geomed_is_in_balance(self, seed, layers):
        updates = clients(layers=layers, seed=seed)
        for rule, X in (
            (geomed(3, tolerance=1e-9), vectors(updates)),
            (nnm(2).then(geomed(tolerance=1e-9)), oracle_nnm(vectors(updates), 2)),
            (norm_clip(8.0).then(geomed(tolerance=1e-9)), oracle_clip(vectors(updates), 0, 8.0)),
        ):
            found, alpha = answer(rule, updates)
            assert imbalance(X, found) <= 2e-9
            assert alpha.min() >= 0
            # negative control: the mean is not
            assert imbalance(X, X.mean(0)) > 1e-3

    def test_sentences(self, seed, layers):
        updates = clients(layers=layers, seed=seed)
        X = vectors(updates)
        clipped = oracle_clip(X, None, 9.0)
        for rule, expected in (
            (norm_clip(9.0).then(multi_krum(2)), oracle_krum(clipped, 2, 5)),
            (nnm(2).then(multi_krum(2)), oracle_krum(oracle_nnm(X, 2), 2, 5)),
            (
                norm_clip(9.0).then(nnm(2)).then(centered_clip(3.0)),
                oracle_centred(oracle_nnm(clipped, 2), 3.0, 10),
            ),
            (nnm(1).then(norm_clip(6.0)), None),
        ):
            found, _ = answer(rule, updates)
            if expected is None:
                p = np.array([u.weight for u in updates])
                expected = p @ oracle_clip(oracle_nnm(X, 1), p, 6.0) / p.sum()
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def line(*sizes, **fields):
    """Clients that are numbers."""
    one = torch.ones(1, 1, dtype=F64)
    return [ClientUpdate(one, x * one, id=k, **fields) for k, x in enumerate(sizes)]


@pytest.mark.parametrize(
    ("rule", "sizes", "expected"),
    [
        # 1 stays, 10 becomes 3, of equal weights
        (norm_clip(3.0), (1, -10), -1.0),
        # nearest two of 0, 1, 10: (0, 1), (0, 1), (1, 10)
        (nnm(1), (0, 1, 10), (0.5 + 0.5 + 5.5) / 3),
        # n − f − 2 = 2 nearest others: 0: 1 + 9, 1: 1 + 4, 3: 4 + 9, 100, −100 are far: 1, 0, 3, …
        (multi_krum(1, keep=1), (0, 1, 3, 100, -100), 1.0),
        (multi_krum(1, keep=3), (0, 1, 3, 100, -100), 4 / 3),
        (geomed(), (0, 1, 5, 7, 1000), 5.0),
        (geomed(), (2, 2, 2, -7, 1000), 2.0),
        # total distances are all 1e20, and the median is 5 all the same
        (geomed(), (0, 1, 5, 7, 1e20), 5.0),
        # from 2: ways 0, 0, 998 → 0.3
        (centered_clip(0.3, iterations=1), (2, 2, 1000), 2.1),
        # 0 stays in 0: (0, 1) → 0.5, 0.5, 5.5 → median
        (nnm(1).then(geomed()), (0, 1, 10), 0.5),
    ],
    ids=repr,
)
def test_worked_by_hand(rule, sizes, expected):
    result = aggregate(line(*sizes), "flora", weighting=rule)
    assert float(result.factors.dense()) == pytest.approx(expected, abs=1e-12)


def row_clients(X):
    """Clients whose updates are single rows."""
    return [ClientUpdate(row[None], torch.ones(1, 1, dtype=F64), id=k) for k, row in enumerate(X)]


def test_a_word_about_weights():
    # a weight counts under norm_clip and nowhere among the robust
    equal = line(1, 2, 3, 900, 2, 1)
    heavy = [replace(u, weight=1e9 if u.id == 3 else 1.0) for u in equal]
    for rule in (multi_krum(1), geomed(1), centered_clip(f=1), nnm(1).then(geomed(1))):
        one, other = (
            aggregate(u, "flora", weighting=rule) for u in (heavy, line(1, 2, 3, 900, 2, 1))
        )
        assert torch.equal(one.A, other.A)
    clipped = aggregate(heavy, "flora", weighting=norm_clip(3.0)).factors.dense()
    assert float(clipped) == pytest.approx(3.0, rel=1e-8)


# --- the geometric median ------------------------------------------------------------------------


def clouds():
    """Points on lines, in planes, in clusters, nearly equal, far from zero and from each other."""
    g = torch.Generator().manual_seed(0)
    for case in range(400):
        n = 2 + case % 11
        size = (1, 1, 2, 2, 3, 50, 2, 2)[case % 8]
        X = torch.randn(n, size, generator=g, dtype=F64)
        if case % 8 == 1:
            X = X.round()
        if case % 8 == 3:
            X = (2 * X).round()
        if case % 8 == 4:
            X = X.round() + 1e-9 * torch.randn(X.shape, generator=g, dtype=F64)
        if case % 8 == 6:
            X[n - (n - 1) // 2 :] *= 1e9
        if case % 8 == 7:
            X = X + 1e6
        yield X


def test_geomed_converges_on_every_cloud():
    for X in clouds():
        products, squares = X @ X.mT, (X[:, None] - X).square().sum(-1)
        alpha = geomed().coefficients(torch.ones(len(X), dtype=F64), products, squares)
        assert float(alpha.min()) >= 0
        assert abs(float(alpha.sum()) - 1) < 1e-12
        # no direction in which the total distance falls: checked about the answer, in NumPy
        Y = X.numpy() - X.numpy()[int(alpha.argmax())]
        v = alpha.numpy() @ Y
        own = np.linalg.norm(Y - v, axis=1)
        gained = max(math.fsum(own - np.linalg.norm(Y - w, axis=1)) for w in Y)
        assert gained <= 1e-5 * len(X) * np.median(own) + 1e-12


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9, 1e12, 1e20, 1e35])
@pytest.mark.parametrize("shift", [0.0, 10.0])
def test_far_clients_pull_with_force_one_in_their_own_direction(size, shift):
    # the near clients' distances to a far one differ by less than its rounding
    g = np.random.default_rng(0)
    near, away = g.standard_normal((5, 6)) + shift, g.standard_normal((4, 6))
    X = torch.from_numpy(np.concatenate([near, size * away]))
    updates = [
        ClientUpdate(row[None], torch.ones(1, 1, dtype=F64), id=k) for k, row in enumerate(X)
    ]
    alpha = geomed(tolerance=1e-7)(components(updates)).numpy()
    v = alpha @ X.numpy()
    balance = sum((x - v) / np.linalg.norm(x - v) for x in X.numpy())
    assert np.linalg.norm(balance) <= 1e-5 * 9
    # negative control: without them the median is another
    alone = geomed()(components(updates[:5])).numpy() @ near
    assert np.linalg.norm(alone - v) > 0.1


@pytest.mark.parametrize("spread", [1e-6, 1e-9])
def test_a_close_majority_far_from_zero_keeps_its_shape(spread):
    # the inner products of the five agree to the last digit; their distances do not
    g = np.random.default_rng(0)
    near = 1.0 + spread * g.standard_normal((5, 6))
    X = torch.from_numpy(np.concatenate([near, g.standard_normal((2, 6))]))
    updates = [
        ClientUpdate(row[None], torch.ones(1, 1, dtype=F64), id=k) for k, row in enumerate(X)
    ]
    alpha = geomed()(components(updates)).numpy()
    v = alpha @ (X.numpy() - 1)
    units = [(x - v) / np.linalg.norm(x - v) for x in X.numpy() - 1]
    assert np.linalg.norm(sum(units)) <= 1e-4


@pytest.mark.parametrize("seed", range(20))
def test_a_mixture_that_is_a_point_is_at_distance_zero_from_it(seed):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(5, 4, generator=g, dtype=F64)
    X[2] = (X[0] + X[1]) / 2
    points = points_of(X @ X.mT, (X[:, None] - X).square().sum(-1), torch.ones(5, dtype=F64))
    halves = torch.tensor([0.5, 0.5, 0, 0, 0, 0], dtype=F64)
    assert float(points.distances_to(halves)[2]) == 0
    assert float(points.distances_to(halves)[3]) > 0


def test_mixtures_of_the_same_clients_are_at_distance_zero():
    # far attackers leave all five honest the same neighbours, and themselves to each other
    X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    X = torch.cat([X, 1e9 + 1e3 * X[:2]])
    points = points_of(X @ X.mT, (X[:, None] - X).square().sum(-1), torch.ones(7, dtype=F64))
    rows = nnm(2).steps[0].rows(points)
    mixed = points.mixed(rows)
    Y = rows[:, :-1].numpy() @ X.numpy()
    assert (mixed.squares[:5, :5] == 0).all()
    expected = ((Y[:, None] - Y) ** 2).sum(-1)
    np.testing.assert_allclose(mixed.squares[5:7, :5], expected[5:, :5], rtol=1e-12)
    np.testing.assert_allclose(mixed.squares[5, 6], expected[5, 6], rtol=1e-6)
    np.testing.assert_allclose(mixed.norms, np.linalg.norm(Y, axis=1), rtol=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_mixtures_that_are_nearly_the_same_keep_their_distance(seed):
    X = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)
    points = points_of(X @ X.mT, (X[:, None] - X).square().sum(-1), torch.ones(4, dtype=F64))
    rows = torch.eye(5, dtype=F64)[:4]
    rows[0] = torch.tensor([0.0, 0.5, 0.25, 0.25, 0.0], dtype=F64)
    rows[1] = rows[0] + 2.0**-40 * (points.every[2] - points.every[3])
    expected = 2.0**-80 * float((X[2] - X[3]).square().sum())
    # their products with the points agree but for 2⁻⁴⁰, against which these round by ε
    rounding = 16 * EPS * 2.0**40
    assert float(points.mixed(rows).squares[0, 1]) == pytest.approx(expected, rel=rounding, abs=0)


@pytest.mark.parametrize("n", [3, 30, 133])
def test_equal_mixtures_are_one_point_whatever_the_product_rounds(n):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, 6, generator=g, dtype=F64)
    points = points_of(X @ X.mT, (X[:, None] - X).square().sum(-1), torch.ones(n, dtype=F64))
    row = torch.rand(n + 1, generator=g, dtype=F64)
    mixed = points.mixed((row / row.sum()).repeat(n, 1))
    assert (mixed.squares[:n, :n] == 0).all()


def test_geomed_stops_with_an_error_that_says_how_far_it_came():
    with pytest.raises(ConvergenceError, match=r"geomed.*1 iterations.*tolerance=1e-12"):
        geomed(tolerance=1e-12, max_iterations=1)(components(clients()))
    assert geomed(tolerance=1.0, max_iterations=1)(components(clients())).sum() == 1


def test_near_an_update_it_leaps():
    # 14 clients at one place and 16 that pull at them with a force of 14.05: Weiszfeld's steps
    # alone would be thousands
    n, g = 16, torch.Generator().manual_seed(0)
    X = torch.randn(n, 40, generator=g, dtype=F64)
    X = X - X.mean(0)
    X = X / X.norm(dim=1, keepdim=True)
    along = torch.zeros(40, dtype=F64)
    along[0] = 1.0
    lean = next(
        t
        for t in torch.linspace(0, 30, 30001)
        if float(torch.nn.functional.normalize(X + t * along, dim=1).sum(0).norm()) > 14.05
    )
    cloud = torch.cat([torch.zeros(14, 40, dtype=F64), X + lean * along])
    squares = (cloud[:, None] - cloud).square().sum(-1)
    rule = geomed(tolerance=1e-10, max_iterations=60)
    alpha = rule.coefficients(torch.ones(30, dtype=F64), cloud @ cloud.mT, squares).numpy()
    assert imbalance(cloud.numpy(), alpha @ cloud.numpy()) < 1e-9


# --- sentences -----------------------------------------------------------------------------------


def test_then_is_associative():
    one, two, three = norm_clip(9.0), nnm(2), geomed(2)
    left, right = one.then(two).then(three), one.then(two.then(three))
    c = components(clients())
    assert torch.equal(left(c), right(c))
    assert repr(left) == repr(right) == "norm_clip(9).then(nnm(2)).then(geomed(2))"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (norm_clip(9.0), "norm_clip(9)"),
        (norm_clip(1 / 3), "norm_clip(0.3333333333333333)"),
        (nnm(0), "nnm(0)"),
        (multi_krum(1), "multi_krum(1)"),
        (multi_krum(0, keep=3), "multi_krum(0, keep=3)"),
        (geomed(), "geomed()"),
        (geomed(0), "geomed(0)"),
        (geomed(2, tolerance=1e-6, max_iterations=200), "geomed(2)"),
        (
            geomed(tolerance=1 / 3, max_iterations=7),
            "geomed(tolerance=0.3333333333333333, max_iterations=7)",
        ),
        (centered_clip(), "centered_clip()"),
        (centered_clip(f=3, iterations=1), "centered_clip(f=3, iterations=1)"),
        (centered_clip(2.5, f=0, iterations=10), "centered_clip(2.5, f=0)"),
    ],
)
def test_a_rule_shows_the_call_that_makes_it(rule, text):
    assert repr(rule) == text
    made = eval(text, {f.__name__: f for f in (norm_clip, nnm, multi_krum, geomed, centered_clip)})
    assert repr(made) == text
    # the arguments of the step itself, all digits
    assert made.steps[0].rows.keywords == rule.steps[0].rows.keywords


def test_what_answers_ends_the_sentence():
    for rule in (multi_krum(1), geomed(), centered_clip()):
        with pytest.raises(OptionValueError, match=r"then: .*leaves one update"):
            rule.then(nnm(1))
    with pytest.raises(InputTypeError, match="then: expected a rule"):
        nnm(1).then("geomed")


def test_steps_that_change_nothing_change_nothing():
    c = components(clients())
    torch.testing.assert_close(nnm(0)(c), torch.full((7,), 1 / 7, dtype=F64))
    torch.testing.assert_close(norm_clip(1e9)(c), c.weight / c.weight.sum())
    torch.testing.assert_close(norm_clip(1e9).then(geomed())(c), geomed()(c))
    torch.testing.assert_close(multi_krum(0)(c), torch.full((7,), 1 / 7, dtype=F64))


def test_norms_alone_are_enough_to_clip():
    c = components(clients())
    norms, squares = squared_distances(c)
    products = (norms[:, None] + norms - squares) / 2
    rule = norm_clip(9.0).then(norm_clip(4.0))
    torch.testing.assert_close(
        rule.coefficients(c.weight, norms), rule.coefficients(c.weight, products, squares)
    )
    assert rule.statistic(c).shape == (7,)
    torch.testing.assert_close(rule(c), norm_clip(4.0)(c))


@pytest.mark.parametrize(
    ("rule", "n", "message"),
    [
        (nnm(2), 4, r"nnm: .*n > 2 f.*n = 4 and f = 2"),
        (geomed(2), 4, r"geomed: .*n > 2 f.*n = 4 and f = 2"),
        (centered_clip(f=1), 2, r"centered_clip: .*n > 2 f.*n = 2 and f = 1"),
        (multi_krum(1), 4, r"multi_krum: .*n >= 2 f \+ 3.*n = 4 and f = 1"),
        (multi_krum(0), 2, r"multi_krum: .*n >= 2 f \+ 3.*n = 2 and f = 0"),
        (multi_krum(1, keep=5), 5, r"multi_krum: .*keep <= n - f.*keep = 5, n = 5 and f = 1"),
    ],
    ids=repr,
)
def test_conditions_on_n_and_f(rule, n, message):
    with pytest.raises(InputValueError, match=message):
        aggregate(line(*range(n)), "flexlora", weighting=rule)
    aggregate(line(*range(n + 1)), "flexlora", weighting=rule)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: nnm(-1), OptionValueError),
        (lambda: nnm(1.5), InputTypeError),
        (lambda: multi_krum(-1), OptionValueError),
        (lambda: multi_krum(1, keep=0), OptionValueError),
        (lambda: geomed(-1), OptionValueError),
        (lambda: geomed(tolerance=0), OptionValueError),
        (lambda: geomed(max_iterations=0), OptionValueError),
        (lambda: centered_clip(0.0), OptionValueError),
        (lambda: centered_clip(iterations=0), OptionValueError),
        (lambda: centered_clip(f="two"), InputTypeError),
        (lambda: norm_clip(-1.0), OptionValueError),
        (lambda: norm_clip(math.inf), OptionValueError),
        (lambda: norm_clip(True), InputTypeError),
    ],
)
def test_options_out_of_range_are_refused_when_they_are_written(make, error):
    with pytest.raises(error, match=r"(f|keep|tolerance|max_iterations|radius|iterations|bound)="):
        make()


# --- invariance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gauge_turns_scale_and_slots_do_not_matter(rule):
    updates = clients()
    alpha = rule(components(updates))
    g = torch.Generator().manual_seed(5)

    def turn(size):
        X = torch.randn(size, size, generator=g, dtype=F64)
        return torch.matrix_exp(X - X.mT)

    U, V = turn(8), turn(7)
    mixed, turned, bare = [], [], []
    for u in updates:
        G = turn(u.A.shape[0]) * 2.0 ** torch.linspace(-1, 1, u.A.shape[0], dtype=F64)
        mixed.append(replace(u, A=torch.linalg.inv(G) @ u.A, B=u.B @ G))
        turned.append(replace(u, A=u.A @ V, B=U @ u.B))
        bare.append(replace(u, A=u.A.flip(0), B=u.B.flip(-1), slots=None))
    for others in (mixed, turned, bare):
        torch.testing.assert_close(rule(components(others)), alpha, rtol=1e-8, atol=1e-10)
    heavier = [replace(u, weight=1e6 * u.weight) for u in updates]
    torch.testing.assert_close(rule(components(heavier)), alpha, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["flora", "flexlora", "zeropad", "fedex"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_any_order_of_clients_with_ids_gives_the_same_bits(rule, method):
    updates = [replace(u, slots=None) for u in clients(dtype=F32)]
    result = aggregate(updates, method, weighting=rule)
    for order in ((6, 5, 4, 3, 2, 1, 0), (3, 0, 6, 2, 5, 1, 4)):
        other = aggregate([updates[k] for k in order], method, weighting=rule)
        assert torch.equal(other.A, result.A)
        assert torch.equal(other.B, result.B)


@pytest.mark.parametrize("max_group", [None, 1, 2])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_one_verdict_over_all_layers(rule, max_group):
    q, v, up = (
        [replace(u, slots=None) for u in clients(out=out, seed=seed)]
        for out, seed in ((8, 0), (8, 1), (5, 2))
    )
    results = aggregate_layers(
        {"q": q, "v": v, "up": up}, "flora", weighting=rule, max_group=max_group
    )
    parts = [squared_distances(components(updates)) for updates in (q, v, up)]
    norms, squares = (sum(part) for part in zip(*parts, strict=True))
    products = (norms[:, None] + norms - squares) / 2
    pairs = any(step.pairs for step in rule.steps)
    alpha = rule.coefficients(components(q).weight, *((products, squares) if pairs else (norms,)))
    for name, updates in (("q", q), ("v", v), ("up", up)):
        expected = np.tensordot(alpha.numpy(), dense(updates), 1)
        np.testing.assert_allclose(results[name].factors.dense(), expected, rtol=1e-6, atol=1e-9)


def test_who_is_loud_in_one_layer_is_left_out_of_all():
    q = [replace(u, slots=None) for u in clients()]
    v = [replace(u, slots=None) for u in clients(seed=1)]
    loud = [replace(u, B=1e3 * u.B) if u.id == 3 else u for u in q]
    rule = multi_krum(1)
    results = aggregate_layers({"q": loud, "v": v}, "flora", weighting=rule)
    without = aggregate([u for u in v if u.id != 3], "flora", weighting="uniform")
    np.testing.assert_allclose(
        results["v"].factors.dense(), without.factors.dense(), rtol=1e-12, atol=1e-12
    )
    # negative control: by itself the quiet layer leaves out somebody else
    alone = aggregate(v, "flora", weighting=rule).factors.dense()
    assert float((alone - without.factors.dense()).norm()) > 0.1


def test_clients_that_lack_a_layer():
    q = [replace(u, slots=None) for u in clients()]
    layers = {"q": q, "v": [replace(u, slots=None) for u in clients(seed=1)][1:]}
    with pytest.raises(InputValueError, match=r'client 0 lacks a layer.*missing="zero"'):
        aggregate_layers(layers, "flora", missing="renormalise", weighting=geomed())
    absent = aggregate_layers(layers, "flora", missing="zero", weighting=geomed())
    zero = replace(layers["v"][0], A=torch.zeros(1, 7, dtype=F64), B=torch.zeros(8, 1, dtype=F64))
    present = {"q": q, "v": [replace(zero, id=0, weight=1.0), *layers["v"]]}
    same = aggregate_layers(present, "flora", weighting=geomed())
    for name in ("q", "v"):
        np.testing.assert_allclose(
            absent[name].factors.dense(), same[name].factors.dense(), rtol=1e-12, atol=1e-12
        )
    # a norm is additive over whatever layers there are
    aggregate_layers(layers, "flora", missing="renormalise", weighting=norm_clip(9.0))


def test_a_dropped_client_is_nobodys_neighbour():
    updates = [replace(u, slots=None) for u in clients()]
    bad = replace(updates[2], A=updates[2].A * math.nan)
    sick = [*updates[:2], bad, *updates[3:]]
    result = aggregate(sick, "flora", weighting=nnm(1).then(geomed(1)), on_bad_client="drop")
    healthy = aggregate(
        [u for u in updates if u.id != 2], "flora", weighting=nnm(1).then(geomed(1))
    )
    assert [id for id, _ in result.excluded] == [2]
    assert torch.equal(result.A, healthy.A)


@pytest.mark.parametrize("method", ["flora", "flexlora", "fedex", "zeropad"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_methods_take_the_coefficients_as_they_are(rule, method):
    updates = [replace(u, slots=None) for u in clients()]
    alpha = rule(components(updates)).numpy()
    options = {"rank": "full"} if "rank" in METHODS[method].options else {}
    found = aggregate(updates, method, weighting=rule, **options).total().dense().numpy()
    expected = np.tensordot(alpha, dense(updates), 1)
    if method == "zeropad":
        B, A = np.zeros((8, 9)), np.zeros((9, 7))
        for a, u in zip(alpha, updates, strict=True):
            r, root = u.A.shape[0], math.sqrt(u.scaling)
            B[:, :r] += a * root * u.B.numpy()
            A[:r] += a * root * u.A.numpy()
        expected = B @ A
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_a_rule_by_itself_takes_its_own_totals():
    updates = clients(layers=(3,))
    c = components(updates)
    result = aggregate(updates, "flora", weighting=geomed())
    expected = geomed()(c)[c.client].unsqueeze(-1) * c.A
    torch.testing.assert_close(result.A, expected, rtol=1e-12, atol=0)


def test_a_rule_can_be_kept_and_compared():
    assert nnm(2) != nnm(3)
    assert isinstance(nnm(2), Rule)
    assert nnm(2).steps[0].text == "nnm(2)"


# --- the trimmed core ----------------------------------------------------------------------------


@pytest.mark.parametrize("f", [0, 1, 2])
def test_trimmed_core_on_the_diagonal(f):
    # every client diagonal, Σ ΔW ΔWᵀ with distinct eigenvalues: the core's entries are theirs
    entries = [(9.0, 1.0), (7.0, -5.0), (5.0, 2.0), (3.0, 3.0), (-90.0, 60.0)]
    updates = [
        ClientUpdate(torch.eye(2, dtype=F64), torch.diag(torch.tensor(e, dtype=F64)))
        for e in entries
    ]
    columns = [sorted(column)[f : 5 - f] for column in zip(*entries, strict=True)]
    expected = np.diag([math.fsum(column) / len(column) for column in columns])
    found = trimmed_core(components(updates), f).dense()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    result = aggregate(updates, "trimmed_mean", f=f, rank="full")
    np.testing.assert_allclose(result.factors.dense(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_trimming_half_is_refused(n):
    f = (n + 1) // 2
    with pytest.raises(InputValueError, match=rf"trimmed_core: .*n > 2 f.*n = {n} and f = {f}"):
        aggregate(line(*range(1, n + 1)), "trimmed_mean", f=f)
    aggregate(line(*range(1, n + 1)), "trimmed_mean", f=(n - 1) // 2)


def test_trim_and_f_exclude_each_other():
    with pytest.raises(OptionValueError, match=r"f=.*trim="):
        aggregate(line(1, 2, 3), "trimmed_mean", f=1, trim=0.3)
    with pytest.raises(OptionValueError, match="f="):
        aggregate(line(1, 2, 3), "trimmed_mean", f=-1)
    with pytest.raises(InputTypeError, match="f="):
        aggregate(line(1, 2, 3), "trimmed_mean", f=0.5)
    assert aggregate(line(1, 2, 3), "trimmed_mean", f=0).notes == ()


@pytest.mark.parametrize("size", [1e6, 1e9, 1e12, 1e15, 1e18])
@pytest.mark.parametrize(
    "rule", [nnm(2).then(geomed(2)), multi_krum(2), geomed(2), centered_clip(f=2), norm_clip(50.0)]
)
@pytest.mark.parametrize("method", ["flora", "flexlora"])
def test_components_that_cancel_are_seen(method, rule, size):
    # The exact product is an honest one; what its float32 factors give is rounding of any size.
    g = torch.Generator().manual_seed(6)
    A, B = torch.randn(4, 20, generator=g), torch.randn(16, 4, generator=g)
    honest = [
        ClientUpdate(
            A + 0.3 * torch.randn(4, 20, generator=g), B + 0.3 * torch.randn(16, 4, generator=g)
        )
        for _ in range(8)
    ]
    a, b = torch.randn(1, 20, generator=g), size * torch.randn(16, 1, generator=g)
    thief = ClientUpdate(torch.cat([honest[0].A, a, a]), torch.cat([honest[0].B, b, -b], 1))
    clean = aggregate(honest, method, weighting=rule).total().dense().double()
    found = aggregate([*honest, thief, thief], method, weighting=rule).total().dense().double()
    assert (found - clean).norm() <= 0.5 * clean.norm()


def test_components_that_cancel_count_by_their_rounding():
    A, B = torch.ones(2, 3), torch.tensor([[1e8, -1e8]] * 2)
    c = collect(read_updates([(A, B), (A[:1], B[:, :1] / 1e8)])[0]).components()
    assert pair_products(c)[1][0, 1].item() == pytest.approx(6, rel=1e-12)
    products, squares = seen_products(c)
    rest = (2 * 1e8 * 6**0.5 * torch.finfo(torch.float32).eps) ** 2
    assert products.tolist() == [
        [pytest.approx(rest, rel=1e-12), 0],
        [0, pytest.approx(6, rel=1e-12)],
    ]
    assert squares[0, 1].item() == pytest.approx(6 + rest, rel=1e-12)
    assert seen_norms(c).tolist() == products.diagonal().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["trimmed_mean", "median"])
@pytest.mark.parametrize("size", [1e9, 1e13, 1e16, 1e30])
def test_entries_keep_their_digits_beside_a_huge_client(method, size, dtype):
    g = torch.Generator().manual_seed(7)
    A, B = torch.randn(4, 20, generator=g), torch.randn(16, 4, generator=g)
    honest = [
        ((A + 0.3 * torch.randn(4, 20, generator=g)).to(dtype), B.to(dtype)) for _ in range(8)
    ]
    thief = (torch.randn(4, 20, generator=g).to(dtype), torch.randn(16, 4, generator=g).to(dtype))
    options = {"f": 2} if method == "trimmed_mean" else {}

    def beside(factor):
        sent = [*honest, (thief[0], factor * thief[1])]
        return aggregate(sent, method, rank="full", **options).factors.dense().double()

    # As far from it as beside one a million times as large, which everybody's digits survive.
    usual = beside(1e6)
    assert (beside(size) - usual).norm() <= 0.01 * usual.norm()
    mean = sum((b @ a).double() for a, b in honest) / 8
    assert (usual - mean).norm() <= 0.5 * mean.norm()
