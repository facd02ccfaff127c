"""ILoRA's client: the QR start and the control variates."""

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, InputTypeError, InputValueError, LowRank, aggregate
from hetlora_agg.clients import client_variate, corrected, qr_start, server_variate
from reference import array, dense
from tolerance import distance, eps

OUT, IN = 7, 5
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def randn(*shape, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=F64).to(dtype)


def variate(rank, seed=0, layers=(), dtype=F64):
    return LowRank(
        randn(*layers, rank, IN, seed=seed, dtype=dtype),
        randn(*layers, OUT, rank, seed=seed + 100, dtype=dtype),
    )


# --- the start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (2, 3, 7, 5)])
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_initial_piece_is_that_of_the_whole_qr(shape, rank, dtype):
    W = randn(*shape, dtype=dtype)
    initial = qr_start(W, rank).initial
    Q, R = np.linalg.qr(array(W))
    # numpy's own QR of all columns: signs agree, both being LAPACK's Householder reflections.
    # c·max(m, n)·ε times the conditioning of the leading columns, then the cast
    condition = max(np.linalg.cond(w[:, :rank]) for w in array(W).reshape(-1, *shape[-2:]))
    gate = 10 * max(shape) * eps(F64) * condition + eps(dtype)
    assert np.abs(array(initial.B) - Q[..., :rank]).max() <= gate
    assert np.abs(array(initial.A) - R[..., :rank, :]).max() <= gate * np.linalg.norm(array(W))
    below = array(initial.A)[..., :rank]
    assert not np.tril(below, -1).any()


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (2, 3, 7, 5)])
@pytest.mark.parametrize("scaling", [1.0, 0.3, 8.0])
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("rank", [3, 5])  # with 5 the base is left with the factors' rounding
def test_the_start_is_the_base_weight(rank, shape, scaling, dtype):
    W = randn(*shape, dtype=dtype)
    start = qr_start(W, rank, scaling=scaling)
    assert start.base.dtype == start.adapter.A.dtype == dtype
    again = array(start.base.double()) + scaling * dense(
        LowRank(start.adapter.A.double(), start.adapter.B.double())
    )
    # the cast of the base; and, unless the scaling is 1, two roundings in each of the factors
    size = np.linalg.norm(array(start.initial.A.double())) * np.sqrt(rank * W[..., 0, 0].numel())
    gate = eps(dtype) * np.linalg.norm(array(start.base.double()))
    gate += 4 * eps(F64 if scaling == 1 else dtype) * size
    assert distance(again, W.double()) <= gate


def test_the_start_by_hand():
    # first column (3, 4) of length 5: Q = ∓(0.6, 0.8), R = ∓(5, 0.6)
    start = qr_start(torch.tensor([[3.0, 1.0], [4.0, 0.0]], dtype=F64), 1)
    expected = torch.tensor([[3.0, 0.36], [4.0, 0.48]], dtype=F64)
    assert torch.allclose(start.initial.dense(), expected, rtol=0, atol=20 * eps(F64))


def test_smaller_starts_are_leading_slots_of_larger_ones():
    W = randn(7, 6)
    small, large = qr_start(W, 2).initial, qr_start(W, 5).initial
    gate = 10 * 7 * eps(F64) * np.linalg.cond(array(W)[:, :5])
    assert distance(small.B, large.B[:, :2]) <= gate
    assert distance(small.A, large.A[:2]) <= gate * np.linalg.norm(array(W))


def test_dependent_columns_still_give_the_base_weight():
    W = randn(7, 5)
    W[:, 1] = W[:, 0]
    W[:, 2] = 0
    start = qr_start(W, 4)
    again = array(start.base) + dense(start.adapter)
    assert distance(again, W) <= 10 * 7 * eps(F64) * np.linalg.norm(array(W))
    zero = qr_start(torch.zeros(3, 3), 2)
    assert not zero.base.any()
    assert not zero.initial.dense().any()


def test_an_idle_first_round_aggregates_to_nothing():
    W, ranks, scalings = randn(OUT, IN), (2, 4, 3), (0.5, 2.0, 1.0)
    starts = [qr_start(W, r, scaling=s) for r, s in zip(ranks, scalings, strict=True)]
    updates = [
        ClientUpdate(start.adapter.A, start.adapter.B, scaling=s, weight=r)
        for start, r, s in zip(starts, ranks, scalings, strict=True)
    ]
    result = aggregate(updates, "ilora", initial=qr_start(W, 4).initial)
    size = np.linalg.norm(array(W))
    # QR of starts of different widths, then those of the aggregation
    gate = 3 * 10 * 7 * eps(F64) * size * np.linalg.cond(array(W)[:, :4])
    assert np.linalg.norm(dense(result.factors)) <= gate
    # and the start is counted in without initial=
    assert np.linalg.norm(dense(aggregate(updates, "ilora").factors)) > 0.1 * size


