"""Uniform quantisation of an adapter, component by component, with a bound on what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hetlora_agg.checks import as_list
from hetlora_agg.clients.hafl import as_bits
from hetlora_agg.clients.reading import as_finite_factors
from hetlora_agg.errors import InputValueError
from hetlora_agg.linalg import all_finite, exact_arithmetic
from hetlora_agg.types import LowRank


@dataclass(frozen=True, eq=False)
class Quantised:
    """An adapter as integers: ``minimum + code · step``, each row of A, column of B with its own.

    Attributes:
        codes: ``A (*layers, rank, in_features)``, ``B (*layers, out_features, rank)``, uint8, or
            uint16 beyond 8 bits.
        minimum: ``A (*layers, rank, 1)``, ``B (*layers, 1, rank)``, float32; float64 for float64
            factors.
        step: in the same shapes and dtype; 0 where all entries are equal.
        bits: of each component.
        dtype: of the adapter, and of what `dequantise` gives back.
    """

    codes: LowRank
    minimum: LowRank
    step: LowRank
    bits: tuple[int, ...]
    dtype: torch.dtype

    def dequantise(self) -> LowRank:
        """The adapter that the codes stand for, in its dtype."""
        largest = torch.finfo(self.dtype).max
        A, B = (
            # The last step may reach beyond the dtype by its rounding.
            (low.double() + code.double() * step.double()).clamp(-largest, largest).to(self.dtype)
            for code, low, step in self._factors()
        )
        return LowRank(A, B)

    @property
    def factor_error(self) -> LowRank:
        """How far an entry can be off: ``A (*layers, rank, 1)``, ``B (*layers, 1, rank)`` float64.

        ``step / 2``, and the rounding of the entry in the adapter's dtype; 0 where the step is 0.
        """
        of = torch.finfo(self.dtype)
        # Of the largest entry: once in the dtype; in float64 two operations back, and two to the
        # code, which count twice because a row is up to twice as wide as its largest entry.
        rounding = of.eps / 2 + (2 + 2) * torch.finfo(torch.float64).eps
        levels = self.codes.A.new_tensor([2**b - 1 for b in self.bits], dtype=torch.float64)
        A, B = (
            step / 2
            + rounding * torch.maximum(low.abs(), (low + top * step).abs()).clamp_min(of.tiny)
            for low, step, top in (
                (self.minimum.A.double(), self.step.A.double(), levels.unsqueeze(-1)),
                (self.minimum.B.double(), self.step.B.double(), levels),
            )
        )
        return LowRank(torch.where(self.step.A > 0, A, 0.0), torch.where(self.step.B > 0, B, 0.0))

    @property
    def error_bound(self) -> Tensor:
        """Guaranteed bound on ``‖B A − B̂ Â‖_F``, ``(*layers,)`` float64.

        ``Σ_j ‖δb_j‖ ‖a_j‖ + ‖b̂_j‖ ‖δa_j‖`` with ``‖δ‖ ≤ √n · factor_error`` and
        ``‖a_j‖ ≤ ‖â_j‖ + ‖δa_j‖``: known to whoever has the message.
        """
        back, error = self.dequantise(), self.factor_error
        off_A = error.A.squeeze(-1) * back.in_features**0.5
        off_B = error.B.squeeze(-2) * back.out_features**0.5
        norm_A, norm_B = back.A.double().norm(dim=-1), back.B.double().norm(dim=-2)
        per_component: Tensor = off_B * (norm_A + off_A) + norm_B * off_A
        return per_component.sum(-1)

    @property
    def payload_bytes(self) -> int:
        """Bytes to send: the codes packed at their bits, a minimum and a step for each row."""
        layers = self.codes.layers
        per_component = self.codes.in_features + self.codes.out_features
        codes = sum(self.bits) * per_component * torch.Size(layers).numel()
        pairs = (self.minimum, self.step)
        return -(-codes // 8) + sum(X.numel() * X.itemsize for p in pairs for X in (p.A, p.B))

    def _factors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Codes, minimum and step of A, then of B."""
        return [
            (self.codes.A, self.minimum.A, self.step.A),
            (self.codes.B, self.minimum.B, self.step.B),
        ]


