"""``aggregate``: the one function the library is for."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import hetlora_agg.methods  # noqa: F401  (enters every method in METHODS)
from hetlora_agg.budget import budget, check_resources
from hetlora_agg.intake import collect
from hetlora_agg.linalg import limited
from hetlora_agg.registry import Run, check_options, resolve
from hetlora_agg.running import Batch, folding_of, run, to_numpy
from hetlora_agg.types import AggregationResult
from hetlora_agg.validation import admit


def aggregate(
    updates: Iterable[Any],
    method: str | Run = "rb",
    *,
    workers: int | None = None,
    memory_limit: int | None = None,
    on_bad_client: str = "error",
    max_rank: int | Mapping[Hashable, int] | None = None,
    **options: Any,
) -> AggregationResult:
    """Aggregates clients' LoRA updates of one layer into a global low-rank factorization.

    Everything is checked before the first arithmetic; nothing passed in is changed; no gradients
    are recorded. float16 and bfloat16 are computed in float32 and cast back at the end. Numpy
    arrays in, numpy arrays out.

    Args:
        updates: `ClientUpdate`s, or tuples ``(A, B)``, ``(A, B, rank)``, ``(A, B, rank, weight)``
            with ``A (*layers, rank, in_features)`` and ``B (*layers, out_features, rank)``. Ranks
            may differ; leading dimensions, if any, are a batch of equal layers.
        method: a name from ``METHODS``, or a function ``Components -> AggregationResult``.
        workers: layers of a batch decomposed at a time on a CPU, each with its share of torch's
            threads; None is one per thread, fewer for little work.
        memory_limit: bytes that the call may allocate, result included; see `budget`.
        on_bad_client: "error" for NaN or Inf in a factor, for a product beyond the compute dtype
            and for what ``max_rank`` refuses, or "drop" to leave that client out (listed with the
            reason in ``.excluded``; the others' weights then make up the whole).
        max_rank: refuse clients that declare more or fill a slot beyond it, one number or one by
            client id; a client that is not in the mapping is refused too.
        **options: the method's own keyword arguments, such as ``rank=``.

    Returns:
        An `AggregationResult`: ``.factors`` (and ``.residual``, for methods that leave one).

    Raises:
        InputTypeError, InputValueError: what is wrong, with which client, and what to do.
        MemoryLimitError: ``memory_limit`` is too small.
        ConvergenceError: an SVD that no driver could take, or a result beyond its dtype.

    Cost: the method's; for SVD methods ``(out + in)(R² + R r)`` multiply-adds, ``R = Σ r_k``.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> def client(rank):
        ...     return torch.randn(rank, 6, generator=g), torch.randn(5, rank, generator=g), rank
        >>> aggregate([client(2), client(4)], method="rb")
        AggregationResult(5x6, rank 4, nested)
    """
    entry = resolve(method)
    check_options(entry, options)
    check_resources(workers, memory_limit)
    read, numpy, refused = admit(updates, None, max_rank, on_bad_client)
    _, for_svd = budget(memory_limit, {None: read}, None, entry.workspace)
    with limited(workers, for_svd):
        (result,) = run(
            entry,
            [Batch(collect(read, folding=folding_of(entry, options)), options)],
            on_bad_client,
            refused,
        )
    return to_numpy(result) if numpy else result
