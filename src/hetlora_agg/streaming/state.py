"""What a running aggregate holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hetlora_agg.streaming.arriving import Size, Updates
from hetlora_agg.streaming.besides import BesidesSum
from hetlora_agg.streaming.group import Group
from hetlora_agg.streaming.receipts import Form, Id, Receipt


@dataclass(eq=False)
class State:
    """What changes with every client; replaced as a whole, so that a failure leaves it.

    Attributes:
        receipts: everybody who came.
        forms: the forms of the receipts, one object each.
        late: clients of other rounds that were left out -> their round.
        sizes: layer -> its size.
        dtypes: layer -> dtype of its result.
        numpy: whether everybody sent arrays.
        one_layer: whether clients send one update and not a mapping; None before the first.
        common: layer -> the factor that all clients share, by slot, and which slots are filled.
        accepted: slots that the method was asked about.
        kept: everybody's updates as sent, or None once there are sums.
        kept_bytes: what they take.
        most: largest rank of truncated sums; None for exact ones.
        groups: size -> sums over the layers of that size.
        besides: sums of what adapters hold besides factors, by key as in files.
        dora: whether clients are DoRA adapters; None before the first.
    """

    receipts: dict[Id, Receipt] = field(default_factory=dict)
    forms: dict[Form, Form] = field(default_factory=dict)
    late: dict[Id, int] = field(default_factory=dict)
    sizes: dict[str, Size] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    numpy: bool = True
    one_layer: bool | None = None
    common: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    accepted: set[tuple[int, ...]] = field(default_factory=set)
    kept: dict[Id, Updates] | None = field(default_factory=dict)
    kept_bytes: int = 0
    most: int | None = None
    groups: dict[Size, Group] = field(default_factory=dict)
    besides: dict[str, BesidesSum] = field(default_factory=dict)
    dora: bool | None = None

    @property
    def order(self) -> list[str]:
        """The layers, in the order in which they came."""
        return list(self.sizes)

    @property
    def how(self) -> str:
        """How clients are held, in words."""
        if self.kept is not None:
            return "kept whole"
        return "summed" if self.most is None else f"summed up to rank {self.most}"

    def tensors(self) -> list[Tensor]:
        """Everything large that is held."""
        kept = [X for own in (self.kept or {}).values() for u in own.values() for X in (u.A, u.B)]
        sums = [X for group in self.groups.values() for X in group.added.tensors()]
        held = [one.value for one in self.besides.values() if one.value is not None]
        return kept + sums + held + [rows for rows, _ in self.common.values()]
