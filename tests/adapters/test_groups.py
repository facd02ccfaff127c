"""Layers go through in groups: the same result, and no more in memory than a group."""

import gc
import weakref

import pytest
import torch

from hetlora_agg import METHODS, aggregate_layers
from hetlora_agg.adapters import Adapter, aggregate_adapters, combining, extras, write_adapter

PREFIX = "base_model.model."
LAYERS, RANKS, WEIGHTS = 6, (2, 3, 5), (2, 1, 3)
NAMES = ("phone", "tablet", "laptop")


def adapter_of(k, rank, layers=range(LAYERS), scale=1.0):
    g = torch.Generator().manual_seed(k)
    factors = {}
    for i in range(LAYERS):
        out = 6 + i % 2
        A, B = torch.randn(rank, 5, generator=g), torch.randn(out, rank, generator=g)
        if i in layers:
            factors[f"{PREFIX}h.{i}.q.lora_A.weight"] = scale * (1 + i) * A
            factors[f"{PREFIX}h.{i}.q.lora_B.weight"] = B
    return Adapter.from_state_dict(factors, {"peft_type": "LORA", "r": rank, "lora_alpha": 4})


@pytest.fixture
def folders(tmp_path):
    return [
        write_adapter(tmp_path / name, adapter_of(k, rank))
        for k, (name, rank) in enumerate(zip(NAMES, RANKS, strict=True))
    ]


def at_once(adapters, method, **options):
    layers = {
        layer: [
            a.update(layer, weight=w, id=name)
            for name, a, w in zip(NAMES, adapters, WEIGHTS, strict=True)
            if layer in a.layers
        ]
        for layer in adapters[0].layers
    }
    return aggregate_layers(layers, method, **options)


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for layer, result in wanted.items():
        for part in ("factors", "residual"):
            one, other = getattr(found[layer], part), getattr(result, part)
            if other is not None:
                torch.testing.assert_close(one.dense(), other.dense(), rtol=1e-5, atol=1e-5)


PLAIN = [name for name, entry in METHODS.items() if not entry.needs and not entry.common]


@pytest.mark.parametrize("method", sorted(PLAIN))
def test_groups_do_not_change_the_result(method, folders, monkeypatch):
    monkeypatch.setattr(combining, "GROUP_BYTES", 1)
    adapters = [adapter_of(k, rank) for k, rank in enumerate(RANKS)]
    options = {}
    if "mixed_ranks" not in METHODS[method].claims:
        adapters = [adapter_of(k, 3) for k in range(3)]
        folders = [write_adapter(f, a, force=True) for f, a in zip(folders, adapters, strict=True)]
    found = aggregate_adapters(folders, WEIGHTS, method, **options)
    assert_same(found.results, at_once(adapters, method, **options))


def test_random_methods_draw_the_same_in_groups(folders, monkeypatch):
    monkeypatch.setattr(combining, "GROUP_BYTES", 1)
    random = sorted(name for name, entry in METHODS.items() if "generator" in entry.options)
    assert random
    adapters = [adapter_of(k, rank) for k, rank in enumerate(RANKS)]
    for method in random:
        if METHODS[method].needs != ("generator",) and METHODS[method].needs:
            continue
        drawn, again = (torch.Generator().manual_seed(3) for _ in range(2))
        found = aggregate_adapters(folders, WEIGHTS, method, generator=drawn)
        assert_same(found.results, at_once(adapters, method, generator=again))


@pytest.mark.parametrize("policy", ["zero", "renormalise"])
def test_a_client_that_lacks_a_whole_group(policy, folders, monkeypatch):
    monkeypatch.setattr(combining, "GROUP_BYTES", 1)
    adapters = [adapter_of(k, rank) for k, rank in enumerate(RANKS)]
    adapters[2] = adapter_of(2, RANKS[2], layers=(0, 4))
    write_adapter(folders[2], adapters[2], force=True)
    for method in ("rb", "flexlora"):
        found = aggregate_adapters(folders, WEIGHTS, method, missing=policy)
        assert_same(found.results, at_once(adapters, method, missing=policy))


def test_a_client_dropped_for_its_last_layer_is_dropped_from_the_first(folders, monkeypatch):
    monkeypatch.setattr(combining, "GROUP_BYTES", 1)
    adapters = [adapter_of(k, rank) for k, rank in enumerate(RANKS)]
    spoiled = adapters[1].state_dict()
    spoiled[f"{PREFIX}h.5.q.lora_B.weight"][0, 0] = torch.inf
    adapters[1] = Adapter.from_state_dict(spoiled, adapters[1].config)
    write_adapter(folders[1], adapters[1], force=True)
    found = aggregate_adapters(folders, WEIGHTS, on_bad_client="drop")
    assert [client for client, _ in found.excluded] == ["tablet"]
    assert_same(found.results, at_once(adapters, "rb", on_bad_client="drop"))


def watched(monkeypatch):
    """Every read of a factor, and how many of their bytes live at a time."""
    reads, alive, most = [], {}, [0]
    real = Adapter.tensor

    def tensor(self, key, rows=None):
        X = real(self, key, rows)
        reads.append((self.folder and self.folder.name, key))
        alive[id(X)] = X.untyped_storage().nbytes()
        weakref.finalize(X, alive.pop, id(X), None)
        most[0] = max(most[0], sum(alive.values()))
        return X

    monkeypatch.setattr(Adapter, "tensor", tensor)
    return reads, most


def test_every_factor_is_read_once_and_few_at_a_time(folders, monkeypatch):
    layer_bytes = 4 * (7 + 5) * sum(RANKS)
    monkeypatch.setattr(combining, "GROUP_BYTES", 2 * layer_bytes)
    reads, most = watched(monkeypatch)
    seen = []
    outcome = aggregate_adapters(folders, WEIGHTS, progress=lambda *done: seen.append(done))
    assert len(reads) == len(set(reads)) == 2 * LAYERS * len(folders)
    assert seen == [(2, 6), (4, 6), (6, 6)]
    gc.collect()
    # The next group is read while the last one's updates are still named.
    assert most[0] <= 4 * layer_bytes
    reads.clear()
    outcome.client("phone")
    assert reads == []


def test_statistics_that_span_layers_read_all_of_them_first(folders, monkeypatch):
    monkeypatch.setattr(combining, "GROUP_BYTES", 1)
    seen = []
    aggregate_adapters(folders, WEIGHTS, "hetlora", progress=lambda *done: seen.append(done))
    assert seen == [(6, 6)]


def test_large_tensors_are_averaged_in_slabs(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "SLAB", 12)
    key, values, folders = f"{PREFIX}score.weight", [], []
    for k, name in enumerate(NAMES):
        adapter = adapter_of(k, 2)
        values.append(torch.randn(7, 5))
        tensors = {**adapter.state_dict(), key: values[-1]}
        config = {**adapter.config, "modules_to_save": ["score"]}
        folders.append(write_adapter(tmp_path / name, Adapter.from_state_dict(tensors, config)))
    reads, _ = watched(monkeypatch)
    found = aggregate_adapters(folders, WEIGHTS).extras["score.weight"][1]
    # Whole once, to look for NaN; then three slabs and a half of two rows.
    assert sum(k == key for _, k in reads) == 3 * (1 + 4)
    mean = sum(w / 6 * X.double() for w, X in zip(WEIGHTS, values, strict=True)).float()
    assert torch.equal(found, mean) or (found - mean).abs().max() <= 1e-7
