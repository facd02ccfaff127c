"""``METHODS``: every aggregation method under its own name, with what it promises."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from hetlora_agg.components import Components
from hetlora_agg.errors import InputTypeError, InputValueError, unknown_name
from hetlora_agg.types import AggregationResult

Run = Callable[..., AggregationResult]
Statistic = Callable[[Components], Tensor]

CLAIMS: Mapping[str, str] = MappingProxyType(
    {
        "mixed_ranks": "clients of different ranks are taken",
        "exact": "the total equals the weighted mean of the updates, Σ p_k ΔW_k",
        "consensus": "if all owners of a slot send one component, the result has that component",
        "statistical": "unbiased for the mean component under any zero-mean component noise",
        "statistical_uncorrelated": "the same, when the noises of A and B are uncorrelated",
        "order": "the order of the clients does not matter",
        "split_client": "a client split into two of half its weight changes nothing",
        "rescaling": "multiplying all weights by one number changes nothing",
        "homogeneous": "c times every B gives c times the result",
        "orthogonal": "rotating inputs and outputs rotates the result",
        "transpose": "swapping the roles of A and B transposes the result",
        "single_client": "one client alone gets its own update back",
        "gauge": "B_k G, G⁻¹ A_k instead of B_k, A_k changes nothing",
        "zero_component": "an appended zero component changes nothing",
        "idle_kept": "a round in which nobody trains keeps every singular value",
        "idle_coverage": "an idle round multiplies singular value j by q_j = N_j / N",
        "idle_coverage_squared": "an idle round multiplies singular value j by q_j²",
    }
)
"""The vocabulary of claims; `tests/test_claims.py` holds one theorem for each."""


SYMMETRIC: dict[str, dict[str, Any]] = {
    "order": {},
    "rescaling": {},
    "homogeneous": {},
    "orthogonal": {},
    "transpose": {},
    "single_client": {},
}
"""The symmetries that nearly every method has; its own claims are added with ``|``."""


@dataclass(frozen=True)
class MethodEntry:
    """A method and what is known about it.

    Attributes:
        name: the name `aggregate` takes.
        run: the plain function ``Components -> AggregationResult``.
        reference: arXiv or ACL identifier of the source.
        claims: claim -> the options under which it holds (``{}`` = with the defaults).
        statistic: additive client statistic, summed over all layers before any is combined.
    """

    name: str
    run: Run
    reference: str
    claims: Mapping[str, Mapping[str, Any]]
    statistic: Statistic | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the method's own keyword arguments, sorted."""
        parameters = list(inspect.signature(self.run).parameters.values())[1:]
        return tuple(sorted(p.name for p in parameters))

    @property
    def needs(self) -> tuple[str, ...]:
        """Options without a default: state the caller must bring."""
        parameters = list(inspect.signature(self.run).parameters.values())[1:]
        return tuple(sorted(p.name for p in parameters if p.default is p.empty))

    @property
    def summary(self) -> str:
        """First line of the method's docstring."""
        return (inspect.getdoc(self.run) or self.name).splitlines()[0]

    @property
    def fidelity(self) -> str:
        """The docstring's *Fidelity* paragraph: how sure the formula is."""
        text = inspect.getdoc(self.run) or ""
        _, found, rest = text.partition("Fidelity:")
        return " ".join(rest.split("\n\n")[0].split()) if found else ""


METHODS: dict[str, MethodEntry] = {}


def method(
    *,
    reference: str,
    claims: Mapping[str, Mapping[str, Any]],
    statistic: Statistic | None = None,
) -> Callable[[Run], Run]:
    """Enter a function in ``METHODS`` under its own name and hand it back untouched.

    Args:
        reference: arXiv or ACL identifier.
        claims: claim -> options under which it holds; names are those of ``CLAIMS``.
        statistic: ``Components -> (*layers, K)`` or ``(*layers, K, K)``, additive over layers.

    Raises:
        InputValueError: a claim outside the vocabulary, or a name that is taken.
    """

    def enter(run: Run) -> Run:
        unknown = sorted(set(claims) - set(CLAIMS))
        if unknown:
            raise InputValueError(
                f"method {run.__name__!r}: unknown claims {unknown}; known: {sorted(CLAIMS)}"
            )
        if run.__name__ in METHODS:
            raise InputValueError(
                f"method {run.__name__!r} is registered already; give the function another name"
            )
        METHODS[run.__name__] = MethodEntry(run.__name__, run, reference, dict(claims), statistic)
        return run

    return enter


def resolve(method: str | Run) -> MethodEntry:
    """The entry of a method given by name or as a function; functions need no registration."""
    if isinstance(method, str):
        if method not in METHODS:
            raise InputValueError(unknown_name("method", method, METHODS))
        return METHODS[method]
    if not callable(method):
        raise InputTypeError(
            f"method: expected a name or a function of Components, got {type(method).__name__}; "
            f"names: {sorted(METHODS)}"
        )
    for entry in METHODS.values():
        if entry.run is method:
            return entry
    try:
        inspect.signature(method)
    except ValueError as error:
        raise InputTypeError(f"method: {method!r} is no function of Components") from error
    return MethodEntry(getattr(method, "__name__", "method"), method, "", {})


def check_options(entry: MethodEntry, options: Mapping[str, Any]) -> None:
    """Refuse options the method does not have, before anything is computed."""
    for name in options:
        if name not in entry.options and not _takes_anything(entry.run):
            raise InputTypeError(
                unknown_name(f"option of method {entry.name!r}", name, entry.options)
            )
    missing = sorted(set(entry.needs) - set(options))
    if missing and not _takes_anything(entry.run):
        raise InputTypeError(f"method {entry.name!r} needs {', '.join(f'{m}=' for m in missing)}")


def _takes_anything(run: Run) -> bool:
    """Whether the user's own function declares ``**options``."""
    kinds = (p.kind for p in inspect.signature(run).parameters.values())
    return any(kind is inspect.Parameter.VAR_KEYWORD for kind in kinds)
