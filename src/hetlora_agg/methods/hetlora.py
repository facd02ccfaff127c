"""`hetlora`: zero-padded averages weighted by the size of the update."""

from hetlora_agg.checks import check_flag
from hetlora_agg.claims import SYMMETRIC, ZERO_PADDED
from hetlora_agg.combining import average_factors
from hetlora_agg.components import Components
from hetlora_agg.registry import method
from hetlora_agg.types import AggregationResult, result_of
from hetlora_agg.weighting import (
    client_share,
    client_squared_norms,
    layer_update_norm,
    update_norm,
)


@method(
    reference="arXiv:2401.06432",
    claims=SYMMETRIC
    | {
        "mixed_ranks": {},
        "zero_component": {},
        "layers": {"per_layer": True},
    },
    fails=dict.fromkeys(
        (*ZERO_PADDED, "idle_coverage_squared", "bounded_share"), "norm-weighted factor means"
    )
    | {"split_client": "doubled mass", "layers": "one mass for all layers"},
    statistic=client_squared_norms,
    client="prune",
)
def hetlora(c: Components, *, per_layer: bool = False) -> AggregationResult:
    """Averages zero-padded factors, each client weighted by the Frobenius norm of its update.

    ``w_k = ‖ΔW_k‖_F / Σ ‖ΔW‖_F``, ``A_g = Σ w_k pad(A_k)``, ``B_g = Σ w_k pad(B_k)``.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        per_layer: norms of each layer apart; by default a client has one weight, from the norm
            over all its layers.

    Returns:
        Factors of the largest rank, leading slots for every smaller one.

    Raises:
        InputValueError: the square of a norm leaves float64.

    Cost: ``(out + in)(Σ r_k² + R n_slots)`` multiply-adds; norms are taken through the factors.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import aggregate
        >>> one, three = (ones(1, 2), ones(2, 1)), (ones(1, 2), 3 * ones(2, 1))
        >>> aggregate([one, three], "hetlora").B[0]  # 1/4 · 1 + 3/4 · 3
        tensor([2.5000])

    Reference: HetLoRA, Cho, Liu, Xu, Fahrezi, Joshi, EMNLP 2024, arXiv:2401.06432.

    Fidelity: PAPER for weighting by sparsity of the update, SECOND for the formula. OURS: if every
    update is zero, clients share equally.

    Deviations: the clients' own weights play no part, as published. Rank self-pruning is the
    client's side.
    """
    check_flag("per_layer", per_layer)
    mass = layer_update_norm(c) if per_layer else update_norm(c)
    return result_of(average_factors(c, client_share(c, mass)))
