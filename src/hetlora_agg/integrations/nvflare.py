"""NVFlare: an aggregator for its ``FedAvg`` controller, and the client's part of a global model.

On the server `HetLoRAAggregator` goes into ``FedAvgRecipe(aggregator=…)``; on a client
`own_params` cuts what ``flare.receive()`` returned to the client's own ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hetlora_agg import InputTypeError, InputValueError
from hetlora_agg.integrations.handing import Arrays, leading, require
from hetlora_agg.integrations.server import Reply, Server

try:
    from nvflare.app_common.abstract.fl_model import FLModel
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator

    _MISSING = None
except ImportError as error:
    ModelAggregator, _MISSING = object, error

DIVIDE = "hetlora_divide"
"""Key in a global model's meta: which factors the client divides by its scaling."""


class HetLoRAAggregator(ModelAggregator):
    """Aggregates LoRA adapters of different ranks, by any method that hands out adapters.

    A client's rank is read off its arrays, its weight is ``NUM_STEPS_CURRENT_ROUND`` in its meta
    (all clients count alike if none sends it), its scaling ``scaling`` or ``lora_alpha`` in its
    meta or from here. The result is the global adapter at the largest rank, in units of ΔW, under
    the keys that the clients sent. Everything that is not a LoRA factor is averaged by weight.

    An update is judged when the round is aggregated: NVFlare catches what `accept_model` raises
    and goes on without that client.

    Args:
        method: a name from ``METHODS``; a job carries no functions.
        lora_alpha: of clients that do not send theirs; every layer's rank divides it.
        scaling: or their scaling. Without any of these a round is an error.
        global_rank: rank of the server's model, whose shapes may not change; None is the largest
            rank seen so far, which will do while its owner takes part in the first round.
        options: the method's and `aggregate_layers`'s, plain numbers, strings and lists.
        weight_key: where in its meta a client says its weight.
        seed: of the generator of random methods.

    Raises:
        ImportError: NVFlare is missing.
        InputTypeError, InputValueError: when it is made, a method whose clients need more than a
            global adapter, or wrong options; in a round, what is wrong with which client's update.

    Example:
        >>> aggregator = HetLoRAAggregator("rb", lora_alpha=16)               # doctest: +SKIP
        >>> recipe = FedAvgRecipe(..., aggregator=aggregator)                 # doctest: +SKIP
    """

    def __init__(
        self,
        method: str = "rb",
        lora_alpha: float | None = None,
        scaling: float | None = None,
        global_rank: int | None = None,
        options: dict[str, Any] | None = None,
        weight_key: str = "NUM_STEPS_CURRENT_ROUND",
        seed: int = 0,
    ) -> None:
        require("NVFlare", _MISSING)
        super().__init__()
        if not isinstance(method, str) or callable(scaling):
            raise InputTypeError(
                "HetLoRAAggregator: expected a method's name and a number as scaling; NVFlare "
                "writes its arguments into the job as JSON, so functions do not arrive"
            )
        # Under their own names: NVFlare reads the job's arguments off the attributes.
        self.method, self.lora_alpha, self.scaling = method, lora_alpha, scaling
        self.global_rank, self.options = global_rank, options
        self.weight_key, self.seed = weight_key, seed
        self._server = Server(
            method,
            options,
            lora_alpha=lora_alpha,
            scaling=scaling,
            global_rank=global_rank,
            seed=seed,
        )
        self._received: list[Any] = []

    def accept_model(self, model: Any) -> None:
        """Keeps one client's update for the end of the round."""
        self._received.append(model)

    def aggregate_model(self) -> Any:
        """The global adapter of this round, in an ``FLModel``.

        Raises:
            InputValueError: no update arrived, or what is wrong with which.
        """
        if not self._received:
            raise InputValueError(
                "no client's update arrived; NVFlare leaves out empty ones with no more than a "
                "warning, and its default format makes empty ones of numpy arrays: send tensors in "
                "FLModel(params=…), and see the clients' logs"
            )
        models = sorted(self._received, key=_client)
        for model in models:
            _check(model)
        weights = self._weights(models)
        replies = [
            Reply(_client(model), model.params, weight, **_said(model))
            for model, weight in zip(models, weights, strict=True)
        ]
        params = self._server.aggregate(replies)
        self._received = []
        return FLModel(
            params=params,
            params_type="FULL",
            metrics=_mean_metrics([model.metrics or {} for model in models], weights),
            meta={DIVIDE: self._server.divide},
        )

    def reset_stats(self) -> None:
        """Forgets this round's updates; what methods carry from round to round stays."""
        self._received = []

    def _weights(self, models: Sequence[Any]) -> list[float]:
        found: list[Any] = [(model.meta or {}).get(self.weight_key) for model in models]
        silent = [
            _client(model) for model, weight in zip(models, found, strict=True) if weight is None
        ]
        if len(silent) == len(models):
            return [1.0] * len(models)
        if silent:
            raise InputValueError(
                f"client {silent[0]!r}: no {self.weight_key!r} in its meta, which other clients "
                "sent; it is the client's weight, all clients must send it or none"
            )
        return found


