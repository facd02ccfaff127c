"""Back to the clients: leading components, own scalings, padding as a fresh LoRA has it."""

import math

import numpy as np
import pytest
import torch

from hetlora_agg import (
    METHODS,
    AggregationResult,
    ClientUpdate,
    HetLoRAError,
    InputTypeError,
    InputValueError,
    LowRank,
    aggregate,
    aggregate_layers,
    distribute,
)
from reference import array, dense
from states import run
from tolerance import assert_leading_slices, distance, eps

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
OUT, IN = 9, 7


def clients(ranks=(4, 2, 3), dtype=F32, layers=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        ClientUpdate(
            torch.randn(*layers, r, IN, generator=g, dtype=F64).to(dtype),
            torch.randn(*layers, OUT, r, generator=g, dtype=F64).to(dtype),
        )
        for r in ranks
    ]


def result(method="rb", dtype=F32, layers=(), **options):
    mixed = "mixed_ranks" in METHODS[method].claims
    return run(clients((4, 2, 3) if mixed else (4, 4), dtype, layers), method, **options)


NESTED = sorted(name for name in METHODS if result(name).nested)


# --- slices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("layers", [(), (2,), (2, 3)])
@pytest.mark.parametrize("method", NESTED)
def test_clients_get_the_leading_components(method, layers, dtype):
    whole = result(method, dtype, layers)
    ranks, scalings = [1, 4, 2, 3, 2], [1.0, 2.0, 0.5, 16 / 3, 1e-3]
    pieces = distribute(whole, ranks, scalings)
    assert len(pieces) == 5
    for piece, r in zip(pieces, ranks, strict=True):
        assert isinstance(piece, LowRank)
        assert piece.A.shape == (*layers, r, IN)
        assert piece.B.shape == (*layers, OUT, r)
        assert piece.A.dtype == piece.B.dtype == dtype
    assert_leading_slices(pieces, whole, ranks, scalings)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("scaling", [1.0, 0.3, 7.0])
def test_half_precision_results(dtype, scaling):
    whole = result(dtype=dtype)
    (piece,) = distribute(whole, [3], [scaling])
    assert piece.A.dtype == piece.B.dtype == dtype
    A, B = whole.A.double().numpy(), whole.B.double().numpy()
    found = scaling * piece.B.double().numpy() @ piece.A.double().numpy()
    # the root is rounded to the dtype, then the quotient, in each of the two factors
    gate = 4 * eps(dtype) * np.linalg.norm(B[:, :3]) * np.linalg.norm(A[:3])
    assert distance(found, B[:, :3] @ A[:3]) <= gate


