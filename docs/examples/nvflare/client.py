"""One client: takes the global adapter at its own rank, trains it, sends it back as tensors."""

import nvflare.client as flare
import torch
from network import LORA_ALPHA, RANKS, Network, digits
from torch import nn

from hetlora_agg.integrations.nvflare import own_params


def main():
    """Rounds until the server has enough."""
    flare.init()
    part = int(flare.get_site_name().removeprefix("site-")) - 1
    model, (x, y) = Network(RANKS[part], LORA_ALPHA), digits(part)
    while flare.is_running():
        start = own_params(flare.receive(), model.trained(), lora_alpha=LORA_ALPHA)
        model.load_state_dict(start, strict=False)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(30):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        meta = {"NUM_STEPS_CURRENT_ROUND": len(y)}
        flare.send(flare.FLModel(params=model.trained(), metrics={"loss": loss.item()}, meta=meta))


if __name__ == "__main__":
    main()
