"""The house rules: floors, imports by name, documentation, words that stay where they belong."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import hetlora_agg
from hetlora_agg import METHODS

ROOT = Path(hetlora_agg.__file__).parent
PROJECT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.rglob("*.py"))

# A module imports from floors below its own only. Packages stand for all their modules, which may
# import each other.
FLOORS = [
    {"errors"},
    {"linalg"},
    {"types", "components"},
    {"registry", "checks"},
    {"weighting", "alignment", "rotating", "drawing", "combining", "compression", "validation"},
    {"core", "intake", "budget"},
    {"methods"},
    {"running"},
    {"aggregate", "layers", "distribute", "rounds"},
    {"clients"},
    {"reports"},
    {"diagnostics"},
    {"adapters"},
    {"testing"},
    {"simulate"},
    {"plotting"},
    {"integrations"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}


def house_name(path):
    """The name a module goes by in FLOORS; None for the package's own __init__."""
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return None if part == "__init__" else part


def imported(path):
    """Names in FLOORS that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if node.module == "hetlora_agg":
                modules = ["hetlora_agg"]
        else:
            continue
        for module in modules:
            if module == "hetlora_agg":
                yield "public"
            elif module.startswith("hetlora_agg."):
                yield module.split(".")[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path):
    name = house_name(path)
    if name is None:
        return
    for other in imported(path):
        # The public names stand for everything up to the diagnostics.
        height = FLOOR["diagnostics"] if other == "public" else FLOOR[other]
        assert other == name or height < FLOOR[name], f"{name} imports {other}"


@pytest.mark.parametrize("name", ["simulate", "plotting", "integrations", "cli"])
def test_top_floor_uses_public_names(name):
    paths = [p for p in SOURCES if house_name(p) == name]
    public = {"public", "adapters", "testing", "simulate", "plotting", "linalg", name}
    for path in paths:
        assert set(imported(path)) <= public, path


def test_every_module_has_a_floor():
    assert {house_name(path) for path in SOURCES} - {None} == set(FLOOR)


def test_every_method_file_is_one_method():
    files = {p.stem for p in (ROOT / "methods").glob("*.py")} - {"__init__"}
    assert files == set(METHODS)
    for name, entry in METHODS.items():
        assert entry.run.__module__ == f"hetlora_agg.methods.{name}"


def test_methods_never_import_each_other():
    for path in (ROOT / "methods").glob("*.py"):
        if path.stem != "__init__":
            assert "methods" not in set(imported(path)), path


def test_a_method_is_known_in_its_file_and_its_import_line_only():
    # Docstrings and messages may point to a method; code may not branch on one.
    for path in SOURCES:
        if house_name(path) in ("methods",):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                texts = [
                    c.value for c in [node.left, *node.comparators] if isinstance(c, ast.Constant)
                ]
                assert not set(texts) & set(METHODS), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_source_keeps_the_house_rules(path):
    text = path.read_text()
    assert text.count("\n") <= 300, "a file is one room"
    assert not re.search(r"torch\.load\b|\bimport pickle\b|\bfrom pickle\b", text)
    assert "index_add" not in text, "one-hot products are deterministic on CUDA"
    code = "\n".join(ast.unparse(n) for n in strip_docstrings(ast.parse(text)).body)
    if house_name(path) != "linalg":
        assert "torch.linalg" not in code, "decompositions live in linalg"
    if house_name(path) != "cli":
        assert not re.search(r"\bprint\(", code), "only the command line prints"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno - (doc.count("\n") + 1 if doc else 0)
            assert lines <= 50, f"{node.name} has {lines} lines"


def strip_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def public_objects():
    for name in dir(hetlora_agg):
        thing = getattr(hetlora_agg, name)
        if not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing)):
            yield name, thing


@pytest.mark.parametrize(("name", "thing"), list(public_objects()))
def test_public_name_is_documented(name, thing):
    doc = inspect.getdoc(thing)
    assert doc, name
    if inspect.isfunction(thing) and name != "method":
        for part in ("Args:", "Returns:", "Raises:", "Example:"):
            assert part in doc, f"{name} lacks {part}"
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if not member.startswith("_") and callable(getattr(thing, member)):
                assert inspect.getdoc(value) or member in thing.__annotations__, f"{name}.{member}"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_method_docstring_is_complete(name):
    entry = METHODS[name]
    doc = inspect.getdoc(entry.run)
    for part in (
        "Args:",
        "Returns:",
        "Cost:",
        "Example:",
        "Reference:",
        "Fidelity:",
        "Deviations:",
    ):
        assert part in doc, part
    assert any(tag in entry.fidelity for tag in ("CODE", "PAPER", "SECOND", "OURS"))
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}|acl:[\w.-]+", entry.reference)
    assert entry.reference in doc
    assert entry.summary.endswith(".")
    for option in entry.options:
        assert f"{option}:" in doc, f"option {option} is not documented"


def test_core_imports_need_torch_numpy_and_safetensors_only():
    allowed = {"torch", "numpy", "safetensors", "hetlora_agg"}
    optional = {"testing": {"hypothesis", "pytest"}, "simulate": {"sklearn", "tqdm"}}
    optional |= {"plotting": {"matplotlib"}, "cli": {"tqdm", "matplotlib"}}
    optional |= {"integrations": {"flwr", "nvflare"}}
    import sys

    for path in SOURCES:
        tree = ast.parse(path.read_text())
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
        foreign = names - set(sys.stdlib_module_names) - allowed
        assert foreign <= optional.get(house_name(path), set()), path
