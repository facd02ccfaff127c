"""What the papers claim, each as comparisons of the study's runs."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.study.findings import Claim, Comparison, Runs


def across(
    metrics: Sequence[str], group: str, more: str, *less: str, case: str = ""
) -> tuple[Comparison, ...]:
    """One contender above each of others in each of some metrics."""
    return tuple(
        Comparison(metric, Runs(group, more, case), Runs(group, other, case))
        for other in less
        for metric in metrics
    )


ONE_AND_THREE = ("accuracy after round 1", "accuracy after round 3")
ONE, THREE = ((metric,) for metric in ONE_AND_THREE)
ACCURACY = ("accuracy",)
PADDED = ("zeropad", "zeropad, uniform")

CLAIMS = (
    Claim(
        "RB-LoRA is above zero-padded averages after one round.",
        "acl:2026.findings-eacl.88",
        "Dolly: .57 against .54 (weighted) and .53 (uniform); Alpaca: .54 against .51 and .52",
        across(ONE, "few", "rb", *PADDED),
        "*/few/*",
    ),
    Claim(
        "RB-LoRA is above zero-padded averages after three rounds.",
        "acl:2026.findings-eacl.88",
        "Dolly: .57 against .52 (weighted) and .51 (uniform); Alpaca: .54 against .52 and .52",
        across(THREE, "few", "rb", *PADDED),
        "*/few/*",
    ),
    Claim(
        "RB-LoRA is above stacking as its release has it, a sum that is cut, after one round and "
        "after three.",
        "acl:2026.findings-eacl.88",
        "Dolly: .57, .57 against .26, .26; Alpaca: .54, .54 against .31, .31",
        across(ONE_AND_THREE, "few", "rb", "flora, summed and cut"),
        "*/few/*",
    ),
    Claim(
        "Under flexlora the update's energy gathers in the ranks that all clients have; under "
        "raflora and rb less of it does.",
        "arXiv:2602.13486",
        "the tail falls geometrically, 1 − ρ(t) ≤ C γ^t",
        tuple(
            Comparison(metric, Runs("long", other), Runs("long", "flexlora"))
            for other in ("raflora", "rb")
            for metric in ("tail energy", "part of the first tail energy that is left")
        ),
        "*/long/*",
    ),
    Claim(
        "Clients of Fed-PLoRA start from the global model; those that take slices do not.",
        "arXiv:2602.16936",
        "initialisation noise 0",
        tuple(
            Comparison("initialisation noise", Runs("main", other), Runs("main", "plora"))
            for other in ("zeropad", "hetlora", "flexlora")
        ),
        "*/main/*",
    ),
    Claim(
        "Fed-PLoRA is above zero-padding, HetLoRA, FLoRA and FlexLoRA where clients' data differ "
        "strongly.",
        "arXiv:2602.16936",
        "in tables",
        across(ACCURACY, "skew", "plora", "zeropad", "hetlora", "flora", "flexlora", case="0.1"),
        "*/skew/0.1/*",
    ),
    Claim(
        "ILoRA (common start from the weight's own QR, variates, QR cut) trains more steadily.",
        "arXiv:2511.16069",
        "in words",
        tuple(
            Comparison("falls of accuracy", Runs("long", other), Runs("long", "ilora"))
            for other in ("zeropad", "flexlora")
        ),
        "*/long/*",
    ),
    Claim(
        "FedRot-LoRA's rotation makes the error of averaging factors smaller.",
        "arXiv:2602.23638",
        "in words",
        (
            Comparison("aggregation noise", Runs("equal", "fedit"), Runs("equal", "fedrot")),
            Comparison(
                "aggregation noise", Runs("main", "fedrot, unaligned"), Runs("main", "fedrot")
            ),
        ),
        "*/fed*",
    ),
    Claim(
        "FedRot-LoRA is above FedIT and FlexLoRA with equal ranks.",
        "arXiv:2602.23638",
        "GLUE, 10 clients: .882 against .836 and .797",
        across(ACCURACY, "equal", "fedrot", "fedit", "flexlora"),
        "*/equal/*",
    ),
    Claim(
        "FedHL's recursion, which loses nothing to truncation, keeps the tail that flexlora loses.",
        "arXiv:2505.18494",
        "in words",
        (Comparison("tail energy", Runs("long", "fedhl"), Runs("long", "flexlora")),),
        "*/long/*",
    ),
    Claim(
        "HetLoRA's self-pruning sends fewer bytes.",
        "arXiv:2401.06432",
        "in words",
        (Comparison("bytes up", Runs("prune", "hetlora", "unpruned"), Runs("main", "hetlora")),),
        "*/hetlora/*",
    ),
    Claim(
        "HetLoRA's self-pruning is more accurate.",
        "arXiv:2401.06432",
        "in a picture",
        (Comparison("accuracy", Runs("main", "hetlora"), Runs("prune", "hetlora", "unpruned")),),
        "*/hetlora/*",
    ),
    Claim(
        "FLoRA's fresh start every round makes training less steady than adapters that go on, at "
        "equal totals and with nothing cut.",
        "arXiv:2409.05976",
        "restart noise, as later papers call it",
        (
            Comparison(
                "falls of accuracy",
                Runs("equal", "flora"),
                Runs("equal", "flexlora, rest folded"),
            ),
        ),
        "*/equal/fl*",
    ),
)
"""Of the papers, in the order of their methods in docs/methods.md."""

STRONG = Runs("rescue", "the strong client alone")

RESCUE = (
    Claim(
        "Zero-padding loses what a strong client of high rank knew.",
        "arXiv:2406.17477",
        "39.0 where the client alone has 84.3",
        (Comparison("accuracy", STRONG, Runs("rescue", "zeropad")),),
        "",
    ),
    Claim(
        "Padding by replication keeps it.",
        "arXiv:2406.17477",
        "82.1 against 39.0",
        (Comparison("accuracy", Runs("rescue", "replicate"), Runs("rescue", "zeropad")),),
        "",
    ),
)
"""Of runs of one aggregation, those of docs/theory.md."""

CONSEQUENCES = (
    Claim(
        "Replication is above zero-padding after the first round where the one client of high rank "
        "is no stronger than the others.",
        "arXiv:2406.17477",
        "the paper's has data that the others lack",
        across(ONE, "ranks", "replicate", "zeropad", case="one high"),
        "*/ranks/one-high/*",
    ),
    Claim(
        "RB-LoRA is above FLoRA as published, a mean that is folded, after one round and after "
        "three.",
        "acl:2026.findings-eacl.88",
        "its stacking is a sum",
        across(ONE_AND_THREE, "few", "rb", "flora"),
        "*/few/*",
    ),
    Claim(
        "Cutting the sum by QR, as ILoRA does, loses more of it than cutting by SVD.",
        "arXiv:2511.16069",
        "the SVD is the best of its rank",
        (Comparison("aggregation noise", Runs("main", "ilora"), Runs("main", "flexlora")),),
        "*/main/*",
    ),
    Claim(
        "FedHL's weights starve clients of low rank: weights by examples are better.",
        "arXiv:2505.18494",
        "w_k ∝ 1/(e_k² + ε), and e_k = 0 where nothing is cut",
        across(ACCURACY, "main", "fedhl, by examples", "fedhl"),
        "*/main/fedhl*",
    ),
)
"""What no paper claims, and follows from what they do."""
