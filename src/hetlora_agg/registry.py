"""``METHODS``: every aggregation method under its own name, with what it promises."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from hetlora_agg.claims import CLAIMS as CLAIMS
from hetlora_agg.claims import CLIENTS as CLIENTS
from hetlora_agg.claims import DEPARTURES, INAPPLICABLE, STATE, SUMS, Cell
from hetlora_agg.errors import InputTypeError, InputValueError, unknown_name
from hetlora_agg.types import AggregationResult

Run = Callable[..., AggregationResult]
Statistic = Callable[..., "Tensor | tuple[Tensor, ...]"]
Factor = Literal["A", "B"]


@dataclass(frozen=True)
class MethodEntry:
    """A method and what is known about it.

    Attributes:
        name: the name `aggregate` takes.
        run: the plain function ``Components -> AggregationResult``.
        reference: arXiv or ACL identifier of the source.
        claims: claim -> the options under which it holds (``{}`` = with the defaults).
        fails: claim -> what the method computes instead under its defaults, by its name in
            ``DEPARTURES``.
        statistic: additive client statistic, summed over all layers before any is combined.
        client: what its clients do between two rounds, a name from ``CLIENTS``.
        unscaled: the factor that is taken as sent, the scaling going whole into the other; None
            folds the root of the scaling into both. A function of options if they decide.
        common: whether the unscaled factor must be one and the same on all clients.
        workspace: ``(out_features, in_features, ranks) -> bytes`` per layer that the method needs
            beside the factors and the SVD of their stack; None is nothing worth counting.
        sums: what of the result is a sum over clients, a name from ``SUMS``; None is nothing.
    """

    name: str
    run: Run
    reference: str
    claims: Mapping[str, Mapping[str, Any]]
    fails: Mapping[str, str] = field(default_factory=dict)
    statistic: Statistic | None = None
    client: str = "slice"
    unscaled: Factor | Callable[..., Factor] | None = None
    common: bool = False
    workspace: Callable[[int, int, Sequence[int]], int] | None = None
    sums: str | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the method's own keyword arguments, sorted."""
        return tuple(sorted(list(inspect.signature(self.run).parameters)[1:]))

    @property
    def needs(self) -> tuple[str, ...]:
        """Options without a default: state the caller must bring."""
        parameters = list(inspect.signature(self.run).parameters.values())[1:]
        return tuple(sorted(p.name for p in parameters if p.default is p.empty))

    def unscaled_factor(self, options: Mapping[str, Any]) -> Factor | None:
        """The factor that takes no scaling, under these options of the method."""
        if callable(self.unscaled):
            return self.unscaled(**named_in(self.unscaled, options))
        return self.unscaled

    def statistic_for(self, options: Mapping[str, Any]) -> Statistic | None:
        """The method's additive client statistic, else the one that its ``weighting=`` asks for."""
        return self.statistic or getattr(options.get("weighting"), "statistic", None)

    def holds(self, claim: str, options: Mapping[str, Any]) -> bool:
        """Whether a claim is made under these options of the method."""
        needed = self.claims.get(claim)
        return needed is not None and all(options.get(k) == v for k, v in needed.items())

    def cell(self, claim: str) -> Cell:
        """What is known of a claim: it holds, fails by a formula, or cannot be tried."""
        if claim not in CLAIMS:
            raise InputValueError(unknown_name("claim", claim, CLAIMS))
        instead = self.fails.get(claim)
        if claim in self.claims:
            return Cell("holds", dict(self.claims[claim]), instead)
        if instead is not None:
            return Cell("fails", departure=instead)
        for kind, (reason, claims) in INAPPLICABLE.items():
            if claim in claims and self.inapplicable(kind):
                return Cell("not applicable", reason=reason)
        return Cell("not stated")

    def inapplicable(self, kind: str) -> bool:
        """Whether the method is of a kind, from ``INAPPLICABLE``, that some claims are not for."""
        return {
            "common": self.common,
            "restart": self.client == "restart",
            "equal ranks": "mixed_ranks" not in self.claims,
        }[kind]

    @property
    def summary(self) -> str:
        """First line of the method's docstring."""
        return (inspect.getdoc(self.run) or self.name).splitlines()[0]

    @property
    def fidelity(self) -> str:
        """The docstring's *Fidelity* paragraph: how sure the formula is."""
        return self.paragraph("Fidelity")

    @property
    def formula(self) -> str:
        """The docstring's paragraph below its first line."""
        paragraphs = (inspect.getdoc(self.run) or "").split("\n\n")
        return " ".join(paragraphs[1].split()) if len(paragraphs) > 1 else ""

    @property
    def server(self) -> tuple[str, ...]:
        """What the server keeps between two rounds, or may keep."""
        kept = [(STATE[name], name in self.needs) for name in STATE if name in self.options]
        return tuple(text if needed else f"{text}, optional" for text, needed in kept)

    def describe(self) -> dict[str, Any]:
        """Everything about the method in plain strings, lists and dicts."""
        return {
            "name": self.name,
            "summary": self.summary,
            "formula": self.formula,
            "claims": {claim: dict(options) for claim, options in self.claims.items()},
            "fails": {claim: DEPARTURES[name] for claim, name in self.fails.items()},
            "client": CLIENTS[self.client],
            "server": list(self.server),
            "options": list(self.options),
            "needs": list(self.needs),
            "cost": self.paragraph("Cost"),
            "fidelity": self.fidelity,
            "reference": self.reference,
        }

    def paragraph(self, title: str) -> str:
        """The docstring's paragraph of that title, such as Cost, on one line."""
        _, found, rest = (inspect.getdoc(self.run) or "").partition(f"\n{title}:")
        return " ".join(rest.split("\n\n")[0].split()) if found else ""


