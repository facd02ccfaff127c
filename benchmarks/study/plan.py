"""What the study runs, as data: configurations, each with its seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.study.contenders import CONTENDERS, MAIN
from hetlora_agg import METHODS

SEEDS = tuple(range(12))
"""Of every comparison of methods; nothing was chosen on them. With ten, no permutation test could
find anything after the adjustment for as many methods as there are."""

FEW_SEEDS = SEEDS[:5]
"""Of ablations and long runs."""

NEW_SEEDS = tuple(range(13, 23))
"""Of combinations: what they were put together on is not what they are tested on."""

TUNING_SEEDS = (100, 101, 102)
"""What the transformers, their adapters and the learning rates were chosen on."""

RANKS = (2, 2, 2, 4, 4, 4, 8, 8, 16, 16)
"""Of the ten clients."""

BASE: Mapping[str, Mapping[str, Any]] = {
    "digits": {"ranks": RANKS, "rounds": 15, "local_epochs": 2, "learning_rate": 0.01},
    "mnist_5k": {"ranks": RANKS, "rounds": 15, "local_epochs": 1, "learning_rate": 0.01},
}
"""Data set of the vision setting -> its federation's settings but the seed."""

TEXT: Mapping[str, Mapping[str, Any]] = {
    "vader_corpora": {"ranks": (2, 4, 8, 16)},
    "vader_dirichlet": {"ranks": RANKS},
}
"""Data set of the text setting -> the ranks of its clients; alphas are in `exchange.ALPHAS`."""

TEXT_BASE = {"rounds": 5, "local_epochs": 1, "learning_rate": 0.003}
"""What federations of text have in common."""

ON_TEXT = (*MAIN, "flora, summed and cut")
"""The main methods, FLoRA in both forms."""

GLANCE = ("zeropad", "flexlora", "rb")
"""Of the quick look at text."""

EQUAL = {"ranks": (8,) * 10}
RANK_DISTRIBUTIONS: Mapping[str, tuple[int, ...]] = {
    "one high": (2,) * 9 + (16,),
    "two levels": (4,) * 5 + (16,) * 5,
}
"""Next to `RANKS`, and to equal ranks, which have a group of their own."""

DIRICHLETS = (0.1, 1.0, 100.0)
"""Next to the default, 0.3."""

RATES = (0.005, 0.02)
"""Next to the base's learning rate, 0.01: a method that dilutes might only want larger steps."""

RESTARTING = ("flexlora", "rb", "rb, floor 0.6")
"""What is combined with clients that start afresh from a base weight that took the update."""

COMBINED = ("rb, floor 0.3", "rb, floor 0.6")
"""Combinations whose clients are the usual ones."""

STRONGEST = ("flora", "fedex", "flexlora", "glora", "fedhl")
"""Registered methods that combinations are held against: those in front on the first seeds."""

SLICED = ("zeropad", "hetlora", "replicate", "rbla", "fedrot", "flora", "flexlora", "rb")
"""Methods whose clients train slices, or start afresh: those whose clients can be changed."""


@dataclass(frozen=True)
class Configuration:
    """One contender in one kind of federation.

    Attributes:
        setting: "vision" or "text".
        data: the data set.
        group: the question that it is run for.
        label: a contender.
        settings: of the federation, those that are given; the seed is not among them.
        clients: a name in `variants.VARIANTS`.
        case: what is different from the default in this group; "" for nothing.
        options: of the method, before the contender's own.
        seeds: one run each.
    """

    setting: str
    data: str
    group: str
    label: str
    settings: Mapping[str, Any]
    clients: str = "usual"
    case: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS

    @property
    def id(self) -> str:
        """Setting, data, group, case and label, fit for a path."""
        parts = (self.setting, self.data, self.group, self.case, self.label)
        return "/".join(_slug(part) for part in parts if part)

    def describe(self) -> dict[str, Any]:
        """Everything but the seeds, ready for JSON: what a record must agree with."""
        known = asdict(self) | {"contender": asdict(CONTENDERS[self.label])}
        del known["seeds"]
        return known


