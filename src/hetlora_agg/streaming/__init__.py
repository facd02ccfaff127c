"""Clients one at a time, the same answer, bounded memory: `RunningAggregate`.

`add` takes a client in, `merge` what another process has added, `result` runs the method on the
sums, `save` and `load` carry everything over a restart. A client counts once: its receipt tells a
duplicate from a forgery, and what is missing from a roster. `aggregate_folders` does all of it with
PEFT adapters on disk.
"""

from hetlora_agg.streaming.folders import aggregate_folders as aggregate_folders
from hetlora_agg.streaming.outcome import as_adapters as as_adapters
from hetlora_agg.streaming.receipts import Receipt as Receipt
from hetlora_agg.streaming.running import RunningAggregate as RunningAggregate

__all__ = ["Receipt", "RunningAggregate", "aggregate_folders", "as_adapters"]
