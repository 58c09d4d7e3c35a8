"""Which folder may import which: utils lowest, then data and nets, the scripts on top."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "utils": set(),
    "data": {"utils"},
    "nets": {"utils"},
    "weights": {"nets", "data", "utils"},
    "losses": {"nets", "utils"},
    "metrics": {"losses", "nets", "data", "utils"},
    "engine": {"metrics", "losses", "weights", "nets", "data", "utils"},
    "lab": {"engine", "metrics", "losses", "data", "utils"},
}
OURS = {*ALLOWED, "tools", "examples", "benchmarks", "tests", "train", "predict", "evaluate"}


def imported_packages(path: Path) -> set[str]:
    """First names of all modules of this project that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide the arrows"
            names.add(node.module.split(".")[0])
    return names & OURS


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_lies_below_it(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 1
    for path in files:
        assert imported_packages(path) <= ALLOWED[package] | {package}, path


def test_every_package_of_the_project_has_its_place():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tools", "benchmarks", "tests", "examples"} == set(ALLOWED)
