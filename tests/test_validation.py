"""Bad input: every row of the promise, with who, where, found, expected and what to do."""

import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from hetlora_agg import (
    METHODS,
    ClientUpdate,
    ConvergenceError,
    HetLoRAError,
    InputTypeError,
    InputValueError,
    LowRank,
)
from reference import array, dense, total
from states import fitting
from states import run_certain as aggregate
from states import run_layers as aggregate_layers
from tolerance import distance, eps

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
OUT, IN = 7, 5
EVERY = sorted(METHODS)
# methods that leave slots to their owners and those that pad with something else
SLOTTED = ["rb", "raflora", "rbla", "replicate"]


def client(rank=2, seed=0, dtype=F32, out=OUT, in_=IN, layers=(), **fields):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(*layers, rank, in_, generator=g, dtype=F64).to(dtype)
    B = torch.randn(*layers, out, rank, generator=g, dtype=F64).to(dtype)
    return ClientUpdate(A, B, **fields)


def clients(n=3, rank=2, **fields):
    return [client(rank, seed, **fields) for seed in range(n)]


def changed(update, factor, index, value):
    """The same client with one entry of a factor changed."""
    X = getattr(update, factor).clone()
    X[index] = value
    return replace(update, **{factor: X})


def refused(match, error=InputValueError):
    return pytest.raises(error, match=match)


def test_error_families():
    assert issubclass(InputValueError, HetLoRAError)
    assert issubclass(InputValueError, ValueError)
    assert issubclass(InputTypeError, HetLoRAError)
    assert issubclass(InputTypeError, TypeError)
    assert issubclass(ConvergenceError, HetLoRAError)
    assert issubclass(ConvergenceError, ArithmeticError)


# --- the list itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [list, tuple, lambda: (x for x in ()), lambda: iter([])])
def test_no_updates(empty):
    with refused("no client updates; pass at least one"):
        aggregate(empty())
    with refused("layer 'q': no client updates"):
        aggregate_layers({"q": empty()})


def test_an_exhausted_generator():
    updates = iter(clients())
    aggregate(updates)
    with refused("no client updates"):
        aggregate(updates)


@pytest.mark.parametrize("wrap", [list, tuple, iter, lambda x: (u for u in x)])
def test_any_iterable_of_updates_and_any_form_of_update(wrap):
    plain = clients(4)
    forms = [plain[0], (plain[1].A, plain[1].B), [plain[2].A, plain[2].B, 2]]
    forms.append((plain[3].A, plain[3].B, None, 1))
    assert np.array_equal(total(aggregate(wrap(forms))), total(aggregate(plain)))


@pytest.mark.parametrize(
    ("updates", "match"),
    [
        ({"q": []}, "got a mapping; .*call aggregate_layers"),
        (client(), "got ClientUpdate"),
        (torch.ones(2, 2), "got Tensor"),
        (np.ones((2, 2)), "got ndarray"),
        (LowRank(torch.ones(1, 2), torch.ones(2, 1)), "got LowRank"),
        (None, "got NoneType"),
        (7, "got int"),
        ("rb", "got str"),
        ((torch.ones(2, 2), torch.ones(2, 2)), "client 0: expected a ClientUpdate.*got Tensor"),
        ([None], r"client 0: expected a ClientUpdate, \(A, B\).*got NoneType"),
        ([client(), {"A": 1}], "client 1: expected a ClientUpdate.*got dict"),
        ([client(), (torch.ones(2, 5),)], "client 1: .*got tuple of 1 items"),
        ([(torch.ones(1, 1),) * 2 + (1, 1.0, 1.0)], r"\(A, B, rank, weight\), got tuple of 5"),
        ([LowRank(torch.ones(1, 2), torch.ones(2, 1))], "client 0: .*got LowRank"),
    ],
)
def test_what_is_no_list_of_updates(updates, match):
    with refused(match, InputTypeError):
        aggregate(updates)


@pytest.mark.parametrize("layers", [[client()], clients(), client(), None, "q"])
def test_what_is_no_mapping_of_layers(layers):
    with refused("expected a mapping of layer names.*for one layer call aggregate", InputTypeError):
        aggregate_layers(layers)


def test_no_layers():
    with refused("no layers; pass at least one"):
        aggregate_layers({})


# --- NaN and Inf --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", EVERY)
def test_nan_and_inf_are_an_error_that_says_where(value, method):
    updates = clients()
    updates[1] = changed(updates[1], "B", (3, 1), value)
    match = r"client 1, lora_B: 1 NaN or Inf entries, first at \(3, 1\); .*on_bad_client=\"drop\""
    with refused(match):
        aggregate(updates, method)


def test_nan_is_counted_and_the_client_called_by_its_id():
    updates = clients()
    updates[2] = replace(changed(updates[2], "A", (slice(None), 4), math.inf), id="phone-7")
    with refused(r"client 2 \(id 'phone-7'\), lora_A: 2 NaN or Inf entries, first at \(0, 4\)"):
        aggregate(updates)


def test_nan_inside_leading_dimensions_gives_the_whole_index():
    updates = clients(layers=(2, 3))
    updates[1] = changed(updates[1], "A", (1, 2, 0, 3), math.nan)
    with refused(r"client 1, lora_A: 1 NaN or Inf entries, first at \(1, 2, 0, 3\)"):
        aggregate(updates)


def test_nan_in_a_model_names_the_layer_and_counts_in_that_layer_only():
    good = clients()
    one = [good[0], changed(good[1], "B", (0, 0), math.nan), good[2]]
    two = [good[0], changed(good[1], "B", (slice(0, 3), 0), math.nan), good[2]]
    with refused(r"client 1, layer 'k', lora_B: 1 NaN or Inf entries, first at \(0, 0\)"):
        aggregate_layers({"q": good, "k": one, "v": two})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", EVERY)
