"""Next to PEFT's own merging: equal where it is right, and what differs where it is not."""

import copy
import math

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from adapters.peft_models import CASES, Case, llama, loaded, mean_of, quiet, save_clients
from hetlora_agg.adapters import aggregate_adapters

WEIGHTS = (3, 1)
SHARES = [0.75, 0.25]
ATTENTION = CASES["llama"].common


def case_of(*clients, **common):
    return Case(llama, CASES["llama"].inputs, {**ATTENTION, **common}, clients)


def deltas(model, adapter):
    return {
        name: module.get_delta_weight(adapter).detach()
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer)
    }


def by_peft(case, paths, kind, **options):
    model = quiet(PeftModel.from_pretrained, case.base(), paths[0], adapter_name="first")
    quiet(model.load_adapter, paths[1], adapter_name="second")
    quiet(
        model.add_weighted_adapter,
        ["first", "second"], SHARES, "merged", combination_type=kind, **options,
    )  # fmt: skip
    return model


def by_us(case, paths, folder, method, **options):
    written = aggregate_adapters(paths, WEIGHTS, method, **options).write(folder)
    return deltas(loaded(case, written), "default")


def relative(found, wanted):
    """The largest relative distance over the layers."""
    return max(float((found[k] - wanted[k]).norm() / wanted[k].norm()) for k in wanted)


@pytest.mark.parametrize(("kind", "method"), [("cat", "flora"), ("svd", "flexlora")])
def test_cat_and_svd_are_right_without_rslora(kind, method, tmp_path):
    case = case_of({"r": 2, "lora_alpha": 4}, {"r": 5, "lora_alpha": 3})
    paths = [c.folder for c in save_clients(case, tmp_path)]
    theirs = deltas(by_peft(case, paths, kind), "merged")
    assert relative(by_us(case, paths, tmp_path / "global", method), theirs) < 1e-5


@pytest.mark.parametrize(("kind", "method"), [("cat", "flora"), ("svd", "flexlora")])
def test_with_rslora_peft_is_too_large_by_the_root_of_the_rank(kind, method, tmp_path):
    case = case_of({"r": 2, "lora_alpha": 4}, {"r": 5, "lora_alpha": 3}, use_rslora=True)
    clients = save_clients(case, tmp_path)
    paths = [c.folder for c in clients]
    theirs = deltas(by_peft(case, paths, kind), "merged")
    ours = by_us(case, paths, tmp_path / "global", method)
    rank = {"cat": 7, "svd": 5}[kind]
    assert relative({k: math.sqrt(rank) * v for k, v in ours.items()}, theirs) < 1e-5
    if kind == "cat":
        assert relative(ours, mean_of([c.deltas for c in clients], WEIGHTS)) < 1e-5


def test_linear_refuses_mixed_ranks_and_is_no_mean_at_equal_ones(tmp_path):
    mixed = case_of({"r": 2, "lora_alpha": 4}, {"r": 5, "lora_alpha": 3})
    paths = [c.folder for c in save_clients(mixed, tmp_path / "mixed")]
    with pytest.raises(ValueError, match="same r value"):
        by_peft(mixed, paths, "linear")
    equal = case_of({"r": 3, "lora_alpha": 3}, {"r": 3, "lora_alpha": 3})
    clients = save_clients(equal, tmp_path / "equal")
    paths = [c.folder for c in clients]
    mean = mean_of([c.deltas for c in clients], WEIGHTS)
    assert relative(deltas(by_peft(equal, paths, "linear"), "merged"), mean) > 0.3
    ours = by_us(equal, paths, tmp_path / "global", "flexlora", rank="full")
    assert relative(ours, mean) < 1e-5


def with_dora(case, mean_deltas, magnitudes):
    """The base model with ``m (W + ΔW) / ‖W + ΔW‖`` by rows, in place of W."""
    model = case.base()
    for path, delta in mean_deltas.items():
        layer = model.get_submodule(path)
        turned = layer.weight.data + delta
        length = magnitudes[path] / turned.norm(dim=1)
        layer.weight.data = length.unsqueeze(1) * turned
    return model


def magnitudes_of(model, adapter="default"):
    return {
        name: module.lora_magnitude_vector[adapter].weight.detach()
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer)
    }


def test_dora_is_refused_or_averaged_and_reset_by_peft(tmp_path):
    case = case_of({"r": 2, "lora_alpha": 4}, {"r": 5, "lora_alpha": 3}, use_dora=True)
    clients = save_clients(case, tmp_path)
    paths = [c.folder for c in clients]
    with pytest.raises(ValueError, match=r"phone: is a DoRA adapter.*dora=\"mean\""):
        aggregate_adapters(paths, WEIGHTS)
    outcome = aggregate_adapters(paths, WEIGHTS, "flora", dora="mean")
    assert any("DoRA" in note for note in outcome.notes)
    model = loaded(case, outcome.write(tmp_path / "global"))
    mean = mean_of([c.deltas for c in clients], WEIGHTS)
    magnitudes = mean_of([magnitudes_of(c.model) for c in clients], WEIGHTS)
    found = case.forward(model)
    torch.testing.assert_close(
        found, case.forward(with_dora(case, mean, magnitudes)), rtol=1e-4, atol=1e-5
    )
    theirs = magnitudes_of(by_peft(case, paths, "cat"), "merged")
    assert relative(magnitudes_of(model), magnitudes) < 1e-6
    assert relative(theirs, magnitudes) > 1e-2


def test_dora_comes_back_to_every_client(tmp_path):
    case = case_of({"r": 2, "lora_alpha": 4}, {"r": 5, "lora_alpha": 3}, use_dora=True)
    clients = save_clients(case, tmp_path)
    outcome = aggregate_adapters([c.folder for c in clients], WEIGHTS, dora="mean")
    magnitudes = mean_of([magnitudes_of(c.model) for c in clients], WEIGHTS)
    for folder in outcome.write_clients(tmp_path / "next"):
        assert relative(magnitudes_of(loaded(case, folder)), magnitudes) < 1e-6


def test_dora_and_plain_do_not_mix(tmp_path):
    case = case_of({"r": 2, "lora_alpha": 4, "use_dora": True}, {"r": 5, "lora_alpha": 3})
    paths = [c.folder for c in save_clients(case, tmp_path)]
    with pytest.raises(ValueError, match=r"phone is a DoRA adapter, .*tablet is not"):
        aggregate_adapters(paths, dora="mean")


def test_old_peft_reads_the_rank_pattern_too(tmp_path):
    # Before its patterns could match at the start of a path, PEFT wanted the whole path as key.
    case = CASES["llama"]
    paths = [c.folder for c in save_clients(case, tmp_path)]
    config = aggregate_adapters(paths, method="rb", energy=0.9).adapter.config
    paths_of_layers = dict(case.base().named_modules())
    assert config["rank_pattern"]
    assert set(config["rank_pattern"]) <= set(paths_of_layers)
    assert copy.deepcopy(config) == config
