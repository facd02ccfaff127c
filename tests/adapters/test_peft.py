"""Against PEFT itself: what is written loads there and is the mean of what was saved there."""

import json

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

from adapters.peft_models import (
    CASES,
    assert_same_output,
    deltas_of,
    expected,
    loaded,
    mean_of,
    quiet,
    save_clients,
)
from hetlora_agg.adapters import aggregate_adapters, aggregate_state_dicts, read_adapter

WEIGHTS = (3, 1, 2)


def saved(name, folder):
    case = CASES[name]
    clients = save_clients(case, folder)
    return case, clients, [c.folder for c in clients], WEIGHTS[: len(clients)]


def truncated(delta, rank):
    """The best approximation of that rank, by a dense SVD in float64."""
    U, S, Vh = torch.linalg.svd(delta.double().flatten(1), full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).reshape(delta.shape)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("options", [{"method": "flora"}, {"method": "flexlora", "rank": "full"}])
def test_the_written_adapter_is_the_exact_mean(name, options, tmp_path):
    case, clients, paths, weights = saved(name, tmp_path)
    outcome = aggregate_adapters(paths, weights, **options)
    model = loaded(case, outcome.write(tmp_path / "global"))
    assert_same_output(case.forward(model), expected(case, clients, weights))
    found, _ = deltas_of(model)
    for path, delta in mean_of([c.deltas for c in clients], weights).items():
        scale = sum(float(c.deltas[path].norm()) for c in clients)
        assert (found[path] - delta).norm() <= 1e-6 * scale, path


@pytest.mark.parametrize("name", sorted(CASES))
def test_clients_get_their_rank_and_scaling(name, tmp_path):
    case, clients, paths, weights = saved(name, tmp_path)
    outcome = aggregate_adapters(paths, weights, "flexlora")
    written = outcome.write_clients(tmp_path / "next")
    mean = mean_of([c.deltas for c in clients], weights)
    whole = mean_of([c.whole for c in clients], weights)
    biases = mean_of([c.biases for c in clients], weights)
    for k, (client, folder) in enumerate(zip(clients, written, strict=True)):
        assert folder.name == client.folder.name
        own = json.loads((client.folder / "adapter_config.json").read_text())
        assert json.loads((folder / "adapter_config.json").read_text()) == own
        # Into the client's own config, without reading the new one.
        fresh = quiet(get_peft_model, case.base(), case.config(k)).eval()
        problems = quiet(
            set_peft_model_state_dict, fresh, load_file(folder / "adapter_model.safetensors")
        )
        assert not problems.unexpected_keys
        for model in (fresh, loaded(case, folder)):
            found, found_biases = deltas_of(model)
            for path, delta in mean.items():
                layer = client.model.base_model.model.get_submodule(path)
                wanted = truncated(delta, layer.r["default"])
                scale = sum(float(c.deltas[path].norm()) for c in clients)
                assert (found[path] - wanted).norm() <= 1e-5 * scale, path
            for path, bias in biases.items():
                torch.testing.assert_close(found_biases[path], bias)
        frozen = dict(loaded(case, folder).base_model.model.named_parameters())
        names = {
            key.replace(".modules_to_save.default", "").replace(".base_layer", ""): value
            for key, value in frozen.items()
            if "original_module" not in key
        }
        for key, value in whole.items():
            torch.testing.assert_close(names[key].detach(), value)


