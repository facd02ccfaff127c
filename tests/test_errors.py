"""Errors are read by people: as text they are bounded, whatever the caller passed as a name."""

import copy
import pickle
from functools import partial

import pytest
import torch

from hetlora_agg import ClientUpdate, aggregate_layers, errors
from hetlora_agg.adapters import aggregate_adapters, read_adapter
from hetlora_agg.streaming import RunningAggregate, aggregate_folders

LONG = "x" * 100_000
SOUND = ClientUpdate(torch.ones(2, 3), torch.ones(4, 2))
NARROW = ClientUpdate(torch.ones(2, 5), torch.ones(4, 2))

DOORS = {
    "a folder of clients": partial(aggregate_folders, LONG),
    "a client's folder": partial(read_adapter, LONG),
    "clients' folders": partial(aggregate_adapters, [LONG]),
    "a client's id": partial(aggregate_adapters, {LONG: "nowhere"}),
    "a checkpoint": partial(RunningAggregate.load, LONG),
    "a layer": partial(aggregate_layers, {LONG: [SOUND, NARROW]}),
    "a method": partial(aggregate_layers, {"q": [SOUND]}, method=LONG),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_name_without_end_gives_a_message_with_one(door):
    with pytest.raises(errors.HetLoRAError) as raised:
        DOORS[door]()
    assert 20 < len(str(raised.value)) < 4000


@pytest.mark.parametrize("kind", errors.HetLoRAError.__subclasses__())
def test_a_long_message_keeps_where_and_what_to_do(kind):
    error = kind(f"client 3: {LONG}: make it first")
    assert str(error).startswith("client 3: xxx")
    assert str(error).endswith("xxx: make it first")
    assert len(str(error)) < 4000
    assert error.args == (f"client 3: {LONG}: make it first",)
    assert str(pickle.loads(pickle.dumps(error))) == str(copy.copy(error)) == str(error)


def test_a_message_of_usual_length_is_whole():
    text = "x" * errors.MOST
    assert str(errors.InputValueError(text)) == text
    assert str(errors.HetLoRAError()) == ""
