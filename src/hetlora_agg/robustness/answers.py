"""Rules that end a sentence: one update that no small part of the clients can move far."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hetlora_agg.checks import as_fraction, as_integer, as_number
from hetlora_agg.errors import ConvergenceError, InputValueError
from hetlora_agg.linalg import solve_gram
from hetlora_agg.robustness.points import Points
from hetlora_agg.robustness.rules import Rule, Step, check_majority, written

LEAP_EVERY = 10
"""Weiszfeld's steps between two of Newton's, which cost K times as much."""


def multi_krum(f: int, keep: int | None = None) -> Rule:
    """Takes the mean of the updates that lie closest to their neighbours.

    Score ``s_k = Σ ‖x_k − x_j‖²`` over the n − f − 2 nearest others; the answer is the mean of
    the ``keep`` updates of least score. Clients count equally: a weight is a client's own word.

    Args:
        f: how many clients may be bad, at least 0; n ≥ 2f + 3.
        keep: 1 to n − f; None is n − f. 1 is Krum, which costs much without any attack.

    Returns:
        A `Rule` that ends a sentence.

    Raises:
        InputTypeError, OptionValueError: f or keep is no integer in its range.
        InputValueError: n < 2f + 3 or keep > n − f, when the rule meets the clients.

    Cost: `squared_distances`, and one sort of K² numbers.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> clients = [(ones(1, 1), size * ones(1, 1)) for size in (1.0, 2.0, 3.0, 2.0, 900.0)]
        >>> aggregate(clients, "flora", weighting=multi_krum(1)).factors.dense()
        tensor([[2.]])

    Reference: Blanchard, El Mhamdi, Guerraoui, Stainer, NeurIPS 2017, arXiv:1703.02757.

    Fidelity: SECOND for the score and the condition, OURS for ``keep=None``.

    Deviations: of equal scores the first in order.
    """
    bad = as_integer(f, "f=", at_least=0)
    kept = None if keep is None else as_integer(keep, "keep=", at_least=1)
    text = written(multi_krum, f=bad, keep=kept)
    return Rule((Step(partial(_krum, f=bad, keep=kept), text, True),))


def geomed(f: int | None = None, *, tolerance: float = 1e-6, max_iterations: int = 200) -> Rule:
    """Takes the geometric median: the point of least total distance to the updates.

    ``argmin_v Σ ‖x_k − v‖``, by Weiszfeld's iteration on coefficients,
    ``v ← Σ x_k / d_k / Σ 1 / d_k``, ``d_k = ‖x_k − v‖``. It starts at the update of least total
    distance, is done there if that is the median, and else takes Vardi and Zhang's step from it,
    which divides by no zero. Every tenth step is one of Newton's, if that is nearer to balance.

    It ends when ``‖Σ (x_k − v) / d_k‖ ≤ tolerance · n``: every client pulls at v with force one,
    and v is the exact median of the clients and a further force of at most that size, the pull of
    ``tolerance · n`` more clients. No single client can make that small by being far away.

    Clients count equally: a weight is a client's own word.

    Args:
        f: how many clients may be bad; only checked, n > 2f. None checks nothing.
        tolerance: in (0, 1].
        max_iterations: at least 1.

    Returns:
        A `Rule` that ends a sentence. Its coefficients are at least 0 and sum to 1.

    Raises:
        InputTypeError, OptionValueError: an option outside its range.
        InputValueError: n ≤ 2f, when the rule meets the clients.
        ConvergenceError: not within the tolerance after ``max_iterations``.

    Cost: `squared_distances`, and ``K²`` multiply-adds per iteration, usually 5 to 50, and at
    every tenth an eigendecomposition of size K.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> clients = [(ones(1, 1), size * ones(1, 1)) for size in (1.0, 2.0, 900.0)]
        >>> aggregate(clients, "flora", weighting=geomed(1)).factors.dense()
        tensor([[2.]])

    Reference: RFA, Pillutla, Kakade, Harchaoui, IEEE TSP 2022, arXiv:1912.13445; the step from a
    data point is Vardi and Zhang's, PNAS 2000.

    Fidelity: SECOND for the estimator, OURS for start, leaps and stopping rule.

    Deviations: RFA weights clients by their examples and smooths the distances; here neither.
    """
    bad = None if f is None else as_integer(f, "f=", at_least=0)
    near = as_fraction(tolerance, "tolerance=")
    most = as_integer(max_iterations, "max_iterations=", at_least=1)
    text = written(geomed, f=bad, tolerance=near, max_iterations=most)
    return Rule((Step(partial(_median, f=bad, tolerance=near, most=most), text, True),))


def centered_clip(
    radius: float | None = None, *, f: int | None = None, iterations: int = 10
) -> Rule:
    """Takes the mean of the updates after shortening their way from a centre, again and again.

    ``v ← v + (1/n) Σ (x_k − v) min(1, τ / ‖x_k − v‖)``, from the update whose median distance to
    the others is least. A client moves v by at most ``τ / n`` a step, whatever it sends. Clients
    count equally: a weight is a client's own word.

    Args:
        radius: τ, > 0; None takes the median distance of the updates from the start.
        f: how many clients may be bad; only checked, n > 2f. None checks nothing.
        iterations: at least 1; a fixed number, since what is left shrinks with every one.

    Returns:
        A `Rule` that ends a sentence. Its coefficients sum to 1.

    Raises:
        InputTypeError, OptionValueError: an option outside its range.
        InputValueError: n ≤ 2f, when the rule meets the clients.

    Cost: `squared_distances`, and ``K²`` multiply-adds per iteration.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> clients = [(ones(1, 1), size * ones(1, 1)) for size in (2.0, 2.0, 900.0)]
        >>> aggregate(clients, "flora", weighting=centered_clip(0.3)).factors.dense()
        tensor([[2.1500]])

    Reference: Karimireddy, He, Jaggi, ICML 2021, arXiv:2012.10333.

    Fidelity: SECOND for the step, OURS for start and radius.

    Deviations: the published centre is the last round's aggregate, which this has no need of.
    """
    limit = None if radius is None else as_number(radius, "radius=", zero=False)
    bad = None if f is None else as_integer(f, "f=", at_least=0)
    steps = as_integer(iterations, "iterations=", at_least=1)
    text = written(centered_clip, radius=limit, f=bad, iterations=steps)
    return Rule((Step(partial(_centred, radius=limit, f=bad, iterations=steps), text, True),))


def _krum(points: Points, f: int, keep: int | None) -> Tensor:
    n = points.count
    if n < 2 * f + 3:
        raise InputValueError(
            f"multi_krum: expected n >= 2 f + 3 clients, got n = {n} and f = {f}; lower f, or wait "
            f"for {2 * f + 3} clients"
        )
    kept = n - f if keep is None else keep
    if kept > n - f:
        raise InputValueError(
            f"multi_krum: expected keep <= n - f, got keep = {keep}, n = {n} and f = {f}; more "
            "would surely keep a bad client"
        )
    # The least is oneself, or somebody just as near.
    others = points.squares[:-1, :-1].sort(dim=-1).values[:, 1:]
    chosen = others[:, : n - f - 2].sum(-1).argsort(stable=True)[:kept]
    return points.every[chosen].mean(0)


def _median(points: Points, f: int | None, tolerance: float, most: int) -> Tensor:
    check_majority("geomed", points.count, f or 0)
    start = _least_total(points)
    row, distances = points.every[start], points.distances[start]
    step, left = _weiszfeld(points, row, distances)
    for turn in range(most):
        if left <= tolerance:
            break
        row = step
        if turn % LEAP_EVERY == LEAP_EVERY - 1:
            row = _leap(points, row)
        step, left = _weiszfeld(points, row, points.distances_to(row))
    if left > tolerance:
        raise ConvergenceError(
            f"geomed: after {most} iterations the clients still pull with {left:.1e} of their "
            f"force, above tolerance={tolerance:g}; raise tolerance= or max_iterations="
        )
    return row


def _weiszfeld(points: Points, row: Tensor, distances: Tensor) -> tuple[Tensor, float]:
    """The next combination, and the part of the clients' force that is not in balance here."""
    apart = distances > 0
    pull = torch.where(apart, 1 / distances, 0.0)
    if not bool(apart.any()):
        return row, 0.0
    mean = torch.cat([pull / pull.sum(), pull.new_zeros(1)])
    force = pull.sum() * points.inner(mean - row, mean - row).clamp_min(0).sqrt()
    # Those at the place itself hold it back with force one each.
    held = torch.where(force > 0, (~apart).sum() / force, 1.0).clamp_max(1)
    return held * row + (1 - held) * mean, float(force * (1 - held)) / points.count


