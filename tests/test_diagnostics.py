"""diagnose and compare against dense computations, and what they look like."""

import json
import math

import numpy as np
import pytest
import torch

from hetlora_agg import (
    METHODS,
    AggregationResult,
    ClientUpdate,
    InputTypeError,
    InputValueError,
    LowRank,
    aggregate,
    aggregate_layers,
    compare,
    diagnose,
)
from hetlora_agg.reports import html_table, text_table

F64 = torch.float64


def clients(layers=(), dtype=F64, seed=0, ranks=(2, 4, 3), size=(9, 7)):
    g = torch.Generator().manual_seed(seed)
    out, columns = size
    return [
        ClientUpdate(
            torch.randn(*layers, r, columns, generator=g, dtype=F64).to(dtype),
            torch.randn(*layers, out, r, generator=g, dtype=F64).to(dtype),
            weight=n,
            scaling=s,
            id=f"c{k}",
        )
        for k, (r, n, s) in enumerate(zip(ranks, (1, 2, 5), (1.0, 2.0, 0.5), strict=True))
    ]


def updates_dense(given):
    return [u.scaling * (u.B.double() @ u.A.double()) for u in given]


def mean_dense(given):
    whole = sum(u.weight for u in given)
    return sum(u.weight / whole * W for u, W in zip(given, updates_dense(given), strict=True))


@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize("method", ["rb", "zeropad", "flora", "fedex", "flexlora"])
def test_every_number_equals_the_dense_one(method, layers):
    given = clients(layers)
    result = aggregate(given, method)
    report = diagnose(given, result)
    total, mean = result.total().dense(), mean_dense(given)
    expected = float((total - mean).norm() / mean.norm())
    assert report.relative_distance == pytest.approx(expected, rel=1e-9, abs=1e-13)
    norms = [float(W.norm()) for W in updates_dense(given)]
    assert report.client_norms == pytest.approx(norms, rel=1e-12)
    cosines = [float((W * total).sum() / (W.norm() * total.norm())) for W in updates_dense(given)]
    assert report.client_cosines == pytest.approx(cosines, abs=1e-12)
    assert report.client_shares == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    S = torch.tensor(report.singular_values)
    dense = torch.linalg.svdvals(result.factors.dense() if S.dim() == 1 else total)
    if method in ("rb", "zeropad", "flexlora"):
        assert torch.allclose(S.double(), dense[..., : S.shape[-1]], atol=1e-12)


def test_energy_kept_is_the_kept_part_of_the_squares():
    given = clients()
    report = diagnose(given, aggregate(given, "flexlora", rank=2))
    S = torch.linalg.svdvals(mean_dense(given)).square()
    assert report.energy_kept == pytest.approx(float(S[:2].sum() / S.sum()), rel=1e-12)
    assert diagnose(given, aggregate(given, "zeropad")).energy_kept == 1.0
    folded = aggregate(given, "flexlora", rank=2, fold_rest=True)
    assert diagnose(given, folded).energy_kept == 1.0


def test_exact_methods_show_the_rounding_of_their_dtype():
    # The mean is taken in float64 from the updates, not by the method's own arithmetic.
    given = clients(dtype=torch.float32)
    distance = diagnose(given, aggregate(given, "flora")).relative_distance
    assert 1e-10 < distance < 1e-6
    assert diagnose(clients(), aggregate(clients(), "flora")).relative_distance < 1e-14


def test_a_zero_mean_has_no_scale():
    A, B = torch.ones(1, 3), torch.ones(2, 1)
    opposite = [(A, B), (A, -B)]
    assert diagnose(opposite, aggregate(opposite, "flora")).relative_distance == 0.0
    flipped = [(A, B), (-A, B)]
    result = AggregationResult(LowRank(A, B))
    assert diagnose(flipped, result).relative_distance == math.inf
    zero = [(A, 0 * B)]
    report = diagnose(zero, aggregate(zero, "rb"))
    assert report.client_cosines == [0.0]
    assert report.energy_kept == 1.0


