"""What is known about a computed SVD, and how to find out the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hetlora_agg.linalg.products import balanced, product_norm
from hetlora_agg.linalg.solution import norms
from hetlora_agg.linalg.symmetric import exact_product, gram_matrix


@dataclass(frozen=True, eq=False)
class Certificate:
    """How an SVD was taken and how far its product may be from the matrix.

    Every tensor is ``(*layers,)`` float64, none of them negative or NaN.

    Attributes:
        driver: the driver that ran, see `linalg.svd_product`.
        norm: Frobenius norm of the whole matrix W.
        tail: Frobenius norm of what truncation discarded: the least error any matrix of that rank
            has. From the spectrum; randomized drivers estimate or measure it. Of an unbiased draw:
            its own distance from W.
        rounding: bound on what rounding adds: sums in float64, casts to the result's dtype, and,
            where the vectors were multiplied out in float32, the usual √R of independent roundings.
        size: ``Σ ‖b_j‖‖a_j‖``, the length of the sum that makes W.
        pivot: smallest Cholesky pivot that was relied on, 1 where none was.
        kept: number of components that are not zero, int64.
        fallbacks: ``(batch member, how)`` for members that left the fast path; usually empty.
        error: ``‖W − U diag(S) Vh‖_F`` itself, with ``verify=True``, else None.
        probes: the same estimated from 16 Gaussian probes of W, independently of the Gram
            matrices; with ``verify=True``, else None.
    """

    driver: str
    norm: Tensor
    tail: Tensor
    rounding: Tensor
    size: Tensor
    pivot: Tensor
    kept: Tensor
    fallbacks: tuple[tuple[int, str], ...] = ()
    error: Tensor | None = None
    probes: Tensor | None = None

    @property
    def bound(self) -> Tensor:
        """Bound on ``‖W − U diag(S) Vh‖_F``: ``tail + rounding``."""
        return self.tail + self.rounding

    @property
    def cancellation(self) -> Tensor:
        """``size / norm``: digits of the input that the sum cancels; 1 for a zero sum of zeros."""
        size, norm = (
            X if isinstance(X, Tensor) else torch.as_tensor(X, device="cpu")
            for X in (self.size, self.norm)
        )
        return torch.where(size > 0, size / norm, 1.0)

    def tensors(self) -> dict[str, Any]:
        """Every tensor by name."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v for k, v in every.items() if not isinstance(v, (str, tuple, type(None)))}

    def map(self, change: Callable[[Tensor], Any]) -> Certificate:
        """The same with every tensor changed."""
        return replace(self, **{name: change(x) for name, x in self.tensors().items()})

    def layer(self, i: int, layers: int) -> Certificate:
        """That of entry i of the first of the leading dimensions, which has ``layers`` entries."""
        inner = self.norm.numel() // layers
        own = tuple((m % inner, how) for m, how in self.fallbacks if m // inner == i)
        return replace(self.map(lambda x: x[i]), fallbacks=own)


PROBES = 16
"""Gaussian vectors behind `Certificate.probes`: their root mean square has a standard deviation of
18% for an error of one direction, far less for one of many."""

SURE = 1e-10
"""Smallest ``‖W − Ŵ‖² / (Σ ‖b_j‖‖a_j‖)²`` read off Gram matrices: what they cancel, 1e-16 times the
number of components, is then below a thousandth of it."""


def verified(
    certificate: Certificate, B: Tensor, A: Tensor, usv: tuple[Tensor, Tensor, Tensor]
) -> Certificate:
    """The certificate with the error of ``U diag(S) Vh`` against ``B @ A`` measured.

    ``‖W − Ŵ‖² = Σ (s sᵀ) ∘ (EᵀE) ∘ (F Fᵀ)`` with ``E = [B, U]``, ``F = [A; Vh]``,
    ``s = (1, …, −σ, …)``, in float64; where that cancels, through QR of E and F. Cost about
    ``(out + in)(R + r)²/2`` multiply-adds per member, one member at a time.
    """
    U, S, Vh = usv
    flat = [X.reshape(-1, *X.shape[-2:]) for X in (B, A, U, Vh)]
    sizes = certificate.size.reshape(-1)
    each = zip(*flat, S.reshape(-1, S.shape[-1]), sizes, strict=True)
    measured = [_measured(*member) for member in each]
    error, probes = (
        torch.stack(column).reshape(S.shape[:-1]) for column in zip(*measured, strict=True)
    )
    return replace(certificate, error=error, probes=probes)


def _measured(
    B: Tensor, A: Tensor, U: Tensor, Vh: Tensor, S: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact and probed error of one member."""
    # The sign and S stay apart, in float64: in the factors' own dtype they would be rounded.
    signed = torch.cat([S.new_ones(B.shape[-1]), -S]).double()
    E, F = torch.cat([B, U], -1), torch.cat([A, Vh], -2)
    if E.dtype == torch.float64:
        E, F = balanced(E * signed, F)
        signed = torch.ones_like(signed)
    generator = torch.Generator().manual_seed(0)
    shape = (F.shape[-1], PROBES)
    probes = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    seen = exact_product(E, signed.unsqueeze(-1) * exact_product(F, probes.to(E.device)))
    probed = norms(seen.flatten(), -1) / PROBES**0.5
    if E.dtype != torch.float64:
        squares = gram_matrix(E.unsqueeze(0))[0] * gram_matrix(F.unsqueeze(0), -1)[0]
        square = signed @ squares @ signed
        if bool(square > SURE * size.square()):
            return square.sqrt(), probed
    return product_norm(E.double() * signed, F), probed