def test_the_config_says_every_layer_s_rank(tmp_path):
    case, _, paths, weights = saved("llama", tmp_path)
    outcome = aggregate_adapters(paths, weights, "rb", energy=0.9)
    folder = outcome.write(tmp_path / "global")
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks = {layer: result.rank for layer, result in outcome.results.items()}
    assert len(set(ranks.values())) > 1
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["use_rslora"] is False
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"] == {k: r for k, r in ranks.items() if r != max(ranks.values())}
    own = json.loads((paths[0] / "adapter_config.json").read_text())
    changed = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
    assert {k: v for k, v in config.items() if k not in changed} == {
        k: v for k, v in own.items() if k not in changed
    }
    found, _ = deltas_of(loaded(case, folder))
    for layer, result in outcome.results.items():
        torch.testing.assert_close(found[layer], result.B @ result.A)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == load_file(paths[0] / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("ranks", [[6, 1, 3], {"phone": 6, "tablet": 1, "laptop": 3}])
def test_other_ranks_keep_the_client_s_scaling(ranks, tmp_path):
    case, clients, paths, weights = saved("llama", tmp_path)
    outcome = aggregate_adapters(paths, weights, "flexlora", rank="full", ranks=ranks)
    mean = mean_of([c.deltas for c in clients], weights)
    for client, rank, folder in zip(
        clients, (6, 1, 3), outcome.write_clients(tmp_path / "next"), strict=True
    ):
        before, after = read_adapter(client.folder), read_adapter(folder)
        model = loaded(case, folder)
        found, _ = deltas_of(model)
        for path, delta in mean.items():
            assert after.rank(path) == rank
            assert after.scaling(path) == pytest.approx(before.scaling(path), rel=1e-12)
            layer = model.base_model.model.get_submodule(path)
            assert layer.scaling["default"] == pytest.approx(before.scaling(path), rel=1e-12)
            wanted = truncated(delta, rank)
            assert (found[path] - wanted).norm() <= 1e-5 * delta.norm()


def test_a_residual_is_an_adapter_of_its_own(tmp_path):
    for name in ("llama", "bert", "gpt2"):
        case, clients, paths, weights = saved(name, tmp_path / name)
        outcome = aggregate_adapters(paths, weights, "flexlora", rank=1, fold_rest=True)
        folder = outcome.write(tmp_path / name / "global")
        folded = loaded(case, folder / "residual")
        base = quiet(folded.merge_and_unload)
        model = quiet(PeftModel.from_pretrained, base, folder).eval()
        assert_same_output(case.forward(model), expected(case, clients, weights))
        assert "residual" in repr(outcome)
        with pytest.raises(ValueError, match=r"has a residual.*merge it into every client's base"):
            outcome.client("phone")
        with pytest.raises(ValueError, match="has a residual"):
            outcome.write_clients(tmp_path / name / "next")
        assert not (tmp_path / name / "next").exists()


def test_a_stack_goes_out_whole_or_not_at_all(tmp_path):
    _, _, paths, weights = saved("llama", tmp_path)
    outcome = aggregate_adapters(paths, weights, "flora")
    assert outcome.adapter.rank("model.layers.0.self_attn.q_proj") == 2 + 4 + 5
    with pytest.raises(ValueError, match=r"phone, layer '.*q_proj'.*merge_and_restart"):
        outcome.client("phone")
    with pytest.raises(ValueError, match="merge_and_restart"):
        outcome.write_clients(tmp_path / "next")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["laptop", "phone", "tablet"]


def test_what_is_not_shared_stays_the_client_s_own(tmp_path):
    _, _, paths, weights = saved("llama", tmp_path)
    outcome = aggregate_adapters(paths, weights, "fedsa")
    layer = "model.layers.1.self_attn.v_proj"
    for path in paths:
        before, after = read_adapter(path).factors(layer), outcome.client(path.name).factors(layer)
        assert torch.equal(after.B, before.B)
        assert torch.equal(after.A, outcome.results[layer].A[: before.rank])
    with pytest.raises(ValueError, match=r"shares only lora_A.*leave ranks= out"):
        aggregate_adapters(paths, method="fedsa", ranks=[1, 1, 1]).client("phone")


@pytest.mark.parametrize("name", ["llama", "bert", "embedding", "convolutions", "lora_bias"])
def test_state_dicts_of_live_models_go_there_and_back(name, tmp_path):
    _, clients, paths, weights = saved(name, tmp_path)
    sent = {
        client.folder.name: {
            key: value
            for key, value in client.model.state_dict().items()
            if "lora_" in key or ".modules_to_save." in key
        }
        for client in clients
    }
    configs = [client.model.peft_config["default"] for client in clients]
    outcome = aggregate_state_dicts(sent, configs, weights=weights)
    on_disk = aggregate_adapters(paths, weights)
    for client, own, back in zip(clients, sent.values(), outcome.state_dicts(), strict=True):
        assert list(back) == list(own)
        problems = client.model.load_state_dict(back, strict=False)
        assert not problems.unexpected_keys
        found = quiet(get_peft_model_state_dict, client.model)
        for key, X in on_disk.client(client.folder.name).state_dict().items():
            assert torch.equal(found[key], X), key


def test_a_flower_template_s_list_goes_there_and_back(tmp_path):
    _, clients, paths, weights = saved("bert", tmp_path)
    states = {c.folder.name: quiet(get_peft_model_state_dict, c.model) for c in clients}
    keys = list(states["phone"])
    sent = {name: [X.numpy() for X in state.values()] for name, state in states.items()}
    configs = [client.model.peft_config["default"] for client in clients]
    outcome = aggregate_state_dicts(sent, configs, weights=weights, keys=keys)
    on_disk = aggregate_adapters(paths, weights)
    for client, back in zip(clients, outcome.state_dicts(), strict=True):
        state = dict(zip(keys, map(torch.from_numpy, back), strict=True))
        assert not quiet(set_peft_model_state_dict, client.model, state).unexpected_keys
        for key, X in on_disk.client(client.folder.name).state_dict().items():
            assert torch.equal(state[key], X), key
