"""The import direction: engine and reference know nothing above them nor of each other; assay is only a front door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"assay", "engine", "reference", "goldens", "audits", "tests"}
ALLOWED = {
    "engine": {"engine"},
    "reference": {"reference"},
    "goldens": {"goldens"},
    "audits": {"audits", "engine", "reference", "goldens"},
    "assay": {"assay", "audits", "engine", "reference", "goldens"},
}
# The oracle and the store must not even touch the framework that they judge.
FORBIDDEN = {"reference": {"mlx"}, "goldens": {"mlx"}}


def imported(source: str) -> set[str]:
    """Top-level packages that a module's source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else (node.module or "").split(".")[0])
    return found


def violations(package: str, source: str) -> set[str]:
    names = imported(source)
    return (names & OURS) - ALLOWED[package] | names & FORBIDDEN.get(package, set()) | names & {"."}


@pytest.mark.parametrize("package", ALLOWED)
def test_no_module_imports_above_itself(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules, f"{package} has no modules: is the test looking in the right place?"
    wrong = {str(path.relative_to(ROOT)): found for path in modules if (found := violations(package, path.read_text()))}
    assert not wrong


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("reference", "import mlx.core as mx"),
        ("reference", "from engine.model import Decoder"),
        ("engine", "def f():\n    from reference import ops"),
        ("goldens", "import audits"),
        ("engine", "from . import model"),
    ],
)
def test_planted_violations_are_seen(package: str, source: str) -> None:
    assert violations(package, source)


def test_importing_assay_imports_nothing_heavy() -> None:
    code = "import sys, assay; print(sorted({'mlx', 'torch', 'h5py', 'numpy', 'typer'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['assay', '--help']\nimport assay.cli\n"
        "try:\n    assay.cli.main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print(sorted({'mlx', 'torch', 'h5py', 'numpy', 'typer', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "Exit codes" in done.stdout
