"""What the project's own files say twice is the same."""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).parents[2]


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