def test_starts_that_cannot_be():
    W = randn(4, 3)
    with pytest.raises(InputValueError, match="= 3, got 4"):
        qr_start(W, 4)
    with pytest.raises(InputValueError, match="rank: expected an integer of at least 1"):
        qr_start(W, 0)
    with pytest.raises(InputValueError, match="scaling: expected a finite number > 0"):
        qr_start(W, 1, scaling=0.0)
    with pytest.raises(InputTypeError, match="weight: expected a floating torch tensor"):
        qr_start(np.ones((2, 2)), 1)
    with pytest.raises(InputValueError, match=r"weight: expected \(\*layers, out_features"):
        qr_start(W[0], 1)
    W[0, 0] = torch.nan
    with pytest.raises(InputValueError, match="NaN or Inf"):
        qr_start(W, 1)


def test_the_weight_is_left_alone():
    W = randn(4, 3).requires_grad_()
    before = W.detach().clone()
    start = qr_start(W, 2)
    start.base.fill_(0)
    start.adapter.A.fill_(0)
    assert torch.equal(W.detach(), before)
    assert not start.initial.A.any() or not torch.equal(start.initial.A, start.adapter.A)


# --- control variates ---------------------------------------------------------------------------

SLOTS = [(None, [0, 1]), ([3, 1], [3, 1])]


