"""Secure aggregation: sums of messages are the method's result, and equal bit for bit mod 2⁶⁴."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetlora_agg import (
    METHODS,
    ClientUpdate,
    InputTypeError,
    InputValueError,
    LowRank,
    aggregate,
)
from hetlora_agg.clients import basis
from hetlora_agg.secure import from_fixed, from_sum, linear_message, most_bits, to_fixed
from reference import (
    CASES,
    DTYPES,
    EQUAL_RANKS,
    SLOTS,
    arguments,
    array,
    cohort,
    dense,
    of,
    previous_factors,
)
from states import common_of, state_for
from tolerance import assert_equals_oracle, averaged_gate, distance, eps, recompressed_gate_of

F64 = torch.float64
FACTORS = sorted(name for name, entry in METHODS.items() if entry.sums == "factors")
SLOTTED = ("plora", "hafl", "rbla")


def with_ids(clients, dtype=F64):
    return [ClientUpdate(**arguments(c, dtype), id=f"c{k}") for k, c in enumerate(clients)]


def roster_of(updates):
    return [(u.id, u.A.shape[-2], u.weight, u.slots) for u in updates]


def common_factor(clients, name):
    """The clients with the leading rows of one A where the method needs that, and that A."""
    if common_of(name) is None:
        return clients, None
    A = max((c.A for c in clients), key=lambda A: A.shape[-2])
    # One row for every slot, whoever has it.
    width = 1 + max(max(c.owned) for c in clients)
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((*A.shape[:-2], width, A.shape[-1])).astype(np.float32)
    rows = rows.astype(np.float64)
    return [replace(c, A=rows[..., list(c.owned), :]) for c in clients], rows


def added(messages):
    """The plain sum of messages, in order."""
    return {name: sum(m[name] for m in messages) for name in messages[0]}


def exchanged(name, clients, dtype=F64, **options):
    """Messages, their sum and both results, from the sum and from the updates."""
    clients, frozen = common_factor(clients, name)
    updates = with_ids(clients, dtype)
    roster = roster_of(updates)
    options = state_for(name) | options
    still = None if frozen is None else torch.from_numpy(frozen).to(dtype)
    sent = [linear_message(u, name, roster, **options) for u in updates if u.weight > 0]
    result = from_sum(added(sent), name, roster, frozen=still, **options)
    return clients, sent, result, aggregate(updates, name, **options)


def cases_for(name):
    if "mixed_ranks" not in METHODS[name].claims:
        return EQUAL_RANKS
    slots = {f"slots-{k}": v for k, v in SLOTS.items()} if name in SLOTTED else {}
    return CASES | slots


PAIRS = [(name, case) for name in FACTORS for case in cases_for(name)]


# --- who qualifies ------------------------------------------------------------------------------


def clients_of(name, present, seeds=(3,)):
    """Five clients of one cohort, those not present with zeros for the factors that they train.

    With several seeds their factors are sums of those of each.
    """
    ranks = (2,) * 5 if "mixed_ranks" not in METHODS[name].claims else (3, 1, 2, 3, 1)
    A = np.random.default_rng(0).standard_normal((3, 6))
    drawn = [np.random.default_rng(seed) for seed in seeds]
    updates = []
    for k, rank in enumerate(ranks):
        own = sum(rng.standard_normal((rank, 6)) for rng in drawn) * (k in present)
        B = sum(rng.standard_normal((5, rank)) for rng in drawn) * (k in present)
        own = A[:rank] if common_of(name) == "A" else own
        updates.append(ClientUpdate(torch.from_numpy(own), torch.from_numpy(B), weight=1.0 + k % 3))
    return updates


def given_state(name):
    """State of a later round: in the first one, without a previous update, more is a mean."""
    g = torch.Generator().manual_seed(8)
    A, B = torch.randn(3, 6, generator=g, dtype=F64), torch.randn(5, 3, generator=g, dtype=F64)
    later = {"previous": LowRank(A, B)} if "previous" in METHODS[name].needs else {}
    drop = {"drop": 0.0} if "drop" in METHODS[name].options else {}
    return state_for(name) | later | drop


def additive(name, read, **options):
    """Whether ``read(result)`` of all clients is the sum of those of each alone.

    What is no number of the result's own shape, such as None, is no sum.
    """

    def released(*present, seeds=(3,)):
        return read(
            aggregate(clients_of(name, present, seeds), name, **given_state(name) | options)
        )

    nobody, whole = released(), released(*range(5))
    if nobody is None or nobody.shape != whole.shape:
        return False
    parts = [released(k) - nobody for k in range(5)]
    return bool(torch.allclose(nobody + sum(parts), whole, rtol=1e-9, atol=1e-9))


def summed_factors(name):
    """The factors that are not common side by side, unless there is more to the result than them.

    A stack has more components than there are slots: it shows every client's own.
    """

    def read(result):
        if result.residual is not None or result.rank > 3:
            return None
        kept = [result.B] if common_of(name) == "A" else [result.A.mT, result.B]
        return torch.cat(kept, dim=-2)

    return read


def superposed(name):
    """Whether the factors of a client that sends X + Y are those for X and those for Y added."""
    read = summed_factors(name)
    x, y, both, zero = (
        read(aggregate(clients_of(name, there, seeds), name, **given_state(name)))
        for there, seeds in (((2,), (3,)), ((2,), (4,)), ((2,), (3, 4)), ((), (3,)))
    )
    return bool(torch.allclose(x + y - zero, both, rtol=1e-9, atol=1e-9))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_registry_says_what_is_a_sum(name):
    """By trial: the method on each client alone, the others there with updates of zeros."""
    entry = METHODS[name]
    factors = additive(name, summed_factors(name)) and superposed(name)
    assert factors == (entry.sums == "factors")
    full = {"rank": "full"} if "rank" in entry.options else {}
    product = additive(name, lambda r: r.total().dense(), **entry.claims.get("exact", full))
    # dare without dropping is the exact mean.
    exact = "exact" in entry.claims or name == "dare" or common_of(name) == "A"
    assert product == (entry.sums == "products" or exact)


@pytest.mark.parametrize("name", ["flora", "rb", "hetlora", "median", "ties"])
def test_methods_that_are_no_sum_name_those_that_are(name):
    update = ClientUpdate(torch.ones(1, 2), torch.ones(2, 1), id=0)
    able = "'fedask', 'fedit', 'fedsa', 'ffa', 'hafl', .*'zeropad'"
    with pytest.raises(InputValueError, match=f"method {name!r} does not qualify: .*{able}"):
        linear_message(update, name, [(0, 1, 1.0)])
    with pytest.raises(InputValueError, match=f"from_sum: method {name!r} does not qualify"):
        from_sum({}, name, [(0, 1, 1.0)])


# --- sums of factors ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_the_sum_of_the_messages_is_the_result(name, case, dtype):
    clients, sent, result, whole = exchanged(name, cohort(cases_for(name)[case], dtype), dtype)
    assert {tuple((k, X.shape) for k, X in m.items()) for m in sent} == {
        tuple((k, X.shape) for k, X in sent[0].items())
    }
    assert result.A.dtype == result.B.dtype == dtype
    assert_equals_oracle(
        dense(result.factors), of(name), clients, averaged_gate, dtype, **seen(name)
    )
    # Per entry the consensus gate: K additions and three roundings of terms no larger than S.
    folded = [c.folded() if common_of(name) is None and name != "fedsa" else c for c in clients]
    s = 1.0 if folded[0] is not clients[0] else max(c.s for c in clients)
    for mine, theirs, which in ((result.A, whole.A, "A"), (result.B, whole.B, "B")):
        largest = s * max(np.abs(getattr(c, which)).max() for c in folded)
        assert mine.shape == theirs.shape
        gate = (len(clients) + 3) * eps(dtype) * largest
        assert np.abs(array(mine) - array(theirs)).max() <= gate
    for field in ("nested", "shared", "dropped", "slotted", "unscaled", "next_unscaled"):
        assert getattr(result, field) == getattr(whole, field), field


def seen(name):
    """What the oracle of a method takes besides the clients."""
    return {"round": 1} if name == "rolora" else {}


OPTIONS = [
    ("zeropad", {"weighting": "uniform"}),
    ("rbla", {"floor": 0.6}),
    ("rbla", {"quorum": 2}),
    ("rbla", {"weight_cap": 0.35}),
    ("plora", {"weighting": "examples"}),
    ("hafl", {"quorum": 2, "floor": 0.3}),
    ("shared_a", {"floor": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("case", ["tall", "layers"])
def test_options_decide_the_shares_as_in_aggregate(name, options, case):
    _, _, result, whole = exchanged(name, cohort(CASES[case]), **options)
    plain = exchanged(name, cohort(CASES[case]))[3]
    assert distance(dense(result.factors), dense(whole.factors)) <= 1e-12
    assert distance(dense(plain.factors), dense(whole.factors)) > 1e-3
    assert result.dropped == whole.dropped


@pytest.mark.parametrize("options", [{}, {"quorum": 2}])
@pytest.mark.parametrize("name", ["rbla", "hafl", "plora", "replicate", "shared_a"])
def test_slots_that_nobody_fills_are_carried_over(name, options):
    if not set(options) <= set(METHODS[name].options):
        options = {}
    A, B = previous_factors(CASES["tall"], 9)
    previous = LowRank(torch.from_numpy(A), torch.from_numpy(B))
    _, sent, result, whole = exchanged(name, cohort(CASES["tall"]), previous=previous, **options)
    assert result.rank == whole.rank == 9
    assert all(m["B"].shape[-1] == 6 for m in sent)
    assert distance(result.A, whole.A) <= 1e-13
    assert distance(result.B, whole.B) <= 1e-13
    assert result.dropped == whole.dropped


def test_a_round_of_rolora_that_freezes_B():
    rng = np.random.default_rng(0)
    B = torch.from_numpy(rng.standard_normal((5, 3)))
    roster = [("a", 3, 1.0), ("b", 2, 3.0)]
    updates = [
        ClientUpdate(torch.from_numpy(rng.standard_normal((r, 4))), B[:, :r], r, n, 0.5, id=i)
        for i, r, n in roster
    ]
    sent = [linear_message(u, "rolora", roster, round=2) for u in updates]
    assert [list(m) for m in sent] == [["A"], ["A"]]
    result = from_sum(added(sent), "rolora", roster, frozen=B, round=2)
    whole = aggregate(updates, "rolora", round=2)
    assert torch.equal(result.B, whole.B)
    assert distance(result.A, whole.A) <= 1e-15
    assert (result.unscaled, result.next_unscaled) == ("B", "A")


def test_a_message_by_hand():
    roster = [("x", 1, 1), ("y", 2, 3)]
    y = ClientUpdate(torch.ones(2, 2), torch.tensor([[1.0, 2.0]]), weight=3, scaling=4.0, id="y")
    # The root of 4 goes into both factors; y has 3/4 of slot 0 and all of slot 1.
    message = linear_message(y, "rbla", roster)
    assert message["A"].tolist() == [[1.5, 1.5], [2.0, 2.0]]
    assert message["B"].tolist() == [[1.5, 4.0]]
    x = ClientUpdate(torch.ones(1, 2), torch.ones(1, 1), weight=1, id="x")
    assert linear_message(x, "rbla", roster)["A"].tolist() == [[0.25, 0.25], [0.0, 0.0]]


def test_half_precision_travels_in_single():
    half = ClientUpdate(torch.ones(1, 2).half(), torch.ones(2, 1).half(), id=0)
    sent = linear_message(half, "fedit", [(0, 1, 1.0)])
    assert sent["A"].dtype == torch.float32


def test_padding_and_gradients_are_left_behind():
    A = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    padded = ClientUpdate(A, torch.ones(3, 2), rank=1, id=0)
    sent = linear_message(padded, "zeropad", [(0, 1, 1.0)])
    assert sent["A"].tolist() == [[1.0, 2.0]]
    assert not sent["A"].requires_grad


# --- clients that drop out ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in FACTORS if n != "replicate"])
def test_missing_clients_are_made_up_for(name):
    case = cases_for(name)["tall"]
    clients, frozen = common_factor(cohort(case), name)
    updates, options = with_ids(clients), state_for(name)
    roster = roster_of(updates)
    sent = {u.id: linear_message(u, name, roster, **options) for u in updates}
    still = None if frozen is None else torch.from_numpy(frozen)
    for size in range(1, len(updates)):
        for there in itertools.combinations(updates, size):
            ids = [u.id for u in there]
            total = added([sent[i] for i in ids])
            result = from_sum(total, name, roster, frozen=still, present=ids, **options)
            whole = aggregate(there, name, **options)
            assert distance(result.A, whole.A) <= 1e-13
            assert distance(result.B, whole.B) <= 1e-13


def test_shares_that_do_not_scale_cannot_be_made_up_for():
    updates = with_ids(cohort(CASES["tall"]))
    roster = roster_of(updates)
    for name, options in (("replicate", {}), ("rbla", {"weight_cap": 0.35})):
        sent = [linear_message(u, name, roster, **options) for u in updates[1:]]
        with pytest.raises(InputValueError, match="sum again with a roster of those present"):
            from_sum(added(sent), name, roster, present=["c1", "c2", "c3"], **options)
    sent = [linear_message(u, "rbla", roster, quorum=2) for u in updates]
    with pytest.raises(InputValueError, match="client 'nobody' is not in the roster"):
        from_sum(added(sent), "rbla", roster, present=["nobody"])
    with pytest.raises(InputValueError, match="nobody is; there is no sum"):
        from_sum(added(sent), "rbla", roster, present=[])


# --- sketches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"rank": "full", "split": "left"}])
@pytest.mark.parametrize("case", ["tall", "wide", "thin", "lone", "layers"])
def test_two_rounds_of_sketches(case, options):
    clients = cohort(CASES[case])
    updates = with_ids(clients)
    roster = roster_of(updates)
    out, columns = clients[0].B.shape[-2], clients[0].A.shape[-1]
    largest = min(sum(c.rank for c in clients), out, columns)
    wanted = {"full": largest, None: max(c.rank for c in clients)}
    wanted = min(wanted.get(options.get("rank"), options.get("rank")), largest)
    g = torch.Generator().manual_seed(0)
    omega = torch.randn(columns, min(wanted + 8, largest), generator=g, dtype=F64)
    first = [linear_message(u, "fedask", roster, omega=omega, **options) for u in updates]
    assert len({m["sketch"].shape for m in first}) == 1
    Q = basis(added(first)["sketch"])
    second = [linear_message(u, "fedask", roster, basis=Q, **options) for u in updates]
    assert len({m["projection"].shape for m in second}) == 1
    result = from_sum(added(second), "fedask", roster, basis=Q, **options)
    whole = aggregate(updates, "fedask", **options)
    assert result.rank == whole.rank == wanted
    assert (result.nested, result.slotted) == (whole.nested, whole.slotted)
    # As in the test of clients.sketch: rounding over the smallest singular value of the sketch,
    # and over the gap below the rank.
    values = np.linalg.svd(array(whole.factors.dense()), compute_uv=False)
    sketches = np.linalg.svd(array(added(first)["sketch"]), compute_uv=False)
    sensitivity = (sketches[..., 0] / sketches[..., -1]).max()
    exact = np.linalg.svd(sum(c.n * c.update() for c in clients), compute_uv=False)
    if wanted < exact.shape[-1]:
        sensitivity += (exact[..., 0] / (exact[..., wanted - 1] - exact[..., wanted])).max()
    gate = recompressed_gate_of(F64, clients) * (1 + sensitivity)
    assert distance(dense(result.factors), dense(whole.factors)) <= gate
    assert distance(result.singular_values, values[..., :wanted]) <= gate


def test_sketches_make_up_for_missing_clients():
    updates = with_ids(cohort(CASES["thin"]))
    roster = roster_of(updates)
    g = torch.Generator().manual_seed(0)
    omega = torch.randn(30, 5, generator=g, dtype=F64)
    one = updates[1]
    Q = basis(linear_message(one, "fedask", roster, omega=omega)["sketch"])
    second = linear_message(one, "fedask", roster, basis=Q)
    result = from_sum(second, "fedask", roster, basis=Q, present=["c1"], rank="full")
    expected = one.scaling * (one.B @ one.A)
    assert distance(result.factors.dense(), expected) <= 1e-12


# --- what does not fit --------------------------------------------------------------------------

ROSTER = [("a", 1, 1.0), ("b", 2, 3.0)]


def one(**changes):
    return replace(ClientUpdate(torch.ones(1, 2), torch.ones(3, 1), id="a"), **changes)


@pytest.mark.parametrize(
    ("update", "why"),
    [
        (one(id=None), "expected an update with the id it has in the roster"),
        (one(id="z"), "client 'z' is not in the roster"),
        (one(weight=2.0), "client 'a' has weight 2.0, the roster says 1.0"),
        (one(slots=[1]), r"client 'a' has slots \(1,\), the roster says \(0,\)"),
        (one(id="b", weight=3.0), "client 'b' has rank 1, the roster says 2"),
        (one(A=torch.full((1, 2), math.nan)), "NaN or Inf entries.*leave this client out"),
    ],
)
def test_a_client_must_be_what_the_roster_says(update, why):
    with pytest.raises(InputValueError, match=why):
        linear_message(update, "rbla", ROSTER)


@pytest.mark.parametrize(
    ("roster", "why"),
    [
        ([("a", 1)], "roster: expected .id, rank, weight. or"),
        ([(None, 1, 1.0)], "roster: expected .id, rank, weight. or"),
        ("ab", "roster: expected "),
        ([("a", 0, 1.0)], "rank of client 'a': expected an integer of at least 1"),
        ([("a", 1, 1.0), ("a", 1, 1.0)], "id 'a' is given to more than one client"),
        ([("a", 1, -1.0)], "the roster.*weight: expected a finite number"),
        ([("a", 1, 0.0)], "roster: every client has weight 0"),
        ([], "the roster.*: no client updates"),
    ],
)
def test_a_roster_that_is_none(roster, why):
    with pytest.raises((InputValueError, InputTypeError), match=why):
        linear_message(one(), "rbla", roster)


def test_a_client_of_weight_0_sends_nothing():
    with pytest.raises(InputValueError, match="has weight 0 there"):
        linear_message(one(weight=0.0), "rbla", [("a", 1, 0.0), ("b", 2, 3.0)])


def test_coefficients_computed_from_updates_cannot_be_known():
    with pytest.raises(InputValueError, match="weighting= is a function of the updates"):
        linear_message(one(), "zeropad", ROSTER, weighting=lambda c: c.weight)


def test_messages_take_what_their_method_takes():
    with pytest.raises(InputTypeError, match=r"takes omega= or basis="):
        linear_message(one(), "fedask", ROSTER)
    with pytest.raises(InputTypeError, match=r"takes neither omega= nor basis="):
        linear_message(one(), "rbla", ROSTER, omega=torch.ones(2, 1))
    with pytest.raises(InputTypeError, match="unknown option"):
        linear_message(one(), "rbla", ROSTER, flor=0.5)


def test_a_sum_must_be_of_these_messages():
    good = {"A": torch.ones(2, 2), "B": torch.ones(3, 2)}
    assert from_sum(good, "rbla", ROSTER).rank == 2
    for summed, why in (
        ({"A": good["A"]}, r"expected the sum of \['A', 'B'\], got \['A'\]"),
        (good | {"A": torch.ones(3, 2)}, "with n_slots = 2, as the roster has them"),
        (good | {"A": torch.ones(4, 2, 2)}, "with n_slots = 2"),
        (good | {"A": torch.ones(2, 2).long()}, "A: expected a floating torch tensor"),
        (good | {"A": torch.full((2, 2), math.inf)}, "NaN or Inf in the sum"),
        (None, "got NoneType"),
    ):
        with pytest.raises((InputValueError, InputTypeError), match=why):
            from_sum(summed, "rbla", ROSTER)
    with pytest.raises(InputTypeError, match="frozen=: expected A"):
        from_sum({"B": good["B"]}, "ffa", ROSTER)
    with pytest.raises(InputTypeError, match="frozen=: this method sends both factors"):
        from_sum(good, "rbla", ROSTER, frozen=good["A"])
    with pytest.raises(InputValueError, match="with the width of the projections"):
        from_sum({"projection": torch.ones(2, 2)}, "fedask", ROSTER, basis=torch.ones(3, 1))


# --- fixed point --------------------------------------------------------------------------------


def clipped_messages(K, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, (K, 2, 3))
    return [{"A": torch.from_numpy(x), "B": torch.from_numpy(x.T.copy())} for x in values]


def trees(items):
    """Every way to add up a list in pairs without changing its order."""
    if len(items) == 1:
        yield items[0]
    for cut in range(1, len(items)):
        for left in trees(items[:cut]):
            for right in trees(items[cut:]):
                yield {name: left[name] + right[name] for name in left}


def test_every_order_and_every_tree_gives_the_same_bits():
    K, bits = 5, most_bits(5, 1.0)
    fixed = [to_fixed(m, bits=bits, clients=K, largest=1.0) for m in clipped_messages(K)]
    # With Python's integers, which know no overflow.
    expected = {
        name: np.sum([m[name].numpy().astype(object) for m in fixed], axis=0) for name in "AB"
    }
    seen = 0
    for order in itertools.permutations(fixed):
        for total in trees(list(order)) if seen < 14 * 24 else [added(list(order))]:
            seen += 1
            for name in "AB":
                assert (total[name].numpy().astype(object) == expected[name]).all()
    assert seen >= 120
    # Floating sums are not of that kind, or there would be nothing to show.
    floats = {float(added(list(o))["A"].sum()) for o in itertools.permutations(clipped_messages(K))}
    assert len(floats) > 1


def masked(fixed, seed=0):
    """Each pair of clients draws one mask over all of Z₂⁶⁴; one adds it, the other takes it off."""
    g = torch.Generator().manual_seed(seed)
    low, high = -(2**63), 2**63 - 1
    sent = [{name: X.clone() for name, X in m.items()} for m in fixed]
    for i, j in itertools.combinations(range(len(fixed)), 2):
        for name in fixed[0]:
            mask = torch.randint(low, high, fixed[0][name].shape, generator=g)
            sent[i][name] += mask
            sent[j][name] -= mask
    return sent


def test_masks_that_cancel_leave_the_sum_bit_for_bit():
    K, bits = 4, most_bits(4, 1.0)
    fixed = [to_fixed(m, bits=bits, clients=K, largest=1.0) for m in clipped_messages(K)]
    sent = masked(fixed)
    plain = added(fixed)
    assert all((s["A"] != f["A"]).all() for s, f in zip(sent, fixed, strict=True))
    for order in itertools.permutations(sent):
        for total in trees(list(order)):
            assert all(torch.equal(total[name], plain[name]) for name in "AB")


@given(
    seed=st.integers(0, 2**32 - 1),
    K=st.integers(1, 6),
    below=st.integers(0, 60),
    largest=st.floats(1e-3, 1e6),
)
def test_the_error_is_half_a_step_per_client(seed, K, below, largest):
    bits = most_bits(K, largest) - below
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, (K, 7)) * largest
    fixed = [
        to_fixed({"x": torch.from_numpy(v)}, bits=bits, clients=K, largest=largest) for v in values
    ]
    total = from_fixed(added(fixed), bits=bits)["x"]
    step = Fraction(2) ** -bits
    for i in range(7):
        exact = sum(Fraction(float(v[i])) for v in values)
        off = abs(Fraction(float(total[i])) - exact)
        # Reading the integer as float64 may round once more.
        assert off <= K * step / 2 + abs(exact + K * step) * Fraction(1, 2**53)
        for k in range(K):
            sent = Fraction(int(fixed[k]["x"][i])) * step
            assert abs(sent - Fraction(float(values[k][i]))) <= step / 2


@given(K=st.integers(1, 10**6), largest=st.floats(1e-30, 1e30))
def test_the_most_bits_are_the_most(K, largest):
    bits = most_bits(K, largest)
    need = lambda b: K * (Fraction(largest) * Fraction(2) ** b + Fraction(1, 2))  # noqa: E731
    assert need(bits) < 2**63 <= need(bits + 1)


def test_rounding_up_is_room_too():
    # 2^40 messages of just under 1: at 23 bits each is rounded up to 2^23, and the sum is 2^63.
    largest = 1 - 2.0**-53
    assert round(Fraction(largest) * 2**23) * 2**40 == 2**63
    assert most_bits(2**40, largest) == 22


def test_the_largest_messages_there_can_be_do_not_overflow():
    for K in (1, 2, 3, 7, 1000):
        bits = most_bits(K, 1.0)
        for sign in (1.0, -1.0):
            one = to_fixed({"x": torch.tensor([sign], dtype=F64)}, bits=bits, clients=K, largest=1)
            whole = int(one["x"]) * K
            assert abs(whole) < 2**63
            total = torch.tensor(0)
            for _ in range(K):
                total = total + one["x"]
            assert int(total) == whole


def test_overflow_is_refused_before_anything_is_encoded():
    message = {"x": torch.tensor([1.0])}
    most = most_bits(100, 1.0)
    assert most == 56
    with pytest.raises(InputValueError, match=f"overflow 64 bits at 57; expected at most {most}"):
        to_fixed(message, bits=57, clients=100, largest=1.0)
    with pytest.raises(InputValueError, match=r"x has an entry above largest = 0.5; clip"):
        to_fixed(message, bits=8, clients=100, largest=0.5)
    with pytest.raises(InputValueError, match="NaN or Inf"):
        to_fixed({"x": torch.tensor([math.inf])}, bits=8, clients=100, largest=0.5)
    with pytest.raises(InputTypeError, match="floating tensor"):
        to_fixed({"x": torch.tensor([1])}, bits=8, clients=100, largest=0.5)
    with pytest.raises(InputTypeError, match="int64 tensor"):
        from_fixed({"x": torch.tensor([1.0])}, bits=8)
    with pytest.raises(InputTypeError, match="expected a floating dtype"):
        from_fixed({"x": torch.tensor([1])}, bits=8, dtype=torch.int32)
    with pytest.raises(InputValueError, match="leave no room"):
        most_bits(2**63, 1.0)
    with pytest.raises(InputValueError, match="clients=: expected an integer of at least 1"):
        most_bits(0, 1.0)


def test_halves_go_to_even_and_grids_may_be_coarse():
    x = torch.tensor([0.5, 1.5, -0.5, -2.5, 6.0])
    assert to_fixed({"x": x}, bits=0, clients=2, largest=8)["x"].tolist() == [0, 2, 0, -2, 6]
    assert to_fixed({"x": x}, bits=-2, clients=2, largest=8)["x"].tolist() == [0, 0, 0, -1, 2]
    assert from_fixed({"x": torch.tensor([3])}, bits=-2)["x"].tolist() == [12.0]
    assert from_fixed({"x": torch.tensor([3])}, bits=1, dtype=torch.float32)["x"].tolist() == [1.5]


@pytest.mark.parametrize("name", ["rbla", "ffa"])
def test_from_updates_through_masks_to_the_result(name):
    clients, frozen = common_factor(cohort(CASES["tall"]), name)
    updates = with_ids(clients)
    roster, K = roster_of(updates), len(updates)
    sent = [linear_message(u, name, roster) for u in updates]
    largest = max(float(X.abs().max()) for m in sent for X in m.values())
    fixed = masked([to_fixed(m, bits=40, clients=K, largest=largest) for m in sent])
    still = None if frozen is None else torch.from_numpy(frozen)
    result = from_sum(from_fixed(added(fixed), bits=40), name, roster, frozen=still)
    whole = aggregate(updates, name)
    # K/2 steps per entry of the factors that were sent, and their rounding in float64.
    step = K / 2 * 2.0**-40 + 1e-14
    assert np.abs(array(result.B) - array(whole.B)).max() <= step
    assert np.abs(array(result.A) - array(whole.A)).max() <= (step if "A" in sent[0] else 0.0)


def test_slots_of_a_large_layer_need_no_large_ranks():
    slots = {"a": (3, 11), "b": (0, 15), "c": (7, 11)}
    g = torch.Generator().manual_seed(8)
    updates = [
        ClientUpdate(
            torch.randn(2, 64, generator=g, dtype=torch.float64),
            torch.randn(48, 2, generator=g, dtype=torch.float64),
            slots=own,
            id=name,
        )
        for name, own in slots.items()
    ]
    roster = [(name, 2, 1, own) for name, own in slots.items()]
    for method in ("plora", "hafl", "rbla"):
        messages = [linear_message(u, method, roster) for u in updates]
        total = {name: sum(m[name] for m in messages) for name in messages[0]}
        found, expected = from_sum(total, method, roster), aggregate(updates, method)
        assert torch.allclose(found.A, expected.A, rtol=1e-14, atol=0.0)
        assert torch.allclose(found.B, expected.B, rtol=1e-14, atol=0.0)
