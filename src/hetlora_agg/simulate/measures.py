"""What a round is judged by; all of it on weights, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hetlora_agg import ClientUpdate, LowRank, diagnose
from hetlora_agg.linalg import svd_product
from hetlora_agg.simulate.federation import Results
from hetlora_agg.simulate.local import Start
from hetlora_agg.simulate.network import Network


@dataclass(frozen=True)
class Measures:
    """One round's numbers; `SimulationResult` has one entry per round of each.

    Attributes:
        aggregation_noise: distance of the total update from the exact mean of the clients' updates,
            relative to that mean.
        energy_kept: share of the squared singular values that truncation kept.
        energy_ratio: ρ, share of the total update's squared singular values in its leading
            components up to the smallest client rank; 1 for a zero update.
        effective_rank: see `effective_rank`.
        initialisation_noise: see `initialisation_noise`.
    """

    aggregation_noise: float
    energy_kept: float
    energy_ratio: float
    effective_rank: float
    initialisation_noise: float


def measure(
    updates: Mapping[str, Sequence[ClientUpdate]],
    results: Results,
    smallest_rank: int,
    initialisation_noise: float,
) -> Measures:
    """A round's numbers, over all layers, from what was sent and what came back."""
    report = diagnose(updates, results)
    spectra = [squared_singular_values(result.total()) for result in results.values()]
    energy = sum(float(squares.sum()) for squares in spectra)
    leading = sum(float(squares[:smallest_rank].sum()) for squares in spectra)
    return Measures(
        report.relative_distance,
        report.energy_kept,
        leading / energy if energy else 1.0,
        effective_rank(spectra),
        initialisation_noise,
    )


def squared_singular_values(update: LowRank) -> np.ndarray:
    """Of one layer's update, descending, `(rank,)`."""
    S = svd_product(update.B.double(), update.A.double()).S
    return np.asarray(S.square())


def effective_rank(spectra: Sequence[np.ndarray]) -> float:
    """How many components of equal size the update would have: the exponential of its entropy.

    `Σ_l E_l exp(−Σ_i p_li log p_li) / Σ_l E_l`, with `E_l = Σ_i σ_li²` a layer's energy and
    `p_li = σ_li² / E_l`; 0 for a zero update.

    Args:
        spectra: squared singular values, `(rank,)` for each layer.
    """
    energies = [float(squares.sum()) for squares in spectra]
    if not sum(energies):
        return 0.0
    counts = []
    for squares, energy in zip(spectra, energies, strict=True):
        p = squares[squares > 0] / energy if energy else np.ones(1)
        counts.append(math.exp(-float((p * np.log(p)).sum())))
    return float(np.average(counts, weights=energies))


def initialisation_noise(
    starts: Sequence[Start], weights: Sequence[float], whole: Network, pretrained: Network
) -> float:
    """How far from the global model the clients of a round start.

    `Σ_k p_k ‖W_k − W‖_F / ‖W − W_0‖_F` over all layers, `W_k` the model client k starts from, `W`
    the global one, `W_0` the pre-trained one, `p_k` the client's share of the examples; 0 where
    the global model is the pre-trained one.

    Args:
        starts: of the clients of the round.
        weights: their numbers of examples.
        whole: the global model before the round.
        pretrained: where the simulation began.
    """
    current = {name: layer.weight.double() for name, layer in whole.items()}
    moved = math.hypot(
        *(float((W - pretrained[name].weight.double()).norm()) for name, W in current.items())
    )
    if not moved:
        return 0.0
    away = [
        math.hypot(*(float((W - current[name]).norm()) for name, W in start.weights().items()))
        for start in starts
    ]
    return float(np.average(away, weights=weights)) / moved
