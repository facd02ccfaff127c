"""Sensitivity: by how much one clipped client can move the total update."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hetlora_agg.checks import as_fraction, as_list, as_number, check_choice
from hetlora_agg.errors import InputValueError, OptionValueError
from hetlora_agg.registry import METHODS, MethodEntry, Run, check_options, resolve

ADJACENCIES: Mapping[str, str] = MappingProxyType(
    {
        "zeroed": "one client's update becomes zero; everybody's weight and slots are public and "
        "stay as they are",
        "replaced": "one client's update becomes another one within the clip; everybody's weight "
        "and slots are public and stay as they are",
        "removed": "one client is taken out or added, with its weight and its slots, and the "
        "shares of the others make up the whole",
    }
)
"""Who counts as a neighbour of a cohort."""

INERT = frozenset({"align", "floor", "fold_rest", "generator", "rank", "round", "sketch", "split"})
"""Options with which the bounds hold as they are, or which they take into account."""

WITH_ROSTER = frozenset({"previous", "quorum"})
"""Options that do no harm as long as nobody's slots change."""


@dataclass(frozen=True)
class Sensitivity:
    """The bound, and what it was derived from.

    Attributes:
        l2: largest change of the total update in the Frobenius norm over all layers.
        adjacency: which cohorts are neighbours, a name from ``ADJACENCIES``.
        clip: C, the largest norm of a client's update.
        largest_share: p_max, the largest fraction of all weight that one client has.
        conditions: what must hold for the bound to be one, in words.
    """

    l2: float
    adjacency: str
    clip: float
    largest_share: float
    conditions: tuple[str, ...]

    def deviation(self, noise_multiplier: float) -> float:
        """Standard deviation of the Gaussian noise on every entry of the dense total update.

        Args:
            noise_multiplier: z > 0, the standard deviation over the sensitivity: ``z · l2``.

        Raises:
            InputTypeError, InputValueError: a multiplier that is not a finite number above zero.
        """
        return as_number(noise_multiplier, "noise_multiplier", zero=False) * self.l2


def sensitivity(
    method: str | Run,
    *,
    clip: float,
    weights: Sequence[float],
    adjacency: str = "zeroed",
    total: float | None = None,
    **options: Any,
) -> Sensitivity:
    """The largest change that one clipped client makes to a method's total update.

    With ``p = max n_k / Σ n`` and the clip C: ``p C`` for one zeroed, ``2 p C`` for one replaced or
    removed, where the total is the mean of the updates; ``γ C``, ``2 γ C`` and
    ``(γ + p / (β d)) C``, ``γ = min(1, p / β)``, ``d = β + (1 − β) p``, for slots averaged over
    their owners with a floor β.

    Args:
        method: a name from ``METHODS``, or a function that is registered.
        clip: C, what `clip_layers` was given on every client.
        weights: of all clients that can take part, at least 0, as the method gets them.
        adjacency: "zeroed", "replaced" or "removed", see ``ADJACENCIES``.
        total: a fixed denominator in place of ``Σ n``, as with sampled cohorts; then one that is
            removed is one that is zeroed.
        **options: the method's, as `aggregate` gets them.

    Returns:
        A `Sensitivity`. Each bound is attained by some cohort.

    Raises:
        InputTypeError, InputValueError: a method or options without a bound, and why; weights or a
            clip that are none.

    Cost: none.

    Example:
        >>> sensitivity("flora", clip=2.0, weights=[1, 1, 2]).l2
        1.0
        >>> sensitivity("rb", clip=2.0, weights=[1] * 10, rank="full", align="svd", floor=0.5).l2
        0.4

    Reference: sensitivity and the Gaussian mechanism, Dwork & Roth, 2014.

    Fidelity: OURS.

    Deviations: none.
    """
    entry = resolve(method)
    check_options(entry, options)
    check_choice("adjacency", adjacency, sorted(ADJACENCIES))
    clip = as_number(clip, "clip=", zero=False)
    shares = _shares(weights, total)
    p = max(shares)
    if adjacency == "removed" and total is None and len(shares) < 2:
        raise InputValueError(
            "sensitivity: removing the only client leaves nothing to average; use 'zeroed'"
        )
    _check_bounded(entry, adjacency, options)
    if entry.holds("exact", options):
        moved = _of_mean(p, adjacency, total)
    else:
        if total is not None:
            raise OptionValueError(f"total=: {entry.name!r} divides by slot; leave it out")
        moved = _of_slots(p, as_fraction(options["floor"], "floor="), adjacency)
    return Sensitivity(
        l2=moved * clip,
        adjacency=adjacency,
        clip=clip,
        largest_share=p,
        conditions=(
            ADJACENCIES[adjacency],
            f"every client's update has norm at most {clip:g} over all its layers together",
            f"no client has more than {p:.6g} of all weight, in any cohort and in any layer: one "
            "that a client lacks counts as zero, missing='zero', and others do not make up for it",
            "the noise goes onto the dense total, before any truncation",
        ),
    )


