"""FedASK's two messages: their weighted sums are the method's product."""

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, InputTypeError, InputValueError, aggregate
from hetlora_agg.clients import basis, project, sketch
from reference import CASES, arguments, array, by_layer, cohort, dense, fractions
from tolerance import distance, eps, recompressed_gate_of

OUT, IN = 7, 6
F16, F32, F64 = torch.float16, torch.float32, torch.float64
OVERSAMPLING = 8


def randn(*shape, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=F64).to(dtype)


def update(rank=3, layers=(), dtype=F64, scaling=0.7):
    return ClientUpdate(
        randn(*layers, rank, IN, dtype=dtype),
        randn(*layers, OUT, rank, seed=1, dtype=dtype),
        scaling=scaling,
    )


@pytest.mark.parametrize("dtype", [F16, F32, F64])
@pytest.mark.parametrize("layers", [(), (2, 3)])
@pytest.mark.parametrize("common", [True, False])
def test_the_messages_by_definition(common, layers, dtype):
    own = update(layers=layers, dtype=dtype)
    omega = randn(*(() if common else layers), IN, 4, seed=2)
    Q = randn(*(() if common else layers), OUT, 4, seed=3)
    W = 0.7 * array(own.B.double()) @ array(own.A.double())
    first, second = sketch(own, omega), project(own, Q)
    sent = F64 if dtype == F64 else F32
    assert first.dtype == second.dtype == sent
    assert first.shape == (*layers, OUT, 4)
    assert second.shape == (*layers, IN, 4)
    size = 0.7 * np.linalg.norm(array(own.B.double())) * np.linalg.norm(array(own.A.double()))
    # float64 products over at most 7 and 3 terms on both sides, one cast
    for message, expected, other in (
        (first, W @ array(omega), omega),
        (second, np.swapaxes(W, -1, -2) @ array(Q), Q),
    ):
        whole = size * np.linalg.norm(array(other))
        gate = 2 * (IN + OUT) * eps(F64) * whole + eps(sent) * np.linalg.norm(expected)
        assert distance(message, expected) <= gate


def test_worked_by_hand():
    own = ClientUpdate(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), scaling=0.5)
    # ½ (3, 4)ᵀ (1, 2) · (1, 1)ᵀ = (4.5, 6) and its transpose times (1, 0) = (1.5, 3)
    assert sketch(own, torch.ones(2, 1)).flatten().tolist() == [4.5, 6.0]
    assert project(own, torch.tensor([[1.0], [0.0]])).flatten().tolist() == [1.5, 3.0]


def test_messages_tell_nothing_of_the_rank_by_their_size():
    omega, Q = randn(IN, 4), randn(OUT, 4)
    assert len({tuple(sketch(update(r), omega).shape) for r in (1, 3, 9)}) == 1
    assert len({tuple(project(update(r), Q).shape) for r in (1, 3, 9)}) == 1


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (2, 5, 4)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_basis_spans_the_sum(shape, dtype):
    total = randn(*shape, dtype=dtype)
    Q = array(basis(total))
    assert Q.shape == (*shape[:-1], min(shape[-2:]))
    QT = np.swapaxes(Q, -1, -2)
    # backward stability of Householder QR, as in the recompressed gate
    gate = 10 * max(shape) * eps(F64)
    assert distance(QT @ Q, np.broadcast_to(np.eye(Q.shape[-1]), (QT @ Q).shape)) <= gate
    assert distance(Q @ (QT @ array(total)), total) <= gate * np.linalg.norm(array(total))
    assert basis(total).dtype == F64


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("rank", [None, 1, "full"])
def test_sums_of_messages_are_the_methods_product(name, rank):
    clients = cohort(CASES[name])
    updates = [ClientUpdate(**arguments(c)) for c in clients]
    layers, out, columns = CASES[name].layers, clients[0].B.shape[-2], clients[0].A.shape[-1]
    present = [(c, u) for c, u in zip(clients, updates, strict=True) if c.n > 0]
    largest = min(sum(c.rank for c, _ in present), out, columns)
    most = max(c.rank for c, _ in present)
    wanted = min({None: most, "full": largest}.get(rank, rank), largest)
    width = min(wanted + OVERSAMPLING, largest)
    g = torch.Generator().manual_seed(0)
    omega = torch.randn(*layers, columns, width, generator=g, dtype=F64)
    p = fractions([c for c, _ in present])
    Y = sum(w * sketch(u, omega) for w, (_, u) in zip(p, present, strict=True))
    Q = basis(Y)
    P = sum(w * project(u, Q) for w, (_, u) in zip(p, present, strict=True))
    U, S, Vh = np.linalg.svd(array(Q) @ np.swapaxes(array(P), -1, -2), full_matrices=False)
    cut = (U[..., :wanted] * S[..., None, :wanted]) @ Vh[..., :wanted, :]
    result = aggregate(updates, "fedask", rank=rank, generator=torch.Generator().manual_seed(0))
    assert result.rank == wanted
    for index, layer, _ in by_layer(clients):
        # The same numbers in another order of summation. First-order perturbation: the basis of Y
        # turns by the rounding over its smallest singular value, and leading singular vectors by
        # the rounding over the gap below them, each of which moves the product by that share of it.
        sensitivity = np.linalg.cond(array(Y)[index])
        if wanted < S.shape[-1] and wanted < width:
            sensitivity += S[index][0] / (S[index][wanted - 1] - S[index][wanted])
        gate = recompressed_gate_of(F64, layer) * (1 + sensitivity)
        assert distance(dense(result.factors)[index], cut[index]) <= gate


def test_inputs_are_left_alone_and_nothing_is_recorded():
    own, omega = update(), randn(IN, 3)
    A = own.A.clone()
    own.A.requires_grad_()
    assert not sketch(own, omega).requires_grad
    assert not project(own, randn(OUT, 3)).requires_grad
    assert torch.equal(own.A.detach(), A)


def test_plain_tuples_are_taken():
    own, omega = update(scaling=1.0), randn(IN, 3)
    assert torch.equal(sketch((own.A, own.B), omega), sketch(own, omega))


def test_what_does_not_fit():
    own = update()
    with pytest.raises(
        InputValueError, match=r"sketch: omega: expected .* = \(6,\) and a width, got"
    ):
        sketch(own, randn(IN + 1, 3))
    with pytest.raises(InputValueError, match=r"project: Q: expected .* = \(7,\) and a width, got"):
        project(own, randn(IN, 3))
    with pytest.raises(InputValueError, match="omega: expected"):
        sketch(own, randn(2, IN, 3))
    with pytest.raises(InputTypeError, match="omega: expected a floating torch tensor"):
        sketch(own, np.ones((IN, 3)))
    with pytest.raises(InputTypeError, match="expected a ClientUpdate"):
        sketch(own.A, randn(IN, 3))
    with pytest.raises(InputValueError, match="total_sketch: NaN or Inf"):
        basis(torch.full((2, 2), torch.nan))
    with pytest.raises(InputTypeError, match="total_sketch: expected a floating"):
        basis(None)
    bad = ClientUpdate(own.A / 0, own.B)
    with pytest.raises(InputValueError, match="lora_A: NaN or Inf"):
        sketch(bad, randn(IN, 3))
    huge = ClientUpdate(torch.full((1, 2), 1e30), torch.full((2, 1), 1e30))
    with pytest.raises(InputValueError, match="message: NaN or Inf"):
        sketch(huge, torch.ones(2, 1))
