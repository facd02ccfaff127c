"""A small network with LoRA layers of our own: pre-training, adapting, local training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hetlora_agg import LowRank
from hetlora_agg.simulate.data import Examples

WIDTHS = (64, 128, 10)


@dataclass(frozen=True)
class Training:
    """How a network is trained: Adam on the cross-entropy of random batches."""

    epochs: int
    learning_rate: float
    batch_size: int = 32

    def steps(self, examples: int) -> int:
        """How many steps the optimiser takes on so many examples."""
        return self.epochs * math.ceil(examples / self.batch_size)


# This, and the clients' defaults in `Settings`, gave the best accuracy averaged over all methods on
# seeds 10-12, which no default uses: no method was tuned for.
PRETRAINING = Training(epochs=60, learning_rate=0.003)


@dataclass(frozen=True)
class Linear:
    """A frozen layer: `weight (out_features, in_features)`, `bias (out_features,)`."""

    weight: Tensor
    bias: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """`(*, in_features)` to `(*, out_features)`."""
        return F.linear(inputs, self.weight, self.bias)

    def fold(self, update: LowRank) -> Linear:
        """The layer with `update` added to its weight."""
        return Linear(self.weight + update.dense(), self.bias)


@dataclass(frozen=True)
class LoRALinear:
    """A frozen layer plus `scaling * lora_B lora_A`; only the two factors are trained.

    Attributes:
        base: the frozen layer.
        lora_A: `(rank, in_features)`.
        lora_B: `(out_features, rank)`.
        scaling: the client's `lora_alpha / rank`.
    """

    base: Linear
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def __call__(self, inputs: Tensor) -> Tensor:
        """`(*, in_features)` to `(*, out_features)`."""
        return self.base(inputs) + self.scaling * (inputs @ self.lora_A.T @ self.lora_B.T)


Network = Mapping[str, Linear]
"""The layers that take adapters, by name. In the simulator's own network these are all there are,
first to last, with a ReLU between them."""

Forward = Callable[[Mapping[str, Callable[[Tensor], Tensor]], Tensor], Tensor]
"""Layers by name and a batch of inputs to logits `(examples, classes)`; what else a network has
belongs to the function."""


def forward(layers: Mapping[str, Callable[[Tensor], Tensor]], inputs: Tensor) -> Tensor:
    """Logits `(examples, classes)` of `inputs (examples, in_features)`."""
    *hidden, last = layers.values()
    for layer in hidden:
        inputs = F.relu(layer(inputs))
    return last(inputs)


def accuracy(network: Network, examples: Examples, forward: Forward = forward) -> float:
    """Share of `examples` that the network labels correctly."""
    with torch.no_grad():
        hits = forward(network, examples.inputs).argmax(dim=-1) == examples.labels
    return hits.double().mean().item()


def pretrain(examples: Examples, generator: torch.Generator) -> Network:
    """A network trained on `examples` with all its weights: the frozen base of a federation."""
    layers = {
        f"layers.{depth}": Linear(
            kaiming_uniform(out_features, in_features, generator).requires_grad_(),
            torch.zeros(out_features, requires_grad=True),
        )
        for depth, (in_features, out_features) in enumerate(pairwise(WIDTHS))
    }
    parameters = [tensor for layer in layers.values() for tensor in (layer.weight, layer.bias)]
    fit(layers, parameters, examples, PRETRAINING, generator)
    return {
        name: Linear(layer.weight.detach(), layer.bias.detach()) for name, layer in layers.items()
    }


def layer_ranks(network: Network, rank: int) -> dict[str, int]:
    """The rank that a client of `rank` has in each layer: no more than the layer can hold."""
    return {name: min(rank, *layer.weight.shape) for name, layer in network.items()}


def fresh_adapter(network: Network, rank: int, generator: torch.Generator) -> dict[str, LowRank]:
    """The usual LoRA start on every layer: lora_A Kaiming-uniform, lora_B zero."""
    adapter = {}
    for name, own_rank in layer_ranks(network, rank).items():
        out_features, in_features = network[name].weight.shape
        lora_A = kaiming_uniform(own_rank, in_features, generator)
        adapter[name] = LowRank(lora_A, torch.zeros(out_features, own_rank))
    return adapter


def fold(network: Network, updates: Mapping[str, LowRank]) -> Network:
    """The network with `updates` added to the weights of the layers they name."""
    return {
        name: layer.fold(updates[name]) if name in updates else layer
        for name, layer in network.items()
    }


def fit(
    layers: Mapping[str, Callable[[Tensor], Tensor]],
    parameters: Iterable[Tensor],
    examples: Examples,
    training: Training,
    generator: torch.Generator,
    *,
    forward: Forward = forward,
    penalty: Callable[[], Tensor] | None = None,
    before_step: Callable[[], None] | None = None,
) -> None:
    """Train `parameters`, leaves of `layers`, in place.

    Args:
        layers: the network.
        parameters: what is trained.
        examples: what it is trained on.
        training: epochs, learning rate, batch size.
        generator: draws the order of the examples.
        forward: of the network that the layers belong to.
        penalty: a scalar that is added to every batch's loss.
        before_step: called when the gradients are there and before the optimiser takes them.
    """
    optimizer = torch.optim.Adam(parameters, lr=training.learning_rate)
    for _ in range(training.epochs):
        order = torch.randperm(len(examples), generator=generator)
        for first in range(0, len(order), training.batch_size):
            rows = order[first : first + training.batch_size]
            loss = F.cross_entropy(forward(layers, examples.inputs[rows]), examples.labels[rows])
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if before_step is not None:
                before_step()
            optimizer.step()


def kaiming_uniform(rows: int, in_features: int, generator: torch.Generator) -> Tensor:
    """`(rows, in_features)` from U(-1/sqrt(in), 1/sqrt(in)), as torch and PEFT draw theirs."""
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rows, in_features).uniform_(-bound, bound, generator=generator)
