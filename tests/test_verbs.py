"""Mass, share, combine, compress, align: the pieces alone, as a method's author uses them."""

import math

import pytest
import torch

from hetlora_agg import (
    CLIENTS,
    METHODS,
    Components,
    InputTypeError,
    InputValueError,
    LowRank,
    method,
)
from hetlora_agg.alignment import align
from hetlora_agg.combining import average_factors, carry_over, carry_over_slots, stack
from hetlora_agg.compression import compress, divide, truncate
from hetlora_agg.registry import check_options, resolve
from hetlora_agg.weighting import (
    client_share,
    coverage,
    dropped_slots,
    examples,
    layer_update_norm,
    slot_share,
    top_share,
    uniform,
    update_norm,
)

F64 = torch.float64


def components(ranks=(1, 2), weight=(1.0, 3.0), layers=(), slots=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    R = sum(ranks)
    return Components(
        A=torch.randn(*layers, R, 5, generator=g, dtype=F64),
        B=torch.randn(*layers, 6, R, generator=g, dtype=F64),
        ranks=tuple(ranks),
        weight=torch.tensor(weight, dtype=F64),
        slots=tuple(slots or (j for r in ranks for j in range(r))),
        ids=tuple(range(len(ranks))),
    )


def test_shares_by_hand():
    c = components()
    assert client_share(c, examples(c)).tolist() == [0.25, 0.75, 0.75]
    assert client_share(c, uniform(c)).tolist() == [0.5, 0.5, 0.5]
    assert client_share(c, examples(c), total=8.0).tolist() == [0.125, 0.375, 0.375]
    assert slot_share(c, examples(c)).tolist() == [0.25, 0.75, 1.0]
    assert slot_share(c, examples(c), totals=torch.tensor([8.0, 6.0])).tolist() == [
        0.125,
        0.375,
        0.5,
    ]
    assert slot_share(c, uniform(c)).tolist() == [0.5, 0.5, 1.0]
    assert coverage(c, examples(c)).tolist() == [1.0, 1.0, 0.75]
    assert top_share(c, examples(c)).tolist() == [0.0, 1.0, 1.0]


def test_floor_bounds_every_share_by_p_over_beta():
    c = components(ranks=(1, 2, 4), weight=(6.0, 3.0, 1.0))
    p = client_share(c, examples(c))
    for beta in (0.05, 0.1, 0.35, 0.5, 1.0):
        share = slot_share(c, examples(c), floor=beta)
        # n_k / max(N_j, βN), written out
        owned = {0: 10.0, 1: 4.0, 2: 1.0, 3: 1.0}
        expected = [
            w / max(owned[j], 10 * beta)
            for w, j in [(6, 0), (3, 0), (3, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
        ]
        assert share.tolist() == pytest.approx(expected, rel=1e-15)
        assert bool((share <= p / beta + 1e-15).all())
    assert torch.equal(slot_share(c, examples(c), floor=1.0), p)


def test_quorum_counts_owners():
    c = components(ranks=(1, 2, 4), weight=(6.0, 3.0, 1.0))
    assert dropped_slots(c, None) == ()
    assert dropped_slots(c, 1) == ()
    assert dropped_slots(c, 2) == (2, 3)
    assert dropped_slots(c, 3) == (1, 2, 3)
    assert slot_share(c, examples(c), quorum=2).tolist()[-2:] == [0.0, 0.0]
    assert slot_share(c, examples(c), quorum=2).tolist()[2] == 0.75


@pytest.mark.parametrize("weight", [(1e308, 1e308), (5e-324, 5e-324), (1e308, 5e-324)])
def test_shares_at_the_ends_of_float64(weight):
    c = components(weight=weight)
    even = weight[0] == weight[1]
    assert client_share(c, examples(c)).tolist() == ([0.5] * 3 if even else [1.0, 0.0, 0.0])
    # The tiny client is the only owner of the second slot: it has all of it.
    assert slot_share(c, examples(c)).tolist()[-1] == 1.0


def test_masses_may_differ_by_layer():
    c = components(layers=(3,))
    mass = layer_update_norm(c)
    assert mass.shape == (3, 2)
    share = client_share(c, mass)
    assert share.shape == (3, 3)
    for i in range(3):
        norms = [(c.B[i, :, :1] @ c.A[i, :1]).norm(), (c.B[i, :, 1:] @ c.A[i, 1:]).norm()]
        assert share[i, 0].item() == pytest.approx(float(norms[0] / sum(norms)), rel=1e-14)
    together = update_norm(c)
    assert together.shape == (2,)
    assert together.square().tolist() == pytest.approx(mass.square().sum(0).tolist())
    by_slot = slot_share(c, mass)
    assert by_slot.shape == (3, 3)
    assert by_slot[:, 2].tolist() == [1.0, 1.0, 1.0]


def test_stack_is_the_mean_of_products_and_average_the_product_of_means():
    c = components()
    share = client_share(c, examples(c))
    W = [c.B[:, :1] @ c.A[:1], c.B[:, 1:] @ c.A[1:]]
    assert torch.allclose(stack(c, share).dense(), 0.25 * W[0] + 0.75 * W[1], atol=1e-15)
    mean = average_factors(c, share)
    A = torch.stack([0.25 * c.A[0] + 0.75 * c.A[1], 0.75 * c.A[2]])
    B = torch.stack([0.25 * c.B[:, 0] + 0.75 * c.B[:, 1], 0.75 * c.B[:, 2]], -1)
    assert torch.allclose(mean.A, A, atol=1e-15)
    assert torch.allclose(mean.B, B, atol=1e-15)


def test_slots_need_not_be_a_prefix():
    c = components(ranks=(1, 2), slots=(2, 0, 2))
    assert c.n_slots == 3
    mean = average_factors(c, slot_share(c, examples(c)))
    assert torch.allclose(mean.A[2], 0.25 * c.A[0] + 0.75 * c.A[2], rtol=1e-15, atol=0)
    assert torch.equal(mean.A[0], c.A[1])
    assert not mean.A[1].any()


def test_empty_slots_are_carried_over():
    c = components(ranks=(1, 2), slots=(0, 0, 2))
    previous = LowRank(torch.ones(4, 5, dtype=F64), torch.ones(6, 4, dtype=F64))
    share = slot_share(c, examples(c))
    averaged = carry_over_slots(average_factors(c, share), c, previous)
    assert averaged.rank == 4
    for j in (1, 3):
        assert torch.equal(averaged.A[j], previous.A[j])
        assert torch.equal(averaged.B[:, j], previous.B[:, j])
    stacked = carry_over(stack(c, share), c, previous)
    expected = stack(c, share).dense() + 2 * torch.ones(6, 5, dtype=F64)
    assert torch.allclose(stacked.dense(), expected, atol=1e-14)
    kept = stack(c, share)
    assert carry_over(kept, c, None) is kept
    assert carry_over_slots(kept, c, None) is kept
    dropped = carry_over(kept, c, previous, dropped=(0,))
    assert dropped.rank == kept.rank + 3


def test_compress_splits_and_truncates():
    g = torch.Generator().manual_seed(3)
    W = LowRank(torch.randn(4, 7, generator=g).double(), torch.randn(6, 4, generator=g).double())
    S = torch.linalg.svdvals(W.dense())[:4]
    balanced, left, right = (compress(W, split=s) for s in ("balanced", "left", "right"))
    for one in (balanced, left, right):
        assert torch.allclose(one.dense(), W.dense(), atol=1e-13)
        assert torch.allclose(one.singular_values, S, atol=1e-13)
    assert torch.allclose(balanced.A @ balanced.A.mT, torch.diag(S), atol=1e-13)
    assert torch.allclose(balanced.B.mT @ balanced.B, torch.diag(S), atol=1e-13)
    assert torch.allclose(left.A @ left.A.mT, torch.eye(4, dtype=F64), atol=1e-13)
    assert torch.allclose(right.B.mT @ right.B, torch.eye(4, dtype=F64), atol=1e-13)
    two = truncate(balanced, 2)
    assert two.rank == 2
    assert float((two.dense() - W.dense()).norm()) == pytest.approx(float(S[2:].norm()))
    with pytest.raises(InputValueError, match="unknown split= 'lft'; did you mean 'left'"):
        compress(W, split="lft")


@pytest.mark.parametrize("energy", [None, 0.5, 0.9, 1.0])
def test_divide_is_what_compress_keeps_and_the_rest(energy):
    g = torch.Generator().manual_seed(4)
    decay = torch.tensor([1.0, 0.5, 0.1, 0.01]).double()
    A = torch.randn(3, 4, 7, generator=g).double()
    B = torch.randn(3, 6, 4, generator=g).double() * decay ** torch.tensor([1, 2, 0])[:, None, None]
    whole = compress(LowRank(A, B))
    kept, rest = divide(whole, None, default=2, energy=energy)
    assert torch.allclose(kept.plus(rest).dense(), B @ A, atol=1e-13)
    alone = compress(LowRank(A, B), None, default=2, energy=energy)
    assert torch.allclose(kept.dense(), alone.dense(), atol=1e-13)
    assert torch.allclose(kept.certificate.tail, alone.certificate.tail, atol=1e-13)
    error = torch.linalg.matrix_norm(rest.dense())
    assert torch.allclose(kept.certificate.tail, error, atol=1e-13)
    if energy == 0.9:
        assert kept.ranks.tolist() == alone.ranks.tolist()
        assert len(set(kept.ranks.tolist())) > 1


def test_energy_chooses_the_smallest_rank_that_reaches_it():
    S = torch.tensor([4.0, 2.0, 1.0], dtype=F64)
    W = LowRank(torch.diag(S), torch.eye(3, dtype=F64))
    # Σσ² = 21: 16/21 = .762, 20/21 = .952.
    for energy, rank in [(0.01, 1), (16 / 21, 1), (0.7620, 2), (20 / 21, 2), (0.96, 3), (1.0, 3)]:
        assert compress(W, energy=energy).rank == rank, energy
    assert compress(W, 2, energy=1.0).rank == 2
    assert compress(LowRank(torch.zeros(2, 3), torch.zeros(3, 2)), energy=1.0).rank == 1


def test_align_keeps_every_update():
    c = components(ranks=(1, 3, 2), weight=(1.0, 1.0, 1.0), layers=(2,))
    own = align(c, "svd")
    start = 0
    for r in c.ranks:
        part = slice(start, start + r)
        assert torch.allclose(
            own.B[..., part] @ own.A[..., part, :], c.B[..., part] @ c.A[..., part, :], atol=1e-13
        )
        gram = own.A[..., part, :] @ own.A[..., part, :].mT
        assert torch.allclose(gram, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)), atol=1e-12)
        assert bool((gram.diagonal(dim1=-2, dim2=-1).diff() <= 0).all())
        start += r
    assert align(c, None) is c
    with pytest.raises(InputValueError, match="unknown align= 'sdv'; did you mean 'svd'"):
        align(c, "sdv")


def test_align_of_a_rank_above_the_layers_size():
    c = components(ranks=(7, 1), weight=(1.0, 1.0))
    own = align(c, "svd")
    assert torch.allclose(own.B[:, :7] @ own.A[:7], c.B[:, :7] @ c.A[:7], atol=1e-13)
    assert not own.A[5:7].any()


def test_low_rank_arithmetic():
    one = LowRank(torch.ones(1, 3), torch.ones(2, 1))
    assert one.dense_shape == (2, 3)
    assert (one.in_features, one.out_features, one.layers) == (3, 2, ())
    assert torch.equal(one.minus(one).dense(), torch.zeros(2, 3))
    assert torch.equal(one.plus(one).dense(), 2 * torch.ones(2, 3))
    assert repr(one) == "LowRank(2x3, rank 1)"
    with pytest.raises(InputValueError, match=r"got \(2, 3\) and \(3, 2\)"):
        one.minus(LowRank(torch.ones(1, 2), torch.ones(3, 1)))
    arrays = one.numpy()
    assert type(arrays.minus(arrays).A).__module__ == "numpy"


def test_registration_is_checked():
    with pytest.raises(InputValueError, match=r"unknown claims \['exactly'\]"):
        method(reference="arXiv:0000.00000", claims={"exactly": {}})(lambda c: c)

    def rb(c):
        return c

    with pytest.raises(InputValueError, match=r"unknown client 'trains'; known: \['alternate'"):
        method(reference="arXiv:0000.00000", claims={}, client="trains")(rb)
    with pytest.raises(InputValueError, match="'rb' is registered already"):
        method(reference="arXiv:0000.00000", claims={})(rb)
    assert METHODS["rb"].run is not rb


def test_a_decorated_function_is_handed_back_untouched():
    def mine_for_this_test(c, *, needed, choice=1):
        """First line."""

    try:
        handed = method(reference="arXiv:0000.00000", claims={"order": {}})(mine_for_this_test)
        assert handed is mine_for_this_test
        entry = METHODS["mine_for_this_test"]
        assert resolve(mine_for_this_test) is entry
        assert entry.options == ("choice", "needed")
        assert entry.needs == ("needed",)
        assert entry.summary == "First line."
        assert entry.fidelity == ""
        assert entry.describe()["client"] == CLIENTS["slice"]
        assert entry.server == ()
        assert entry.unscaled_factor({}) is None
        with pytest.raises(InputTypeError, match="needs needed="):
            check_options(entry, {})
        with pytest.raises(InputTypeError, match=r"unknown option .* 'chioce'; did you mean"):
            check_options(entry, {"chioce": 2, "needed": 1})
    finally:
        METHODS.pop("mine_for_this_test", None)


@pytest.mark.parametrize("thing", [3, None, dict])
def test_what_is_no_method(thing):
    with pytest.raises(InputTypeError, match="method: "):
        resolve(thing)


def test_infinite_weights_never_arise_from_large_counts():
    c = components(ranks=(1,) * 64, weight=tuple([1.7e308] * 64))
    share = client_share(c, examples(c))
    assert math.fsum(share.tolist()) == pytest.approx(1.0, rel=1e-15)


def test_align_gives_the_largest_singular_value_to_the_lowest_slot():
    c = components(ranks=(3,), weight=(1.0,))
    shuffled = Components(
        A=c.A[[2, 0, 1]],
        B=c.B[:, [2, 0, 1]],
        ranks=c.ranks,
        weight=c.weight,
        slots=(2, 0, 1),
        ids=c.ids,
    )
    one, other = (average_factors(a, slot_share(a, examples(a))) for a in map(own, (c, shuffled)))
    assert torch.allclose(one.A, other.A, atol=1e-13)
    sizes = other.A.norm(dim=-1)
    assert bool((sizes[:-1] >= sizes[1:]).all())


def own(c):
    return align(c, "svd")


@pytest.mark.parametrize("combine", [stack, average_factors])
@pytest.mark.parametrize("share", [torch.ones(2), torch.tensor(1.0), [0.5] * 3])
def test_a_mass_is_not_a_share(combine, share):
    with pytest.raises(InputValueError, match=r"share: expected .* R = 3 components, got"):
        combine(components(), share)


def test_fixed_denominators_are_checked():
    c = components()
    with pytest.raises(InputValueError, match="totals=: expected a finite number > 0"):
        slot_share(c, examples(c), totals=[1.0, 0.0])
    with pytest.raises(InputValueError, match="total: expected a finite number > 0"):
        client_share(c, examples(c), total=0.0)
    with pytest.raises(InputValueError, match="floor= is relative to the owners' sum"):
        slot_share(c, examples(c), totals=[1.0, 1.0], floor=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e-25])
