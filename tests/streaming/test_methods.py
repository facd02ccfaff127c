"""Every method that streams gives what the one-shot call gives, whatever the order and the tree."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from hetlora_agg import METHODS, ClientUpdate, LowRank, aggregate, aggregate_layers
from hetlora_agg.errors import InputValueError
from hetlora_agg.streaming import RunningAggregate, alike
from states import state_for
from streamed import (
    LEVELS,
    STREAMING,
    assert_same,
    clients_for,
    filled,
    in_double,
    one_shot,
    options_for,
    scale_of,
    told_for,
    total64,
)

DIVIDED = [name for name in STREAMING if METHODS[name].options and name in ("rb", "raflora")]


def levels_for(name):
    return {"levels": LEVELS} if name in ("rb", "raflora") else {}


@pytest.mark.parametrize("name", STREAMING)
def test_sums_give_the_one_shot_result(name):
    clients = clients_for(name)
    running = filled(name, clients, **levels_for(name))
    assert running._state.kept is None, "the clients must not all be kept, or nothing is tested"
    options = levels_for(name) if name == "raflora" else {}
    assert_same(running.result(), one_shot(name, clients, **options), clients)


def one_at_a_time(running, clients, monkeypatch):
    """Results and bounds must not depend on how many layers are worked on together."""
    bound, whole = running.bound, running.result()
    monkeypatch.setattr(alike, "AT_ONCE", 0)
    assert_same(running.result(), whole, clients, gate=1e-13)
    assert list(running.bound) == list(bound)
    for layer, value in running.bound.items():
        assert torch.allclose(value, bound[layer], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("count", [33, 43])
def test_layers_one_at_a_time_give_the_same_result(name, count, monkeypatch):
    # Of 33 clients some wait for their product, of 43 others.
    clients = clients_for(name, count)
    one_at_a_time(filled(name, clients, **levels_for(name)), clients, monkeypatch)


ALIKE = {"q": (60, 70), "k": (60, 70), "v": (60, 70)}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hetlora", {"per_layer": True}),
        ("flexlora", {"memory_limit": 90_000}),
        ("flexlora", {"rank": 3, "reduction": "unbiased", "u": torch.tensor([0.1, 0.5, 0.9])}),
        ("rb", {"levels": LEVELS, "previous": True}),
        ("zeropad", {"missing": "zero"}),
        ("zeropad", {"missing": "renormalise"}),
    ],
)
def test_layers_of_one_size_one_at_a_time_under_options(name, told, monkeypatch):
    clients = clients_for(name, 120, sizes=ALIKE)
    if "previous" in told:
        before = filled(name, clients_for(name, 120, seed=1, sizes=ALIKE), levels=LEVELS)
        told = {**told, "previous": before.result()}
    if "missing" in told:
        clients[3] = {"q": clients[3]["q"], "v": clients[3]["v"]}
    running = filled(name, clients, **told)
    assert len(running._state.groups) == 1
    assert (running._state.most is not None) == ("memory_limit" in told)
    one_at_a_time(running, clients, monkeypatch)


@pytest.mark.parametrize("name", [n for n in STREAMING if "mixed_ranks" in METHODS[n].claims])
def test_layers_of_one_size_may_differ_in_rank(name):
    # Their sums lie side by side, as wide as the widest, or as a client that counts for nothing.
    clients = clients_for(name)
    for k, own in enumerate(clients):
        u = own["k"]
        if k == 2:
            clients[k] = {layer: replace(one, weight=0) for layer, one in own.items()}
        elif u.A.shape[0] > 1:
            half = u.A.shape[0] // 2
            clients[k] = own | {"k": replace(u, A=u.A[:half], B=u.B[:, :half])}
    running = filled(name, clients, **levels_for(name))
    assert running._state.kept is None
    options = levels_for(name) if name == "raflora" else {}
    assert_same(running.result(), one_shot(name, clients, **options), clients)


@pytest.mark.parametrize("name", STREAMING)
def test_kept_clients_give_the_one_shot_result_bit_for_bit(name):
    clients = clients_for(name, count=2, dtype=torch.float32, sizes={"q": (40, 50)}, ranks=[4, 4])
    running = filled(name, clients, **levels_for(name))
    if name not in ("flora", "flexlora", "rb", "raflora", "fedask"):
        # Sums of factors are smaller than two clients of the same rank; the bound is the size.
        running._state.kept or pytest.skip("summed already")
    layers = {"q": [own["q"] for own in clients]}
    options = levels_for(name) if name == "raflora" else {}
    expected = aggregate_layers(layers, name, **(state_for(name) | options))
    found = running.result()
    assert torch.equal(found["q"].A, expected["q"].A)
    assert torch.equal(found["q"].B, expected["q"].B)
    assert found["q"].A.dtype == torch.float32


@pytest.mark.parametrize("name", STREAMING)
def test_every_order_gives_one_answer(name):
    clients = clients_for(name, count=31)
    expected = one_shot(name, clients, **(levels_for(name) if name == "raflora" else {}))
    for order in itertools.islice(itertools.permutations(range(5)), 1, 120, 77):
        running = filled(name, [*(clients[k] for k in order), *clients[:4:-1]], **levels_for(name))
        assert_same(running.result(), expected, clients)


@pytest.mark.parametrize("name", STREAMING)
def test_every_tree_of_merges_gives_one_answer(name):
    clients = clients_for(name, count=34)
    told = levels_for(name)
    expected = one_shot(name, clients, **(told if name == "raflora" else {}))

    def part(a, b):
        return filled(name, clients[a:b], **told)

    left = part(0, 1)
    for a, b in ((1, 3), (3, 12), (12, 34)):
        left.merge(part(a, b))
    right = part(20, 34)
    for a, b in ((12, 20), (2, 12), (0, 2)):
        other = part(a, b)
        other.merge(right)
        right = other
    one, two = part(0, 14), part(14, 34)
    one.merge(two)
    for running in (left, right, one):
        assert_same(running.result(), expected, clients)
    # The other side is as it was.
    assert_same(two.result(), filled(name, clients[14:], **told).result(), clients, gate=0)


@pytest.mark.parametrize("name", STREAMING)
def test_a_result_changes_nothing(name):
    clients = clients_for(name)
    running, untouched = (filled(name, clients[:9], **levels_for(name)) for _ in range(2))
    running.result(), running.bound
    for own in clients[9:]:
        for one in (running, untouched):
            one.add(own, id=own["q"].id)
    for layer, found in running.result().items():
        assert torch.equal(found.A, untouched.result()[layer].A)
        assert torch.equal(found.B, untouched.result()[layer].B)


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("missing", ["zero", "renormalise"])
def test_missing_layers(name, missing):
    clients = clients_for(name, count=31)
    for k, gone in ((1, "q"), (4, "v"), (7, "q"), (8, "k"), (13, "v")):
        del clients[k][gone]
    # The first client lacks one too: the layer turns up later.
    first = clients[0].pop("v")
    told = levels_for(name)
    running = filled(name, clients, missing=missing, **told)
    assert first is not None
    assert running._state.kept is None
    options = told if name == "raflora" else {}
    expected = one_shot(name, clients, missing=missing, **options)
    assert_same(running.result(), expected, clients)
    halves = [filled(name, clients[a:b], missing=missing, **told) for a, b in ((0, 7), (7, 31))]
    halves[1].merge(halves[0])
    found = halves[1].result()
    assert_same({layer: found[layer] for layer in expected}, expected, clients)


NARROW = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("name", "dtype"), [*zip(STREAMING, NARROW * 6, strict=False)])
def test_narrow_dtypes_are_summed_in_float64(name, dtype):
    clients = clients_for(name, dtype=dtype)
    running = filled(name, clients, **levels_for(name))
    assert running._state.kept is None
    expected = one_shot(name, clients, **(levels_for(name) if name == "raflora" else {}))
    found = running.result()
    eps = torch.finfo(dtype).eps
    for layer, result in found.items():
        assert result.A.dtype == dtype
        # Both factors are cast once.
        error = np.linalg.norm(total64(result) - total64(expected[layer]))
        B, A = expected[layer].B.norm(), expected[layer].A.norm()
        residual = expected[layer].residual
        more = 0 if residual is None else float(residual.A.norm() * residual.B.norm())
        assert error <= 2 * eps * (float(B * A) + more)


@pytest.mark.parametrize("name", STREAMING)
def test_float32_is_exact_before_the_cast(name, monkeypatch):
    """With scalings that float32 cannot fold exactly the sums are those of the float64 call."""
    clients = clients_for(name, dtype=torch.float32)
    running = filled(name, clients, **levels_for(name))
    running._state.dtypes = dict.fromkeys(running._state.dtypes, torch.float64)
    options = levels_for(name) if name == "raflora" else {}
    assert_same(running.result(), one_shot(name, clients, **options), clients)


@pytest.mark.parametrize("name", STREAMING)
def test_leading_dimensions(name):
    clients = clients_for(name, count=31, layers=(2, 3))
    running = filled(name, clients, **levels_for(name))
    assert running._state.kept is None
    options = levels_for(name) if name == "raflora" else {}
    assert_same(running.result(), one_shot(name, clients, **options), clients)


@pytest.mark.parametrize("name", STREAMING)
def test_one_update_and_numpy(name):
    clients = clients_for(name, sizes={"q": (9, 7)})
    running = RunningAggregate(name, **(told_for(name) | options_for(name) | levels_for(name)))
    for own in clients:
        u = own["q"]
        running.add(replace(u, A=u.A.numpy(), B=u.B.numpy()), id=u.id)
    options = levels_for(name) if name == "raflora" else {}
    updates = [in_double(own["q"]) for own in clients]
    expected = aggregate(updates, name, **(state_for(name) | options))
    found = running.result()
    assert isinstance(found.A, np.ndarray)
    assert_same({"q": found}, {"q": expected}, clients)
    assert running.bound.shape == ()


SLOTTED = ("hafl", "plora", "rbla", "fedsa", "zeropad", "hetlora", "flora", "flexlora", "fedex")


@pytest.mark.parametrize("name", SLOTTED)
def test_explicit_slots(name):
    clients = clients_for(name, count=33)
    chosen = {1: [(3,), (0,), (2,)], 2: [(1, 3), (2, 0), (0, 1)], 4: [(3, 1, 0, 2), (0, 1, 2, 3)]}
    slotted = []
    for k, own in enumerate(clients):
        row = {}
        for i, (layer, u) in enumerate(own.items()):
            options = chosen[u.A.shape[-2]]
            row[layer] = replace(u, slots=options[(k // 3 + i) % len(options)])
        slotted.append(row)
    running = filled(name, slotted)
    assert running._state.kept is None
    assert_same(running.result(), one_shot(name, slotted), slotted)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rb", {"floor": 0.4}),
        ("rb", {"quorum": 9}),
        ("rb", {"align": "svd"}),
        ("rb", {"energy": 0.7}),
        ("rb", {"totals": [90.0, 80.0, 70.0, 60.0]}),
        ("raflora", {"floor": 0.4}),
        ("raflora", {"quorum": 9}),
        ("rbla", {"floor": 0.4}),
        ("hafl", {"quorum": 9}),
        ("plora", {"weighting": "examples", "floor": 0.2}),
        ("plora", {"weighting": "uniform", "quorum": 9}),
        ("shared_a", {"floor": 0.4}),
        ("hetlora", {"per_layer": True}),
        ("flexlora", {"weighting": "uniform", "rank": 3}),
        ("flexlora", {"total": 200.0}),
        ("flexlora", {"fold_rest": True}),
        ("flexlora", {"energy": 0.8}),
        ("flora", {"total": 200.0}),
        ("fedex", {"weighting": "uniform"}),
        ("fedex", {"total": 200.0}),
        ("fedask", {"rank": 2, "sketch": 6}),
        ("zeropad", {"weighting": "uniform"}),
    ],
)
def test_options(name, options):
    clients = clients_for(name)
    told = {} if "totals" in options else levels_for(name)
    running = filled(name, clients, **told, **options)
    assert running._state.kept is None
    levels = told if name == "raflora" else {}
    expected = one_shot(name, clients, **levels, **options)
    assert_same(running.result(), expected, clients)
    for layer, found in running.result().items():
        if found.singular_values is not None and "fold_rest" not in options:
            r = min(found.rank, expected[layer].rank)
            gap = found.singular_values[:r] - expected[layer].singular_values[:r]
            assert float(gap.abs().max()) <= 1e-10 * scale_of(clients, layer)


@pytest.mark.parametrize("name", ["rb", "raflora", "rbla", "hafl", "plora", "shared_a"])
def test_slots_that_nobody_filled_are_carried_over(name):
    """With a quorum and last round's factors, through sums too."""
    clients = clients_for(name, ranks=[1, 1, 2, 1] * 16)
    g = torch.Generator().manual_seed(5)
    previous = {
        layer: LowRank(
            torch.randn(4, u.A.shape[-1], generator=g, dtype=torch.float64),
            torch.randn(u.B.shape[-2], 4, generator=g, dtype=torch.float64),
        )
        for layer, u in clients[0].items()
    }
    options = {"previous": previous, "quorum": 17}
    told = {"levels": LEVELS} if name in ("rb", "raflora") else {}
    running = filled(name, clients, **told, **options)
    assert running._state.kept is None
    levels = told if name == "raflora" else {}
    expected = one_shot(name, clients, **levels, **options)
    assert expected["q"].dropped == (1,)
    assert_same(running.result(), expected, clients)


