"""README and its Chinese translation: equal commands and figures, links that exist, short lines."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = [ENGLISH, CHINESE, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(path):
    return re.findall(r"```\w*\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def table_values(path):
    """Per table row: its code spans and numbers, which no translation changes."""
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    plain = [re.sub(r"\d+ 万|[\d.]+ M ", "", row) for row in rows]  # 330 万 is 3.3 M
    return [sorted(re.findall(r"`[^`]*`|[-+]?\.?\d[\d.]*", row)) for row in plain]


def test_both_have_the_same_commands():
    assert code_blocks(ENGLISH)
    assert code_blocks(CHINESE) == code_blocks(ENGLISH)


def test_both_have_the_same_tables():
    assert len(table_values(ENGLISH)) > 10
    assert table_values(CHINESE) == table_values(ENGLISH)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_relative_links_exist(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    missing = [a for a in links if "://" not in a and not (path.parent / a).exists()]
    assert not missing


def test_the_readme_is_short():
    lines = ENGLISH.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    assert [line for line in lines if len(line) > 100 and "https://" not in line] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_module_named_in_a_command_exists(path):
    text = "\n".join(code_blocks(path))
    modules = {name.replace(".", "/") + ".py" for name in re.findall(r"-m ([a-z_.]+)", text)}
    scripts = set(re.findall(r"python ([\w/]+\.py)", text))
    ours = {name for name in modules if name.split("/")[0] not in ("venv.py", "pytest.py")}
    assert [name for name in sorted(ours | scripts) if not (ROOT / name).is_file()] == []
