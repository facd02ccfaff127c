"""RoLoRA (arXiv:2409.02346): B averaged in odd rounds, A in even ones, the other one frozen."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, aggregate, aggregate_layers, distribute
from reference import (
    CASES,
    DTYPES,
    SLOTS,
    arguments,
    array,
    by_layer,
    cohort,
    coverage,
    dense,
    exact_mean,
    total,
)
from reference_slots import (
    FIRST,
    LAYERS,
    MIXED,
    common_rows,
    into,
    model,
    rolora,
    transposed,
    with_common,
)
from tolerance import assert_equals_oracle, assert_leading_slices, averaged_gate, distance, eps

ALL = {**CASES, **{f"slots-{name}": case for name, case in SLOTS.items()}}
HALVES = (torch.float16, torch.bfloat16)
F64 = torch.float64
FROZEN = {1: "A", 2: "B", 7: "A", 10: "B"}


def updates_of(clients, dtype=F64):
    return [ClientUpdate(**arguments(c, dtype)) for c in clients]


def frozen(case, round, dtype=F64, seed=0):
    return with_common(cohort(case, dtype, seed), FROZEN[round])


def trained(round):
    """The factor that is not frozen, and takes the scaling."""
    return "B" if FROZEN[round] == "A" else "A"


def gate_of(round):
    """The gate of factor means with the whole scaling in the factor that is averaged."""
    return lambda dtype, clients: averaged_gate(dtype, into(clients, trained(round)))


def common_of(layer, round):
    """The frozen factor of one layer, its slots along the first axis."""
    return common_rows(layer if FROZEN[round] == "A" else transposed(layer))


def slots_first(X, factor):
    """A as it is, B transposed: slots along the last axis but one."""
    X = X.double().numpy()
    return X if factor == "A" else np.swapaxes(X, -1, -2)


@pytest.mark.parametrize("round", FROZEN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_equals_the_oracle_and_the_exact_mean(case, dtype, round):
    clients = frozen(case, round, dtype)
    result = aggregate(updates_of(clients, dtype), "rolora", round=round)
    assert result.A.dtype == dtype
    assert result.residual is None
    oracle = partial(rolora, round=round)
    assert_equals_oracle(total(result), oracle, clients, gate_of(round), dtype)
    assert_equals_oracle(total(result), exact_mean, clients, gate_of(round), dtype)


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_the_frozen_factor_comes_back_bit_for_bit(case, dtype, round):
    # weights whose shares are no binary fractions: a mean of equal rows would round
    clients = frozen(case, round, dtype)
    result = aggregate(updates_of(clients, dtype), "rolora", round=round)
    owned = sorted({j for client in clients for j in client.owned})
    assert result.rank == owned[-1] + 1
    kept = slots_first(getattr(result, FROZEN[round]), FROZEN[round])
    for index, layer, _ in by_layer(clients):
        assert np.array_equal(kept[index][owned], common_of(layer, round)[owned])


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_distribute_leaves_alone_what_the_next_round_freezes(case, dtype, round):
    # whatever its scaling, every client must come back with one and the same factor
    clients = frozen(case, round, dtype)
    result = aggregate(updates_of(clients, dtype), "rolora", round=round)
    next_frozen = FROZEN[3 - round]
    for piece, r in zip(distribute(result, case.ranks, case.scalings), case.ranks, strict=True):
        whole = slots_first(getattr(result, next_frozen), next_frozen)
        kept = slots_first(getattr(piece, next_frozen), next_frozen)
        assert np.array_equal(kept, whole[..., :r, :])


@pytest.mark.parametrize("round", [1, 2])
def test_distributes_leading_slots_with_the_scaling_out_of_what_trains_next(round):
    case = CASES["layers"]
    result = aggregate(updates_of(frozen(case, round)), "rolora", round=round)
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)
    for piece, s in zip(pieces, case.scalings, strict=True):
        factor = trained(3 - round)
        whole, part = (getattr(x, factor) for x in (result, piece))
        expected = slots_first(whole, factor)[..., : piece.rank, :] / s
        error = distance(slots_first(part, factor), expected)
        assert error <= eps(F64) * np.linalg.norm(expected)


def hand_updates(round):
    """Frozen diag(1, 2), trained factor 1 against diag(12, 10), scalings 4 and ½."""
    kept, one, two = torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2), torch.tensor([12.0, 10.0])
    if round % 2:
        first = ClientUpdate(kept[:1], one[:, :1], weight=1, scaling=4)
        return [first, ClientUpdate(kept, torch.diag(two), weight=3, scaling=0.5)]
    first = ClientUpdate(one[:1], kept[:, :1], weight=1, scaling=4)
    return [first, ClientUpdate(torch.diag(two), kept, weight=3, scaling=0.5)]


@pytest.mark.parametrize("round", [1, 2, 3, 4])
def test_worked_by_hand_with_mixed_scalings(round):
    # s_k whole in the trained factor: 4·1 = 4 against ½·diag(12, 10) = diag(6, 5);
    # ¼ diag(4, 0) + ¾ diag(6, 5) = diag(5.5, 3.75), under a frozen diag(1, 2): diag(5.5, 7.5)
    result = aggregate(hand_updates(round), "rolora", round=round)
    mean, kept = (result.B, result.A) if round % 2 else (result.A, result.B)
    assert kept.tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert mean.tolist() == [[5.5, 0.0], [0.0, 3.75]]
    assert dense(result.factors).tolist() == [[5.5, 0.0], [0.0, 7.5]]


@pytest.mark.parametrize("round", [1, 2, 3, 4])
def test_the_averaged_factor_replaces_the_clients_own(round):
    result = aggregate(hand_updates(round), "rolora", round=round)
    assert result.shared == ({"B"} if round % 2 else {"A"})
    assert result.unscaled == ("A" if round % 2 else "B")
    assert result.next_unscaled == ("B" if round % 2 else "A")
    assert result.nested is True
    assert result.slotted is True


def test_odd_rounds_are_ffa():
    clients = frozen(CASES["tall"], 1)
    one = aggregate(updates_of(clients), "rolora", round=3)
    two = aggregate(updates_of(clients), "ffa")
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B, two.B)


@pytest.mark.parametrize("case", [CASES["tall"], CASES["layers"]], ids=["tall", "layers"])
def test_even_rounds_are_odd_rounds_of_the_transposed_clients(case):
    clients = frozen(case, 2)
    updates = updates_of(clients)
    even = aggregate(updates, "rolora", round=2)
    flipped = [replace(u, A=u.B.mT.contiguous(), B=u.A.mT.contiguous()) for u in updates]
    odd = aggregate(flipped, "rolora", round=1)
    assert torch.equal(even.B, odd.A.mT)
    for index, layer, _ in by_layer(clients):
        error = distance(total(even)[index], total(odd)[index].T)
        assert error <= 2 * gate_of(2)(F64, layer)


def test_two_rounds_from_what_was_distributed():
    # equal ranks: B is trained under a common A, then A under the common B that came of it
    case = replace(MIXED, ranks=(3, 3, 3))
    odd = frozen(case, 1)
    first = aggregate(updates_of(odd), "rolora", round=1)
    # a client that trains A takes B as it is, the scaling goes into its A
    rng = np.random.default_rng(5)
    even = [replace(c, A=rng.standard_normal(c.A.shape), B=array(first.B)) for c in odd]
    second = aggregate(updates_of(even), "rolora", round=2)
    assert torch.equal(second.B, first.B)
    assert_equals_oracle(total(second), exact_mean, even, gate_of(2), F64)


@pytest.mark.parametrize("round", [1, 2])
def test_an_idle_round_multiplies_slots_by_their_coverage(round):
    case = CASES["square"]
    result = aggregate(updates_of(frozen(case, round)), "rolora", round=round)
    pieces = distribute(result, case.ranks, case.scalings)
    back = [
        ClientUpdate(piece.A, piece.B, weight=n, scaling=s)
        for piece, n, s in zip(pieces, case.n, case.scalings, strict=True)
    ]
    expected = (array(result.B) * np.array(coverage(cohort(case)))) @ array(result.A)
    S = np.linalg.norm(array(result.A)) * np.linalg.norm(array(result.B))
    # K+3 as for components that agree, and the division of the way there
    error = distance(total(aggregate(back, "rolora", round=round + 1)), expected)
    assert error <= (4 + 4) * eps(F64) * S


@pytest.mark.parametrize("round", [1, 2])
def test_layers_of_a_model_equal_the_oracle_one_by_one(round):
    layers = model(FIRST, common=FROZEN[round])
    results = aggregate_layers(
        {name: updates_of(clients) for name, clients in layers.items()}, "rolora", round=round
    )
    assert list(results) == list(LAYERS)
    for name, clients in layers.items():
        oracle = partial(rolora, round=round)
        assert_equals_oracle(total(results[name]), oracle, clients, gate_of(round), F64)
        kept = slots_first(getattr(results[name], FROZEN[round]), FROZEN[round])
        assert np.array_equal(kept, common_of(clients, round))
        assert results[name].next_unscaled == FROZEN[3 - round]


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize(
    ("client", "component", "slot"), [(1, 0, 0), (1, 3, 3), (2, 0, 0)], ids=str
)
@pytest.mark.parametrize("names", [(0, 1, 2), ("a", "b", "c")], ids=["positions", "ids"])
def test_an_unequal_frozen_factor_is_refused_naming_client_and_slot(
    client, component, slot, names, round
):
    # ranks 4, 4, 2 and the least difference there is, in one entry
    factor = FROZEN[round]
    updates = updates_of(frozen(replace(MIXED, ranks=(4, 4, 2)), round))
    X = getattr(updates[client], factor).clone()
    place = (component, 2) if factor == "A" else (2, component)
    X[place] = torch.nextafter(X[place], torch.tensor(torch.inf, dtype=F64))
    updates[client] = replace(updates[client], **{factor: X})
    if names[0] == "a":
        updates = [replace(u, id=id) for u, id in zip(updates, names, strict=True)]
    with pytest.raises(
        HetLoRAError, match=rf"'rolora'.*client {names[client]!r}: lora_{factor} in slot {slot} "
    ) as caught:
        aggregate(updates, "rolora", round=round)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("round", [1, 2])
def test_the_factor_of_the_other_parity_is_not_common_enough(round):
    # clients that froze the wrong one
    updates = updates_of(frozen(MIXED, round))
    with pytest.raises(HetLoRAError, match=rf"client 1: lora_{trained(round)} in slot 0 "):
        aggregate(updates, "rolora", round=round + 1)


@pytest.mark.parametrize("round", [1, 2])
def test_one_unequal_layer_is_enough_to_refuse(round):
    factor = FROZEN[round]
    layers = {name: updates_of(clients) for name, clients in model(MIXED, common=factor).items()}
    X = getattr(layers["down"][1], factor).clone()
    X[..., 0, 0] += 1
    layers["down"][1] = replace(layers["down"][1], **{factor: X})
    with pytest.raises(HetLoRAError, match=rf"client 1: lora_{factor} in slot 0 .*client 0"):
        aggregate_layers(layers, "rolora", round=round)


def test_a_missing_round_is_asked_for():
    with pytest.raises(HetLoRAError, match=r"'rolora'.*round="):
        aggregate(hand_updates(1), "rolora")
    with pytest.raises(HetLoRAError, match=r"'rolora'.*round="):
        aggregate_layers({"q": hand_updates(1)}, "rolora")


@pytest.mark.parametrize("round", [0, -1, -2, 1.0, 1.5, "1", None, True], ids=repr)
def test_a_round_that_is_none_is_refused(round):
    with pytest.raises(HetLoRAError, match="round"):
        aggregate(hand_updates(1), "rolora", round=round)
    with pytest.raises(HetLoRAError, match="round"):
        aggregate_layers({"q": hand_updates(1)}, "rolora", round=round)


@pytest.mark.parametrize("option", ["previous", "weighting", "rank"])
def test_options_it_does_not_have_are_refused(option):
    with pytest.raises(HetLoRAError, match=option):
        aggregate(hand_updates(1), "rolora", round=1, **{option: None})
