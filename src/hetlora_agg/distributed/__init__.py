"""One answer from many processes or machines, over ``torch.distributed``; gloo or nccl.

Layers spread over processes: `own` shares them out, `aggregate_layers` gives each process the
results of its own, `gather` everybody's. Clients spread over processes: each adds its own to a
`RunningAggregate`; `result` gives the answer for all of them, `merge` one running aggregate of all,
`save` and `load` carry everybody's over a restart. Whoever refuses or is lost, all processes raise.
"""

from hetlora_agg.distributed.by_client import merge as merge
from hetlora_agg.distributed.by_client import receipts as receipts
from hetlora_agg.distributed.by_client import result as result
from hetlora_agg.distributed.by_layer import aggregate_layers as aggregate_layers
from hetlora_agg.distributed.by_layer import gather as gather
from hetlora_agg.distributed.checkpoints import load as load
from hetlora_agg.distributed.checkpoints import save as save
from hetlora_agg.distributed.sharing import own as own
from hetlora_agg.errors import ProcessLostError as ProcessLostError

__all__ = [
    "ProcessLostError",
    "aggregate_layers",
    "gather",
    "load",
    "merge",
    "own",
    "receipts",
    "result",
    "save",
]
