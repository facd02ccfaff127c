"""One method, or several side by side, in a federation drawn from one seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from inspect import signature
from typing import Any

from hetlora_agg import (
    METHODS,
    HetLoRAError,
    InputTypeError,
    InputValueError,
    aggregate_layers,
    resolve,
)
from hetlora_agg.simulate.attacks import Attack
from hetlora_agg.simulate.federation import build_federation
from hetlora_agg.simulate.loop import Method, Progress, run
from hetlora_agg.simulate.result import Settings, SimulationResult

# Keywords that aggregate_layers takes whatever the method.
_COMMON = frozenset(
    name
    for name, parameter in signature(aggregate_layers).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)


def simulate(
    method: Method = "rb",
    *,
    ranks: Sequence[int] = Settings.ranks,
    rounds: int = Settings.rounds,
    local_epochs: int = Settings.local_epochs,
    dirichlet: float = Settings.dirichlet,
    participation: float = Settings.participation,
    lora_alpha: float = Settings.lora_alpha,
    learning_rate: float = Settings.learning_rate,
    seed: int = Settings.seed,
    cohorts: Sequence[Sequence[int]] | None = Settings.cohorts,
    sampling: str = Settings.sampling,
    attack: Attack | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SimulationResult:
    """Train a federation of LoRA clients on real digits and record how one method does.

    A small network is pre-trained on the digits 0-4; clients with different ranks and skewed
    labels adapt it to all ten. Each round the participants train as the method's clients do
    (`METHODS[name].client`, explained in `CLIENTS`), `aggregate_layers` combines their updates, and
    the residual, if any, is folded into the base weight. Clients of a function that is not
    registered train what `distribute` hands them; a result that is not nested is folded whole, and
    they start afresh.

    Args:
        method: a name in `METHODS` or a function of `Components`.
        ranks: one LoRA rank per client; a layer smaller than the rank gets what it can hold.
        rounds: communication rounds.
        local_epochs: passes each client makes over its own examples per round.
        dirichlet: label skew; small values give clients few classes each.
        participation: share of the clients that take part in a round.
        cohorts: who takes part, clients by number for every round; None draws them.
        sampling: how they are drawn: "uniform", or "midzuno", the first client of a round in
            proportion to its examples and the others uniformly.
        lora_alpha: a client's scaling is `lora_alpha / rank`.
        learning_rate: of the clients' Adam.
        seed: of everything random; equal seeds give equal results.
        attack: what attackers send in place of what they trained, such as `RankInflation`; clients'
            ids are their numbers, so that `max_rank=dict(enumerate(ranks))` is the registry.
        progress: called after every round as `progress(label, round, accuracy)`.
        **options: for `aggregate_layers` and the method. The simulator supplies what only
            it knows to methods that have it: `levels`, `round`, `generator`, `previous`,
            `initial`.

    Raises:
        HetLoRAError: a setting or option is wrong, or the method refuses these clients.
        ImportError: scikit-learn is missing.

    Example:
        >>> result = simulate("rb", rounds=5)
        >>> result.accuracy[-1] > result.accuracy[0] + 0.1
        True
    """
    settings = Settings(
        tuple(ranks),
        rounds,
        local_epochs,
        dirichlet,
        participation,
        lora_alpha,
        learning_rate,
        seed,
        None if cohorts is None else tuple(map(tuple, cohorts)),
        sampling,
    )
    federation = build_federation(settings)
    return run(federation, method, attack=attack, progress=progress, **options)


def simulate_many(
    methods: Iterable[Method] | Mapping[str, Method] | None = None,
    *,
    attack: Attack | None = None,
    progress: Progress | None = None,
    **keywords: Any,
) -> dict[str, SimulationResult]:
    """Several methods in one federation: same data, start, client splits and participation.

    Args:
        methods: names and functions, or label -> method; None means all of `METHODS`.
        attack: as for `simulate`, the same on every method.
        progress: called after every round as `progress(label, round, accuracy)`.
        **keywords: the settings of `simulate`; anything else is a method option and goes to the
            methods that have it.

    Returns:
        label -> result, in the order given. A method that refuses these clients is there too, with
        its reason in `.skipped`.

    Raises:
        HetLoRAError: a setting is wrong, a method is unknown, or an option is known to none.
        ImportError: scikit-learn is missing.

    Example:
        >>> results = simulate_many(["flora", "fedit"], ranks=(2, 4), rounds=1)
        >>> results["flora"].aggregation_noise[0] < 1e-5, results["fedit"].skipped is None
        (True, False)
    """
    chosen = _labelled(list(METHODS) if methods is None else methods)
    names = {item.name for item in fields(Settings)}
    settings = Settings(**{key: value for key, value in keywords.items() if key in names})
    options = {key: value for key, value in keywords.items() if key not in names}
    accepted = {label: _COMMON.union(resolve(method).options) for label, method in chosen.items()}
    unknown = sorted(set(options).difference(*accepted.values()))
    if unknown:
        raise InputTypeError(
            f"simulate_many: no method among {sorted(chosen)} has the options {unknown}; "
            f"known: {sorted(set().union(*accepted.values()))}"
        )
    federation = build_federation(settings)
    results = {}
    for label, method in chosen.items():
        own = {key: value for key, value in options.items() if key in accepted[label]}
        try:
            results[label] = run(
                federation, method, label=label, attack=attack, progress=progress, **own
            )
        except HetLoRAError as error:
            results[label] = SimulationResult(label, settings, skipped=str(error))
    return results


def _labelled(methods: Iterable[Method] | Mapping[str, Method]) -> dict[str, Method]:
    """Label -> method, each label once."""
    if isinstance(methods, Mapping):
        return dict(methods)
    chosen = list(methods)
    labels = [resolve(method).name for method in chosen]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise InputValueError(
            f"simulate_many: expected every label once, got {twice} more than once; "
            "pass a mapping label -> method"
        )
    return dict(zip(labels, chosen, strict=True))
