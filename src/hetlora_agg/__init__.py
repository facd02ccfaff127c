"""Functional aggregators for federated LoRA with heterogeneous ranks.

Five calls: `aggregate` one layer, `aggregate_layers` a model, `distribute` the result back to every
client's rank, `diagnose` how far it is from the exact mean, `compare` methods. ``METHODS`` lists
the methods; ``help(METHODS["rb"].run)`` shows one's formula and options. `align_rounds` writes a
result in factors like last round's; ``hetlora_agg.clients`` has what some methods' clients do.
"""

from hetlora_agg.aggregate import aggregate as aggregate
from hetlora_agg.components import Components as Components
from hetlora_agg.diagnostics import compare as compare
from hetlora_agg.diagnostics import diagnose as diagnose
from hetlora_agg.distribute import distribute as distribute
from hetlora_agg.errors import ConvergenceError as ConvergenceError
from hetlora_agg.errors import HetLoRAError as HetLoRAError
from hetlora_agg.errors import InputTypeError as InputTypeError
from hetlora_agg.errors import InputValueError as InputValueError
from hetlora_agg.errors import MemoryLimitError as MemoryLimitError
from hetlora_agg.layers import aggregate_layers as aggregate_layers
from hetlora_agg.reduction import unbiased_truncate as unbiased_truncate
from hetlora_agg.registry import CLAIMS as CLAIMS
from hetlora_agg.registry import CLIENTS as CLIENTS
from hetlora_agg.registry import METHODS as METHODS
from hetlora_agg.registry import MethodEntry as MethodEntry
from hetlora_agg.registry import method as method
from hetlora_agg.registry import resolve as resolve
from hetlora_agg.reports import Comparison as Comparison
from hetlora_agg.reports import Report as Report
from hetlora_agg.rounds import align_rounds as align_rounds
from hetlora_agg.sampling import draw_midzuno as draw_midzuno
from hetlora_agg.sampling import draw_uniform as draw_uniform
from hetlora_agg.sampling import inverse_inclusion as inverse_inclusion
from hetlora_agg.sampling import midzuno_inclusion as midzuno_inclusion
from hetlora_agg.sampling import uniform_inclusion as uniform_inclusion
from hetlora_agg.types import AggregationResult as AggregationResult
from hetlora_agg.types import ClientUpdate as ClientUpdate
from hetlora_agg.types import LowRank as LowRank

__all__ = [
    "CLAIMS",
    "CLIENTS",
    "METHODS",
    "AggregationResult",
    "ClientUpdate",
    "Comparison",
    "Components",
    "ConvergenceError",
    "HetLoRAError",
    "InputTypeError",
    "InputValueError",
    "LowRank",
    "MethodEntry",
    "Report",
    "aggregate",
    "aggregate_layers",
    "align_rounds",
    "compare",
    "diagnose",
    "distribute",
    "draw_midzuno",
    "draw_uniform",
    "inverse_inclusion",
    "method",
    "midzuno_inclusion",
    "resolve",
    "unbiased_truncate",
    "uniform_inclusion",
]

__version__ = "0.1.0"
