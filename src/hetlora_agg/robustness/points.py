"""Points that are known by their inner products only, and what rules may ask of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hetlora_agg.robustness.distances import CANCELLED

CHUNK = 1 << 22
"""Numbers of differences of rows that are formed at a time."""


@dataclass(frozen=True, eq=False)
class Points:
    """n points and, as the last, the origin, up to rotation.

    A combination of them is a row of n + 1 coefficients that sum to one, so that it does not
    depend on where zero is; a shrunk point has a coefficient for the origin.

    Attributes:
        squares: ``(n + 1, n + 1)`` squared distances.
        gram: ``(n + 1, n + 1)`` inner products about the point ``centre``. Distances to
            combinations go by these: in squared distances one far point would drown the others.
        centre: the point whose median distance to the others is least: among the majority.
        weight: ``(n,)``.
    """

    squares: Tensor
    gram: Tensor
    centre: int
    weight: Tensor

    @property
    def count(self) -> int:
        """n, without the origin."""
        return len(self.weight)

    @property
    def norms(self) -> Tensor:
        """Distances from the origin, ``(n,)``."""
        return self.squares[-1, :-1].sqrt()

    @property
    def distances(self) -> Tensor:
        """``(n, n)``."""
        return self.squares[:-1, :-1].sqrt()

    @property
    def every(self) -> Tensor:
        """The points and the origin as combinations of themselves, ``(n + 1, n + 1)``."""
        return torch.eye(self.count + 1, dtype=torch.float64)

    def distances_to(self, row: Tensor) -> Tensor:
        """``‖x_k − v‖`` for a combination v, ``(n,)``."""
        along = self.gram @ row
        squares = self.gram.diagonal() - 2 * along + row @ along
        # What cannot be told from zero is zero.
        rounded = self.gram.diagonal() + row.abs() @ self.gram.abs() @ row.abs()
        noise = 64 * torch.finfo(torch.float64).eps * rounded
        return torch.where(squares > noise, squares, 0.0)[:-1].sqrt()

    def inner(self, one: Tensor, other: Tensor) -> Tensor:
        """``⟨u, v⟩`` of two differences of combinations."""
        return one @ self.gram @ other

    def mixed(self, rows: Tensor) -> Points:
        """As many points as rows ``(n, n + 1)``, each a combination of these; the same origin."""
        rows = torch.cat([rows, self.every[-1:]])
        images = rows @ self.gram
        gram = images @ rows.mT
        own = gram.diagonal()
        both = own.unsqueeze(-1) + own
        squares = both - 2 * gram
        # Near ones by the difference of their rows: what two points have in common is not there.
        kind: Tensor = torch.unique(rows, dim=0, return_inverse=True)[1]
        same = kind.unsqueeze(-1) == kind
        one, other = ((squares < CANCELLED * both) & ~same).triu(1).nonzero(as_tuple=True)
        step = max(1, CHUNK // len(rows))
        for start in range(0, len(one), step):
            i, j = one[start : start + step], other[start : start + step]
            squares[i, j] = ((rows[i] - rows[j]) * (images[i] - images[j])).sum(-1)
            squares[j, i] = squares[i, j]
        squares = squares.clamp_min_(0).masked_fill_(same, 0.0)
        centre = middle(squares[:-1, :-1])
        about = rows - rows[centre]
        return Points(squares, about @ self.gram @ about.mT, centre, self.weight)


def points_of(products: Tensor, squares: Tensor, weight: Tensor) -> Points:
    """The clients as points.

    Args:
        products: ``(K, K)`` inner products.
        squares: ``(K, K)`` squared distances.
        weight: ``(K,)``.
    """
    centre = middle(squares)
    norms = products.diagonal()
    products = pad(products, (0, 1, 0, 1))
    squares = pad(squares, (0, 1, 0, 1))
    squares[-1, :-1] = squares[:-1, -1] = norms
    # ⟨x_i − c, x_j − c⟩ either way, whichever rounds less: the first is off by ε of the largest
    # distance squared, the second by ε of the norms' product.
    own, size = squares[centre], pad(norms, (0, 1)).sqrt()
    by_distance = (own[:, None] + own - squares) / 2
    by_product = products - products[centre] - products[:, centre, None] + products[centre, centre]
    far = torch.maximum(own[:, None], own)
    near = far <= (size[:, None] + size[centre]) * (size + size[centre])
    gram = torch.where(near, by_distance, by_product)
    gram[centre] = gram[:, centre] = 0.0
    return Points(squares, gram, centre, weight)


def middle(squares: Tensor) -> int:
    """The point whose median squared distance to all is least."""
    return int(squares.median(-1).values.argmin())
