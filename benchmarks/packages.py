"""The alternatives that come as packages, called the way their documentation says.

Each ``prepare`` takes a `Problem` and returns a function of no arguments that is timed; bringing
the clients into the package's own form is not part of the time. Imports are inside, so that a
missing package costs its own rows only.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.peers import Triplets, stacked

Pairs = list[tuple[Tensor, Tensor]]


class Problem(NamedTuple):
    """One workload with its factors."""

    B: Tensor
    A: Tensor
    ranks: tuple[int, ...]
    rank: int

    def clients(self) -> list[tuple[Tensor, Tensor]]:
        """``B_k (layers, out, r_k)`` and ``A_k (layers, r_k, in)``, contiguous, per client."""
        pairs = zip(self.B.split(self.ranks, -1), self.A.split(self.ranks, -2), strict=True)
        return [(b.contiguous(), a.contiguous()) for b, a in pairs]


def scipy_svds(problem: Problem, tol: float = 0.0) -> Callable[[], Triplets]:
    """`scipy.sparse.linalg.svds` on a LinearOperator, layer by layer, never forming W.

    ARPACK, the default solver, in the dtype of the factors; tolerance 0, the default, is the
    machine precision of the Gram operator's eigenvalues.
    """
    from scipy.sparse.linalg import LinearOperator, svds

    def operator(b: Any, a: Any) -> LinearOperator:
        return LinearOperator(
            shape=(b.shape[0], a.shape[1]),
            dtype=b.dtype,
            matvec=lambda x: b @ (a @ x),
            rmatvec=lambda y: a.T @ (b.T @ y),
            matmat=lambda X: b @ (a @ X),
            rmatmat=lambda Y: a.T @ (b.T @ Y),
        )

    operators = [operator(b.numpy(), a.numpy()) for b, a in zip(problem.B, problem.A, strict=True)]

    def run() -> Triplets:
        found = []
        for W in operators:
            U, S, Vh = svds(W, k=problem.rank, tol=tol)
            # Smallest first, and backwards views are not tensors.
            found.append(tuple(torch.from_numpy(x.copy()) for x in (U[:, ::-1], S[::-1], Vh[::-1])))
        return stacked(found)

    return run


def sklearn_randomized(problem: Problem, n_iter: int | str = "auto") -> Callable[[], Triplets]:
    """`sklearn.utils.extmath.randomized_svd` of the dense W, layer by layer, its defaults."""
    from sklearn.utils.extmath import randomized_svd

    def run() -> Triplets:
        found = []
        for b, a in zip(problem.B, problem.A, strict=True):
            W = (b @ a).numpy()
            triplet = randomized_svd(W, problem.rank, n_iter=n_iter, random_state=0)
            found.append(tuple(torch.from_numpy(x) for x in triplet))
        return stacked(found)

    return run


class PeftMerge:
    """``add_weighted_adapter`` of a PeftModel whose linear layers carry one adapter per client.

    ``lora_alpha = r`` makes every scaling 1 and the weights are 1, so the merge is W. "svd" is
    asked for the wanted rank and for the reduced SVD (``svd_full_matrices=False``; the default
    computes the same answer from the full one, slower on layers that are not square). "cat" keeps
    rank R: lossless, and no truncation at all. PEFT returns at once if the new adapter's name is
    taken, so each call has a fresh one and `reset` deletes it.
    """

    def __init__(self, problem: Problem, combination: str) -> None:
        with warnings.catch_warnings():
            # Deprecations inside PEFT's own imports are not this benchmark's to mend.
            warnings.simplefilter("ignore")
            import peft

        out, columns, dtype = problem.B.shape[1], problem.A.shape[2], problem.B.dtype
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList(
            torch.nn.utils.skip_init(torch.nn.Linear, columns, out, bias=False, dtype=dtype)
            for _ in problem.B
        )
        configs = [
            peft.LoraConfig(r=r, lora_alpha=r, target_modules=r"layers\.\d+") for r in problem.ranks
        ]
        self.names = [f"client{k}" for k in range(len(configs))]
        self.model = peft.get_peft_model(model, configs[0], adapter_name=self.names[0])
        for name, config in zip(self.names[1:], configs[1:], strict=True):
            self.model.add_adapter(name, config)
        self.layers = list(self.model.base_model.model.layers)
        for name, (B, A) in zip(self.names, problem.clients(), strict=True):
            for layer, b, a in zip(self.layers, B, A, strict=True):
                layer.lora_B[name].weight.data = b
                layer.lora_A[name].weight.data = a
        self.options: dict[str, Any] = {"combination_type": combination}
        if combination == "svd":
            self.options |= {"svd_rank": problem.rank, "svd_full_matrices": False}
        self._numbers = itertools.count()
        self._merged: str | None = None

    def __call__(self) -> Pairs:
        """The merge; its factors, layer by layer."""
        name = self._merged = f"merged{next(self._numbers)}"
        self.model.add_weighted_adapter(self.names, [1.0] * len(self.names), name, **self.options)
        return [
            (layer.lora_B[name].weight.data, layer.lora_A[name].weight.data)
            for layer in self.layers
        ]

    def reset(self) -> None:
        """Delete what the last call has added; not part of the time."""
        if self._merged is not None:
            self.model.delete_adapter(self._merged)
            self._merged = None


def chorus_fedex(problem: Problem) -> Callable[[], Pairs]:
    """chorus-fl's FedExLoRA: the dense weighted mean of the products, SVD per layer, residual kept.

    It takes state dicts of float32 and always divides by the number of clients, so its answer is
    W / K; multiplying by K is left to whoever compares (`Contender.scale`).
    """
    from chorus.server.aggregation import FedExLoRA

    clients: list[dict[str, Tensor]] = [{} for _ in problem.ranks]
    for client, (B, A) in zip(clients, problem.clients(), strict=True):
        for i, (b, a) in enumerate(zip(B, A, strict=True)):
            client[f"layers.{i}.lora_B.weight"] = b
            client[f"layers.{i}.lora_A.weight"] = a

    def run() -> Pairs:
        found = FedExLoRA(output_rank=problem.rank).aggregate(clients)
        return [
            (found[f"layers.{i}.lora_B.weight"], found[f"layers.{i}.lora_A.weight"])
            for i in range(len(problem.B))
        ]

    return run
