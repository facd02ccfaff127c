"""The papers' claims: what their comparisons are of, how runs decide them, how they are shown."""

import dataclasses

import pytest

from benchmarks import plots_study, report_claims, report_study
from benchmarks.study import findings, runs
from benchmarks.study.claims import CLAIMS, CONSEQUENCES
from benchmarks.study.contenders import MAIN
from benchmarks.study.findings import CONTRADICTED, OPEN, REPRODUCED, Claim, Comparison, Runs
from benchmarks.study.plan import Configuration

PLAN = runs.PLANS["study"]()


def run_of(accuracy, **measures):
    constant = {"aggregation_noise": 0.1, "initialisation_noise": 0.2, "energy_kept": 0.9}
    known = {name: [value] * 3 for name, value in (constant | measures).items()}
    return {
        "accuracy": [0.5, *accuracy],
        "energy_ratio": [0.5, 0.6, 0.75],
        "bytes_up": 7,
        "bytes_down": 9,
        **known,
    }


@pytest.mark.parametrize("claim", [*CLAIMS, *CONSEQUENCES], ids=lambda claim: claim.says)
def test_every_comparison_is_of_runs_in_the_study_that_its_command_runs(claim):
    for comparison in claim.comparisons:
        for wanted in (comparison.more, comparison.less):
            places = [
                c
                for c in PLAN
                if (c.group, c.label, c.case) == (wanted.group, wanted.label, wanted.case)
            ]
            assert places, wanted
            assert all(runs._matches(f"{c.id}/{c.seeds[0]}", claim.only) for c in places)
            seeds = {(c.setting, c.data): set(c.seeds) for c in places}
            assert all(len(own) >= 5 for own in seeds.values())
        assert comparison.metric in findings.METRICS


def test_metrics_by_hand():
    run = run_of([0.6, 0.8, 0.7], energy_kept=0.25)
    found = {name: metric(run) for name, metric in findings.METRICS.items()}
    assert found == pytest.approx(
        {
            "accuracy": 0.7,
            "accuracy after round 1": 0.6,
            "accuracy after round 3": 0.7,
            "falls of accuracy": 0.05,
            "tail energy": 0.25,
            "part of the first tail energy that is left": 0.5,
            "aggregation noise": 0.1,
            "initialisation noise": 0.2,
            "bytes up": 7.0,
        }
    )


def saved(folder, accuracies, data="digits", setting="vision"):
    """A plan of one group whose runs have these accuracies by label and seed."""
    plan = []
    for label, own in accuracies.items():
        c = Configuration(setting, data, "few", label, {"rounds": 3}, seeds=tuple(own))
        runs.save(c, {seed: run_of([x] * 3) for seed, x in own.items()}, folder, {})
        plan.append(c)
    return plan


CLAIM = Claim(
    "rb is above zeropad.",
    "arXiv:0",
    ".57 against .54",
    (Comparison("accuracy", Runs("few", "rb"), Runs("few", "zeropad")),),
    "*/few/*",
)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ((0.1, 0.2, 0.15, 0.12, 0.18), REPRODUCED),
        ((-0.1, -0.2, -0.15, -0.12, -0.18), CONTRADICTED),
        ((0.1, -0.2, 0.15, -0.12, 0.1), OPEN),
        ((0.0,) * 5, OPEN),
    ],
)
def test_an_interval_on_one_side_decides(gains, expected, tmp_path):
    theirs = {seed: 0.5 + seed / 100 for seed in range(len(gains))}
    # A seed of one side only is no pair.
    ours = {**{seed: theirs[seed] + gain for seed, gain in enumerate(gains)}, 9: 1.0}
    plan = saved(tmp_path, {"rb": ours, "zeropad": theirs})
    ((place, pairs),) = findings.findings(CLAIM, plan, tmp_path).items()
    assert place == ("vision", "digits")
    ((comparison, found),) = pairs
    assert comparison is CLAIM.comparisons[0]
    assert (found.seeds, found.verdict) == (len(gains), expected)
    assert found.difference.mean == pytest.approx(sum(gains) / len(gains))
    assert found.more - found.less == pytest.approx(found.difference.mean)