def test_a_dropped_client_is_reported_and_counts_as_absent(value, method):
    updates = [replace(u, weight=w) for u, w in zip(clients(4), (1, 2, 3, 4), strict=True)]
    bad = [updates[0], changed(updates[1], "A", (0, 2), value), *updates[2:]]
    result = aggregate(bad, method, on_bad_client="drop")
    ((who, why),) = result.excluded
    assert who == 1
    assert "lora_A: 1 NaN or Inf entries, first at (0, 2)" in why
    assert "clients excluded: 1" in repr(result)
    expected = aggregate([updates[0], *updates[2:]], method)
    assert torch.equal(result.A, expected.A)
    assert torch.equal(result.B, expected.B)
    assert np.array_equal(total(result), total(expected))
    assert expected.excluded == ()


def test_a_dropped_client_of_the_largest_rank_does_not_decide_the_rank():
    updates = [*clients(2), changed(client(5, 9), "A", (4, 0), math.nan)]
    assert aggregate(updates, on_bad_client="drop").rank == 2


def test_nobody_left_after_dropping():
    updates = [changed(u, "A", (0, 0), math.nan) for u in clients(2)]
    with refused("no client is left.*dropped for NaN or Inf.*positive weight"):
        aggregate(updates, on_bad_client="drop")


def test_nan_is_an_error_even_at_weight_0():
    updates = [*clients(2), changed(client(2, 9, weight=0), "A", (0, 0), math.nan)]
    with refused("client 2, lora_A: 1 NaN"):
        aggregate(updates)


def test_nan_in_the_padding_is_not_taken_for_padding():
    updates = [*clients(2), changed(client(3, 9), "A", 2, 0)]
    updates[2] = replace(changed(updates[2], "B", (0, 2), math.nan), rank=2)
    with refused(r"client 2, lora_B: 1 NaN or Inf entries, first at \(0, 2\)"):
        aggregate(updates)


@pytest.mark.parametrize("choice", ["ignore", "Drop", None, True, []])
def test_an_unknown_policy_for_bad_clients(choice):
    with refused(r"on_bad_client.*known: \['drop', 'error'\]"):
        aggregate(clients(), on_bad_client=choice)
    with refused(r"on_bad_client.*known: \['drop', 'error'\]"):
        aggregate_layers({"q": clients()}, on_bad_client=choice)


# --- numbers beyond their dtype -----------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY)
def test_half_precision_factors_whose_product_overflows_half_are_accepted(method):
    A, B = torch.full((1, 3), 3e3, dtype=F16), torch.full((4, 1), 3e3, dtype=F16)
    result = aggregate([(A, B), (A, B)], method)
    assert result.A.dtype == result.B.dtype == F16
    assert torch.isfinite(result.A).all()
    assert torch.isfinite(result.B).all()
    exact = array(B) @ array(A)
    # 9e6 is beyond float16's 65504; each factor is rounded once to half
    assert distance(total(result), exact) <= 4 * eps(F16) * np.linalg.norm(exact)


def test_a_result_beyond_the_clients_dtype_is_an_error_never_inf():
    # both of σ = 1.2e6 in one factor
    updates = [(torch.full((1, 16), 300.0, dtype=F16), torch.full((16, 1), 300.0, dtype=F16))]
    with refused(r"'flexlora': the result has entries beyond 6.55e\+04.*wider", ConvergenceError):
        aggregate(updates, "flexlora", split="left")


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(("dtype", "size"), [(F32, 1e25), (BF16, 1e25), (F64, 1e200)])
def test_a_product_beyond_the_compute_dtype_is_an_error(method, dtype, size):
    large = ClientUpdate(
        torch.full((2, IN), size, dtype=F64).to(dtype),
        torch.full((OUT, 2), size, dtype=F64).to(dtype),
    )
    largest = "1.8e\\+308" if dtype == F64 else "3.4e\\+38"
    with refused(f"client 1: component 0 of scaling.*exceeds {largest}.*scale the update down"):
        aggregate([client(dtype=dtype), large], method)


def test_scaling_counts_in_the_product():
    large = ClientUpdate(torch.full((1, IN), 1e15), torch.full((OUT, 1), 1e15), scaling=1e10)
    with refused(r"client 0, layer 'v': component 0 of scaling \* B @ A exceeds 3.4e\+38"):
        aggregate_layers({"q": [client(1)], "v": [large]})


@pytest.mark.parametrize(
    ("dtype", "size_A", "size_B", "scaling"),
    [
        (F32, 1e25, 1e25, 1e-80),
        (F32, 1e-25, 1e-25, 1e80),
        (F32, 1e30, 1e-30, 1e6),
        (F64, 1e200, 1e-200, 1e100),
    ],
)
def test_an_update_that_fits_is_right_whatever_its_scaling(dtype, size_A, size_B, scaling):
    # the root of the scaling may lie outside the dtype although every factor and product is inside
    A = size_A * torch.ones(1, IN, dtype=dtype)
    B = size_B * torch.ones(OUT, 1, dtype=dtype)
    result = aggregate([ClientUpdate(A, B, scaling=scaling)], "flora")
    exact = scaling * (array(B) @ array(A))
    assert distance(total(result), exact) <= 4 * eps(dtype) * np.linalg.norm(exact)


@pytest.mark.parametrize("method", ["flora", "rb", "rbla"])
def test_a_scaling_that_takes_a_factor_out_of_float64_is_an_error_with_the_remedy(method):
    A, B = torch.full((1, IN), 1e300, dtype=F64), torch.full((OUT, 1), 1e-300, dtype=F64)
    with refused("client 0: .*scale the update down"):
        aggregate([ClientUpdate(A, B, scaling=1e40)], method)


def pair_of_size(size):
    A = size * torch.ones(1, 3, dtype=F64)
    return [(A, size * torch.ones(2, 1, dtype=F64)), (A, 3 * size * torch.ones(2, 1, dtype=F64))]


@pytest.mark.parametrize("size", [1e70, 1e-70, 1.0])
def test_hetlora_weights_do_not_depend_on_the_unit(size):
    B = aggregate(pair_of_size(size), "hetlora").B / size
    assert distance(array(B), 2.5 * np.ones((2, 1))) <= 8 * eps(F64) * 2.5


