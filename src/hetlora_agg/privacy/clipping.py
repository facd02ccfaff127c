"""Clip: the largest norm with which a client can enter a sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.checks import as_number
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.linalg import all_finite, exact_arithmetic, norms, product_norm
from hetlora_agg.types import ClientUpdate
from hetlora_agg.validation import read_updates

EPS = torch.finfo(torch.float64).eps

QR_ERROR = 10
"""``‖B A‖`` through QR errs by at most this times ``max(out, in) ε Σ ‖b_j‖ ‖a_j‖``, as LAPACK's."""


def clip_update(update: ClientUpdate | tuple[Any, ...], clip: float) -> ClientUpdate:
    """The update with ``‖scaling · B A‖_F`` at most the clip, its factors as they are.

    ``scaling ← scaling · min(1, C / ‖scaling · B A‖_F)``: the product is scaled, so it does not
    matter how the client wrote it in factors. Leading dimensions count as layers of one client.

    Args:
        update: a `ClientUpdate` or a tuple ``(A, B)``, ``(A, B, rank)``, ``(A, B, rank, weight)``,
            ``A (*layers, rank, in_features)``, ``B (*layers, out_features, rank)``.
        clip: C > 0.

    Returns:
        A `ClientUpdate` with the same tensors and a scaling that is smaller where it has to be.

    Raises:
        InputTypeError, InputValueError: a bad update, NaN or Inf, a clip that is none, a norm
            beyond float64.

    Cost: two QR decompositions per layer, ``2 (out + in) rank²`` multiply-adds; never out×in.

    Example:
        >>> import torch
        >>> clip_update((torch.ones(1, 4), 3 * torch.ones(4, 1)), clip=3).scaling  # norm 12
        0.24999...

    Reference: clipping of client updates, McMahan et al., arXiv:1710.06963.

    Fidelity: OURS for the norm of the product.

    Deviations: see `clip_layers`.
    """
    return clip_layers({"": update}, clip)[""]


def clip_layers(
    update: Mapping[str, ClientUpdate | tuple[Any, ...]], clip: float
) -> dict[str, ClientUpdate]:
    """One client's update of a whole model with its norm over all layers at most the clip.

    ``sqrt(Σ_l ‖s_l B_l A_l‖_F²) ≤ C``: every layer is scaled by the same factor.

    Args:
        update: layer name -> that layer's update, as `clip_update` takes it.
        clip: C > 0.

    Returns:
        Layer name -> `ClientUpdate` with the same tensors and a smaller scaling. An update within
        the clip comes back as it is.

    Raises:
        InputTypeError, InputValueError: no mapping, a bad update, NaN or Inf, a clip that is none,
            a norm beyond float64.

    Cost: that of `clip_update` for every layer.

    Example:
        >>> import torch
        >>> layer = (torch.ones(1, 4), torch.ones(4, 1))                      # norm 4
        >>> clipped = clip_layers({"q": layer, "v": layer}, clip=4)           # together √32
        >>> round(clipped["q"].scaling, 6) == round(clipped["v"].scaling, 6) == 0.707107
        True

    Reference: clipping of client updates, McMahan et al., arXiv:1710.06963.

    Fidelity: OURS for the norm of the product.

    Deviations: the norm stays below C after the scaling was folded into the factors and rounded to
    their dtype (float32 for half precision), for entries within its normal range. Rounding is
    relative to ``Σ_j ‖b_j‖ ‖a_j‖``, so components that nearly cancel are scaled further down.
    """
    if not isinstance(update, Mapping):
        raise InputTypeError(
            f"clip_layers: expected {{layer: update}} of one client, got {type(update).__name__}; "
            "for one layer call clip_update"
        )
    clip = as_number(clip, "clip=", zero=False)
    norm = math.hypot(*(_largest_norm(name, given) for name, given in update.items()))
    if not math.isfinite(norm):
        raise InputValueError("clip: the norm of the update leaves float64; scale it down first")
    factor = 1.0 if norm <= clip else clip / norm * (1 - 4 * EPS)
    clipped = {}
    for name, given in update.items():
        one = given if isinstance(given, ClientUpdate) else ClientUpdate(*given)
        clipped[name] = replace(one, scaling=float(one.scaling) * factor) if factor < 1 else one
        if not float(clipped[name].scaling) > 0:
            raise InputValueError(
                f"clip=: {clip:g} is too small by the norm {norm:g} for any scaling to bring down; "
                "leave this client out of the round"
            )
    return clipped


def _largest_norm(name: str, given: Any) -> float:
    """``‖s B A‖_F`` of one layer, with everything that rounding could add to it."""
    (read,), _ = read_updates([given], name or None)
    A, B = read.A, read.B
    if not all_finite(A, B):
        where = f"layer {name!r}: " if name else ""
        raise InputValueError(
            f"{where}NaN or Inf in the factors; leave this client out of the round"
        )
    computed = torch.float64 if torch.float64 in (A.dtype, B.dtype) else torch.float32
    # Two roundings in each factor, once the scaling is folded in, are at most two of these.
    rounding = 2 * torch.finfo(computed).eps + QR_ERROR * max(B.shape[-2], A.shape[-1]) * EPS
    with exact_arithmetic(A.device.type):
        terms = (norms(B.double(), -2) * norms(A.double(), -1)).sum(-1)
        largest = product_norm(B, A) + rounding * terms
        return float(norms(largest.flatten(), -1)) * float(read.scaling)


def clip_message(message: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """The message with its Euclidean norm, over all its tensors together, at most the clip.

    ``m ← m · min(1, C / ‖m‖_2)``. Where sums of factors are noised, as under secure aggregation,
    this is the clip: one of the product bounds neither factor.

    Args:
        message: name -> tensor, from `secure.linear_message`; of several layers under one name
            each.
        clip: C > 0. A client that is zeroed moves the sum by at most C, one that is replaced by at
            most 2C.

    Returns:
        Name -> tensor of the same shape and dtype.

    Raises:
        InputTypeError, InputValueError: no tensors, NaN or Inf, a clip that is none.

    Cost: two passes over the message.

    Example:
        >>> import torch
        >>> message = {"A": torch.tensor([[3.0]]), "B": torch.tensor([[4.0]])}
        >>> {name: round(float(x), 4) for name, x in clip_message(message, clip=1.0).items()}
        {'A': 0.6, 'B': 0.8}

    Reference: clipping of client updates, McMahan et al., arXiv:1710.06963.

    Fidelity: OURS.

    Deviations: the norm stays below C after rounding, for entries within the dtype's normal range.
    """
    clip = as_number(clip, "clip=", zero=False)
    if not isinstance(message, Mapping) or not all(
        isinstance(X, Tensor) and X.is_floating_point() for X in message.values()
    ):
        raise InputTypeError("clip_message: expected {name: floating tensor}")
    if not all_finite(*message.values()):
        raise InputValueError("clip_message: NaN or Inf; leave this client out of the round")
    with torch.no_grad():
        parts = [norms(X.detach().double().flatten(), -1) for X in message.values()]
        norm = math.hypot(*map(float, parts))
        entries = sum(X.numel() for X in message.values())
        rounding = max([EPS, *(torch.finfo(X.dtype).eps for X in message.values())])
        factor = clip / norm * (1 - 2 * rounding - entries * EPS) if norm > 0 else 1.0
        if norm * (1 + entries * EPS) <= clip:
            return {name: X.detach().clone() for name, X in message.items()}
        return {name: (X.detach().double() * factor).to(X) for name, X in message.items()}
