"""Tiny models built from configs, clients that PEFT saved, and what their mean must be.

Deltas come from PEFT's own ``get_delta_weight``; nothing here uses the code under test.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTForImageClassification,
    )

TOKENS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 0, 4]])


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=16, num_labels=3,
        )
    )  # fmt: skip


def vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            image_size=8, patch_size=4, num_labels=3,
        )
    )  # fmt: skip


class Convolutions(nn.Module):
    """A 3×3 and a 1×1 convolution over images, one over sequences, and a head."""

    def __init__(self, groups=1):
        super().__init__()
        self.wide = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
        self.point = nn.Conv2d(6, 8, 1)
        self.line = nn.Conv1d(8, 5, 3)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = torch.relu(self.point(torch.relu(self.wide(x))))
        return self.head(self.line(x.flatten(2)).mean(-1))


@dataclass(frozen=True)
class Case:
    """A model, what it is called with, and what its clients' LoraConfigs share."""

    build: Any
    inputs: dict[str, Any]
    common: dict[str, Any]
    clients: tuple[dict[str, Any], ...]

    def base(self):
        torch.manual_seed(0)
        return self.build().eval()

    def config(self, k):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LoraConfig(**{**self.common, **self.clients[k]})

    def forward(self, model):
        with torch.no_grad():
            found = model(**self.inputs)
        return getattr(found, "logits", found)


ATTENTION = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
IMAGE = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)
CASES = {
    "llama": Case(
        llama,
        {"input_ids": TOKENS},
        ATTENTION,
        (
            {"r": 2, "lora_alpha": 4},
            {"r": 4, "lora_alpha": 6, "use_rslora": True},
            {
                "r": 3,
                "lora_alpha": 3,
                "rank_pattern": {"layers.0.self_attn.q_proj": 5, "v_proj": 1},
                "alpha_pattern": {r"^model\.layers\.1.*q_proj": 7, "v_proj": 2.5},
            },
        ),
    ),
    "bert": Case(
        bert,
        {"input_ids": TOKENS},
        {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"},
        ({"r": 2, "lora_alpha": 8}, {"r": 3, "lora_alpha": 3}, {"r": 5, "lora_alpha": 5}),
    ),
    "vit": Case(
        vit,
        {"pixel_values": IMAGE},
        {
            # transformers has called them both names; the patches are a convolution
            "target_modules": r".*\.(q_proj|query|v_proj|value|projection)",
            "modules_to_save": ["classifier"],
        },
        ({"r": 1, "lora_alpha": 1}, {"r": 4, "lora_alpha": 2, "use_rslora": True}),
    ),
    "gpt2": Case(
        gpt2,
        {"input_ids": TOKENS},
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
        ({"r": 2, "lora_alpha": 4}, {"r": 6, "lora_alpha": 3}),
    ),
    "embedding": Case(
        llama,
        {"input_ids": TOKENS},
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "task_type": "CAUSAL_LM"},
        ({"r": 2, "lora_alpha": 4}, {"r": 3, "lora_alpha": 3, "use_rslora": True}),
    ),
    "convolutions": Case(
        Convolutions,
        {"x": torch.linspace(-1, 1, 2 * 4 * 25).reshape(2, 4, 5, 5)},
        {"target_modules": ["wide", "point", "line"], "modules_to_save": ["head"]},
        ({"r": 2, "lora_alpha": 4}, {"r": 4, "lora_alpha": 4, "rank_pattern": {"line": 1}}),
    ),
    "lora_bias": Case(
        bert,
        {"input_ids": TOKENS},
        {"target_modules": ["query", "value"], "lora_bias": True, "modules_to_save": []},
        ({"r": 2, "lora_alpha": 8}, {"r": 3, "lora_alpha": 3}),
    ),
    "biases": Case(
        bert,
        {"input_ids": TOKENS},
        {"target_modules": ["query", "value"], "bias": "all"},
        ({"r": 2, "lora_alpha": 8}, {"r": 3, "lora_alpha": 3}),
    ),
    "biases of LoRA layers": Case(
        bert,
        {"input_ids": TOKENS},
        {"target_modules": ["query", "value"], "bias": "lora_only"},
        ({"r": 2, "lora_alpha": 8}, {"r": 3, "lora_alpha": 3}),
    ),
}


@dataclass
class Client:
    """What one client trained: by module, everything that differs from the base model."""

    folder: Any
    model: Any
    deltas: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]
    whole: dict[str, torch.Tensor]


def quiet(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def trained(case, k, seed=None, config=None):
    """The client's PeftModel with random values in everything it trains."""
    model = quiet(get_peft_model, case.base(), config or case.config(k)).eval()
    g = torch.Generator().manual_seed(1 + k if seed is None else seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = torch.randn(parameter.shape, generator=g)
            if "magnitude" in name:
                own = parameter.data * (1 + 0.1 * own)
            parameter.data = own if "magnitude" in name else 0.3 * own
    return model


def deltas_of(model):
    """Path in the base model -> PEFT's own delta, and its bias, scaled."""
    deltas, biases = {}, {}
    for name, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer) or "default" not in module.scaling:
            continue
        deltas[name] = module.get_delta_weight("default").detach().clone()
        if module.lora_bias["default"]:
            bias = module.lora_B["default"].bias.detach()
            biases[name] = bias * module.scaling["default"]
    return deltas, biases


def whole_of(model):
    """Key in the base model -> what was trained in full: saved modules and biases."""
    whole = {}
    for name, parameter in model.base_model.model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            plain = name.replace(".modules_to_save.default", "").replace(".base_layer", "")
            whole[plain] = parameter.detach().clone()
    return whole


def save_clients(case, folder, names=("phone", "tablet", "laptop")):
    clients = []
    for k, name in zip(range(len(case.clients)), names, strict=False):
        model = trained(case, k)
        quiet(model.save_pretrained, folder / name)
        clients.append(Client(folder / name, model, *deltas_of(model), whole_of(model)))
    return clients


def merged(case, deltas, biases=None, whole=None):
    """The base model with deltas and biases added and full-size tensors replaced."""
    model = case.base()
    tensors = dict(model.named_parameters())
    for key, value in (whole or {}).items():
        tensors[key].data = value.clone()
    for path, delta in deltas.items():
        tensors[f"{path}.weight"].data = tensors[f"{path}.weight"].data + delta
    for path, bias in (biases or {}).items():
        tensors[f"{path}.bias"].data = tensors[f"{path}.bias"].data + bias
    return model


def mean_of(parts, weights):
    """``Σ w_k x_k / Σ w_k`` by key, in float64."""
    total = sum(weights)
    keys = dict.fromkeys(key for part in parts for key in part)
    return {
        key: sum(w / total * part[key].double() for part, w in zip(parts, weights, strict=True))
        .float()
        for key in keys
    }  # fmt: skip


def expected(case, clients, weights):
    """The forward pass of the base model with the exact mean of all clients merged."""
    parts = [
        mean_of([getattr(c, f) for c in clients], weights) for f in ("deltas", "biases", "whole")
    ]
    return case.forward(merged(case, *parts))


def loaded(case, folder):
    """What PEFT makes of a folder."""
    return quiet(PeftModel.from_pretrained, case.base(), folder).eval()


def assert_same_output(found, wanted, ulps=64):
    """Equal but for float32 rounding in a few layers of width 16."""
    scale = float(wanted.abs().max())
    assert (found - wanted).abs().max() <= ulps * torch.finfo(torch.float32).eps * scale
