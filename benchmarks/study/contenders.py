"""What is compared: registered methods, their options, and functions of the library's verbs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hetlora_agg import METHODS, AggregationResult, Components
from hetlora_agg.combining import stack
from hetlora_agg.compression import compress, divide
from hetlora_agg.types import result_of
from hetlora_agg.weighting import client_share, examples, slot_share, uniform

Method = str | Callable[[Components], AggregationResult]


@dataclass(frozen=True)
class Contender:
    """A method with its options.

    Attributes:
        method: a name in `METHODS` or in `COMPOSED`.
        options: the method's own.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Method:
        """What `simulate.run` takes."""
        return COMPOSED.get(self.method, self.method)


def stacked_sum(c: Components) -> AggregationResult:
    """The stack without weights, cut by SVD: how the RB-LoRA release has its FLoRA baseline.

    `ΔW = Σ_k s_k B_k A_k`, K times as long as a mean.
    """
    total = stack(c, client_share(c, uniform(c), total=1.0))
    return result_of(compress(total, default=c.max_rank, rank=None))


def rb_fold_rest(c: Components) -> AggregationResult:
    """`rb`, and what its truncation discards folded into the base weight."""
    whole = compress(stack(c, slot_share(c, examples(c))), "full")
    factors, residual = divide(whole, None, default=c.n_slots)
    return result_of(factors, residual=residual)


COMPOSED: Mapping[str, Callable[[Components], AggregationResult]] = {
    f.__name__: f for f in (stacked_sum, rb_fold_rest)
}
"""Functions that are no registered methods, by name."""

VARIANTS: Mapping[str, Contender] = {
    "zeropad, uniform": Contender("zeropad", {"weighting": "uniform"}),
    "flora, summed and cut": Contender("stacked_sum"),
    "flexlora, rest folded": Contender("flexlora", {"fold_rest": True}),
    "fedhl, by examples": Contender("fedhl", {"weighting": "examples"}),
    "fedrot, unaligned": Contender("fedrot", {"strength": 0.0}),
    "fedrot, fully aligned": Contender("fedrot", {"strength": 1.0}),
    "rb, own svd": Contender("rb", {"align": "svd"}),
    "rb, floor 0.3": Contender("rb", {"floor": 0.3}),
    "rb, floor 0.6": Contender("rb", {"floor": 0.6}),
    "rb, rest folded": Contender("rb_fold_rest"),
}
"""Label -> contender, beyond the methods under their own names."""

CONTENDERS: Mapping[str, Contender] = {
    **{name: Contender(name) for name in METHODS},
    **VARIANTS,
}
"""Every label of the study."""

MAIN = ("zeropad", "hetlora", "replicate", "flora", "flexlora", "rbla", "rb", "plora")
"""The eight methods that ablations and the text setting are about."""