def finding(mean):
    return findings.Finding(5, findings.Interval(mean, mean - 0.1, mean + 0.1), 0.0, 0.0)


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((1, 1), REPRODUCED),
        ((1, 0), "reproduced 1, not at this scale 1 of 2"),
        ((0, 0), OPEN),
        ((1, -1, 1), "reproduced 2, contradicted 1 of 3"),
        ((0, -1), "not at this scale 1, contradicted 1 of 2"),
        ((-1, -1), CONTRADICTED),
    ],
)
def test_several_comparisons_are_one_verdict(means, expected):
    assert findings.verdict([finding(mean) for mean in means]) == expected


def test_the_table_shows_every_claim_and_every_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(report_claims, "CLAIMS", (CLAIM, CLAIMS[3]))
    monkeypatch.setattr(report_claims, "RESCUE", ())
    better, worse = ({s: x + s / 1000 for s in range(5)} for x in (0.8, 0.6))
    plan = saved(tmp_path, {"rb": better, "zeropad": worse})
    plan += saved(tmp_path, {"rb": worse, "zeropad": better}, "vader_corpora", "text")
    first, second = report_claims.study_claims(tmp_path, plan).splitlines()[2:]
    assert (
        "| .57 against .54 | digits: accuracy, `rb` − `zeropad`: +20 (+20 to +20), "
        "80.2 against 60.2, 5<br>" in first
    )
    assert "digits: **reproduced**; text, 4 corpora: **contradicted**" in first
    assert "| `python -m benchmarks.study.runs --only '*/few/*'` |" in first
    assert "| not run | – |" in second
    alone = report_claims.study_claims(tmp_path, plan[:2]).splitlines()[2]
    assert "| **reproduced** |" in alone


def test_the_table_says_where_comparisons_were_not_run(tmp_path, monkeypatch):
    both = (Comparison("accuracy", Runs("few", "rb"), Runs("few", m)) for m in ("zeropad", "flora"))
    claim = dataclasses.replace(CLAIM, comparisons=tuple(both))
    monkeypatch.setattr(report_claims, "CLAIMS", (claim,))
    monkeypatch.setattr(report_claims, "RESCUE", ())
    better, worse = ({s: x + s / 1000 for s in range(5)} for x in (0.8, 0.6))
    plan = saved(tmp_path, {"rb": better, "zeropad": worse})
    (row,) = report_claims.study_claims(tmp_path, plan).splitlines()[2:]
    assert "| **reproduced** (of 1; the others were not run) |" in row


def test_the_rescue_is_read_from_runs_of_one_aggregation(monkeypatch):
    after = {"zeropad": 0.5, "replicate": 0.8}
    one = [{"strong": 0.9 + s / 100, "after": {**after, "zeropad": s / 10}} for s in range(6)]
    monkeypatch.setattr(report_claims, "load", lambda _: {"results": {"rescue": {"runs": one}}})
    monkeypatch.setattr(report_claims, "CLAIMS", ())
    fall, kept = cells(report_claims.study_claims())
    assert "`the strong client alone` − `zeropad`: +67.5 (" in fall[2]
    assert "80 against 25, 6" in kept[2]
    assert fall[3:] == ["**reproduced**", "`python -m benchmarks.bench_theory`"]


def test_what_nobody_claimed_holds_or_does_not(tmp_path, monkeypatch):
    other = dataclasses.replace(CLAIM, comparisons=(Comparison("accuracy", *CLAIM_TURNED),))
    monkeypatch.setattr(report_claims, "CONSEQUENCES", (CLAIM, other))
    better, worse = ({s: x + s / 1000 for s in range(5)} for x in (0.8, 0.6))
    plan = saved(tmp_path, {"rb": better, "zeropad": worse})
    first, second = cells(report_claims.study_consequences(tmp_path, plan))
    assert (first[3], second[3]) == ("**holds**", "**does not hold**")


CLAIM_TURNED = (CLAIM.comparisons[0].less, CLAIM.comparisons[0].more)


def test_nothing_is_said_of_too_few_seeds(tmp_path):
    plan = saved(
        tmp_path, {"rb": dict.fromkeys(range(4), 0.8), "zeropad": dict.fromkeys(range(4), 0.6)}
    )
    assert findings.findings(CLAIM, plan, tmp_path) == {}


# ---- the other tables ----------------------------------------------------------------------------


def kept(folder, group, case, accuracies, data="digits"):
    """Six seeds of each label; from seed to seed accuracies differ by a thousandth."""
    plan = []
    for label, accuracy in accuracies.items():
        c = Configuration("vision", data, group, label, {"rounds": 3}, case=case, seeds=SIX)
        rest = {"server_seconds": 0.1, "bytes_down": 9}
        own = {s: run_of([accuracy + s / 1000] * 3) | rest for s in SIX}
        runs.save(c, own, folder, {})
        plan.append(c)
    return plan


