"""What a method's clients do between two rounds, by the name the method gives: `SIDES`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hetlora_agg.simulate.sides.frozen import Alternate, KeepB, TrainB
from hetlora_agg.simulate.sides.modules import Freeze, Select
from hetlora_agg.simulate.sides.prune import Prune
from hetlora_agg.simulate.sides.qr_start import QRStart
from hetlora_agg.simulate.sides.slice import Restart
from hetlora_agg.simulate.sides.slice import Slice as Slice

SIDES: Mapping[str, type[Slice]] = MappingProxyType(
    {
        "slice": Slice,
        "restart": Restart,
        "prune": Prune,
        "select": Select,
        "freeze": Freeze,
        "qr_start": QRStart,
        "train_B": TrainB,
        "alternate": Alternate,
        "keep_B": KeepB,
    }
)
"""One client side for every name in `CLIENTS`."""
