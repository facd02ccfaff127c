"""What an accountant of differential privacy needs to know: clipped updates and sensitivities.

No noise is added and no budget is counted here; the page on privacy shows both beside a library
that does.
"""

from hetlora_agg.privacy.bounds import ADJACENCIES as ADJACENCIES
from hetlora_agg.privacy.bounds import Sensitivity as Sensitivity
from hetlora_agg.privacy.bounds import sensitivity as sensitivity
from hetlora_agg.privacy.clipping import clip_layers as clip_layers
from hetlora_agg.privacy.clipping import clip_message as clip_message
from hetlora_agg.privacy.clipping import clip_update as clip_update

__all__ = [
    "ADJACENCIES",
    "Sensitivity",
    "clip_layers",
    "clip_message",
    "clip_update",
    "sensitivity",
]