@pytest.mark.parametrize("name", ["hetlora"])
@pytest.mark.parametrize("zeros", [range(33), (0, 4, 5), (32,)])
def test_updates_of_norm_zero(name, zeros):
    """Before training B is zero on every client: then, and only then, all count alike."""
    clients = clients_for(name)
    for k in zeros:
        clients[k] = {layer: replace(u, B=u.B * 0) for layer, u in clients[k].items()}
    running = filled(name, clients)
    expected, found = one_shot(name, clients), running.result()
    for layer in expected:
        assert torch.allclose(found[layer].A, expected[layer].A, rtol=1e-10, atol=1e-12)
        assert torch.allclose(found[layer].B, expected[layer].B, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["hetlora"])
def test_norms_of_single_layers_may_be_zero(name):
    clients = clients_for(name)
    for k in range(33):
        clients[k]["q"] = replace(clients[k]["q"], B=clients[k]["q"].B * (k % 4 > 0))
        clients[k]["v"] = replace(clients[k]["v"], B=clients[k]["v"].B * 0)
    running = filled(name, clients, per_layer=True)
    expected, found = one_shot(name, clients, per_layer=True), running.result()
    for layer in expected:
        assert torch.allclose(found[layer].A, expected[layer].A, rtol=1e-10, atol=1e-12)
        assert torch.allclose(found[layer].B, expected[layer].B, rtol=1e-10, atol=1e-12)


