"""Draws: from the caller's generator only, and a layer's do not depend on its company."""

import pytest
import torch

from hetlora_agg import Components, InputTypeError, InputValueError
from hetlora_agg.drawing import normal, uniform

F64 = torch.float64


def components(layers):
    return Components(
        A=torch.zeros(*layers, 2, 5),
        B=torch.zeros(*layers, 4, 2),
        ranks=(2,),
        weight=torch.ones(1, dtype=F64),
        slots=(0, 1),
        ids=(0,),
    )


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("draw", [normal, uniform])
def test_one_generator_draws_for_all_layers(draw):
    found = draw(components((2, 3)), seeded(1), 4, 7)
    kind = torch.randn if draw is normal else torch.rand
    assert torch.equal(found, kind(2, 3, 4, 7, generator=seeded(1), dtype=F64))


@pytest.mark.parametrize("draw", [normal, uniform])
def test_a_generator_for_each_layer_gives_what_the_layer_alone_would_get(draw):
    found = draw(components((2, 3)), [seeded(i) for i in range(6)], 4)
    for i in range(6):
        assert torch.equal(found.reshape(6, 4)[i], draw(components(()), seeded(i), 4))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    normal(components(()), seeded(0), 9)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_every_layer_has_the_same_numbers():
    found = normal(components((2, 3)), None, 4)
    assert torch.equal(found, torch.randn(4, generator=seeded(0), dtype=F64).expand(2, 3, 4))


def test_what_is_no_generator_is_refused():
    with pytest.raises(InputTypeError, match=r"generator=: expected a torch.Generator, got int"):
        normal(components(()), 0, 3)
    with pytest.raises(InputTypeError, match=r"generator=: expected a torch.Generator, got int"):
        uniform(components((2,)), [1, 2], 3)
    with pytest.raises(InputValueError, match="one for each of 6 layers, got 2"):
        normal(components((2, 3)), [seeded(0), seeded(1)], 3)
