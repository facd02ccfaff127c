"""Clients one at a time, the same answer, bounded memory: `RunningAggregate`.

`add` takes a client in, `merge` what another process has added, `result` runs the method on the
sums, `save` and `load` carry everything over a restart. A client counts once: its receipt tells a
duplicate from a forgery, and what is missing from a roster.
"""

from hetlora_agg.streaming.receipts import Receipt as Receipt
from hetlora_agg.streaming.running import RunningAggregate as RunningAggregate

__all__ = ["Receipt", "RunningAggregate"]
