"""Attackers in the reference federation: who sends what instead, and what it does to a method."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from hetlora_agg import METHODS, ClientUpdate, InputValueError
from hetlora_agg.cli import main
from hetlora_agg.simulate import (
    ATTACKS,
    RankInflation,
    Scale,
    Settings,
    SignFlip,
    build_federation,
    run,
    simulate,
    simulate_many,
)
from hetlora_agg.simulate.federation import Stream

SHORT = {"ranks": (2, 4, 4, 8), "rounds": 2, "local_epochs": 1}


@pytest.fixture(scope="module")
def federation():
    return build_federation(Settings(**SHORT))


@pytest.fixture(scope="module")
def trained(federation):
    """What a cohort without client 3 might send, one layer as small as the network's last."""
    g = torch.Generator().manual_seed(0)
    return {
        name: [
            ClientUpdate(
                torch.randn(r, layer.weight.shape[1], generator=g),
                torch.randn(layer.weight.shape[0], r, generator=g),
                r,
                weight=10.0 * (k + 1),
                scaling=16 / r,
                id=k,
            )
            for k, r in ((0, 2), (1, 4), (2, 4))
        ]
        for name, layer in federation.network.items()
    }


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def norm(update):
    dense = update.scaling * update.B.double().numpy() @ update.A.double().numpy()
    return float(np.linalg.norm(dense))


def equal(update, other):
    return torch.equal(update.A, other.A) and torch.equal(update.B, other.B)


@pytest.mark.parametrize("attack", [RankInflation((1, 3)), Scale((1, 3)), SignFlip((1, 3))])
def test_attacks_replace_the_attackers_updates_and_no_others(federation, trained, attack):
    before = {name: [(u.A.clone(), u.B.clone()) for u in own] for name, own in trained.items()}
    sent = attack(trained, federation, stream(), 1)
    assert list(sent) == list(trained)
    for name, own in trained.items():
        assert [u.id for u in sent[name]] == [0, 1, 2]
        assert [u is v for u, v in zip(sent[name], own, strict=True)] == [True, False, True]
        assert not equal(sent[name][1], own[1])
        for u, (A, B) in zip(own, before[name], strict=True):
            assert torch.equal(u.A, A)
            assert torch.equal(u.B, B)


def test_rank_inflation_declares_the_rank_the_layer_can_hold(federation, trained):
    for rank, expected in ((None, 16), (5, 5), (1, 1)):
        sent = RankInflation((0,), rank)(trained, federation, stream(), 1)
        for name, (update, *_) in sent.items():
            held = min(expected, *federation.network[name].weight.shape)
            assert (update.rank, *update.A.shape[:1], *update.B.shape[1:]) == (held,) * 3
            assert (update.weight, update.id, update.slots) == (10.0, 0, None)


def test_rank_inflation_is_as_large_as_honest_clients_in_every_layer(federation, trained):
    sent = RankInflation((0, 2), size=3.0)(trained, federation, stream(), 1)
    for name, own in sent.items():
        for attacker in (own[0], own[2]):
            assert norm(attacker) == pytest.approx(3 * norm(trained[name][1]), rel=1e-5)
    everybody = RankInflation((0, 1, 2))(trained, federation, stream(), 1)
    for name, own in everybody.items():
        mean = np.mean([norm(u) for u in trained[name]])
        assert [norm(u) for u in own] == pytest.approx([mean] * 3, rel=1e-5)


def test_rank_inflation_may_lie_about_the_weight(federation, trained):
    sent = RankInflation((1,), weight=1e6)(trained, federation, stream(), 1)
    assert all([u.weight for u in own] == [10.0, 1e6, 30.0] for own in sent.values())


