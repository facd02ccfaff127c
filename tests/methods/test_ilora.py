"""ILoRA (arXiv:2511.16069): the exact mean cut by an unpivoted QR."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, HetLoRAError, LowRank, aggregate, aggregate_layers, distribute
from reference import (
    CASES,
    DTYPES,
    SLOTS,
    Case,
    arguments,
    array,
    by_layer,
    cohort,
    coverage,
    dense,
    exact_mean,
    previous_factors,
    scale,
    tail,
    total,
)
from reference_slots import FIRST, LAYERS, MIXED, ilora, ilora_mean, ilora_rank, model
from tolerance import assert_leading_slices, distance, recompressed_gate

ALL = {**CASES, **{f"slots-{name}": case for name, case in SLOTS.items()}}
F64 = torch.float64


def updates_of(clients, dtype=F64):
    return [ClientUpdate(**arguments(c, dtype)) for c in clients]


def low_rank(factors, dtype=F64):
    return LowRank(*(torch.from_numpy(X).to(dtype) for X in factors))


def mean_gate(dtype, layer, initial=None):
    """LAPACK's backward error of the mean, the start counted as one more update."""
    S = scale(layer)
    if initial is not None:
        S += np.linalg.norm(initial[0]) * np.linalg.norm(initial[1])
    return recompressed_gate(dtype, layer[0].B.shape[-2], layer[0].A.shape[-1], S)


def cut_gate(dtype, layer, r, initial=None):
    """The span of the leading r columns X moves by δ/σ_r(X), and ΔW* is projected on it."""
    W = ilora_mean(layer, initial)
    moved = 1 + np.linalg.norm(W, ord=2) / np.linalg.svd(W[:, :r], compute_uv=False)[-1]
    return moved * mean_gate(dtype, layer, initial)


def assert_equals_ilora(result, clients, dtype, rank=None, initial=None):
    for index, layer, earlier in by_layer(clients, initial):
        r = ilora_rank(layer, rank, earlier)
        assert result.rank == r
        error = distance(total(result)[index], ilora(layer, rank, earlier))
        allowed = cut_gate(dtype, layer, r, earlier)
        assert error <= allowed, f"layer {index}: error {error:.3e} above {allowed:.3e}"


