# SPDX-License-Identifier: Apache-2.0
"""A failed comparison of a file's bytes ends: in a CI, pytest would compare them line by line, without a limit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SIZE = 2 << 20


def test_a_file_that_differs_is_told() -> None:
    with pytest.raises(AssertionError, match="the file has other bytes"):
        assert bytes(SIZE) == b"x0's own bytes.".ljust(32, b".") * (SIZE // 32), "the file has other bytes"


@pytest.mark.parametrize("name", ["CI", "BUILD_NUMBER"])
def test_a_file_that_differs_is_told_in_a_ci(name: str) -> None:
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::test_a_file_that_differs_is_told"]
    environment = {**os.environ, "PYTEST_ADDOPTS": "-vv", name: "true"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
