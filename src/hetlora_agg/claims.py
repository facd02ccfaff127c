"""The vocabulary of what is said of methods: claims, departures from them, clients, state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

CLAIMS: Mapping[str, str] = MappingProxyType(
    {
        "mixed_ranks": "clients of different ranks are taken",
        "exact": "the total equals the weighted mean of the updates, Σ p_k ΔW_k",
        "consensus": "if all owners of a slot send one component, the result has that component",
        "statistical": "unbiased for the mean component under any zero-mean component noise",
        "statistical_uncorrelated": "the same, when the noises of A and B are uncorrelated",
        "cohort": "over all cohorts of m of K clients, weights n_k K / m under the denominators of "
        "all clients give the whole in expectation (Horvitz-Thompson)",
        "cohort_equal": "at equal weights the mean over all cohorts that leave no slot empty is "
        "the whole",
        "cohort_ratio": "the bias of a cohort's result R is −Cov(R, D) / E[D], D its weight",
        "slot_ratio": "the same slot by slot, D the weight of the slot's owners that take part",
        "bounded_share": "against clients that send zeros nobody moves the result by more than "
        "p_k ‖ΔW_k‖",
        "order": "the order of the clients does not matter",
        "split_client": "a client split into two of half its weight changes nothing",
        "rescaling": "multiplying all weights by one number changes nothing",
        "homogeneous": "c times every B gives c times the result",
        "orthogonal": "rotating inputs and outputs rotates the result",
        "transpose": "swapping the roles of A and B transposes the result",
        "single_client": "one client alone gets its own update back",
        "absent": "a client of weight 0 changes nothing, whatever its rank",
        "layers": "layers stacked on a leading dimension give each its own result",
        "gauge": "B_k G, G⁻¹ A_k instead of B_k, A_k changes nothing",
        "component_scale": "b_j d_j, a_j / d_j instead of b_j, a_j changes nothing, d_j ≠ 0",
        "component_order": "another order of a client's components changes nothing",
        "zero_component": "an appended zero component changes nothing",
        "idle_kept": "a round in which nobody trains keeps every singular value",
        "idle_coverage": "an idle round multiplies singular value j by q_j = N_j / N",
        "idle_coverage_squared": "an idle round multiplies singular value j by q_j²",
    }
)
"""The vocabulary of claims; ``hetlora_agg.testing`` holds one theorem for each."""

SYMMETRIC: dict[str, dict[str, Any]] = {
    "order": {},
    "rescaling": {},
    "homogeneous": {},
    "orthogonal": {},
    "transpose": {},
    "single_client": {},
    "absent": {},
    "layers": {},
}
"""The symmetries that nearly every method has; its own claims are added with ``|``."""

GAUGE_FREE: dict[str, dict[str, Any]] = {"gauge": {}, "component_scale": {}, "component_order": {}}
"""What a method has that depends on the products B_k A_k alone, not on their factors."""

ESTIMATES = ("exact", "consensus", "statistical", "statistical_uncorrelated")
COHORTS = ("cohort", "cohort_equal", "cohort_ratio", "slot_ratio")
GAUGE = tuple(GAUGE_FREE)
IDLE = ("idle_kept", "idle_coverage", "idle_coverage_squared")

STACKED = (*ESTIMATES[1:], "slot_ratio", "idle_kept", "idle_coverage_squared")
TRUNCATED = ("exact", "cohort", "cohort_equal", "cohort_ratio", "zero_component")
ZERO_PADDED = (*ESTIMATES, *COHORTS, *GAUGE, "idle_kept", "idle_coverage")
OWNER_AVERAGED = ("exact", "statistical", *COHORTS, "bounded_share", "zero_component", *IDLE[1:])
ENTRYWISE = (*ESTIMATES, *COHORTS, "bounded_share", "zero_component")
"""Claims that fail together, by kind and by family: for ``fails=dict.fromkeys(…, departure)``."""

DEPARTURES: Mapping[str, str] = MappingProxyType(
    {
        "stack": "Σ_k p_k ΔW_k: of a component that all owners send, q_j is left",
        "cut stack": "[Σ_k p_k ΔW_k]_r, the best rank r of it; r = max r_k",
        "sketch": "[Q Qᵀ Σ_k p_k ΔW_k]_r, Q an orthonormal basis of Σ_k p_k ΔW_k Ω",
        "agreed rows": "Σ_k p_k ΔW_k V Vᵀ, V the top r eigenvectors of the mean projection onto "
        "the row spaces",
        "leading columns": "Q Qᵀ Σ_k p_k ΔW_k, Q an orthonormal basis of its first r columns",
        "factor means": "Σ_k p_k ΔW_k − ½ Σ_kl p_k p_l (B_k − B_l)(A_k − A_l), zero-padded: of "
        "agreeing components q_j² is left",
        "norm-weighted factor means": "the factor means with w_k = ‖ΔW_k‖ / Σ ‖ΔW‖ for p_k",
        "one mass for all layers": "the layer's own rule with masses that are taken over all "
        "layers together",
        "corrected factor means": "(B̄ + ΔB) Ā, ΔB the ridge regression of Σ_k p_k ΔW_k − B̄ Ā on Ā",
        "owner means": "Σ_j Σ_{k∈S_j} γ_k b_k a_k, γ_k = n_k / N_j: a lone owner has γ = 1",
        "cut owner means": "[Σ_j Σ_{k∈S_j} γ_k b_k a_k]_r, the best rank r of the owner means; "
        "r the number of slots",
        "owner factor means": "Σ_j (Σ_k γ_k b_k a_k − ½ Σ_kl γ_k γ_l (b_k − b_l)(a_k − a_l)), "
        "k, l ∈ S_j, γ_k = n_k / N_j",
        "as-sent owner factor means": "the owner factor means with A as sent and s_k whole in b_k",
        "equal owner factor means": "the owner factor means with one γ_k for all owners",
        "padded factor means": "the owner factor means with γ_k = p_k + (1 − q_j) d_k over all "
        "owners, d_k the share among the clients of the largest rank",
        "equal means": "[Σ_k ΔW_k / K]_r: shares are equal while no truncation is known",
        "steps from truncations": "[ΔW + Σ_k w_k (ΔW_k − ΔW^{(r_k)})]_r, w_k ∝ 1 / (e_k² + ε)",
        "doubled mass": "2 m_k / (M + m_k) in place of m_k / M: a mass that is not the weight "
        "counts twice",
        "entrywise median": "[U median_k(X_k) Vᵀ]_r, every client of one vote",
        "entrywise trimmed mean": "[U mean of X_k between the extremes Vᵀ]_r, every client of one "
        "vote",
        "elected signs": "[U X Vᵀ]_r, X the mean of the X_k kept that have the sign of Σ_k p_k X_k",
        "random masks": "[U Σ_k p_k m_k ∘ X_k / (1 − drop) Vᵀ]_r for one draw of the masks m_k",
        "own total": "Σ_k n_k ΔW_k / D over a cohort, D its own weight; its mean over cohorts is "
        "ΔW − Cov(·, D) / E[D]",
        "refusal": "an error that says what to do instead",
    }
)
"""What a method computes where a claim is false: name -> formula."""

INAPPLICABLE: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "common": ("a factor is one and the same on all clients", ("transpose", *GAUGE)),
        "restart": ("clients start anew every round, so that none is idle", IDLE),
        "equal ranks": ("equal ranks only: every client owns every slot", IDLE[1:]),
    }
)
"""Kind of method -> why claims cannot be tried on it, and which."""


CLIENTS: Mapping[str, str] = MappingProxyType(
    {
        "slice": "trains the leading components that `distribute` hands out at its rank",
        "restart": "trains a fresh adapter on a base weight that took the whole update "
        "(`clients.merge_and_restart`)",
        "prune": "trains the leading components, its tail penalised, and lowers its rank where the "
        "tail fades (`clients.tail_penalty`, `clients.prune`)",
        "select": "trains a random choice of the slots, the others folded into its base weight "
        "(`clients.select_and_fold`)",
        "freeze": "holds every slot, trains the most important ones and uploads them quantised "
        "(`clients.important_slots`, `clients.quantise`)",
        "qr_start": "starts from the QR decomposition of its base weight and corrects its "
        "gradients (`clients.qr_start`, `clients.corrected`)",
        "train_B": "trains B; A is common to all clients and frozen",
        "alternate": "trains B in odd rounds and A in even ones, the other factor frozen",
        "keep_B": "takes the global A and goes on with its own B (`clients.continue_from`)",
    }
)
"""What a client does between two rounds; every method names one."""

SUMS: Mapping[str, str] = MappingProxyType(
    {
        "factors": "A and B, or the one of them that is not frozen (`secure.linear_message`)",
        "sketches": "two sketches of the mean of the updates (`secure.linear_message`)",
        "products": "the total update before truncation, but neither factor",
    }
)
"""What of a result is a sum of one term per client once all ranks, weights and slots are public."""

STATE: Mapping[str, str] = MappingProxyType(
    {
        "previous": "the last global factors (`previous=`)",
        "initial": "what the clients started from, in the first round (`initial=`)",
        "round": "the number of the round (`round=`)",
        "levels": "the configured ranks (`levels=`)",
        "generator": "a random generator (`generator=`)",
    }
)
"""Options that carry something from round to round: what the server keeps for them."""


@dataclass(frozen=True)
class Cell:
    """What is known of one claim of one method.

    Attributes:
        verdict: "holds", "fails", "not applicable", or "not stated" where nobody said.
        options: the options under which it holds; ``{}`` for the defaults.
        departure: a name from ``DEPARTURES``: what is computed instead, or under the defaults
            where the claim holds under other options only.
        reason: why the claim cannot be tried.
    """

    verdict: Literal["holds", "fails", "not applicable", "not stated"]
    options: Mapping[str, Any] = field(default_factory=dict)
    departure: str | None = None
    reason: str | None = None

    @property
    def formula(self) -> str | None:
        """What is computed instead."""
        return None if self.departure is None else DEPARTURES[self.departure]
