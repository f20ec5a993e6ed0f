# SPDX-License-Identifier: Apache-2.0
"""Which processes may write a file, without a look at the files of servers that do not answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvdimm_driver.backing import writers


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Return two files."""
    found = tmp_path / "own", tmp_path / "other"
    for each in found:
        each.write_bytes(b"text")
    return found


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is looked at, which can take for ever: by its name."""
    found: list[str] = []
    look = os.stat

    def noted(path: Path | str | int, **options: bool) -> os.stat_result:
        if not isinstance(path, int) and str(path).startswith("/proc/") and os.path.islink(path):
            found.append(os.path.basename(os.readlink(path)))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", noted)
    return found


def test_a_descriptor_that_writes_is_found_and_no_other_file_is_looked_at(
    files: tuple[Path, Path], looked_at: list[str]
) -> None:
    own, other = files
    with open(own, "rb") as file, open(other, "r+b"):
        assert writers.find(file.fileno()) == set()
        with open(own, "r+b"):
            assert writers.find(file.fileno()) == {os.getpid()}
    assert "own" in looked_at
    assert "other" not in looked_at
