"""The client's own factors with those the method shares replaced by the global ones."""

import numpy as np
import pytest
import torch

from hetlora_agg import (
    AggregationResult,
    ClientUpdate,
    InputTypeError,
    InputValueError,
    LowRank,
    aggregate,
)
from hetlora_agg.clients import continue_from
from reference import array
from tolerance import eps

OUT, IN = 6, 5
F16, F32, F64 = torch.float16, torch.float32, torch.float64
RANKS, SCALINGS, WEIGHTS = (2, 4, 3), (2.0, 0.5, 1.5), (1, 2, 5)


def randn(*shape, seed, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=F64).to(dtype)


def cohort(common=None, dtype=F64, layers=()):
    """Clients of mixed ranks and scalings; the named factor is one and the same on all."""
    return [
        ClientUpdate(
            randn(*layers, 4, IN, seed=0 if common == "A" else 10 + k, dtype=dtype)[..., :r, :],
            randn(*layers, OUT, 4, seed=1 if common == "B" else 20 + k, dtype=dtype)[..., :r],
            scaling=s,
            weight=n,
        )
        for k, (r, s, n) in enumerate(zip(RANKS, SCALINGS, WEIGHTS, strict=True))
    ]


def mean_of(factor, updates, over):
    """Zero-padded means, or means over owners, of a factor with the whole scaling in it."""
    rows = []
    for j in range(max(RANKS)):
        owners = [(u, n) for u, r, n in zip(updates, RANKS, WEIGHTS, strict=True) if r > j]
        parts = [
            n
            * u.scaling ** (over == "all")
            * (array(u.A)[..., j, :] if factor == "A" else array(u.B)[..., j])
            for u, n in owners
        ]
        rows.append(sum(parts) / (sum(WEIGHTS) if over == "all" else sum(n for _, n in owners)))
    return np.stack(rows, axis=-2 if factor == "A" else -1)


CASES = [
    ("ffa", {}, "A", "B", "all"),
    ("rolora", {"round": 1}, "A", "B", "all"),
    ("rolora", {"round": 2}, "B", "A", "all"),
    ("fedsa", {}, None, "A", "owners"),
]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("layers", [(), (2,)])
@pytest.mark.parametrize(("method", "options", "common", "shared", "over"), CASES)
def test_shared_factors_are_global_the_others_stay(
    method, options, common, shared, over, layers, dtype
):
    updates = cohort(common, dtype, layers)
    result = aggregate(updates, method, **options)
    mean = mean_of(shared, updates, over)
    for update, r, s in zip(updates, RANKS, SCALINGS, strict=True):
        own = LowRank(update.A, update.B)
        after = continue_from(result, own, scaling=s)
        replaced, kept = (after.A, after.B) if shared == "A" else (after.B, after.A)
        # averaged with the whole scaling in it, so the client's own is divided out whole; an A
        # that is averaged as it was sent comes back as it is. Where A and B take turns, what was
        # averaged is frozen next and must be one for all: the scaling moves to the other
        turns = method == "rolora"
        expected = mean[..., :r, :] if shared == "A" else mean[..., :r]
        expected = expected / (s if over == "all" and not turns else 1.0)
        # three clients' fold, weight and sum, then the division: under 8 roundings; terms ≤ 12
        assert np.abs(array(replaced) - expected).max() <= 8 * eps(dtype) * 12
        stays = own.B if shared == "A" else own.A
        if turns:
            # one rounding of 1/s, one of the product
            assert ((kept - stays / s).abs() <= 2 * eps(dtype) * (stays / s).abs()).all()
        else:
            assert torch.equal(kept, stays)
        assert after.rank == r
        assert after.A.dtype == after.B.dtype == dtype


@pytest.mark.parametrize("round", [1, 2])
def test_the_effective_update_of_an_equal_cohort_is_the_global_one(round):
    # all ranks alike: s B A after the round is the global product, cut nowhere
    frozen = "A" if round == 1 else "B"
    updates = [ClientUpdate(u.A, u.B, scaling=u.scaling) for u in cohort(frozen)]
    widest = [u for u in updates if u.A.shape[-2] == 4]
    result = aggregate(widest, "rolora", round=round)
    after = continue_from(result, LowRank(widest[0].A, widest[0].B), scaling=0.5)
    product = 0.5 * array(after.B) @ array(after.A)
    whole = array(result.B) @ array(result.A)
    size = np.linalg.norm(array(result.A)) * np.linalg.norm(array(result.B))
    assert np.linalg.norm(product - whole) <= 4 * eps(F64) * size


def test_worked_by_hand():
    # B_g = (1·2 + 3·4)/4 · s with s = 2 in B: 7; the client's own scaling 2 goes out again: 3.5
    one = ClientUpdate(torch.ones(1, 1), torch.tensor([[2.0]]), weight=1, scaling=2.0)
    two = ClientUpdate(torch.ones(1, 1), torch.tensor([[4.0]]), weight=3, scaling=2.0)
    after = continue_from(aggregate([one, two], "ffa"), LowRank(one.A, one.B), scaling=2.0)
    assert (after.A.item(), after.B.item()) == (1.0, 3.5)


def test_a_result_that_shares_both_replaces_both():
    updates = cohort()
    result = aggregate(updates, "rbla")
    after = continue_from(result, LowRank(updates[0].A, updates[0].B))
    assert torch.equal(after.A, result.A[:2])
    assert torch.equal(after.B, result.B[:, :2])


def test_inputs_are_left_alone_and_outputs_are_copies():
    updates = cohort()
    result, own = aggregate(updates, "fedsa"), LowRank(updates[0].A, updates[0].B)
    before = [X.clone() for X in (own.A, own.B, result.A, result.B)]
    after = continue_from(result, own)
    after.A.fill_(0)
    after.B.fill_(0)
    for X, Y in zip((own.A, own.B, result.A, result.B), before, strict=True):
        assert torch.equal(X, Y)


def test_results_that_cannot_be_continued():
    updates = cohort()
    own = LowRank(updates[1].A, updates[1].B)
    with pytest.raises(InputValueError, match="not nested; use select_and_fold or merge"):
        continue_from(aggregate(updates, "flora"), own)
    with pytest.raises(InputValueError, match="at least the client's rank 4, got rank 2"):
        continue_from(aggregate(updates[:1], "fedsa"), own)
    wide = LowRank(torch.ones(1, IN + 1), torch.ones(OUT, 1))
    with pytest.raises(InputValueError, match=r"= \(6, 5\) as the result has, got \(6, 6\)"):
        continue_from(aggregate(updates, "fedsa"), wide)


def test_what_is_no_result_and_what_are_no_factors():
    updates = cohort()
    with pytest.raises(InputTypeError, match="result: expected an AggregationResult, got LowRank"):
        continue_from(LowRank(updates[0].A, updates[0].B), LowRank(updates[0].A, updates[0].B))
    with pytest.raises(InputTypeError, match="own: expected a LowRank"):
        continue_from(aggregate(updates, "fedsa"), updates[0])
    with pytest.raises(InputValueError, match="scaling: expected a finite number > 0, got 0"):
        continue_from(aggregate(updates, "fedsa"), LowRank(updates[0].A, updates[0].B), scaling=0)


def test_global_factors_beyond_the_clients_dtype():
    result = AggregationResult(LowRank(torch.full((1, 2), 1e5), torch.ones(2, 1)))
    own = LowRank(torch.ones(1, 2, dtype=F16), torch.ones(2, 1, dtype=F16))
    with pytest.raises(InputValueError, match=r"beyond torch.float16"):
        continue_from(result, own)
