"""One client's local training: what it starts from, what it may change, what else it minds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hetlora_agg import LowRank
from hetlora_agg.simulate.data import Examples
from hetlora_agg.simulate.network import (
    Forward,
    LoRALinear,
    Network,
    Training,
    fit,
    forward,
)

Adapter = Mapping[str, LowRank]
"""By layer, lora_A `(rank, in_features)` and lora_B `(out_features, rank)`."""

Slots = Mapping[str, tuple[int, ...]]
"""By layer, the slot that each component fills."""

Penalty = Callable[[Adapter], Tensor]
"""A scalar of the factors in training, through which gradients flow."""

Steer = Callable[[str, LowRank, LowRank], LowRank]
"""Layer, its factors and their gradients to the gradients that the optimiser takes."""

FACTORS = ("A", "B")


@dataclass(frozen=True)
class Start:
    """What one client starts a round from: `weight + scaling * lora_B lora_A` in every layer.

    Attributes:
        network: the client's base, with whatever it folded in itself.
        adapter: its factors, by layer.
        scaling: of the adapter, by layer.
        slots: the slots it trains and sends; None is the leading ones, as many as the adapter has.
    """

    network: Network
    adapter: Adapter
    scaling: Mapping[str, float]
    slots: Slots | None = None

    def weights(self) -> dict[str, Tensor]:
        """The weights of the whole model, `(out_features, in_features)` float64, by layer."""
        return {
            name: layer.weight.double()
            + self.scaling[name] * self.adapter[name].B.double() @ self.adapter[name].A.double()
            for name, layer in self.network.items()
        }


@dataclass(frozen=True)
class Rules:
    """What local training does besides descending on the client's own examples.

    Attributes:
        factors: which factors train, of "A" and "B".
        penalty: added to the loss of every batch.
        steer: sees every gradient and says which one is taken instead; both factors train then.
    """

    factors: tuple[str, ...] = FACTORS
    penalty: Penalty | None = None
    steer: Steer | None = None


def train_adapter(
    start: Start,
    examples: Examples,
    training: Training,
    generator: torch.Generator,
    rules: Rules | None = None,
    forward: Forward = forward,
) -> dict[str, LowRank]:
    """The adapter after one client's local training on `examples`; `start` is left as it was.

    Args:
        start: base, factors and scaling.
        examples: the client's own.
        training: epochs, learning rate, batch size.
        generator: draws the order of the examples.
        rules: what trains and what else the client minds; None trains both factors plainly.
        forward: of the network that the layers belong to.
    """
    rules = rules or Rules()
    leaves = {name: LowRank(own.A.clone(), own.B.clone()) for name, own in start.adapter.items()}
    parameters = [
        getattr(own, factor).requires_grad_()
        for own in leaves.values()
        for factor in FACTORS
        if factor in rules.factors
    ]
    layers = {
        name: LoRALinear(base, leaves[name].A, leaves[name].B, start.scaling[name])
        for name, base in start.network.items()
    }
    penalty, steer = rules.penalty, rules.steer
    fit(
        layers,
        parameters,
        examples,
        training,
        generator,
        forward=forward,
        penalty=None if penalty is None else lambda: penalty(leaves),
        before_step=None if steer is None else lambda: _steer(leaves, steer),
    )
    return {name: LowRank(own.A.detach(), own.B.detach()) for name, own in leaves.items()}


def only(gradient: LowRank, slots: tuple[int, ...]) -> LowRank:
    """The gradient with zeros everywhere but at these components.

    Adam leaves what never had a gradient exactly as it was.
    """
    kept = torch.zeros(gradient.rank).index_fill(0, torch.tensor(slots), 1.0)
    return LowRank(kept.unsqueeze(-1) * gradient.A, kept * gradient.B)


def _steer(leaves: Adapter, steer: Steer) -> None:
    """Replace the gradients of all leaves by those that `steer` returns."""
    for name, own in leaves.items():
        if own.A.grad is None or own.B.grad is None:
            raise RuntimeError("local training: steering needs both factors to train")
        taken = steer(
            name, LowRank(own.A.detach(), own.B.detach()), LowRank(own.A.grad, own.B.grad)
        )
        own.A.grad, own.B.grad = taken.A, taken.B
