"""`fedrot`: factors rotated to last round's before they are averaged, FedRot-LoRA."""

from hetlora_agg.checks import as_integer, as_number, fitting_state
from hetlora_agg.claims import SYMMETRIC, ZERO_PADDED
from hetlora_agg.combining import average_factors
from hetlora_agg.components import Components
from hetlora_agg.errors import OptionValueError
from hetlora_agg.registry import method
from hetlora_agg.rotating import rotate_to
from hetlora_agg.types import AggregationResult, LowRank, result_of
from hetlora_agg.weighting import Weighting, weighted_share


@method(
    reference="arXiv:2602.23638",
    claims=SYMMETRIC
    | {
        "mixed_ranks": {},
        "split_client": {},
        "zero_component": {},
        "idle_coverage_squared": {},
        "bounded_share": {},
    },
    fails=dict.fromkeys(ZERO_PADDED, "factor means"),
)
def fedrot(
    c: Components,
    *,
    previous: LowRank | AggregationResult | None,
    round: int,
    strength: float = 0.4,
    weighting: Weighting = "examples",
) -> AggregationResult:
    """Rotates every client's factors towards last round's, then averages A's and B's apart.

    ``R_k = U Vᵀ`` from ``M = U S Vᵀ``, ``M = A_k A_refᵀ`` in odd rounds and ``B_kᵀ B_ref`` in even
    ones; ``polar((1 − λ)[I 0] + λ R_k)`` in place of ``R_k``; then ``A_g = Σ p_k R_kᵀ A_k``,
    ``B_g = Σ p_k B_k R_k``. No update changes by it: ``(B_k R_k)(R_kᵀ A_k) = B_k A_k``.

    Args:
        c: the components, ``A (*layers, R, in_features)``, ``B (*layers, out_features, R)``.
        previous: last round's global factors, the reference; None in the first round, which is a
            plain zero-padded average.
        round: number of this round, from 1.
        strength: λ in [0, 1]; 0 does not rotate, 1 goes all the way. Below 1 a square ``R_k`` is
            the nearest rotation proper (determinant 1), at 1 it may reflect.
        weighting: "examples" for ``p_k = n_k / Σ n``, "uniform" for ``1 / K``, or a function that
            returns the clients' coefficients. A rule against bad clients bounds nothing here: it
            sees ``B_k A_k``, which a client can write in factors of any size.

    Returns:
        Factors of the reference's rank, leading slots for every smaller one.

    Raises:
        InputValueError: a strength outside [0, 1], a round below 1, ``previous`` of another shape
            or of a smaller rank than a client.

    Cost: ``(out + in) R n_slots`` multiply-adds and one small SVD per client, batched over ranks.

    Example:
        >>> from torch import ones
        >>> from hetlora_agg import LowRank, aggregate
        >>> one, other = (ones(1, 2), ones(2, 1)), (-ones(1, 2), -ones(2, 1))  # the same update
        >>> last = LowRank(ones(1, 2), ones(2, 1))
        >>> aggregate([one, other], "fedrot", previous=last, round=2, strength=1.0).B[0]
        tensor([1.])

    Reference: FedRot-LoRA, Zhang, Kim, Cha, Vikalo, arXiv:2602.23638.

    Fidelity: CODE for equal ranks; OURS for ``weighting=`` and for mixed ranks: ``R_k`` is then
    r_k × r_ref with orthonormal rows.

    Deviations: where a softened rotation is singular the full one is taken, and noted. Rotation
    takes the place of padding but not its dilution: an idle round multiplies by ``q_j²``. Claims
    are those of a first round.
    """
    number = as_integer(round, "round=", at_least=1)
    blend = as_number(strength, "strength=", zero=True)
    if blend > 1:
        raise OptionValueError(f"strength=: expected a number in [0, 1], got {strength!r}")
    reference = fitting_state("previous", previous, c)
    notes: tuple[str, ...] = ()
    if reference is not None:
        c, notes = rotate_to(c, reference, "A" if number % 2 else "B", blend)
    return result_of(average_factors(c, weighted_share(c, weighting)), notes=notes)
