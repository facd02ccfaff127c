"""Merge and restart: the base takes the whole update, the adapter begins anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hetlora_agg.checks import as_integer
from hetlora_agg.clients.reading import as_factors, as_generator, as_matrix, wide
from hetlora_agg.distribute import distribute
from hetlora_agg.errors import InputValueError
from hetlora_agg.linalg import all_finite, exact_arithmetic
from hetlora_agg.types import AggregationResult, LowRank


@dataclass(frozen=True, eq=False)
class Restart:
    """A base weight that took the update, and a fresh adapter on it.

    Attributes:
        weight: ``(*layers, out_features, in_features)``, a new tensor.
        adapter: ``A (*layers, rank, in_features)`` random, ``B (*layers, out_features, rank)``
            zero.
    """

    weight: Tensor
    adapter: LowRank


def merge_and_restart(
    weight: Tensor,
    result: AggregationResult | LowRank,
    rank: int,
    *,
    generator: torch.Generator,
) -> Restart:
    """Adds the whole update to the base weight and draws a fresh adapter.

    ``W ← W + total``, ``A ~ U(−1/√in, 1/√in)``, ``B = 0``.

    Args:
        weight: the base weight, ``(*layers, out_features, in_features)``.
        result: the round's update; of a result ``factors + residual``.
        rank: the fresh adapter's.
        generator: draws A, slot by slot: from one seed the leading slots of all ranks agree.

    Returns:
        A `Restart`: the weight in its own dtype, the adapter in the update's, on the weight's
        device.

    Raises:
        InputTypeError: no floating weight, no factors, no generator.
        InputValueError: an update of another size than the weight, a rank below 1, NaN or Inf in
            the update.

    Cost: ``out · in · R`` multiply-adds and one new weight.

    Example:
        >>> import torch
        >>> from hetlora_agg import aggregate
        >>> stack = aggregate([(torch.eye(2), torch.eye(2))], "flora")
        >>> fresh = merge_and_restart(
        ...     torch.ones(2, 2), stack, 1, generator=torch.Generator().manual_seed(0)
        ... )
        >>> fresh.weight.tolist(), fresh.adapter.B.tolist()
        ([[2.0, 1.0], [1.0, 2.0]], [[0.0], [0.0]])

    Reference: FLoRA, Wang et al., NeurIPS 2024, arXiv:2409.05976.

    Fidelity: CODE for merging and restarting, OURS for the bounds of A, which are PEFT's.

    Deviations: none.
    """
    what = "merge_and_restart"
    rank = as_integer(rank, f"{what}: rank", at_least=1)
    generator = as_generator(generator, what)
    weight = as_matrix(weight, f"{what}: weight", "(*layers, out_features, in_features)").detach()
    total = result.total() if isinstance(result, AggregationResult) else result
    total = as_factors(total.torch() if isinstance(total, LowRank) else total, f"{what}: result")
    if total.dense_shape != weight.shape:
        raise InputValueError(
            f"{what}: expected an update of (*layers, out_features, in_features) = "
            f"{tuple(weight.shape)} as the weight has, got {total.dense_shape}; pass the result of "
            "this layer"
        )
    if not all_finite(total.A, total.B):
        raise InputValueError(
            f"{what}: result: NaN or Inf in the update; keep the base of the last good round"
        )
    if not all_finite(weight):
        raise InputValueError(f"{what}: weight: NaN or Inf; go on from the last good base")
    compute = torch.promote_types(wide(weight.dtype), wide(total.A.dtype))
    with exact_arithmetic(weight.device.type):
        A, B = (X.to(weight.device, compute) for X in (total.A, total.B))
        merged = (weight.to(compute) + B @ A).to(weight.dtype)
        if not all_finite(merged):
            raise InputValueError(
                f"{what}: the merged weight has entries beyond {weight.dtype}; hold the base in a "
                "wider dtype"
            )
        nothing = LowRank(total.A[..., :0, :].to(merged.device), total.B[..., :0].to(merged.device))
        (adapter,) = distribute(AggregationResult(nothing), [rank], generator=generator)
    return Restart(merged, adapter)
