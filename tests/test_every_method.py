"""The contract every registered method keeps, whatever it computes."""

import inspect
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from hetlora_agg import METHODS, AggregationResult, ClientUpdate, aggregate, aggregate_layers
from hetlora_agg.intake import collect
from hetlora_agg.linalg import svd_product
from hetlora_agg.testing import client_updates
from hetlora_agg.validation import read_updates
from reference import Client, by_layer, total
from states import common_of, fitting, run, state_for, without_chance
from tolerance import averaged_gate, distance, shared_gate_of

NAMES = sorted(METHODS)

UNDERFLOW = 1e-30
"""What may be lost below float32's smallest number, 1e-45, in sums of up to 1e15 such terms; the
entries that hypothesis draws are many orders above it."""


def streams(name, layers):
    """A generator for each layer, seeded with its number, for methods that draw."""
    seeded = [torch.Generator().manual_seed(i) for i in layers]
    return {"generator": seeded} if "generator" in METHODS[name].needs else {}


def untruncated(name):
    """Options under which nothing is cut off, so that the result is the method's whole formula."""
    return {"rank": "full"} if "rank" in METHODS[name].options else {}


def layer_by_layer(name):
    """Options under which a layer's result depends on that layer alone."""
    return {"per_layer": True} if METHODS[name].statistic else {}


def takes_mixed(name):
    return "mixed_ranks" in METHODS[name].claims


def updates_for(name, layers=(), dtype=torch.float64, seed=0):
    ranks = (2, 4, 3, 4) if takes_mixed(name) else (3, 3, 3, 3)
    g = torch.Generator().manual_seed(seed)
    weights, scalings = (3, 5, 8, 2), (1.0, 2.0, 0.5, 1.0)
    updates = [
        ClientUpdate(
            torch.randn(*layers, r, 11, generator=g).to(dtype),
            torch.randn(*layers, 13, r, generator=g).to(dtype),
            weight=n,
            scaling=s,
            id=f"client-{k}",
        )
        for k, (r, n, s) in enumerate(zip(ranks, weights, scalings, strict=True))
    ]
    return fitting(name, updates)


def same(one, other):
    """Bit for bit."""
    pairs = [(one.A, other.A), (one.B, other.B)]
    if one.residual is not None:
        pairs += [(one.residual.A, other.residual.A), (one.residual.B, other.residual.B)]
    return all(torch.equal(x, y) for x, y in pairs)


def oracle_of(name, dtype):
    """The method's oracle as a function of clients alone, nothing cut off, in a first round."""
    oracle = reference.of(name)
    known = {**state_for(name), **untruncated(name), **layer_by_layer(name), "drop": 0.0}
    known["dtype"] = dtype
    parameters = inspect.signature(oracle).parameters
    taken = {k: v for k, v in known.items() if k in parameters}
    if "keep" in parameters:
        return lambda clients: oracle(clients, keep=[1.0] * len(clients), **taken)
    return partial(oracle, **taken)


def sensitivity(oracle, layer, dtype):
    """How far the oracle itself moves for input that moves by ε of its norm, in any direction.

    Methods that choose directions or entries by size have no bound of their own: they are as
    sensitive as the gaps they find. A backward stable computation is the exact one of such input;
    for methods without gaps this is a few ε of the clients' size. Noise of ε‖X‖ on every entry
    moves a linear map by ε‖X‖ times its Frobenius norm in the mean square, so by no less than the
    worst direction does; one draw may miss that direction, eight in a row do not.
    """
    rng = np.random.default_rng(0)
    squares, exact = [], oracle(layer)
    for _ in range(8):
        moved = []
        for client in layer:
            A, B = (
                X + torch.finfo(dtype).eps * np.linalg.norm(X) * rng.standard_normal(X.shape)
                for X in (client.A, client.B)
            )
            moved.append(replace(client, A=A, B=B))
        squares.append(distance(oracle(moved), exact) ** 2)
    return float(np.mean(squares)) ** 0.5


