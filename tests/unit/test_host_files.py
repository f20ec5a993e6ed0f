# SPDX-License-Identifier: Apache-2.0
"""A file that cannot be looked at is not one that is not there, whatever the version of Python says."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nvdimm_driver import host_files
from nvdimm_driver.backing.locks import Locks
from nvdimm_driver.errors import BackingError, ConfigError
from nvdimm_driver.model import MIB, BackingIdentity
from nvdimm_driver.xml.definition_files import DefinitionFiles, has_managed_save

ALL = (host_files.exists, host_files.is_file, host_files.is_folder)


def broken(*_: object, **_options: object) -> None:
    """Fail as on a medium with errors."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert [ask(file) for ask in ALL] == [True, True, False]
    assert [ask(str(tmp_path)) for ask in ALL] == [True, False, True]
    for missing in (tmp_path / "none", file / "below", tmp_path / "loop", tmp_path / ("x" * 300)):
        assert [ask(missing) for ask in ALL] == [False, False, False]


@pytest.mark.parametrize("ask", ALL)
def test_what_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], bool]) -> None:
    monkeypatch.setattr(os, "stat", broken)
    with pytest.raises(OSError, match="Input/output error"):
        ask("/file")


def test_a_saved_guest_is_not_given_up_where_nobody_can_look_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "stat", broken)
    with pytest.raises(OSError, match="Input/output error"):
        has_managed_save("/save", "db1")


def test_a_device_is_nobodys_only_where_the_saved_guests_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "save").touch()  # in place of a medium with errors
    with pytest.raises(ConfigError, match="say whose devices are"):
        list(DefinitionFiles((), str, str, str(tmp_path / "save")))
    assert list(DefinitionFiles((), str, str, str(tmp_path / "none"))) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_device_is_not_taken_for_unwritten_where_the_locks_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Also where AppArmor keeps a program from looking."""

    def broken(*_: object) -> list[str]:
        raise OSError(code, os.strerror(code))

    device = BackingIdentity("pmem", "259:0", 0, 0, 0, MIB)
    monkeypatch.setattr(os, "listdir", broken)
    with (
        open(tmp_path / "a.img", "w") as file,
        pytest.raises(BackingError, match=os.strerror(code)),
    ):
        Locks(tmp_path).check_unwritten(file.fileno(), "/dev/pmem1", device)