@pytest.mark.parametrize("size", [1e90, 1e-90])
def test_hetlora_refuses_norms_whose_squares_leave_float64(size):
    # squares add up over layers, so they are what is kept: of norms of 1e180 and 1e-180 they cannot
    with refused(
        "update norms: client 0: the square of its norm leaves float64; bring the updates"
    ):
        aggregate(pair_of_size(size), "hetlora")


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (2, 0)])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_fewer_than_two_dimensions_or_empty(shape, factor):
    update = replace(client(), **{factor: torch.ones(shape)})
    match = rf"client 1: lora_{factor}: expected at least two dimensions, none of them 0, got \("
    with refused(match):
        aggregate([client(), update])


def test_rows_of_A_are_not_columns_of_B():
    with refused(r"client 1: expected.*of one rank, got lora_A \(2, 5\), lora_B \(7, 3\); check"):
        aggregate([client(), (torch.ones(2, IN), torch.ones(OUT, 3))])


def test_transposed_and_swapped_factors_are_recognised():
    u = client()
    with refused("client 0: .*lora_A looks transposed: pass lora_A.mT"):
        aggregate([(u.A.mT, u.B)])
    with refused("client 0: .*lora_B looks transposed: pass lora_B.mT"):
        aggregate([(u.A, u.B.mT)])
    with refused(r"client 0: .*look swapped: the order is \(A, B\)"):
        aggregate([(u.B, u.A)])


def test_both_factors_transposed_fit_each_other_but_not_the_others():
    u = client()
    match = (
        r"client 2: expected \(\*layers, out.*= \(7, 5\) as the others have, got \(5, 7\); it looks"
    )
    with refused(match):
        aggregate([*clients(2), (u.B.mT, u.A.mT)])


def test_swapped_factors_of_a_square_layer_look_transposed():
    # (B, A) of a square layer is a fine pair of rank 6 for a 2x2 layer: only the others tell
    square = [client(2, seed, out=6, in_=6) for seed in range(3)]
    with refused(r"client 2: .*\(6, 6\) as the others have, got \(2, 2\); .*(transposed|swapped)"):
        aggregate([*square[:2], (square[2].B, square[2].A)])


def test_swapped_factors_of_a_square_layer_are_caught_by_the_declared_rank():
    square = client(2, out=6, in_=6)
    with refused("client 0: declares rank 2 with 6 rows, but component 2 is not zero"):
        aggregate([(square.B, square.A, 2)])


def test_leading_dimensions_of_the_two_factors_differ():
    with refused(r"client 0: leading dimensions.*lora_A \(2, 2, 5\), lora_B \(3, 7, 2\)"):
        aggregate([(torch.ones(2, 2, IN), torch.ones(3, OUT, 2))])


def test_leading_dimensions_of_the_clients_differ():
    with refused(r"client 1: .*\(3, 7, 5\) as the others have, got \(2, 7, 5\); leading dim"):
        aggregate([client(layers=(3,)), client(layers=(2,)), client(layers=(3,))])
    with refused(r"client 2: .*= \(7, 5\) as the others have, got \(1, 7, 5\); leading dim"):
        aggregate([client(), client(), client(layers=(1,))])


@pytest.mark.parametrize("odd", range(4))
def test_the_odd_one_out_is_named_wherever_it_stands(odd):
    updates = clients(4)
    updates[odd] = client(out=OUT + 1, id="odd")
    match = rf"client {odd} \(id 'odd'\), layer 'q': .*\(7, 5\) as the others have, got \(8, 5\)"
    with refused(match):
        aggregate_layers({"q": updates})


# --- rank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_zero_padding_is_sliced_off(method, zero):
    plain = fitting(method, clients())
    A, B = torch.zeros(4, IN), torch.zeros(OUT, 4)
    if zero == "A":
        B += 5
    if zero == "B":
        A += 5
    A[:2], B[:, :2] = plain[1].A, plain[1].B
    result = aggregate([plain[0], (A, B, 2), plain[2]], method)
    expected = aggregate(plain, method)
    assert torch.equal(result.A, expected.A)
    assert torch.equal(result.B, expected.B)


def test_padding_that_is_not_zero_is_an_error():
    with refused("client 1: declares rank 1 with 2 rows, but component 1 is not zero; declare the"):
        aggregate([client(), replace(client(), rank=1)])


def test_denormal_padding_is_not_zero():
    update = changed(changed(client(3), "A", 2, 1e-44), "B", (slice(None), 2), 1e-44)
    with refused("declares rank 2 with 3 rows, but component 2 is not zero"):
        aggregate([replace(update, rank=2)])


def test_padding_that_is_not_zero_names_the_layer_and_the_component_of_that_client():
    padded = changed(client(4), "A", slice(1, 3), 0.0)
    with refused("client 1, layer 'v': declares rank 1 with 4 rows, but component 3 is not zero"):
        aggregate_layers({"q": clients(2), "v": [client(3), replace(padded, rank=1)]})


@pytest.mark.parametrize("rank", [0, -1, 3, 10**30])
def test_a_declared_rank_outside_the_rows(rank):
    with refused(
        f"client 1: rank: expected 1 to 2, the rows of lora_A, got {rank}; leave rank out"
    ):
        aggregate([client(), replace(client(), rank=rank)])


@pytest.mark.parametrize(
    "rank",
    [True, np.True_, 2.0, "2", np.float64(2), [2], (2,), 2j, torch.tensor(2.0), np.array([2, 2])],
    ids=repr,
)
def test_a_declared_rank_that_is_no_integer(rank):
    with refused("client 0: rank: expected an integer, got", InputTypeError):
        aggregate([replace(client(), rank=rank)])


@pytest.mark.parametrize("rank", [np.int64(2), np.uint8(2), torch.tensor(2)], ids=repr)
def test_any_integer_is_a_rank(rank):
    assert aggregate([replace(client(), rank=rank)]).rank == 2


