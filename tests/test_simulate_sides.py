"""What every client side promises, followed round by round, and how the rounds are measured."""

from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hetlora_agg import CLIENTS, METHODS, AggregationResult, LowRank, aggregate_layers, clients
from hetlora_agg.simulate import SIDES, Settings, build_federation, run, simulate, simulate_many
from hetlora_agg.simulate.federation import Server, Stream
from hetlora_agg.simulate.local import Rules, Start, only, train_adapter
from hetlora_agg.simulate.loop import play, supplied
from hetlora_agg.simulate.measures import (
    Measures,
    effective_rank,
    initialisation_noise,
    measure,
    squared_singular_values,
)
from hetlora_agg.simulate.network import Linear, Training
from hetlora_agg.simulate.sides import prune

RANKS = (2, 4, 16)
EVERYBODY = (0, 1, 2)


@cache
def federation_of(*cohorts, **settings):
    """Three clients whose cohorts are given; without cohorts all of them, for three rounds."""
    cohorts = cohorts or (EVERYBODY,) * 3
    known = {"ranks": RANKS, "local_epochs": 1, "dirichlet": 1.0, **settings}
    return build_federation(Settings(rounds=len(cohorts), cohorts=cohorts, **known))


def rounds_of(federation, method, side=None):
    """Round by round: the number, the cohort, the side, what was before and what happened."""
    entry = METHODS[method]
    side = side or SIDES[entry.client](federation, entry)
    server = Server(federation.network, federation.network)
    for number, cohort in enumerate(federation.cohorts, start=1):
        played = play(side, server, cohort, number)
        yield SimpleNamespace(
            number=number, cohort=cohort, side=side, before=server, **vars(played)
        )
        server = played.server


@pytest.fixture(scope="module")
def federation():
    return federation_of()


def methods_with(client):
    return [name for name, entry in METHODS.items() if entry.client == client]


def test_there_is_one_side_for_every_name_a_method_may_give():
    assert set(SIDES) == set(CLIENTS)
    assert {entry.client for entry in METHODS.values()} == set(CLIENTS)


# ---- local training ------------------------------------------------------------------------------


def trained_under(federation, rules):
    side = SIDES["slice"](federation, METHODS["rb"])
    server = Server(federation.network, federation.network)
    start = side.starts(server, (2,), 1)[0]
    training = Training(epochs=2, learning_rate=0.01)
    g = torch.Generator().manual_seed(0)
    return start, train_adapter(start, federation.clients[2], training, g, rules)


@pytest.mark.parametrize("factors", [("A",), ("B",), ("A", "B")])
def test_only_the_named_factors_train(federation, factors):
    start, trained = trained_under(federation, Rules(factors=factors))
    for name, own in trained.items():
        assert torch.equal(own.B, start.adapter[name].B) == ("B" not in factors)
        # Under B = 0 there is no gradient for an A that trains alone.
        assert torch.equal(own.A, start.adapter[name].A) == (factors != ("A", "B"))


def test_masked_slots_stay_bit_for_bit(federation):
    slots = (1, 3)
    start, trained = trained_under(
        federation, Rules(steer=lambda name, factors, gradient: only(gradient, slots))
    )
    for name, own in trained.items():
        others = [j for j in range(own.rank) if j not in slots]
        for moved, kept in ((own.A, start.adapter[name].A), (own.B.T, start.adapter[name].B.T)):
            assert torch.equal(moved[others], kept[others])
            assert not torch.equal(moved[list(slots)], kept[list(slots)])


def test_a_penalty_pulls_and_a_steered_gradient_is_the_one_taken(federation):
    _, plain = trained_under(federation, Rules())

    def size(adapter):
        return sum(own.B.square().sum() for own in adapter.values())

    _, pulled = trained_under(federation, Rules(penalty=size))
    start, still = trained_under(
        federation, Rules(steer=lambda n, f, gradient: LowRank(0 * gradient.A, 0 * gradient.B))
    )
    for name in plain:
        assert pulled[name].B.norm() < 0.9 * plain[name].B.norm()
        assert torch.equal(still[name].A, start.adapter[name].A)
        assert torch.equal(still[name].B, start.adapter[name].B)


