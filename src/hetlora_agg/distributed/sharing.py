"""Who takes what: found out by every process for itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import heapreplace
from typing import Any, TypeVar

from hetlora_agg.checks import as_list, as_number
from hetlora_agg.distributed.peers import Peers
from hetlora_agg.errors import InputTypeError, InputValueError, shown

Name = TypeVar("Name", str, int)


def own(
    names: Iterable[Name], cost: Mapping[Name, float] | None = None, *, group: Any = None
) -> list[Name]:
    """The layers, or clients, that this process takes; every name is taken by one process.

    Largest cost first, each to the process that has least so far: no process has more than 4/3 of
    the least possible largest load (Graham 1969). Nothing is sent: the same names and costs give
    the same answer on every process, in whatever order they are listed.

    Args:
        names: all of them, strings or integers, the same on every process.
        cost: name -> a number >= 0, such as ``out_features * in_features``; None is one each.
        group: a process group of ``torch.distributed``; None is everybody.

    Returns:
        This process's names, in the order given; none where there are more processes than names.

    Raises:
        InputTypeError, InputValueError: no process group, a name twice or without a cost, a cost
            that is none.

    Cost: ``n log n P`` for n names and P processes.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> own(["q_proj", "v_proj"])
        ['q_proj', 'v_proj']
        >>> dist.destroy_process_group()

    Reference: Graham, Bounds on Multiprocessing Timing Anomalies, 1969.

    Fidelity: PAPER.
    """
    peers = Peers.of(group)
    listed = as_list(names, "own: names")
    for name in listed:
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise InputTypeError(f"own: expected strings or integers, got {shown(name)}")
    if len(set(listed)) < len(listed):
        twice = next(name for i, name in enumerate(listed) if name in listed[:i])
        raise InputValueError(f"own: {shown(twice)} is named twice; name everything once")
    if cost is not None and not isinstance(cost, Mapping):
        raise InputTypeError(f"cost=: expected a mapping by name, got {type(cost).__name__}")
    if cost is not None and (without := [name for name in listed if name not in cost]):
        raise InputValueError(f"cost=: expected a number for every name, {without[0]!r} has none")
    costs = [1.0 if cost is None else as_number(cost[n], "cost=", zero=True) for n in listed]
    return shared_out(listed, costs, peers.size)[peers.rank]


def shared_out(names: Sequence[Name], costs: Sequence[float], processes: int) -> list[list[Name]]:
    """Every process's names, in the order given."""
    cost = dict(zip(names, costs, strict=True))
    # The fewest names break ties: layers of cost 0 are spread too.
    loads = [(0.0, 0, rank) for rank in range(processes)]
    taken: dict[Name, int] = {}
    for name in sorted(names, key=lambda name: (-cost[name], isinstance(name, str), name)):
        load, count, rank = loads[0]
        taken[name] = rank
        heapreplace(loads, (load + cost[name], count + 1, rank))
    shares: list[list[Name]] = [[] for _ in range(processes)]
    for name in names:
        shares[taken[name]].append(name)
    return shares
