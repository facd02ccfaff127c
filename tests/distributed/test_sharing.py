"""Who takes what, and the bytes that travel."""

import itertools
import random

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hetlora_agg import InputTypeError, InputValueError, distributed
from hetlora_agg.distributed.packing import here, pack, unpack
from hetlora_agg.distributed.sharing import shared_out
from processes import results_of


def least_load(costs, processes):
    """The least possible largest load: every assignment tried."""
    return min(
        max(
            sum(c for c, r in zip(costs, ranks, strict=True) if r == rank)
            for rank in range(processes)
        )
        for ranks in itertools.product(range(processes), repeat=len(costs))
    )


@example([1, 1, 2], 2)
@given(st.lists(st.integers(0, 9), max_size=7), st.integers(1, 3))
def test_loads_are_within_a_third_of_the_least_possible(costs, processes):
    names = [f"layer {i}" for i in range(len(costs))]
    shares = shared_out(names, costs, processes)
    assert sorted(itertools.chain(*shares)) == sorted(names)
    cost = dict(zip(names, costs, strict=True))
    largest = max(sum(cost[name] for name in own) for own in shares)
    assert 3 * largest <= 4 * least_load(costs, processes)
    for own in shares:
        assert own == [name for name in names if name in own]


def test_the_order_of_names_does_not_matter(monkeypatch):
    names = [f"layer {i}" for i in range(23)]
    cost = {name: (i * 7) % 5 for i, name in enumerate(names)}

    def work(rank):
        mixed = random.Random(rank).sample(names, len(names))
        return set(distributed.own(mixed, cost))

    found = results_of(monkeypatch, 4, work)
    assert set().union(*found) == set(names)
    assert sum(map(len, found)) == len(names)


def test_equal_costs_and_no_costs_are_spread_evenly(monkeypatch):
    for cost in (None, dict.fromkeys(range(10), 0)):
        found = results_of(monkeypatch, 4, lambda _, cost=cost: distributed.own(range(10), cost))
        assert sorted(map(len, found)) == [2, 2, 3, 3]


@pytest.mark.parametrize(
    ("names", "cost", "error"),
    [
        ("layers", None, InputTypeError),
        ([("a",)], None, InputTypeError),
        ([True], None, InputTypeError),
        (["a", "a"], None, InputValueError),
        (["a"], {}, InputValueError),
        (["a"], [1], InputTypeError),
        (["a"], {"a": -1}, InputValueError),
    ],
)
def test_what_cannot_be_shared_out(names, cost, error, monkeypatch):
    def work(_):
        with pytest.raises(error):
            distributed.own(names, cost)

    results_of(monkeypatch, 1, work)


DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int64,
    torch.bool, torch.int8, torch.int32, torch.float8_e5m2,
]  # fmt: skip
shapes = st.lists(st.integers(0, 4), max_size=3)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=5), st.text())
def test_every_bit_travels(kinds, text):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, (dtype, shape) in enumerate(kinds):
        X = torch.randn(shape, generator=generator) * 100
        # Every second one in strides that are not its own.
        tensors[f"{text} {i}"] = (X.mT if i % 2 and X.dim() > 1 else X).to(dtype)
    data = {"text": text, "numbers": [1, 2**70, 0.1, 5e-324, None, True]}
    found, told = unpack(pack(tensors, data))
    assert told == data
    assert list(found) == list(tensors)
    for name, X in tensors.items():
        assert found[name].dtype == X.dtype
        assert torch.equal(found[name].float(), X.float())


def test_nan_inf_and_the_sign_of_zero_travel():
    X = torch.tensor([torch.nan, torch.inf, -0.0], dtype=torch.float64)
    found, _ = unpack(pack({"X": X}, None))
    assert torch.equal(found["X"].view(torch.int64), X.view(torch.int64))


def test_the_cpu_is_the_same_everywhere():
    assert here("cpu") == "cpu"


def test_another_processes_card_is_ones_own(monkeypatch):
    class Cards:
        @staticmethod
        def current_device():
            return 2

    monkeypatch.setattr(torch, "get_device_module", lambda kind: Cards)
    assert here("cuda:0") == "cuda:2"
    assert here("cuda") == "cuda:2"
