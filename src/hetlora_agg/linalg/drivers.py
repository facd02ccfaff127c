"""All drivers by name: one signature, ``(B, A, rank) -> Solution``."""

from __future__ import annotations

from collections.abc import Mapping

from hetlora_agg.linalg.exact import EXACT, Driver
from hetlora_agg.linalg.randomized import randomized, randomized_dense

DRIVERS: Mapping[str, Driver] = {
    **EXACT,
    "randomized": randomized,
    "randomized_dense": randomized_dense,
}