SIX = tuple(range(6))


def cells(table):
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def test_factors_are_differences_from_the_usual(tmp_path):
    plan = kept(tmp_path, "main", "", {"rb": 0.7, "zeropad": 0.6})
    plan += kept(tmp_path, "skew", "0.1", {"rb": 0.5})
    found = {row[0]: row[1:] for row in cells(report_study.study_factors("digits", tmp_path, plan))}
    skew = dict(zip(report_study.MAIN, found["skew: Dirichlet 0.1"], strict=True))
    assert skew.pop("rb") == "**-20.0** (-20.0 to -20.0)"
    assert set(skew.values()) == {"–"}
    assert set(found["skew: Dirichlet 1"]) == {"–"}
    assert [*found] == [*report_study.FACTORS]


def test_rotations_are_compared_with_equal_ranks(tmp_path):
    plan = kept(tmp_path, "main", "", {"flexlora": 0.2}) + kept(
        tmp_path, "equal", "", {"flexlora": 0.6}
    )
    plan += kept(tmp_path, "align", "rotation", {"flexlora": 0.7})
    found = report_study.changes("digits", tmp_path, plan)
    assert found.pop("the same by rotations, all of rank 8")["flexlora"].mean == pytest.approx(10)
    assert not any(found.values())


def test_every_factor_is_a_case_of_the_plan():
    there = {(c.group, c.case) for c in PLAN if c.data == "digits"}
    assert set(report_study.FACTORS.values()) <= there
    varied = {(c.group, c.case) for c in PLAN if c.data == "digits" and c.case}
    assert varied - set(report_study.FACTORS.values()) == {
        ("prune", "unpruned"),
        ("combine", "restarting"),
    }


OTHERS = dict.fromkeys(MAIN, 0.3)


def test_the_best_and_who_cannot_be_told_from_it(tmp_path):
    plan = kept(tmp_path, "main", "", OTHERS | {"rb": 0.7, "zeropad": 0.2, "flora": 0.7})
    plan += kept(tmp_path, "main", "", {"fedex": 0.9})
    plan += kept(tmp_path, "long", "", {"rb": 0.7, "zeropad": 0.6})
    ((setting, best, level, last),) = cells(report_study.study_best(tmp_path, plan))
    assert (setting, last) == ("digits, main", "`zeropad` 20.2")
    assert {best, level} == {"`rb` 70.2", "`flora` 70.2"}


def test_every_method_is_shown_at_its_best_rate(tmp_path):
    plan = kept(tmp_path, "main", "", {"rb": 0.7, "zeropad": 0.6})
    plan += kept(tmp_path, "rate", "0.005", {"rb": 0.5, "zeropad": 0.65})
    plan += kept(tmp_path, "rate", "0.02", {"rb": 0.65, "zeropad": 0.8, "flora": 0.9})
    assert [row[0] for row in cells(report_study.study_rates("digits", tmp_path, plan))] == [
        "`zeropad`",
        "`rb`",
    ]
    zeropad, rb = cells(report_study.study_rates("digits", tmp_path, plan))
    assert [round(float(x)) for x in zeropad[1:]] == [65, 60, 80, 80]
    assert [round(float(x)) for x in rb[1:]] == [50, 70, 65, 70]


def test_combinations_are_held_against_the_best_registered_method(tmp_path):
    plan = kept(tmp_path, "main", "", {"zeropad": 0.9})
    plan += kept(tmp_path, "combine", "", {"rb": 0.7, "fedex": 0.8, "rb, floor 0.3": 0.85})
    plan += kept(tmp_path, "combine", "restarting", {"rb": 0.75})
    first, second = cells(report_study.study_combinations(tmp_path, plan))
    assert (first[0], first[1].split()[0]) == ("digits", "`fedex`")
    assert first[2:5] == ["`rb, floor 0.3`", "+5.0 (+5.0 to +5.0)", "0.062"]
    assert second[2:4] == ["`rb, restarting`", "-5.0 (-5.0 to -5.0)"]


def test_every_table_can_be_made_of_nothing(tmp_path, monkeypatch):
    for name, table in {**report_study.TABLES, **report_claims.TABLES}.items():
        assert "| --- |" in table(folder=tmp_path), name


