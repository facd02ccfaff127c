"""The same bits every time, and the user's settings as they were: after success and failure."""

import itertools
import random
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetlora_agg import (
    METHODS,
    ClientUpdate,
    HetLoRAError,
    LowRank,
    aggregate,
    align_rounds,
    clients,
    compare,
    diagnose,
    distribute,
)
from hetlora_agg.adapters import aggregate_adapters, aggregate_state_dicts, write_adapter
from hetlora_agg.adapters.adapter import Adapter
from hetlora_agg.budget import budget
from hetlora_agg.validation import read_updates
from reference import array, scale
from states import fitting, run, run_layers, state_for
from test_every_method import NAMES, takes_mixed
from tolerance import eps

OUT, IN = 7, 6


def client(rank, seed, dtype=torch.float64, **fields):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, IN, generator=g, dtype=torch.float64, device="cpu").to(dtype)
    B = torch.randn(OUT, rank, generator=g, dtype=torch.float64, device="cpu").to(dtype)
    return ClientUpdate(A, B, weight=seed + 1, id=f"client-{seed}", **fields)


def clients_of(name, seed=0, dtype=torch.float64):
    ranks = (2, 4, 3, 4) if takes_mixed(name) else (3, 3, 3, 3)
    made = [client(r, 10 * seed + k, dtype) for k, r in enumerate(ranks)]
    made = [replace(u, id=f"client-{k}", weight=k + 1) for k, u in enumerate(made)]
    return fitting(name, made)


