"""What of the vocabulary of claims an aggregator keeps, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten

from hetlora_agg.testing.theorems import THEOREMS, known_claims
from hetlora_agg.testing.trial import RTOL, Aggregator, Inapplicable, Refuted, Trial


@dataclass(frozen=True)
class Examination:
    """The verdict on every claim that was tried.

    Attributes:
        verdicts: claim -> "holds", "refuted: why" or "cannot be tried: why".
    """

    verdicts: Mapping[str, str]

    @property
    def holds(self) -> tuple[str, ...]:
        """The claims that could not be refuted."""
        return self._of("holds")

    @property
    def refuted(self) -> tuple[str, ...]:
        """The claims that are false."""
        return self._of("refuted")

    @property
    def untried(self) -> tuple[str, ...]:
        """The claims of which nothing is known."""
        return self._of("cannot be tried")

    def summary(self) -> str:
        """One short line per claim, those that hold first; ``verdicts`` has the whole reasons."""
        width = max(map(len, self.verdicts), default=0)
        ordered = (*self.holds, *self.refuted, *self.untried)
        return "\n".join(
            f"{claim:{width}}  {shorten(self.verdicts[claim], 100 - width, placeholder=' …')}"
            for claim in ordered
        )

    def _of(self, verdict: str) -> tuple[str, ...]:
        return tuple(claim for claim, said in self.verdicts.items() if said.startswith(verdict))


def examine(
    aggregator: Aggregator,
    claims: str | Iterable[str] | None = None,
    *,
    ranks: Sequence[int] = (1, 3, 2, 3),
    out_features: int = 9,
    in_features: int = 8,
    rtol: float = RTOL,
    common: str | None = None,
) -> Examination:
    """The verdict on every claim in ``CLAIMS``, whatever the aggregator does.

    The trials are those of `check_aggregator`; nothing is raised for a claim that is false.

    Args:
        aggregator: as `check_aggregator` takes it. A claim over which it raises is not tried.
        claims: names from ``hetlora_agg.CLAIMS``; None is all of them.
        ranks: the clients' ranks; one to five clients.
        out_features: rows of the matrices.
        in_features: columns of the matrices.
        rtol: largest error accepted, relative to ``Σ p_k ‖B_k‖‖A_k‖``.
        common: "A" or "B" for clients that all have the leading slots of one such factor.

    Returns:
        An `Examination`: ``.verdicts``, ``.holds``, ``.refuted``, ``.untried``, ``.summary()``.

    Raises:
        InputTypeError: the aggregator is no function.
        InputValueError: an unknown claim, or ranks the trial cannot use.

    Cost: some hundred calls of the aggregator on small matrices.

    Example:
        >>> from functools import partial
        >>> from hetlora_agg import aggregate
        >>> found = examine(partial(aggregate, method="flora"), ["exact", "consensus", "gauge"])
        >>> found.holds, found.refuted
        (('exact', 'gauge'), ('consensus',))
    """
    verdicts = {}
    for claim in known_claims(aggregator, THEOREMS if claims is None else claims, "examine"):
        trial = Trial(aggregator, ranks, out_features, in_features, rtol, common)
        verdicts[claim] = _verdict(claim, trial)
    return Examination(verdicts)


def _verdict(claim: str, trial: Trial) -> str:
    """What comes of one claim's theorem."""
    try:
        THEOREMS[claim](trial)
    except Refuted as refuted:
        return f"refuted: {refuted.why}"
    except Inapplicable as inapplicable:
        return f"cannot be tried: {inapplicable.why}"
    except Exception as error:
        # A stranger's function may raise anything, and what it refuses to answer is not known.
        return f"cannot be tried: the aggregator raised {error!r}"
    return "holds"