def test_energy_does_not_depend_on_the_unit(scale, dtype):
    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*s, generator=g).to(dtype) for s in ((6, 20), (15, 6)))
    one, other = (compress(LowRank(s * A, s * B), energy=0.99) for s in (1.0, scale))
    assert other.rank == one.rank > 1
    expected = scale**2 * one.singular_values
    assert torch.allclose(other.singular_values, expected, rtol=1e-5, atol=0)
    cut = compress(LowRank(scale * A, scale * B), energy=0.8)
    assert 0 < cut.rank < 6
    left = other.singular_values[cut.rank :].norm()
    assert float(cut.certificate.tail) >= 0.99 * float(left) > 0


def test_all_of_the_energy_is_all_that_is_there():
    # The last σ² is 1e-17 of the sum: added from the large end it would not be seen.
    S = torch.tensor([1.0, 1e-3, 3e-9, 0.0], dtype=F64)
    g = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(20, 4, generator=g, dtype=F64)).Q for _ in range(2))
    W = LowRank(V.mT, U * S)
    assert compress(W, energy=1.0).rank == 3
    assert compress(W, 2, energy=1.0).rank == 2
    assert compress(W, energy=1 - 1e-5).rank == 1


def test_what_a_method_says_of_itself():
    known = METHODS["fedhl"].describe()
    assert known["needs"] == ["previous"]
    assert known["server"] == ["the last global factors (`previous=`)"]
    assert METHODS["rb"].server == ("the last global factors (`previous=`), optional",)
    assert METHODS["flora"].client == "restart"
    assert METHODS["rolora"].unscaled_factor({"round": 1}) == "A"
    assert METHODS["rolora"].unscaled_factor({"round": 2}) == "B"
    assert METHODS["rb"].holds("gauge", {"align": "svd"})
    assert not METHODS["rb"].holds("gauge", {})
    for entry in METHODS.values():
        described = entry.describe()
        assert all(described[key] for key in ("summary", "formula", "cost", "fidelity")), entry.name
        assert "Args" not in described["formula"]


def test_a_missing_state_says_when_none_will_do():
    with pytest.raises(
        InputTypeError, match=r"needs previous= \(None in the first round\), round="
    ):
        check_options(METHODS["fedrot"], {})
