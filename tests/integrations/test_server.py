"""The server without a framework: it agrees with `aggregate_layers`, and errors name the client."""

import math

import numpy as np
import pytest
import torch

from hetlora_agg import METHODS, InputTypeError, InputValueError
from hetlora_agg.integrations import Reply, Server, leading
from integrations.fleet import (
    ALPHA,
    HEAD,
    KEYS,
    LAYERS,
    RANKS,
    WEIGHTS,
    as_numpy,
    assert_global,
    assert_own,
    dense,
    expected,
    factors,
    mean_head,
    trained,
)

HANDED_OUT = [
    name
    for name, entry in METHODS.items()
    if entry.client in ("slice", "prune", "qr_start") and name not in ("fedex", "fedit")
]


def replies(sent, **said):
    return [Reply(node, arrays, WEIGHTS[node], **said) for node, arrays in sent.items()]


@pytest.fixture
def sent():
    return {node: trained(node) for node in RANKS}


def test_the_global_adapter_and_every_clients_own(sent):
    server = Server("rb", lora_alpha=ALPHA)
    whole = server.aggregate(replies(sent))
    results = expected(sent)
    assert list(whole) == [*KEYS, HEAD]
    assert_global(whole, results)
    for node, rank in RANKS.items():
        assert_own(server.adapter(node, whole), results, rank)
    np.testing.assert_allclose(whole[HEAD], mean_head(sent), rtol=1e-6)
    assert server.adapter(99, whole) is None


def test_numpy_in_numpy_out(sent):
    server = Server("rb", lora_alpha=ALPHA)
    whole = server.aggregate(replies({node: as_numpy(arrays) for node, arrays in sent.items()}))
    assert all(isinstance(X, np.ndarray) and X.dtype == np.float32 for X in whole.values())
    own = server.adapter(3, whole)
    assert all(isinstance(X, np.ndarray) for X in own.values())
    assert_global(whole, expected(sent))


def test_the_order_of_replies_changes_no_bit(sent):
    one = Server("rb", lora_alpha=ALPHA).aggregate(replies(sent))
    other = Server("rb", lora_alpha=ALPHA).aggregate(reversed(replies(sent)))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("server", "said", "scaling"),
    [
        ({"scaling": 1.0}, {}, lambda rank: 1.0),
        ({"scaling": lambda r: ALPHA / math.sqrt(r)}, {}, lambda rank: ALPHA / math.sqrt(rank)),
        ({}, {"lora_alpha": 4}, lambda rank: 4 / rank),
        ({"lora_alpha": ALPHA}, {"scaling": 0.5}, lambda rank: 0.5),
    ],
)
def test_the_scaling_is_the_clients_or_else_the_servers(sent, server, said, scaling):
    whole = Server("rb", **server).aggregate(replies(sent, **said))
    assert_global(whole, expected(sent, scaling=scaling))


@pytest.mark.parametrize("method", HANDED_OUT)
def test_every_method_that_hands_out_adapters_plays_two_rounds(method):
    server = Server(method, lora_alpha=ALPHA, seed=5)
    first, second = (
        {n: trained(n, round=r) for n in nodes} for r, nodes in ((1, RANKS), (2, (3, 7)))
    )
    takes = METHODS[method].options
    whole = server.aggregate(replies(first))
    if "generator" in takes:
        again = Server(method, lora_alpha=ALPHA, seed=5).aggregate(replies(first))
        assert all(torch.equal(whole[key], again[key]) for key in whole)
        return
    for number, sent, previous in ((1, first, None), (2, second, factors(whole))):
        state = {"round": number, "levels": sorted(RANKS.values()), "previous": previous}
        results = expected(sent, method, **{k: v for k, v in state.items() if k in takes})
        assert_global(whole if number == 1 else server.aggregate(replies(sent)), results, rtol=1e-4)


def test_slots_of_absent_clients_are_carried_over():
    server = Server("rb", lora_alpha=ALPHA)
    whole = server.aggregate(replies({node: trained(node) for node in RANKS}))
    after = server.aggregate(replies({node: trained(node, round=2) for node in (3,)}))
    assert all(after[key].shape == whole[key].shape for key in KEYS)
    # 'rb' re-sorts components; what nobody touched is still there.
    assert torch.linalg.matrix_rank(after[KEYS[1]].double() @ after[KEYS[0]].double()) == 4


def test_the_state_is_what_was_handed_out_if_that_was_changed(sent):
    server = Server("rb", lora_alpha=ALPHA)
    noised = {k: X + 0.1 for k, X in server.aggregate(replies(sent)).items()}
    later = {3: trained(3, round=2)}
    after = server.aggregate(replies(later), sent=noised)
    for layer in LAYERS:
        wanted = expected(later, previous=factors(noised))[layer].factors.dense()
        np.testing.assert_allclose(dense(after, layer), wanted, atol=1e-5 * wanted.norm())