def test_steering_a_frozen_factor_is_an_error(federation):
    with pytest.raises(RuntimeError, match="both factors"):
        trained_under(federation, Rules(factors=("B",), steer=lambda n, f, gradient: gradient))


def test_steps_are_counted_as_they_are_taken(federation):
    taken = []
    trained_under(federation, Rules(steer=lambda n, f, gradient: (taken.append(n), gradient)[1]))
    training = Training(epochs=2, learning_rate=0.01)
    assert len(taken) == 2 * training.steps(len(federation.clients[2]))  # two layers


# ---- frozen factors and factors that stay --------------------------------------------------------


@pytest.mark.parametrize("method", methods_with("train_B"))
def test_a_common_a_is_one_and_the_same_on_all_clients_in_all_rounds(method):
    federation = federation_of(EVERYBODY, (0, 1), (0,), EVERYBODY)
    for played in rounds_of(federation, method):
        for name, common in played.side.common.items():
            for update in played.updates[name]:
                assert torch.equal(update.A, common.A[: update.rank])
                assert update.B.any()
            rank = played.results[name].rank
            assert torch.equal(played.results[name].A, common.A[:rank])


@pytest.mark.parametrize("method", methods_with("alternate"))
def test_factors_alternate_and_the_frozen_one_is_what_was_handed_out(method):
    last = None
    for played in rounds_of(federation_of(*[EVERYBODY] * 5), method):
        for name, updates in played.updates.items():
            frozen = "A" if played.number % 2 else "B"
            for start, update in zip(played.starts, updates, strict=True):
                for factor in ("A", "B"):
                    before = getattr(start.adapter[name], factor)
                    assert torch.equal(before, getattr(update, factor)) == (factor == frozen)
            widest = max(updates, key=lambda update: update.rank)
            for update in updates:
                common = LowRank(widest.A, widest.B).select(slice(update.rank))
                assert torch.equal(getattr(update, frozen), getattr(common, frozen))
            if last is not None:
                kept = getattr(last[name].factors, frozen)
                assert torch.equal(getattr(widest, frozen), kept)
            assert torch.equal(
                getattr(played.results[name].factors, frozen), getattr(widest, frozen)
            )
        last = played.results


@pytest.mark.parametrize("method", methods_with("keep_B"))
def test_a_client_goes_on_with_its_own_b_however_long_it_was_away(method):
    federation = federation_of((0, 1), EVERYBODY, (0, 1), (1,), (0, 2), EVERYBODY)
    own, lost = {}, False
    for played in rounds_of(federation, method):
        for k, client in enumerate(played.cohort):
            for name, layer in played.starts[k].adapter.items():
                if (client, name) in own:
                    assert torch.equal(layer.B, own[client, name].B)
                    known = played.before.results[name].A
                    assert torch.equal(layer.A[: len(known)], known[: layer.rank])
                    # Slots that the global A lost meanwhile are as the client left them.
                    assert torch.equal(layer.A[len(known) :], own[client, name].A[len(known) :])
                    lost |= len(known) < layer.rank
                sent = played.updates[name][k]
                own[client, name] = LowRank(sent.A, sent.B)
    assert lost
    for name, layer in federation.network.items():
        mean = played.results[name].total().dense()
        torch.testing.assert_close(played.server.whole[name].weight, layer.weight + mean)


# ---- slots of equal standing ---------------------------------------------------------------------


def test_selecting_clients_start_from_the_global_model_and_train_a_new_choice_each_round():
    (method,) = methods_with("select")
    chosen = []
    for played in rounds_of(federation_of(*[EVERYBODY] * 4), method):
        assert played.measures.initialisation_noise < 1e-6
        for k, client in enumerate(EVERYBODY):
            update = played.updates["layers.0"][k]
            assert len(update.slots) == RANKS[client]
            assert update.scaling == 16.0 / max(RANKS)
            chosen.append(update.slots)
        assert played.results["layers.0"].rank == max(RANKS)
        assert played.server.network is played.before.network
    assert len(set(chosen[::3])) > 2


