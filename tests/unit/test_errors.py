# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os

import pytest

from nvdimm_driver.errors import FullDiskError, own_file_error


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EROFS, "f: its file system is read-only (if Linux made it so after an error"),
        (errno.ENOSPC, "f: the disk is full (make room, and try again)"),
        (errno.EDQUOT, "f: the disk is full (make room, and try again)"),
        (errno.EIO, "f: Input/output error (look at the kernel's log: dmesg)"),
        (errno.EMFILE, "f: Too many open files"),
    ],
)
def test_an_error_names_the_cause(number: int, told: str) -> None:
    found = own_file_error("f", OSError(number, os.strerror(number)))
    assert str(found).startswith(told)
    assert isinstance(found, FullDiskError) == ("full" in told)


def test_only_who_is_not_root_is_told_to_run_as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = OSError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert own_file_error("f", refused).hint == "run as root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "AppArmor" in own_file_error("f", refused).hint