def quantise(adapter: LowRank, bits: int | Sequence[int]) -> Quantised:
    """Codes every row of A and every column of B uniformly between its least and largest entry.

    ``code = round((x − min) / step)``, ``step = (max − min) / (2^bits − 1)``.

    Args:
        adapter: ``A (*layers, rank, in_features)``, ``B (*layers, out_features, rank)``.
        bits: 1 to 16, one for all components or one for each, such as from `allot_bits`.

    Returns:
        A `Quantised`. An entry is off by half a step at most, beyond rounding; rows of equal
        entries are exact.

    Raises:
        InputTypeError: no factors, bits that are no integers.
        InputValueError: bits outside 1 to 16 or not one for each component, NaN or Inf, entries so
            far apart that the step leaves its dtype.

    Cost: ``4 (out + in) rank`` operations.

    Example:
        >>> import torch
        >>> sent = quantise(LowRank(torch.tensor([[0.0, 1.0, 3.0]]), torch.ones(2, 1)), bits=2)
        >>> sent.codes.A, sent.dequantise().A, sent.payload_bytes  # 5 codes of 2 bits, 4 numbers
        (tensor([[0, 1, 3]], dtype=torch.uint8), tensor([[0., 1., 3.]]), 18)

    Reference: HAFLQ, Su et al., arXiv:2411.06581.

    Fidelity: OURS; the paper quantises uploads by importance.

    Deviations: none known.
    """
    adapter = as_finite_factors(adapter, "quantise: adapter")
    each = _bits(bits, adapter.rank)
    dtype = torch.promote_types(adapter.A.dtype, adapter.B.dtype)
    code_dtype = torch.uint8 if max(each, default=1) <= 8 else torch.uint16
    pair_dtype = torch.promote_types(dtype, torch.float32)
    with exact_arithmetic(adapter.A.device.type):
        device = adapter.A.device
        levels = torch.tensor([2**b - 1 for b in each], dtype=torch.float64, device=device)
        (code_A, low_A, step_A), (code_B, low_B, step_B) = (
            _coded(adapter.A.double(), levels.unsqueeze(-1), -1, pair_dtype),
            _coded(adapter.B.double(), levels, -2, pair_dtype),
        )
    if not all_finite(step_A, step_B):
        raise InputValueError(
            f"quantise: adapter: entries of a row lie further apart than {pair_dtype} reaches; "
            "scale the adapter down"
        )
    return Quantised(
        LowRank(code_A.to(code_dtype), code_B.to(code_dtype)),
        LowRank(low_A, low_B),
        LowRank(step_A, step_B),
        each,
        dtype,
    )


def _coded(
    X: Tensor, levels: Tensor, dim: int, pair_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, minimum and step along a dimension, everything float64 but the pair."""
    low, high = X.amin(dim, keepdim=True), X.amax(dim, keepdim=True)
    exact = (high - low) / levels
    step = exact.to(pair_dtype)
    # Upward, so that the last code reaches the largest entry even where the step underflows.
    short = step.double() * levels < high - low
    step = torch.where(short, step.nextafter(torch.full_like(step, torch.inf)), step)
    codes = (X - low) / torch.where(step > 0, step, 1.0).double()
    return codes.round().clamp_min(0).minimum(levels), low.to(pair_dtype), step


def _bits(bits: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One number of bits for each component."""
    if isinstance(bits, Sequence) and not isinstance(bits, (str, bytes)):
        each = tuple(as_bits(b, "quantise: bits") for b in as_list(bits, "quantise: bits"))
        if len(each) != rank:
            raise InputValueError(
                f"quantise: bits: expected one number, or one for each of {rank} components, got "
                f"{len(each)}"
            )
        return each
    return (as_bits(bits, "quantise: bits"),) * rank