# Its property is made within: hypothesis does not see it by itself.
@pytest.mark.hypothesis
@pytest.mark.parametrize("name", NAMES)
def test_any_valid_clients_give_the_oracles_matrix(name):
    # Where entries are kept or dropped by size, rounding to float32 alone may decide; rounding to
    # float64 does so too rarely to be found.
    jumps = "density" in METHODS[name].options
    dtypes = (torch.float64,) if jumps else (torch.float32, torch.float64)

    @given(
        client_updates(
            layers=(2,),
            equal_ranks=not takes_mixed(name),
            common=common_of(name),
            dtypes=dtypes,
        )
    )
    def check(updates):
        known = {**untruncated(name), **layer_by_layer(name), **without_chance(name)}
        result = run(updates, name, **known)
        clients = [
            Client(u.A.double().numpy(), u.B.double().numpy(), u.weight, u.scaling) for u in updates
        ]
        dtype = updates[0].A.dtype
        oracle = oracle_of(name, dtype)
        assert result.A.dtype == dtype
        for index, layer, _ in by_layer(clients):
            expected = oracle(layer)
            gate = averaged_gate(dtype, layer) + shared_gate_of(dtype, layer)
            moved = sensitivity(oracle, layer, dtype)
            # Beside a jump of the method itself either side of it is right.
            assume(moved <= 1e6 * gate)
            # A stable algorithm moves its input by 10 max(out, in) ε, and by 50 ε of float64 where
            # LAPACK stops iterating.
            stops = 50 * torch.finfo(torch.float64).eps / torch.finfo(dtype).eps
            gate += (10 * max(expected.shape[-2:]) + stops) * moved
            if dtype == torch.float32:
                gate += UNDERFLOW
            assert distance(total(result)[index], expected) <= gate

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_batched_equals_per_layer(name, dtype):
    updates = updates_for(name, layers=(3, 2), dtype=dtype)
    # One layer in which all clients agree: its Gram matrix is singular, its neighbours' are not.
    for u in updates:
        r = u.A.shape[-2]
        u.A[1, 0], u.B[1, 0] = updates[1].A[1, 0, :r], updates[1].B[1, 0, :, :r].clone()
    batched = run(updates, name, **layer_by_layer(name), **streams(name, range(6))).total()
    for i, j in np.ndindex(3, 2):
        single = [ClientUpdate(u.A[i, j], u.B[i, j], None, u.weight, u.scaling) for u in updates]
        alone = run(single, name, **streams(name, [2 * i + j])).total().dense()
        error = (batched.dense()[i, j] - alone).norm()
        # Both are within 10·max(out, in)·ε·S of the method's matrix; S is a few ‖W‖ here.
        assert error <= 20 * 13 * torch.finfo(dtype).eps * alone.norm()


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_touched_and_no_gradient_is_recorded(name):
    updates = updates_for(name)
    for u in updates:
        u.A.requires_grad_(), u.B.requires_grad_()
    before = [(u.A.detach().clone(), u.B.detach().clone()) for u in updates]
    result = run(updates, name)
    assert not result.A.requires_grad
    assert not result.B.requires_grad
    for u, (A, B) in zip(updates, before, strict=True):
        assert torch.equal(u.A, A)
        assert torch.equal(u.B, B)
        assert u.A.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_repeats_and_any_order_are_bit_equal_with_ids(name):
    updates = updates_for(name)
    first = run(updates, name)
    assert same(first, run(updates, name))
    assert same(first, run(updates[::-1], name))