@pytest.mark.parametrize("rank", [None, 1, 3, "full", 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_equals_the_oracle(case, dtype, rank):
    clients = cohort(case, dtype)
    result = aggregate(updates_of(clients, dtype), "ilora", rank=rank)
    assert result.A.dtype == dtype
    assert result.residual is None
    assert result.notes == ()
    assert_equals_ilora(result, clients, dtype, rank)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_full_rank_is_the_exact_mean(case, dtype):
    clients = cohort(case, dtype)
    result = aggregate(updates_of(clients, dtype), "ilora", rank="full")
    for index, layer, _ in by_layer(clients):
        r = result.rank
        # a square Q or all columns in X: nothing is projected away, whatever the condition
        whole = r == min(case.out_features, case.in_features)
        allowed = mean_gate(dtype, layer) if whole else cut_gate(dtype, layer, r)
        assert distance(total(result)[index], exact_mean(layer)) <= allowed


@pytest.mark.parametrize("rank", [None, 2, "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_factors_are_those_of_a_qr_up_to_the_norms_of_the_columns(case, dtype, rank):
    clients = cohort(case, dtype)
    result = aggregate(updates_of(clients, dtype), "ilora", rank=rank)
    norms = np.linalg.norm(array(result.B), axis=-2)
    Q, T = array(result.B) / norms[..., None, :], array(result.A) * norms[..., :, None]
    for index, layer, _ in by_layer(clients):
        r = result.rank
        orthogonality = Q[index].T @ Q[index] - np.eye(r)
        assert np.linalg.norm(orthogonality) <= recompressed_gate(dtype, *Q[index].shape, r)
        allowed = cut_gate(dtype, layer, r)
        assert np.linalg.norm(np.tril(T[index][:, :r], -1)) <= allowed
        # the leading r columns of ΔW* are in the span of Q: they are kept as they are
        W = ilora_mean(layer)
        assert distance((Q[index] @ T[index])[:, :r], W[:, :r]) <= allowed


@pytest.mark.parametrize("case", [CASES["tall"], CASES["layers"]], ids=["tall", "layers"])
def test_split_right_gives_q_and_t_themselves(case):
    # the whole of T in A, as published: clients start with an orthonormal B
    result = aggregate(updates_of(cohort(case)), "ilora", split="right")
    norms = np.linalg.norm(array(result.B), axis=-2)
    np.testing.assert_allclose(norms, 1.0, rtol=recompressed_gate(F64, case.out_features, 1, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_every_prefix_is_the_answer_of_its_own_rank(case, dtype):
    clients = cohort(case, dtype)
    result = aggregate(updates_of(clients, dtype), "ilora", rank="full")
    B, A = array(result.B), array(result.A)
    for r in range(1, result.rank + 1):
        alone = total(aggregate(updates_of(clients, dtype), "ilora", rank=r))
        for index, layer, _ in by_layer(clients):
            prefix = B[index][:, :r] @ A[index][:r]
            allowed = cut_gate(dtype, layer, r)
            assert distance(prefix, ilora(layer, r)) <= allowed
            assert distance(prefix, alone[index]) <= 2 * allowed


def hand_updates():
    first = ClientUpdate(
        torch.tensor([[1.0, 2.0]], dtype=F64), torch.tensor([[12.0], [16.0]], dtype=F64), weight=1
    )
    second = ClientUpdate(
        torch.tensor([[0.0, 1.0]], dtype=F64),
        torch.tensor([[2.0], [0.0]], dtype=F64),
        weight=3,
        scaling=2,
    )
    return [first, second]


def test_worked_by_hand_with_mixed_scalings():
    # ¼ [12; 16][1 2] + ¾·2 [2; 0][0 1] = [3 6; 4 8] + [0 3; 0 0] = [3 9; 4 8].
    # q_1 = (0.6, 0.8), T[0] = (5, 0.6·9 + 0.8·8) = (5, 11.8): q_1 T[0] = [3 7.08; 4 9.44]
    one = aggregate(hand_updates(), "ilora")
    assert one.rank == 1
    np.testing.assert_allclose(total(one), [[3.0, 7.08], [4.0, 9.44]], rtol=1e-13)
    full = aggregate(hand_updates(), "ilora", rank="full")
    np.testing.assert_allclose(total(full), [[3.0, 9.0], [4.0, 8.0]], rtol=1e-13)


def test_initial_worked_by_hand():
    # both started from slot 0, [2; 0][1 0]: [3 9; 4 8] − [2 0; 0 0] = [1 9; 4 8]
    start = LowRank(
        torch.tensor([[1.0, 0.0], [7.0, 7.0]], dtype=F64),
        torch.tensor([[2.0, 7.0], [0.0, 7.0]], dtype=F64),
    )
    full = aggregate(hand_updates(), "ilora", rank="full", initial=start)
    np.testing.assert_allclose(total(full), [[1.0, 9.0], [4.0, 8.0]], rtol=1e-13)
    # had the second had both slots, its ¾ of [7; 7][7 7] = 49 would go too, 36.75 everywhere
    second = hand_updates()[1]
    wide = replace(
        second,
        A=torch.cat([second.A, second.A.new_zeros(1, 2)]),
        B=torch.cat([second.B, second.B.new_ones(2, 1)], dim=-1),
    )
    full = aggregate([hand_updates()[0], wide], "ilora", rank="full", initial=start)
    expected = np.array([[1.0, 9.0], [4.0, 8.0]]) - 36.75
    np.testing.assert_allclose(total(full), expected, rtol=1e-13)


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("width", [6, 9])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [c for c in ALL.values() if max(c.ranks) <= 6], ids=[n for n in ALL if n != "square"]
)
def test_the_start_is_subtracted(case, dtype, width, rank):
    clients = cohort(case, dtype)
    factors = previous_factors(case, width, dtype)
    start = low_rank(factors, dtype)
    result = aggregate(updates_of(clients, dtype), "ilora", rank=rank, initial=start)
    assert_equals_ilora(result, clients, dtype, rank, factors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_full_rank_is_exact_after_the_start_too(case, dtype):
    clients = cohort(case, dtype)
    factors = previous_factors(case, 9, dtype)
    result = aggregate(
        updates_of(clients, dtype), "ilora", rank="full", initial=low_rank(factors, dtype)
    )
    for index, layer, earlier in by_layer(clients, factors):
        r = result.rank
        whole = r == min(case.out_features, case.in_features)
        cut = cut_gate(dtype, layer, r, earlier)
        error = distance(total(result)[index], ilora_mean(layer, earlier))
        assert error <= (mean_gate(dtype, layer, earlier) if whole else cut)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_clients_that_send_back_the_start_make_no_update(case, dtype):
    clients = cohort(case, dtype)
    factors = previous_factors(case, 9, dtype)
    start = low_rank(factors, dtype)
    idle = []
    for client in clients:
        piece, root = start.select(list(client.owned)), client.s**0.5
        idle.append(
            ClientUpdate(
                piece.A / root,
                piece.B / root,
                weight=client.n,
                scaling=client.s,
                slots=client.slots,
            )
        )
    found = total(aggregate(idle, "ilora", initial=start))
    counted_twice = total(aggregate(idle, "ilora"))
    for index, layer, earlier in by_layer(clients, factors):
        # S of what is subtracted from itself
        sent = [
            replace(c, A=array(u.A)[index], B=array(u.B)[index])
            for c, u in zip(layer, idle, strict=True)
        ]
        assert np.linalg.norm(found[index]) <= mean_gate(dtype, sent, earlier)
        assert np.linalg.norm(counted_twice[index]) > 1


def test_the_cut_is_clearly_worse_than_that_of_the_svd():
    # flat spectrum, 32 components: the leading columns are no better than any others
    case = Case(64, 48, (8, 8, 8, 8), (1, 2, 3, 2), (1.0, 2.0, 0.5, 1.0))
    ratios = []
    for seed in range(5):
        clients = cohort(case, seed=seed)
        W = exact_mean(clients)
        by_qr, by_svd = (
            distance(total(aggregate(updates_of(clients), name, rank=8)), W)
            for name in ("ilora", "flexlora")
        )
        assert by_svd == pytest.approx(tail(W, 8), rel=1e-9)
        ratios.append(by_qr / by_svd)
    assert min(ratios) > 1.2


def test_the_cut_depends_on_the_order_of_the_inputs():
    clients = cohort(CASES["tall"])
    mirrored = [replace(client, A=client.A[:, ::-1]) for client in clients]
    one = total(aggregate(updates_of(clients), "ilora", rank=2))
    two = total(aggregate(updates_of(mirrored), "ilora", rank=2))[:, ::-1]
    assert distance(one, two) > 1
    # at full rank it does not
    one = total(aggregate(updates_of(clients), "ilora", rank="full"))
    two = total(aggregate(updates_of(mirrored), "ilora", rank="full"))[:, ::-1]
    assert distance(one, two) <= 2 * mean_gate(F64, clients)


def test_mixing_the_components_of_a_client_changes_nothing():
    clients = cohort(CASES["tall"])
    G = np.array([[2.0, 1.0], [0.0, 0.5]])
    mixed = replace(clients[0], A=np.linalg.inv(G) @ clients[0].A, B=clients[0].B @ G)
    one = total(aggregate(updates_of(clients), "ilora"))
    two = total(aggregate(updates_of([mixed, *clients[1:]]), "ilora"))
    gates = [cut_gate(F64, layer, 6) for layer in (clients, [mixed, *clients[1:]])]
    assert distance(one, two) <= sum(gates)


DEAD = {"first": [0], "second": [1], "two": [0, 2]}


def with_dead_inputs(case, columns, dtype=F64):
    clients = []
    for client in cohort(case, dtype):
        A = client.A.copy()
        A[..., columns] = 0
        clients.append(replace(client, A=A))
    return clients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CASES["tall"], CASES["thin"]], ids=["tall", "thin"])
@pytest.mark.parametrize("columns", DEAD.values(), ids=DEAD)
def test_dead_inputs_among_the_leading_columns_are_noted(columns, case, dtype):
    clients = with_dead_inputs(case, columns, dtype)
    result = aggregate(updates_of(clients, dtype), "ilora")
    (note,) = result.notes
    assert f"{len(columns)} of {result.rank} " in note
    # what is wasted is components, not correctness: the leading columns are there
    r, W = result.rank, exact_mean(clients)
    alive = [i for i in range(r) if i not in columns]
    moved = 1 + np.linalg.norm(W, 2) / np.linalg.svd(W[:, alive], compute_uv=False)[-1]
    allowed = moved * mean_gate(dtype, clients)
    assert distance(total(result)[:, :r], W[:, :r]) <= allowed
    # and the rest is no worse than what the live columns alone would have kept
    Q = np.linalg.qr(W[:, alive])[0]
    assert distance(total(result), W) <= distance(Q @ (Q.T @ W), W) + allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_dependent_columns_are_noted(dtype):
    # input 2 is input 0 plus input 1 on every client, without any rounding in the dtype
    clients = []
    for client in cohort(CASES["tall"], dtype):
        A = np.round(client.A * 64) / 64
        A[:, 2] = A[:, 0] + A[:, 1]
        clients.append(replace(client, A=A, s=1.0))
    result = aggregate(updates_of(clients, dtype), "ilora")
    (note,) = result.notes or ("none",)
    assert f"1 of {result.rank} " in note
    assert distance(total(result)[:, :2], exact_mean(clients)[:, :2]) <= mean_gate(dtype, clients)


def test_dead_inputs_behind_the_cut_are_nobodys_business():
    clients = with_dead_inputs(CASES["tall"], [4])
    result = aggregate(updates_of(clients), "ilora", rank=3)
    assert result.notes == ()
    assert_equals_ilora(result, clients, F64, 3)


def test_full_rank_is_exact_with_dead_inputs():
    # six inputs and R = 16: all columns are taken, the dead ones with them
    clients = with_dead_inputs(CASES["tall"], [0, 3])
    result = aggregate(updates_of(clients), "ilora", rank="full")
    assert distance(total(result), exact_mean(clients)) <= mean_gate(F64, clients)


@pytest.mark.parametrize("initial", [False, True])
def test_zero_updates_make_a_zero_result(initial):
    update = ClientUpdate(torch.ones(2, 5), torch.zeros(4, 2))
    start = {"initial": LowRank(torch.ones(2, 5), torch.zeros(4, 2))} if initial else {}
    result = aggregate([update, update], "ilora", **start)
    assert torch.isfinite(result.A).all()
    assert torch.isfinite(result.B).all()
    assert not total(result).any()


def test_the_result_is_nested_and_knows_no_slots():
    result = aggregate(updates_of(cohort(CASES["tall"])), "ilora")
    assert result.shared == {"A", "B"}
    assert result.unscaled is None
    assert result.nested is True
    assert result.slotted is False


@pytest.mark.parametrize("case", [CASES["tall"], CASES["layers"]], ids=["tall", "layers"])
def test_distributed_pieces_are_the_cuts_of_their_ranks(case):
    clients = cohort(case)
    result = aggregate(updates_of(clients), "ilora")
    pieces = distribute(result, case.ranks, case.scalings)
    assert_leading_slices(pieces, result, case.ranks, case.scalings)
    for piece, r, s in zip(pieces, case.ranks, case.scalings, strict=True):
        for index, layer, _ in by_layer(clients):
            assert distance(s * dense(piece)[index], ilora(layer, r)) <= cut_gate(F64, layer, r)


def test_an_idle_round_multiplies_rows_of_t_by_their_coverage():
    case = CASES["square"]
    result = aggregate(updates_of(cohort(case)), "ilora")
    back = [
        ClientUpdate(piece.A, piece.B, weight=n, scaling=s)
        for piece, n, s in zip(
            distribute(result, case.ranks, case.scalings), case.n, case.scalings, strict=True
        )
    ]
    q = np.array(coverage(cohort(case)))
    expected = (array(result.B) * q) @ array(result.A)
    clients = [
        replace(c, A=array(u.A), B=array(u.B)) for c, u in zip(cohort(case), back, strict=True)
    ]
    assert distance(total(aggregate(back, "ilora")), expected) <= cut_gate(F64, clients, 8)


@pytest.mark.parametrize("rank", [None, 2])
def test_layers_of_a_model_take_their_start_by_name(rank):
    layers = model(FIRST)
    starts = {
        name: previous_factors(replace(FIRST, out_features=out, in_features=in_), 5, seed=out)
        for name, (out, in_) in LAYERS.items()
    }
    given = {name: low_rank(factors) for name, factors in starts.items()}
    results = aggregate_layers(
        {name: updates_of(c) for name, c in layers.items()}, "ilora", rank=rank, initial=given
    )
    assert list(results) == list(LAYERS)
    for name, clients in layers.items():
        assert_equals_ilora(results[name], clients, F64, rank, starts[name])
    plain = aggregate_layers({n: updates_of(c) for n, c in layers.items()}, "ilora", rank=rank)
    for name, clients in layers.items():
        assert_equals_ilora(plain[name], clients, F64, rank)


def test_the_start_of_a_model_goes_by_layer():
    layers = {name: updates_of(clients) for name, clients in model(MIXED).items()}
    start = low_rank(previous_factors(MIXED, 5))
    with pytest.raises(HetLoRAError, match=r"initial=.*mapping"):
        aggregate_layers(layers, "ilora", initial=start)
    with pytest.raises(HetLoRAError, match=r"initial=.*'down' has none"):
        aggregate_layers(layers, "ilora", initial={"q": start, "v": start})
    with pytest.raises(HetLoRAError, match=r"initial=.*'down'.*got \(9, 7\)"):
        aggregate_layers(layers, "ilora", initial=dict.fromkeys(LAYERS, start))


@pytest.mark.parametrize(
    ("initial", "why"),
    [
        (LowRank(torch.ones(2, 2), torch.ones(3, 2)), r"\(2, 2\).*got \(3, 2\)"),
        (LowRank(torch.ones(1, 2, 2), torch.ones(1, 2, 2)), r"got \(1, 2, 2\)"),
        (LowRank(torch.full((2, 2), torch.nan), torch.ones(2, 2)), "NaN"),
        ((torch.ones(2, 2), torch.ones(2, 2)), "expected a LowRank"),
    ],
    ids=["shape", "layers", "nan", "tuple"],
)
def test_a_start_that_does_not_fit_is_refused(initial, why):
    with pytest.raises(HetLoRAError, match=rf"initial=.*{why}"):
        aggregate(hand_updates(), "ilora", initial=initial)


@pytest.mark.parametrize("case", [CASES["tall"], SLOTS["gap"]], ids=["tall", "gap"])
def test_a_start_with_fewer_slots_than_the_clients_is_refused(case):
    clients = cohort(case)
    slots = 1 + max(j for client in clients for j in client.owned)
    short = low_rank(previous_factors(case, slots - 1))
    with pytest.raises(HetLoRAError, match=r"initial=") as caught:
        aggregate(updates_of(clients), "ilora", initial=short)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("rank", [0, -1, "some", "Full"], ids=repr)
def test_ranks_out_of_range_are_refused(rank):
    with pytest.raises(HetLoRAError, match="rank"):
        aggregate(hand_updates(), "ilora", rank=rank)


@pytest.mark.parametrize("rank", [True, 2.0, [2]], ids=repr)
def test_a_rank_that_is_no_integer_is_refused(rank):
    with pytest.raises(HetLoRAError, match="rank"):
        aggregate(hand_updates(), "ilora", rank=rank)


@pytest.mark.parametrize("option", ["previous", "weighting", "energy", "split"])
def test_options_it_does_not_have_are_refused(option):
    with pytest.raises(HetLoRAError, match=option):
        aggregate(hand_updates(), "ilora", **{option: None})