def _leap(points: Points, row: Tensor) -> Tensor:
    """One step of Newton's and one of Weiszfeld's, if that is nearer to balance.

    Close to an update that is nearly the median, Weiszfeld's steps are short.
    """
    distances = points.distances_to(row)
    if bool((distances == 0).any()):
        return row
    ways = points.every[:-1] - row
    units = (ways @ points.gram @ ways.mT) / (distances.unsqueeze(-1) * distances)
    # (τ I − Σ u uᵀ / d)⁻¹ Σ u, the inverse of the second derivative on the force, by Woodbury's
    # formula: a system of the clients' number, in which far clients have small entries.
    root = distances.rsqrt()
    total = root.square().sum()
    inner = total * points.every[:-1, :-1] - root.unsqueeze(-1) * units * root
    turned = solve_gram((root * units.sum(-1)).unsqueeze(0), inner, total.new_zeros(()))[0]
    moved = (1 + root * turned) / (total * distances)
    leapt, _ = _weiszfeld(points, row, points.distances_to(row + moved @ ways))
    before, after = (_weiszfeld(points, at, points.distances_to(at))[1] for at in (row, leapt))
    return leapt if after < before else row


def _least_total(points: Points) -> int:
    """The point of least total distance to all."""
    # Σ d_ik − d_ic, c the centre, by their squares: beside one far point totals would all be equal.
    far = points.distances
    gained = points.gram.diagonal()[:-1] - 2 * points.gram[:-1, :-1]
    both = far + far[points.centre].unsqueeze(-1)
    return int(torch.where(both > 0, gained / both, 0.0).sum(0).argmin())


def _centred(points: Points, radius: float | None, f: int | None, iterations: int) -> Tensor:
    check_majority("centered_clip", points.count, f or 0)
    row = points.every[points.centre]
    distances = points.distances[points.centre]
    limit = float(distances.median()) if radius is None else radius
    for _ in range(iterations):
        factor = torch.where(distances > limit, limit / distances, 1.0)
        row = (1 - factor.mean()) * row + torch.cat([factor, factor.new_zeros(1)]) / points.count
        distances = points.distances_to(row)
    return row