def test_layers_together_and_apart():
    model = {"q": clients(seed=1), "v": clients(seed=2, size=(5, 7))}
    results = aggregate_layers(model, "zeropad")
    report = diagnose(model, results)
    apart = {name: diagnose(model[name], results[name]) for name in model}
    distance = math.hypot(*(r.layers[0].distance for r in apart.values()))
    norm = math.hypot(*(r.layers[0].mean_norm for r in apart.values()))
    assert report.relative_distance == pytest.approx(distance / norm)
    assert [layer.layer for layer in report.layers] == ["q", "v"]
    assert set(report.client_norms) == {"q", "v"}
    assert report.client_norms["q"] == apart["q"].client_norms
    assert "2 layers" in repr(report)


def test_excluded_clients_are_left_out_of_the_mean():
    given = clients()
    broken = [
        *given,
        ClientUpdate(torch.full((1, 7), math.nan).double(), given[0].B[:, :1], id="x"),
    ]
    result = aggregate(broken, "flora", on_bad_client="drop")
    assert diagnose(broken, result).relative_distance < 1e-14
    with pytest.raises(InputValueError, match=r"NaN or Inf.*not made from these updates"):
        diagnose(broken, aggregate(given, "flora"))


def test_numpy_results_are_diagnosed():
    given = [ClientUpdate(u.A.numpy(), u.B.numpy(), None, u.weight) for u in clients()]
    report = diagnose(given, aggregate(given, "flexlora", rank=2))
    assert 0 < report.relative_distance < 1
    assert 0 < report.energy_kept < 1


def test_a_report_is_one_line_a_table_and_json():
    given = clients()
    report = diagnose(given, aggregate(given, "rb"))
    assert "\n" not in repr(report)
    assert repr(report).startswith("Report(1 layer, rank 4, ")
    text = report.summary()
    for word in ("client ranks", "2,4,3", "c0", "cosine to result"):
        assert word in text
    html = report._repr_html_()
    assert html.count("<table>") == 2
    assert "<td>c1</td>" in html
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"][0]["clients"] == ["c0", "c1", "c2"]
    assert data["relative_distance"] == report.relative_distance
    assert len(data["layers"][0]["client_norms"]) == 3


def test_html_is_escaped_and_many_ranks_are_a_range():
    assert "&lt;b&gt;" in html_table(["x"], [["<b>"]])
    assert text_table(["name", "n"], [["long name", "1"]]).splitlines()[2] == "long name  1"
    many = [(torch.ones(1 + k % 3, 4), torch.ones(4, 1 + k % 3)) for k in range(9)]
    assert "1–3 (9 clients)" in diagnose(many, aggregate(many)).summary()


def test_ids_of_any_kind_reach_json():
    given = [ClientUpdate(torch.ones(1, 3), torch.ones(2, 1), id=("site", k)) for k in range(2)]
    report = diagnose(given, aggregate(given))
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["clients"][0] == "('site', 0)"


def test_what_does_not_belong_together_is_refused():
    given = clients()
    result = aggregate(given)
    with pytest.raises(InputTypeError, match="mappings of updates and results"):
        diagnose({"q": given}, result)
    with pytest.raises(InputValueError, match=r"in one of updates and result only: \['v'\]"):
        diagnose({"q": given}, {"q": result, "v": result})
    with pytest.raises(InputTypeError, match="expected an AggregationResult, got LowRank"):
        diagnose(given, result.factors)
    with pytest.raises(InputValueError, match=r"shape \(9, 7\), the updates \(5, 7\)"):
        diagnose(clients(size=(5, 7)), result)


def test_compare_runs_every_method_and_says_why_one_is_skipped():
    comparison = compare(clients())
    rows = {row.method: row for row in comparison.rows}
    assert set(rows) == set(METHODS)
    assert "expected clients of equal rank" in rows["fedit"].skipped
    assert "expected one lora_A on all clients" in rows["ffa"].skipped
    assert rows["fedrot"].skipped == "needs previous=, round="
    skipped = {name for name, row in rows.items() if row.skipped is not None}
    assert skipped >= {name for name, entry in METHODS.items() if entry.needs}
    assert skipped <= {n for n, e in METHODS.items() if e.needs or e.common} | {"fedit"}
    for name, row in rows.items():
        if name not in skipped:
            alone = diagnose(clients(), aggregate(clients(), name))
            assert row.relative_distance == alone.relative_distance
            assert row.energy_kept == alone.energy_kept
            assert row.seconds > 0
    assert not rows["flora"].nested
    assert rows["rb"].nested


