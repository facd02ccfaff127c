"""What is built to be installed: contents, metadata, and what importing it costs."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import hetlora_agg

PROJECT = Path(__file__).parent.parent
NAME = f"hetlora_agg-{hetlora_agg.__version__}"
EXTRAS = {"sim", "plot", "testing", "privacy", "gpu", "bench", "test", "docs"}

MOST_SECONDS = 0.2
"""What importing the package may take beyond torch and numpy."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with wheel and sdist; nothing is fetched, the wheel is made from the sdist."""
    pytest.importorskip("build", reason="needs build, of the extra test")
    pytest.importorskip("hatchling", reason="needs hatchling, of the extra test")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*command, str(PROJECT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as archive:
        yield archive


@pytest.fixture(scope="module")
def sdist(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def metadata(wheel):
    return Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())


def test_the_wheel_is_the_package_and_nothing_else(wheel):
    files = set(wheel.namelist())
    source = {
        str(path.relative_to(PROJECT / "src"))
        for path in (PROJECT / "src" / "hetlora_agg").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "hetlora_agg/py.typed" in source
    assert {name for name in files if not name.startswith(f"{NAME}.dist-info/")} == source
    assert f"{NAME}.dist-info/licenses/LICENSE" in files


def test_the_sdist_builds_and_tests_itself(sdist):
    needed = {"pyproject.toml", "README.md", "LICENSE", "src/hetlora_agg/py.typed"}
    needed |= {"CHANGELOG.md", "CITATION.cff", "Makefile", "constraints.txt", "tests/conftest.py"}
    assert needed <= sdist
    unwanted = re.compile(r"(^|/)(\.venv[^/]*|\.git|\.ci|demo|site|dist|__pycache__)/|\.pyc$")
    assert not [name for name in sdist if unwanted.search(name)]


def test_metadata_says_what_it_is(metadata):
    assert metadata["Name"] == "hetlora-agg"
    assert metadata["Version"] == hetlora_agg.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\w+)?", hetlora_agg.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert (
        metadata["Summary"] == "Functional aggregators for federated LoRA with heterogeneous ranks"
    )
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Keywords"]


def test_metadata_has_links_that_lead_somewhere(metadata):
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL", []))
    assert urls
    for url in urls.values():
        assert re.fullmatch(r"https://[\w.-]+\.\w+/\S*", url)
        assert not re.search(r"example|your|todo|placeholder|localhost", url, re.I)


def test_metadata_has_extras_and_few_requirements(metadata):
    assert set(metadata.get_all("Provides-Extra")) >= EXTRAS
    always = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in always}
    assert names == {"torch", "numpy", "safetensors"}
    # A lower bound lets users keep their torch; an upper one would not.
    assert not [r for r in always if re.search(r"<|==|~=", r)]


def test_the_command_is_entered(wheel):
    entries = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert "hetlora-agg = hetlora_agg.cli:main" in entries


def seconds_beyond_torch():
    """Processor time of importing the package where numpy and torch are there, in a new process."""
    code = (
        "import numpy, time, torch; began = time.process_time(); "
        "import hetlora_agg; print(time.process_time() - began)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_importing_is_quick():
    # Processor time, since other work on the machine adds to any other; the least of three.
    assert min(seconds_beyond_torch() for _ in range(3)) <= MOST_SECONDS


def test_importing_loads_no_extra():
    code = (
        "import sys, torch; had = {*sys.modules}; import hetlora_agg; "
        "print(*sys.modules.keys() - had)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "hetlora_agg" in loaded
    extras = {"matplotlib", "sklearn", "scipy", "tqdm", "hypothesis", "pytest", "triton", "peft"}
    assert not loaded & extras