@pytest.mark.parametrize("method", EVERY)
def test_a_rank_above_the_sizes_is_accepted_with_a_note(method):
    updates = [replace(client(9, seed), id=f"c{seed}") for seed in range(2)]
    result = aggregate(updates, method)
    expected = {f"client 'c{k}': rank 9 is above min(out, in) = 5" for k in range(2)}
    assert expected <= set(result.notes)
    assert not any("is above min" in note for note in aggregate(clients(), method).notes)


def test_the_exact_mean_of_a_rank_above_the_sizes():
    updates = [client(9, seed, dtype=F64) for seed in range(2)]
    exact = sum(array(u.B) @ array(u.A) for u in updates) / 2
    S = sum(np.linalg.norm(array(u.B)) * np.linalg.norm(array(u.A)) for u in updates) / 2
    assert distance(total(aggregate(updates, "flora")), exact) <= 4 * eps(F64) * S
    assert distance(total(aggregate(updates, "flexlora")), exact) <= 10 * OUT * eps(F64) * S


def test_max_rank_refuses_rank_inflation():
    updates = [client(2), replace(client(4), id="greedy")]
    match = r"client 1 \(id 'greedy'\): declares rank 4, above the registered 3; truncate.*max_rank"
    with refused(match):
        aggregate(updates, max_rank=3)
    with refused(r"client 1 \(id 'greedy'\), layer 'q': declares rank 4"):
        aggregate_layers({"q": updates}, max_rank=3)
    assert aggregate(updates, max_rank=4).rank == 4


def test_max_rank_counts_the_declared_rank_not_the_padding():
    padded = changed(client(4), "A", slice(2, 4), 0.0)
    assert aggregate([replace(padded, rank=2)], max_rank=2).rank == 2


def test_max_rank_by_client():
    updates = [replace(client(2), id="a"), replace(client(4), id="b")]
    assert aggregate(updates, max_rank={"a": 2, "b": 4, "absent": 1}).rank == 4
    with refused(r"client 1 \(id 'b'\): declares rank 4, above the registered 2"):
        aggregate(updates, max_rank={"a": 2, "b": 2})
    with refused(r"client 1 \(id 'b'\): not in max_rank=; register its rank under 'b'"):
        aggregate(updates, max_rank={"a": 2})
    with refused("client 1: declares rank 4, above the registered 3"):
        aggregate([client(2), client(4)], max_rank={0: 2, 1: 3})


@pytest.mark.parametrize("method", SLOTTED)
def test_max_rank_is_not_evaded_by_slots(method):
    # two components in slots far out own them alone, exactly as an inflated rank would
    evading = replace(client(2), slots=(6, 7))
    with refused("client 1: .*slot.*registered 2"):
        aggregate([client(2), evading], method, max_rank=2)


@pytest.mark.parametrize("most", ["4", [4], {0: None}, {0: "4"}, 2.5, True], ids=repr)
def test_max_rank_that_is_no_integer(most):
    with refused("max_rank=?.*integer", HetLoRAError):
        aggregate([client()], max_rank=most)


# --- weight, scaling ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [-1, -1e-300, math.nan, math.inf, -math.inf, 10**400],
    ids=["-1", "-1e-300", "nan", "inf", "-inf", "10**400"],
)
def test_weights_that_are_no_finite_number_from_0(value):
    with refused(r"client 1: weight: expected a finite number >= 0, got"):
        aggregate([client(), replace(client(), weight=value)])
    with refused(r"client 0, layer 'q': weight: expected a finite number >= 0, got"):
        aggregate_layers({"q": [(*torch.ones(2, 2, 2), 2, value)]})


@pytest.mark.parametrize(
    "value", [0, -1, math.nan, math.inf, 10**400], ids=["0", "-1", "nan", "inf", "10**400"]
)
def test_scalings_that_are_no_finite_number_above_0(value):
    with refused(r"client 1 \(id 'x'\): scaling: expected a finite number > 0, got"):
        aggregate([client(), replace(client(), scaling=value, id="x")])


@pytest.mark.parametrize("name", ["weight", "scaling"])
@pytest.mark.parametrize(
    "value", [True, np.True_, "2", b"2", None, 1j, [1], np.array([1.0, 2.0])], ids=repr
)
def test_weights_and_scalings_that_are_no_number(name, value):
    with refused(f"client 0: {name}: expected a finite number", InputTypeError):
        aggregate([replace(client(), **{name: value})])


@pytest.mark.parametrize(
    "number",
    [
        3,
        np.float32(3),
        np.int8(3),
        np.array(3.0),
        torch.tensor(3),
        torch.tensor(3.0, dtype=F64, requires_grad=True),
        Decimal(3),
        Fraction(3),
    ],
    ids=repr,
)
def test_any_real_number_is_a_weight_and_a_scaling(number):
    updates = [replace(client(), weight=number, scaling=number), client(seed=1)]
    expected = [replace(client(), weight=3.0, scaling=3.0), client(seed=1)]
    assert np.array_equal(total(aggregate(updates)), total(aggregate(expected)))


@pytest.mark.parametrize("method", EVERY)
def test_all_weights_zero(method):
    with refused("no client is left: every one has weight 0; pass at least one update"):
        aggregate([replace(u, weight=0) for u in clients()], method)


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
def test_weight_0_is_absent_but_validated(method, zero):
    updates = clients()
    with_zero = [updates[0], replace(client(2, 9), weight=zero), *updates[1:]]
    result, expected = aggregate(with_zero, method), aggregate(updates, method)
    assert torch.equal(result.A, expected.A)
    assert torch.equal(result.B, expected.B)
    with refused("client 0: .*looks transposed"):
        aggregate([replace(client(), A=client().A.mT, weight=zero), *updates], method)


def test_weight_0_does_not_decide_the_rank():
    assert aggregate([client(2), replace(client(5), weight=0)]).rank == 2


