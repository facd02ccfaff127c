"""Tests for anybody's aggregator: state what it promises, `check_aggregator` tries to refute it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from hetlora_agg.testing.examination import Examination as Examination
from hetlora_agg.testing.examination import examine as examine
from hetlora_agg.testing.strategies import client_updates as client_updates
from hetlora_agg.testing.theorems import THEOREMS
from hetlora_agg.testing.theorems import known_claims as _known_claims
from hetlora_agg.testing.trial import RTOL, Aggregator, Trial
from hetlora_agg.testing.trial import Inapplicable as Inapplicable
from hetlora_agg.testing.trial import Refuted as Refuted


def check_aggregator(
    aggregator: Aggregator,
    claims: str | Iterable[str],
    *,
    ranks: Sequence[int] = (1, 3, 2, 3),
    out_features: int = 9,
    in_features: int = 8,
    rtol: float = RTOL,
    common: str | None = None,
) -> None:
    """Tries to refute each claim on fixed float64 clients; silent if it cannot.

    Nothing is left to luck: expectations are finite sums over all sign patterns or all cohorts,
    orders are all permutations, clients are the same in every run.

    Args:
        aggregator: takes a list of `ClientUpdate` (float64 tensors, mixed scalings and weights) and
            returns an `AggregationResult`, a `LowRank`, a pair ``(A, B)`` or a dense matrix. What
            it has a parameter for it is told: ``previous``, the result before an idle round;
            ``total``, the weight of all clients, whoever takes part; ``totals``, that of the
            owners of every slot.
        claims: names from ``hetlora_agg.CLAIMS``.
        ranks: the clients' ranks; one to five clients.
        out_features: rows of the matrices.
        in_features: columns of the matrices.
        rtol: largest error accepted, relative to ``Σ p_k ‖B_k‖‖A_k‖``.
        common: "A" or "B" for clients that all have the leading slots of one such factor.

    Raises:
        Refuted: (an AssertionError) which claim does not hold, on what clients, by how much.
        Inapplicable: (an AssertionError) a claim that these clients or this kind of result cannot
            decide, such as an idle round of a result that cannot be sliced.
        InputTypeError: the aggregator is no function.
        InputValueError: no claim or an unknown one, or ranks the trial cannot use.

    Example:
        >>> from functools import partial
        >>> from hetlora_agg import aggregate
        >>> check_aggregator(partial(aggregate, method="flora"), ["exact", "order", "gauge"])
        >>> check_aggregator(partial(aggregate, method="zeropad"), ["exact"])
        Traceback (most recent call last):
            ...
        hetlora_agg.testing.trial.Refuted: claim 'exact' is refuted: generic clients: off by ...
    """
    for claim in _known_claims(aggregator, claims, "check_aggregator"):
        THEOREMS[claim](Trial(aggregator, ranks, out_features, in_features, rtol, common))


def parametrize_with_checks(
    aggregators: Mapping[str, tuple[Aggregator, Iterable[str]]], **options: Any
) -> Any:
    """A pytest decorator: one test for every claim of every aggregator, as argument ``check``.

    Args:
        aggregators: name -> (aggregator, its claims).
        **options: for `check_aggregator`.

    Example:
        >>> from functools import partial
        >>> from hetlora_agg import aggregate
        >>> @parametrize_with_checks({"mine": (partial(aggregate, method="rb"), ["consensus"])})
        ... def test_my_aggregator(check):
        ...     check()
    """
    import pytest

    cases = [
        pytest.param(
            partial(check_aggregator, aggregator, [claim], **options), id=f"{name}-{claim}"
        )
        for name, (aggregator, claims) in aggregators.items()
        for claim in claims
    ]
    return pytest.mark.parametrize("check", cases)
