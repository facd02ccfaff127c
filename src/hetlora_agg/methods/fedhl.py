"""`fedhl`: steps from the truncation each client was given, weighted by its error, FedHL."""

import torch
from torch import Tensor

from hetlora_agg.checks import as_number, check_choice, check_flag, fitting_state
from hetlora_agg.claims import COHORTS, ESTIMATES, GAUGE_FREE, IDLE, SYMMETRIC
from hetlora_agg.combining import stack
from hetlora_agg.components import Components
from hetlora_agg.compression import Rank, compress
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import client_share, examples, normalised, over_all_layers


def truncation_errors(
    c: Components, previous: LowRank | AggregationResult | None = None
) -> tuple[Tensor, Tensor]:
    """``‖ΔW_t − ΔW_t^{(r_k)}‖_F²`` and ``‖ΔW_t‖_F²`` for every client, ``(*layers, K)`` each."""
    last = fitting_state("previous", previous, c)
    if last is None:
        nothing = c.weight.new_zeros((*c.layers, len(c.ranks)))
        return nothing, nothing
    A, B = last.A.double(), last.B.double()
    inner = (B.mT @ B) * (A @ A.mT)
    cut = 1 - held(c, last.rank)
    errors = torch.einsum("ki,...ij,kj->...k", cut, inner, cut).clamp_min(0)
    return errors, inner.sum((-2, -1)).unsqueeze(-1).expand_as(errors)


def held(c: Components, width: int) -> Tensor:
    """Which components of a global update of that rank a client had, ``(K, width)`` of 0 and 1."""
    slots = [set(own) for own in c.slots_by_client]
    held = [[float(j in own) for j in range(width)] for own in slots]
    return torch.tensor(held, dtype=torch.float64, device=c.A.device)


@method(
    reference="arXiv:2505.18494",
    claims=SYMMETRIC
    | GAUGE_FREE
    | {
        "mixed_ranks": {},
        "exact": {"weighting": "examples", "rank": "full"},
        "split_client": {"weighting": "examples"},
        "zero_component": {"rank": "full"},
        "idle_kept": {},
        "layers": {"per_layer": True},
        "cohort_equal": {"rank": "full"},
        "cohort_ratio": {"weighting": "examples", "rank": "full"},
        "bounded_share": {"weighting": "examples"},
    },
    fails=dict.fromkeys((*ESTIMATES, *COHORTS, "bounded_share", "zero_component"), "equal means")
    | dict.fromkeys(IDLE[1:], "steps from truncations")
    | {"split_client": "doubled mass", "layers": "one mass for all layers"},
    statistic=truncation_errors,
)
def fedhl(
    c: Components,
    *,
    previous: LowRank | AggregationResult | None,
    weighting: str = "truncation",
    smoothing: float = 0.01,
    per_layer: bool = False,
    rank: Rank = None,
    split: str = "balanced",
) -> AggregationResult:
    """Adds to the global update what each client changed of the truncation it was given.

    ``ΔW_{t+1} = ΔW_t + Σ_k w_k (s_k B_k A_k − ΔW_t^{(r_k)})``, ``w_k ∝ 1 / (e_k² + ε)``,
    ``e_k = ‖ΔW_t − ΔW_t^{(r_k)}‖_F²``. In components, ``Σ w_k ΔW_k + Σ_j (1 − c_j) b_j a_j`` with
    ``c_j = Σ_{r_k ≥ j} w_k``: what a client could not hold is not taken for forgotten. A
    client with other slots than the leading ones had the components of those.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        previous: the global update ``ΔW_t`` whose leading components the clients started from;
            None in the first round.
        weighting: "truncation", or "examples" for ``w_k = p_k``.
        smoothing: ε in units of ``‖ΔW_t‖_F⁴``, > 0: clients that lost nothing get
            ``(1 + ε) / ε`` times the weight of those that lost everything.
        per_layer: errors of each layer apart; by default a client has one weight, from the errors
            over all its layers.
        rank: None for the largest rank of clients and ``previous``, "full" for no truncation, or
            an integer.
        split: "balanced", "left" (all of S in B) or "right" (all of S in A).

    Returns:
        Nested factors with their singular values.

    Raises:
        InputValueError: an option outside its range, or ``previous`` of another shape.

    Cost: one factored SVD of R + r components, see `linalg.svd_product`; never out×in.

    Example:
        >>> import torch
        >>> from hetlora_agg import LowRank, aggregate
        >>> last = LowRank(torch.diag(torch.tensor([4.0, 2.0])), torch.eye(2))
        >>> idle = (last.A[:1], last.B[:, :1])  # rank 1, sends back what it was given
        >>> aggregate([idle, idle], "fedhl", previous=last).singular_values
        tensor([4., 2.])

    Reference: FedHL, Peng et al., arXiv:2505.18494.

    Fidelity: SECOND for the step and the weights; OURS for the form in components, for ε relative
    to the update and for ``weighting="examples"``.

    Deviations: with a fixed ε, clients of low rank starve once one client's error is zero. Claims
    are those of a first round, but for the idle one.
    """
    check_flag("per_layer", per_layer)
    check_choice("weighting", weighting, ("examples", "truncation"))
    level = as_number(smoothing, "smoothing=", zero=False)
    last = fitting_state("previous", previous, c)
    mass = examples(c)
    if weighting == "truncation":
        own = truncation_errors(c, previous)
        errors, whole = own if per_layer else over_all_layers(c, lambda _: own)
        relative = torch.where(whole > 0, errors / whole, 0.0)
        mass = 1 / (relative.square() + level)
    combined = stack(c, client_share(c, mass))
    if last is not None:
        missed = 1 - normalised(mass) @ held(c, last.rank)
        combined = combined.plus(LowRank(missed.to(last.A).unsqueeze(-1) * last.A, last.B))
    default = max(c.max_rank, last.rank if last else 0)
    return result_of(compress(combined, rank, default=default, split=split))
