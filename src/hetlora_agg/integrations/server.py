"""``Server``: what every framework's server needs, over state dicts and without a framework."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetlora_agg import (
    CLIENTS,
    AggregationResult,
    ClientUpdate,
    InputTypeError,
    InputValueError,
    LowRank,
    MethodEntry,
    aggregate_layers,
    distribute,
    resolve,
)
from hetlora_agg.adapters import Adapter
from hetlora_agg.integrations.handing import (
    DIVIDE,
    Arrays,
    Size,
    handed,
    low_ranks,
    read_factors,
    sent_as,
    sizes_of,
)

TRAVELS = ("slice", "prune", "qr_start", "train_B", "alternate")
"""Clients that need nothing from the server but the leading components at their rank."""

SUPPLIED = ("previous", "round")
"""Options of methods that only the server knows; ``levels`` and ``generator`` may be given."""


@dataclass(frozen=True)
class Reply:
    """What one client sent.

    Attributes:
        client: its id; all ids of one type, so that they can be sorted.
        arrays: its state dict.
        weight: its number of examples.
        scaling: ``lora_alpha / r`` of all its layers, if it said so.
        lora_alpha: or its ``lora_alpha``, which every layer's rank divides.
    """

    client: Hashable
    arrays: Arrays
    weight: float
    scaling: float | None = None
    lora_alpha: float | None = None


class Server:
    """Rounds of one method over state dicts; clients come, go and keep their ranks.

    Keys with ``lora_`` in them are an adapter in PEFT's style; every other array is averaged by
    weight. The global adapter is in units of ΔW, that is for a scaling of 1.

    Args:
        method: a name from ``METHODS``, or a function of `Components`.
        options: of the method and of `aggregate_layers`, but ``missing=``: all clients send the
            same keys. ``previous=`` and ``round=`` are supplied, ``levels=`` and ``generator=``
            unless given, ``initial=`` is used in the first round.
        scaling: ``lora_alpha / r`` of clients that do not send theirs; may be a function of the
            rank, such as ``lambda r: 16 / math.sqrt(r)`` for rsLoRA.
        lora_alpha: or their ``lora_alpha``.
        global_rank: rank of the global adapter, padded or cut; None is the largest one seen so far.
        seed: of the generator of random methods.

    Raises:
        InputTypeError, InputValueError: a method whose clients need more than a global adapter, or
            one that leaves a residual for the base weights; wrong options, at once.

    Example:
        >>> from torch import ones
        >>> def sent(rank):
        ...     return {"q.lora_A.weight": ones(rank, 6), "q.lora_B.weight": ones(5, rank)}
        >>> server = Server("rb", lora_alpha=4)
        >>> whole = server.aggregate([Reply("a", sent(1), 30), Reply("b", sent(2), 50)])
        >>> {key: tuple(X.shape) for key, X in server.adapter("a", whole).items()}
        {'q.lora_A.weight': (1, 6), 'q.lora_B.weight': (5, 1)}
    """

    def __init__(
        self,
        method: str | Callable[..., AggregationResult] = "rb",
        options: Mapping[str, Any] | None = None,
        *,
        scaling: float | Callable[[int], float] | None = None,
        lora_alpha: float | None = None,
        global_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        if scaling is not None and lora_alpha is not None:
            raise InputValueError(
                "expected scaling= or lora_alpha=, got both; lora_alpha / r is it"
            )
        self.method, self.options = method, dict(options or {})
        self.scaling, self.lora_alpha, self.global_rank = scaling, lora_alpha, global_rank
        self._entry = resolve(method)
        self._generator = torch.Generator().manual_seed(seed)
        self._sizes: dict[Hashable, dict[str, Size]] = {}
        self._largest: dict[str, int] = {}
        self._last: Arrays | None = None
        self._rounds = 0
        self._check_method()

    def aggregate(
        self, replies: Iterable[Reply], *, round: int | None = None, sent: Arrays | None = None
    ) -> dict[str, Any]:
        """The new global state dict; what is wrong is an error that names the client.

        Args:
            replies: one of every client that took part; their order changes nothing.
            round: its number, from 1; None counts the calls.
            sent: the global state dict that the clients started from, if it is not the one
                returned last; becomes ``previous=`` of methods that have it.
        """
        replies = _in_order(replies)
        adapters = {r.client: read_factors(r.arrays, f"client {r.client!r}") for r in replies}
        sizes = {reply.client: self._sizes_of(reply, adapters[reply.client]) for reply in replies}
        updates = {
            layer: [_update(reply, adapters[reply.client], layer, sizes) for reply in replies]
            for layer in adapters[replies[0].client].layers
        }
        ranks = {size.rank for client in (self._sizes | sizes).values() for size in client.values()}
        previous = self._last if sent is None else sent
        state = self._state(round or self._rounds + 1, ranks, low_ranks(previous))
        results = aggregate_layers(updates, self.method, **state)
        for result in results.values():
            _check_result(result, self._entry)
        excluded = {client for result in results.values() for client, _ in result.excluded}
        counted = [r for r in replies if r.client not in excluded and r.weight]
        made = self._factors(results, sizes, adapters[replies[0].client])
        made |= {key: _mean(key, counted) for key in replies[0].arrays if key not in made}
        self._sizes |= sizes
        self._rounds += 1
        self._last = sent_as({key: made[key] for key in replies[0].arrays}, replies[0].arrays)
        return dict(self._last)

    def adapter(self, client: Hashable, arrays: Arrays) -> dict[str, Any] | None:
        """A global state dict at the client's ranks and scalings; None for one never seen.

        Args:
            client: its id.
            arrays: what `aggregate` returned, or what became of it since.
        """
        if client not in self._sizes:
            return None
        return handed(arrays, self._sizes[client], self.divide)

    @property
    def divide(self) -> str:
        """Factors that a scaling is divided out of in the next round: "AB", "A" or "B"."""
        known = {**self.options, "round": self._rounds + 1}
        unscaled = self._entry.unscaled_factor(known)
        return next(factors for factors, other in DIVIDE.items() if other == unscaled)

    def _check_method(self) -> None:
        """Refuse a method by what its clients need, and by a trial on two clients of one entry."""
        entry, wrong = self._entry, [name for name in SUPPLIED if name in self.options]
        if entry.client not in TRAVELS:
            raise InputValueError(
                f"method {entry.name!r}: its client {CLIENTS[entry.client]}; a framework's server "
                "hands out leading components and nothing else. Call aggregate_layers in a loop "
                "of your own, or use 'flexlora' or 'rb'"
            )
        if wrong or "missing" in self.options:
            raise InputTypeError(
                f"option {(wrong or ['missing'])[0]}=: the server supplies previous= and round=, "
                "and all clients send the same keys; leave it out"
            )
        clients = [ClientUpdate(torch.ones(1, 1), torch.ones(1, 1), id=k) for k in range(2)]
        trial = self._state(1, {1}, None)
        trial = {k: [1] if k == "levels" else v for k, v in trial.items() if k != "initial"}
        _check_result(aggregate_layers({"trial": clients}, self.method, **trial)["trial"], entry)

    def _state(
        self, round: int, ranks: set[int], previous: Mapping[str, LowRank] | None
    ) -> dict[str, Any]:
        """The options given, and those that only the server knows, for a method that has them."""
        known: dict[str, Any] = {"previous": previous, "round": round, "levels": sorted(ranks)}
        known["generator"] = self._generator
        given = {k: v for k, v in self.options.items() if k != "initial" or not self._rounds}
        return {k: v for k, v in known.items() if k in self._entry.options} | given

    def _sizes_of(self, reply: Reply, adapter: Adapter) -> dict[str, Size]:
        if reply.scaling is None and reply.lora_alpha is None:
            return sizes_of(adapter, self.scaling, self.lora_alpha)
        return sizes_of(adapter, reply.scaling, reply.lora_alpha)

    def _factors(
        self,
        results: Mapping[str, AggregationResult],
        sizes: Mapping[Hashable, Mapping[str, Size]],
        adapter: Adapter,
    ) -> dict[str, Tensor]:
        """The global factors by key, no smaller than in any round before."""
        made: dict[str, Tensor] = {}
        for layer, part in adapter.layers.items():
            seen = (client[layer].rank for client in sizes.values())
            largest = self._largest[layer] = max(self._largest.get(layer, 0), *seen)
            (factors,) = distribute(results[layer], [self.global_rank or largest])
            made.update(zip(part.keys, part.folded(factors), strict=True))
        return made


def _check_result(result: AggregationResult, entry: MethodEntry) -> None:
    """Refuse what a global adapter alone cannot carry."""
    if result.residual is not None:
        raise InputValueError(
            f"method {entry.name!r} leaves a residual for the base weights, which do not travel; "
            "fold it in a loop of your own, or use 'flexlora', the best adapter without one"
        )
    if not result.nested:
        raise InputValueError(
            f"method {entry.name!r}: the leading components of its result are no answer at a "
            "smaller rank, so clients cannot be handed them; use 'flexlora' or 'rb'"
        )


def _in_order(replies: Iterable[Reply]) -> list[Reply]:
    """Sorted by client, every client once, all with the same keys."""
    ordered = sorted(replies, key=lambda reply: reply.client)  # type: ignore[arg-type, return-value]
    if not ordered:
        raise InputValueError("no replies; keep the last global state dict")
    first = ordered[0]
    for last, reply in pairwise(ordered):
        if reply.client == last.client:
            raise InputValueError(f"client {reply.client!r} replied twice in one round")
        odd = sorted(set(reply.arrays) ^ set(first.arrays))
        if odd:
            has = "has" if odd[0] in reply.arrays else "lacks"
            raise InputValueError(
                f"client {reply.client!r}: {len(odd)} keys differ from client {first.client!r}'s: "
                f"it {has} {odd[0]!r}; all clients must send the same keys"
            )
    return ordered


def _update(
    reply: Reply, adapter: Adapter, layer: str, sizes: Mapping[Hashable, Mapping[str, Size]]
) -> ClientUpdate:
    factors, scaling = adapter.factors(layer), sizes[reply.client][layer].scaling
    return ClientUpdate(factors.A, factors.B, weight=reply.weight, scaling=scaling, id=reply.client)


def _mean(key: str, replies: Sequence[Reply]) -> Tensor:
    """``Σ w_k x_k / Σ w_k`` in float64, in the dtype sent."""
    total = sum(reply.weight for reply in replies)
    first = _tensor(replies[0], key)
    mean = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
    for reply in replies:
        X = _tensor(reply, key)
        if X.shape != first.shape or not X.is_floating_point() or not bool(X.isfinite().all()):
            raise InputValueError(
                f"client {reply.client!r}: {key!r}: expected finite floats of shape "
                f"{tuple(first.shape)}, got {X.dtype} of shape {tuple(X.shape)}"
                f"{' with NaN or Inf' if X.is_floating_point() else ''}; send nothing but what "
                "was trained"
            )
        mean += X.to(mean) * (reply.weight / total)
    return mean.to(first.dtype)


def _tensor(reply: Reply, key: str) -> Tensor:
    X = reply.arrays[key]
    if isinstance(X, np.ndarray) and X.dtype.kind in "fiub":
        return torch.from_numpy(np.array(X))
    if isinstance(X, Tensor):
        return X.detach()
    raise InputTypeError(
        f"client {reply.client!r}: {key!r}: expected a tensor or an array of floats, got "
        f"{getattr(X, 'dtype', type(X).__name__)}"
    )
