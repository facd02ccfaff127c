"""``METHODS``: every aggregation method under its own name, with what it promises."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from hetlora_agg.errors import InputTypeError, InputValueError, unknown_name
from hetlora_agg.types import AggregationResult

Run = Callable[..., AggregationResult]
Statistic = Callable[..., "Tensor | tuple[Tensor, ...]"]
Factor = Literal["A", "B"]

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


CLIENTS: Mapping[str, str] = MappingProxyType(
    {
        "slice": "trains the leading components that `distribute` hands out at its rank",
        "restart": "trains a fresh adapter on a base weight that took the whole update "
        "(`clients.merge_and_restart`)",
        "prune": "trains the leading components, its tail penalised, and lowers its rank where the "
        "tail fades (`clients.tail_penalty`, `clients.prune`)",
        "select": "trains a random choice of the slots, the others folded into its base weight "
        "(`clients.select_and_fold`)",
        "freeze": "holds every slot, trains the most important ones and uploads them quantised "
        "(`clients.important_slots`, `clients.quantise`)",
        "qr_start": "starts from the QR decomposition of its base weight and corrects its "
        "gradients (`clients.qr_start`, `clients.corrected`)",
        "train_B": "trains B; A is common to all clients and frozen",
        "alternate": "trains B in odd rounds and A in even ones, the other factor frozen",
        "keep_B": "takes the global A and goes on with its own B (`clients.continue_from`)",
    }
)
"""What a client does between two rounds; every method names one."""

STATE: Mapping[str, str] = MappingProxyType(
    {
        "previous": "the last global factors (`previous=`)",
        "initial": "what the clients started from, in the first round (`initial=`)",
        "round": "the number of the round (`round=`)",
        "levels": "the configured ranks (`levels=`)",
        "generator": "a random generator (`generator=`)",
    }
)
"""Options that carry something from round to round: what the server keeps for them."""

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
        client: what its clients do between two rounds, a name from ``CLIENTS``.
        unscaled: the factor that is taken as sent, the scaling going whole into the other; None
            folds the root of the scaling into both. A function of options if they decide.
        common: whether the unscaled factor must be one and the same on all clients.
        workspace: ``(out_features, in_features, ranks) -> bytes`` per layer that the method needs
            beside the factors and the SVD of their stack; None is nothing worth counting.
    """

    name: str
    run: Run
    reference: str
    claims: Mapping[str, Mapping[str, Any]]
    statistic: Statistic | None = None
    client: str = "slice"
    unscaled: Factor | Callable[..., Factor] | None = None
    common: bool = False
    workspace: Callable[[int, int, Sequence[int]], int] | None = None

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

    def holds(self, claim: str, options: Mapping[str, Any]) -> bool:
        """Whether a claim is made under these options of the method."""
        needed = self.claims.get(claim)
        return needed is not None and all(options.get(k) == v for k, v in needed.items())

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
    statistic: Statistic | None = None,
    client: str = "slice",
    unscaled: Factor | Callable[..., Factor] | None = None,
    common: bool = False,
    workspace: Callable[[int, int, Sequence[int]], int] | None = None,
) -> Callable[[Run], Run]:
    """Enter a function in ``METHODS`` under its own name and hand it back untouched.

    Args:
        reference: arXiv or ACL identifier.
        claims: claim -> options under which it holds; names are those of ``CLAIMS``.
        statistic: ``Components -> (*layers, K)`` or ``(*layers, K, K)``, or a tuple of such, all
            additive over layers. Options that it names are handed to it.
        client: what the clients do between two rounds, a name from ``CLIENTS``.
        unscaled: "A" or "B", the factor that takes no scaling, or a function of options.
        common: the unscaled factor must be one and the same on all clients.
        workspace: bytes per layer that the method needs beside the factors and their SVD.

    Raises:
        InputValueError: a claim or client outside the vocabulary, or a name that is taken.
    """

    def enter(run: Run) -> Run:
        if unknown := sorted(set(claims) - set(CLAIMS)):
            raise InputValueError(
                f"method {run.__name__!r}: unknown claims {unknown}; known: {sorted(CLAIMS)}"
            )
        if client not in CLIENTS:
            raise InputValueError(
                f"method {run.__name__!r}: unknown client {client!r}; known: {sorted(CLIENTS)}"
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
            statistic=statistic,
            client=client,
            unscaled=unscaled,
            common=common,
            workspace=workspace,
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
