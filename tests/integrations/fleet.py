"""State dicts of clients of different ranks, and what `aggregate_layers` makes of them."""

import numpy as np
import torch

from hetlora_agg import ClientUpdate, LowRank, aggregate_layers

LAYERS = {"base_model.model.q": (6, 5), "base_model.model.v": (7, 4)}
KEYS = [f"{layer}.lora_{factor}.weight" for layer in LAYERS for factor in "AB"]
HEAD = "base_model.model.classifier.weight"
ALPHA = 8
RANKS = {3: 2, 11: 4, 7: 3}
WEIGHTS = {3: 10, 11: 30, 7: 20}


def trained(node, *, rank=None, dtype=torch.float32, round=1):
    """What a client sends: factors of every layer and a classifier head."""
    generator = torch.Generator().manual_seed(1000 * round + node)
    rank = rank or RANKS[node]
    arrays = {}
    for layer, (out, in_) in LAYERS.items():
        for factor, shape in (("A", (rank, in_)), ("B", (out, rank))):
            X = torch.randn(shape, generator=generator)
            arrays[f"{layer}.lora_{factor}.weight"] = X.to(dtype)
    arrays[HEAD] = torch.randn(3, 4, generator=generator).to(dtype)
    return arrays


def as_numpy(arrays):
    return {key: X.numpy() for key, X in arrays.items()}


def expected(sent, method="rb", scaling=lambda rank: ALPHA / rank, **options):
    """Layer -> the library's own result, for ``{node: state dict}``."""
    updates = {
        layer: [
            ClientUpdate(
                arrays[f"{layer}.lora_A.weight"],
                arrays[f"{layer}.lora_B.weight"],
                weight=WEIGHTS[node],
                scaling=scaling(len(arrays[f"{layer}.lora_A.weight"])),
                id=node,
            )
            for node, arrays in sent.items()
        ]
        for layer in LAYERS
    }
    return aggregate_layers(updates, method, **options)


def factors(arrays):
    """Layer -> the factors in a state dict, as ``previous=`` takes them."""
    return {
        layer: LowRank(*(torch.as_tensor(arrays[f"{layer}.lora_{f}.weight"]) for f in "AB"))
        for layer in LAYERS
    }


def dense(arrays, layer):
    A, B = (torch.as_tensor(arrays[f"{layer}.lora_{factor}.weight"]) for factor in "AB")
    return (B.double() @ A.double()).numpy()


def assert_global(arrays, results, rtol=1e-5):
    """The state dict holds the results' products."""
    for layer, result in results.items():
        wanted = result.factors.dense().double().numpy()
        size = np.linalg.norm(wanted)
        np.testing.assert_allclose(dense(arrays, layer), wanted, atol=rtol * size)


def assert_own(arrays, results, rank, rtol=1e-5):
    """The state dict holds the leading components, alpha / rank divided out."""
    for layer, result in results.items():
        assert len(arrays[f"{layer}.lora_A.weight"]) == rank
        wanted = result.factors.select(slice(0, rank)).dense().double().numpy()
        own = ALPHA / rank * dense(arrays, layer)
        np.testing.assert_allclose(own, wanted, atol=rtol * np.linalg.norm(wanted))


def mean_head(sent):
    total = sum(WEIGHTS[node] for node in sent)
    return sum(WEIGHTS[n] / total * sent[n][HEAD].double().numpy() for n in sent)