@pytest.mark.parametrize("method", EVERY)
def test_weights_at_the_edge_of_float64(method):
    # equal weights, whatever their size
    updates = [replace(u, weight=1e308) for u in clients()]
    expected = aggregate(clients(), method)
    assert torch.equal(aggregate(updates, method).A, expected.A)
    updates = [replace(u, weight=5e-324) for u in clients()]
    assert torch.equal(aggregate(updates, method).A, expected.A)
    assert torch.equal(aggregate(updates, method).B, expected.B)


@pytest.mark.parametrize("method", ["flora", "flexlora", "zeropad", "fedit", "rb", "rbla"])
def test_a_negligible_weight_leaves_the_others_as_they_are(method):
    updates = [replace(client(), weight=1e308), replace(client(seed=1), weight=5e-324)]
    alone, result = total(aggregate(updates[:1], method)), total(aggregate(updates, method))
    assert distance(result, alone) <= 10 * OUT * eps(F32) * np.linalg.norm(alone)


@pytest.mark.parametrize("method", SLOTTED)
@pytest.mark.parametrize("tiny", [5e-324, 1e-310, 1e-45])
def test_a_tiny_weight_that_owns_a_slot_alone_has_it_whole(method, tiny):
    # weights of slot 1: n / n = 1 even where n is denormal; slot 0 belongs to the other client
    small = ClientUpdate(torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0], [0], [0]]), weight=1e308)
    tall = ClientUpdate(torch.eye(3)[:2], 2 * torch.eye(3)[:, :2], weight=tiny)
    result = total(aggregate([small, tall], method))
    expected = np.diag([1.0, 2.0, 0.0])
    assert distance(result, expected) <= 30 * eps(F32) * 3


@pytest.mark.parametrize("method", ["rb", "rbla"])
def test_a_floor_with_weights_at_the_edge(method):
    pair = [replace(client(), weight=1e308), replace(client(4, 1), weight=1e308)]
    plain = [replace(u, weight=1.0) for u in pair]
    one, other = (aggregate(u, method, floor=0.75) for u in (pair, plain))
    assert torch.equal(one.A, other.A)
    assert torch.equal(one.B, other.B)


# --- slots and ids ------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [(0, 0), (0,), (0, 1, 2), (), (-1, 0), range(3)], ids=repr)
def test_slots_that_are_not_one_each(slots):
    with refused("client 1: slots: expected 2 distinct integers from 0, one for each component"):
        aggregate([client(), replace(client(), slots=slots)])


@pytest.mark.parametrize("slots", [5, "01", (0.0, 1.0), (0, None), (True, False)], ids=repr)
def test_slots_that_are_no_integers(slots):
    with refused("client 0: slots: expected.* integers from 0.*got", InputTypeError):
        aggregate([replace(client(), slots=slots)])


@pytest.mark.parametrize(
    "slots", [[1, 0], range(1, -1, -1), np.array([1, 0]), torch.tensor([1, 0])], ids=repr
)
def test_any_sequence_of_integers_names_slots(slots):
    result = aggregate([client(), replace(client(seed=1), slots=slots)], "rbla")
    expected = aggregate([client(), replace(client(seed=1), slots=(1, 0))], "rbla")
    assert torch.equal(result.A, expected.A)


@pytest.mark.parametrize("method", ["zeropad", "rbla", "rb"])
def test_a_slot_no_memory_could_hold_is_an_error_of_ours(method):
    with refused("client 1: .*slot", HetLoRAError):
        aggregate([client(), replace(client(), slots=(0, 10**13))], method)


@pytest.mark.parametrize("id", [[1], {}, torch.nn.Linear])
def test_ids_must_be_hashable_and_unique(id):
    if isinstance(id, type):
        with refused("id .*Linear.* is given to more than one client; ids must be unique"):
            aggregate([replace(client(), id=id) for _ in range(2)])
        return
    with refused("ids must be hashable: unhashable type", InputTypeError):
        aggregate([replace(client(), id=id)])


def test_one_id_twice():
    with refused("layer 'q': id 'a' is given to more than one client; ids must be unique"):
        aggregate_layers({"q": [replace(client(), id="a"), replace(client(), id="a")]})


def test_an_id_that_is_another_clients_position():
    # a client without an id is called by its position in max_rank=, excluded and notes
    with refused("id 0 is given to more than one client"):
        aggregate([client(), replace(client(), id=0)])


@pytest.mark.parametrize(
    "ids", [(3, 1, 2), ("b", "a", "c"), (2.5, "a", 1), ((1, 2), (0, 1), None), (b"b", 0, "z")]
)
def test_ids_of_any_sort(ids):
    updates = [replace(u, id=id) for u, id in zip(clients(), ids, strict=True)]
    gate = 10 * OUT * eps(F32) * 30
    assert distance(total(aggregate(updates)), total(aggregate(clients()))) <= gate


# --- kinds of tensors ---------------------------------------------------------------------------