def test_methods_of_one_data_set(tmp_path):
    plan = kept(tmp_path, "main", "", {"rb": 0.7, "zeropad": 0.6})
    plan += kept(tmp_path, "main", "", {"rb": 0.2}, "mnist_5k")
    first, second = cells(report_study.study_methods("digits", tmp_path, plan))
    assert (first[0], second[0]) == ("`rb`", "`zeropad`")
    assert first[5] == "**+10.0** (+10.0 to +10.0)"


def test_size_counts_runs_and_their_minutes(tmp_path):
    plan = kept(tmp_path, "main", "", {"rb": 0.7, "zeropad": 0.6})
    plan += kept(tmp_path, "main", "", {"rb": 0.2}, "mnist_5k")
    for c in plan:
        taken = {seed: {**r, "seconds": 90.0} for seed, r in runs.load(c, tmp_path).items()}
        runs.save(c, taken, tmp_path, {})
    plan[0] = dataclasses.replace(plan[0], seeds=tuple(range(10)))
    found = {row[0]: row[1:] for row in cells(report_study.study_size(tmp_path, plan))}
    assert found["digits"] == ["2", "16", "12", "18", "50.0"]
    assert found["MNIST"] == ["1", "6", "6", "9", "50.0"]
    assert found["together"] == ["3", "22", "18", "27", "–"]


def test_pictures_have_a_panel_for_each_data_set_and_method(tmp_path):
    plan = kept(tmp_path, "main", "", {"rb": 0.7, "zeropad": 0.6, "fedex": 0.8})
    plan += kept(tmp_path, "main", "", {"rb": 0.2, "flexlora": 0.3}, "mnist_5k")
    plan += kept(tmp_path, "skew", "0.1", {"rb": 0.5})
    tables = {data: plots_study.usual(data, tmp_path, plan) for data in ("digits", "mnist_5k")}
    first, second = plots_study.draw_rounds(tables).axes
    assert [line.get_label() for line in first.lines] == ["zeropad", "rb"]
    assert first.lines[1].get_ydata()[-1] == pytest.approx(70.25)
    assert [line.get_label() for line in second.lines] == ["flexlora", "rb"]
    first, second = plots_study.draw_differences(tables).axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["zeropad", "rb", "fedex"]
    assert {round(float(line.get_xdata()[0])) for line in first.lines if len(line.get_xdata())} == {
        0, 10, 20,
    }  # fmt: skip
    panels = plots_study.draw_factors(plan, tmp_path).axes
    assert [axes.get_title() for axes in panels] == list(report_study.MAIN)
    drawn = {axes.get_title(): len(axes.lines) - 1 for axes in panels}
    assert drawn.pop("rb") == 2
    assert set(drawn.values()) == {0}


def test_the_picture_of_settings_says_how_far_each_is_behind_and_frames_the_first(tmp_path):
    plan = kept(tmp_path, "main", "", OTHERS | {"rb": 0.7, "zeropad": 0.6, "flora": 0.7})
    plan += kept(tmp_path, "skew", "0.1", OTHERS | {"rb": 0.5, "zeropad": 0.75})
    standings = [*report_study.standings(tmp_path, plan)]
    assert [(s.setting, [*s.mean][:2], s.level) for s in standings] == [
        ("digits, main", ["flora", "rb"], frozenset({"rb"})),
        ("digits, skew, 0.1", ["zeropad", "rb"], frozenset()),
    ]
    (axes,) = plots_study.draw_settings(standings).axes
    said = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(said) == 2 * len(MAIN)
    rb, zeropad, flora = (MAIN.index(m) for m in ("rb", "zeropad", "flora"))
    assert [said[m, 0] for m in (rb, zeropad, flora)] == ["0.0", "10.0", "0.0"]
    assert [said[m, 1] for m in (rb, zeropad, flora)] == ["25.0", "0.0", "45.0"]
    framed = {(round(p.get_x() + 0.46), round(p.get_y() + 0.42)) for p in axes.patches}
    assert framed == {(rb, 0), (flora, 0), (zeropad, 1)}


def test_tails_are_drawn_for_methods_whose_adapters_go_on(tmp_path):
    plan = kept(tmp_path, "long", "", {"rb": 0.7, "flexlora": 0.6})
    (axes,) = plots_study.draw_tails(plan, tmp_path).axes
    assert [line.get_label() for line in axes.lines] == ["flexlora", "rb"]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([0.5, 0.4, 0.25])
