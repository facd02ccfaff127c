"""The trimmed mean of every entry, in bases that all clients share."""

from __future__ import annotations

import torch

from hetlora_agg.checks import as_integer
from hetlora_agg.components import Components
from hetlora_agg.core import core
from hetlora_agg.robustness.distances import client_sizes
from hetlora_agg.robustness.rules import check_majority
from hetlora_agg.types import LowRank
from hetlora_agg.weighting import uniform

MOST = 1e9
"""How many times the median client's size one may be before it is shortened."""


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
    check_majority("trimmed_core", n, cut)
    c = moderated(c)
    shared = core(c, uniform(c))
    merged = shared.X.sort(-3).values[..., cut : n - cut, :, :].mean(-3)
    return shared.back(merged, c.A)


def moderated(c: Components) -> Components:
    """Updates a thousand million times as large as the median one shortened to that.

    ``ΔW_k min(1, 10⁹ S̃ / S_k)``, S̃ the upper median of ``S_k = Σ ‖b‖‖a‖``. The bases that all share
    are as long as float64 is: beyond some 10¹² one client would take the others' digits. An
    entry that is left out anyway stays as extreme as it was.
    """
    sizes = client_sizes(c)
    usual = sizes.sort(-1).values[..., len(c.ranks) // 2].unsqueeze(-1)
    limit = MOST * usual
    factor = torch.where((sizes > limit) & (usual > 0), limit / sizes, 1.0)
    return c.with_factors(c.A, c.B * factor[..., c.client].unsqueeze(-2).to(c.B))
