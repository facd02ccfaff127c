"""Three clients of ranks 2, 4 and 8 fine-tune a small network on digits with NVFlare.

Run it with ``python job.py``; it takes NVFlare's simulator, two rounds and about a minute. Only
the two lines with HetLoRAAggregator here and the two with own_params in client.py concern
hetlora_agg.
"""

import sys
import tempfile
from pathlib import Path

import torch
from network import LORA_ALPHA, RANKS, Network, accuracy
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv

from hetlora_agg.integrations.nvflare import HetLoRAAggregator

ROUNDS = 2


def main(workspace):
    """Run the job and say how good the global adapter has become."""
    # The global adapter is in units of ΔW: at lora_alpha = rank its scaling is 1.
    model = Network(max(RANKS), lora_alpha=max(RANKS))
    recipe = FedAvgRecipe(
        name="digits",
        model=model,
        min_clients=len(RANKS),
        num_rounds=ROUNDS,
        train_script=str(Path(__file__).with_name("client.py")),
        aggregator=HetLoRAAggregator("rb", lora_alpha=LORA_ALPHA, global_rank=max(RANKS)),
        # The numpy format reshapes what a client receives to what it last sent: to another rank.
        server_expected_format=ExchangeFormat.PYTORCH,
        key_metric="loss",
        key_metric_mode="min",
    )
    before = accuracy(model)
    run = recipe.execute(SimEnv(num_clients=len(RANKS), workspace_root=workspace))
    (saved,) = Path(run.get_result()).rglob("FL_global_model.pt")
    model.load_state_dict(torch.load(saved, weights_only=True)["model"])
    print(f"accuracy {before:.3f} before, {accuracy(model):.3f} after {ROUNDS} rounds")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if len(sys.argv) > 1 else folder)
