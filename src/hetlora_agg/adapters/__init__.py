"""PEFT adapters: read, aggregate and write folders or state dicts, without importing PEFT.

`aggregate_adapters` takes clients' folders, `aggregate_state_dicts` what they sent over a wire;
both return `AggregatedAdapters`, from which the global adapter and every client's next one come.

* **Layers**: linear, GPT-2's Conv1D, Conv1d/2d/3d without groups, embeddings.
* **Ranks and scalings**: ``r``, ``lora_alpha``, ``rank_pattern``, ``alpha_pattern``, rsLoRA, each
  client's own. The global adapter has its scaling folded into the factors: ``r = lora_alpha``.
* **Besides the factors**: ``modules_to_save``, biases and ``lora_bias`` are averaged; the base
  model's own tensors are handed on if they are equal on all clients; DoRA by stated policy.
* **Refused**: pickles, starts that change the base model (PiSSA, OLoRA, CorDA, LoftQ), variants
  whose update is not ``scaling * B @ A``, config fields that are not known.
* **A residual** (``fedex``, ``flexlora(fold_rest=True)``) is written as an adapter of its own, into
  ``residual`` beside the global one; clients merge it into the base model first.
"""

from hetlora_agg.adapters.adapter import Adapter as Adapter
from hetlora_agg.adapters.aggregate import aggregate_adapters as aggregate_adapters
from hetlora_agg.adapters.aggregate import aggregate_state_dicts as aggregate_state_dicts
from hetlora_agg.adapters.files import read_adapter as read_adapter
from hetlora_agg.adapters.files import write_adapter as write_adapter
from hetlora_agg.adapters.layout import Layer as Layer
from hetlora_agg.adapters.outcome import AggregatedAdapters as AggregatedAdapters

__all__ = [
    "Adapter",
    "AggregatedAdapters",
    "Layer",
    "aggregate_adapters",
    "aggregate_state_dicts",
    "read_adapter",
    "write_adapter",
]
