"""The documentation is current and its code runs."""

import importlib.util
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

PROJECT = Path(__file__).parent.parent


def tables():
    spec = importlib.util.spec_from_file_location("tables", PROJECT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", tables().PAGES)
def test_generated_tables_are_current(page):
    text = (PROJECT / page).read_text()
    assert "<!-- table:" in text
    assert tables().rebuilt(text) == text, "run `make tables`"


def test_the_readmes_code_runs_as_pasted(capsys):
    torch.manual_seed(0)
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.S)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    plt.close("all")
    printed = capsys.readouterr().out
    assert "distance from exact mean" in printed
    assert repr(namespace["result"]) == "AggregationResult(768x768, rank 16, nested)"
    ranks = [adapter.rank for adapter in namespace["adapters"]]
    assert ranks == [4, 8, 16]


def test_links_lead_somewhere():
    for page in [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_first_thing_in_the_readme_is_two_commands():
    text = (PROJECT / "README.md").read_text()
    assert text.index("make demo") < text.index("make test") < text.index("```python")
