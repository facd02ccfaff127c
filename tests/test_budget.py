"""Memory limits of whole aggregations: what fits is right, what does not is refused beforehand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hetlora_agg import HetLoRAError, aggregate, aggregate_layers
from hetlora_agg.budget import budget, copy_bytes
from hetlora_agg.linalg import predicted_bytes, svd_product
from hetlora_agg.validation import read_updates

PROC = Path("/proc/self/clear_refs")
RANKS = (2, 4, 8)


def clients(size=64, seed=0, layers=()):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(*layers, r, size, generator=g), torch.randn(*layers, size, r, generator=g))
        for r in RANKS
    ]


def read(layers):
    return {name: read_updates(updates, name)[0] for name, updates in layers.items()}


LAYERS = {str(i): clients(seed=i) for i in range(6)}
COPY = copy_bytes(read(LAYERS)["0"])


def least():
    """The smallest limit under which the layers are taken, by bisection."""
    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        try:
            budget(middle, read(LAYERS), None)
        except HetLoRAError:
            low = middle
        else:
            high = middle
    return high


def test_a_copy_is_everything_the_clients_sent():
    sent = sum(X.numel() for update in LAYERS["0"] for X in update)
    assert 4 * sent == COPY


@pytest.mark.parametrize("spare", [0, 4, 9, 1000])
def test_more_room_means_larger_groups_and_the_same_result(spare):
    limit = least() + spare * COPY
    group, for_svd = budget(limit, read(LAYERS), None)
    assert group == min(6, 1 + spare // 4)
    assert for_svd > 0
    limited = aggregate_layers(LAYERS, "rb", memory_limit=limit, workers=1)
    alone = aggregate_layers(LAYERS, "rb", max_group=group, workers=1)
    for name in LAYERS:
        assert torch.equal(limited[name].A, alone[name].A)
        assert torch.equal(limited[name].B, alone[name].B)


def test_an_explicit_group_is_never_widened():
    assert budget(1 << 40, read(LAYERS), 2).max_group == 2


def test_without_a_limit_nothing_is_decided():
    assert budget(None, read(LAYERS), None) == (None, None)
    assert budget(None, read(LAYERS), 3) == (3, None)


def test_a_limit_too_small_names_the_numbers_and_the_layer():
    layers = {**LAYERS, "wide": clients(256)}
    with pytest.raises(MemoryError, match=r"7 layers \(the largest is 'wide'\) need .* raise the"):
        aggregate_layers(layers, "rb", memory_limit=10_000)
    with pytest.raises(HetLoRAError, match="memory_limit"):
        aggregate(clients(), "rb", memory_limit=10_000)


@pytest.mark.parametrize("name", ["workers", "memory_limit"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_counts_that_are_none_are_refused(name, value):
    with pytest.raises(HetLoRAError, match=f"{name}=: expected an integer"):
        aggregate_layers(LAYERS, "rb", **{name: value})
    with pytest.raises(HetLoRAError, match=f"{name}=: expected an integer"):
        aggregate(clients(), "rb", **{name: value})


def test_members_that_leave_the_fast_path_are_checked_too():
    # duplicates: Cholesky fails, and QR takes more than the Gram matrices do
    A, B = clients(512, layers=(4,))[2]
    A, B = torch.cat([A] * 4, -2), torch.cat([B] * 4, -1)
    limit = predicted_bytes(512, 512, 32, 8, layers=4, workers=1)
    with pytest.raises(MemoryError, match="clients duplicate or cancel; that needs"):
        svd_product(B, A, rank=9, memory_limit=limit, workers=1)
    found = svd_product(B, A, rank=9, memory_limit=100 * limit, workers=2)
    assert len(found.certificate.fallbacks) == 4


@pytest.mark.skipif(not PROC.exists(), reason="needs Linux to tell the peak")
def test_no_method_exceeds_the_least_limit_it_accepts():
    script = Path(__file__).with_name("peak_memory.py")
    run = subprocess.run(
        [sys.executable, str(script), "methods"], capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout)
    assert len(found) >= 9
    assert {
        name: f"{peak} of {limit}" for name, (peak, limit) in found.items() if peak > limit
    } == {}