Plan = list[Configuration]


def study() -> Plan:
    """Every method on both data sets of images, the ablations on the smaller one, and text."""
    return [
        *(c for data in BASE for c in [*main(data), *equal_ranks(data), *few_rounds(data)]),
        *(c for data in BASE for c in unpruned(data)),
        *(c for data in BASE for c in combinations(data)),
        *long_runs("digits"),
        *ablations("digits"),
        *texts(),
    ]


def full() -> Plan:
    """The study, with long runs and ablations on both data sets, and thirty clients on text."""
    return [*study(), *long_runs("mnist_5k"), *ablations("mnist_5k"), *thirty_clients()]


def quick() -> Plan:
    """A few rounds, one seed: every method on the smaller data set, the main ones on both, and
    three of them on text.
    """
    short = {data: {**base, "rounds": 5} for data, base in BASE.items()}
    return [
        *_configurations("digits", "quick", sorted({*METHODS} - {"fedit"}), short["digits"], [0]),
        *_configurations("mnist_5k", "quick", MAIN, short["mnist_5k"], [0]),
        *_texts("vader_corpora", "quick", {**TEXT["vader_corpora"], "rounds": 3}, GLANCE, [0]),
    ]


def main(data: str) -> Plan:
    """Every method that takes mixed ranks, and some with other options."""
    labels = [label for label in CONTENDERS if label != "fedit"]
    return _configurations(data, "main", labels, BASE[data])


def equal_ranks(data: str) -> Plan:
    """What needs equal ranks, and the main methods under them."""
    labels = (*MAIN, "fedit", "fedex", "fedrot", "flexlora, rest folded")
    return _configurations(data, "equal", labels, {**BASE[data], **EQUAL})


def few_rounds(data: str) -> Plan:
    """One and three rounds of more local training, as in the RB-LoRA paper."""
    labels = ("zeropad", "zeropad, uniform", "flora", "flora, summed and cut", "flexlora", "rb")
    base = BASE[data]
    settings = {**base, "rounds": 3, "local_epochs": 5 * base["local_epochs"]}
    return _configurations(data, "few", (*labels, "raflora"), settings)


def unpruned(data: str) -> Plan:
    """HetLoRA without what its clients do, next to `main`."""
    return _configurations(data, "prune", ["hetlora"], BASE[data], SEEDS, "unpruned", "unpruned")


def combinations(data: str) -> Plan:
    """Combinations of the library's pieces, and the strongest registered methods, on new seeds."""
    usual = _configurations(data, "combine", (*STRONGEST, *COMBINED), BASE[data], NEW_SEEDS)
    new = "restarting"
    return [*usual, *_configurations(data, "combine", RESTARTING, BASE[data], NEW_SEEDS, new, new)]


def long_runs(data: str) -> Plan:
    """What happens to the rank, and to the accuracy, in the long run."""
    labels = ("zeropad", "hetlora", "flexlora", "fedhl", "rbla", "raflora", "rb", "plora", "ilora")
    return _configurations(data, "long", labels, {**BASE[data], "rounds": 50}, FEW_SEEDS)


def ablations(data: str) -> Plan:
    """One thing different from `main` at a time; the default is there."""
    return [
        *_clients(data, "init", SLICED, "own start"),
        *_clients(data, "init", ("fedrot, unaligned", "fedrot, fully aligned"), "own start"),
        *_clients(data, "scaling", SLICED, "scaling ignored"),
        *_alignments(data),
        *_splits(data),
        *_settings(data, "ranks", {n: {"ranks": r} for n, r in RANK_DISTRIBUTIONS.items()}),
        *_participation(data),
        *_settings(data, "skew", {f"{d:g}": {"dirichlet": d} for d in DIRICHLETS}),
        *_settings(data, "rate", {f"{rate:g}": {"learning_rate": rate} for rate in RATES}),
    ]