def test_modules_that_nobody_chose_stay_as_they_were_from_the_first_round_on():
    (method,) = methods_with("select")
    for played in rounds_of(federation_of((0,), (1,), (0, 1)), method):
        trained = {slot for update in played.updates["layers.0"] for slot in update.slots}
        others = [j for j in range(16) if j not in trained]
        before = played.side.current(played.before)["layers.0"].select(others)
        after = played.results["layers.0"].factors.select(others)
        assert torch.equal(after.A, before.A)
        assert torch.equal(after.B, before.B)
        assert after.A.abs().amax(-1).min() > 0, "a module that is zero throughout never trains"


def test_freezing_clients_hold_all_slots_and_train_the_most_important_ones():
    (method,) = methods_with("freeze")
    seen = []
    for played in rounds_of(federation_of(*[EVERYBODY] * 3), method):
        assert played.measures.initialisation_noise < 1e-6
        for k, client in enumerate(EVERYBODY):
            start, update = played.starts[k], played.updates["layers.0"][k]
            assert start.adapter["layers.0"].rank == 16
            assert update.slots == start.slots["layers.0"]
            assert len(update.slots) == RANKS[client]
            if played.number > 1:
                assert update.slots == clients.important_slots(seen[k], RANKS[client])
        seen = [played.side.scores[client]["layers.0"].clone() for client in EVERYBODY]
    assert all((scores > 0).all() for scores in seen)


@pytest.mark.parametrize("client", ["select", "freeze"])
def test_their_noise_is_the_distance_from_the_mean_of_the_clients_whole_models(client):
    (method,) = methods_with(client)
    for played in rounds_of(federation_of(EVERYBODY, EVERYBODY), method):
        off = size = 0.0
        for name, result in played.results.items():
            before = played.before.network[name].weight.double()
            p = np.array([u.weight for u in played.updates[name]], dtype=float)
            moved = torch.zeros_like(before)
            for share, u, start in zip(
                p / p.sum(), played.updates[name], played.starts, strict=True
            ):
                # What it trained, in place of what it started to train from.
                own, chosen = start.adapter[name], list(start.slots[name])
                first = own if own.rank == len(chosen) else own.select(chosen)
                trained = u.scaling * (u.B @ u.A) - start.scaling[name] * (first.B @ first.A)
                moved += share * (start.weights()[name] + trained.double() - before)
            off += float((result.total().dense().double() - moved).square().sum())
            size += float(moved.square().sum())
        assert played.measures.aggregation_noise == pytest.approx((off / size) ** 0.5, rel=1e-3)


def test_first_choices_of_freezing_clients_differ():
    (method,) = methods_with("freeze")
    federation = federation_of((0, 1, 2, 3), ranks=(4, 4, 4, 16))
    (played,) = rounds_of(federation, method)
    assert len({update.slots for update in played.updates["layers.0"]}) == 4


def test_quantised_uploads_are_off_by_no_more_than_they_say(monkeypatch):
    (method,) = methods_with("freeze")
    federation = federation_of(EVERYBODY)
    side = SIDES["freeze"](federation, METHODS[method])
    trained = {}
    send = side.send

    def watched(client, start, own, number):
        trained[client] = own
        return send(client, start, own, number)

    monkeypatch.setattr(side, "send", watched)
    (played,) = rounds_of(federation, method, side)
    for k, client in enumerate(EVERYBODY):
        for name, updates in played.updates.items():
            upload, sent = side.uploads[client][name], updates[k]
            exact = trained[client][name].select(list(sent.slots))
            exact = exact.B.double() @ exact.A.double()
            error = (sent.B.double() @ sent.A.double() - exact).norm()
            assert 0 < error <= upload.error_bound
            assert error < 0.05 * exact.norm()
            assert sum(upload.bits) <= 8 * sent.rank
            assert upload.payload_bytes < 0.6 * 4 * (sent.A.numel() + sent.B.numel())


# ---- pruning -------------------------------------------------------------------------------------


