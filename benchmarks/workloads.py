"""Named workloads of realistic shape, and the clients that fill them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Workload:
    """Layers of one shape, one client per rank.

    Attributes:
        name: what it is taken from.
        layers: number of equal layers in the batch.
        out: out_features.
        columns: in_features.
        ranks: the clients' ranks.
        rank: wanted rank of the result.
    """

    name: str
    layers: int
    out: int
    columns: int
    ranks: tuple[int, ...]
    rank: int

    @property
    def R(self) -> int:
        """All components together."""
        return sum(self.ranks)

    def factors(
        self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stacked factors with a decaying spectrum, ``B (layers, out, R)``, ``A (layers, R, in)``.

        Clients share most of their directions, as after training from one init, and differ by
        noise: Gram matrices are far from the identity but not singular.
        """
        g = torch.Generator().manual_seed(seed)
        top = max(self.ranks)
        common_A = torch.randn(self.layers, top, self.columns, generator=g)
        common_B = torch.randn(self.layers, self.out, top, generator=g)
        decay = 0.97 ** torch.arange(top)
        A, B = [], []
        for r in self.ranks:
            noise_A = torch.randn(self.layers, r, self.columns, generator=g)
            noise_B = torch.randn(self.layers, self.out, r, generator=g)
            A.append(common_A[:, :r] + 0.3 * noise_A)
            B.append((common_B[:, :, :r] + 0.3 * noise_B) * decay[:r])
        return (
            torch.cat(B, -1).to(device, dtype).contiguous(),
            torch.cat(A, -2).to(device, dtype).contiguous(),
        )


TEN_TO_64 = (4, 4, 4, 4, 4, 4, 8, 8, 16, 64)
TEN_TO_256 = (4, 4, 16, 16, 64, 64, 128, 128, 256, 256)
EIGHT_TO_32 = (4, 4, 8, 8, 16, 16, 32, 32)
FOUR_TO_16 = (2, 4, 8, 16)
FIVE_TO_16 = (4, 4, 8, 16, 16)
FIVE_TO_64 = (16, 16, 32, 64, 64)
HUNDRED_TO_8 = (2, 4, 4, 8) * 25
HUNDRED_TO_16 = (4, 4, 8, 16) * 25
THOUSAND = (4,) * 1000

MINILM = Workload("minilm-384", 12, 384, 384, FOUR_TO_16, 16)
VIT_R48 = Workload("vit-b-768-R48", 32, 768, 768, FIVE_TO_16, 16)
VIT_R192 = Workload("vit-b-768-R192", 32, 768, 768, FIVE_TO_64, 32)
LLAMA_Q_R120 = Workload("llama-4096-R120", 1, 4096, 4096, TEN_TO_64, 16)
LLAMA_Q_R936 = Workload("llama-4096-R936", 1, 4096, 4096, TEN_TO_256, 256)

QUICK = (
    MINILM,
    VIT_R48,
    VIT_R192,
    Workload("llama-1024x4096-R120", 2, 1024, 4096, TEN_TO_64, 16),
    LLAMA_Q_R120,
    LLAMA_Q_R936,
    Workload("minilm-384-K100", 4, 384, 384, HUNDRED_TO_8, 16),
)
"""What ``make bench`` runs; R = 120 and 936 are ten clients of ranks 4 to 64 and 4 to 256."""

MORE = (
    Workload("minilm-1536x384", 12, 1536, 384, FOUR_TO_16, 16),
    Workload("vit-b-3072x768-R48", 12, 3072, 768, FIVE_TO_16, 16),
    Workload("vit-b-3072x768-R192", 12, 3072, 768, FIVE_TO_64, 32),
    Workload("llama-1024x4096-R936", 2, 1024, 4096, TEN_TO_256, 64),
    Workload("llama-14336x4096-R120", 2, 14336, 4096, TEN_TO_64, 16),
    Workload("llama-4096x14336-R120", 2, 4096, 14336, TEN_TO_64, 16),
    Workload("llama-14336x4096-R936", 1, 14336, 4096, TEN_TO_256, 256),
    Workload("llama-4096x14336-R936", 1, 4096, 14336, TEN_TO_256, 256),
    Workload("llama-4096-K100", 1, 4096, 4096, HUNDRED_TO_16, 64),
    Workload("vit-b-768-K1000", 2, 768, 768, THOUSAND, 16),
)
"""What ``make bench-full`` adds: the other shapes of an 8B Llama's linear layers, MiniLM and ViT-B,
and more clients."""

QUICK_FLOAT64 = (MINILM, VIT_R48, LLAMA_Q_R120)
"""Run again on float64 factors by ``make bench``."""

MORE_FLOAT64 = (VIT_R192, LLAMA_Q_R936)
"""Run again on float64 factors by ``make bench-full`` only."""

LLAMA_8B = (
    Workload("llama8b-q-o", 64, 4096, 4096, TEN_TO_64, 16),
    Workload("llama8b-k-v", 64, 1024, 4096, TEN_TO_64, 16),
    Workload("llama8b-up-gate", 64, 14336, 4096, TEN_TO_64, 16),
    Workload("llama8b-down", 32, 4096, 14336, TEN_TO_64, 16),
)
"""All 224 linear layers of an 8B Llama, R = 120."""

TINY = Workload("tiny", 1, 48, 64, (2, 4, 6), 4)
"""Loads every library and code path before memory is measured."""
