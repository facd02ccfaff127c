"""Certificates of batches and of aggregates: every layer has its own."""

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, aggregate, aggregate_layers
from hetlora_agg.linalg import memory as memory_module
from hetlora_agg.linalg import svd_product
from reference import Client, exact_mean, rb, tail
from test_certificate_inputs import unrelated
from test_gate_inputs import F32, F64, LD
from tolerance import distance, eps, recompressed_gate_of, shared_gate_of


def seven_layers():
    """float32 layers of which 1, 4 and 5 have clients that agree, which leaves the fast path."""
    rng = np.random.default_rng(0)
    B, A = (np.stack(part) for part in zip(*(unrelated(rng, 20, 4, 16),) * 7, strict=True))
    B = B * np.arange(1, 8)[:, None, None]
    B[[1, 4, 5], :, 1] = B[[1, 4, 5], :, 0]
    return torch.from_numpy(B).float(), torch.from_numpy(A).float()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("per_chunk", [1, 2, 7])
def test_fallbacks_are_numbered_through_the_chunks(per_chunk, workers, monkeypatch):
    each = memory_module.working_bytes(20, 16, 4, 3, F32, "gram")
    monkeypatch.setattr(memory_module, "WORKSPACE_BYTES", per_chunk * each)
    B, A = seven_layers()
    found = svd_product(B, A, rank=3, driver="gram", workers=workers).certificate
    assert found.fallbacks == tuple((i, "Householder QR") for i in (1, 4, 5))
    assert (found.pivot == 1).tolist() == [i in (1, 4, 5) for i in range(7)]


def test_one_layer_of_a_certificate_has_its_own_members_only():
    B, A = (X[:6].reshape(3, 2, *X.shape[1:]) for X in seven_layers())
    whole = svd_product(B, A, rank=3, driver="gram", verify=True).certificate
    assert [m for m, _ in whole.fallbacks] == [1, 4, 5]
    for i, members in enumerate([(1,), (), (0, 1)]):
        own = whole.layer(i, 3)
        assert own.fallbacks == tuple((m, "Householder QR") for m in members)
        for name, x in own.tensors().items():
            assert torch.equal(x, whole.tensors()[name][i]), name
    assert {"error", "probes", "kept"} < whole.tensors().keys()


def test_map_changes_every_tensor_and_nothing_else():
    whole = svd_product(*seven_layers(), rank=3, driver="gram").certificate
    mapped = whole.map(lambda x: x.numpy())
    assert all(isinstance(x, np.ndarray) for x in mapped.tensors().values())
    assert mapped.tensors().keys() == whole.tensors().keys()
    assert (mapped.driver, mapped.fallbacks) == (whole.driver, whole.fallbacks)
    assert mapped.error is mapped.probes is None
    assert np.array_equal(mapped.bound, whole.bound.numpy())
    assert np.array_equal(np.asarray(mapped.cancellation), whole.cancellation.numpy())


def clients(dtype, layers=(), agreeing=False):
    """Three clients of different ranks; where they agree, two have the same B."""
    rng = np.random.default_rng(0)
    ranks, weights = (2, 4, 2), (3.0, 1.0, 2.0)
    pairs = [unrelated(rng, 20, r, 16) for r in ranks]
    if agreeing:
        pairs[2] = (pairs[0][0], pairs[2][1])
    tensors = [[torch.from_numpy(X).to(dtype).expand(*layers, *X.shape) for X in p] for p in pairs]
    return [ClientUpdate(A, B, weight=w) for (B, A), w in zip(tensors, weights, strict=True)]


METHODS = {
    "rb": (rb, shared_gate_of),
    "flexlora": (lambda some, **_: exact_mean(some), recompressed_gate_of),
}


def assert_certifies(result, updates, method, dtype):
    """The certificate of one layer's result is true of the oracle's update."""
    oracle, gate = METHODS[method]
    some = [Client(u.A.double().numpy(), u.B.double().numpy(), u.weight) for u in updates]
    W, found, rank = oracle(some), result.certificate, result.rank
    allowed = gate(dtype, some)
    assert abs(float(found.norm) - np.linalg.norm(W)) <= allowed
    assert abs(float(found.tail) - tail(W, rank)) <= allowed
    error = distance(W, result.B.double().numpy() @ result.A.double().numpy())
    assert error <= float(found.bound) + allowed


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": "full"}, {"energy": 0.9}], ids=str)
def test_an_aggregate_carries_its_certificate(options, method, dtype):
    updates = clients(dtype)
    result = aggregate(updates, method=method, **options)
    assert result.certificate.driver == ("gram" if dtype == F32 else "qr")
    assert_certifies(result, updates, method, dtype)


@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": "full"}, {"energy": 0.9}], ids=str)
def test_kept_counts_the_components_of_an_aggregate(options):
    result = aggregate(clients(F64), method="rb", **options)
    assert int(result.certificate.kept) == int((result.singular_values > 0).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_bound_of_an_aggregate_counts_the_cast_to_half_precision(dtype):
    updates = clients(dtype)
    result = aggregate(updates, method="flexlora", rank="full")
    some = [Client(u.A.double().numpy(), u.B.double().numpy(), u.weight) for u in updates]
    error = distance(exact_mean(some), result.B.double().numpy() @ result.A.double().numpy())
    assert error <= float(result.certificate.bound) + recompressed_gate_of(F32, some)


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_carries_its_own_certificate(method):
    layers = {"q": clients(F32), "v": clients(F32, agreeing=True), "up": clients(F32, (2,), True)}
    results = aggregate_layers(layers, method=method, rank=3)
    for name in ("q", "v"):
        assert_certifies(results[name], layers[name], method, F32)
    slow = "Householder QR"
    assert [results[name].certificate.fallbacks for name in layers] == [
        (),
        ((0, slow),),
        ((0, slow), (1, slow)),
    ]
    assert results["up"].certificate.norm.shape == (2,)


def test_numpy_in_is_a_certificate_of_numpy_out():
    updates = [(u.A.numpy(), u.B.numpy(), u.rank, u.weight) for u in clients(F32)]
    found = aggregate(updates, method="flexlora", rank=3).certificate
    assert all(isinstance(x, (np.ndarray, np.generic)) for x in found.tensors().values())
    assert float(found.bound) == pytest.approx(LD(found.tail) + LD(found.rounding), rel=eps(F64))