def left_after(federation, monkeypatch, strength):
    """The ranks that are left in every round, by client and layer."""
    monkeypatch.setattr(prune, "PENALTY", strength)
    (method,) = methods_with("prune")
    left = []
    for played in rounds_of(federation, method):
        ranks = {}
        for k, client in enumerate(played.cohort):
            before = {name: own.rank for name, own in played.starts[k].adapter.items()}
            for name, updates in played.updates.items():
                sent = updates[k].rank
                assert max(1, before[name] - 1) <= sent <= before[name]
                assert played.side.ranks(client)[name] == sent
                if left:
                    assert before[name] == left[-1][client, name]
                ranks[client, name] = sent
        left.append(ranks)
    return left


def test_ranks_only_go_down_and_the_penalty_makes_them(monkeypatch):
    federation = federation_of(*[EVERYBODY] * 6)
    strong = left_after(federation, monkeypatch, 0.3)
    for before, after in pairwise(strong):
        assert all(after[key] <= before[key] for key in before)
    weak = left_after(federation, monkeypatch, 0.0)
    assert sum(strong[-1].values()) < sum(weak[-1].values()) <= 4 + 8 + 26


# ---- control variates ----------------------------------------------------------------------------


def test_the_first_start_is_the_pretrained_model_and_initial_takes_it_off(federation):
    (method,) = methods_with("qr_start")
    side = SIDES["qr_start"](federation, METHODS[method])
    server = Server(federation.network, federation.network)
    starts = side.starts(server, EVERYBODY, 1)
    for start in starts:
        for name, W in start.weights().items():
            torch.testing.assert_close(W.float(), federation.network[name].weight)
            assert start.adapter[name].B.any()
    idle = {name: [] for name in federation.network}
    for client, start in zip(EVERYBODY, starts, strict=True):
        for name, update in side.updates(client, start.scaling, start.adapter).items():
            idle[name].append(update)
    options = supplied(side, server, EVERYBODY, 1)
    assert set(options) == {"initial"}
    for name, result in aggregate_layers(idle, method, **options).items():
        size = federation.network[name].weight.norm()
        assert result.total().dense().norm() < 1e-5 * size
    for name, updates in side.changes(idle, starts, 1).items():
        for update in updates:
            assert (update.B @ update.A).norm() < 1e-5 * federation.network[name].weight.norm()


def test_later_starts_are_slices_on_the_pretrained_base():
    (method,) = methods_with("qr_start")
    pretrained = federation_of().network
    for played in rounds_of(federation_of(), method):
        options = supplied(played.side, played.before, EVERYBODY, played.number)
        assert ("initial" in options) == (played.number == 1)
        if played.number == 1:
            continue
        for name, result in played.before.results.items():
            for start in played.starts:
                own = start.adapter[name]
                assert torch.equal(start.network[name].weight, pretrained[name].weight)
                torch.testing.assert_close(
                    start.scaling[name] * own.dense(),
                    result.factors.select(slice(own.rank)).dense(),
                )


def test_a_variate_is_the_mean_gradient_and_the_server_has_their_mean(monkeypatch):
    (method,) = methods_with("qr_start")
    federation = federation_of(EVERYBODY, EVERYBODY, (0, 2))
    gradients = {}
    corrected = clients.corrected

    def watched(gradient, own, server, slots=None):
        gradients.setdefault(own.dense_shape, []).append((gradient, own))
        return corrected(gradient, own, server, slots)

    monkeypatch.setattr(clients, "corrected", watched)
    for played in rounds_of(federation, method):
        for name, layer in federation.network.items():
            seen = gradients.pop(tuple(layer.weight.shape))
            total = torch.zeros_like(played.side.variate[name].B)
            for client in played.cohort:
                variate = played.side.own[client][name]
                mine = [g for g, own in seen if own.rank == variate.rank]
                mean = torch.stack([g.B for g in mine]).mean(0)
                torch.testing.assert_close(variate.B, mean, rtol=1e-3, atol=1e-6)
            for own in played.side.own.values():
                total[:, : own[name].rank] += own[name].B / 3
            torch.testing.assert_close(played.side.variate[name].B, total, rtol=1e-3, atol=1e-6)


# ---- state and randomness ------------------------------------------------------------------------


