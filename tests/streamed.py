"""Running aggregates filled from lists of updates, for the tests of streaming."""

from dataclasses import replace

import numpy as np
import torch

from hetlora_agg import METHODS, ClientUpdate, aggregate_layers
from hetlora_agg.streaming import RunningAggregate
from states import fitting, state_for

STREAMING = sorted(
    name for name, entry in METHODS.items() if entry.sums is not None or name == "hetlora"
)
LEVELS = (1, 2, 4)
SIZES = {"q": (9, 7), "k": (9, 7), "v": (6, 8)}


def options_for(name):
    """The options without a default, but for what a running aggregate is told itself."""
    return {k: v for k, v in state_for(name).items() if k != "round"}


def told_for(name):
    """What a running aggregate has to be told for the method, in the first round."""
    return {"round": 1} if "round" in METHODS[name].options else {}


def ranks_for(name, count):
    """Mixed ranks where the method takes them."""
    mixed = "mixed_ranks" in METHODS[name].claims
    return [LEVELS[k % 3] if mixed else 4 for k in range(count)]


def clients_for(name, count=33, seed=0, sizes=None, dtype=torch.float64, layers=(), ranks=None):
    """A list of ``{layer: ClientUpdate}`` that fit the method: ranks, weights, scalings mixed."""
    g = torch.Generator().manual_seed(seed)
    ranks = ranks or ranks_for(name, count)
    by_layer = {}
    for layer, (out, columns) in (sizes or SIZES).items():
        updates = [
            ClientUpdate(
                torch.randn(*layers, r, columns, generator=g, dtype=torch.float64).to(dtype),
                torch.randn(*layers, out, r, generator=g, dtype=torch.float64).to(dtype),
                weight=1 + k % 5 + k / 7,
                scaling=(1.0, 2.0, 0.3)[k % 3],
                id=k,
            )
            for k, r in enumerate(ranks)
        ]
        by_layer[layer] = fitting(name, updates)
    return [{layer: by_layer[layer][k] for layer in by_layer} for k in range(len(ranks))]


def filled(name, clients, **told):
    """A running aggregate with these clients, each called by its place unless it has an id."""
    running = RunningAggregate(name, **(told_for(name) | options_for(name) | told))
    for own in clients:
        running.add(own, id=next(iter(own.values())).id)
    return running


def one_shot(name, clients, **options):
    """`aggregate_layers` on all of them in float64."""
    missing = options.pop("missing", "error")
    layers = {}
    for own in clients:
        for layer, u in own.items():
            layers.setdefault(layer, []).append(in_double(u))
    return aggregate_layers(layers, name, missing=missing, **(state_for(name) | options))


def in_double(update):
    """The same numbers in float64."""
    A, B = (
        X.double() if isinstance(X, torch.Tensor) else X.astype(np.float64)
        for X in (update.A, update.B)
    )
    return replace(update, A=A, B=B)


def scale_of(clients, layer):
    """S = Σ p_k ‖B_k‖ ‖A_k‖ of a layer, scaling included, largest over its leading dimensions.

    Over the smallest share of a slot's owners that this is relative to, for methods that divide by
    what the owners weigh: a lone owner counts whole.
    """
    rows = [(u.weight, u.scaling, dense64(u.A), dense64(u.B)) for u in of(clients, layer)]
    total = sum(weight for weight, *_ in rows)
    sizes = (weight * scaling * norm(B) * norm(A) / total for weight, scaling, A, B in rows)
    return sum(sizes)


def of(clients, layer):
    """The updates of one layer."""
    return [own[layer] for own in clients if layer in own]


def dense64(X):
    """An array in float64."""
    return X.double().numpy() if isinstance(X, torch.Tensor) else np.asarray(X, dtype=np.float64)


def norm(X):
    """Largest Frobenius norm over leading dimensions."""
    return float(np.linalg.norm(X, axis=(-2, -1)).max())


def total64(result):
    """The whole update of a result, dense, float64."""
    whole = result.total().torch()
    return (whole.B.double() @ whole.A.double()).numpy()


def assert_same(found, expected, clients, gate=1e-10):
    """Every layer's total within the gate of S, and the parts that are not numbers equal."""
    assert list(found) == list(expected)
    for layer, result in found.items():
        other = expected[layer]
        X, Y = total64(result), total64(other)
        assert np.isfinite(X).all()
        error = float(np.linalg.norm(X - Y, axis=(-2, -1)).max())
        allowed = gate * scale_of(clients, layer)
        assert error <= allowed, f"{layer}: {error:.3e} above {allowed:.3e}"
        for part in ("nested", "shared", "dropped", "excluded", "slotted", "unscaled"):
            assert getattr(result, part) == getattr(other, part), part
        assert result.next_unscaled == other.next_unscaled
