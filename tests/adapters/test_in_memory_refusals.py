"""Wrong state dicts and configs in memory, and PEFT's patterns."""

import enum

import pytest
import torch

from hetlora_agg import InputTypeError, InputValueError
from hetlora_agg.adapters import Adapter, aggregate_state_dicts
from hetlora_agg.adapters.config import rank_and_alpha, read_config, resized, scaling_of

PREFIX = "base_model.model."


def pair(rank=2, name=None, path="h.0.q"):
    dot = f".{name}" if name else ""
    return {
        f"{PREFIX}{path}.lora_A{dot}.weight": torch.ones(rank, 5),
        f"{PREFIX}{path}.lora_B{dot}.weight": torch.ones(6, rank),
    }


BOTH = [pair(2), pair(3)]
CONFIGS = [{"r": 2, "lora_alpha": 4}, {"r": 3, "lora_alpha": 4}]
ARRAYS = [list(sd.values()) for sd in BOTH]
KEYS = list(pair())
REFUSED = {
    "nothing": (([],), {"scalings": []}, "no clients"),
    "one state dict": ((BOTH[0],), {"scalings": [1]}, "got a single state dict; pass a list"),
    "neither": ((BOTH,), {}, "client 0: expected a config or scalings, got neither.*off by"),
    "both": ((BOTH, CONFIGS), {"scalings": [1, 1]}, "got both"),
    "one config": ((BOTH, CONFIGS[0]), {}, "got a single config"),
    "too few configs": ((BOTH, CONFIGS[:1]), {}, "configs: expected one for each of 2"),
    "too few scalings": ((BOTH,), {"scalings": [1]}, "scalings: expected one for each of 2"),
    "scaling zero": ((BOTH,), {"scalings": [1, 0]}, "client 1, layer 'h.0.q': scaling: expected"),
    "scaling NaN": ((BOTH,), {"scalings": [float("nan"), 1]}, "client 0, layer .*: scaling"),
    "scaling for no layer": ((BOTH,), {"scalings": [{"x": 1}, 1]}, "has no entry for it"),
    "scaling for one too many": (
        (BOTH,),
        {"scalings": [{"x": 1, "h.0.q": 1}, 1]},
        "no such layers: 'x'",
    ),
    "config of another rank": ((BOTH, CONFIGS[::-1]), {}, "config says rank 3 .* has 2 rows"),
    "config of another type": ((BOTH, [3, 4]), {}, "expected adapter_config as a dict"),
    "list without keys": ((ARRAYS,), {"scalings": [1, 1]}, "a list of 2 arrays needs keys="),
    "too few keys": ((ARRAYS,), {"scalings": [1, 1], "keys": KEYS[:1]}, "for each of 2 arrays"),
    "a key twice": ((ARRAYS,), {"scalings": [1, 1], "keys": KEYS[:1] * 2}, "1 of them different"),
    "no tensor": (([{**BOTH[0], "x": 3}],), {"scalings": [1]}, "'x': expected a torch tensor"),
    "two adapters": (
        ([{**pair(2, "a"), **pair(2, "b", "h.1.q")}],),
        {"scalings": [1]},
        r"expected the keys of one adapter, got 2: \['a', 'b'\]",
    ),
    "a tensor twice": (
        ([{**pair(), **{k.removeprefix(PREFIX): X for k, X in pair().items()}}],),
        {"scalings": [1]},
        "4 keys stand for 2 tensors",
    ),
    "the whole model": (
        ([{**pair(2, "a"), f"{PREFIX}score.original_module.weight": torch.ones(2)}],),
        {"scalings": [1]},
        "original_module.weight'; pass get_peft_model_state_dict",
    ),
    "a bias of A": (
        ([{**pair(), f"{PREFIX}h.0.q.lora_A.bias": torch.ones(2)}],),
        {"scalings": [1]},
        "lora_A.bias",
    ),
    "magnitudes in integers": (
        ([{**pair(), f"{PREFIX}h.0.q.lora_magnitude_vector": torch.ones(6).int()}],),
        {"scalings": [1], "dora": "mean"},
        "lora_magnitude_vector': expected a float dtype",
    ),
    "an extra of nobody who counts": (
        ([{**pair(), f"{PREFIX}h.0.q.lora_B.bias": torch.ones(6)}, pair(3)],),
        {"scalings": [1, 1], "weights": [0, 1], "missing": "renormalise"},
        "no client with a positive weight has these tensors: 'h.0.q.lora_B.bias'",
    ),
    "an embedding next to a layer": (
        (
            [
                pair(2),
                {
                    f"{PREFIX}h.0.q.lora_embedding_A": torch.ones(3, 5),
                    f"{PREFIX}h.0.q.lora_embedding_B": torch.ones(6, 3),
                },
            ],
        ),
        {"scalings": [1, 1]},
        "one is an embedding's",
    ),
    "meta tensors": (
        ([{k: X.to("meta") for k, X in pair().items()}],),
        {"scalings": [1]},
        "expected a dense tensor, got a meta one",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_wrong_is_named(kind):
    arguments, options, message = REFUSED[kind]
    with pytest.raises((InputValueError, InputTypeError), match=message):
        aggregate_state_dicts(*arguments, **options)


def test_a_config_is_made_plain_and_left_alone():
    class Kind(str, enum.Enum):
        LORA = "LORA"

    given = {"peft_type": Kind.LORA, "target_modules": {"v", "q"}, "r": 2, "lora_alpha": 4}
    given["rank_pattern"] = {"q": torch.tensor(3)}
    read = read_config(given, "x")
    assert read["peft_type"] == "LORA"
    assert type(read["peft_type"]) is str
    assert read["target_modules"] == ["q", "v"]
    assert read["rank_pattern"] == {"q": 3}
    assert given["target_modules"] == {"v", "q"}


def test_patterns_match_as_in_peft():
    peft = pytest.importorskip("peft.utils.other")
    config = {
        "r": 1,
        "lora_alpha": 16,
        "rank_pattern": {"q": 2, "layers.1.v": 3, r".*[02]\.k": 4, r"^model\.layers\.3\.o": 5},
        "alpha_pattern": {"layers.*q": 7.5},
    }
    names = [f"{stem}layers.{i}.{m}" for stem in ("", "model.", "x.model.") for i in range(4)
             for m in ("q", "v", "k", "o", "qq")]  # fmt: skip
    for name in names:
        rank = config["rank_pattern"].get(peft.get_pattern_key(config["rank_pattern"], name), 1)
        alpha = config["alpha_pattern"].get(peft.get_pattern_key(config["alpha_pattern"], name), 16)
        assert rank_and_alpha(config, name) == (rank, alpha)
        assert scaling_of(config, name) == alpha / rank
        assert scaling_of({**config, "use_rslora": True}, name) == pytest.approx(alpha / rank**0.5)


AMBIGUOUS = [
    {"h.q": 2, "x.h.q": 5, "v": 2, "h.v": 3},
    {"a.b": 3, "aXb": 2, "x.aXb": 2, "c": 5},
    {"a[0].b": 3, "a0.b": 2, "c+": 4},
]


@pytest.mark.parametrize("ranks", AMBIGUOUS, ids=["endings", "dots", "marks"])
def test_written_patterns_give_every_layer_its_own_rank(ranks):
    peft = pytest.importorskip("peft.utils.other")
    config = resized({"r": 1, "lora_alpha": 1, "use_rslora": True}, ranks)
    for path, rank in ranks.items():
        key = peft.get_pattern_key(config["rank_pattern"], path)
        assert config["rank_pattern"].get(key, config["r"]) == rank
        assert rank_and_alpha(config, path) == (rank, rank)
        assert scaling_of(config, path) == 1


def test_layers_that_the_first_client_lacks_are_targeted_by_path():
    first = {"r": 2, "lora_alpha": 2, "target_modules": "all-linear", "layers_to_transform": [0]}
    configs = [first, {"r": 3, "lora_alpha": 3, "target_modules": ["q", "v"]}]
    sent = [pair(2), {**pair(3), **pair(3, path="h.0.v")}]
    outcome = aggregate_state_dicts(sent, configs, missing="renormalise")
    config = outcome.adapter.config
    assert config["target_modules"] == ["h.0.q", "h.0.v"]
    assert config["layers_to_transform"] is None
    assert first["layers_to_transform"] == [0]
    # A client's own stays as it was.
    assert outcome.client(0).config["target_modules"] == "all-linear"
    same = aggregate_state_dicts(BOTH, [first, configs[1]])
    assert same.adapter.config["target_modules"] == "all-linear"


def test_modules_and_biases_of_later_clients_are_written_too():
    configs = [
        {"r": 2, "lora_alpha": 2},
        {"r": 3, "lora_alpha": 3, "modules_to_save": ["score"], "bias": "all"},
    ]
    extra = {f"{PREFIX}score.weight": torch.ones(2), f"{PREFIX}h.0.fc.bias": torch.ones(2)}
    outcome = aggregate_state_dicts([pair(2), pair(3) | extra], configs, missing="renormalise")
    assert outcome.adapter.config["modules_to_save"] == ["score"]
    assert outcome.adapter.config["bias"] == "all"
    assert set(outcome.state_dict()) == set(pair()) | set(extra)
    assert set(outcome.client(0).state_dict()) == set(pair())


def test_adapters_are_what_they_are_called():
    adapter = Adapter.from_state_dict(pair(3, "mine"), {"r": 3, "lora_alpha": 6})
    assert list(adapter.layers) == ["h.0.q"]
    assert adapter.layers["h.0.q"].size == (6, 5)
    assert adapter.scaling("h.0.q") == 2
    update = adapter.update("h.0.q", weight=5, id="mine")
    assert (update.weight, update.scaling, update.id, tuple(update.A.shape)) == (
        5,
        2,
        "mine",
        (3, 5),
    )