def test_what_a_method_needs_is_supplied():
    federation = federation_of((0, 1), EVERYBODY)
    generators = []
    for played in rounds_of(federation, "dare"):
        options = supplied(played.side, played.before, played.cohort, played.number)
        generators.append(options["generator"].initial_seed())
    assert len(set(generators)) == 2
    for played in rounds_of(federation, "fedrot"):
        options = supplied(played.side, played.before, played.cohort, played.number)
        assert options["round"] == played.number
        if played.number == 1:
            assert options["previous"] is None
            continue
        for name, reference in options["previous"].items():
            # The global rank is 4 after a round of ranks 2 and 4; the clients were handed 16.
            widest = played.starts[-1].adapter[name]
            root = played.starts[-1].scaling[name] ** 0.5
            assert reference.rank == widest.rank
            torch.testing.assert_close(reference.A[4:], widest.A[4:])
            torch.testing.assert_close(reference.A[:4], root * widest.A[:4])
            assert not reference.B[:, 4:].any()


def test_previous_is_there_for_methods_that_need_it_though_everybody_takes_part(federation):
    for played in rounds_of(federation, "fedhl"):
        options = supplied(played.side, played.before, played.cohort, played.number)
        assert (options["previous"] is None) == (played.number == 1)
        if played.number > 1:
            assert all(isinstance(r, AggregationResult) for r in options["previous"].values())


def test_streams_of_different_purposes_differ(federation):
    seeds = {federation.generator(purpose, 0).initial_seed() for purpose in Stream}
    assert len(seeds) == len(Stream)


@pytest.mark.parametrize("client", sorted(SIDES))
def test_every_side_is_deterministic_and_its_memory_ends_with_the_run(client):
    federation = federation_of(EVERYBODY, (0, 1), EVERYBODY)
    method = methods_with(client)[0]
    assert run(federation, method) == run(federation, method)


# ---- absent clients ------------------------------------------------------------------------------

AWAY = (EVERYBODY, EVERYBODY, (0, 1), (0, 1), (0, 1), EVERYBODY)


def above(results, rank=4):
    """Energy of the global update beyond the rank of the clients that stayed."""
    return sum(squared_singular_values(r.total())[rank:].sum() for r in results.values())


@pytest.mark.parametrize("method", ["rb", "raflora", "rbla", "plora", "hafl", "fedhl", "shared_a"])
def test_slots_outlive_rounds_without_their_owners(method):
    rounds = list(rounds_of(federation_of(*AWAY), method))
    assert [played.results["layers.0"].rank for played in rounds] == [16] * 6
    before = above(rounds[1].results)
    for played in rounds[2:]:
        assert above(played.results) > 0.8 * before
    assert above(rounds[-1].results) > 1.2 * before


@pytest.mark.parametrize("method", ["flexlora", "zeropad", "hetlora"])
def test_slots_are_lost_where_absent_means_zero(method):
    rounds = list(rounds_of(federation_of(*AWAY), method))
    assert above(rounds[1].results) > 0
    for played in rounds[2:5]:
        assert played.results["layers.0"].rank == 4
        assert above(played.results) == 0
    # What comes back was trained anew: the client that returns was handed empty slots.
    handed = rounds[5].starts[-1].adapter["layers.0"]
    assert handed.rank == 16
    assert not handed.B[:, 4:].any()


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fedit"}))
def test_every_method_goes_on_when_the_top_rank_joins_late_or_comes_back(method):
    result = run(federation_of((0, 1), EVERYBODY, (1,), (0, 2)), method)
    assert result.participants == ((0, 1), EVERYBODY, (1,), (0, 2))
    columns = [getattr(result, name) for name in Measures.__dataclass_fields__]
    assert np.isfinite(columns).all()
    assert {len(column) for column in columns} == {4}


def test_prescribed_cohorts_reach_simulate():
    cohorts = [[1, 0], [2]]
    result = simulate("rb", ranks=RANKS, rounds=2, local_epochs=1, cohorts=cohorts)
    assert result.participants == ((0, 1), (2,))
    many = simulate_many(["rb"], ranks=RANKS, rounds=2, local_epochs=1, cohorts=cohorts)
    assert many["rb"] == result


# ---- measures ------------------------------------------------------------------------------------


