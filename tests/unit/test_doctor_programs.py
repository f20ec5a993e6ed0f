# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nvdimm_driver.acpi.native import NativeAcpiBuilder
from nvdimm_driver.acpi.qemu import QemuAcpiBuilder
from nvdimm_driver.doctor.finding import Result
from nvdimm_driver.doctor.programs import Script, check_hook_known, check_qemu, check_script, check_tables

MARK = "# ours"


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """A script that is installed as it should be."""
    made = Script("hook", tmp_path / "50-nvdimm", f"#!{sys.executable} -I\n{MARK}\n", MARK)
    made.path.write_text(made.text)
    made.path.chmod(0o755)
    return made


def test_a_script_that_is_right(script: Script) -> None:
    assert check_script(script).result == Result.PASS


@pytest.mark.parametrize(
    ("spoil", "result", "message"),
    [
        (lambda path: path.unlink(), Result.FAIL, "there is no"),
        (lambda path: path.write_text("#!/bin/sh\n"), Result.FAIL, "was not written by nvdimm_driver"),
        (lambda path: path.chmod(0o644), Result.FAIL, "is not executable"),
        (lambda path: path.write_text(f"#!/gone/python3 -I\n{MARK}\n"), Result.FAIL, "interpreter /gone/python3"),
        (lambda path: path.write_text(path.read_text() + "more\n"), Result.WARN, "of another version"),
        (lambda path: (path.unlink(), path.mkdir()), Result.FAIL, "Is a directory"),
    ],
)
def test_a_script_that_is_not(script: Script, spoil: Callable[[Path], object], result: Result, message: str) -> None:
    spoil(script.path)
    found = check_script(script)
    assert found.result == result
    assert message in found.message


def test_libvirt_looks_for_hooks_when_it_starts(script: Script) -> None:
    os.utime(script.path, (1000, 1000))
    assert check_hook_known(script.path, None).result == Result.PASS
    assert check_hook_known(script.path, 1001.0).result == Result.PASS
    assert check_hook_known(script.path, 999.0).result == Result.WARN
    script.path.unlink()
    assert check_hook_known(script.path, 1001.0).result == Result.FAIL


def test_qemu(tmp_path: Path) -> None:
    assert check_qemu("/bin/true").result == Result.PASS
    found = check_qemu(str(tmp_path / "qemu"))
    assert found.result == Result.FAIL
    assert "[xen] qemu" in found.hint


def test_tables(tmp_path: Path) -> None:
    found = check_tables("native", NativeAcpiBuilder())
    assert found.result == Result.PASS
    assert "builder native: NFIT of" in found.message
    found = check_tables("qemu", QemuAcpiBuilder([str(tmp_path / "qemu")]))
    assert found.result == Result.FAIL
    assert "no QEMU is installed; tried " in found.message
