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
    {"types", "claims"},
    {"components"},
    {"registry", "checks"},
    {"reduction", "sampling"},
    {"weighting", "alignment", "rotating", "drawing", "combining", "compression", "validation"},
    {"core", "intake", "budget"},
    {"robustness"},
    {"methods"},
    {"running"},
    {"aggregate", "layers", "distribute", "rounds"},
    {"clients", "privacy"},
    {"secure"},
    {"reports"},
    {"diagnostics"},
    {"adapters"},
    {"streaming"},
    {"distributed"},
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
    public = {"public", "adapters", "streaming", "testing", "simulate", "plotting", "linalg", name}
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


# What runs code that came as data, starts programs or talks to a network.
UNSAFE_MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "code"),
    *("subprocess", "runpy", "ctypes", "imp", "pty", "popen2"),
}
NETWORK = {
    *("socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib"),
    *("smtplib", "telnetlib", "socketserver", "xmlrpc", "huggingface_hub", "asyncio"),
}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
UNSAFE_ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("os", "system"),
    ("os", "popen"),
    ("os", "execv"),
    ("os", "execvp"),
    ("os", "spawnl"),
    ("os", "spawnv"),
    ("np", "load"),
    ("numpy", "load"),
    ("hub", "load"),
    ("importlib", "import_module"),
}
# Collectives that pickle what they are given.
COLLECTIVE = ("dist", "distributed", "distributed_c10d")
OBJECTS = re.compile(r"\w+_object(_list)?")


def unsafe(tree, network=True):
    """Lines of a module that could run what came as data, start a program or open a connection."""
    forbidden = UNSAFE_MODULES | (NETWORK if network else set())
    # A module whose name is written out is an import like any other.
    written_out = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
    }
    for node in ast.walk(tree):
        modules, names = [], []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            names = [(modules[0].split(".")[-1], alias.name) for alias in node.names]
            names = [name for name in names if name[1] != "import_module"]
        elif isinstance(node, ast.Attribute):
            value = node.value
            owner = getattr(value, "id", getattr(value, "attr", ""))
            if (owner, node.attr) != ("importlib", "import_module") or id(node) not in written_out:
                names = [(owner, node.attr)]
        elif isinstance(node, ast.Name) and node.id in UNSAFE_CALLS:
            yield node.lineno, node.id
        elif isinstance(node, ast.Name) and node.id == "import_module":
            if id(node) not in written_out:
                yield node.lineno, node.id
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            yield node.value.lineno, node.arg
        for module in modules:
            if module.split(".")[0] in forbidden:
                yield node.lineno, module
        for owner, name in names:
            pickles = OBJECTS.fullmatch(name) and owner in COLLECTIVE
            if (owner, name) in UNSAFE_ATTRIBUTES or pickles:
                yield node.lineno, f"{owner}.{name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_came_as_data_is_run(path):
    # The adapters to frameworks speak over the frameworks' connections.
    found = list(unsafe(ast.parse(path.read_text()), network=house_name(path) != "integrations"))
    assert not found, found


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from pickle import loads", "import torch; torch.load(x)"),
        *("from torch import load", "import numpy as np; np.load(x, allow_pickle=True)"),
        *("eval(x)", "f = exec", "__import__(x)", "import os; os.system(x)", "import subprocess"),
        *("from urllib.request import urlopen", "import torch; torch.hub.load(x)", "compile(x)"),
        *(
            "from importlib import import_module; import_module(x)",
            "import importlib; importlib.import_module(x)",
        ),
        "g(trust_remote_code=True)",
        *("dist.all_gather_object(x, y)", "from torch.distributed import broadcast_object_list"),
        *("torch.distributed.recv_object_list(x)", "dist.distributed_c10d.scatter_object_list(x)"),
    ],
)
def test_what_would_run_data_is_found(line):
    assert list(unsafe(ast.parse(line)))