def test_measures_agree_with_dense_arithmetic(federation):
    played = next(rounds_of(federation, "zeropad"))
    off = size = leading = energy = counted = 0.0
    for name, updates in played.updates.items():
        p = np.array([u.weight for u in updates], dtype=float)
        dense = [u.scaling * u.B.double().numpy() @ u.A.double().numpy() for u in updates]
        mean = np.tensordot(p / p.sum(), np.array(dense), axes=1)
        total = played.results[name].B.double().numpy() @ played.results[name].A.double().numpy()
        off += np.square(total - mean).sum()
        size += np.square(mean).sum()
        squares = np.square(np.linalg.svd(total, compute_uv=False))
        squares = squares[squares > 1e-12 * squares[0]]
        leading += squares[:2].sum()
        energy += squares.sum()
        share = squares / squares.sum()
        counted += squares.sum() * np.exp(-(share * np.log(share)).sum())
    measured = played.measures
    assert measured.aggregation_noise == pytest.approx((off / size) ** 0.5, rel=1e-4)
    assert measured.energy_ratio == pytest.approx(leading / energy, rel=1e-6)
    assert measured.effective_rank == pytest.approx(counted / energy, rel=1e-6)
    assert measured.energy_kept == 1.0


def test_initialisation_noise_agrees_with_dense_arithmetic():
    *_, played = rounds_of(federation_of(EVERYBODY, (0, 2)), "fedex")
    federation = played.side.federation
    away, moved = np.zeros(2), 0.0
    for name, layer in federation.network.items():
        W = played.before.whole[name].weight.double().numpy()
        moved += np.square(W - layer.weight.double().numpy()).sum()
        for k, start in enumerate(played.starts):
            own = start.adapter[name]
            mine = start.network[name].weight.double().numpy()
            mine = mine + start.scaling[name] * own.B.double().numpy() @ own.A.double().numpy()
            away[k] += np.square(mine - W).sum()
    weights = [len(federation.clients[client]) for client in (0, 2)]
    expected = np.average(np.sqrt(away), weights=weights) / np.sqrt(moved)
    assert played.measures.initialisation_noise == pytest.approx(expected, rel=1e-9)
    assert away[0] > 1e3 * away[1], "the top rank starts from the global model itself"


def test_effective_rank_counts_equal_components_and_weighs_layers_by_energy():
    assert effective_rank([np.array([1.0, 1.0, 1.0, 0.0])]) == pytest.approx(3)
    assert effective_rank([np.array([5.0])]) == pytest.approx(1)
    assert effective_rank([np.array([3.0, 3.0]), np.array([2.0]), np.zeros(2)]) == pytest.approx(
        (6 * 2 + 2 * 1) / 8
    )
    assert effective_rank([np.zeros(3)]) == 0.0


def test_a_zero_update_has_finite_measures():
    zero = AggregationResult(LowRank(torch.ones(2, 3), torch.zeros(4, 2)))
    updates = {"q": [(torch.ones(2, 3), torch.zeros(4, 2))]}
    assert measure(updates, {"q": zero}, 1, 0.0) == Measures(0.0, 1.0, 1.0, 0.0, 0.0)


def test_initialisation_noise_by_hand():
    def network(value):
        return {"q": Linear(torch.full((1, 1), value), torch.zeros(1))}

    def start(value):
        adapter = {"q": LowRank(torch.ones(1, 1), torch.full((1, 1), value))}
        return Start(network(1.0), adapter, {"q": 2.0})

    # Models 3 and 5 of weights 1 and 3, global model 7, pre-trained 1: (4 + 3 · 2) / 4 / 6.
    noise = initialisation_noise([start(1.0), start(2.0)], [1, 3], network(7.0), network(1.0))
    assert noise == pytest.approx(10 / 24)
    assert initialisation_noise([start(1.0)], [1], network(1.0), network(1.0)) == 0.0


def test_clients_of_low_rank_start_elsewhere_unless_the_rest_is_folded():
    results = simulate_many(["flexlora", "plora", "flora"], rounds=3, local_epochs=1)
    assert results["flexlora"].initialisation_noise[0] == 0
    assert min(results["flexlora"].initialisation_noise[1:]) > 0.01
    assert max(results["plora"].initialisation_noise) < 1e-6
    assert max(results["flora"].initialisation_noise) == 0
