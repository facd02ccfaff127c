"""RELIABILITY.md §2.5: the kernel in LAPACK's own terms, over LAPACK's own matrices.

Ratios ``‖W − U S Vᵀ‖ / (‖W‖ max(m, n) ε)``, ``max |σ − σ_exact|`` over the same,
``‖I − UᵀU‖ / (m ε)`` and ``‖I − VᵀV‖ / (n ε)``, Frobenius norms throughout, ε that of the result.
Where clients cancel, ``‖W‖`` gives way to ``‖W‖ + S ε64 / ε``, ``S = Σ ‖b_j‖‖a_j‖``: to S itself
for a float64 result, and to less than RELIABILITY.md allows for a float32 one.
"""

from dataclasses import fields, replace

import numpy as np
import pytest

from drivers import every_driver
from hetlora_agg.linalg import svd_product
from test_gate_inputs import CASES, F32, F64, LD, Case, exact, norms, scalings
from tolerance import eps

GATE = 10
"""LAPACK lets 50 pass."""

CALM = [case for case in CASES if not case.cancels]


def batched(found, dtype):
    """The members as a batch with two leading dimensions."""
    per_type = len(scalings(dtype))
    return tuple(X.reshape(-1, per_type, *X.shape[1:]) for X in (found.B, found.A))


def flat(*tensors, dims):
    """As numpy longdouble with one leading dimension."""
    pairs = zip(tensors, dims, strict=True)
    return tuple(X.flatten(0, -d - 1).numpy().astype(LD) for X, d in pairs)


def solved(case, driver, dtype):
    """The oracle and what the kernel made of the same factors."""
    found = exact(case, dtype)
    svd = svd_product(*batched(found, dtype), driver=driver)
    assert svd.U.dtype == svd.S.dtype == svd.Vh.dtype == dtype
    return found, *flat(svd.U, svd.S, svd.Vh, dims=(2, 1, 2))


def members(found, some):
    """The oracle of some members only."""
    every = {field.name: getattr(found, field.name)[some] for field in fields(found)}
    return replace(found, **every)


def ratio(error, unit):
    """error / unit, with 0 / 0 = 0: a zero matrix allows no error at all."""
    return np.divide(error, unit, out=np.where(error > 0, np.inf, 0.0), where=unit > 0)


def defect(U, S):
    """``‖I − UᵀU‖`` over components that are not zero; those that are must be zero throughout."""
    alive = (S > 0)[:, None, :]
    assert not np.where(alive, 0, U).any()
    identity = np.eye(S.shape[-1]) * alive
    return norms(identity - np.swapaxes(U, -1, -2) @ U, (-2, -1))


def ratios(found, U, S, Vh, scale, epsilon):
    """The four of the gate, ``(members,)`` each."""
    m, n = found.W.shape[-2:]
    unit = scale * max(m, n) * epsilon
    return {
        "W - USVh": ratio(norms(found.W - (U * S[:, None, :]) @ Vh, (-2, -1)), unit),
        "sigma": ratio(np.abs(S - found.sigma[:, : S.shape[-1]]).max(-1), unit),
        "I - UtU": ratio(defect(U, S), m * epsilon),
        "I - VtV": ratio(defect(np.swapaxes(Vh, -1, -2), S), n * epsilon),
    }


def assert_within(found, found_ratios):
    for name, values in found_ratios.items():
        worst = int(values.argmax())
        assert values[worst] <= GATE, f"{name}: {float(values[worst]):.3g} at {found.names[worst]}"


@every_driver
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ratios_are_within_the_gate(case, driver, dtype):
    found, *usv = solved(case, driver, dtype)
    # Sums are taken in float64, so a float32 result keeps its own digits where clients cancel.
    cancelled = found.size * eps(F64) / eps(dtype) if case.cancels else 0
    scale = found.norm + cancelled
    assert_within(found, ratios(found, *usv, scale, eps(dtype)))


# what is wrong with U, S and Vh of an identity by d, twice the gate, and which ratios must see it
PLANTED = {
    "a singular value": (
        ["sigma", "W - USVh"],
        lambda U, S, Vh, d: (U, S + d * (np.arange(len(S)) == 0), Vh),
    ),
    "a direction": (["W - USVh"], lambda U, S, Vh, d: (np.roll(U, 1, 0) * d + U, S, Vh)),
    "the length of left vectors": (["I - UtU"], lambda U, S, Vh, d: (U * (1 + d), S, Vh)),
    "the length of right vectors": (["I - VtV"], lambda U, S, Vh, d: (U, S, Vh * (1 + d))),
}


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize(("seen_by", "plant"), PLANTED.values(), ids=PLANTED)
def test_the_gate_sees_a_defect(seen_by, plant, dtype):
    found = exact(Case("tall", True, "orthonormal_left"), dtype)
    (i,) = (i for i, name in enumerate(found.names) if name == "identity × 1")
    one = members(found, slice(i, i + 1))
    m, n = one.W.shape[-2:]
    flawless = np.eye(m, n, dtype=LD), np.ones(n, LD), np.eye(n, dtype=LD)
    d = LD(2 * GATE * m * eps(dtype) * n**0.5)
    for triplet, passes in ((flawless, True), (plant(*flawless, d), False)):
        values = ratios(one, *(part[None] for part in triplet), one.norm, eps(dtype))
        for name in seen_by:
            assert (values[name] <= GATE).all() == passes


# --- excess error of truncation -----------------------------------------------------------------

MOST_EXCESS = {F32: 1e-7, F64: 1e-12}
"""PERFORMANCE.md: of a result in that dtype, relative to ``‖W‖``."""


@every_driver
@pytest.mark.parametrize("case", CALM, ids=str)
def test_truncation_is_optimal_but_for_the_last_digits(case, driver, dtype):
    whole = exact(case, dtype)
    k, unscaled = whole.planted.shape[-1], slice(None, None, len(scalings(dtype)))
    for rank, some in ((1, unscaled), (k // 2, slice(None)), (k - 1, unscaled)):
        found = members(whole, some)
        svd = svd_product(found.B, found.A, rank=rank, driver=driver)
        U, S, Vh = flat(svd.U, svd.S, svd.Vh, dims=(2, 1, 2))
        # ‖E‖ − t of the two as they are: squares and sums in longdouble, and t from singular values
        # that numpy has to a few ε of float64, leave 1e-15 ‖W‖, a thousandth of the least bound
        error = norms(found.W - (U * S[:, None, :]) @ Vh, (-2, -1))
        tail = norms(found.sigma[:, rank:], -1)
        excess = ratio(np.abs(error - tail), found.norm)
        worst = int(excess.argmax())
        # a smaller error than the optimum is as wrong: there would be more than rank components
        assert excess[worst] <= MOST_EXCESS[dtype], f"rank {rank}: {found.names[worst]}"
        # the rest of the gate: vectors may be multiplied out in float32 where much is discarded
        gated = ratios(found, U, S, Vh, found.norm, eps(dtype))
        del gated["W - USVh"]
        assert_within(found, gated)