KINDS = {
    "int64": (lambda X: X.long(), r"got torch.int64; convert it with .float\(\)"),
    "uint8": (lambda X: X.to(torch.uint8), "got torch.uint8"),
    "bool": (lambda X: X > 0, "got torch.bool"),
    "complex": (lambda X: X * 1j, "got torch.complex64"),
    "float8": (lambda X: X.to(torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
    "float8 e5m2": (lambda X: X.to(torch.float8_e5m2), "got torch.float8_e5m2"),
    "sparse": (lambda X: X.to_sparse(), "dense tensor with data, got a torch.sparse_coo one"),
    "meta": (lambda X: X.to("meta"), "dense tensor with data, got a meta one"),
    "nested": (lambda X: torch.nested.nested_tensor([X, X]), "got a nested one"),
    "quantized": (lambda X: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), "got torch.qint8"),
    "numpy int": (lambda X: X.long().numpy(), "expected float16, float32 or float64, got int64"),
    "numpy complex": (lambda X: X.numpy() * 1j, "got complex64"),
    "numpy object": (lambda X: X.numpy().astype(object), "got object"),
    "numpy bool": (lambda X: X.numpy() > 0, "got bool"),
    "numpy str": (lambda X: X.numpy().astype(str), "got <U"),
    "numpy longdouble": (lambda X: X.numpy().astype(np.longdouble), "got float128"),
    "list": (lambda X: X.tolist(), "expected a torch tensor or a numpy array, got list"),
    "None": (lambda X: None, "expected a torch tensor or a numpy array, got NoneType"),
    "number": (lambda X: 1.0, "expected a torch tensor or a numpy array, got float"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize(("make", "match"), KINDS.values(), ids=KINDS)
def test_kinds_of_tensors_that_are_refused(factor, make, match):
    update = client(id="x")
    update = replace(update, **{factor: make(getattr(update, factor))})
    with refused(rf"client 1 \(id 'x'\), layer 'q', lora_{factor}: .*{match}", InputTypeError):
        aggregate_layers({"q": [client(), update]})


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("method", EVERY)
def test_half_precision_is_computed_in_float32_and_cast_back(dtype, method):
    updates = clients(dtype=dtype)
    result = aggregate(updates, method)
    assert result.A.dtype == result.B.dtype == dtype
    wide = aggregate([replace(u, A=u.A.float(), B=u.B.float()) for u in updates], method)
    # the one rounding to half at the end is all that differs
    assert torch.equal(result.A, wide.A.to(dtype))
    assert torch.equal(result.B, wide.B.to(dtype))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(F16, F32, F32), (BF16, F16, F32), (F32, F64, F64), (F16, F64, F64), (BF16, F32, F32)],
)
def test_mixed_dtypes_are_promoted(one, other, expected):
    updates = [client(dtype=one), client(seed=1, dtype=other)]
    assert aggregate(updates).A.dtype == expected
    mixed = replace(client(dtype=one), B=client().B.to(other))
    result = aggregate([mixed], "flora")
    assert result.A.dtype == result.B.dtype == expected
    # nothing is rounded down on the way
    assert torch.equal(result.B, mixed.B.to(expected))


@pytest.mark.parametrize("method", EVERY)
def test_no_gradient_on_the_result(method):
    trained = [
        replace(u, A=torch.nn.Parameter(u.A), B=u.B.clone().requires_grad_()) for u in clients()
    ]
    result = aggregate(trained, method)
    tensors = [result.A, result.B]
    tensors += [] if result.singular_values is None else [result.singular_values]
    tensors += [] if result.residual is None else [result.residual.A, result.residual.B]
    for X in tensors:
        assert not X.requires_grad
        assert X.grad_fn is None
        assert type(X) is torch.Tensor
    assert all(u.A.requires_grad and u.A.grad is None for u in trained)


def awkward(update):
    """Non-contiguous, expanded and shared storage, with the values of ``update``."""
    pool = torch.zeros(2 * update.A.numel() + update.B.numel())
    A = pool[: 2 * update.A.numel()].view(update.A.shape[0], -1)[:, ::2]
    A.copy_(update.A)
    B = pool[2 * update.A.numel() :].view(update.B.mT.shape).mT
    B.copy_(update.B)
    return replace(update, A=A, B=B)


@pytest.mark.parametrize("method", EVERY)
def test_strides_and_shared_storage_do_not_matter(method):
    result = aggregate([awkward(u) for u in clients()], method)
    expected = aggregate(clients(), method)
    assert np.array_equal(total(result), total(expected))


@pytest.mark.parametrize("method", EVERY)
def test_expanded_tensors(method):
    row, column = torch.arange(1.0, 6.0), torch.ones(OUT, 1)
    expanded = ClientUpdate(row.expand(2, IN), column.expand(OUT, 2))
    plain = ClientUpdate(expanded.A.contiguous(), expanded.B.contiguous())
    assert np.array_equal(
        total(aggregate([expanded, client()], method)), total(aggregate([plain, client()], method))
    )


def memory(X):
    """Every byte of an array or tensor, strides included."""
    X = X.detach().numpy() if isinstance(X, torch.Tensor) else X
    return X.strides, X.tobytes()


@pytest.mark.parametrize("options", [{"on_bad_client": "drop"}, {}], ids=["drop", "plain"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("method", EVERY)
def test_arguments_are_never_changed(method, dtype, options):
    updates = [
        replace(u, scaling=2.0 + k, weight=1.0 + k) for k, u in enumerate(clients(dtype=dtype))
    ]
    arrays = [replace(u, A=u.A.numpy().copy(), B=u.B.numpy().copy()) for u in updates]
    if options:
        updates[1] = changed(updates[1], "A", (0, 0), math.nan)
    for given in (updates, arrays, [awkward(u) for u in updates]):
        before = [(memory(u.A), memory(u.B)) for u in given]
        result = aggregate(given, method, **options)
        aggregate_layers({"q": given, "v": given}, method, **options)
        assert [(memory(u.A), memory(u.B)) for u in given] == before
        # and what comes back is not a window on what went in
        for X in (result.A, result.B):
            X[...] = 0
        assert [(memory(u.A), memory(u.B)) for u in given] == before


def test_a_failed_call_changes_nothing():
    updates = [*clients(), client(out=OUT + 1)]
    before = [(memory(u.A), memory(u.B)) for u in updates]
    with refused("client 3"):
        aggregate(updates)
    assert [(memory(u.A), memory(u.B)) for u in updates] == before


def test_inference_tensors():
    with torch.inference_mode():
        updates = [replace(u, A=u.A.clone(), B=u.B.clone()) for u in clients()]
    assert torch.equal(aggregate(updates).A, aggregate(clients()).A)


# --- numpy --------------------------------------------------------------------------------------


def as_numpy(updates):
    return [replace(u, A=u.A.numpy(), B=u.B.numpy()) for u in updates]


@pytest.mark.parametrize("dtype", [F16, F32, F64])
@pytest.mark.parametrize("method", EVERY)
def test_numpy_in_numpy_out(method, dtype):
    updates = clients(dtype=dtype)
    result, expected = aggregate(as_numpy(updates), method), aggregate(updates, method)
    for X, Y in ((result.A, expected.A), (result.B, expected.B)):
        assert type(X) is np.ndarray
        assert X.dtype == Y.numpy().dtype
        assert np.array_equal(X, Y.numpy())
    if expected.singular_values is not None:
        assert type(result.singular_values) is np.ndarray
        assert np.array_equal(result.singular_values, expected.singular_values.numpy())
    if expected.residual is not None:
        assert type(result.residual.A) is type(result.residual.B) is np.ndarray
        assert np.array_equal(result.residual.B, expected.residual.B.numpy())
    assert type(result.factors.dense()) is np.ndarray
    assert type(result.total().A) is np.ndarray


@pytest.mark.parametrize("energy", [None, 0.9])
@pytest.mark.parametrize("fold", [False, True])
def test_numpy_in_every_field_of_the_result(energy, fold):
    result = aggregate(as_numpy(clients()), "flexlora", energy=energy, fold_rest=fold, rank=1)
    assert type(result.singular_values) is np.ndarray
    assert energy is None or isinstance(result.ranks, np.ndarray)
    assert not fold or type(result.residual.A) is np.ndarray
    assert isinstance(result.certificate.norm, np.ndarray)
    assert isinstance(result.certificate.tail, np.ndarray)


def test_one_torch_tensor_among_arrays_gives_torch():
    updates = as_numpy(clients())
    updates[0] = replace(updates[0], A=torch.from_numpy(updates[0].A))
    assert isinstance(aggregate(updates).A, torch.Tensor)


def read_only(X):
    X = X.copy()
    X.flags.writeable = False
    return X


def odd_strides(X):
    """A field of packed records: strides that are no multiple of the item size."""
    records = np.zeros(X.shape, dtype=[("tag", "i1"), ("value", X.dtype)])
    records["value"] = X
    return records["value"]


AWKWARD = {
    "read-only": read_only,
    "negative strides": lambda X: X[::-1, ::-1].copy()[::-1, ::-1],
    "Fortran order": np.asfortranarray,
    "broadcast": lambda X: np.broadcast_to(X, (1, *X.shape))[0],
    "foreign byte order": lambda X: X.astype(X.dtype.newbyteorder(">")),
    "packed records": odd_strides,
    "every second": lambda X: np.repeat(X, 2, axis=-1)[:, ::2],
    "subclass": lambda X: X.view(type("Sub", (np.ndarray,), {})),
}


@pytest.mark.parametrize("make", AWKWARD.values(), ids=AWKWARD)
def test_awkward_arrays(make):
    plain = as_numpy(clients())
    updates = [replace(u, A=make(u.A), B=make(u.B)) for u in plain]
    before = [(memory(u.A), memory(u.B)) for u in updates]
    result, expected = aggregate(updates), aggregate(plain)
    assert type(result.A) is np.ndarray
    assert np.array_equal(result.A, expected.A)
    assert np.array_equal(result.B, expected.B)
    assert [(memory(u.A), memory(u.B)) for u in updates] == before


@pytest.mark.parametrize("method", ["rb", "rbla", "replicate"])
@pytest.mark.parametrize("make", [np.array, read_only])
def test_numpy_previous(method, make):
    A, B = np.ones((4, IN), np.float32), np.ones((OUT, 4), np.float32)
    result = aggregate(as_numpy(clients()), method, previous=LowRank(make(A), make(B)))
    expected = aggregate(
        clients(), method, previous=LowRank(torch.from_numpy(A), torch.from_numpy(B))
    )
    assert type(result.A) is np.ndarray
    assert np.array_equal(result.A, expected.A.numpy())


# --- state of an earlier round ------------------------------------------------------------------

WITH_STATE = {"rb": {}, "rbla": {}, "replicate": {}, "raflora": {"levels": [2, 4]}}
with_state = pytest.mark.parametrize(("method", "options"), WITH_STATE.items(), ids=WITH_STATE)
GOOD = LowRank(torch.ones(4, IN), torch.ones(OUT, 4))


@with_state
@pytest.mark.parametrize(
    ("previous", "match", "error"),
    [
        ((GOOD.A, GOOD.B), "expected a LowRank or an AggregationResult, got tuple", InputTypeError),
        (GOOD.A, "got Tensor", InputTypeError),
        ({"q": GOOD}, "got dict", InputTypeError),
        (LowRank(GOOD.A[:, 1:], GOOD.B), r"= \(7, 5\) as the clients have, got \(7, 4\)", None),
        (LowRank(GOOD.A[None], GOOD.B[None]), r"= \(7, 5\).*got \(1, 7, 5\)", None),
        (aggregate(clients(), "flora"), "not nested.*pass the factors that were distributed", None),
    ],
    ids=["tuple", "tensor", "mapping", "size", "leading dimension", "not nested"],
)
def test_previous_that_does_not_fit(method, options, previous, match, error):
    with refused(f"previous=: .*{match}", error or InputValueError):
        aggregate(clients(), method, previous=previous, **options)


def test_factors_that_do_not_fit_each_other_are_no_low_rank():
    for A, B in (
        (GOOD.A[:3], GOOD.B),
        (GOOD.A, GOOD.B.unsqueeze(0)),
        ([1.0], GOOD.B),
        (GOOD.A[0], GOOD.B),
    ):
        with refused(r"LowRank: expected A \(\*layers, rank, in_features\) and B", HetLoRAError):
            LowRank(A, B)


@with_state
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_previous_with_nan_is_named_as_such(method, options, value):
    A = GOOD.A.clone()
    A[3, 2] = value
    with refused("previous=.*NaN or Inf", HetLoRAError):
        aggregate(clients(), method, previous=LowRank(A, GOOD.B), **options)


# --- methods and options ------------------------------------------------------------------------


def test_an_unknown_method_names_the_nearest_and_all():
    with refused(r"unknown method 'flexlra'; did you mean .*'flexlora'.*\? known: \['dare', 'fair"):
        aggregate(clients(), "flexlra")
    with refused(r"unknown method 'nonsense-x'; known: \["):
        aggregate_layers({"q": clients()}, "nonsense-x")


@pytest.mark.parametrize("method", [None, 3, b"rb", ["rb"], METHODS])
def test_what_is_no_method(method):
    with refused("method: expected a name or a function of Components, got .*'rb'", InputTypeError):
        aggregate(clients(), method)


def test_an_unknown_option_names_the_nearest_and_all():
    match = (
        r"unknown option of method 'rb' 'rnak'; did you mean 'rank'\? known: \['align', 'energy'"
    )
    with refused(match, InputTypeError):
        aggregate(clients(), "rb", rnak=2)
    with refused(
        r"unknown option of method 'hetlora' 'rank'; known: \['per_layer'\]", InputTypeError
    ):
        aggregate_layers({"q": clients()}, "hetlora", rank=2)


def test_functions_are_methods_with_their_own_options():
    def first(c, *, times=1):
        return LowRank(times * c.A, c.B)

    assert distance(dense(aggregate([client()], first, times=2)), 2 * dense(client())) == 0
    with refused("unknown option of method 'first' 'time'; did you mean 'times'", InputTypeError):
        aggregate([client()], first, time=2)
    with refused("needs times=", InputTypeError):
        aggregate([client()], lambda c, times: LowRank(c.A, c.B))
    with refused("method '<lambda>': expected it to return.*got NoneType", InputTypeError):
        aggregate([client()], lambda c: None)


BAD_OPTIONS = [
    ("rb", {"rank": 0}, r"rank=: expected an integer of at least 1, got 0"),
    ("rb", {"rank": -2}, r"rank=: .*got -2"),
    ("rb", {"rank": True}, r"rank=: .*got True"),
    ("rb", {"rank": 2.0}, r"rank=: .*got 2.0"),
    ("flexlora", {"rank": "all"}, r"rank=: expected an integer, 'full' or None, got 'all'"),
    ("raflora", {"rank": [2]}, r"rank=: .*got \[2\]"),
    ("rb", {"energy": 0}, r"energy=: expected a number in \(0, 1\], got 0"),
    ("rb", {"energy": 1.5}, r"energy=: .*got 1.5"),
    ("flexlora", {"energy": math.nan}, r"energy=: .*got nan"),
    ("flexlora", {"energy": "0.9"}, r"energy=: .*got '0.9'"),
    ("flexlora", {"energy": True}, r"energy=: .*got True"),
    ("rb", {"split": "righ"}, r"unknown split= 'righ'; did you mean 'right'\?"),
    ("flexlora", {"split": None}, r"unknown split= None.*known: \['balanced', 'left', 'right'\]"),
    ("rb", {"floor": 0}, r"floor=: expected a number in \(0, 1\], got 0"),
    ("rbla", {"floor": 2}, r"floor=: .*got 2"),
    ("rb", {"quorum": 0}, r"quorum=: expected an integer of at least 1, got 0"),
    ("rbla", {"quorum": 1.5}, r"quorum=: .*got 1.5"),
    ("rb", {"align": "svdd"}, r"unknown align= 'svdd'; did you mean 'svd'\?"),
    ("zeropad", {"weighting": "examplse"}, r"unknown weighting= .*did you mean 'examples'\?"),
    ("raflora", {"levels": [1, 4]}, r"client 0 has rank 2, not one of the levels \[1, 4\]"),
    ("raflora", {"levels": []}, r"not one of the levels \[\]"),
    ("raflora", {"levels": [0, 2]}, r"levels=: expected an integer of at least 1, got 0"),
    ("raflora", {"levels": 2}, r"levels"),
    ("raflora", {"previous": GOOD}, r"previous= needs levels="),
]


@pytest.mark.parametrize(
    ("method", "options", "match"), BAD_OPTIONS, ids=[f"{m}-{o}"[:40] for m, o, _ in BAD_OPTIONS]
)
def test_options_outside_their_range(method, options, match):
    with refused(match, HetLoRAError):
        aggregate(clients(), method, **options)
    with refused(match.replace("needs levels=", "needs levels=|mapping by layer"), HetLoRAError):
        aggregate_layers({"q": clients()}, method, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rb", {"rank": np.int64(2)}),
        ("rb", {"energy": np.float32(0.5)}),
        ("rb", {"quorum": np.int32(2)}),
        ("raflora", {"levels": np.array([2, 4])}),
    ],
    ids=str,
)
def test_numpy_numbers_are_numbers_in_options_too(method, options):
    # as they are in every field of a ClientUpdate
    def plain(value):
        return value.tolist()

    expected = aggregate(clients(), method, **{k: plain(v) for k, v in options.items()})
    assert torch.equal(aggregate(clients(), method, **options).A, expected.A)


def test_fedit_refuses_mixed_ranks_with_the_remedy():
    with refused(r"fedit: expected clients of equal rank.*got ranks \(2, 3\).*use 'zeropad'"):
        aggregate([client(2), client(3)], "fedit")


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "2"])
def test_max_group_must_be_a_count(count):
    with refused("max_group=: expected an integer of at least 1", HetLoRAError):
        aggregate_layers({"q": clients()}, max_group=count)


def test_a_client_beyond_the_dtype_can_be_dropped():
    large = ClientUpdate(torch.full((2, IN), 1e30), torch.full((OUT, 2), 1e30), id="loud")
    kept = [replace(u, id=f"phone-{k}") for k, u in enumerate(clients())]
    with refused('component 0 of scaling.*exceeds.*or leave it out with on_bad_client="drop"'):
        aggregate([*kept, large])
    for method in ("rb", "flora", "median"):
        result = aggregate([*kept, large], method, on_bad_client="drop")
        assert torch.equal(result.A, aggregate(kept, method).A)
        ((who, why),) = result.excluded
        assert who == "loud"
        assert "exceeds 3.4e+38" in why
    both = aggregate([*kept, large, replace(large, id="louder")], on_bad_client="drop")
    assert [who for who, _ in both.excluded] == ["loud", "louder"]
