"""The documentation is current and its code runs."""

import importlib.util
import json
import os
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from hetlora_agg import METHODS
from hetlora_agg.adapters import Adapter, write_adapter

PROJECT = Path(__file__).parent.parent
DOCS = PROJECT / "docs"
PAGES = sorted([*PROJECT.glob("*.md"), *DOCS.rglob("*.md")])
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))

# A block that needs a package says so in its title, which readers see; nothing else is left out.
BLOCK = re.compile(r'^```python(?: title="needs ([\w, .-]+)")?\n(.*?)^```', re.S | re.M)
IMPORTED_AS = {"scikit-learn": "sklearn", "dp-accounting": "dp_accounting"}


def script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(path):
    return str(path.relative_to(PROJECT))


def blocks(page):
    """Every Python block of a page with the packages it needs beyond those of the tests."""
    text = page.read_text()
    found = [(needs.split(", ") if needs else [], code) for needs, code in BLOCK.findall(text)]
    assert len(found) == len(re.findall(r"^ *(?:```|~~~) ?(?:python|py)\b", text, re.M)), (
        f"{named(page)}: a Python block starts with ```python at the margin, "
        'or ```python title="needs package"'
    )
    return found


def missing(packages):
    modules = [IMPORTED_AS.get(package, package) for package in packages]
    return [module for module in modules if importlib.util.find_spec(module) is None]


def run(cells, where):
    """Pieces of code in their order, in one namespace."""
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    for number, code in enumerate(cells):
        exec(compile(code, f"{where}, block {number}", "exec"), namespace)
    return namespace


def _adapters_in(folder):
    """The folders that pages read: two clients' trained adapters, ranks 4 and 8."""
    g = torch.Generator().manual_seed(0)
    for name, rank in (("phone", 4), ("tablet", 8)):
        shapes = {"lora_A.weight": (rank, 12), "lora_B.weight": (10, rank)}
        factors = {f"layers.0.q_proj.{k}": torch.randn(s, generator=g) for k, s in shapes.items()}
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"]}
        write_adapter(Path(folder) / name, Adapter.from_state_dict(factors, config))


@pytest.fixture(autouse=True)
def _as_found(monkeypatch, tmp_path):
    """Pages may register methods, open figures and write files."""
    entries, threads = dict(METHODS), torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    METHODS.clear()
    METHODS.update(entries)
    plt.close("all")


@pytest.mark.parametrize("page", script("tables").PAGES)
def test_generated_tables_are_current(page):
    tables = script("tables")
    text = (PROJECT / page).read_text()
    assert "<!-- table:" in text
    assert tables.rebuilt(text) == text, "run `make tables`"


def test_every_page_with_a_table_is_regenerated():
    with_tables = {named(page) for page in PAGES if "<!-- table:" in page.read_text()}
    assert with_tables == set(script("tables").PAGES)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=named)
def test_code_of_a_page_runs_as_pasted(page, capsys):
    _adapters_in("clients")
    found = blocks(page)
    absent = sorted({package for needs, _ in found for package in missing(needs)})
    namespace = run([code for needs, code in found if not missing(needs)], named(page))
    if page == PROJECT / "README.md":
        assert len(found) >= 3
        assert "distance from exact mean" in capsys.readouterr().out
        assert repr(namespace["result"]) == "AggregationResult(768x768, rank 16, nested)"
        assert [adapter.rank for adapter in namespace["adapters"]] == [4, 8, 16]
    if absent:
        pytest.skip(f"ran all blocks but those that need {', '.join(absent)}")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_code_of_a_notebook_runs(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code
    # IPython's own commands set up the display, which there is none of here.
    run([re.sub(r"^%.*$", "", cell, flags=re.M) for cell in code], named(notebook))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_notebooks_are_committed_without_outputs(notebook):
    for cell in json.loads(notebook.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert set(cell["metadata"]) <= {"tags"}


def test_the_site_has_notebooks_and_every_page():
    assert len(NOTEBOOKS) >= 3
    nav = "\n".join(
        line for line in (PROJECT / "mkdocs.yml").read_text().splitlines() if "#" not in line
    )
    listed = set(re.findall(r"[\w/-]+\.(?:md|ipynb)\b", nav))
    files = {str(p.relative_to(DOCS)) for p in [*DOCS.rglob("*.md"), *NOTEBOOKS]}
    assert listed == files, "every page stands in the nav of mkdocs.yml, and nothing else does"


# In sight for the tests and modules of the package itself.
INNER = {"Trial", "Curve", "require_matplotlib"}
LINALG = {"svd_product", "SVD", "Certificate", "predicted_bytes", "select_driver"}


def public_names(module):
    """What `__all__` lists, or else the functions and classes that a package imports by name."""
    if module.__name__ == "hetlora_agg.linalg":
        return LINALG
    own = {
        name
        for name, thing in vars(module).items()
        if getattr(thing, "__module__", "").startswith(module.__name__) and name[0] != "_"
    }
    return set(getattr(module, "__all__", own)) - INNER


def shown(page):
    return re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)


@pytest.mark.parametrize("page", sorted(DOCS.glob("api/*.md")), ids=named)
def test_the_reference_shows_what_there_is(page):
    for target in shown(page):
        owner, _, name = target.rpartition(".")
        assert hasattr(importlib.import_module(owner), name), target
    package = {"index": "hetlora_agg", "building": None}.get(page.stem, f"hetlora_agg.{page.stem}")
    if package is not None:
        public = public_names(importlib.import_module(package))
        assert public
        assert not public - {target.rpartition(".")[2] for target in shown(page)}


def anchors(page):
    """The anchors of a page's headings, as the site and GitHub make them."""
    headings = re.findall(
        r"^#+ (.+?)\s*$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M
    )
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"[\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{named(page)}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{named(page)}: {target}#{anchor}"


def test_no_link_of_the_site_leaves_it():
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith("http"):
                inside = os.path.relpath(page.parent / target, DOCS)
                assert not inside.startswith(".."), f"{named(page)}: {target}"


def test_the_first_thing_in_the_readme_is_two_commands():
    text = (PROJECT / "README.md").read_text()
    assert text.index("make demo") < text.index("make test") < text.index("```python")


def test_pictures_can_be_drawn(tmp_path):
    script("pictures").main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn
    assert drawn <= {path.name for path in (DOCS / "img").iterdir()}


def test_decisions_know_a_robust_method_a_sum_and_a_claim():
    decisions = script("decisions")
    met = {
        need.short: {name for name, answer in decisions.answers(need) if answer is not None}
        for need in decisions.NEEDS
    }
    assert met["exact"] == {name for name, entry in METHODS.items() if "exact" in entry.claims}
    assert {"median", "trimmed_mean"} <= met["one bad"]
    assert not {"flexlora", "rb", "zeropad"} & met["one bad"]
    assert {"zeropad", "rbla", "fedask"} <= met["sums"]
    assert not {"flexlora", "rb", "median"} & met["sums"]
    assert {"rb", "rbla"} <= met["idle slots"]
    assert "flexlora" not in met["idle slots"]


def test_docstrings_are_rewritten_for_the_site():
    pytest.importorskip("griffe", reason="needs griffe, of the extra docs")
    rewritten = script("docstrings").markdown(
        "Sum::\n\n    a + b\n\nReturns:\n    A `LowRank`: factors.\n\nCost: low.\n\n"
        "Example:\n    >>> 1\n"
    )
    assert "Sum:\n" in rewritten
    assert "A `LowRank`&#58; factors." in rewritten
    assert "**Cost:** low." in rewritten
    assert "\nExamples:\n" in rewritten
