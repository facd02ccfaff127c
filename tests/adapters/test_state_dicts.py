"""State dicts in memory: every style comes back as it was sent."""

import numpy as np
import pytest
import torch

from hetlora_agg import ClientUpdate, LowRank, aggregate_layers, distribute
from hetlora_agg.adapters import Adapter, aggregate_state_dicts

PREFIX = "base_model.model."
LAYERS = {"h.0.q": (6, 5), "h.1.v": (4, 7)}
RANKS, SCALINGS, WEIGHTS = (2, 3), (4.0, 0.5), (1, 3)


def factors(seed, rank, dtype=torch.float32):
    """Path -> (A, B)."""
    g = torch.Generator().manual_seed(seed)
    return {
        path: (
            torch.randn(rank, columns, generator=g).to(dtype),
            torch.randn(out, rank, generator=g).to(dtype),
        )
        for path, (out, columns) in LAYERS.items()
    }


def spelled(pairs, name=None, prefix=PREFIX):
    """A state dict of factors under an adapter's name."""
    dot = f".{name}" if name else ""
    return {
        f"{prefix}{path}.lora_{part}{dot}.weight": X
        for path, pair in pairs.items()
        for part, X in zip("AB", pair, strict=True)
    }


def round_of(pairs, method="rb", **options):
    """The same with the functions that know nothing of state dicts."""
    layers = {
        path: [
            ClientUpdate(*own[path], weight=w, scaling=s, id=k)
            for k, (own, w, s) in enumerate(zip(pairs, WEIGHTS, SCALINGS, strict=True))
        ]
        for path in LAYERS
    }
    results = aggregate_layers(layers, method, **options)
    return results, {
        path: distribute(r, RANKS, SCALINGS) if r.nested else None for path, r in results.items()
    }