@pytest.mark.parametrize("layers", [(), (2,)])
@pytest.mark.parametrize(("slots", "where"), SLOTS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_corrected_gradient(slots, where, layers, dtype):
    g, own, server = (variate(r, k, layers, dtype) for k, r in enumerate((2, 2, 4)))
    found = corrected(g, own, server, slots)
    A = array(g.A) - array(own.A) + array(server.A)[..., where, :]
    B = array(g.B) - array(own.B) + array(server.B)[..., where]
    # two additions of entries under 6
    assert np.abs(array(found.A) - A).max() <= 2 * eps(dtype) * 6
    assert np.abs(array(found.B) - B).max() <= 2 * eps(dtype) * 6
    assert found.A.dtype == dtype


@pytest.mark.parametrize("layers", [(), (2,)])
@pytest.mark.parametrize(("slots", "where"), SLOTS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_clients_variate(slots, where, layers, dtype):
    own, start, end = (variate(2, k, layers, dtype) for k in range(3))
    server = variate(4, 3, layers, dtype)
    found = client_variate(own, server, start, end, steps=5, learning_rate=0.1, slots=slots)
    A = array(own.A) - array(server.A)[..., where, :] + (array(start.A) - array(end.A)) / 0.5
    B = array(own.B) - array(server.B)[..., where] + (array(start.B) - array(end.B)) / 0.5
    # four operations on entries under 18
    assert np.abs(array(found.A) - A).max() <= 4 * eps(dtype) * 18
    assert np.abs(array(found.B) - B).max() <= 4 * eps(dtype) * 18


@pytest.mark.parametrize("layers", [(), (2,)])
@pytest.mark.parametrize("slots", [None, [[3], [0, 2], [1, 0, 3]]])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_servers_variate(slots, layers, dtype):
    server = variate(4, 0, layers, dtype)
    changes = [variate(r, r, layers, dtype) for r in (1, 2, 3)]
    found = server_variate(server, changes, slots, clients=7)
    A, B = array(server.A).copy(), array(server.B).copy()
    for k, change in enumerate(changes):
        for i in range(change.rank):
            j = i if slots is None else slots[k][i]
            A[..., j, :] += array(change.A)[..., i, :] / 7
            B[..., j] += array(change.B)[..., i] / 7
    # float64 sums, one addition and one cast of entries under 6
    assert np.abs(array(found.A) - A).max() <= 2 * eps(dtype) * 6
    assert np.abs(array(found.B) - B).max() <= 2 * eps(dtype) * 6
    assert found.A.dtype == dtype


def test_a_round_that_nobody_joins_changes_nothing():
    server = variate(4)
    after = server_variate(server, [], clients=3)
    assert torch.equal(after.A, server.A)
    assert torch.equal(after.B, server.B)


def sgd(start, gradient, own, server, slots, steps, rate):
    """Plain steps along corrected gradients that are the same at every step."""
    A, B = start.A.clone(), start.B.clone()
    for _ in range(steps):
        g = corrected(gradient, own, server, slots)
        A, B = A - rate * g.A, B - rate * g.B
    return LowRank(A, B)


def test_under_constant_gradients_a_variate_becomes_the_gradient():
    # end = start − steps·rate·(g − c_k + c), so c_k − c + (start − end)/(steps·rate) = g
    own, server, gradient, start = variate(2, 1), variate(4, 2), variate(2, 3), variate(2, 4)
    slots = [2, 0]
    end = sgd(start, gradient, own, server, slots, 5, 0.25)
    found = client_variate(own, server, start, end, steps=5, learning_rate=0.25, slots=slots)
    # five steps of three roundings on entries under 20, then four more
    gate = 20 * eps(F64) * 20 / 1.25
    assert float((found.A - gradient.A).abs().max()) <= gate
    assert float((found.B - gradient.B).abs().max()) <= gate


def test_the_servers_variate_stays_the_mean_of_the_clients():
    slots, clients = [[0], [0, 2], [1, 2, 3]], 3
    own = [variate(len(s), k) for k, s in enumerate(slots)]
    zero = LowRank(torch.zeros(4, IN, dtype=F64), torch.zeros(OUT, 4, dtype=F64))
    server = server_variate(zero, own, slots, clients=clients)
    ends = [variate(len(s), 50 + k) for k, s in enumerate(slots)]
    new = [
        client_variate(c, server, e, variate(c.rank, 90), steps=2, learning_rate=0.5, slots=s)
        for c, e, s in zip(own, ends, slots, strict=True)
    ]
    changes = [LowRank(n.A - c.A, n.B - c.B) for n, c in zip(new, own, strict=True)]
    moved = server_variate(server, changes, slots, clients=clients)
    mean = server_variate(zero, new, slots, clients=clients)
    # three clients' difference, sum and quotient, entries under 20
    assert float((moved.A - mean.A).abs().max()) <= 8 * eps(F64) * 20
    assert float((moved.B - mean.B).abs().max()) <= 8 * eps(F64) * 20


def test_variates_record_no_gradients_and_leave_their_inputs_alone():
    parts = [variate(2, k) for k in range(3)]
    for part in parts:
        part.A.requires_grad_()
        part.B.requires_grad_()
    own, start, end = parts
    server = variate(4, 9)
    before = [X.detach().clone() for p in (*parts, server) for X in (p.A, p.B)]
    found = client_variate(own, server, start, end, steps=1, learning_rate=1.0)
    assert not found.A.requires_grad
    assert not corrected(start, own, server).B.requires_grad
    assert not server_variate(server, [own], clients=1).A.requires_grad
    after = [X.detach() for p in (*parts, server) for X in (p.A, p.B)]
    assert all(torch.equal(X, Y) for X, Y in zip(before, after, strict=True))


BAD_SLOTS = [[0], [0, 0], [0, 4], [-1, 0]]


@pytest.mark.parametrize("slots", BAD_SLOTS, ids=repr)
def test_slots_that_do_not_fit(slots):
    g, server = variate(2), variate(4)
    with pytest.raises(InputValueError, match="expected 2 distinct slots under 4"):
        corrected(g, g, server, slots)
    with pytest.raises(InputValueError, match="expected 2 distinct slots under 4"):
        client_variate(g, server, g, g, steps=1, learning_rate=1.0, slots=slots)
    with pytest.raises(InputValueError, match="change 0: slots: expected 2 distinct slots"):
        server_variate(server, [g], [slots], clients=1)


def test_what_does_not_fit():
    g, server = variate(2), variate(4)
    with pytest.raises(InputValueError, match=r"own: expected A .2, 5. and B .7, 2., got"):
        corrected(g, variate(3), server)
    with pytest.raises(InputValueError, match="slots: expected 2 distinct slots under 1"):
        corrected(g, g, variate(1))
    with pytest.raises(InputTypeError, match="slot: expected an integer"):
        corrected(g, g, server, [0.5, 1])
    with pytest.raises(InputTypeError, match="gradient: expected a LowRank"):
        corrected((g.A, g.B), g, server)
    with pytest.raises(InputValueError, match=r"server: expected .* = \(7, 5\), got \(2, 2\)"):
        corrected(g, g, LowRank(torch.ones(4, 2), torch.ones(2, 4)))
    with pytest.raises(InputValueError, match="end: expected A"):
        client_variate(g, server, g, variate(1), steps=1, learning_rate=1.0)
    with pytest.raises(InputValueError, match="steps: expected an integer of at least 1"):
        client_variate(g, server, g, g, steps=0, learning_rate=1.0)
    with pytest.raises(InputValueError, match="learning_rate: expected a finite number > 0"):
        client_variate(g, server, g, g, steps=1, learning_rate=0.0)
    with pytest.raises(InputValueError, match="clients: expected an integer of at least 2, got 1"):
        server_variate(server, [g, g], clients=1)
    with pytest.raises(InputValueError, match="slots for each of 2 changes, got 1"):
        server_variate(server, [g, g], [[0, 1]], clients=2)
    with pytest.raises(InputTypeError, match="change 1: expected a LowRank"):
        server_variate(server, [g, None], clients=2)
