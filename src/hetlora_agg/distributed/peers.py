"""The one place that talks to ``torch.distributed``: bytes and numbers, no objects."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hetlora_agg.errors import InputTypeError, InputValueError, ProcessLostError, quoted, shown

GRACE = 1.0
"""Seconds for those on their way to come, before a broken step says who did not."""

WAYS = """no process group; write

    import torch.distributed
    torch.distributed.init_process_group("gloo")    # "nccl" on GPUs

and start the script with torchrun --nproc-per-node 4 script.py"""


@dataclass(frozen=True, eq=False)
class Peers:
    """The processes of a group, seen from one of them.

    Every method is a step that all of them take together, under the group's own timeout.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        everybody: their ranks in the whole job.
        group: as torch takes it.
        device: where what is sent has to be.
        store: where everybody counts the steps that it came to; None where torch has none.
        patience: seconds within which the store has to answer.
    """

    rank: int
    size: int
    everybody: tuple[int, ...]
    group: Any
    device: torch.device
    store: Any
    patience: float = 300.0

    @classmethod
    def of(cls, group: Any = None) -> Peers:
        """The processes of a group, or of the whole job.

        Raises:
            InputTypeError, InputValueError: no process group, or this process is not in it.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise InputValueError(f"distributed: {WAYS}")
        outside = group is dist.GroupMember.NON_GROUP_MEMBER
        if not outside and group is not None and not isinstance(group, dist.ProcessGroup):
            raise InputTypeError(f"group=: expected a ProcessGroup or None, got {shown(group)}")
        if outside or dist.get_rank(group) < 0:
            raise InputValueError("group=: this process is not in it; call from its members alone")
        whole = group is None or group is dist.group.WORLD
        everybody = range(dist.get_world_size()) if whole else dist.get_process_group_ranks(group)
        card = dist.get_backend(group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if card else torch.device("cpu")
        # Private, and there from torch 2.0 to 2.13; without it errors do not say who is missing.
        find = getattr(dist.distributed_c10d, "_get_default_store", None)
        store = find() if find else None
        rank, patience = dist.get_rank(group), store.timeout.total_seconds() if store else 300.0
        own = None if whole else group
        return cls(rank, len(everybody), tuple(everybody), own, device, store, patience)

    def name(self, rank: int | None = None) -> int:
        """What errors call a process: its rank in the whole job. This one, or one of the group."""
        return self.everybody[self.rank if rank is None else rank]

    def tell(self, step: str, own: bytes) -> list[bytes]:
        """Everybody's bytes, as many of each."""
        mine = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(self.device)
        heard = [torch.empty_like(mine) for _ in range(self.size)]
        with self._together(step):
            dist.all_gather(heard, mine, group=self.group)
        return [bytes(one.cpu().numpy()) for one in heard]

    def spread(self, step: str, buffer: Tensor, source: int) -> Tensor:
        """One process's buffer on all; the others bring an empty one of its length."""
        moved = buffer.to(self.device)
        with self._together(step):
            dist.broadcast(moved, self.everybody[source], group=self.group)
        return moved.to(buffer.device)

    def add_up(self, step: str, own: Tensor) -> Tensor:
        """The sum of everybody's, the same bits on all."""
        total = own.to(self.device, torch.float64, copy=True)
        with self._together(step):
            dist.all_reduce(total, group=self.group)
        return total.to(own)

    def pass_on(
        self, step: str, sent: tuple[Tensor, int] | None, wanted: tuple[int, int] | None
    ) -> Tensor | None:
        """Sends a buffer to one process while one of a known length comes from another.

        Args:
            step: its name.
            sent: buffer and whom it goes to, or nothing.
            wanted: length and whom it comes from, or nothing.
        """
        # Held here until all is through: a request keeps no hold of what it sends.
        going = sent and sent[0].to(self.device)
        coming = None
        requests = []
        if sent is not None and going is not None:
            requests.append(dist.P2POp(dist.isend, going, self.everybody[sent[1]], self.group))
        if wanted is not None:
            length, source = wanted
            coming = torch.empty(length, dtype=torch.uint8, device=self.device)
            requests.append(dist.P2POp(dist.irecv, coming, self.everybody[source], self.group))
        # Who sends and wants nothing comes to the step all the same.
        with self._together(step):
            for work in dist.batch_isend_irecv(requests) if requests else ():
                work.wait()
        return None if coming is None else coming.cpu()

    @contextmanager
    def _together(self, step: str) -> Iterator[None]:
        """Counts this process in; what breaks becomes an error that says who did not come."""
        count = 0
        try:
            count = self._count(self.rank, 1)
            yield
        except RuntimeError as error:
            raise ProcessLostError(
                f"{step}: {self._who(count)}; torch.distributed says: {quoted(error)}. Start all "
                "processes again, as torchrun --max-restarts=3 does by itself; running aggregates "
                "come back with hetlora_agg.distributed.load(folder)"
            ) from error

    def _count(self, rank: int, more: int) -> int:
        """How many steps a process came to, one's own counted up."""
        # By group: who missed a step of one is not late in another of the same processes.
        key = f"hetlora_agg/{getattr(self.group, 'group_name', '')}/{self.everybody}/{rank}"
        if self.store is None:
            return 0
        # On a thread: an answer from a machine that fell silent is waited for without an end.
        heard: list[int | RuntimeError] = []

        def ask() -> None:
            try:
                heard.append(int(self.store.add(key, more)))
            except RuntimeError as error:
                heard.append(error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(self.patience if more else GRACE)
        answer = heard[0] if heard else RuntimeError("torch's store does not answer")
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    def _who(self, count: int) -> str:
        """Who did not come to the step that this process came to as its ``count``-th."""
        absent: list[int] | None = None
        until = time.monotonic() + GRACE
        try:
            while absent is None or (absent and time.monotonic() < until):
                absent = [rank for rank in range(self.size) if self._count(rank, 0) < count]
                time.sleep(GRACE / 20 if absent else 0)
        except RuntimeError:
            # Who holds torch's store may leave first; what was seen before still holds.
            if absent is None:
                return "a process was lost, the one that holds torch's store among them"
        if not absent:
            return "a process was lost in the middle of this step"
        named = ", ".join(str(self.name(rank)) for rank in absent)
        return f"process{'es' * (len(absent) > 1)} {named} did not come to this step"
