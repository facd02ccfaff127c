"""What a round costs: bytes counted by hand, in the simulator's own network of 64-128-10."""

from dataclasses import replace

import numpy as np
import pytest

from hetlora_agg.simulate import Settings, build_federation, run

A_1, B_1, A_2, B_2 = 64, 128, 128, 10
"""Entries of each factor's row or column, both layers."""
COMPONENT = A_1 + B_1 + A_2 + B_2
DENSE_1, DENSE_2 = A_1 * B_1, A_2 * B_2


@pytest.fixture(scope="module")
def federation():
    """Two clients that train a step a round."""
    whole = build_federation(Settings((2, 4)))
    return replace(whole, clients=tuple(own.take(np.arange(8)) for own in whole.clients))


@pytest.fixture
def costs(federation):
    """Entries of float32, up and down, per round."""

    def of(method, ranks=(2, 4), cohorts=((0, 1), (0, 1), (0, 1))):
        settings = Settings(tuple(ranks), len(cohorts), local_epochs=1, cohorts=cohorts)
        clients = federation.clients[: len(ranks)]
        result = run(
            replace(federation, settings=settings, clients=clients, cohorts=settings.cohorts),
            method,
        )
        return [b / 4 for b in result.bytes_up], [b / 4 for b in result.bytes_down]

    return of


def test_slices_travel_both_ways_and_the_first_start_is_free(costs):
    assert costs("flexlora") == ([6 * COMPONENT] * 3, [0, 6 * COMPONENT, 6 * COMPONENT])


def test_a_rank_that_a_layer_cannot_hold_does_not_travel(costs):
    one = 16 * (A_1 + B_1) + 10 * (A_2 + B_2)
    assert costs("rb", ranks=(16,), cohorts=((0,), (0,))) == ([one] * 2, [0, one])


def test_a_stack_goes_to_everybody_until_dense_weights_are_less(costs):
    up, down = costs("flora")
    assert up == [6 * COMPONENT] * 3
    assert down == [0, 2 * 6 * COMPONENT, 2 * 6 * COMPONENT]
    assert 50 * (A_1 + B_1) > DENSE_1
    assert 20 * (A_2 + B_2) > DENSE_2
    assert costs("flora", ranks=(10, 40))[1][1] == 2 * (DENSE_1 + DENSE_2)


def test_who_missed_a_round_catches_up(costs):
    up, down = costs("flora", cohorts=((0, 1), (0,), (0, 1)))
    assert up == [6 * COMPONENT, 2 * COMPONENT, 6 * COMPONENT]
    # Client 0 lacks the last stack; client 1 the two since it last took part.
    assert down == [0, 6 * COMPONENT, 2 * COMPONENT + (6 + 2) * COMPONENT]


def test_a_residual_goes_down_with_the_adapter(costs):
    # The mean of rank 4, then stacked updates and mean: fedex leaves it factored.
    _, down = costs("fedex")
    residual = min((6 + 4) * (A_1 + B_1), DENSE_1) + min((6 + 4) * (A_2 + B_2), DENSE_2)
    assert down[1] == 6 * COMPONENT + 2 * residual


def test_one_factor_travels_where_the_other_is_known(costs):
    B, A = B_1 + B_2, A_1 + A_2
    assert costs("ffa") == ([6 * B] * 3, [0, 6 * B, 6 * B])
    assert costs("fedsa") == ([6 * A] * 3, [0, 6 * A, 6 * A])


def test_a_client_that_joins_gets_the_factor_that_others_keep(costs):
    _, down = costs("fedsa", cohorts=((0,), (0, 1)))
    assert down[1] == 2 * (A_1 + A_2) + 4 * COMPONENT


def test_alternating_factors_are_sent_by_turns_and_arrive_a_round_later(costs):
    up, down = costs("rolora")
    assert sorted({up[0] / 6, up[1] / 6}) == sorted({A_1 + A_2, B_1 + B_2})
    assert up[0] == up[2]
    assert down == [0, up[0], up[1]]
    _, late = costs("rolora", cohorts=((0, 1), (0,), (0, 1)))
    assert late[2] == up[1] / 3 + 4 * COMPONENT


def test_all_slots_go_down_and_the_chosen_ones_up(costs):
    assert costs("plora") == ([6 * COMPONENT] * 3, [0, 8 * COMPONENT, 8 * COMPONENT])


def test_quantised_uploads_are_counted_in_bits(costs):
    up, down = costs("hafl")
    # Eight bits an entry; minimum and step of each row of A and column of B, in both layers.
    assert up == [(6 * COMPONENT + 2 * 6 * 16) / 4] * 3
    assert down == [0, 8 * COMPONENT, 8 * COMPONENT]


def test_control_variates_are_as_large_as_the_factors(costs):
    assert costs("ilora") == ([12 * COMPONENT] * 3, [0, 12 * COMPONENT, 12 * COMPONENT])


@pytest.mark.parametrize("method", ["rb", "hetlora"])
def test_seconds_of_the_server_are_part_of_the_run(federation, method):
    result = run(federation, method)
    assert len(result.server_seconds) == 15
    assert 0 < sum(result.server_seconds) < result.seconds
