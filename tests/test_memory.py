"""Memory: predicted before anything is allocated, kept to, and never above what was predicted."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hetlora_agg import HetLoRAError, InputValueError
from hetlora_agg.errors import MemoryLimitError
from hetlora_agg.linalg import limited, predicted_bytes, svd_product
from hetlora_agg.linalg import svd as svd_module
from hetlora_agg.linalg.memory import ROUNDED_UP
from test_certificate_inputs import one_starting_point, problem, solve, unrelated
from test_gate_inputs import F32, F64
from tolerance import recompressed_gate

F16 = torch.float16
EXACT = ["gram", "qr", "dense"]
DRIVERS = [("gram", F32), ("qr", F32), ("qr", F64), ("dense", F32), ("dense", F64)]
every_driver = pytest.mark.parametrize(
    ("driver", "dtype"), DRIVERS, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in DRIVERS]
)

# --- the prediction -----------------------------------------------------------------------------

SIZES = ("out_features", "in_features", "R", "rank", "layers")
amounts = st.integers(1, 3000)


@given(
    driver=st.sampled_from(EXACT),
    dtype=st.sampled_from([F16, F32, F64]),
    sizes=st.tuples(amounts, amounts, amounts, amounts),
    layers=st.integers(1, 40),
    workers=st.integers(1, 8),
    grown=st.sampled_from(SIZES),
    by=st.integers(1, 1000),
)
def test_prediction_grows_with_every_size(driver, dtype, sizes, layers, workers, grown, by):
    # One layer at a time for all but layers: the chunks of a batch grow shorter as layers grow
    # larger, and fewer of larger ones may take less. Nor do a few layers more always take more: two
    # even chunks may be shorter than one was. A multiple of them does, whatever the chunks.
    asked = dict(zip(SIZES, (*sizes, layers if grown == "layers" else 1), strict=True))
    more = {**asked, grown: asked[grown] * (1 + by) if grown == "layers" else asked[grown] + by}
    options = {"dtype": dtype, "driver": driver, "workers": workers}
    assert predicted_bytes(**asked, **options) <= predicted_bytes(**more, **options)


@given(
    driver=st.sampled_from([*EXACT, "auto"]),
    dtype=st.sampled_from([F16, F32, F64]),
    sizes=st.tuples(*[st.integers(1, 12)] * 4),
    layers=st.sampled_from([(), (1,), (5,), (2, 3)]),
    workers=st.sampled_from([None, 1, 2, 5]),
)
def test_prediction_is_what_the_call_plans(driver, dtype, sizes, layers, workers):
    out, in_, R, rank = sizes
    one = problem([unrelated], 0, (out, R, in_), layers, rank, dtype)
    plans = []
    real = svd_module.plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svd_module, "plan", lambda *a: plans.append(real(*a)) or plans[-1])
        svd_product(one.B, one.A, rank=rank, driver=driver, workers=workers)
    count = int(np.prod(layers))
    expected = predicted_bytes(out, in_, R, rank, count, dtype, driver, workers)
    assert [plan.bytes for plan in plans] == [expected]
    # the result is in it
    elements = min(*sizes) * (out + in_) * count
    assert expected >= elements * (8 if dtype == F64 else 4)


@pytest.mark.parametrize("name", ["out_features", "in_features", "R"])
@pytest.mark.parametrize("size", [0, -1])
def test_a_prediction_for_nothing_is_refused(name, size):
    with pytest.raises(
        InputValueError, match=rf"{name} must be an integer of at least 1, got {size}"
    ):
        predicted_bytes(**{"out_features": 4, "in_features": 4, "R": 2, name: size})


# --- the limit ----------------------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """Bytes of the largest storage that an operation gave back and that was not there before."""

    def __init__(self, *there):
        super().__init__()
        self.there = {X.untyped_storage().data_ptr() for X in there}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                if storage.data_ptr() not in self.there:
                    self.most = max(self.most, storage.nbytes())
        return result


SMALL = 1024
"""Bytes: room for sums and flags of the checks, for nothing the size of a factor."""


def needed(one, driver):
    """Bytes below which not even one member at a time can be solved."""
    out, in_ = one.shape
    R, dtype = one.B.shape[-1], one.B.dtype
    count = one.B[..., 0, 0].numel()
    alone = predicted_bytes(out, in_, R, one.rank, 1, dtype, driver, 1)
    # its own result among them, then those of the others, and a copy where dimensions do not merge
    return alone + (count - 1) * result_bytes(one) + copies_of(one)


def copies_of(one):
    """Bytes of the factors that cannot be seen as one batch where they lie."""
    lies = [X.flatten(0, -3).data_ptr() == X.data_ptr() for X in (one.B, one.A)]
    return sum(X.nbytes for X, there in zip((one.B, one.A), lies, strict=True) if not there)


def result_bytes(one):
    """U and Vh of one member, and S in float64."""
    itemsize = 8 if one.B.dtype == F64 else 4
    return one.rank * (itemsize * sum(one.shape) + 8)


def in_turned_layers(one):
    """The same with leading dimensions that do not merge into one without a copy."""
    return type(one)(one.B.transpose(0, 1), one.A.transpose(0, 1), one.rank)


LAID_OUT = {
    "as they are": lambda one: one,
    "leading dimensions that do not merge": in_turned_layers,
    "sums that overflow": lambda one: type(one)(
        one.B.abs() * torch.finfo(one.B.dtype).max, one.A, one.rank
    ),
}


@pytest.mark.parametrize("lay_out", LAID_OUT.values(), ids=LAID_OUT)
@every_driver
def test_a_limit_below_one_member_is_refused_before_anything_is_allocated(driver, dtype, lay_out):
    one = lay_out(problem([unrelated], 0, (60, 10, 50), (2, 3), 4, dtype))
    limit = needed(one, driver) // 2
    with Allocated(one.B, one.A) as seen, pytest.raises(MemoryLimitError) as caught:
        solve(one, driver, memory_limit=limit)
    assert seen.most <= SMALL
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, HetLoRAError)
    # both numbers, and what to do
    message = str(caught.value)
    assert f"needs {needed(one, driver):.3g} bytes" in message
    assert f"memory_limit= allows {limit:.3g}" in message
    assert re.search(r"Raise it, ask for a lower rank, or pass fewer layers", message)


@every_driver
def test_the_recorder_sees_what_a_call_allocates(driver, dtype):
    one = problem([unrelated], 0, (60, 10, 50), (2, 3), 4, dtype)
    with Allocated(one.B, one.A) as seen:
        solve(one, driver, memory_limit=needed(one, driver), workers=1)
    assert seen.most > SMALL


@every_driver
def test_the_least_limit_is_what_the_message_says(driver, dtype):
    one = problem([unrelated], 0, (60, 10, 50), (2, 3), 4, dtype)
    least = needed(one, driver)
    solve(one, driver, memory_limit=least)
    with pytest.raises(MemoryLimitError):
        solve(one, driver, memory_limit=least - 1)


@every_driver
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_limit_in_between_shrinks_the_plan_and_results_stay_right(
    driver, dtype, share, workers, monkeypatch
):
    one = problem([unrelated], 0, (60, 10, 50), (12,), 4, dtype)
    least = needed(one, driver)
    most = predicted_bytes(60, 50, 10, 4, 12, dtype, driver, workers)
    limit = int(least + share * (most - least))
    chunks, plans = [], []
    run, real = svd_module.DRIVERS[driver], svd_module.plan
    counted = {driver: lambda B, *a: chunks.append(len(B)) or run(B, *a)}
    monkeypatch.setattr(svd_module, "DRIVERS", {**svd_module.DRIVERS, **counted})
    monkeypatch.setattr(svd_module, "plan", lambda *a: plans.append(real(*a)) or plans[-1])
    svd = solve(one, driver, workers=workers, memory_limit=limit)
    (plan,) = plans
    assert most > least
    assert plan.bytes <= limit
    assert plan.workers <= workers
    assert sum(chunks) == 12
    assert max(chunks) <= plan.chunk
    fixed = ROUNDED_UP + 12 * result_bytes(one)
    assert plan.bytes == fixed + plan.workers * plan.chunk * (least - fixed)
    gate = [recompressed_gate(dtype, 60, 50, float(s)) for s in one.truth[2]]
    assert (np.abs(one.error(svd) - svd.certificate.tail.numpy()) <= gate).all()


@pytest.mark.parametrize("limit", [0, -5, True, "1e9", 1e9], ids=repr)
def test_a_limit_that_is_no_number_of_bytes_is_refused(limit):
    with pytest.raises(InputValueError, match=r"memory_limit must be an integer of at least 1"):
        svd_product(torch.ones(3, 2), torch.ones(2, 3), memory_limit=limit)


def test_a_limit_holds_inside_its_context_only():
    one = problem([unrelated], 0, (60, 10, 50), (3,), 4, F32)
    least = needed(one, "gram")
    with limited(None, least - 1):
        with pytest.raises(MemoryLimitError):
            solve(one, "gram")
        # the nearer one counts
        solve(one, "gram", memory_limit=least)
        with pytest.raises(MemoryLimitError):
            solve(one, "gram")
    solve(one, "gram")


@pytest.mark.parametrize("workers", [1, 2])
def test_members_that_leave_the_fast_path_keep_to_the_limit_too(workers):
    # QR of many components takes more than their Gram matrices
    one = problem([one_starting_point], 5, (400, 20, 400), (4,), 4, F32)
    one.B[:, :, 1] = one.B[:, :, 0]
    assert len(solve(one, "gram").certificate.fallbacks) == 4
    with pytest.raises(MemoryLimitError, match=r"driver 'qr'.*needs .* bytes.*allows .*; raise it"):
        solve(one, "gram", memory_limit=needed(one, "gram"), workers=workers)