def test_norms_of_single_layers_may_differ_as_far_as_float64_goes_and_no_further():
    def scaled(size):
        return [
            {**own, "q": replace(own["q"], A=own["q"].A * size, B=own["q"].B * size)}
            for own in clients_for("hetlora")
        ]

    near = scaled(1e-50)
    assert_same(
        filled("hetlora", near, per_layer=True).result(),
        one_shot("hetlora", near, per_layer=True),
        near,
    )
    far = filled("hetlora", scaled(1e-70), per_layer=True)
    for ask in (far.result, lambda: far.bound):
        with pytest.raises(InputValueError, match=r"layers of 9×7: .* less than 1e-120"):
            ask()


@pytest.mark.parametrize("name", ["flexlora", "zeropad", "rbla"])
@pytest.mark.parametrize("weights", [(1e308, 1.0), (5e-324, 1.0), (5e-324, 5e-324), (1e300, 1e308)])
def test_weights_at_both_ends(name, weights):
    clients = clients_for(name)
    for k, own in enumerate(clients):
        for layer, u in own.items():
            own[layer] = replace(u, weight=weights[k % 2])
    expected = one_shot(name, clients)
    for order in (clients, clients[::-1]):
        found = filled(name, order).result()
        for layer in expected:
            X, Y = total64(found[layer]), total64(expected[layer])
            assert np.linalg.norm(X - Y) <= 1e-10 * max(
                np.linalg.norm(u.A) * np.linalg.norm(u.B) for u in (own[layer] for own in clients)
            )


