"""``aggregate_folders``: any number of adapter folders in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hetlora_agg.adapters import AggregatedAdapters
from hetlora_agg.adapters.calling import Progress, call_roll
from hetlora_agg.adapters.combining import DORA, check_headers, combine
from hetlora_agg.adapters.roll import Roll, one_of_each
from hetlora_agg.checks import as_integer, as_number, as_path, check_choice
from hetlora_agg.errors import HetLoRAError, InputValueError
from hetlora_agg.layers import MISSING
from hetlora_agg.registry import MethodEntry, Run, check_options, resolve
from hetlora_agg.streaming.arriving import as_layers, read_client
from hetlora_agg.streaming.choosing import roster_of, streams, takes_roster
from hetlora_agg.streaming.outcome import outcome_of
from hetlora_agg.streaming.plan import check_streamable
from hetlora_agg.streaming.receipts import Id, checked_id
from hetlora_agg.streaming.resuming import Checkpoint, unchanged
from hetlora_agg.streaming.running import RunningAggregate

ARITHMETIC = ("max_group", "workers")
"""Options of the one-shot call that change no result."""


def aggregate_folders(
    paths: str
    | os.PathLike[str]
    | Iterable[str | os.PathLike[str]]
    | Mapping[Hashable, str | os.PathLike[str]],
    weights: Sequence[float] | Mapping[Hashable, float] | None = None,
    method: str | Run = "rb",
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    every: float = 60.0,
    on_bad_folder: str = "error",
    on_duplicate: str = "error",
    ranks: Sequence[int] | Mapping[Hashable, int] | None = None,
    missing: str = "error",
    dora: str = "error",
    progress: Progress | None = None,
    memory_limit: int | None = None,
    max_rank: int | Mapping[Hashable, int] | None = None,
    on_bad_client: str = "error",
    **options: Any,
) -> AggregatedAdapters:
    """Aggregates any number of PEFT adapter folders: memory does not grow with them.

    Headers first, one folder at a time: who is there, with which ranks and weights, who is not
    whole, who came twice. Then one of two ways:

    * **At once**, by `aggregate_adapters`: without a ``checkpoint``, as long as its largest group
      of layers takes less than 256 MB and ``memory_limit``, or less than the sums
      would; and for methods that compare clients with each other, which cannot stream.
    * **One after the other**, by `RunningAggregate`, in the order of ids. Methods that divide
      a slot by its owners are given the roster that the headers make, so every option streams.

    Args:
        paths: the clients' folders, whose names become their ids; a mapping of ids to folders; or
            one folder that holds them. Hidden entries and plain files in it are no clients.
        weights: the clients' weights, in the same order or by id, those of folders that are
            skipped included; None weighs all alike.
        method: a name from ``METHODS``, or a registered function.
        checkpoint: a file to take the run up from after an interruption. It is written again and
            again, and when the function is left, however; what goes on from it ends as if
            uninterrupted, bit for bit. It is not removed: do that once the outcome is written.
        every: seconds between writes of the checkpoint, at least; they take no more than a
            twentieth of the time.
        on_bad_folder: "error" for a folder without config, with half a file, with a name such as
            ``….part``; or "skip" to leave it out, with the reason in ``.excluded``.
        on_duplicate: "error" for a folder that is given twice, two of one name and content, or
            clients whose tensors are equal byte for byte; "skip" to count the first alone; "keep"
            for clients with equal tensors that are to count each. Two folders of one name and
            different content are an error always.
        ranks: the ranks that clients want back; None is what each sent, layer by layer.
        missing: what a client counts for in a layer that it lacks, as in `aggregate_layers`.
        dora: "error" refuses DoRA adapters; "mean" averages their magnitudes apart.
        progress: called with a stage, "folders", "checks", "clients" or "layers", and how many are
            done and in all.
        memory_limit: bytes for the clients or their sums; see `RunningAggregate`.
        max_rank: refuse clients that declare more, as in `aggregate`.
        on_bad_client: "error" for NaN, Inf or a rank above ``max_rank``, or "drop". With a roster
            all tensors are then read twice: shares are computed among those who are left.
        **options: of the method; ``workers`` and ``max_group`` where all are aggregated at once.

    Returns:
        `AggregatedAdapters`, its clients read from their folders when they are asked for.

    Raises:
        InputTypeError, InputValueError: what is wrong, with folder and remedy; a checkpoint of
            other settings or clients; a method that cannot stream with a ``checkpoint``.
        KeyboardInterrupt: Ctrl-C, after the checkpoint is written.

    Cost: two headers, 128 KB and then every tensor once per folder; the sums as `RunningAggregate`.

    Example:
        >>> import tempfile, torch
        >>> from hetlora_agg.adapters import Adapter, write_adapter
        >>> def sent(r):
        ...     factors = {"q.lora_A.weight": torch.ones(r, 3), "q.lora_B.weight": torch.ones(4, r)}
        ...     return Adapter.from_state_dict(factors, {"r": r, "lora_alpha": 8})
        >>> with tempfile.TemporaryDirectory() as d:
        ...     for name, r in (("phone", 1), ("tablet", 2)):
        ...         written = write_adapter(f"{d}/clients/{name}", sent(r))
        ...     outcome = aggregate_folders(f"{d}/clients", checkpoint=f"{d}/round-3")
        >>> outcome
        AggregatedAdapters(1 layers, 2 clients, rank 2)
    """
    entry = resolve(method)
    check_own(entry, options)
    check_choice("missing", missing, MISSING)
    check_choice("dora", dora, DORA)
    check_choice("on_bad_client", on_bad_client, ("drop", "error"))
    if memory_limit is not None:
        as_integer(memory_limit, "memory_limit=", at_least=1)
    file = None if checkpoint is None else as_path(checkpoint, "checkpoint", "file")
    kept = Checkpoint(file, as_number(every, "every=", zero=True))
    if file is not None:
        check_streamable(entry, options)
    roll = call_roll(paths, weights, ranks, on_bad_folder, on_duplicate, progress)
    check_headers(one_of_each(roll), missing, dora)
    told = {
        "missing": missing, "dora": dora, "memory_limit": memory_limit, "max_rank": max_rank,
        "on_bad_client": on_bad_client,
    }  # fmt: skip
    own = {k: v for k, v in options.items() if k not in ARITHMETIC}
    if file is None and not streams(entry, own, told, roll):
        return _at_once(roll, method, told, options, progress)
    running = _begun(method, told, own, roll, progress)
    roster = running._settings.roster is not None
    running = kept.resumed(running, roll)
    _add(running, roll, kept, "error" if roster else on_bad_folder, progress)
    idle = [f"{k}=: has no effect on clients that are added up" for k in options if k not in own]
    outcome = outcome_of(running, roll, _wanted(roll), one_of_each(roll), [*roll.notes, *idle])
    return replace(outcome, excluded=(*roll.excluded.items(), *outcome.excluded))


def check_own(entry: MethodEntry, options: Mapping[str, Any]) -> None:
    """Refuse options that neither the method nor the arithmetic has."""
    check_options(entry, {k: v for k, v in options.items() if k not in ARITHMETIC})


def _at_once(
    roll: Roll,
    method: str | Run,
    told: Mapping[str, Any],
    options: Mapping[str, Any],
    progress: Progress | None,
) -> AggregatedAdapters:
    """The one-shot call."""
    limits = ("memory_limit", "max_rank")
    given = {k: told[k] for k in limits if told[k] is not None}
    outcome = combine(
        dict(roll),
        {id: row.weight for id, row in roll.rows.items()},
        method,
        ranks=_wanted(roll),
        missing=told["missing"],
        dora=told["dora"],
        progress=None if progress is None else partial(progress, "layers"),
        options={"on_bad_client": told["on_bad_client"], **given, **options},
    )
    return replace(
        outcome,
        excluded=(*roll.excluded.items(), *outcome.excluded),
        notes=(*roll.notes, *outcome.notes),
    )


def _wanted(roll: Roll) -> dict[Hashable, int] | None:
    """The ranks that clients want back, if any was given."""
    wanted = {id: row.wanted for id, row in roll.rows.items() if row.wanted is not None}
    return wanted or None


def _begun(
    method: str | Run,
    told: Mapping[str, Any],
    options: Mapping[str, Any],
    roll: Roll,
    progress: Progress | None,
) -> RunningAggregate:
    """Nobody added yet; with the roster of everybody, where a client's part depends on the others.

    Who is to be dropped is found before any share is computed.
    """
    ids = [checked_id(id) for id in roll]
    if not takes_roster(method, told, options):
        return RunningAggregate(method, **told, **options)
    running = RunningAggregate(method, roster=roster_of(roll), **told, **options)
    if told["on_bad_client"] == "error":
        return running
    for done, id in enumerate(ids):
        layers, besides = as_layers(roll[id], id, roll.rows[id].weight, None, None)
        receipt = read_client(layers, id, running._settings.door, besides).receipt
        if receipt.excluded:
            roll.excluded[id] = receipt.excluded
        if progress is not None:
            progress("checks", done + 1, len(ids))
    if all(id in roll.excluded for id in ids):
        raise InputValueError(f"no client is left: {next(iter(roll.excluded.values()))}")
    return RunningAggregate(method, roster=roster_of(roll), **told, **options)


def _add(
    running: RunningAggregate,
    roll: Roll,
    kept: Checkpoint,
    on_bad_folder: str,
    progress: Progress | None,
) -> None:
    """Everybody who is not in it yet, in the order of ids, whatever that of the folders."""
    every = sorted((checked_id(id) for id in roll if id not in roll.excluded), key=str)
    with kept.guarding(running) as check:
        for done, id in enumerate(every):
            check()
            if not unchanged(kept.stamps, roll, id):
                _add_one(running, roll, kept, id, on_bad_folder)
            if kept.due():
                kept.save(running)
            if progress is not None:
                progress("clients", done + 1, len(every))
        check()


def _add_one(
    running: RunningAggregate, roll: Roll, kept: Checkpoint, id: Id, on_bad_folder: str
) -> None:
    """One folder; where its files are not those that were added its tensors must be."""
    row = roll.rows[id]
    try:
        adapter = roll[id]
    except (HetLoRAError, OSError) as error:
        if on_bad_folder == "error" or id in running.receipts:
            raise
        roll.excluded[id] = str(error)
        roll.leave_out(id)
        return
    running.add(adapter, id=id, weight=row.weight)
    kept.stamps[id] = row.stamp
