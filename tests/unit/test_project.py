# SPDX-License-Identifier: Apache-2.0
"""Facts that the project's own files state twice agree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SOURCES = ("nvdimm_driver", "shim", "tests", "contrib", "debian", "doc", ".ci")
LANGUAGES = {".py", ".sh", ".c", ".h", ".S"}
MADE = {"_xen.py"}


def is_source(path: Path) -> bool:
    """Return True for a program in one of the languages, or one with a #! line; what is made at a build is none."""
    if not path.is_file() or path.name in MADE or "_build" in path.parts:
        return False
    with path.open("rb") as file:
        return path.suffix in LANGUAGES or file.read(2) == b"#!"


def test_every_source_file_says_its_licence() -> None:
    """At the top, or right behind the #! line."""
    found = [path for folder in SOURCES for path in (PROJECT / folder).rglob("*") if is_source(path)]
    found += [PROJECT / "setup.py", PROJECT / "Makefile"]
    heads = {path: path.read_text(encoding="utf-8").splitlines()[:2] for path in found}
    lacking = [path for path, head in heads.items() if "SPDX-License-Identifier: Apache-2.0" not in " ".join(head)]
    assert lacking == []
    assert len(found) > 100


def test_pre_commit_runs_what_make_check_runs() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    variables = dict(re.findall(r"^(VENV|BIN) := (.*)$", makefile, re.MULTILINE))
    (recipe,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    binaries = variables["BIN"].replace("$(VENV)", variables["VENV"])
    wanted = [line.strip().replace("$(BIN)", binaries) for line in recipe.splitlines()]
    hooks = (PROJECT / ".pre-commit-config.yaml").read_text().split("- id:")[1:]
    assert [re.findall(r"^ +entry: (.*)$", hook, re.MULTILINE) for hook in hooks] == [[line] for line in wanted]
    for hook in hooks:
        for setting in ("language: system", "always_run: true", "pass_filenames: false"):
            assert f"        {setting}\n" in hook, "the whole tree is checked, with the tools of the environment"


def test_the_release_notes_are_newest_first_and_have_this_version() -> None:
    found = re.findall(r"^(\d+\.\d+\.\d+)( \(unreleased\))?\n-+$", (PROJECT / "NEWS.rst").read_text(), re.MULTILINE)
    numbers = [number for number, _ in found]
    assert version("nvdimm_driver") in numbers
    assert numbers == sorted(numbers, key=lambda number: [int(part) for part in number.split(".")], reverse=True)
    assert [number for number, unreleased in found[1:] if unreleased] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_files_and_make_targets_that_a_page_names_are_there(page: str) -> None:
    text = (PROJECT / page).read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+):(?! ?=)", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"\]\(([^):]+)\)", text) + re.findall(r"\btests/\w+/\w+\.py\b", text)
    assert len(named) > 5
    assert [name for name in named if not (PROJECT / name).exists()] == []
    assert set(re.findall(r"(?:`|^ +)make (\w+)", text, re.MULTILINE)) - set(targets) == set()


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found:
                yield getattr(node, "lineno", 1), found


def test_no_docstring_begins_with_a_riddle() -> None:
    riddle = re.compile(r"(What|Whether|Who|Whom|Whose|Where|How|That|Those|True) ")
    files = sorted((PROJECT / "nvdimm_driver").rglob("*.py"))
    found = [
        f"{path.name}:{line}: {text.splitlines()[0]}"
        for path in files
        if path.name != "_xen.py"
        for line, text in docstrings(path)
        if riddle.match(text)
    ]
    assert found == []
