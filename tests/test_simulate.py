"""The reference simulator: data, local training, the server rule, whole simulations."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
import torch

from hetlora_agg import (
    METHODS,
    AggregationResult,
    ClientUpdate,
    InputTypeError,
    InputValueError,
    LowRank,
    aggregate_layers,
    resolve,
)
from hetlora_agg.simulate import (
    Settings,
    SimulationResult,
    build_federation,
    dirichlet_split,
    load_digits,
    record_of,
    run,
    simulate,
    simulate_many,
    table_of,
)
from hetlora_agg.simulate.data import Examples, split_digits
from hetlora_agg.simulate.federation import Server
from hetlora_agg.simulate.local import Start, train_adapter
from hetlora_agg.simulate.loop import local_updates
from hetlora_agg.simulate.network import (
    Linear,
    LoRALinear,
    Training,
    accuracy,
    fold,
    fresh_adapter,
    layer_ranks,
)
from hetlora_agg.simulate.sides import SIDES

SHORT = {"rounds": 3, "local_epochs": 1}


def side_of(federation, method):
    entry = resolve(method)
    return SIDES[entry.client](federation, entry)


def fresh_server(federation):
    return Server(federation.network, federation.network)


def absorbed(federation, method, results):
    """The server after its first round."""
    totals = {name: result.total() for name, result in results.items()}
    server = fresh_server(federation)
    return side_of(federation, method).absorb(server, results, fold(server.network, totals))


@pytest.fixture(scope="module")
def federation():
    return build_federation(Settings(**SHORT))


@pytest.fixture(scope="module")
def trained(federation):
    """One round of real updates, by layer."""
    side, everybody = side_of(federation, "rb"), (0, 1, 2, 3, 4)
    starts = side.starts(fresh_server(federation), everybody, 1)
    return local_updates(side, starts, everybody, 1)


@pytest.fixture(scope="module")
def everything():
    """All methods with the default clients, one seed, fewer rounds and milder label skew."""
    return simulate_many(rounds=5, seed=0, dirichlet=1.0)


# ---- data ----------------------------------------------------------------------------------------


def test_digits_are_split_without_overlap_and_pretraining_sees_five_classes():
    digits = load_digits()
    numbered = Examples(torch.arange(len(digits)).reshape(-1, 1), digits.labels)
    split = split_digits(numbered, np.random.default_rng(0))
    parts = (split.pretrain, split.federated, split.test)
    rows = torch.cat([part.inputs.flatten() for part in parts])
    assert sorted(rows.tolist()) == list(range(1797))
    assert set(split.pretrain.labels.tolist()) == {0, 1, 2, 3, 4}
    assert set(split.federated.labels.tolist()) == set(range(10))
    assert torch.bincount(split.test.labels).tolist() == [
        round(0.25 * int(n)) for n in torch.bincount(digits.labels)
    ]


@pytest.mark.parametrize("concentration", [0.01, 0.3, 100.0])
def test_dirichlet_split_gives_every_row_to_one_client_and_some_rows_to_all(concentration):
    labels = np.arange(400) % 10
    parts = dirichlet_split(labels, 12, concentration, np.random.default_rng(1))
    assert sorted(np.concatenate(parts).tolist()) == list(range(400))
    assert min(map(len, parts)) >= 8


def test_dirichlet_split_is_skewed_when_small_and_even_when_large():
    labels = np.arange(1000) % 10

    def largest_class_share(concentration):
        parts = dirichlet_split(labels, 5, concentration, np.random.default_rng(2))
        return np.mean([np.bincount(labels[part]).max() / len(part) for part in parts])

    assert largest_class_share(0.1) > 0.3
    assert largest_class_share(1e4) < 0.12


def test_dirichlet_split_refuses_more_clients_than_rows_can_feed():
    with pytest.raises(ValueError, match="at least 8 examples for each of 3 clients, got 20"):
        dirichlet_split(np.zeros(20, dtype=int), 3, 1.0, np.random.default_rng(0))


# ---- network -------------------------------------------------------------------------------------


def test_lora_layer_is_the_dense_layer_with_the_scaled_product_added():
    g = torch.Generator().manual_seed(0)
    W, b, x = (torch.randn(*size, generator=g) for size in ((5, 7), (5,), (3, 7)))
    A, B = torch.randn(2, 7, generator=g), torch.randn(5, 2, generator=g)
    expected = x @ (W + 4.0 * B @ A).T + b
    torch.testing.assert_close(LoRALinear(Linear(W, b), A, B, 4.0)(x), expected)


def test_fresh_adapter_changes_nothing_yet_and_fits_the_layer(federation):
    adapter = fresh_adapter(federation.network, 12, torch.Generator().manual_seed(0))
    assert [own.rank for own in adapter.values()] == [12, 10]
    for own in adapter.values():
        assert not own.B.any()
        assert own.A.abs().max() <= 1 / own.in_features**0.5
        assert own.A.abs().min() > 0


def test_local_training_learns_and_leaves_its_inputs_alone(federation):
    adapter = fresh_adapter(federation.network, 4, torch.Generator().manual_seed(0))
    before = {name: (own.A.clone(), own.B.clone()) for name, own in adapter.items()}
    weights = {name: layer.weight.clone() for name, layer in federation.network.items()}
    trained = train_adapter(
        Start(federation.network, adapter, dict.fromkeys(adapter, 4.0)),
        federation.clients[4],
        Training(epochs=10, learning_rate=0.01),
        torch.Generator().manual_seed(0),
    )
    for name, (A, B) in before.items():
        assert torch.equal(adapter[name].A, A)
        assert torch.equal(adapter[name].B, B)
        assert torch.equal(federation.network[name].weight, weights[name])
        assert not trained[name].A.requires_grad
    own = {n: LowRank(4.0 * t.A, t.B) for n, t in trained.items()}
    after = accuracy(fold(federation.network, own), federation.clients[4])
    assert after > accuracy(federation.network, federation.clients[4]) + 0.3


def test_pretraining_knows_the_early_classes_only(federation):
    early = federation.test.take(np.flatnonzero(federation.test.labels.numpy() < 5))
    assert accuracy(federation.network, early) > 0.9
    assert 0.4 < accuracy(federation.network, federation.test) < 0.6


# ---- one round -----------------------------------------------------------------------------------


def test_the_first_start_is_the_same_for_all_clients_on_the_slots_they_share(federation):
    starts = side_of(federation, "rb").starts(fresh_server(federation), (0, 2, 4), 1)
    handed = [start.adapter for start in starts]
    assert [adapter["layers.0"].rank for adapter in handed] == [2, 8, 16]
    for name in federation.network:
        widest = handed[-1][name]
        for adapter in handed:
            assert torch.equal(adapter[name].A, widest.A[: adapter[name].rank])
            assert not adapter[name].B.any()


def test_clients_continue_from_their_part_of_the_result(federation, trained):
    results = aggregate_layers(trained, "flexlora")
    server = absorbed(federation, "flexlora", results)
    starts = side_of(federation, "flexlora").starts(server, (0, 4), 2)
    for client, start in zip((0, 4), starts, strict=True):
        ranks = layer_ranks(federation.network, federation.settings.ranks[client])
        for name, own in start.adapter.items():
            scaled = federation.settings.lora_alpha / ranks[name] * own.dense()
            cut = results[name].factors.select(slice(ranks[name]))
            torch.testing.assert_close(scaled, cut.dense())


def test_updates_say_who_sent_them_and_what_they_weigh(federation, trained):
    for name, updates in trained.items():
        assert [u.id for u in updates] == [0, 1, 2, 3, 4]
        assert [u.weight for u in updates] == [len(own) for own in federation.clients]
        ranks = [layer_ranks(federation.network, r)[name] for r in federation.settings.ranks]
        assert [u.rank for u in updates] == ranks
        assert [u.scaling for u in updates] == [16.0 / rank for rank in ranks]


@pytest.mark.parametrize("method", ["flexlora", "fedex", "flora", "zeropad"])
def test_server_and_handed_out_factors_together_are_the_global_model(federation, trained, method):
    results = aggregate_layers(trained, method)
    server = absorbed(federation, method, results)
    for name, layer in federation.network.items():
        torch.testing.assert_close(
            server.whole[name].weight, layer.weight + results[name].total().dense()
        )
        whole = layer.weight + results[name].total().dense()
        now = server.network[name].weight
        if server.results is not None:
            now = now + server.results[name].factors.dense()
        torch.testing.assert_close(now, whole)
    moved = not torch.equal(
        server.network["layers.0"].weight, federation.network["layers.0"].weight
    )
    assert moved == (method in {"fedex", "flora"})
    assert (server.results is None) == (method == "flora")


def test_a_method_that_leaves_a_factor_with_the_clients_is_refused(federation):
    def frozen_a(c):
        return AggregationResult(LowRank(c.A, c.B), shared=frozenset({"B"}))

    with pytest.raises(InputValueError, match="'frozen_a': expected both factors shared"):
        run(federation, frozen_a)


# ---- which options the simulator supplies --------------------------------------------------------


def recorder(calls):
    def leveled(c, *, levels=None, previous=None):
        calls.append((levels, previous))
        return METHODS["rb"].run(c, previous=previous)

    return leveled


def test_levels_are_the_configured_ranks_and_previous_comes_with_partial_participation():
    calls = []
    settings = Settings(ranks=(2, 4, 16), participation=0.67, **SHORT)
    run(build_federation(settings), recorder(calls))
    levels, previous = zip(*calls, strict=True)
    assert set(levels) == {(2, 4, 10, 16)}  # 10: all that the last layer can hold of 16
    assert [p is None for p in previous] == [True, True] + [False] * 4  # two layers per round
    for earlier in previous[2:]:
        assert isinstance(earlier, LowRank)


def test_previous_is_not_supplied_when_everybody_takes_part(federation):
    calls = []
    run(federation, recorder(calls))
    assert {previous for _, previous in calls} == {None}


def test_the_callers_options_win(federation):
    calls = []
    run(federation, recorder(calls), levels=(1, 2, 3))
    assert {levels for levels, _ in calls} == {(1, 2, 3)}


def test_options_reach_the_method(federation):
    full = run(federation, "flexlora", rank="full")
    assert max(full.aggregation_noise) < 1e-5
    assert min(run(federation, "flexlora", rank=1).aggregation_noise) > 0.01


# ---- whole simulations ---------------------------------------------------------------------------


def test_every_method_that_takes_these_clients_learns(everything):
    for result in everything.values():
        if result.skipped is None:
            assert result.accuracy[-1] > result.accuracy[0] + 0.15, result


def test_rb_learns_the_classes_the_start_does_not_know(everything):
    rb = everything["rb"]
    assert rb.accuracy[0] < 0.55
    assert rb.accuracy[-1] > 0.8


def test_all_methods_begin_at_the_same_start_with_the_same_clients(everything):
    ran = [result for result in everything.values() if result.skipped is None]
    assert len({result.accuracy[0] for result in ran}) == 1
    assert len({result.participants for result in ran}) == 1


def test_exact_methods_stay_at_the_exact_mean_and_zero_padding_does_not(everything):
    for name, result in everything.items():
        if result.skipped is None and METHODS[name].claims.get("exact") == {}:
            assert max(result.aggregation_noise) < 1e-5, name
    assert min(everything["zeropad"].aggregation_noise) > 0.01


def test_the_tail_outlives_the_rounds_under_rb_and_shrinks_under_padding():
    results = simulate_many(["rb", "zeropad"], rounds=30, local_epochs=1, seed=0)
    tail = {name: 1 - result.energy_ratio[-1] for name, result in results.items()}
    assert tail["rb"] > 0.2
    assert tail["zeropad"] < 0.25 * tail["rb"]
    assert results["zeropad"].effective_rank[-1] < 0.75 * results["rb"].effective_rank[-1]


def test_a_method_that_refuses_these_clients_is_listed_with_its_reason(everything):
    assert list(everything) == list(METHODS)
    assert "equal rank" in everything["fedit"].skipped
    assert everything["fedit"].accuracy == ()
    assert [name for name, result in everything.items() if result.skipped] == ["fedit"]


def test_equal_ranks_let_fedit_run():
    results = simulate_many(["fedit", "zeropad"], ranks=(4, 4, 4), **SHORT)
    assert results["fedit"].skipped is None
    assert results["fedit"].accuracy == pytest.approx(results["zeropad"].accuracy, abs=0.01)


def test_equal_seeds_give_equal_results_and_other_seeds_do_not():
    first, again, other = (simulate("rb", seed=seed, **SHORT) for seed in (0, 0, 1))
    assert first == again
    assert first.aggregation_noise == again.aggregation_noise
    assert first.aggregation_noise != other.aggregation_noise


def test_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(1)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    names = sorted({entry.client: name for name, entry in METHODS.items()}.values())
    first = simulate_many([*names, "dare"], rounds=2, local_epochs=1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    torch.manual_seed(2)
    assert simulate_many([*names, "dare"], rounds=2, local_epochs=1) == first


def test_one_method_alone_does_what_it_does_among_others():
    many = simulate_many(["zeropad", "rb"], **SHORT)
    assert simulate("rb", **SHORT) == many["rb"]


def test_rounds_do_not_change_what_came_before():
    short, long = (simulate("rb", rounds=rounds, local_epochs=1) for rounds in (2, 3))
    assert long.accuracy[:3] == short.accuracy


def test_rounds_without_the_top_rank_keep_the_rank_for_methods_with_memory():
    settings = Settings(ranks=(2, 4, 16), participation=0.3, rounds=8, local_epochs=1, seed=1)
    federation = build_federation(settings)
    present = [2 in cohort for cohort in federation.cohorts]
    first = present.index(True)
    assert not all(present[first:]), "this seed must lose its top client for a round"
    assert all(len(cohort) == 1 for cohort in federation.cohorts)
    fedit = run(federation, "fedit")  # a single client has one rank
    assert fedit.participants == federation.cohorts
    ranks = []

    def watched(c, *, previous=None):
        result = METHODS["rb"].run(c, previous=previous)
        ranks.append(result.rank)
        return result

    run(federation, watched)
    assert ranks[2 * first :] == [16, 10] * (8 - first)


def test_cohorts_have_the_asked_size_and_change():
    settings = Settings(ranks=(2,) * 6, participation=0.5, rounds=10)
    cohorts = build_federation(settings).cohorts
    assert {len(set(cohort)) for cohort in cohorts} == {3}
    assert len(set(cohorts)) > 3
    assert all(cohort == tuple(sorted(cohort)) for cohort in cohorts)


def test_functions_run_like_registered_methods(federation):
    def my_stack(c):
        return METHODS["flora"].run(c)

    mine = run(federation, my_stack)
    assert mine.method == "my_stack"
    assert dataclasses.replace(mine, method="flora") == run(federation, "flora")


def test_labels_can_be_given_and_must_differ():
    results = simulate_many({"mine": "rb", "full": METHODS["flora"].run}, **SHORT)
    assert [result.method for result in results.values()] == ["mine", "full"]
    with pytest.raises(InputValueError, match=r"\['rb'\] more than once"):
        simulate_many(["rb", "rb"], **SHORT)


def test_options_go_to_the_methods_that_have_them():
    results = simulate_many(["flexlora", "flora"], rank=1, **SHORT)
    assert results["flexlora"].aggregation_noise[-1] > 1e-3
    assert results["flora"].skipped is None
    with pytest.raises(InputTypeError, match=r"has the options \['rnak'\]"):
        simulate_many(["flexlora", "flora"], rnak=1, **SHORT)
    with pytest.raises(InputTypeError, match="rnak"):
        simulate("flexlora", rnak=1, **SHORT)


def test_max_rank_is_for_all_methods():
    results = simulate_many(["flexlora", "flora"], max_rank=8, **SHORT)
    assert all("rank" in result.skipped for result in results.values())


@pytest.mark.parametrize("call", [simulate, lambda method, **kw: simulate_many([method], **kw)])
def test_an_unknown_method_is_an_error_that_names_the_nearest(call):
    with pytest.raises(InputValueError, match="did you mean 'fedrot' or 'flexlora'"):
        call("flexlroa", **SHORT)


def test_an_error_that_is_not_about_the_clients_is_not_swallowed():
    def broken(c):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        simulate_many([broken], **SHORT)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ranks": ()},
        {"ranks": (2, 0)},
        {"rounds": 0},
        {"local_epochs": 0},
        {"dirichlet": 0.0},
        {"participation": 0.0},
        {"participation": 1.1},
        {"lora_alpha": float("nan")},
        {"learning_rate": -1.0},
        {"seed": -1},
        {"cohorts": [(0,)]},
        {"cohorts": [(0, 1), (), (0,)], "rounds": 3},
        {"cohorts": [(0, 0)], "rounds": 1},
        {"cohorts": [(0, 5)], "rounds": 1},
        {"cohorts": [(0, 1)], "rounds": 1, "participation": 0.5},
    ],
)
def test_settings_are_checked_by_name(wrong):
    name, *_ = wrong
    with pytest.raises(InputValueError, match=f"simulate: {name}: expected"):
        simulate("rb", **wrong)


def test_simulate_spells_out_every_setting():
    keywords = inspect.signature(simulate).parameters
    for setting in dataclasses.fields(Settings):
        assert keywords[setting.name].default == setting.default


def test_progress_hears_of_every_round():
    heard = []
    result = simulate("rb", progress=lambda *step: heard.append(step), **SHORT)
    assert heard == [("rb", i, result.accuracy[i]) for i in (1, 2, 3)]


# ---- results -------------------------------------------------------------------------------------


def test_a_result_explains_itself(everything):
    rb, fedit = everything["rb"], everything["fedit"]
    assert repr(rb).count("\n") == 0
    assert "5 rounds" in repr(rb)
    assert "skipped: fedit: expected" in repr(fedit)
    assert len(rb.summary().splitlines()) == 2 + 6
    assert fedit.summary() == repr(fedit)
    plain = json.loads(json.dumps(rb.to_dict(), allow_nan=False))
    assert plain["accuracy"] == list(rb.accuracy)
    assert plain["settings"]["ranks"] == [2, 4, 8, 8, 16]
    columns = {*plain} - {"method", "settings", "accuracy", "seconds", "skipped"}
    assert {len(plain[name]) for name in columns} == {5}
    for name in columns - {"participants"}:
        assert name.replace("_", " ") in rb.summary().splitlines()[1]


def result_of(method, seed, accuracy, skipped=None):
    settings = Settings(rounds=1, seed=seed)
    if skipped is not None:
        return SimulationResult(method, settings, skipped=skipped)
    measured = ((0.25,), (1.0,), (0.9,), (1.5,), (0.125,))
    return SimulationResult(method, settings, (0.5, accuracy), *measured, ((0,),), 2.0)


def test_a_record_holds_means_over_seeds_and_every_run():
    record = record_of(
        {
            "a": [result_of("a", 0, 0.6), result_of("a", 1, 0.8)],
            "b": [result_of("b", 0, 0.9), result_of("b", 1, 0, skipped="no")],
        }
    )
    assert record["methods"]["a"]["accuracy"] == {
        "mean": pytest.approx(0.7),
        "min": 0.6,
        "max": 0.8,
    }
    means = {name: row["mean"] for name, row in record["methods"]["a"].items() if name != "runs"}
    assert means == {
        "accuracy": pytest.approx(0.7),
        "aggregation_noise": 0.25,
        "energy_ratio": 0.9,
        "effective_rank": 1.5,
        "initialisation_noise": 0.125,
        "seconds": 2.0,
    }
    assert [r["settings"]["seed"] for r in record["methods"]["a"]["runs"]] == [0, 1]
    assert record["skipped"] == {"b": "no"}
    assert record["seeds"] == [0, 1]
    assert record["start_accuracy"]["mean"] == 0.5


def test_a_table_puts_the_best_first_and_says_what_was_skipped():
    record = record_of({name: [result_of(name, 0, x)] for name, x in (("a", 0.6), ("b", 0.9))})
    record["skipped"]["c"] = "because"
    lines = table_of(record).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["method", "(start)", "b", "a"]
    assert lines[-1] == "skipped c: because"
    nothing = table_of(record_of({"a": [result_of("a", 0, 0, skipped="no")]}))
    assert nothing == "skipped a: no"


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "hetlora-agg\[sim\]"'):
        load_digits()


def test_client_updates_are_plain_client_updates(trained):
    assert all(isinstance(u, ClientUpdate) for updates in trained.values() for u in updates)