METHODS: dict[str, MethodEntry] = {}


def method(
    *,
    reference: str,
    claims: Mapping[str, Mapping[str, Any]],
    fails: Mapping[str, str] | None = None,
    statistic: Statistic | None = None,
    client: str = "slice",
    unscaled: Factor | Callable[..., Factor] | None = None,
    common: bool = False,
    workspace: Callable[[int, int, Sequence[int]], int] | None = None,
    sums: str | None = None,
) -> Callable[[Run], Run]:
    """Enter a function in ``METHODS`` under its own name and hand it back untouched.

    Args:
        reference: arXiv or ACL identifier.
        claims: claim -> options under which it holds; names are those of ``CLAIMS``.
        fails: claim -> what is computed instead under the defaults, a name from ``DEPARTURES``.
        statistic: ``Components -> (*layers, K)`` or ``(*layers, K, K)``, or a tuple of such, all
            additive over layers. Options that it names are handed to it.
        client: what the clients do between two rounds, a name from ``CLIENTS``.
        unscaled: "A" or "B", the factor that takes no scaling, or a function of options.
        common: the unscaled factor must be one and the same on all clients.
        workspace: bytes per layer that the method needs beside the factors and their SVD.
        sums: what of the result is a sum over clients, a name from ``SUMS``.

    Raises:
        InputValueError: a claim, departure, client or kind of sum outside the vocabulary, or a
            name that is taken.
    """

    def enter(run: Run) -> Run:
        instead = dict(fails or {})
        if unknown := sorted({*claims, *instead} - set(CLAIMS)):
            raise InputValueError(
                f"method {run.__name__!r}: unknown claims {unknown}; known: {sorted(CLAIMS)}"
            )
        if unknown := sorted(set(instead.values()) - set(DEPARTURES)):
            raise InputValueError(
                f"method {run.__name__!r}: unknown departures {unknown}; known: "
                f"{sorted(DEPARTURES)}"
            )
        for what, name, known in (("client", client, CLIENTS), ("sums", sums or "factors", SUMS)):
            if name not in known:
                raise InputValueError(
                    f"method {run.__name__!r}: unknown {what} {name!r}; known: {sorted(known)}"
                )
        if run.__name__ in METHODS:
            raise InputValueError(
                f"method {run.__name__!r} is registered already; give the function another name"
            )
        METHODS[run.__name__] = MethodEntry(
            name=run.__name__,
            run=run,
            reference=reference,
            claims=dict(claims),
            fails=instead,
            statistic=statistic,
            client=client,
            unscaled=unscaled,
            common=common,
            workspace=workspace,
            sums=sums,
        )
        return run

    return enter


def resolve(method: str | Run) -> MethodEntry:
    """The entry of a method given by name or as a function; functions need no registration.

    Args:
        method: a name from ``METHODS``, or a function ``Components -> AggregationResult``.

    Returns:
        Its `MethodEntry`; for an unregistered function one without claims.

    Raises:
        InputValueError, InputTypeError: no method has this name, or neither name nor function.

    Example:
        >>> import hetlora_agg
        >>> hetlora_agg.resolve("rb").reference
        'acl:2026.findings-eacl.88'
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise InputValueError(unknown_name("method", method, METHODS))
        return METHODS[method]
    if not callable(method):
        found = f"got {type(method).__name__}; names: {sorted(METHODS)}"
        raise InputTypeError(f"method: expected a name or a function of Components, {found}")
    if known := [entry for entry in METHODS.values() if entry.run is method]:
        return known[0]
    try:
        inspect.signature(method)
    except ValueError as error:
        raise InputTypeError(f"method: {method!r} is no function of Components") from error
    return MethodEntry(getattr(method, "__name__", "method"), method, "", {})


def check_options(entry: MethodEntry, options: Mapping[str, Any]) -> None:
    """Refuse options the method does not have, before anything is computed."""
    if _takes_anything(entry.run):
        return
    for name in options:
        if name not in entry.options:
            what = f"option of method {entry.name!r}"
            raise InputTypeError(unknown_name(what, name, entry.options))
    missing = sorted(set(entry.needs) - set(options))
    if missing:
        raise InputTypeError(
            f"method {entry.name!r} needs {', '.join(_described(entry, m) for m in missing)}"
        )


def named_in(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a function has a parameter for."""
    return {k: v for k, v in options.items() if k in inspect.signature(function).parameters}


def _described(entry: MethodEntry, option: str) -> str:
    """The option, and when None will do."""
    annotation = str(inspect.signature(entry.run).parameters[option].annotation)
    return f"{option}=" + " (None in the first round)" * ("None" in annotation)


def _takes_anything(run: Run) -> bool:
    """Whether the user's own function declares ``**options``."""
    kinds = (p.kind for p in inspect.signature(run).parameters.values())
    return any(kind is inspect.Parameter.VAR_KEYWORD for kind in kinds)