def test_compare_hands_each_option_to_those_that_have_it():
    rows = {row.method: row for row in compare(clients(), ["rb", "flora"], rank=1).rows}
    assert rows["rb"].rank == 1
    assert rows["flora"].rank == 9
    with pytest.raises(InputTypeError, match="unknown option of any of these methods 'rnk'"):
        compare(clients(), ["rb", "flora"], rnk=1)


def test_compare_skips_methods_that_need_state():
    def needy(c, *, state):
        return LowRank(c.A, state * c.B)

    skipped, given = (
        compare(clients(), [needy]).rows[0],
        compare(clients(), [needy], state=2.0).rows[0],
    )
    assert skipped.skipped == "needs state="
    assert given.skipped is None
    assert given.rank == 9


def test_compare_takes_layers_generators_and_callables():
    def halved(c):
        return LowRank(c.A, c.B / 2)

    model = {"q": clients(seed=1), "v": clients(seed=2)}
    assert [row.method for row in compare(model, [halved, "rb"]).rows] == ["halved", "rb"]
    from_generator = compare((u for u in clients()), ["rb", "flora"])
    assert [row.skipped for row in from_generator.rows] == [None, None]
    with pytest.raises(InputValueError, match="no client updates"):
        compare([])


def test_a_comparison_is_one_line_a_table_and_json():
    comparison = compare(clients(), ["rb", "fedit", "flora"])
    assert "\n" not in repr(comparison)
    assert "1 skipped" in repr(comparison)
    assert "fedit: skipped" in comparison.summary()
    html = comparison._repr_html_()
    assert "<td>rb</td>" in html
    assert "<code>fedit</code> skipped" in html
    data = json.loads(json.dumps(comparison.to_dict()))
    assert data["fedit"]["relative_distance"] is None
    assert data["rb"]["rank"] == 4
    assert np.isfinite(data["flora"]["seconds"])


@pytest.mark.parametrize("missing", ["zero", "renormalise"])
def test_the_policy_for_missing_layers_reaches_diagnose_and_compare(missing):
    model = {"q": clients(seed=1), "v": clients(seed=2)[:2]}
    results = aggregate_layers(model, "flora", missing=missing)
    assert diagnose(model, results, missing=missing).relative_distance < 1e-14
    other = {"zero": "renormalise", "renormalise": "zero"}[missing]
    assert diagnose(model, results, missing=other).relative_distance > 0.1
    with pytest.raises(InputValueError, match="client 'c2' sent other layers but not this one"):
        diagnose(model, results)
    rows = {row.method: row for row in compare(model, missing=missing).rows}
    assert rows["flora"].relative_distance < 1e-14
    assert rows["rb"].skipped is None
    with pytest.raises(InputValueError, match="client 'c2' sent other layers but not this one"):
        compare(model)


def test_compare_drops_bad_clients_on_request():
    broken = [*clients(), ClientUpdate(torch.full((1, 7), math.nan), torch.ones(9, 1), id="x")]
    rows = compare(broken, ["flora", "rb"], on_bad_client="drop").rows
    assert [row.skipped for row in rows] == [None, None]
    with pytest.raises(InputValueError, match=r"client 3 \(id 'x'\), lora_A: 7 NaN or Inf"):
        compare(broken)


def test_compare_raises_on_an_option_that_is_wrong_for_anybody():
    for options in ({"rank": 0}, {"energy": 2.0}, {"split": "lft"}):
        with pytest.raises(InputValueError, match=f"{next(iter(options))}="):
            compare(clients(), ["rb", "flora"], **options)
    assert compare(clients(), "rb").rows[0].method == "rb"


def test_a_report_says_that_distance_is_no_quality():
    assert "on purpose" in diagnose(clients(), aggregate(clients())).summary()
    assert "on purpose" in compare(clients(), ["rb"]).summary()
    model = {"q": clients(seed=1), "v": clients(seed=2)}
    report = diagnose(model, aggregate_layers(model, "rb"))
    assert "all layers" in report.summary()
    assert repr(report.layers[0]).startswith("LayerReport(q, rank 4, ")


def test_a_client_whose_update_cancels_has_norm_and_cosine_zero():
    A = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    given = [(A, torch.tensor([[1.0, -1.0], [2.0, -2.0]])), (torch.eye(2), torch.eye(2))]
    report = diagnose(given, aggregate(given, "flora"))
    assert report.client_norms[0] == report.client_cosines[0] == 0.0
    assert compare(given, "flora").rows[0].skipped is None
