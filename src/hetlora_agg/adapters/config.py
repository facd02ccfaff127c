"""``adapter_config.json``: which fields change the arithmetic, PEFT's patterns, other ranks."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from hetlora_agg.checks import as_integer, as_number
from hetlora_agg.errors import InputTypeError, InputValueError, quoted, shown

UNDERSTOOD = frozenset(
    {
        # what it is
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode"),
        # where it sits, and what is trained besides
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("layer_replication", "modules_to_save", "bias", "lora_bias", "fan_in_fan_out"),
        *("use_dora", "lora_dropout", "runtime_config"),
        # its size and scaling
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
        # settings of variants that are off
        *("megatron_core", "qalora_group_size"),
    }
)
"""Fields that this library reads or may ignore; any other must be null, false or empty."""

PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")
"""``init_lora_weights`` that leave the base weights and the two factors' meaning alone."""

_CONVERT = (
    "the base weights were changed when it began, so the factors are no update of the base model; "
    "save it as plain LoRA with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)
_STARTS = {
    "pissa": _CONVERT,
    "olora": _CONVERT,
    "corda": _CONVERT,
    "lora_ga": _CONVERT,
    "loftq": "its base weights are a quantised approximation of its own; train clients on one "
    "common quantised base with init_lora_weights=true",
    "eva": "its ranks and first factors come from one client's own data; once trained the factors "
    "are a plain update, so set init_lora_weights to true in adapter_config.json to say so",
}


BIASES = ("none", "all", "lora_only")
"""What PEFT knows of training biases."""

LONGEST = 1000
"""Characters of a pattern; paths of layers have a tenth of them."""

_REPEATED = re.compile(r"\((?:[^()]|\([^()]*\))*[*+}|](?:[^()]|\([^()]*\))*\)[*+{]")
"""A group under a repetition with a repetition or a choice in it."""


def read_config(given: Any, where: str) -> dict[str, Any]:
    """The config as a dict of plain JSON values, checked field by field.

    Args:
        given: a dict, or an object with ``to_dict()`` such as ``peft.LoraConfig``.
        where: whose it is, for errors.

    Raises:
        InputTypeError, InputValueError: what is wrong, found, expected, remedy.
    """
    if hasattr(given, "to_dict"):
        given = given.to_dict()
    if not isinstance(given, Mapping):
        raise InputTypeError(
            f"{where}: expected adapter_config as a dict or a peft LoraConfig, got "
            f"{type(given).__name__}"
        )
    try:
        config: dict[str, Any] = {str(name): _plain(value) for name, value in given.items()}
    except RecursionError as error:
        raise InputValueError(f"{where}: the adapter's config is nested too deeply") from error
    if str(config.setdefault("peft_type", "LORA")).upper() != "LORA":
        raise InputValueError(
            f"{where}: expected peft_type 'LORA', got {shown(config['peft_type'])}; other PEFT "
            "methods have no factors A and B to aggregate"
        )
    _check_start(config.get("init_lora_weights"), where)
    # 0 is a value, not an empty one.
    odd = sorted(
        name
        for name, value in config.items()
        if name not in UNDERSTOOD and not _says_nothing(value)
    )
    if odd:
        found = ", ".join(f"{name[:100]}={shown(config[name])}" for name in odd[:5])
        raise InputValueError(
            f"{where}: {found} in the adapter's config: expected plain LoRA, rsLoRA or DoRA; what "
            "the field means for B @ A is not known here. Train without it, or set it to null if "
            "it changes nothing"
        )
    _check_numbers(config, where)
    _check_kinds(config, where)
    return config


def _check_numbers(config: dict[str, Any], where: str) -> None:
    for name in ("r", "lora_alpha"):
        if name not in config:
            raise InputValueError(f"{where}: the adapter's config has no {name!r}; add it")
    as_integer(config["r"], f"{where}: r", at_least=1)
    as_number(config["lora_alpha"], f"{where}: lora_alpha", zero=False)
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise InputTypeError(f"{where}: {field}: expected a dict, got {shown(patterns)}")
        for pattern, value in patterns.items():
            at = f"{where}: {field}[{shown(pattern)}]"
            if field == "rank_pattern":
                as_integer(value, at, at_least=1)
            else:
                as_number(value, at, zero=False)
            _check_pattern(pattern, at)


def _check_pattern(pattern: str, at: str) -> None:
    """A regular expression, and none that a chosen path could keep busy for ever."""
    try:
        _compiled(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputValueError(f"{at}: no regular expression: {quoted(error)}") from error
    if len(pattern) > LONGEST or _REPEATED.search(pattern):
        raise InputValueError(
            f"{at}: a pattern of over {LONGEST} characters, or a repeated group that repeats or "
            "chooses, can take for ever to match; write the layers out, or use * without brackets"
        )


def _check_kinds(config: Mapping[str, Any], where: str) -> None:
    """Fields whose value decides what is averaged: "false" is no False."""
    for field in ("use_rslora", "use_dora", "lora_bias"):
        if not isinstance(config.get(field), (bool, type(None))):
            raise InputTypeError(
                f"{where}: {field}: expected true or false, got {shown(config[field])}"
            )
    if config.get("bias") not in (None, *BIASES):
        raise InputValueError(
            f"{where}: bias: expected one of {list(BIASES)}, got {shown(config['bias'])}"
        )
    modules = config.get("modules_to_save")
    if modules is not None and not (
        isinstance(modules, list) and all(isinstance(name, str) for name in modules)
    ):
        raise InputTypeError(
            f"{where}: modules_to_save: expected a list of names or null, got {shown(modules)}"
        )


def _check_start(start: Any, where: str) -> None:
    """Refuse initialisations after which ``base + B A`` is not the client's model."""
    if start in PLAIN_STARTS:
        return
    remedy = next((why for name, why in _STARTS.items() if str(start).startswith(name)), None)
    raise InputValueError(
        f"{where}: init_lora_weights={shown(start)}: expected one of {PLAIN_STARTS}; "
        + (remedy or "what it does to the base weights is not known here")
    )


def _says_nothing(value: Any) -> bool:
    """Whether an option is off: None, False or empty; a numpy number compares as arrays do."""
    return value is None or value is False or (isinstance(value, (dict, list, str)) and not value)


def _plain(value: Any) -> Any:
    """JSON's own types: LoraConfig holds sets and enums."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    single = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0)
    return value.item() if single and not getattr(value, "is_meta", False) else shown(value)


def rank_and_alpha(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """A layer's rank and alpha, by PEFT's patterns: the first that matches the end of its path."""
    rank = _first_match(config.get("rank_pattern") or {}, path, config["r"])
    alpha = _first_match(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    return int(rank), float(alpha)


def scaling_of(config: Mapping[str, Any], path: str) -> float:
    """``alpha / r``, or ``alpha / √r`` under rsLoRA."""
    rank, alpha = rank_and_alpha(config, path)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((v for k, v in patterns.items() if _compiled(k).match(path)), default)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    # As in peft.utils.other.get_pattern_key.
    return re.compile(rf"(.*\.)?({pattern})$")


def resized(
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float] | None = None,
    own_layers: Iterable[str] = (),
) -> dict[str, Any]:
    """The config for other ranks: PEFT builds exactly these, whatever the layers.

    Args:
        config: what all other fields are taken from.
        ranks: path -> rank.
        alphas: path -> alpha; None means alpha = rank, a scaling of 1.
        own_layers: paths that ``target_modules`` of the config covers; other layers are listed
            one by one instead.
    """
    alphas = {path: float(rank) for path, rank in ranks.items()} if alphas is None else alphas
    largest = max(ranks, key=lambda path: ranks[path])
    sized = copy.deepcopy(dict(config))
    sized.update(r=ranks[largest], lora_alpha=_number(alphas[largest]), use_rslora=False)
    for field, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        usual = values[largest]
        sized[field] = _patterns({p: _number(v) for p, v in values.items() if v != usual}, ranks)
    if set(own_layers) != set(ranks):
        # By full path; PEFT compares path and ".path" endings.
        sized["target_modules"] = list(ranks)
        for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            sized[field] = None
    return sized


def _patterns(values: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Patterns that give exactly these paths their values: the paths themselves if they do."""
    # Patterns match as regular expressions at the end of a path: "a.b" is also the end of "x.a.b".
    mine = dict(values)
    if all(_first_match(mine, path, None) == values.get(path) for path in paths):
        return mine
    return {f"^{re.escape(path)}": value for path, value in values.items()}


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
