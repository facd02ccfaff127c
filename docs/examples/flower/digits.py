"""Three clients of ranks 2, 4 and 8 fine-tune a small network on digits with Flower and PEFT.

Run it with ``python digits.py``; it takes Flower's simulation, two rounds and less than a minute.
Only the lines with HetLoRA, receive and reply concern hetlora_agg.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from sklearn.datasets import load_digits
from torch import nn

from hetlora_agg.integrations.flower import HetLoRA, receive, reply

RANKS = (2, 4, 8)
LORA_ALPHA = 8
ROUNDS = 2


class Network(nn.Module):
    """A frozen random base; LoRA trains the first two layers, the head is trained whole."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        """Logits of ``x (examples, 64)``."""
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def network(rank, lora_alpha=LORA_ALPHA):
    """The same base everywhere, an adapter of the client's own rank."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,
        target_modules=["first", "second"],
        modules_to_save=["head"],
    )
    return get_peft_model(Network(), config)


def digits(part):
    """Every fourth image from ``part`` on; part 3 is for testing."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[part::4] / 16, dtype=torch.float32)
    return x, torch.tensor(labels[part::4])


client = ClientApp()


@client.train()
def train(message, context):
    """Local training: take the global adapter at one's own rank, train, send it back."""
    part = context.node_config["partition-id"]
    model, (x, y) = network(RANKS[part]), digits(part)
    start = receive(message, get_peft_model_state_dict(model), lora_alpha=LORA_ALPHA)
    set_peft_model_state_dict(model, start)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    content = reply(get_peft_model_state_dict(model), len(y), loss=loss.item())
    return Message(content, reply_to=message)


def evaluate(server_round, arrays):
    """Accuracy of the global adapter, which is in units of ΔW: its scaling is 1."""
    model, (x, y) = network(max(RANKS), lora_alpha=max(RANKS)), digits(3)
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    with torch.no_grad():
        accuracy = (model(x).argmax(-1) == y).double().mean().item()
    print(f"round {server_round}: accuracy {accuracy:.3f}", flush=True)
    return MetricRecord({"accuracy": accuracy})


server = ServerApp()


@server.main()
def main(grid, context):
    """The server: FedAvg's place is taken by HetLoRA, nothing else changes."""
    strategy = HetLoRA("rb", lora_alpha=LORA_ALPHA, min_train_nodes=3, fraction_evaluate=0.0)
    initial = ArrayRecord(get_peft_model_state_dict(network(max(RANKS))))
    strategy.start(grid, initial, num_rounds=ROUNDS, evaluate_fn=evaluate)


if __name__ == "__main__":
    resources = {"client_resources": {"num_cpus": 1}}
    run_simulation(server, client, num_supernodes=3, backend_config=resources)