def test_slices_are_nested_by_hand():
    # σ = 4, 1 with balanced split; scaling 4: each factor is halved
    A, B = torch.diag(torch.tensor([4.0, 1.0])), torch.eye(2)
    whole = aggregate([(A, B)], "flexlora")
    one, two = distribute(whole, [1, 2], [4.0, 1.0])
    assert one.A.tolist() == [[1.0, 0.0]]
    assert one.B.tolist() == [[1.0], [0.0]]
    assert two.A.tolist() == [[2.0, 0.0], [0.0, 1.0]]
    assert two.B.tolist() == [[2.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("scaling", [1e-30, 1e30, 1e-60, 1e60])
def test_the_effective_update_survives_extreme_scalings(scaling):
    # the root of 1e60 and its inverse are inside float32, as the client's own factors are
    A, B = torch.ones(1, IN), torch.ones(OUT, 1)
    (piece,) = distribute(aggregate([(A, B)], "rbla"), [1], [scaling])
    expected = np.ones((OUT, IN))
    assert distance(scaling * dense(piece), expected) <= 4 * eps(F32) * np.linalg.norm(expected)


@pytest.mark.parametrize(("dtype", "scaling"), [(F16, 1e-10), (F16, 1e-16), (F32, 1e-90)])
def test_a_scaling_that_takes_the_factors_out_of_their_dtype_never_gives_inf(dtype, scaling):
    whole = aggregate([(torch.ones(1, IN, dtype=dtype), torch.ones(OUT, 1, dtype=dtype))], "rbla")
    with pytest.raises(HetLoRAError, match=r"client 0.*scaling"):
        distribute(whole, [1], [scaling])


@pytest.mark.parametrize("ranks", [[2, 4, 9], [4]])
def test_pieces_are_copies(ranks):
    whole = result()
    before = whole.A.clone(), whole.B.clone()
    pieces = distribute(whole, ranks)
    again = distribute(whole, ranks)
    pieces[0].A.fill_(9)
    pieces[0].B.fill_(9)
    assert torch.equal(whole.A, before[0])
    assert torch.equal(whole.B, before[1])
    for piece, other in zip(pieces[1:], again[1:], strict=True):
        assert torch.equal(piece.A, other.A)
        assert torch.equal(piece.B, other.B)
    assert all(p.A.is_contiguous() for p in pieces)


def test_a_piece_does_not_keep_the_whole_alive():
    # a client's slice is handed on: it should own its numbers and no more
    whole = result(layers=(3,))
    (piece,) = distribute(whole, [1])
    assert piece.A.untyped_storage().nbytes() == piece.A.numel() * 4
    assert piece.B.untyped_storage().nbytes() == piece.B.numel() * 4


def test_no_clients_no_pieces():
    assert distribute(result(), []) == []
    assert distribute(result("flora"), [], []) == []


def test_layers_of_a_model_are_distributed_one_by_one():
    model = aggregate_layers({"q": clients(), "v": clients(seed=1)}, energy=0.8)
    for whole in model.values():
        pieces = distribute(whole, [1, whole.rank], [2.0, 3.0])
        assert_leading_slices(pieces, whole, [1, whole.rank], [2.0, 3.0])


def test_the_residual_is_not_handed_out():
    whole = result("flexlora", rank=2, fold_rest=True)
    (piece,) = distribute(whole, [2])
    assert distance(dense(piece), dense(whole.factors)) <= 4 * eps(F32) * 100
    assert distance(dense(piece), dense(whole.total())) > 0.1


def test_what_is_handed_out_comes_back():
    # an idle round: everybody returns what it got, nothing changes
    ranks, scalings = [4, 2, 3, 6], [2.0, 0.5, 1.0, 4 / 3]
    whole = result(dtype=F64)
    pieces = distribute(whole, ranks, scalings)
    back = aggregate(
        [ClientUpdate(p.A, p.B, scaling=s) for p, s in zip(pieces, scalings, strict=True)]
    )
    gate = 20 * OUT * eps(F64) * np.linalg.norm(array(whole.A)) * np.linalg.norm(array(whole.B))
    assert distance(dense(back.factors), dense(whole.factors)) <= gate


# --- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rb", "flora"])
@pytest.mark.parametrize("layers", [(), (2, 3)])
def test_padding_is_a_fresh_lora(method, layers):
    whole = result(method, layers=layers)
    ranks, scalings = [whole.rank + 200, whole.rank], [0.01, 3.0]
    wide, _ = distribute(whole, ranks, scalings)
    assert wide.A.shape == (*layers, whole.rank + 200, IN)
    new_A, new_B = wide.A[..., whole.rank :, :], wide.B[..., whole.rank :]
    # zero columns in B add nothing to the update; kaiming_uniform(a=sqrt(5)) has bound 1/sqrt(in)
    assert not new_B.any()
    bound = 1 / math.sqrt(IN)
    assert float(new_A.abs().max()) <= bound
    # the scaling is not divided out of what carries no update: 1400 draws reach the edges
    assert float(new_A.max()) > 0.97 * bound
    assert float(new_A.min()) < -0.97 * bound
    # no zero/zero pair, which would never get a gradient
    assert bool((new_A != 0).any(-1).all())
    assert_leading_slices(
        [LowRank(wide.A[..., : whole.rank, :], wide.B[..., : whole.rank])],
        whole,
        [whole.rank],
        [0.01],
    )


def test_padding_rows_are_uniform_and_independent():
    rows = distribute(result(), [4 + 5000])[0].A[4:].double() * math.sqrt(IN)
    n = rows.numel()
    # mean 0, variance 1/3 of a uniform on (-1, 1); 6 standard errors
    assert abs(float(rows.mean())) <= 6 * math.sqrt(1 / 3 / n)
    assert abs(float(rows.square().mean()) - 1 / 3) <= 6 * math.sqrt(4 / 45 / n)
    neighbours = (rows[:-1] * rows[1:]).mean()
    assert abs(float(neighbours)) <= 6 * (1 / 3) / math.sqrt(n)
    assert len({tuple(row.tolist()) for row in rows}) == 5000


@pytest.mark.parametrize("layers", [(), (2,)])
def test_a_slot_is_padded_alike_for_all_clients(layers):
    whole = result(layers=layers)
    pieces = distribute(whole, [6, 9, 5, 4, 7], [1.0, 2.0, 0.5, 1.0, 3.0])
    tallest = pieces[1].A[..., 4:, :]
    for piece in pieces:
        extra = piece.rank - 4
        assert torch.equal(piece.A[..., 4:, :], tallest[..., :extra, :])


@pytest.mark.parametrize("layers", [(), (2,)])
def test_a_slot_is_padded_alike_whoever_else_is_served(layers):
    # cohorts change from round to round and may be served in parts
    whole = result(layers=layers)
    together = distribute(whole, [6, 9])[0]
    alone = distribute(whole, [6])[0]
    assert torch.equal(together.A, alone.A)


def test_padding_is_reproducible_and_leaves_the_global_generator_alone():
    whole = result()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = distribute(whole, [8])[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = distribute(whole, [8])[0]
    assert torch.equal(one.A, two.A)


def test_a_generator_decides_the_padding():
    def padded(seed):
        generator = torch.Generator().manual_seed(seed)
        return distribute(result(), [8], generator=generator)[0].A

    assert torch.equal(padded(1), padded(1))
    assert not torch.equal(padded(1)[4:], padded(2)[4:])
    assert torch.equal(padded(1)[:4], padded(2)[:4])
    # and it moves on, so that layers of a model differ
    generator = torch.Generator().manual_seed(1)
    one, two = (distribute(result(), [8], generator=generator)[0].A for _ in range(2))
    assert not torch.equal(one[4:], two[4:])


def test_a_generator_is_left_alone_where_nothing_is_padded():
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    distribute(result(), [4, 2], generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_padding_has_the_dtype_of_the_result(dtype):
    piece = distribute(result(dtype=dtype), [8])[0]
    assert piece.A.dtype == piece.B.dtype == dtype
    # rounding to nearest may land on the bound's own neighbour
    assert float(piece.A[4:].abs().max()) <= (1 + eps(dtype)) / math.sqrt(IN)


# --- results whose leading components mean nothing ----------------------------------------------


def test_a_result_that_is_not_nested_is_not_sliced():
    whole = result("flora")
    assert not whole.nested
    match = (
        r"client 1 asks for rank 4 of a result of rank 9 whose.*not an answer; "
        r"fold result.total\(\) into the base weight and restart .*'flexlora'"
    )
    with pytest.raises(InputValueError, match=match):
        distribute(whole, [9, 4])


def test_a_result_that_is_not_nested_is_handed_out_whole_or_padded():
    whole = result("flora")
    ranks, scalings = [9, 12], [0.5, 2.0]
    pieces = distribute(whole, ranks, scalings)
    S = np.linalg.norm(array(whole.A)) * np.linalg.norm(array(whole.B))
    for piece, s in zip(pieces, scalings, strict=True):
        assert distance(s * dense(piece), dense(whole.factors)) <= 4 * eps(F32) * S


# --- numpy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[2, 4], [2, 8]])
def test_numpy_results_give_numpy_pieces(ranks):
    updates = [(u.A.numpy(), u.B.numpy()) for u in clients()]
    whole = aggregate(updates)
    before = whole.A.tobytes(), whole.B.tobytes()
    pieces = distribute(whole, ranks, [2.0, 0.5])
    expected = distribute(result(), ranks, [2.0, 0.5])
    for piece, other in zip(pieces, expected, strict=True):
        assert type(piece.A) is type(piece.B) is np.ndarray
        assert piece.A.dtype == np.float32
        assert np.array_equal(piece.A, other.A.numpy())
        assert np.array_equal(piece.B, other.B.numpy())
        piece.A[...] = piece.B[...] = 9
    assert (whole.A.tobytes(), whole.B.tobytes()) == before


# --- bad arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [None, {"q": None}, LowRank(torch.ones(2, IN), torch.ones(OUT, 2)), [1], (1, 2)]
)
def test_what_is_no_result(given):
    with pytest.raises(InputTypeError, match="distribute: expected an AggregationResult, got"):
        distribute(given, [1])


@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_below_1(rank):
    with pytest.raises(
        InputValueError, match=f"client 1: rank: expected an integer of at least 1, got {rank}"
    ):
        distribute(result(), [2, rank])


@pytest.mark.parametrize(
    "rank", [2.0, "2", None, True, [2], torch.tensor(2.0), np.array([2, 2])], ids=repr
)
def test_ranks_that_are_no_integers(rank):
    with pytest.raises(
        InputTypeError, match=r"client 0: rank: expected an integer of at least 1, got"
    ):
        distribute(result(), [rank])


@pytest.mark.parametrize("rank", [np.int64(2), torch.tensor(2)], ids=repr)
def test_any_integer_is_a_rank(rank):
    assert distribute(result(), [rank])[0].rank == 2


@pytest.mark.parametrize("ranks", [3, None, 2.5], ids=repr)
def test_ranks_that_are_no_list(ranks):
    with pytest.raises(InputTypeError, match=r"distribute: .*ranks"):
        distribute(result(), ranks)


@pytest.mark.parametrize(
    "scaling", [0, -1.0, math.nan, math.inf, 10**400], ids=["0", "-1", "nan", "inf", "10**400"]
)
def test_scalings_that_are_not_finite_and_positive(scaling):
    with pytest.raises(
        InputValueError, match="client 1: scaling: expected a finite number > 0, got"
    ):
        distribute(result(), [2, 2], [1.0, scaling])


@pytest.mark.parametrize("scaling", ["2", None, [1.0], 1j, True], ids=repr)
def test_scalings_that_are_no_numbers(scaling):
    with pytest.raises(InputTypeError, match=r"client 0: .*scaling"):
        distribute(result(), [2], [scaling])


@pytest.mark.parametrize("scalings", [0.5, 1, "1"], ids=repr)
def test_scalings_that_are_no_list(scalings):
    with pytest.raises(InputTypeError, match=r"distribute: .*scaling"):
        distribute(result(), [2], scalings)


@pytest.mark.parametrize("scalings", [[], [1.0], [1.0, 2.0, 3.0]])
def test_one_scaling_per_client(scalings):
    match = f"expected one scaling per client, got {len(scalings)} for 2"
    with pytest.raises(InputValueError, match=match):
        distribute(result(), [1, 2], scalings)


@pytest.mark.parametrize("generator", [0, "cpu", np.random.default_rng(0)], ids=type)
def test_what_is_no_generator(generator):
    with pytest.raises(InputTypeError, match=r"distribute: .*generator"):
        distribute(result(), [9], generator=generator)


def test_iterators_are_read_once():
    pieces = distribute(result(), iter([1, 2]), iter([1.0, 2.0]))
    assert [piece.rank for piece in pieces] == [1, 2]


def test_a_hand_made_result_is_distributed_too():
    factors = LowRank(torch.ones(2, IN), torch.ones(OUT, 2))
    (piece,) = distribute(AggregationResult(factors), [1])
    assert piece.rank == 1
    with pytest.raises(InputValueError, match="client 0 asks for rank 1"):
        distribute(AggregationResult(factors, nested=False), [1])