def own_params(
    model: Any,
    like: Arrays,
    *,
    lora_alpha: float | None = None,
    scaling: float | Callable[[int], float] | None = None,
) -> dict[str, Tensor]:
    """A global model's params at the client's own ranks, its scaling divided out.

    Args:
        model: the ``FLModel`` that ``flare.receive()`` returned.
        like: the client's own state dict of what is trained, whose keys, ranks and dtypes are
            wanted; the frozen base weights that the server's model has besides are left out.
        lora_alpha: the client's.
        scaling: or its ``lora_alpha / r``, or a function of r; one of the two.

    Returns:
        Tensors by the keys of ``like``; the client trains them and sends them back as tensors.

    Raises:
        InputValueError: a global model that lacks a key of ``like``, or no scaling.

    Example:
        >>> start = own_params(flare.receive(), model.state_dict(), lora_alpha=16)
        ... # doctest: +SKIP
    """
    lost = [key for key in like if key not in model.params]
    if lost:
        raise InputValueError(
            f"own_params: the global model lacks {len(lost)} keys of like=, such as {lost[0]!r}; "
            "the server's model needs the clients' names, and like= no more than what is trained"
        )
    divide = (model.meta or {}).get(DIVIDE, "AB")
    sent = {key: model.params[key] for key in like}
    own = leading(sent, like, lora_alpha=lora_alpha, scaling=scaling, divide=divide)
    return {key: torch.as_tensor(X).to(like[key]) for key, X in own.items()}


def _client(model: Any) -> str:
    return str((model.meta or {}).get("client_name", ""))


def _check(model: Any) -> None:
    """Refuse what is no full state dict."""
    kind = getattr(model.params_type, "value", model.params_type)
    if not isinstance(model.params, Mapping) or not model.params or kind != "FULL":
        raise InputValueError(
            f"client {_client(model)!r}: expected params with params_type FULL, got {kind} with "
            f"{len(model.params or {})} arrays; adapters of different ranks have no difference to "
            "the global one, and numpy arrays get lost in NVFlare's default format: send the "
            "whole adapter as torch tensors"
        )


def _said(model: Any) -> dict[str, float]:
    return {name: model.meta[name] for name in ("scaling", "lora_alpha") if name in model.meta}


def _mean_metrics(metrics: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> Any:
    """Weighted means of the numbers that every client sent, None without any."""
    total = sum(weights)
    names = [
        name
        for name in metrics[0]
        if all(isinstance(found.get(name), (int, float)) for found in metrics)
    ]
    means = {
        name: sum(w * found[name] for found, w in zip(metrics, weights, strict=True)) / total
        for name in names
    }
    return means or None