def test_a_fresh_start_is_no_previous_result():
    fresh = trained(11) | {key: torch.zeros_like(trained(11)[key]) for key in KEYS if "_B" in key}
    sent = {node: trained(node) for node in RANKS}
    whole = Server("fedhl", lora_alpha=ALPHA).aggregate(replies(sent), sent=fresh)
    assert_global(whole, expected(sent, "fedhl", previous=None))


def test_the_global_shape_never_shrinks():
    server = Server("flexlora", lora_alpha=ALPHA)
    whole = server.aggregate(replies({11: trained(11), 3: trained(3)}))
    later = {3: trained(3, round=2), 7: trained(7, round=2)}
    after = server.aggregate(replies(later))
    assert [X.shape for X in after.values()] == [X.shape for X in whole.values()]
    assert_global(after, expected(later, "flexlora"))
    small = Server("flexlora", lora_alpha=ALPHA, global_rank=2).aggregate(replies(later))
    assert len(small[KEYS[0]]) == 2
    assert_global(small, expected(later, "flexlora", rank=2))


def test_methods_with_a_common_factor_keep_it_common():
    start = trained(11)
    for method, rounds in (("ffa", 3), ("shared_a", 3), ("rolora", 4)):
        server = Server(method, lora_alpha=ALPHA)
        whole = start | {key: 0 * start[key] for key in KEYS if "_B" in key}
        for number in range(1, rounds + 1):
            divide, sent = server.divide, {}
            for node in RANKS:
                own = server.adapter(node, whole) or leading(
                    whole, trained(node), lora_alpha=ALPHA, divide=divide
                )
                fresh = trained(node, round=number)
                # With mixed ranks the B's of 'rolora' are common only as slices of one B.
                free = "_A" if method == "rolora" and number % 2 == 0 else "_B"
                sent[node] = {k: fresh[k] if free in k else own[k] for k in own}
            whole = server.aggregate(replies(sent))
        assert server.divide == {"ffa": "B", "shared_a": "B", "rolora": "B"}[method]


def test_a_client_that_lowers_its_rank_gets_that_one_back(sent):
    server = Server("hetlora", lora_alpha=ALPHA)
    server.aggregate(replies(sent))
    whole = server.aggregate([Reply(11, trained(11, rank=2), 30), Reply(3, trained(3), 10)])
    assert len(server.adapter(11, whole)[KEYS[0]]) == 2


def test_a_function_is_a_method(sent):
    def mine(c, *, previous, round):
        assert round == 1
        assert previous is None
        return METHODS["flexlora"].run(c)

    whole = Server(mine, lora_alpha=ALPHA).aggregate(replies(sent))
    assert_global(whole, expected(sent, "flexlora"))
    assert Server(METHODS["ffa"].run, lora_alpha=1).divide == "B"


def test_dropped_clients_do_not_count_in_the_head(sent):
    server = Server("rb", {"on_bad_client": "drop"}, lora_alpha=ALPHA)
    sent[11][KEYS[0]][0, 0] = math.nan
    sent[11][HEAD][0, 0] = math.nan
    whole = server.aggregate(replies(sent))
    rest = {node: sent[node] for node in (3, 7)}
    assert_global(whole, expected(rest))
    np.testing.assert_allclose(whole[HEAD], mean_head(rest), rtol=1e-6)


def test_a_client_of_weight_zero_counts_as_absent(sent):
    server = Server("rb", lora_alpha=ALPHA)
    whole = server.aggregate([Reply(n, sent[n], 0 if n == 11 else WEIGHTS[n]) for n in sent])
    rest = {node: sent[node] for node in (3, 7)}
    assert_global(whole, expected(rest))
    np.testing.assert_allclose(whole[HEAD], mean_head(rest), rtol=1e-6)
    assert len(server.adapter(11, whole)[KEYS[0]]) == RANKS[11]


@pytest.mark.parametrize("name", ["flora", "plora", "hafl", "fedsa"])
def test_methods_whose_clients_need_more_are_refused_at_once(name):
    with pytest.raises(InputValueError, match=f"{name}.*leading components and nothing else"):
        Server(name, lora_alpha=1)


@pytest.mark.parametrize(("name", "options"), [("fedex", {}), ("flexlora", {"fold_rest": True})])
def test_a_residual_is_refused_at_once(name, options):
    with pytest.raises(InputValueError, match=f"{name}.*residual.*do not travel"):
        Server(name, options, lora_alpha=1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rang": 3}, InputTypeError),
        ({"previous": None}, InputTypeError),
        ({"round": 1}, InputTypeError),
        ({"missing": "zero"}, InputTypeError),
        ({"rank": 0}, InputValueError),
    ],
)
def test_wrong_options_are_refused_at_once(options, error):
    with pytest.raises(error, match=next(iter(options))):
        Server("rb", options, lora_alpha=1)


