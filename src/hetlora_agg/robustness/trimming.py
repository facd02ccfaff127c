"""The trimmed mean of every entry, in bases that all clients share."""

from __future__ import annotations

from hetlora_agg.checks import as_integer
from hetlora_agg.components import Components
from hetlora_agg.core import core
from hetlora_agg.robustness.rules import check_majority
from hetlora_agg.types import LowRank
from hetlora_agg.weighting import uniform


def trimmed_core(c: Components, f: int) -> LowRank:
    """The mean of every entry of the shared core without its f smallest and f largest clients.

    ``ΔW_k = U X_k Vᵀ`` (see `core`), ``ΔW = U X Vᵀ`` with X the mean of the n − 2f middle values
    of every entry of the X_k. Clients count equally: a weight is a client's own word.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        f: how many clients are left out at either end, at least 0; n > 2f.

    Returns:
        Factors of rank at most ``min(R, out_features, in_features)``, in the clients' dtype.

    Raises:
        InputTypeError, OptionValueError: f is no integer of at least 0.
        InputValueError: n ≤ 2f.

    Cost: ``2 (out + in) R²`` multiply-adds, two SVDs of size R, and several times
    ``K min(R, out) min(R, in)`` numbers per layer.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg.intake import collect
        >>> from hetlora_agg.validation import read_updates
        >>> clients = [(ones(1, 1), size * ones(1, 1)) for size in (-70.0, 1.0, 2.0, 900.0)]
        >>> trimmed_core(collect(read_updates(clients)[0]).components(), 1).dense()
        tensor([[1.5000]])

    Reference: coordinate-wise trimmed mean, Yin, Chen, Ramchandran, Bartlett, ICML 2018,
    arXiv:1803.01498; the core after Core Space, arXiv:2509.17786.

    Fidelity: PAPER for the rule, OURS for the core's ordered bases.
    """
    cut, n = as_integer(f, "f=", at_least=0), len(c.ranks)
    check_majority("trimmed mean", n, cut)
    shared = core(c, uniform(c))
    merged = shared.X.sort(-3).values[..., cut : n - cut, :, :].mean(-3)
    return shared.back(merged, c.A)
