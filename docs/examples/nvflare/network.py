"""A small network with LoRA layers, and digits to train it on."""

import torch
from sklearn.datasets import load_digits
from torch import nn

RANKS = (2, 4, 8)
LORA_ALPHA = 8


class LoRALinear(nn.Module):
    """A frozen random layer and the factors that are trained, named as PEFT names them."""

    def __init__(self, in_features, out_features, rank, lora_alpha):
        super().__init__()
        self.base_layer = nn.Linear(in_features, out_features).requires_grad_(False)
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = lora_alpha / rank

    def forward(self, x):
        """The layer's output for ``x (examples, in_features)``."""
        return self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(x))


class Network(nn.Module):
    """The same base whatever the rank; the head is trained whole."""

    def __init__(self, rank, lora_alpha):
        super().__init__()
        # NVFlare rebuilds the model from the attributes that are named like the arguments.
        self.rank, self.lora_alpha = rank, lora_alpha
        torch.manual_seed(0)
        self.head = nn.Linear(64, 10)
        bases = [nn.Linear(64, 64).state_dict() for _ in range(2)]
        self.first = LoRALinear(64, 64, rank, lora_alpha)
        self.second = LoRALinear(64, 64, rank, lora_alpha)
        for layer, base in zip((self.first, self.second), bases, strict=True):
            layer.base_layer.load_state_dict(base)

    def forward(self, x):
        """Logits of ``x (examples, 64)``."""
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

    def trained(self):
        """The state dict without the frozen base: what travels."""
        return {k: X for k, X in self.state_dict().items() if "base_layer" not in k}


def digits(part):
    """Every fourth image from ``part`` on; part 3 is for testing."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[part::4] / 16, dtype=torch.float32)
    return x, torch.tensor(labels[part::4])


def accuracy(model):
    """On the images that no client has."""
    x, y = digits(3)
    with torch.no_grad():
        return (model(x).argmax(-1) == y).double().mean().item()
