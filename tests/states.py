"""What a method needs besides the clients' updates, as in a first round, for tests over METHODS."""

from dataclasses import replace
from inspect import Parameter, Signature

import numpy as np
import torch

from hetlora_agg import METHODS, ClientUpdate, aggregate, aggregate_layers

FIRST_ROUND = {
    "previous": lambda: None,
    "round": lambda: 1,
    "generator": lambda: torch.Generator().manual_seed(0),
}


def state_for(name):
    """The options without a default, made anew: a generator moves on when it is used."""
    return {need: FIRST_ROUND[need]() for need in METHODS[name].needs}


def aggregator_for(name, **options):
    """The method as a function of updates, and of what a trial tells those who ask for it.

    That is ``previous`` where the method cannot do without, and everybody's denominators.
    """
    entry = METHODS[name]
    asked = [k for k in ("previous",) if k in entry.needs]
    asked += [k for k in ("total", "totals") if k in entry.options]

    def run(updates, **told):
        return aggregate(updates, name, **(state_for(name) | told | options))

    parameters = [Parameter("updates", Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [Parameter(k, Parameter.KEYWORD_ONLY, default=None) for k in asked]
    run.__signature__ = Signature(parameters)
    return run


def common_of(name):
    """The factor that has to be one and the same on all clients, or None."""
    entry = METHODS[name]
    return entry.unscaled_factor(state_for(name)) if entry.common else None


def fitting(name, updates):
    """The clients as the method needs them: with the leading slots of one A where it must be.

    What is no list of sound updates is left for the library to refuse.
    """
    if common_of(name) != "A" or not isinstance(updates, list):
        return updates
    read = [ClientUpdate(*u) if isinstance(u, tuple) else u for u in updates]
    shapes = [tuple(getattr(getattr(u, "A", None), "shape", ())) for u in read]
    if len({(*s[:-2], *s[-1:]) for s in shapes}) != 1 or min(map(len, shapes)) < 2:
        return updates
    sound = [u.A[..., : u.rank or u.A.shape[-2], :] for u in read if finite(u.A)]
    if not sound:
        return updates
    A = max(sound, key=lambda A: (A.shape[-2], float(torch.as_tensor(A).detach().abs().max())))
    return [replace(u, A=with_rows_of(A, u)) if finite(u.A) else u for u in read]


def with_rows_of(A, update):
    """The rows that the client's slots name, as far as there are such; padding stays as it is."""
    rows, rank = update.A.shape[-2], update.rank or update.A.shape[-2]
    try:
        slots = list(range(rank)) if update.slots is None else list(update.slots)
        found = A[..., slots, :]
    except (IndexError, TypeError):
        return update.A
    if len(slots) != rank or found.dtype != update.A.dtype or rank > rows:
        return update.A
    join = torch.cat if isinstance(A, torch.Tensor) else np.concatenate
    return join([found, update.A[..., rank:, :]], -2)


def finite(X):
    """Whether a tensor or an array has no NaN or Inf."""
    return bool(torch.isfinite(torch.as_tensor(X).detach().double()).all())


def run(updates, method="rb", **options):
    """`aggregate` in a first round, on clients that fit the method."""
    if method not in list(METHODS):
        return aggregate(updates, method, **options)
    return aggregate(fitting(method, updates), method, **(state_for(method) | options))


def without_chance(method):
    """Options under which a method that draws gives one and the same whatever it draws."""
    return {"drop": 0.0} if "drop" in METHODS[method].options else {}


def run_certain(updates, method="rb", **options):
    """`run`, nothing left to chance."""
    chance = without_chance(method) if method in list(METHODS) else {}
    return run(updates, method, **(chance | options))


def run_layers(layers, method="rb", **options):
    """`aggregate_layers` in a first round, on clients that fit, nothing left to chance."""
    if method not in list(METHODS):
        return aggregate_layers(layers, method, **options)
    if isinstance(layers, dict):
        layers = {name: fitting(method, updates) for name, updates in layers.items()}
    state = state_for(method) | without_chance(method)
    return aggregate_layers(layers, method, **(state | options))