def bits(value):
    """Every tensor of a result, in a fixed order, with its dtype and its bytes."""
    if isinstance(value, dict):
        return {name: bits(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    if isinstance(value, Adapter):
        return {key: bits(value.tensor(key)) for key in value.keys}
    if isinstance(value, LowRank):
        return [bits(value.A), bits(value.B)]
    if hasattr(value, "factors"):
        parts = [value.factors, value.residual, value.singular_values]
        return [bits(part) for part in parts if part is not None]
    if isinstance(value, torch.Tensor):
        assert value.device.type == "cpu"
        return str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()
    return value


# ---- any order of the clients ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_all_orders_of_four_clients_are_bit_equal(name):
    updates = clients_of(name)
    first = bits(run(updates, name))
    for order in itertools.permutations(updates):
        assert bits(run(list(order), name)) == first


@pytest.mark.parametrize("missing", ["renormalise", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_all_orders_of_a_model_in_which_clients_lack_layers(name, missing):
    q, k, v = (clients_of(name, seed) for seed in range(3))
    layers = {"q": q, "k": k[1:], "v": [*v[:1], *v[2:]]}
    try:
        first = bits(run_layers(layers, name, missing=missing))
    except HetLoRAError:
        # Methods of equal ranks take no client of rank 0; they must say so in every order.
        with pytest.raises(HetLoRAError):
            run_layers({n: u[::-1] for n, u in layers.items()}, name, missing=missing)
        return
    for order in itertools.permutations(range(4)):
        key = {f"client-{i}": place for place, i in enumerate(order)}
        shuffled = {n: sorted(u, key=lambda c: key[c.id]) for n, u in layers.items()}
        assert bits(run_layers(shuffled, name, missing=missing)) == first


def state_dict(rank, seed):
    u = client(rank, seed)
    stem = "base_model.model.h.0.q.lora_"
    return {f"{stem}A.weight": u.A, f"{stem}B.weight": u.B, "base_model.model.score.weight": u.B[0]}


def config(rank):
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "modules_to_save": ["score"]}


def test_all_orders_of_adapters(tmp_path):
    ranks = {f"client-{k}": r for k, r in enumerate((2, 2, 3, 1))}
    sent = {id: state_dict(r, k) for k, (id, r) in enumerate(ranks.items())}
    for X in sent.values():
        X["base_model.model.score.weight"] = X["base_model.model.h.0.q.lora_B.weight"][:, :1]
    configs = {id: config(r) for id, r in ranks.items()}
    weights = {id: k + 1.0 for k, id in enumerate(ranks)}
    folders = {
        id: write_adapter(tmp_path / id, Adapter.from_state_dict(sent[id], configs[id]))
        for id in ranks
    }
    found = set()
    for order in itertools.permutations(ranks):
        one = aggregate_state_dicts(
            {id: sent[id] for id in order}, {id: configs[id] for id in order}, weights=weights
        )
        other = aggregate_adapters({id: folders[id] for id in order}, weights)
        for outcome in (one, other):
            handed = [bits(outcome.client(id)) for id in ranks]
            found.add(repr((bits(outcome.adapter), handed)))
    assert len(found) == 1


@given(st.permutations(range(6)), st.integers(0, 2**31))
def test_any_order_of_any_clients(order, seed):
    made = [client(1 + (seed >> k) % 3, k) for k in range(6)]
    expected = bits(aggregate(made, "rb"))
    assert bits(aggregate([made[k] for k in order], "rb")) == expected


@given(st.permutations(["q", "k", "v", "o"]), st.sampled_from([None, 1, 2, 3]))
def test_any_order_and_grouping_of_layers(order, max_group):
    # Signatures differ, so that groups of several sizes are made.
    layers = {n: [client(1 + k % 2, 4 * k + j) for j in range(2)] for k, n in enumerate("qkvo")}
    layers = {n: [replace(u, weight=1.0, id=str(j)) for j, u in enumerate(us)]
              for n, us in layers.items()}  # fmt: skip
    expected = run_layers(layers, "rb")
    found = run_layers({n: layers[n] for n in order}, "rb", max_group=max_group)
    for n in layers:
        S = scale([as_client(u) for u in layers[n]])
        gap = array(found[n].B) @ array(found[n].A) - array(expected[n].B) @ array(expected[n].A)
        assert np.linalg.norm(gap) <= 10 * OUT * eps(torch.float64) * S


def as_client(update):
    from reference import Client

    return Client(array(update.A), array(update.B), update.weight, update.scaling)


# ---- threads, workers, groups, memory ----------------------------------------------------------


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


WAYS = {
    "two threads": (2, {}),
    "two workers": (2, {"workers": 2}),
    "one worker": (2, {"workers": 1}),
    "layer by layer": (1, {"max_group": 1}),
    "by twos": (1, {"max_group": 2}),
    "little memory": (1, {"memory_limit": None}),
}


def least_memory(name, layers):
    """The smallest limit that the method's layers fit into, one at a time."""
    read = {layer: read_updates(updates, layer)[0] for layer, updates in layers.items()}
    for limit in range(100_000, 10_000_000, 2_000):
        try:
            group = budget(limit, read, None, METHODS[name].workspace).max_group
        except HetLoRAError:
            continue
        assert group < len(layers), "nothing would be cut up"
        return limit
    raise AssertionError("no limit is enough")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_however_the_work_is_cut_up_the_result_is_within_rounding(name, way):
    count, options = WAYS[way]
    layers = {f"layer-{i}": clients_of(name, i) for i in range(5)}
    if "memory_limit" in options:
        options = {"memory_limit": least_memory(name, layers)}
    with threads(1):
        expected = run_layers(layers, name)
    with threads(count):
        found = run_layers(layers, name, **options)
        again = run_layers(layers, name, **options)
    assert bits(found) == bits(again)
    for layer, updates in layers.items():
        x, y = (array(r[layer].total().dense()) for r in (found, expected))
        # Owner-averaged methods give a lone owner all of its slot: ΔW may be above Σ p ‖B‖‖A‖.
        S = max(scale([as_client(u) for u in updates]), np.linalg.norm(y))
        assert np.linalg.norm(x - y) <= 10 * OUT * eps(torch.float64) * S


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_cpu_and_cuda_agree_within_twice_the_gate(name):
    updates = clients_of(name)
    on_gpu = [replace(u, A=u.A.cuda(), B=u.B.cuda()) for u in updates]
    one, other = run(updates, name).total().dense(), run(on_gpu, name).total().dense().cpu()
    S = max(scale([as_client(u) for u in updates]), float(one.norm()))
    assert float((one - other).norm()) <= 20 * OUT * eps(torch.float64) * S


# ---- the user's settings -----------------------------------------------------------------------


def settings_now():
    """Everything global that a call could have touched."""
    cuda = torch.backends.cuda.matmul
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "float32 matmul": getattr(cuda, "fp32_precision", None)
        or torch.get_float32_matmul_precision(),
        "mkldnn": getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None),
        "cudnn": getattr(torch.backends.cudnn, "fp32_precision", None),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch random": torch.get_rng_state().tolist(),
        "numpy random": repr(np.random.get_state()),  # noqa: NPY002
        "python random": random.getstate(),
        "warnings": list(warnings.filters),
        "numpy errors": np.geterr(),
    }


def arrays(updates):
    return [replace(u, A=u.A.numpy(), B=u.B.numpy()) for u in updates]


CALLS = {
    "aggregate": lambda u: aggregate(u, "rb"),
    "aggregate flexlora": lambda u: aggregate(u, "flexlora", energy=0.9),
    "aggregate_layers": lambda u: run_layers({"q": u, "v": u}, "hetlora"),
    "distribute": lambda u: distribute(aggregate(u), [1, 9]),
    "diagnose": lambda u: diagnose(u, aggregate(u)).relative_distance,
    "diagnose arrays": lambda u: diagnose(
        arrays(u), aggregate(arrays(u), "flexlora")
    ).relative_distance,
    "compare": lambda u: [row.rank for row in compare(u, ["rb", "flora"]).rows],
    "align_rounds": lambda u: align_rounds(aggregate(u, "flexlora"), aggregate(u, "flexlora")),
    "qr_start": lambda u: clients.qr_start(u[0].B[:, :1] * u[0].A[:1], 1).adapter,
    "quantise": lambda u: clients.quantise(LowRank(u[0].A, u[0].B), 4).dequantise(),
    "prune": lambda u: clients.prune(LowRank(u[0].A, u[0].B), LowRank(u[0].A, u[0].B)),
    "sketch": lambda u: clients.sketch(u[0], u[0].A.mT),
    "state dicts": lambda u: aggregate_state_dicts(
        [{"q.lora_A.weight": c.A, "q.lora_B.weight": c.B, "s.modules_to_save.d.weight": c.A[0]}
         for c in u], scalings=[1.0] * len(u)).adapter,
}  # fmt: skip


def sent():
    return [client(r, k, torch.float32) for k, r in enumerate((2, 4, 3))]


def spoiled():
    """What every call fails on."""
    made = sent()
    A = made[0].A.clone()
    A[0, 0] = torch.nan
    return [replace(made[0], A=A, B=made[0].B * torch.nan), *made[1:]]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def precision(level):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def tf32():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def numpy_raises():
    with np.errstate(all="raise"):
        yield


WORLDS = {
    "as it is": partial(threads, 1),
    "float64 by default": partial(default_dtype, torch.float64),
    "bfloat16 by default": partial(default_dtype, torch.bfloat16),
    "meta by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "medium products": partial(precision, "medium"),
    "TF32": tf32,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": deterministic,
    "numpy raises": numpy_raises,
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("call", CALLS)
def test_the_users_world_changes_nothing_and_is_left_alone(call, world):
    good, bad = sent(), spoiled()
    expected = bits(CALLS[call](good))
    with WORLDS[world]():
        before = settings_now()
        found = CALLS[call](good)
        assert settings_now() == before
        with pytest.raises(HetLoRAError):
            CALLS[call](bad)
        assert settings_now() == before
        again = CALLS[call](good)
    assert bits(found) == bits(again) == expected


@pytest.mark.parametrize("world", ["float64 by default", "meta by default", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_in_the_users_world(name, world):
    updates, options = clients_of(name, dtype=torch.float32), state_for(name)
    expected = bits(aggregate(updates, name, **options))
    options = state_for(name)
    with WORLDS[world]():
        found = aggregate(updates, name, **options)
    assert bits(found) == expected


def test_every_name_is_here():
    assert sorted(METHODS) == NAMES