CLIENTS = [factors(k, r) for k, r in enumerate(RANKS)]
STYLES = {
    "files": lambda pairs: spelled(pairs),
    "named": lambda pairs: spelled(pairs, "default"),
    "named oddly": lambda pairs: spelled(pairs, "weight"),
    "without prefix": lambda pairs: spelled(pairs, prefix=""),
    "numpy": lambda pairs: {k: X.numpy() for k, X in spelled(pairs).items()},
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_comes_back_as_sent(style):
    sent = [STYLES[style](pairs) for pairs in CLIENTS]
    before = [{k: np.asarray(X).copy() for k, X in sd.items()} for sd in sent]
    outcome = aggregate_state_dicts(sent, scalings=SCALINGS, weights=WEIGHTS)
    results, handed = round_of(CLIENTS)
    for k, (own, back) in enumerate(zip(sent, outcome.state_dicts(), strict=True)):
        wanted = STYLES[style]({path: (h[k].A, h[k].B) for path, h in handed.items()})
        assert list(back) == list(own)
        for key, X in back.items():
            assert type(X) is type(own[key])
            assert np.array_equal(np.asarray(X), np.asarray(wanted[key]))
    wanted = STYLES[style]({path: (r.A, r.B) for path, r in results.items()})
    found = outcome.state_dict()
    assert found.keys() == wanted.keys()
    for key, X in found.items():
        assert np.array_equal(np.asarray(X), np.asarray(wanted[key]))
    for sd, kept in zip(sent, before, strict=True):
        assert all(np.array_equal(np.asarray(X), kept[k]) for k, X in sd.items())


def test_a_list_of_arrays_with_keys():
    keys = list(spelled(CLIENTS[0]))
    sent = [[X.numpy() for X in spelled(pairs).values()] for pairs in CLIENTS]
    configs = [{"r": r, "lora_alpha": s * r} for r, s in zip(RANKS, SCALINGS, strict=True)]
    outcome = aggregate_state_dicts(sent, configs, weights=WEIGHTS, keys=keys)
    results, handed = round_of(CLIENTS)
    for k, back in enumerate(outcome.state_dicts()):
        assert type(back) is list
        wanted = spelled({path: (h[k].A, h[k].B) for path, h in handed.items()})
        assert all(type(X) is np.ndarray for X in back)
        assert all(np.array_equal(X, wanted[key]) for X, key in zip(back, keys, strict=True))
    assert [X.shape for X in outcome.state_dict()] == [
        X.shape for r in results.values() for X in (r.A, r.B)
    ]


def test_mappings_by_id_need_no_order():
    sent = {"phone": spelled(CLIENTS[0]), "tablet": spelled(CLIENTS[1])}
    one = aggregate_state_dicts(
        sent,
        scalings={"tablet": SCALINGS[1], "phone": SCALINGS[0]},
        weights={"tablet": WEIGHTS[1], "phone": WEIGHTS[0]},
    )
    other = aggregate_state_dicts(
        dict(reversed(sent.items())),
        scalings=dict(zip(sent, SCALINGS, strict=True)),
        weights=dict(zip(sent, WEIGHTS, strict=True)),
    )
    for key, X in one.client("phone").state_dict().items():
        assert torch.equal(X, other.client("phone").state_dict()[key])


def test_scalings_by_layer():
    scalings = [{"h.0.q": 4.0, "h.1.v": 2.0}, 0.5]
    outcome = aggregate_state_dicts(
        [spelled(p) for p in CLIENTS], scalings=scalings, method="flora"
    )
    for path, first in (("h.0.q", 4.0), ("h.1.v", 2.0)):
        (A, B), (C, D) = (pairs[path] for pairs in CLIENTS)
        wanted = (first * B.double() @ A.double() + 0.5 * D.double() @ C.double()) / 2
        found = outcome.results[path].factors.dense().double()
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_every_client_keeps_its_dtype():
    sent = [spelled(factors(0, 2, torch.bfloat16)), spelled(factors(1, 3, torch.float64))]
    outcome = aggregate_state_dicts(sent, scalings=SCALINGS)
    first, second = outcome.state_dicts()
    assert {X.dtype for X in first.values()} == {torch.bfloat16}
    assert {X.dtype for X in second.values()} == {torch.float64}
    assert {X.dtype for X in outcome.state_dict().values()} == {torch.float64}


def test_values_beyond_a_client_s_dtype_are_refused():
    sent = [spelled(factors(0, 2, torch.float16)), spelled(factors(1, 3))]
    sent[1] = {k: 1e10 * X for k, X in sent[1].items()}
    outcome = aggregate_state_dicts(sent, scalings=SCALINGS)
    with pytest.raises(ValueError, match=r"client 0: '.*lora_A.weight'.*beyond torch.float16"):
        outcome.client(0)


EXTRAS = {
    "modules_to_save": ("score.modules_to_save.default.weight", "score.weight"),
    "bias of B": ("h.0.q.lora_B.default.bias", "h.0.q.lora_B.bias"),
    "magnitudes": ("h.0.q.lora_magnitude_vector.default.weight", "h.0.q.lora_magnitude_vector"),
}


@pytest.mark.parametrize("kind", EXTRAS)
def test_what_comes_besides_the_factors_is_averaged(kind):
    sent_key, file_key = (EXTRAS[kind][0], EXTRAS[kind][1])
    values = [torch.arange(6.0), torch.arange(6.0) ** 2]
    sent = [
        {**spelled({"h.0.q": pairs["h.0.q"]}, "default"), PREFIX + sent_key: value}
        for pairs, value in zip(CLIENTS, values, strict=True)
    ]
    outcome = aggregate_state_dicts(sent, scalings=SCALINGS, weights=WEIGHTS, dora="mean")
    scales = SCALINGS if kind == "bias of B" else (1.0, 1.0)
    mean = (scales[0] * values[0] + 3 * scales[1] * values[1]) / 4
    assert torch.equal(outcome.state_dict()[PREFIX + sent_key], mean)
    for back, scale in zip(outcome.state_dicts(), scales, strict=True):
        torch.testing.assert_close(back[PREFIX + sent_key], mean / scale)
    assert list(outcome.extras) == [file_key]


def test_integers_of_saved_modules_must_be_equal():
    key = f"{PREFIX}norm.modules_to_save.default.num_batches_tracked"
    sent = [{**spelled(pairs, "default"), key: torch.tensor(4)} for pairs in CLIENTS]
    outcome = aggregate_state_dicts(sent, scalings=SCALINGS)
    assert outcome.state_dict()[key] == 4
    sent[1][key] = torch.tensor(5)
    with pytest.raises(ValueError, match=r"num_batches_tracked.*client 1"):
        aggregate_state_dicts(sent, scalings=SCALINGS)


def test_zero_dimensional_and_empty_extras():
    scale, empty = (f"{PREFIX}m.modules_to_save.default.{x}" for x in ("scale", "empty"))
    sent = [
        {**spelled(p, "default"), scale: torch.tensor(float(k)), empty: torch.ones(0, 3)}
        for k, p in enumerate(CLIENTS)
    ]
    found = aggregate_state_dicts(sent, scalings=SCALINGS, weights=WEIGHTS).state_dict()
    assert found[scale] == 0.75
    assert found[empty].shape == (0, 3)


@pytest.mark.parametrize("missing", ["zero", "renormalise"])
def test_a_client_may_lack_layers(missing):
    sent = [spelled(CLIENTS[0]), spelled({"h.1.v": CLIENTS[1]["h.1.v"]})]
    with pytest.raises(ValueError, match=r"client 1: has no layer 'h.0.q'.*missing=\"zero\""):
        aggregate_state_dicts(sent, scalings=SCALINGS)
    outcome = aggregate_state_dicts(
        sent, scalings=SCALINGS, weights=WEIGHTS, method="flexlora", missing=missing
    )
    A, B = CLIENTS[0]["h.0.q"]
    share = {"zero": 0.25, "renormalise": 1.0}[missing]
    torch.testing.assert_close(outcome.results["h.0.q"].factors.dense(), share * 4.0 * B @ A)
    # A client goes on with the layers it has.
    assert list(outcome.client(1).state_dict()) == list(sent[1])


@pytest.mark.parametrize("missing", ["zero", "renormalise"])
def test_what_a_missing_extra_counts_for(missing):
    key, bias = (
        f"{PREFIX}score.modules_to_save.default.weight",
        f"{PREFIX}h.0.q.lora_B.default.bias",
    )
    sent = [spelled(pairs, "default") for pairs in CLIENTS]
    sent[0] |= {bias: torch.ones(6)}
    found = aggregate_state_dicts(sent, scalings=SCALINGS, weights=WEIGHTS, missing=missing)
    share = {"zero": 0.25, "renormalise": 1.0}[missing]
    assert torch.equal(found.state_dict()[bias], share * 4.0 * torch.ones(6))
    sent[0] |= {key: torch.ones(2)}
    if missing == "zero":
        with pytest.raises(ValueError, match=r"client 1: has no 'score.weight'.*renormalise"):
            aggregate_state_dicts(sent, scalings=SCALINGS, missing=missing)
    else:
        found = aggregate_state_dicts(sent, scalings=SCALINGS, missing=missing)
        assert torch.equal(found.state_dict()[key], torch.ones(2))


def test_weight_zero_is_absent_from_extras_too():
    key = f"{PREFIX}score.modules_to_save.default.weight"
    sent = [
        {**spelled(p, "default"), key: torch.full((2,), 1.0 + k)} for k, p in enumerate(CLIENTS)
    ]
    found = aggregate_state_dicts(sent, scalings=SCALINGS, weights=[0, 5])
    assert torch.equal(found.state_dict()[key], torch.full((2,), 2.0))
    huge = aggregate_state_dicts(sent, scalings=SCALINGS, weights=[1e308, 1e308])
    assert torch.equal(huge.state_dict()[key], torch.full((2,), 1.5))


@pytest.mark.parametrize("place", ["factor", "extra"])
def test_a_bad_client_is_dropped_everywhere(place):
    key = f"{PREFIX}score.modules_to_save.default.weight"
    clients = [*CLIENTS, factors(5, 4)]
    sent = [
        {**spelled(p, "default"), key: torch.full((2,), float(k))} for k, p in enumerate(clients)
    ]
    bad = dict(sent[1])
    where = key if place == "extra" else f"{PREFIX}h.1.v.lora_B.default.weight"
    bad[where] = bad[where].clone()
    bad[where].view(-1)[0] = torch.nan
    scalings = (*SCALINGS, 1.0)
    options = {"scalings": scalings, "method": "rb"}
    with pytest.raises(ValueError, match=r"NaN or Inf.*on_bad_client=\"drop\""):
        aggregate_state_dicts([sent[0], bad, sent[2]], **options)
    found = aggregate_state_dicts([sent[0], bad, sent[2]], on_bad_client="drop", **options)
    assert [client for client, _ in found.excluded] == [1]
    assert "excluded 1" in found.summary()
    without = aggregate_state_dicts(
        {0: sent[0], 2: sent[2]}, scalings={0: scalings[0], 2: scalings[2]}, method="rb"
    )
    for name, X in without.state_dict().items():
        assert torch.equal(found.state_dict()[name], X)
    assert found.client(1).rank("h.1.v") == 3


def test_last_round_s_adapter_is_previous():
    sent = [spelled(pairs) for pairs in CLIENTS]
    one = aggregate_state_dicts(sent, scalings=SCALINGS, weights=WEIGHTS)
    by_adapter, by_results, by_factors = (
        aggregate_state_dicts(
            sent, scalings=SCALINGS, weights=WEIGHTS, quorum=2, previous=previous
        ).state_dict()
        for previous in (
            one.adapter,
            one.results,
            {k: LowRank(r.A, r.B) for k, r in one.results.items()},
        )
    )
    for key, X in by_adapter.items():
        assert torch.equal(X, by_results[key])
        assert torch.equal(X, by_factors[key])


def test_low_ranks_hold_the_scaling():
    adapter = Adapter.from_state_dict(spelled(CLIENTS[0]), scalings=4.0)
    A, B = CLIENTS[0]["h.0.q"]
    assert torch.equal(adapter.low_ranks()["h.0.q"].dense(), (4 * B) @ A)


def test_the_report():
    outcome = aggregate_state_dicts([spelled(p) for p in CLIENTS], scalings=SCALINGS)
    assert repr(outcome) == "AggregatedAdapters(2 layers, 2 clients, rank 3)"
    lines = outcome.summary().splitlines()
    assert lines[0].split() == ["layer", "out", "x", "in", "ranks", "rank", "left", "out"]
    assert lines[1].startswith("h.0.q  6x5")
    row = outcome.to_dict()["layers"][0]
    assert (row["layer"], row["ranks"], row["rank"], row["size"]) == ("h.0.q", [2, 3], 3, [6, 5])
    known = outcome.results["h.0.q"].certificate
    assert row["left_out"] == pytest.approx(float(known.tail / known.norm) ** 2)


def test_a_common_frozen_factor_stays_and_takes_no_scaling():
    g = torch.Generator().manual_seed(9)
    A = torch.randn(3, 5, generator=g)
    pairs = [{"h.0.q": (A[:r], torch.randn(6, r, generator=g))} for r in RANKS]
    sent = [spelled(own) for own in pairs]
    outcome = aggregate_state_dicts(sent, scalings=SCALINGS, weights=WEIGHTS, method="ffa")
    result = outcome.results["h.0.q"]
    for k, rank in enumerate(RANKS):
        handed = outcome.client(k).factors("h.0.q")
        assert torch.equal(handed.A, A[:rank])
        torch.testing.assert_close(SCALINGS[k] * handed.B, result.B[:, :rank])


def test_a_residual_is_told_in_the_report():
    sent = [spelled(pairs) for pairs in CLIENTS]
    outcome = aggregate_state_dicts(
        sent, scalings=SCALINGS, method="flexlora", rank=1, fold_rest=True
    )
    assert repr(outcome) == "AggregatedAdapters(2 layers, 2 clients, rank 1, with a residual)"
    assert outcome.to_dict()["layers"][0]["left_out"] is None
    assert outcome.to_dict()["layers"][0]["residual_rank"] == 4
    total = outcome.adapter.factors("h.0.q").plus(outcome.residual.factors("h.0.q"))
    wanted = outcome.results["h.0.q"].total()
    assert torch.equal(total.dense(), wanted.dense())
