"""Processes of a group as threads of one process, for the tests of `hetlora_agg.distributed`.

Only what talks to ``torch.distributed`` is replaced; real processes are in
``tests/distributed/test_processes.py``. One thread runs at a time: the others wait in a step.
"""

import threading
from contextlib import contextmanager

import torch
import torch.distributed as dist

from hetlora_agg.distributed.peers import Peers

CPU = torch.device("cpu")


class Room:
    """Where threads meet.

    Attributes:
        sent: how many bytes each process passed on, by step.
    """

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.turn = threading.Lock()
        self.brought = [None] * size
        self.sent = {}

    def trade(self, rank, thing):
        """Everybody's things, once all are here."""
        self.brought[rank] = thing
        self.turn.release()
        try:
            self.barrier.wait()
            every = list(self.brought)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return every


class Seat(Peers):
    """One process's view, with threads behind it."""

    def __init__(self, room, rank):
        super().__init__(rank, room.size, tuple(range(room.size)), None, CPU, None)
        object.__setattr__(self, "room", room)

    def tell(self, step, own):
        return self.room.trade(self.rank, own)

    def spread(self, step, buffer, source):
        return self.room.trade(self.rank, buffer)[source].clone()

    def add_up(self, step, own):
        return torch.stack(self.room.trade(self.rank, own)).sum(0)

    def pass_on(self, step, sent, wanted):
        sizes = self.room.sent.setdefault(step.split("'")[1], {})
        sizes[self.rank] = len(sent[0]) if sent else 0
        every = self.room.trade(self.rank, sent)
        if wanted is None:
            return None
        length, source = wanted
        buffer, to = every[source]
        assert (to, len(buffer)) == (self.rank, length)
        return buffer.clone()


def in_processes(monkeypatch, size, work):
    """What ``work(rank)`` returns or raises on each of ``size`` processes; the room besides."""
    room, found = Room(size), [None] * size
    seats = threading.local()
    monkeypatch.setattr(Peers, "of", classmethod(lambda cls, group=None: seats.own))

    def process(rank):
        seats.own = Seat(room, rank)
        with room.turn:
            try:
                found[rank] = work(rank)
            except Exception as error:
                found[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found, room


def results_of(monkeypatch, size, work):
    """The same where nobody may raise."""
    found, _ = in_processes(monkeypatch, size, work)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


@contextmanager
def world_of_one():
    """A real process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
