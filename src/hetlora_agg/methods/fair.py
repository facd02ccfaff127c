"""`fair`: the B that best makes up for averaging the factors apart, LoRA-FAIR's aim."""

import torch
from torch import Tensor

from hetlora_agg.checks import as_number
from hetlora_agg.claims import SYMMETRIC, ZERO_PADDED
from hetlora_agg.combining import average_factors
from hetlora_agg.components import Components
from hetlora_agg.linalg import solve_gram
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import Weighting, weighted_share


@method(
    reference="arXiv:2411.14961",
    claims={k: v for k, v in SYMMETRIC.items() if k != "transpose"}
    | {
        "mixed_ranks": {},
        "split_client": {},
        "idle_coverage": {"regularisation": 0.0},
        "bounded_share": {},
    },
    fails=dict.fromkeys(
        (*ZERO_PADDED, "idle_coverage_squared", "transpose", "zero_component"),
        "corrected factor means",
    ),
)
def fair(
    c: Components, *, regularisation: float = 0.01, weighting: Weighting = "examples"
) -> AggregationResult:
    """Averages the factors apart, then corrects B so that the product is nearest the exact mean.

    ``ΔB = (Σ p_k B_k (A_k Āᵀ) − B̄ Ā Āᵀ)(Ā Āᵀ + λ I)⁻¹``, the minimiser of
    ``‖Σ p_k ΔW_k − (B̄ + ΔB) Ā‖² + λ ‖ΔB‖²``; result ``Ā, B̄ + ΔB``.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        regularisation: λ >= 0, in units of the mean squared norm of a row of Ā. 0 takes the
            pseudo-inverse: the best B there is for Ā.
        weighting: "examples" for ``p_k = n_k / Σ n``, "uniform" for ``1 / K``, or a function that
            returns the clients' coefficients. A rule against bad clients bounds nothing here: it
            sees ``B_k A_k``, which a client can write in factors of any size.

    Returns:
        Factors of the largest rank, leading slots for every smaller one.

    Raises:
        InputValueError: a regularisation below 0.

    Cost: ``2 (out + in) R n_slots`` multiply-adds and one eigendecomposition of size n_slots.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> plus, minus = torch.ones(1, 1), -torch.ones(1, 1)
        >>> pair = [(plus, plus), (plus, minus), (plus, plus)]
        >>> aggregate(pair, "fair").factors.dense()  # one A: nothing to make up for
        tensor([[0.3333]])

    Reference: LoRA-FAIR, Bian, Wang, Zhang, Xu, ICCV 2025, arXiv:2411.14961.

    Fidelity: PAPER for the aim, OURS for the closed form, λ relative to Ā, mixed ranks and
    ``weighting=``.

    Deviations: the published method takes gradient steps on a cosine similarity with a fixed λ.
    """
    level = as_number(regularisation, "regularisation=", zero=True)
    share = weighted_share(c, weighting)
    mean = average_factors(c, share)
    # ΔB does not depend on the size of A, and is proportional to that of B.
    size_A, size_B = (_size(X) for X in (c.A, c.B))
    A_k, A, B_k, B = c.A / size_A, mean.A / size_A, c.B / size_B, mean.B / size_B
    gram = A.double() @ A.double().mT
    wanted = (share.unsqueeze(-2) * B_k.double()) @ (A_k.double() @ A.double().mT)
    ridge = level * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    correction = solve_gram(wanted - B.double() @ gram, gram, ridge)
    return result_of(LowRank(mean.A, mean.B + (size_B * correction).to(mean.B)))


def _size(X: Tensor) -> Tensor:
    """The power of two next to a layer's largest entry, ``(*layers, 1, 1)``; 1 for zero."""
    largest = X.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, torch.exp2(largest.log2().round()), 1.0)
