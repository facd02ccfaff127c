"""Select-N-Fold: a random choice of the modules is trained, the others go into the base."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hetlora_agg.checks import as_integer, as_number, as_state
from hetlora_agg.clients.reading import as_generator
from hetlora_agg.distribute import distribute
from hetlora_agg.errors import InputValueError
from hetlora_agg.types import BOTH, AggregationResult, LowRank


@dataclass(frozen=True, eq=False)
class Selection:
    """What a client trains and what it adds to its frozen base.

    Attributes:
        adapter: the chosen modules, ``A (*layers, rank, in_features)`` and
            ``B (*layers, out_features, rank)``, the scaling divided out.
        slots: their slots, ascending; they go into ``ClientUpdate(slots=)``.
        rest: all other modules, in units of ΔW, to be added to the base weight for this round.
    """

    adapter: LowRank
    slots: tuple[int, ...]
    rest: LowRank


def select_and_fold(
    current: LowRank | AggregationResult,
    rank: int,
    *,
    generator: torch.Generator,
    scaling: float = 1.0,
) -> Selection:
    """Chooses modules to train at random; the client starts from the global model exactly.

    ``base + rest + scaling · B A = base + global``, with ``B A · scaling`` the modules of a
    uniformly random set of ``rank`` slots and ``rest`` all others.

    Args:
        current: the global modules, ``A (*layers, n, in_features)``, ``B (*layers, out, n)``. The
            residual of a result, if it has one, is the server's to fold.
        rank: how many modules the client trains; one choice for all layers of a batch.
        generator: draws the choice.
        scaling: the client's ``lora_alpha / rank``; its root is divided out of both factors. Use
            one scaling for all modules on all clients.

    Returns:
        A `Selection` of copies. A chosen module that is zero in both factors, which would never
        get a gradient, gets a fresh row in A as `distribute` fills it: its product stays zero.

    Raises:
        InputTypeError: no factors, no generator, a rank that is no integer.
        InputValueError: a rank below 1 or above the number of modules, a scaling that is not
            finite and > 0, NaN or Inf, a result whose components are not slots or whose factors
            do not both replace the client's.

    Cost: one copy of the global factors.

    Example:
        >>> import torch
        >>> modules = LowRank(torch.eye(3), torch.eye(3))
        >>> chosen = select_and_fold(modules, 2, generator=torch.Generator().manual_seed(0))
        >>> len(chosen.slots), (chosen.rest.dense() + chosen.adapter.dense()).equal(torch.eye(3))
        (2, True)

    Reference: Fed-PLoRA, Zhang, Hu, Xu, ICLR 2026, arXiv:2602.16936.

    Fidelity: SECOND for choosing and folding, OURS for one common scaling and for the fresh row.

    Deviations: none known.
    """
    what = "select_and_fold"
    rank = as_integer(rank, f"{what}: rank", at_least=1)
    scaling = as_number(scaling, f"{what}: scaling", zero=False)
    generator = as_generator(generator, what)
    modules = _modules(current, what)
    if rank > modules.rank:
        raise InputValueError(
            f"{what}: rank: expected at most {modules.rank}, the number of global modules, got "
            f"{rank}; start the federation with as many modules as the largest client trains"
        )
    order = torch.randperm(modules.rank, generator=generator, device=generator.device).tolist()
    slots, others = sorted(order[:rank]), sorted(order[rank:])
    with torch.no_grad():
        (every,) = distribute(AggregationResult(modules, nested=False), [modules.rank], [scaling])
        return Selection(every.select(slots), tuple(slots), modules.select(others))


def _modules(current: LowRank | AggregationResult, what: str) -> LowRank:
    """The global modules, whose slots mean something to all clients."""
    if isinstance(current, AggregationResult) and current.shared != BOTH:
        raise InputValueError(
            f"{what}: current: expected a result whose A and B both replace the client's, got "
            f"one that shares {sorted(current.shared)} only; use continue_from"
        )
    factors = current.factors if isinstance(current, AggregationResult) else current
    return as_state(current, f"{what}: current", getattr(factors, "dense_shape", ()))
