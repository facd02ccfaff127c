"""Flower: a strategy for its message API, and the client's two ends of a message.

On the server `HetLoRA` takes the place of ``FedAvg``; on a client `receive` turns a message into a
state dict at the client's own ranks, `reply` a trained state dict into a message's content.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetlora_agg import AggregationResult, InputTypeError, InputValueError
from hetlora_agg.integrations.handing import Arrays, leading, require
from hetlora_agg.integrations.server import Reply, Server

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg

    _MISSING = None
except ImportError as error:
    FedAvg, _MISSING = object, error

DIVIDE = "hetlora-divide"
"""Key in a message's ConfigRecord: which factors the client divides by its scaling, "" for none."""

SAID = ("scaling", "lora_alpha")
"""Keys in a reply's MetricRecord that say what the factors are scaled by; never averaged."""


class HetLoRA(FedAvg):
    """``FedAvg`` for LoRA adapters of different ranks, by any method that hands out adapters.

    A client's rank is read off its arrays, its weight is its ``num-examples``, its scaling comes
    from ``scaling`` or ``lora_alpha`` in its MetricRecord or from here. What goes to a node that
    has replied before is the global adapter at that node's own ranks and scaling; a node never
    seen gets the global one, which `receive` cuts. Nodes are sorted by id, so the order in which
    replies arrive changes no bit. Everything that is not a LoRA factor, such as a classifier
    head, is averaged by weight.

    Args:
        method: a name from ``METHODS``, or a function of `Components`.
        lora_alpha: of clients that do not send theirs; every layer's rank divides it.
        scaling: or their scaling, or a function of the rank, such as
            ``lambda r: 16 / math.sqrt(r)`` for rsLoRA. Without any of these a round is an error.
        keys: names of the arrays, in their order, where clients send a list without names.
        global_rank: rank of the global adapter; None is the largest one seen so far.
        seed: of the generator of random methods.
        **options: ``FedAvg``'s own, such as ``fraction_train``; all others are the method's and
            `aggregate_layers`'s, such as ``rank`` and ``on_bad_client``. What a method carries from
            round to round (``previous=``, ``round=``, ``levels=``, ``generator=``) is supplied.

    Raises:
        ImportError: Flower is missing.
        InputTypeError, InputValueError: when it is made, a method whose clients need more than a
            global adapter, or wrong options; in a round, what is wrong with which node's reply.

    Example:
        >>> strategy = HetLoRA("rb", lora_alpha=16, fraction_train=0.5)      # doctest: +SKIP
        >>> strategy.start(grid=grid, initial_arrays=arrays, num_rounds=3)   # doctest: +SKIP
    """

    def __init__(
        self,
        method: str | Callable[..., AggregationResult] = "rb",
        *,
        lora_alpha: float | None = None,
        scaling: float | Callable[[int], float] | None = None,
        keys: Sequence[str] | None = None,
        global_rank: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        require("Flower", _MISSING)
        flower = {k: options.pop(k) for k in inspect.signature(FedAvg).parameters if k in options}
        super().__init__(**flower)
        self.keys = None if keys is None else list(keys)
        self.server = Server(
            method,
            options,
            lora_alpha=lora_alpha,
            scaling=scaling,
            global_rank=global_rank,
            seed=seed,
        )
        self._sent: Arrays | None = None

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> list[Any]:
        """Flower's messages, every node's arrays at its own ranks."""
        self._sent = self._named(arrays, "initial_arrays")
        return self._own(super().configure_train(server_round, arrays, config, grid), arrays)

    def configure_evaluate(
        self, server_round: int, arrays: Any, config: Any, grid: Any
    ) -> list[Any]:
        """Flower's messages, every node's arrays at its own ranks."""
        return self._own(super().configure_evaluate(server_round, arrays, config, grid), arrays)

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
        """The global adapter in units of ΔW, and the metrics' weighted mean.

        Args:
            server_round: the round, from 1.
            replies: messages of one ArrayRecord and one MetricRecord each; those that carry an
                error are logged and left out.
        """
        # Flower's own check of the keys does not say which node is wrong.
        valid, _ = self._check_and_log_replies(list(replies), is_train=True, validate=False)
        if not valid:
            return None, None
        valid = sorted(valid, key=_node)
        read = [self._read(message) for message in valid]
        _check_metrics(valid)
        made = self.server.aggregate(read, round=server_round, sent=self._sent)
        contents = [message.content for message in valid]
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        for name in SAID:
            metrics.pop(name, None)
        return self._record(made), metrics

    def _own(self, messages: Iterable[Any], arrays: Any) -> list[Any]:
        messages, named = list(messages), self._named(arrays, "arrays")
        for message in messages:
            own = self.server.adapter(_node(message, sender=False), named)
            config = ConfigRecord(dict(message.content[self.configrecord_key]))
            config[DIVIDE] = self.server.divide if own is None else ""
            record = arrays if own is None else self._record(own)
            message.content = RecordDict(
                {self.arrayrecord_key: record, self.configrecord_key: config}
            )
        return messages

    def _read(self, message: Any) -> Reply:
        where, content = f"node {_node(message)}", message.content
        for kind in ("array_records", "metric_records"):
            if len(getattr(content, kind)) != 1:
                raise InputValueError(
                    f"{where}: expected one of {kind} in its reply, got "
                    f"{len(getattr(content, kind))}; hetlora_agg.integrations.flower.reply makes it"
                )
        (arrays,), (metrics,) = content.array_records.values(), content.metric_records.values()
        key = self.weighted_by_key
        if not isinstance(metrics.get(key), (int, float)):
            raise InputValueError(
                f"{where}: expected one number as {key!r} in its MetricRecord, got "
                f"{metrics.get(key)!r}; it is the client's weight"
            )
        said = {name: metrics[name] for name in SAID if name in metrics}
        return Reply(_node(message), self._named(arrays, where), metrics[key], **said)

    def _named(self, record: Any, where: str) -> dict[str, np.ndarray]:
        """The record's arrays by key; of a list by `keys`."""
        given = list(record)
        if self.keys is not None and len(given) != len(self.keys):
            raise InputValueError(
                f"{where}: expected {len(self.keys)} arrays, one for each of keys=, got "
                f"{len(given)}"
            )
        named = {}
        for key, array in zip(self.keys or given, record.values(), strict=True):
            try:
                named[key] = array.numpy()
            except (TypeError, ValueError) as error:
                raise InputTypeError(
                    f"{where}: {key!r}: expected a numpy array as Flower packs it, got dtype "
                    f"{array.dtype!r}, serialised as {array.stype!r}; Flower has no bfloat16, send "
                    "float32 (tensor.float())"
                ) from error
        return named

    def _record(self, arrays: Mapping[str, np.ndarray]) -> Any:
        if self.keys is not None:
            return ArrayRecord([arrays[key] for key in self.keys])
        return ArrayRecord({key: Array(X) for key, X in arrays.items()})


def receive(
    message: Any,
    like: Arrays,
    *,
    lora_alpha: float | None = None,
    scaling: float | Callable[[int], float] | None = None,
) -> dict[str, Tensor]:
    """A message's arrays as a state dict at the client's own ranks.

    Args:
        message: what the ``ClientApp`` was called with, from a server that runs `HetLoRA`.
        like: the client's own state dict, whose keys, ranks and dtypes are wanted:
            ``get_peft_model_state_dict(model)``.
        lora_alpha: the client's.
        scaling: or its ``lora_alpha / r``, or a function of r; one of the two.

    Returns:
        Tensors by the keys of ``like``, for ``set_peft_model_state_dict``.

    Raises:
        InputValueError: a message from another strategy, or other layers than the client has.

    Example:
        >>> own = get_peft_model_state_dict(model)                          # doctest: +SKIP
        >>> start = receive(message, own, lora_alpha=16)                    # doctest: +SKIP
        >>> set_peft_model_state_dict(model, start)                         # doctest: +SKIP
    """
    require("Flower", _MISSING)
    (record,) = message.content.array_records.values()
    said = [
        config[DIVIDE] for config in message.content.config_records.values() if DIVIDE in config
    ]
    if not said or len(record) != len(like):
        raise InputValueError(
            f"receive: expected {len(like)} arrays from the strategy HetLoRA, got {len(record)}"
            f"{'' if said else ' from another one'}; initial_arrays= and like= need the same keys"
        )
    # A list of arrays comes under the names "0", "1", ….
    unnamed = list(record) == [str(i) for i in range(len(record))]
    names = like if unnamed else record
    arrays = {name: array.numpy() for name, array in zip(names, record.values(), strict=True)}
    if said[0]:
        arrays = leading(arrays, like, lora_alpha=lora_alpha, scaling=scaling, divide=said[0])
    for name, X in arrays.items():
        if X.shape != tuple(like[name].shape):
            raise InputValueError(
                f"receive: {name!r}: expected shape {tuple(like[name].shape)} as in like=, got "
                f"{X.shape}, the one of this node's last reply; a client keeps the rank it replied "
                "with until its next reply"
            )
    return {name: torch.as_tensor(X).to(like[name].dtype) for name, X in arrays.items()}


def reply(
    arrays: Arrays | Sequence[np.ndarray],
    num_examples: int,
    *,
    lora_alpha: float | None = None,
    scaling: float | None = None,
    **metrics: float,
) -> Any:
    """A trained state dict as the content of a reply.

    Args:
        arrays: ``get_peft_model_state_dict(model)``; or arrays in the order of the server's
            ``keys=``.
        num_examples: the client's weight.
        lora_alpha: the client's, if the strategy does not know it.
        scaling: or its ``lora_alpha / r``, the same in all its layers.
        **metrics: what the strategy averages besides, such as a loss.

    Returns:
        A ``RecordDict`` for ``Message(content, reply_to=message)``.

    Raises:
        InputTypeError: bfloat16, which Flower cannot carry.

    Example:
        >>> content = reply(own, 500, lora_alpha=16, loss=0.31)             # doctest: +SKIP
        >>> Message(content, reply_to=message)                              # doctest: +SKIP
    """
    require("Flower", _MISSING)
    named = arrays if isinstance(arrays, Mapping) else dict(enumerate(arrays))
    half = [key for key, X in named.items() if getattr(X, "dtype", None) == torch.bfloat16]
    if half:
        raise InputTypeError(
            f"reply: {half[0]!r} is bfloat16, which numpy and so Flower's ArrayRecord do not know; "
            "send {key: tensor.float() for key, tensor in state_dict.items()}"
        )
    numpy = [X.numpy(force=True) if isinstance(X, Tensor) else X for X in named.values()]
    pairs = zip(named, numpy, strict=True)
    record = {k: Array(X) for k, X in pairs} if isinstance(arrays, Mapping) else numpy
    known = {"scaling": scaling, "lora_alpha": lora_alpha}
    said = {name: value for name, value in known.items() if value is not None}
    counted = MetricRecord({"num-examples": num_examples, **said, **metrics})
    return RecordDict({"arrays": ArrayRecord(record), "metrics": counted})


def _node(message: Any, *, sender: bool = True) -> int:
    metadata: Any = message.metadata
    node: int = metadata.src_node_id if sender else metadata.dst_node_id
    return node


def _check_metrics(messages: Sequence[Any]) -> None:
    """The same metrics from every node, or their means would be over different nodes."""
    names = [set(next(iter(m.content.metric_records.values()))) for m in messages]
    for message, found in zip(messages, names, strict=True):
        if odd := sorted(found ^ names[0]):
            raise InputValueError(
                f"node {_node(message)}: its metrics differ from node {_node(messages[0])}'s in "
                f"{odd}; all clients must send the same"
            )
