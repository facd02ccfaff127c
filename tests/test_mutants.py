"""The mutation tests' record: what it counts, and that its functions are those of the source."""

import ast
import json
from pathlib import Path

import pytest

from benchmarks import bench_mutants, report_mutants

PROJECT = Path(__file__).parent.parent
LISTING = """
    hetlora_agg.combining.x_stack__mutmut_1: killed
    hetlora_agg.combining.x_stack__mutmut_2: survived
    hetlora_agg.combining.x__checked__mutmut_10: no tests
    hetlora_agg.weighting.x_capped__mutmut_3: timeout
"""
DIFF = """# hetlora_agg.combining.x_stack__mutmut_2: survived
--- src/hetlora_agg/combining.py
+++ src/hetlora_agg/combining.py
@@ -1,3 +1,3 @@
 def stack(c, share):
-    return a - 1
+    return a + 1
"""


def test_what_is_noticed_and_what_is_not():
    found = bench_mutants.counted(bench_mutants.statuses(LISTING))
    assert (found["total"], found["killed"], found["timeout"], found["survived"]) == (4, 1, 1, 1)
    assert found["no tests"] == 1
    assert list(found["modules"]) == ["combining", "weighting"]
    assert found["modules"]["combining"]["total"] == 3
    assert set(found["functions"]) == {"combining.stack", "combining._checked", "weighting.capped"}
    assert found["functions"]["combining.stack"]["survived"] == 1
    assert report_mutants._row("f", found) == ["f", "4", "2 (50.0%)", "2"]


def test_nothing_found_is_an_error():
    with pytest.raises(RuntimeError, match="made no mutants"):
        bench_mutants.statuses("failed to collect stats")


def test_a_change_is_two_lines():
    assert bench_mutants.changed_lines(DIFF) == {"before": "return a - 1", "after": "return a + 1"}


def test_the_record_is_of_functions_that_there_are():
    results = json.loads((PROJECT / "benchmarks/results/mutants.json").read_text())["results"]
    for name in results["modules"]:
        source = (PROJECT / f"src/hetlora_agg/{name}.py").read_text()
        written = {
            f"{name}.{node.name}" for node in ast.parse(source).body if hasattr(node, "args")
        }
        recorded = {f for f in results["functions"] if f.startswith(f"{name}.")}
        assert recorded <= written
        # One without anything to change, such as a lone attribute, makes no mutant.
        assert len(written - recorded) <= 2, written - recorded


def test_nearly_every_change_is_noticed():
    results = json.loads((PROJECT / "benchmarks/results/mutants.json").read_text())["results"]
    noticed = results["killed"] + results["timeout"]
    assert noticed >= 0.95 * results["total"]
    assert len(results["survivors"]) == results["total"] - noticed
