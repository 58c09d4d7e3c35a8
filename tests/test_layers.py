"""The import direction of DESIGN: scripts -> engine -> nets, losses -> utils."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "nets", "losses", "utils")
ALLOWED = {
    "engine": {"engine", "nets", "losses", "utils"},
    "nets": {"nets", "utils"},
    "losses": {"losses", "utils"},
    "utils": {"utils"},
}
OURS = {*PACKAGES, "tools", "examples", "benchmarks", "tests", "train", "predict", "evaluate"}


def imported_packages(path: Path) -> set[str]:
    """First names of all modules of this project that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.add(path.parent.name if node.level else node.module.split(".")[0])
    return names & OURS


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package):
    files = sorted((ROOT / package).glob("*.py"))
    assert len(files) > 1
    for path in files:
        assert imported_packages(path) <= ALLOWED[package], path


def test_no_script_is_imported_by_a_package():
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            assert not imported_packages(path) & {"train", "predict", "evaluate", "tools"}
