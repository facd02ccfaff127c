"""One call that all processes make together: whoever refuses, everybody hears it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import hetlora_agg.errors as errors
from hetlora_agg.distributed.packing import pack, unpack
from hetlora_agg.distributed.peers import Peers
from hetlora_agg.errors import HetLoRAError, InputTypeError, InputValueError, ProcessLostError
from hetlora_agg.streaming.receipts import digest_of_tensor

HEAD = struct.Struct("<?q80s")
"""Whether the process refuses; the length of what it brings; the step it is in."""


class Head(NamedTuple):
    """What every process says first."""

    refuses: bool
    length: int
    step: bytes


class Together:
    """A call in which all processes of a group take part, step by step.

    Every step begins with a head from everybody. A process that meets an error says so in the head
    of the step that the others are in, so nobody waits for who will not come.

    Args:
        peers: the processes.
        what: the name of the call, for errors.
    """

    def __init__(self, peers: Peers, what: str) -> None:
        """Nothing is sent yet."""
        self.peers = peers
        self.what = what
        self.over = False

    def hear(self, step: str, own: Any) -> list[Any]:
        """What everybody says, in the order of ranks; numbers, strings, None, lists and dicts."""
        heard = self.exchange(step, pack({}, plain(own, f"{self.what}: {step}")))
        return [unpack(one)[1] for one in heard]

    def exchange(self, step: str, own: Tensor) -> list[Tensor]:
        """Everybody's buffer of bytes, in the order of ranks."""
        heads = self._heads(step, len(own))
        return self._all(step, own, heads)

    def add_up(self, step: str, own: Tensor) -> Tensor:
        """The sum of everybody's tensors, in float64, the same bits on all."""
        self._heads(step, 0)
        with self._watched():
            return self.peers.add_up(self._named(step), own)

    def pass_on(
        self, step: str, sent: tuple[Tensor, int] | None, source: int | None
    ) -> Tensor | None:
        """A buffer goes to one process while another's comes in."""
        heads = self._heads(step, len(sent[0]) if sent else 0)
        wanted = None if source is None else (heads[source].length, source)
        with self._watched():
            return self.peers.pass_on(self._named(step), sent, wanted)

    def refuse(self, error: Exception) -> None:
        """Tells the others, in whatever step they are; this process raises its own."""
        if self.over:
            return
        kind = type(error).__name__ if isinstance(error, HetLoRAError) else None
        text = str(error) if kind else f"{type(error).__name__}: {error}"
        # Another process may refuse too, or be lost: this one's own error says more.
        with suppress(HetLoRAError):
            self._heads("refusing", 0, pack({}, [kind, text]))

    def _named(self, step: str) -> str:
        return f"distributed.{self.what}, process {self.peers.name()}, step {step!r}"

    def _heads(self, step: str, length: int, refusal: Tensor | None = None) -> list[Head]:
        """Everybody's head; an error if anybody refuses or is elsewhere."""
        where = f"{self.what}: {step}"[:80]
        bring = length if refusal is None else len(refusal)
        own = HEAD.pack(refusal is not None, bring, where.encode())
        with self._watched():
            rows = self.peers.tell(self._named(step), own)
            heads = [Head(*HEAD.unpack(row)) for row in rows]
        if any(head.refuses for head in heads):
            self._raise_refusals(step, refusal, heads)
        for rank, head in enumerate(heads):
            if head.step != heads[0].step:
                self.over = True
                first, other = (h.step.rstrip(b"\0").decode() for h in (heads[0], head))
                raise InputValueError(
                    f"distributed: process {self.peers.name(0)} is in {first!r}, process "
                    f"{self.peers.name(rank)} in {other!r}; all processes make the same calls in "
                    "the same order"
                )
        return heads

    def _raise_refusals(self, step: str, own: Tensor | None, heads: list[Head]) -> None:
        """Everybody's refusals on everybody."""
        told = [head if head.refuses else head._replace(length=0) for head in heads]
        mine = torch.zeros(0, dtype=torch.uint8) if own is None else own
        heard = self._all(step, mine, told)
        self.over = True
        rows = [(rank, *unpack(one)[1]) for rank, one in enumerate(heard) if len(one)]
        rank, kind, text = rows[0]
        more = f" (and {len(rows) - 1} more processes)" if len(rows) > 1 else ""
        family = getattr(errors, kind or "", ProcessLostError)
        raise family(
            f"distributed.{self.what}: process {self.peers.name(rank)} refuses: {text}{more}"
        )

    def _all(self, step: str, own: Tensor, heads: list[Head]) -> list[Tensor]:
        """Everybody's buffer, one process at a time."""
        every = []
        for rank, head in enumerate(heads):
            mine = rank == self.peers.rank
            with self._watched():
                buffer = own if mine else torch.empty(head.length, dtype=torch.uint8)
                if head.length:
                    buffer = self.peers.spread(self._named(step), buffer, rank)
            every.append(buffer)
        return every

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Once a process is lost, or a step broke off on this one alone, nobody can be told."""
        try:
            yield
        except Exception:
            self.over = True
            raise


@contextmanager
def together(group: Any, what: str) -> Iterator[Together]:
    """A call of all processes: an error of one is an error of all, at the end at the latest."""
    call = Together(Peers.of(group), what)
    try:
        yield call
    except Exception as error:
        call.refuse(error)
        raise
    call.hear("end", None)


def agree(call: Together, step: str, own: dict[str, Any]) -> None:
    """Refuses what differs between processes, on all of them alike."""
    heard = call.hear(step, own)
    first = heard[0]
    for rank, other in enumerate(heard):
        if odd := sorted(key for key in {**first, **other} if first.get(key) != other.get(key)):
            raise InputValueError(
                f"{call.what}: {', '.join(odd)} differ between processes {call.peers.name(0)} and "
                f"{call.peers.name(rank)}; all processes are told the same"
            )


def plain(value: Any, where: str) -> Any:
    """The value as JSON has it; ids come back as what they were, or are refused."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [plain(one, where) for one in value]
    if isinstance(value, dict):
        return {key: plain(one, where) for key, one in value.items()}
    raise InputTypeError(
        f"{where}: expected ids that are strings or integers and layers by name, got "
        f"{errors.shown(value)}; nothing else can be told to other processes"
    )


def comparable(value: Any) -> Any:
    """An option as far as two processes can compare it: plain, or what it is called."""
    if isinstance(value, Tensor):
        return digest_of_tensor(value)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        # One level: nothing that a method takes has more.
        return [one if isinstance(one, (bool, int, float, str)) else called(one) for one in value]
    return called(value)


def called(value: Any) -> str:
    """A function's name, a rule's sentence, or else the type's name."""
    kind = type(value).__name__
    return str(getattr(value, "__qualname__", repr(value) if callable(value) else kind))
