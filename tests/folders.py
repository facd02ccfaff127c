"""Folders of many small clients, written without the code under test."""

import json

import torch
from safetensors.torch import save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANKS = (2, 4, 8)


def written(folder, k, rank=None, size=6, layers=2, head=False, scale=1.0, dtype=None):
    """One client's folder, in PEFT's layout; k seeds its entries."""
    folder.mkdir(parents=True)
    rank = rank or RANKS[k % 3]
    g = torch.Generator().manual_seed(k)
    tensors = {}
    for i in range(layers):
        stem = f"base_model.model.h.{i}.q.lora_"
        tensors[f"{stem}A.weight"] = scale * torch.randn(rank, size, generator=g)
        tensors[f"{stem}B.weight"] = torch.randn(size + 1, rank, generator=g)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q"]}
    if head:
        tensors["base_model.model.score.weight"] = torch.randn(3, size, generator=g)
        config["modules_to_save"] = ["score"]
    tensors = {key: X.to(dtype) for key, X in tensors.items()}
    # What differs from client to client and changes nothing.
    config["base_model_name_or_path"] = "base" if k < 2 else f"/home/{k}/base"
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def many(root, count, **look):
    """Folders c000, c001, …; their weights by id."""
    folders = [written(root / f"c{k:03d}", k, **look) for k in range(count)]
    return {folder.name: 1.0 + k % 5 + k / 7 for k, folder in enumerate(folders)}


def contents(folder):
    """Every file of an adapter's folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
