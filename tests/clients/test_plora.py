"""Select-N-Fold: a random choice of the modules, the rest in the base, no initialisation noise."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from hetlora_agg import (
    AggregationResult,
    ClientUpdate,
    InputTypeError,
    InputValueError,
    LowRank,
    aggregate,
)
from hetlora_agg.clients import select_and_fold
from reference import array, dense
from tolerance import distance, eps

OUT, IN, MODULES = 6, 5, 4
F32, F64 = torch.float32, torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def modules(dtype=F64, layers=(), seed=0):
    g = generator(seed)
    return LowRank(
        torch.randn(*layers, MODULES, IN, generator=g, dtype=F64).to(dtype),
        torch.randn(*layers, OUT, MODULES, generator=g, dtype=F64).to(dtype),
    )


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("layers", [(), (2, 3)])
@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_the_client_starts_from_the_global_model(rank, scaling, layers, dtype):
    current = modules(dtype, layers)
    chosen = select_and_fold(current, rank, generator=generator(), scaling=scaling)
    assert chosen.adapter.rank == len(chosen.slots) == rank
    assert chosen.rest.rank == MODULES - rank
    start = dense(chosen.rest) + scaling * dense(chosen.adapter)
    # two roundings in each factor: the root of the scaling and the division
    gate = 4 * eps(dtype) * np.linalg.norm(array(current.A)) * np.linalg.norm(array(current.B))
    assert distance(start, dense(current)) <= gate
    assert chosen.adapter.A.dtype == chosen.rest.A.dtype == dtype


def test_every_module_is_in_one_of_the_two_bit_for_bit():
    current = modules()
    chosen = select_and_fold(current, 2, generator=generator())
    others = [j for j in range(MODULES) if j not in chosen.slots]
    assert list(chosen.slots) == sorted(chosen.slots)
    assert torch.equal(chosen.adapter.A, current.A[list(chosen.slots)])
    assert torch.equal(chosen.adapter.B, current.B[:, list(chosen.slots)])
    assert torch.equal(chosen.rest.A, current.A[others])
    assert torch.equal(chosen.rest.B, current.B[:, others])


def test_worked_by_hand():
    # 2 · (1/√2)(4/√2) is the module of product 4; the other one, 9, goes to the base
    current = LowRank(torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0, 3.0]]))
    chosen = select_and_fold(current, 1, generator=generator(), scaling=2.0)
    products = {0: 4.0, 1: 9.0}
    (slot,) = chosen.slots
    assert chosen.rest.dense().item() == products[1 - slot]
    assert 2.0 * chosen.adapter.dense().item() == pytest.approx(products[slot], rel=4 * eps(F32))


def test_every_set_is_as_likely_as_any_other():
    current, g, draws = modules(), generator(), 3000
    counts = Counter(select_and_fold(current, 2, generator=g).slots for _ in range(draws))
    sets = list(combinations(range(MODULES), 2))
    assert set(counts) == set(sets)
    p = 1 / len(sets)
    # binomial counts, five standard deviations
    for count in counts.values():
        assert abs(count - draws * p) <= 5 * np.sqrt(draws * p * (1 - p))


def test_the_generator_decides_and_the_global_one_is_left_alone():
    before = torch.get_rng_state()
    one, two = (select_and_fold(modules(), 2, generator=generator(3)).slots for _ in range(2))
    assert one == two
    assert torch.equal(torch.get_rng_state(), before)
    several = {select_and_fold(modules(), 2, generator=generator(s)).slots for s in range(20)}
    assert len(several) > 1


def test_inputs_are_left_alone_and_outputs_are_copies():
    current = modules()
    before = current.A.clone(), current.B.clone()
    chosen = select_and_fold(current, 2, generator=generator())
    for factors in (chosen.adapter, chosen.rest):
        factors.A.fill_(7)
        factors.B.fill_(7)
    assert torch.equal(current.A, before[0])
    assert torch.equal(current.B, before[1])


def test_a_module_of_zeros_can_still_learn():
    current = LowRank(torch.zeros(2, IN), torch.zeros(OUT, 2))
    one = select_and_fold(current, 1, generator=generator(0), scaling=2.0)
    assert bool(one.adapter.A.any())
    assert not one.adapter.B.any()
    assert not one.rest.dense().any()
    # one slot is filled alike for all clients, whoever chose it and with whatever generator
    everybody = [select_and_fold(current, 1, generator=generator(s)) for s in range(8)]
    rows = {s.slots: [o.adapter.A for o in everybody if o.slots == s.slots] for s in everybody}
    assert len(rows) == 2
    for alike in rows.values():
        assert all(torch.equal(alike[0], row) for row in alike)


def round_of(current, ranks, scaling, step, previous):
    """One round: what each client chose, and the result of what it trained."""
    chosen = [
        select_and_fold(previous, rank, generator=generator(10 + k), scaling=scaling)
        for k, rank in enumerate(ranks)
    ]
    trained = [
        LowRank(own.adapter.A + step * (k + 1), own.adapter.B - step * (k + 1))
        for k, own in enumerate(chosen)
    ]
    updates = [
        ClientUpdate(own.A, own.B, scaling=scaling, slots=choice.slots)
        for own, choice in zip(trained, chosen, strict=True)
    ]
    return chosen, trained, aggregate(updates, "plora", previous=current)


@pytest.mark.parametrize("layers", [(), (2,)])
@pytest.mark.parametrize("as_result", [False, True])
def test_a_round_trip(as_result, layers):
    current, scaling = modules(layers=layers), 0.4
    previous = AggregationResult(current, nested=False) if as_result else current
    chosen, trained, result = round_of(current, [1, 2], scaling, 0.1, previous)
    A, B = array(current.A).copy(), array(current.B).copy()
    for j in range(MODULES):
        owners = [k for k, own in enumerate(chosen) if j in own.slots]
        if not owners:
            continue
        rows = [array(trained[k].A)[..., chosen[k].slots.index(j), :] for k in owners]
        columns = [array(trained[k].B)[..., chosen[k].slots.index(j)] for k in owners]
        A[..., j, :] = np.sqrt(scaling) * np.mean(rows, axis=0)
        B[..., j] = np.sqrt(scaling) * np.mean(columns, axis=0)
    # at most seven roundings of entries under 4: root, fold, two sums, mean
    assert np.abs(array(result.A) - A).max() <= 7 * eps(F64) * np.abs(A).max()
    assert np.abs(array(result.B) - B).max() <= 7 * eps(F64) * np.abs(B).max()
    again = select_and_fold(result, 3, generator=generator(), scaling=scaling)
    size = np.linalg.norm(array(result.A)) * np.linalg.norm(array(result.B))
    start = dense(again.rest) + scaling * dense(again.adapter)
    assert distance(start, dense(result.factors)) <= 4 * eps(F64) * size


def test_an_idle_round_changes_nothing():
    current = modules()
    _, _, result = round_of(current, [2, 3, 1], 0.7, 0.0, current)
    # divided by a root and multiplied by it, then the mean of at most three
    assert np.abs(array(result.A) - array(current.A)).max() <= 7 * eps(F64) * 4
    assert np.abs(array(result.B) - array(current.B)).max() <= 7 * eps(F64) * 4


def test_more_modules_than_there_are():
    with pytest.raises(InputValueError, match=r"rank: expected at most 4.*got 5"):
        select_and_fold(modules(), 5, generator=generator())


@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_below_1(rank):
    with pytest.raises(InputValueError, match="rank: expected an integer of at least 1"):
        select_and_fold(modules(), rank, generator=generator())


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan")])
def test_scalings_that_are_not_positive(scaling):
    with pytest.raises(InputValueError, match="scaling: expected a finite number > 0"):
        select_and_fold(modules(), 1, generator=generator(), scaling=scaling)


@pytest.mark.parametrize("given", [None, 0, np.random.default_rng(0)], ids=type)
def test_what_is_no_generator(given):
    with pytest.raises(InputTypeError, match=r"expected a torch.Generator"):
        select_and_fold(modules(), 1, generator=given)


@pytest.mark.parametrize("given", [None, (torch.ones(1, 2), torch.ones(2, 1))], ids=type)
def test_what_is_no_global_model(given):
    with pytest.raises(InputTypeError, match="current: expected a LowRank or an Aggregation"):
        select_and_fold(given, 1, generator=generator())


def test_results_whose_components_are_no_modules():
    current = modules()
    update = [(current.A, current.B)]
    with pytest.raises(InputValueError, match="components are not slots"):
        select_and_fold(
            AggregationResult(current, nested=False, slotted=False), 1, generator=generator()
        )
    with pytest.raises(InputValueError, match=r"shares \['A'\] only; use continue_from"):
        select_and_fold(aggregate(update, "fedsa"), 1, generator=generator())


def test_nan_in_the_global_model():
    current = modules()
    current.A[0, 0] = torch.nan
    with pytest.raises(InputValueError, match="NaN or Inf"):
        select_and_fold(current, 1, generator=generator())