def test_rank_inflation_draws_from_the_generator_alone(federation, trained):
    attack, state = RankInflation((0, 1)), torch.random.get_rng_state()
    one, again, other = (attack(trained, federation, stream(s), 1) for s in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    for name in trained:
        assert all(equal(one[name][k], again[name][k]) for k in (0, 1))
        assert not any(equal(one[name][k], other[name][k]) for k in (0, 1))
        assert not torch.equal(one[name][0].A[:2], one[name][1].A[:2])


def test_scale_and_sign_flip_multiply_the_update(federation, trained):
    for attack, times in ((Scale((2,), 7.0), 7.0), (SignFlip((2,)), -1.0)):
        sent = attack(trained, federation, stream(), 1)
        for name, own in sent.items():
            assert torch.equal(own[2].B, times * trained[name][2].B)
            assert torch.equal(own[2].A, trained[name][2].A)


def test_attackers_must_be_clients(federation, trained):
    with pytest.raises(InputValueError, match=r"attackers among the clients 0 to 3, got \[4, 9\]"):
        Scale((9, 1, 4))(trained, federation, stream(), 1)


def test_an_attack_is_any_function_and_hears_of_every_round(federation):
    heard = []

    def noting(updates, of, generator, number):
        heard.append((of is federation, number, [u.id for own in updates.values() for u in own]))
        drawn.append(float(torch.rand((), generator=generator)))
        return updates

    drawn = []
    attacked = run(federation, "rb", attack=noting)
    assert heard == [(True, 1, [0, 1, 2, 3] * 2), (True, 2, [0, 1, 2, 3] * 2)]
    own = [federation.generator(Stream.ATTACK, number) for number in (0, 1)]
    assert drawn == [float(torch.rand((), generator=g)) for g in own]
    # one that changes nothing changes nothing, whatever it drew
    assert attacked == run(federation, "rb")


def test_settings_know_nothing_of_the_attack(federation):
    attacked = run(federation, "rb", attack=SignFlip((0,)))
    assert attacked.settings == Settings(**SHORT)
    json.dumps(attacked.to_dict())
    assert {item.name for item in dataclasses.fields(Settings)} & {"attack"} == set()


def test_what_the_registry_drops_is_as_if_it_had_not_come(federation):
    registry = {"max_rank": dict(enumerate(SHORT["ranks"])), "on_bad_client": "drop"}
    attack = RankInflation((0,))
    inflated, dropped = (run(federation, "rb", attack=attack, **o) for o in ({}, registry))
    absent = dataclasses.replace(federation, cohorts=((1, 2, 3),) * 2)
    # Where somebody misses a round methods get last round's results, unless the caller says no.
    without = run(absent, "rb", previous=None)
    assert dropped.accuracy == without.accuracy
    assert inflated.accuracy != without.accuracy


def test_a_quorum_gets_last_rounds_results(federation):
    seen = []

    def watched(c, *, quorum=None, previous=None):
        seen.append(previous is not None)
        return METHODS["rb"].run(c, quorum=quorum, previous=previous)

    run(federation, watched, quorum=2)
    # once for each of two layers
    assert seen == [False, False, True, True]
    seen.clear()
    run(federation, watched)
    assert seen == [False] * 4


def test_simulate_and_simulate_many_attack_every_method_alike(federation):
    many = simulate_many(["rb", "flora"], attack=SignFlip((0,)), **SHORT)
    assert many["rb"] == simulate("rb", attack=SignFlip((0,)), **SHORT)
    for name in many:
        assert run(federation, name, attack=SignFlip((0,))) == many[name]
    assert run(federation, "rb") != many["rb"]


# ---- the command line ----------------------------------------------------------------------------

QUICK = ["simulate", "--methods", "rb,flora", "--ranks", "2,4,8", "--rounds", "1"]
QUICK += ["--local-epochs", "1", "--seeds", "0", "--json"]


def record(capsys, *arguments):
    assert main([*QUICK, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def accuracies(found):
    return {name: row["accuracy"]["mean"] for name, row in found["methods"].items()}


def test_the_command_line_attacks_and_says_so(capsys):
    clean = record(capsys)
    attacked = record(capsys, "--attackers", "1", "--attack", "sign-flip")
    assert "attack" not in clean
    assert attacked["attack"] == "SignFlip(clients=(0,))"
    settings = {"ranks": (2, 4, 8), "rounds": 1, "local_epochs": 1}
    many = simulate_many(["rb", "flora"], attack=SignFlip((0,)), **settings)
    assert accuracies(attacked) == {name: own.accuracy[-1] for name, own in many.items()}
    assert accuracies(attacked) != accuracies(clean)


def test_the_command_line_registers_ranks_and_takes_options(capsys):
    inflated = record(capsys, "--attackers", "1")
    assert inflated["attack"].startswith("RankInflation(clients=(0,)")
    registered = record(capsys, "--attackers", "1", "--registered", "--option", "quorum=2")
    settings = {"ranks": (2, 4, 8), "rounds": 1, "local_epochs": 1, "quorum": 2}
    registry = {"max_rank": {0: 2, 1: 4, 2: 8}, "on_bad_client": "drop"}
    many = simulate_many(["rb", "flora"], attack=RankInflation((0,)), **registry, **settings)
    assert accuracies(registered) == {name: own.accuracy[-1] for name, own in many.items()}
    free = {"ranks": (2, 4, 8), "rounds": 1, "local_epochs": 1}
    loose = simulate_many(["rb", "flora"], attack=RankInflation((0,)), **free)
    assert accuracies(inflated) == {name: own.accuracy[-1] for name, own in loose.items()}
    assert accuracies(inflated) != accuracies(registered)


@pytest.mark.parametrize("number", ["-1", "3", "7"])
def test_the_command_line_refuses_a_federation_of_attackers(capsys, number):
    assert main([*QUICK, "--attackers", number]) == 1
    assert "--attackers: expected 0 to 2" in capsys.readouterr().err


def test_every_attack_has_a_name_and_is_listed(capsys):
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ATTACKS)
