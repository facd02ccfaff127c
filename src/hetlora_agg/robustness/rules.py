"""Rules against bad clients: coefficients from nothing but the updates' norms and distances."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hetlora_agg.checks import as_integer, as_number
from hetlora_agg.components import Components
from hetlora_agg.errors import InputTypeError, InputValueError, OptionValueError
from hetlora_agg.registry import Statistic
from hetlora_agg.robustness.distances import seen_norms, seen_products
from hetlora_agg.robustness.points import Points, points_of
from hetlora_agg.weighting import normalised, over_all_layers


@dataclass(frozen=True)
class Step:
    """One step of a rule.

    Attributes:
        rows: ``Points -> (n, n + 1)``, every point replaced by a combination of them and the
            origin, or ``(n + 1,)``, the one combination that is the answer.
        text: the call that makes it; options at their defaults are left out.
        answers: whether it gives the answer.
        pairs: whether it looks at distances between clients, not at norms alone.
    """

    rows: Callable[[Points], Tensor]
    text: str
    answers: bool
    pairs: bool = True


@dataclass(frozen=True, repr=False)
class Rule:
    """A sentence of steps: ``Components -> (K,)`` coefficients, for ``weighting=``.

    The result of a method is linear in the clients, ``Σ α_k ΔW_k`` for `stack`; a rule gives the
    α_k, from the updates' norms and distances over all layers together. They are used as they are:
    a clipped client's sum below one. What is bounded is ``Σ α_k ΔW_k``: averages of A and of B
    apart ('zeropad', 'fedit', 'fair', 'fedrot', the factors of 'fedex') are not, since a client can
    write one product in factors of any size; their results say so in ``.notes``.

    Attributes:
        steps: what is done, in order. After steps that only replace clients by mixtures the answer
            is the mean of these, weighted by the clients' own weights.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> from hetlora_agg.robustness import geomed
        >>> clients = [(ones(1, 1), size * ones(1, 1)) for size in (1.0, 2.0, 3.0, 2.0, 900.0)]
        >>> aggregate(clients, "flora", weighting=nnm(1).then(geomed(1))).factors.dense()
        tensor([[2.]])
    """

    steps: tuple[Step, ...]

    def __call__(self, c: Components) -> Tensor:
        """The coefficients, ``(K,)`` float64."""
        found = over_all_layers(c, self.statistic)
        return self.coefficients(c.weight, *found)

    @property
    def statistic(self) -> Statistic:
        """What is summed over all layers before the rule is asked."""
        return seen_products if any(step.pairs for step in self.steps) else seen_norms

    def coefficients(self, weight: Tensor, *statistic: Tensor) -> Tensor:
        """The coefficients for given totals of ``statistic``, ``(K,)`` float64.

        Args:
            weight: ``(K,)``.
            *statistic: ``(K, K)`` inner products and squared distances, or ``(K,)`` squared norms
                for a rule that looks at norms alone.
        """
        if len(statistic) == 1:
            # Norms do not depend on angles: right ones will do.
            (own,) = statistic
            products, squares = own.diag(), (own.unsqueeze(-1) + own).fill_diagonal_(0.0)
        else:
            products, squares = statistic
        # A table of K by K and a loop of small steps: faster on the host than on a device.
        points = points_of(products.cpu(), squares.cpu(), weight.cpu())
        rows = points.every
        for step, following in zip(self.steps, (*self.steps[1:], None), strict=True):
            found = step.rows(points)
            rows = found @ rows if step.answers else torch.cat([found @ rows, rows[-1:]])
            if following is not None:
                points = points.mixed(found)
        if not self.steps[-1].answers:
            rows = normalised(points.weight) @ rows[:-1]
        return rows[:-1].to(weight.device)

    def then(self, other: Rule) -> Rule:
        """This rule and then the other on what it leaves."""
        if not isinstance(other, Rule):
            raise InputTypeError(f"then: expected a rule such as geomed(), got {other!r}")
        if self.steps[-1].answers:
            raise OptionValueError(
                f"then: {self!r} leaves one update and {other!r} nothing to choose from; put "
                "norm_clip and nnm before it"
            )
        return Rule(self.steps + other.steps)

    def __repr__(self) -> str:
        """The sentence."""
        first, *others = (step.text for step in self.steps)
        return first + "".join(f".then({text})" for text in others)


def norm_clip(bound: float) -> Rule:
    """Shrinks every update that is longer than the bound to its length.

    ``x_k min(1, C / ‖x_k‖)``, ``‖x_k‖ = ‖ΔW_k‖_F`` over all layers. Alone: the weighted mean of
    the clipped updates, ``α_k = p_k min(1, C / ‖ΔW_k‖)``. The clients' weights count, and nothing
    is renormalised: the coefficients sum to less than one where anybody is clipped.

    Args:
        bound: C, > 0, in units of ΔW with the scaling folded in.

    Returns:
        A `Rule`; it goes before others too.

    Raises:
        InputTypeError, InputValueError: a bound that is not a finite number above zero.

    Cost: ``(out + in) Σ r_k²`` multiply-adds; alone it looks at no pair.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> clients = [(ones(1, 1), size * ones(1, 1)) for size in (1.0, 900.0)]
        >>> aggregate(clients, "flora", weighting=norm_clip(3.0)).factors.dense()
        tensor([[2.]])

    Reference: norm bounding, Sun, Kairouz, Suresh, McMahan 2019, arXiv:1911.07963.

    Fidelity: SECOND for the clipped mean; OURS for the norm of the product over all layers.

    Deviations: the published bound is on the update of all parameters; here on that of the
    adapted ones. f clients can still move the result by their part of C.
    """
    longest = as_number(bound, "bound=", zero=False)
    text = written(norm_clip, bound=longest)
    return Rule((Step(partial(_clipped, bound=longest), text, False, pairs=False),))


def nnm(f: int) -> Rule:
    """Replaces every update by the mean of the n − f nearest to it, itself included.

    ``x_k → (1 / (n − f)) Σ_{j ∈ N_k} x_j``. Honest clients come closer together, so that what
    follows errs less. Alone it is no defence: a bad client's mixture holds its own update, and
    the answer is then the mean of the mixtures, by the clients' weights.

    Args:
        f: how many clients may be bad, at least 0; n > 2f.

    Returns:
        A `Rule`, to be followed by `geomed`, `multi_krum` or `centered_clip`.

    Raises:
        InputTypeError, OptionValueError: f is no integer of at least 0.
        InputValueError: n ≤ 2f, when the rule meets the clients.

    Cost: `squared_distances`, and ``4 K³`` multiply-adds for the distances of the mixtures.

    Example:
        >>> from hetlora_agg.robustness import multi_krum
        >>> nnm(6).then(multi_krum(6))
        nnm(6).then(multi_krum(6))

    Reference: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan, AISTATS 2023,
    arXiv:2302.01772.

    Fidelity: SECOND.

    Deviations: clients count equally in a mixture; of equally near ones the first in order.
    """
    bad = as_integer(f, "f=", at_least=0)
    return Rule((Step(partial(_nearest, f=bad), written(nnm, f=bad), False),))


def _clipped(points: Points, bound: float) -> Tensor:
    factor = torch.where(points.norms > bound, bound / points.norms, 1.0)
    return torch.cat([factor.diag(), (1 - factor).unsqueeze(-1)], -1)


def _nearest(points: Points, f: int) -> Tensor:
    n = points.count
    check_majority("nnm", n, f)
    order = points.squares[:-1, :-1].argsort(dim=-1, stable=True)[:, : n - f]
    rows = torch.zeros(n, n + 1, dtype=torch.float64)
    return rows.scatter_(-1, order, 1 / (n - f))


def written(rule: Callable[..., Rule], **options: float | None) -> str:
    """The call that makes a rule, the first option by place, without those at their defaults."""
    usual = inspect.signature(rule).parameters
    first = next(iter(usual))
    given = {name: x for name, x in options.items() if x != usual[name].default}
    # All digits, but 9 for 9.0.
    short = {n: f"{x:g}" if float(f"{x:g}") == x else repr(x) for n, x in given.items()}
    parts = (text if name == first else f"{name}={text}" for name, text in short.items())
    return f"{rule.__name__}({', '.join(parts)})"


def check_majority(rule: str, n: int, f: int) -> None:
    """Refuse clients of whom half or more may be bad."""
    if n <= 2 * f:
        raise InputValueError(
            f"{rule}: expected n > 2 f clients, got n = {n} and f = {f}; lower f, or wait for "
            f"{2 * f + 1} clients"
        )