def _of_mean(p: float, adjacency: str, total: float | None) -> float:
    """Of ``Σ p_k ΔW_k``: a client moves it by ``p_k (ΔW_k − what takes its place)``."""
    return p if adjacency == "zeroed" or (adjacency == "removed" and total is not None) else 2 * p


def _of_slots(p: float, floor: float, adjacency: str) -> float:
    """Of ``Σ_k Σ_j γ_kj ΔW_kj``, where the ΔW_kj of a client are orthogonal to each other."""
    own = min(1.0, p / floor)
    if adjacency != "removed":
        return own if adjacency == "zeroed" else 2 * own
    # The others' shares grow by n_l (1/D' − 1/D), at most n_l p / (N β (1 − p) d), and they have
    # weight N (1 − p) in all.
    return own + p / (floor * (floor + (1 - floor) * p))


def _shares(weights: Sequence[float], total: float | None) -> list[float]:
    """``n_k / Σ n`` of everybody who counts."""
    read = [as_number(w, "weights", zero=True) for w in as_list(weights, "weights")]
    largest = max(read, default=0.0)
    if not largest:
        raise InputValueError("weights: expected at least one above 0; who takes part?")
    whole = sum(w / largest for w in read)
    if total is not None:
        whole = as_number(total, "total=", zero=False) / largest
    return [w / largest / whole for w in read if w]


def _check_bounded(entry: MethodEntry, adjacency: str, options: Mapping[str, Any]) -> None:
    """Refuse what has no bound, and say why."""
    here = f"sensitivity of {entry.name!r}"
    known = INERT | entry.claims.get("exact", {}).keys()
    known |= frozenset() if adjacency == "removed" else WITH_ROSTER
    usual = {p.name: p.default for p in inspect.signature(entry.run).parameters.values()}
    given = {name for name, value in options.items() if value != usual.get(name)}
    if unknown := sorted(given - known):
        raise OptionValueError(
            f"{here}: no bound is known with {unknown[0]}= for adjacency {adjacency!r}; leave it "
            "out, or truncate and cap after the noise"
        )
    if entry.holds("exact", options):
        return
    if "exact" in entry.claims or (entry.sums == "products" and options.get("rank") != "full"):
        raise OptionValueError(
            f"{here}: truncation has no bound: where two singular values meet, the least change "
            'exchanges the components that are kept; sum with rank="full", add the noise, truncate '
            "afterwards"
        )
    if entry.sums != "products" or "gauge" not in entry.claims:
        bounded = sorted(n for n, e in METHODS.items() if _can_be_bounded(e))
        raise InputValueError(
            f"{here}: a clip of the product does not bound what a client adds: its components or "
            "factors may be of any size and cancel; methods with a bound: "
            f"{', '.join(bounded)}; or clip messages (`clip_message`) and noise their sum"
        )
    if not entry.holds("gauge", options):
        needed = ", ".join(f"{k}={v!r}" for k, v in entry.claims["gauge"].items())
        raise OptionValueError(
            f"{here}: components of any size that cancel pass the clip and meet unequal shares; "
            f"take each client's own SVD with {needed}"
        )
    if options.get("floor") is None:
        raise OptionValueError(
            f"{here}: who owns a slot alone counts there in full, whatever its weight; bound its "
            "share with floor="
        )


def _can_be_bounded(entry: MethodEntry) -> bool:
    return "exact" in entry.claims or (entry.sums == "products" and "gauge" in entry.claims)
