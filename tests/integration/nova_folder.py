# SPDX-License-Identifier: Apache-2.0
"""Tests that need Nova: in an environment of their own, and each folder in a process, which importing Nova changes."""

from __future__ import annotations

import re
import subprocess

from tests.package import PROJECT

PYTEST = PROJECT / ".venv-nova" / "bin" / "pytest"


def run_folder(folder: str, marked: str = "not thorough") -> None:
    """Fails when a test of this folder in ``tests/nova`` does, or is skipped.

    :param marked: which tests, as ``pytest -m`` takes it.
    """
    # before the test that runs these is taken for one that hangs
    told = ("-o", "faulthandler_timeout=600")
    done = subprocess.run(
        [PYTEST, *told, "-m", marked, f"tests/nova/{folder}"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
    assert re.search(r"=+ \d+ passed(, \d+ deselected)? in ", done.stdout.splitlines()[-1]), "and none is skipped"