def texts() -> Plan:
    """The main methods on sentences: in the usual rounds, and in three of more local training.

    What the first round gave is in either record.
    """
    few = {"rounds": 3, "local_epochs": 2 * TEXT_BASE["local_epochs"]}
    return [
        *(c for data, own in TEXT.items() for c in _texts(data, "main", own)),
        *(c for data, own in TEXT.items() for c in _texts(data, "few", {**own, **few})),
    ]


def thirty_clients() -> Plan:
    """The same sentences, split to thirty."""
    return _texts("vader_dirichlet", "main", {"ranks": 3 * RANKS}, case="30 clients")


def _texts(
    data: str,
    group: str,
    settings: Mapping[str, Any],
    labels: Sequence[str] = ON_TEXT,
    seeds: Sequence[int] = FEW_SEEDS,
    case: str = "",
) -> Plan:
    """Federations of sentences, with adapters that travel as PEFT files."""
    settings = {**TEXT_BASE, **settings}
    return [
        Configuration(
            *("text", data, group, label, settings),
            clients="peft files",
            case=case,
            seeds=tuple(seeds),
        )
        for label in labels
    ]


def _alignments(data: str) -> Plan:
    """Signs on what is sliced; rotations need equal ranks, and results that live on no slots."""
    sliced = tuple(label for label in SLICED if label != "flora")
    equal = {**BASE[data], **EQUAL}
    return [
        *_clients(data, "align", sliced, "signs"),
        *_configurations(data, "align", ["flexlora"], equal, FEW_SEEDS, "rotation", "rotation"),
    ]


def _splits(data: str) -> Plan:
    """All of the singular values in one factor, where the method has the option."""
    return [
        Configuration(
            *("vision", data, "split", label, BASE[data]),
            case=split,
            options={"split": split},
            seeds=FEW_SEEDS,
        )
        for label in ("flexlora", "rb")
        for split in ("left", "right")
    ]


def _participation(data: str) -> Plan:
    """Three of ten clients a round.

    The server of flexlora keeps everything, as published, and cuts for clients alone: cut to the
    largest rank of a round's clients it would lose what absent ones could hold.
    """
    settings = {**BASE[data], "participation": 0.3}
    return [
        Configuration(
            *("vision", data, "participation", label, settings),
            case="0.3",
            options={"rank": "full"} if label == "flexlora" else {},
            seeds=FEW_SEEDS,
        )
        for label in MAIN
    ]


def _clients(data: str, group: str, labels: Sequence[str], clients: str) -> Plan:
    """An ablation of what clients do."""
    return _configurations(data, group, labels, BASE[data], FEW_SEEDS, clients, clients)


def _settings(data: str, group: str, cases: Mapping[str, Mapping[str, Any]]) -> Plan:
    """An ablation of the federation, on the main methods."""
    return [
        configuration
        for case, changed in cases.items()
        for configuration in _configurations(
            data, group, MAIN, {**BASE[data], **changed}, FEW_SEEDS, case=case
        )
    ]


def _configurations(
    data: str,
    group: str,
    labels: Sequence[str],
    settings: Mapping[str, Any],
    seeds: Sequence[int] = SEEDS,
    clients: str = "usual",
    case: str = "",
) -> Plan:
    """One for each label."""
    return [
        Configuration("vision", data, group, label, settings, clients, case, seeds=tuple(seeds))
        for label in labels
    ]


def runs_of(plan: Sequence[Configuration]) -> Iterator[tuple[Configuration, int]]:
    """Every run, seed by seed: half of a study is then a study with half of the seeds."""
    for seed in sorted({seed for configuration in plan for seed in configuration.seeds}):
        yield from ((configuration, seed) for configuration in plan if seed in configuration.seeds)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-")
