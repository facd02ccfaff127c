"""The exact drivers by name; approximate ones hand over to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from hetlora_agg.linalg.dense import dense
from hetlora_agg.linalg.gram import gram
from hetlora_agg.linalg.qr import qr
from hetlora_agg.linalg.solution import Solution

Driver = Callable[[Tensor, Tensor, int], Solution]

EXACT: Mapping[str, Driver] = {"gram": gram, "qr": qr, "dense": dense}
"""Each takes ``B (members, out, R)``, ``A (members, R, in)``, float32 or float64, and a rank."""
