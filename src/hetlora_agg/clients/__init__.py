"""What some methods' clients do between two rounds; `CLIENTS` says which method needs what.

Plain functions on one layer, or on a batch of equal layers: nothing here trains, sends or keeps
state. A slice of the global factors, which most methods hand out, comes from `distribute`.
"""

from hetlora_agg.clients.fedask import basis as basis
from hetlora_agg.clients.fedask import project as project
from hetlora_agg.clients.fedask import sketch as sketch
from hetlora_agg.clients.flora import Restart as Restart
from hetlora_agg.clients.flora import merge_and_restart as merge_and_restart
from hetlora_agg.clients.hafl import allot_bits as allot_bits
from hetlora_agg.clients.hafl import importance as importance
from hetlora_agg.clients.hafl import important_slots as important_slots
from hetlora_agg.clients.hetlora import prune as prune
from hetlora_agg.clients.hetlora import tail_penalty as tail_penalty
from hetlora_agg.clients.ilora import QRStart as QRStart
from hetlora_agg.clients.ilora import client_variate as client_variate
from hetlora_agg.clients.ilora import corrected as corrected
from hetlora_agg.clients.ilora import qr_start as qr_start
from hetlora_agg.clients.ilora import server_variate as server_variate
from hetlora_agg.clients.plora import Selection as Selection
from hetlora_agg.clients.plora import select_and_fold as select_and_fold
from hetlora_agg.clients.quantising import Quantised as Quantised
from hetlora_agg.clients.quantising import quantise as quantise
from hetlora_agg.clients.shared import continue_from as continue_from

__all__ = [
    "QRStart",
    "Quantised",
    "Restart",
    "Selection",
    "allot_bits",
    "basis",
    "client_variate",
    "continue_from",
    "corrected",
    "importance",
    "important_slots",
    "merge_and_restart",
    "project",
    "prune",
    "qr_start",
    "quantise",
    "select_and_fold",
    "server_variate",
    "sketch",
    "tail_penalty",
]