@pytest.mark.parametrize("name", ["flexlora", "zeropad"])
@pytest.mark.parametrize("ratio", [2.0**-9, 3e7])
def test_merging_sums_of_other_magnitudes(name, ratio):
    """Masses are held relative to a power of two of each side's own."""
    clients = clients_for(name, count=70)
    for own in clients[35:]:
        for layer, u in own.items():
            own[layer] = replace(u, weight=u.weight * ratio)
    expected = one_shot(name, clients)
    one, two = (filled(name, part) for part in (clients[:35], clients[35:]))
    for running in (one, two):
        assert all(group.added.terms for group in running._state.groups.values())
    two.merge(one)
    one.merge(filled(name, clients[35:]))
    for running in (one, two):
        assert_same(running.result(), expected, clients)


@pytest.mark.parametrize("before", [0, 7])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_weight_zero_and_excluded_clients_leave_no_trace_but_their_names(before, weighting):
    """Whether they come while everybody is kept or later."""
    clients = clients_for("flexlora")
    odd = clients_for("flexlora", seed=9, ranks=[1, 1, 4])
    for k, own in enumerate(odd):
        for layer, u in own.items():
            own[layer] = replace(u, id=100 + k, weight=0 if k == 0 else 1)
    odd[1]["v"].A[0, 0] = float("nan")
    registered = dict.fromkeys([*range(33), 100, 101], 4) | {102: 2}
    told = {"on_bad_client": "drop", "max_rank": registered, "weighting": weighting}
    running = filled("flexlora", clients[:before], **told)
    assert (running._state.kept is None) == (before > 0)
    for own in (*odd, *clients[before:]):
        assert running.add(own, id=own["q"].id) == (own["q"].id < 100)
    found = running.result()
    expected = one_shot("flexlora", clients, weighting=weighting)
    for layer, result in found.items():
        assert dict(result.excluded).keys() == {101, 102}
        found[layer] = replace(result, excluded=())
    assert_same(found, expected, clients)


