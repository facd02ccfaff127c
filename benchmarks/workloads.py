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


TEN_TO_64 = (4, 4, 4, 8, 8, 8, 16, 16, 32, 20)
TEN_TO_256 = (4, 4, 16, 16, 64, 64, 128, 128, 256, 256)
EIGHT_TO_32 = (4, 4, 8, 8, 16, 16, 32, 32)

QUICK = (
    Workload("minilm-384", 12, 384, 384, (2, 4, 8, 16), 16),
    Workload("vit-b-768-R48", 16, 768, 768, (4, 4, 8, 16, 16), 16),
    Workload("vit-b-768-R192", 8, 768, 768, (16, 16, 32, 64, 64), 32),
    Workload("llama-1024x4096-R120", 2, 4096, 1024, TEN_TO_64, 16),
    Workload("llama-4096-R120", 1, 4096, 4096, TEN_TO_64, 16),
    Workload("llama-4096-R936", 1, 4096, 4096, TEN_TO_256, 256),
)
"""What ``make bench`` runs; R = 120 and 936 are ten clients of ranks up to 32 and up to 256."""

LLAMA_8B = (
    Workload("llama8b-q-o", 64, 4096, 4096, TEN_TO_64, 16),
    Workload("llama8b-k-v", 64, 1024, 4096, TEN_TO_64, 16),
    Workload("llama8b-up-gate", 64, 14336, 4096, TEN_TO_64, 16),
    Workload("llama8b-down", 32, 4096, 14336, TEN_TO_64, 16),
)
"""All 224 linear layers of an 8B Llama, R = 120."""
