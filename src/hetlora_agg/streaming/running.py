"""``RunningAggregate``: clients one at a time, the same answer, bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

import hetlora_agg.methods  # noqa: F401  (enters every method in METHODS)
from hetlora_agg.adapters import Adapter
from hetlora_agg.errors import InputTypeError, InputValueError
from hetlora_agg.registry import Run
from hetlora_agg.streaming import files
from hetlora_agg.streaming.added import Commit
from hetlora_agg.streaming.answering import answer, bound_of, extras_of
from hetlora_agg.streaming.arriving import as_layers, read_client
from hetlora_agg.streaming.checkpoint import check_same, dump, restore
from hetlora_agg.streaming.merging import merged
from hetlora_agg.streaming.receipts import (
    Id,
    Receipt,
    check_content,
    check_late,
    check_nobody_lacks,
    checked_id,
    pairs_of,
    split,
    was_added,
)
from hetlora_agg.streaming.settings import Settings, settings_of, without_rows
from hetlora_agg.streaming.state import State
from hetlora_agg.streaming.taking import taken


class RunningAggregate:
    """Takes clients one at a time and gives what `aggregate_layers` gives for all of them.

    While everybody together is smaller than the sums would be, everybody is kept, and the result
    is the one-shot call's, bit for bit. Beyond that clients are added up in float64:
    ``Σ m_k B_k A_k`` for methods of products, ``Σ m_k A_k`` and ``Σ m_k B_k`` by slot for methods
    of factors. The method itself then runs on the sums: there is no second formula.

    Args:
        method: a name from ``METHODS``, or a registered function with ``sums=``.
        round: the number of the round.
        roster: ``(id, rank, weight)`` of everybody who will come, rank one number or one by layer.
            Every share is known then: one sum, whatever the options; who does not come is an error.
        levels: the ranks that clients may have: methods that divide every slot by its owners then
            keep one sum of products per level.
        missing: what a client counts for in a layer it did not send, as in `aggregate_layers`.
        stale: "error" for a client of another round, or "skip" to leave it out.
        memory_limit: bytes that the state may take, besides the moment when clients become sums and
            both are there. Sums of products that do not fit are truncated; see ``.bound``.
        max_rank: refuse clients that declare more, as in `aggregate`.
        on_bad_client: "error" for NaN, Inf or a rank above ``max_rank``, or "drop".
        dora: "error" refuses DoRA adapters, "mean" averages their magnitudes apart.
        **options: the method's own; state such as ``previous=`` is a mapping by layer where
            clients send layers.

    Raises:
        InputTypeError, InputValueError: an option that is none, a method that is no sum, or one
            that needs ``roster=``.

    Cost: per client ``out · in · r`` multiply-adds for products, in blocks of 64 components, and
    ``(out + in) r`` for factors; memory does not grow with clients but for their receipts.

    Example:
        >>> import torch
        >>> running = RunningAggregate("flexlora")
        >>> for k in range(3):
        ...     update = (torch.ones(1, 4), torch.full((4, 1), float(k)))
        ...     added = running.add(update, id=f"phone-{k}")
        >>> running.result().singular_values
        tensor([4.])
    """

    def __init__(
        self,
        method: str | Run,
        *,
        round: int | None = None,
        roster: Iterable[Sequence[Any]] | None = None,
        levels: Sequence[int] | None = None,
        missing: str = "error",
        stale: str = "error",
        memory_limit: int | None = None,
        max_rank: int | Mapping[Hashable, int] | None = None,
        on_bad_client: str = "error",
        dora: str = "error",
        **options: Any,
    ) -> None:
        """Ask the method what it needs; nothing large is allocated."""
        self._settings = settings_of(
            method, round, roster, levels, missing, stale, memory_limit, max_rank, on_bad_client,
            options, dora,
        )  # fmt: skip
        self._state = State()
        self._broken: str | None = None

    def add(
        self,
        update: Any,
        *,
        id: Hashable,
        round: int | None = None,
        weight: float | None = None,
        scaling: Any = None,
        config: Any = None,
    ) -> bool:
        """Takes one client in.

        Args:
            update: a `ClientUpdate` or a tuple as `aggregate` takes it; a mapping of such by layer
                name; an `adapters.Adapter`; or a PEFT state dict. What an adapter holds besides
                factors is averaged with the same weights: see `extras`.
            id: a string or an integer, one for every client.
            round: the round that the client trained in, if it says so.
            weight: of an adapter or a state dict; None is 1.
            scaling: of a state dict: ``lora_alpha / r``, one number or one by layer.
            config: of a state dict, instead: its ``adapter_config``.

        Returns:
            Whether it counts from now on: False for a client that was added before with the same
            content, was left out by a policy, or has weight 0.

        Raises:
            InputTypeError, InputValueError: whatever is wrong with the update; the id was added
                before with other content; another round; not on the roster. Nothing has changed.
            MemoryLimitError: the state would outgrow ``memory_limit``. Nothing has changed.
        """
        state, settings = self._whole(), self._settings
        id = checked_id(id)
        if round is not None and round != settings.round:
            check_late(id, round, settings.round, settings.stale)
            state.late[id] = round
            return False
        layers, besides = as_layers(update, id, weight, scaling, config)
        arriving = read_client(layers, id, settings.door, besides)
        if was_added(id, arriving.receipt, state.receipts):
            return False
        self._apply(taken(settings, state, {id: arriving}))
        return arriving.receipt.counts

    def merge(self, other: RunningAggregate) -> None:
        """Adds everybody that another running aggregate has added; that one stays as it is.

        Raises:
            InputTypeError, InputValueError: other settings; a client in both, with other content
                or in the sums of both; layers of other sizes. Nothing has changed.
        """
        if not isinstance(other, RunningAggregate):
            raise InputTypeError(f"merge: expected a RunningAggregate, got {type(other).__name__}")
        state, theirs = self._whole(), other._whole()
        check_same(self._settings, other._settings)
        if other is self:
            return
        self._apply(merged(self._settings, state, theirs))

    def result(self) -> Any:
        """The method's result for everybody so far; nothing changes, more clients may follow.

        Returns:
            Layer name -> `AggregationResult` as from `aggregate_layers`; one result where clients
            sent one update. Where sums were truncated its certificate and notes include the bound.

        Raises:
            InputValueError: nobody was added; a client of the roster did not come; whatever the
                method has against these clients.

        Cost: the method's on one matrix of full rank per layer, once clients are summed.
        """
        return answer(self._settings, self._whole())

    def extras(self) -> dict[str, Tensor]:
        """The weighted means of what adapters held besides factors, by key as in files.

        Biases have the scaling in them; the base model's own tensors are as they were sent.
        `as_adapters` makes adapters of these and of the results.

        Raises:
            InputValueError: as `result`; nobody of positive weight has one of them.
        """
        return {name: X for name, (_, X) in extras_of(self._settings, self._whole()).items()}

    @property
    def bound(self) -> Any:
        """Bound on the Frobenius distance of the sums from exact ones, in units of the result.

        Layer -> ``(*layers,)`` float64, or that alone where clients sent one update: of the mean
        of products that the method combines, or of the product of its mean factors. What truncation
        lost and rounding in float64; 0 while everybody is kept.
        """
        return bound_of(self._settings, self._whole())

    @property
    def receipts(self) -> Mapping[Id, Receipt]:
        """Everybody who came, by id."""
        return MappingProxyType(self._state.receipts)

    @property
    def late(self) -> Mapping[Id, int]:
        """Clients of another round that ``stale="skip"`` left out, and their round."""
        return MappingProxyType(self._state.late)

    @property
    def state_bytes(self) -> int:
        """What the clients' factors or their sums take, receipts aside."""
        return sum(X.numel() * X.element_size() for X in self._state.tensors())

    def without(
        self,
        ids: Iterable[Hashable],
        source: Mapping[Any, Any] | Iterable[tuple[Any, Any]] | Callable[[Any], Any],
    ) -> RunningAggregate:
        """A new running aggregate of everybody but some, added again from where they came.

        Sums are never subtracted from: what is left of a large client is rounding. The receipts
        prove that everybody else is there, with the content that was added.

        Args:
            ids: clients to leave out.
            source: id -> update, as a mapping, pairs or a function; state dicts as adapters.

        Returns:
            The new one; this one stays as it is.

        Raises:
            InputTypeError, InputValueError: an id never added; a client that the source lacks, or
                has with other content.
        """
        state = self._whole()
        gone, wanted = split(ids, state.receipts)
        new = RunningAggregate._of(without_rows(self._settings, gone))
        for id, update in pairs_of(source, wanted):
            own = wanted[id].weight if isinstance(update, Adapter) else None
            new.add(update, id=id, weight=own)
            check_content(id, wanted[id], new.receipts[id])
        check_nobody_lacks(wanted, new.receipts)
        return new

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes everything into one safetensors file, whole or not at all.

        Killed at any moment it leaves the old file or the new one, perhaps beside a ``.name.part``
        for the next save to write over. What goes on after `load` ends as if uninterrupted, bit
        for bit. No pickle.

        Raises:
            InputTypeError, InputValueError: no path; an option that no file can hold.
            OSError: no such folder, no room.

        Cost: the state once through SHA-256 and once onto the disk.
        """
        return files.write(path, *dump(self._settings, self._whole()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunningAggregate:
        """Reads what `save` wrote.

        Raises:
            InputTypeError, InputValueError: no such file, damaged, of another version, or of a
                method that is not registered here.
        """
        tensors, data = files.read(path)
        settings, state = restore(tensors, data, str(path))
        new = cls._of(settings)
        new._state = state
        return new

    def __repr__(self) -> str:
        """One line: method, clients, how they are held."""
        name, counting = self._settings.entry.name, sum(r.counts for r in self.receipts.values())
        return f"RunningAggregate({name!r}, {counting} clients, {self._state.how})"

    @classmethod
    def _of(cls, settings: Settings) -> RunningAggregate:
        new = cls.__new__(cls)
        new._settings, new._state, new._broken = settings, State(), None
        return new

    def _whole(self) -> State:
        """The state, unless a change broke off in the middle."""
        if self._broken:
            raise InputValueError(
                f"this running aggregate broke off in the middle of a change ({self._broken}); "
                "load the last checkpoint, or add the clients to a new one"
            )
        return self._state

    def _apply(self, commit: Commit) -> None:
        """Make a prepared change; should even that fail, refuse to go on."""
        try:
            commit()
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            raise