@pytest.mark.parametrize("name", NAMES)
def test_weight_zero_is_absent(name):
    updates = updates_for(name)
    extra = ClientUpdate(torch.ones(3, 11).double(), torch.ones(13, 3).double(), 3, 0.0, id="zz")
    assert same(run([*updates, extra], name), run(updates, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name, dtype):
    updates = updates_for(name, dtype=dtype)
    wide = [
        ClientUpdate(u.A.float(), u.B.float(), None, u.weight, u.scaling, id=u.id) for u in updates
    ]
    found, expected = run(updates, name), run(wide, name)
    assert found.A.dtype == found.B.dtype == dtype
    assert torch.equal(found.A, expected.A.to(dtype))
    assert torch.equal(found.B, expected.B.to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_numpy_in_numpy_out(name):
    updates = updates_for(name)
    arrays = [
        ClientUpdate(u.A.numpy(), u.B.numpy(), None, u.weight, u.scaling, id=u.id) for u in updates
    ]
    found, expected = run(arrays, name), run(updates, name)
    factors = [found.A, found.B]
    if found.residual is not None:
        factors += [found.residual.A, found.residual.B]
    if found.singular_values is not None:
        factors.append(found.singular_values)
    assert all(isinstance(x, np.ndarray) for x in factors)
    np.testing.assert_array_equal(found.A, expected.A.numpy())
    np.testing.assert_array_equal(total(found), total(expected))


@pytest.mark.parametrize("name", NAMES)
def test_zero_updates_give_a_zero_result(name):
    updates = [ClientUpdate(u.A, torch.zeros_like(u.B), None, u.weight) for u in updates_for(name)]
    result = run(updates, name)
    assert float(result.total().dense().abs().max()) == 0
    assert bool(torch.isfinite(result.A).all())


@pytest.mark.parametrize("name", NAMES)
def test_result_says_what_it_is(name):
    result = run(updates_for(name), name)
    assert isinstance(result, AggregationResult)
    assert result.rank == result.A.shape[-2] == result.B.shape[-1]
    assert result.shared
    assert result.shared <= {"A", "B"}
    coming = {k: 2 if k == "round" else v for k, v in state_for(name).items()}
    assert result.unscaled == METHODS[name].unscaled_factor(state_for(name))
    assert result.next_unscaled == METHODS[name].unscaled_factor(coming)
    assert result.slotted == (METHODS[name].claims.get("gauge") != {})
    assert "\n" not in repr(result)
    if result.singular_values is not None:
        S = result.singular_values
        assert S.shape == (result.rank,)
        assert bool((S[:-1] >= S[1:]).all())
        dense = svd_product(result.B, result.A).S
        assert torch.allclose(S, dense, rtol=1e-12)


class CountOperations(TorchDispatchMode):
    """Counts every tensor operation that runs inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_no_loop_over_layers(name, dtype):
    # As many operations for 40 layers as for 2: whatever loops over layers loops in a kernel.
    counts = []
    for layers in (2, 40):
        updates = updates_for(name, layers=(layers,), dtype=dtype)
        run(updates, name)
        with CountOperations() as counter:
            run(updates, name)
        counts.append(counter.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", NAMES)
def test_no_loop_over_clients(name):
    # Reading a client costs a few operations each; the method itself costs none.
    ranks = (1, 2, 2, 1) if takes_mixed(name) else (2, 2, 2, 2)
    counts = []
    for repeat in (1, 4, 7):
        g = torch.Generator().manual_seed(1)
        updates = fitting(
            name,
            [
                ClientUpdate(torch.randn(r, 64, generator=g), torch.randn(64, r, generator=g))
                for r in ranks * repeat
            ],
        )
        run(updates, name)  # what is allocated once is allocated now
        state = state_for(name) | without_chance(name)
        with CountOperations() as everything:
            aggregate(updates, name, **state)
        with CountOperations() as door:
            collect(read_updates(updates)[0])
        counts.append(everything.count - door.count)
    # What is left after reading and laying side by side is the same for 4, 16 and 28 clients.
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize(
    "name", [n for n in NAMES if takes_mixed(n) and "generator" not in METHODS[n].needs]
)
def test_layers_of_one_signature_are_one_call(name):
    updates = updates_for(name)
    layers = {f"layer-{i}": updates for i in range(5)}
    found = aggregate_layers(layers, name, **state_for(name))
    alone = run(updates, name)
    assert list(found) == list(layers)
    for result in found.values():
        error = (result.total().dense() - alone.total().dense()).norm()
        assert error <= 1e-13 * alone.total().dense().norm()


MEASURE = """
import resource, torch
from hetlora_agg import aggregate
g = torch.Generator().manual_seed(0)
ranks = (4, 4, 8, 8, 16, 16, 32, 32)
clients = [(torch.randn(64, r, 1024, generator=g), torch.randn(64, 1024, r, generator=g))
           for r in ranks]
result = aggregate(clients, "rb")
assert result.A.shape == (64, 32, 1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_64_layers_of_1024_stay_under_one_and_a_half_gigabytes():
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) * 1024 < 1.5e9