def test_unknown_methods_and_results_that_cannot_be_sliced_are_refused_at_once():
    with pytest.raises(InputValueError, match="unknown method 'rbb'; did you mean 'rb'"):
        Server("rbb", lora_alpha=1)

    def stacked(c):
        return METHODS["flora"].run(c)

    with pytest.raises(InputValueError, match="'stacked': the leading components"):
        Server(stacked, lora_alpha=1)


def test_both_scaling_and_alpha_are_refused():
    with pytest.raises(InputValueError, match="got both"):
        Server("rb", scaling=1.0, lora_alpha=1)


def without(arrays, key):
    return {k: X for k, X in arrays.items() if k != key}


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda s: without(s, HEAD), "client 11: 1 keys differ from client 3's: it lacks"),
        (lambda s: s | {"extra": torch.ones(1)}, "client 11.*it has 'extra'"),
        (lambda s: s | {KEYS[0]: torch.ones(4, 9)}, "id 11.*in_features"),
        (lambda s: s | {KEYS[0]: torch.ones(2, 5)}, "client 11.*rank"),
        (lambda s: s | {KEYS[0]: s[KEYS[0]] * math.nan}, "id 11.*NaN"),
        (lambda s: s | {HEAD: s[HEAD] * math.inf}, "client 11: .*classifier.*NaN or Inf"),
        (lambda s: s | {HEAD: s[HEAD].long()}, "client 11: .*classifier.*int64"),
        (lambda s: s | {HEAD: torch.ones(2, 4)}, "client 11: .*classifier.*shape"),
        (lambda s: s | {HEAD: np.array(["a"])}, "client 11: .*classifier.*expected a tensor"),
    ],
)
def test_bad_input_is_an_error_that_names_the_client(sent, spoil, match):
    sent[11] = spoil(sent[11])
    server = Server("rb", lora_alpha=ALPHA)
    with pytest.raises((InputValueError, InputTypeError), match=match):
        server.aggregate(replies(sent))
    # Nothing was kept of the failed round.
    assert server.adapter(3, trained(11)) is None


def test_dora_and_biases_are_refused(sent):
    for arrays in sent.values():
        arrays["base_model.model.q.lora_magnitude_vector"] = torch.ones(6)
    with pytest.raises(InputValueError, match=r"magnitude.*DoRA"):
        Server("rb", lora_alpha=ALPHA).aggregate(replies(sent))


def test_no_scaling_two_replies_of_one_client_or_none_are_errors(sent):
    with pytest.raises(
        InputValueError, match="client 3: expected scaling or lora_alpha, got neith"
    ):
        Server("rb").aggregate(replies(sent))
    with pytest.raises(InputValueError, match="client 3 replied twice"):
        Server("rb", scaling=1).aggregate(replies(sent) + replies({3: sent[3]}))
    with pytest.raises(InputValueError, match="no replies"):
        Server("rb", scaling=1).aggregate([])


def test_leading_keeps_a_fresh_adapters_scale():
    fresh, own = trained(11), trained(3)
    fresh |= {key: torch.zeros_like(fresh[key]) for key in KEYS if "_B" in key}
    cut = leading(fresh, own, lora_alpha=ALPHA)
    assert torch.equal(cut[KEYS[0]], fresh[KEYS[0]][:2])
    assert cut[HEAD] is fresh[HEAD]


def test_leading_fills_ranks_above_the_global_one():
    cut = leading(trained(3), trained(11), scaling=1.0)
    assert cut[KEYS[0]].shape == (4, 5)
    assert not cut[KEYS[1]][:, 2:].any()
    assert cut[KEYS[0]][2:].any(-1).all()


def test_leading_refuses_other_layers_and_factors():
    with pytest.raises(InputValueError, match="1 of 2 layers are not in it"):
        leading(trained(3), {k: X for k, X in trained(3).items() if ".v." not in k}, scaling=1)
    with pytest.raises(InputValueError, match="divide="):
        leading(trained(3), trained(3), scaling=1, divide="C")
    with pytest.raises(InputValueError, match="got both"):
        leading(trained(3), trained(3), scaling=1, lora_alpha=1)


def test_the_wrappers_say_what_to_install():
    flower = pytest.importorskip("hetlora_agg.integrations.flower")
    nvflare = pytest.importorskip("hetlora_agg.integrations.nvflare")
    for module, make, extra in (
        (flower, flower.HetLoRA, "flower"),
        (nvflare, nvflare.HetLoRAAggregator, "nvflare"),
    ):
        if module._MISSING is not None:
            with pytest.raises(ImportError, match=rf"hetlora-agg\[{extra}\]"):
                make()