def test_a_share_that_nobody_foresaw_is_an_error_not_a_result():
    running = filled("flexlora", clients_for("flexlora"))
    running._settings = replace(running._settings, entry=METHODS["rb"])
    with pytest.raises(InputValueError, match="was not known when they were added"):
        running.result()


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(STREAMING)))
def test_methods_that_need_everybody_say_so(name):
    state = {k: v for k, v in state_for(name).items() if k != "round"}
    with pytest.raises(InputValueError, match=f"{name!r} looks at all clients at once.*'flexlora'"):
        RunningAggregate(name, **(told_for(name) | state))


def test_generators_draw_what_they_draw_in_one_call():
    clients = clients_for("fedask")
    found = filled("fedask", clients, rank=1, sketch=2, generator=torch.Generator().manual_seed(3))
    expected = one_shot(
        "fedask", clients, rank=1, sketch=2, generator=torch.Generator().manual_seed(3)
    )
    assert_same(found.result(), expected, clients)
    assert_differs(found.result(), expected)


def assert_differs(found, expected):
    """A generator moves on with every result."""
    assert np.linalg.norm(total64(found["q"]) - total64(expected["q"])) > 1e-3


def test_ranks_that_differ_by_layer():
    ranks = {"q": [1, 2, 4], "k": [4, 1, 2], "v": [2, 4, 1]}
    for name in ("rb", "zeropad", "replicate", "flexlora", "hetlora"):
        columns = {
            layer: clients_for(name, ranks=ranks[layer] * 11, sizes={layer: (9, 7)}, seed=i)
            for i, layer in enumerate(ranks)
        }
        clients = [{layer: columns[layer][k][layer] for layer in ranks} for k in range(33)]
        running = filled(name, clients, **levels_for(name))
        assert running._state.kept is None
        assert_same(running.result(), one_shot(name, clients), clients)


def test_two_clients_of_one_layer_by_hand():
    """(1·1·[1 0] + 3·2·[1 1]) / 4 = [1.75 1.5] in the first row."""
    running = RunningAggregate("flora", memory_limit=10**6)
    A, B = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
    running.add(ClientUpdate(A, B, weight=1), id="a")
    running.add(ClientUpdate(torch.ones(1, 2), 2 * B, weight=3), id="b")
    total = running.result().total().dense()
    assert total.tolist() == [[1.75, 1.5], [0.0, 0.0]]
