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
from tests.unit.doubles import counted

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


def chain(folder: Path, length: int) -> Path:
    """Make a chain of that many symbolic links to a file; return the first."""
    (folder / "0").touch()
    for number in range(length):
        (folder / f"{number + 1}").symlink_to(f"{number}")
    return folder / f"{length}"


@pytest.mark.parametrize("length", [1, host_files.MAX_LINKS, host_files.MAX_LINKS + 1, 1200])
def test_as_many_links_are_followed_as_by_the_kernel(tmp_path: Path, length: int) -> None:
    path = chain(tmp_path, length)
    if length <= host_files.MAX_LINKS:
        assert path.stat().st_ino == (tmp_path / "0").stat().st_ino
        assert host_files.followed(f"{path}") == f"{tmp_path}/0"
        return
    for follow in (os.stat, host_files.followed):
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            follow(f"{path}")
    for missing in (f"{path}/missing", f"{tmp_path}/missing/../{path.name}"):
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            host_files.followed(missing)
    assert host_files.real_path(f"{path}/.") == f"{path}"


def test_links_to_deep_places_and_back_take_no_longer_than_the_longest_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's realpath takes a minute for one path through a thousand of these."""
    (tmp_path / ("d/" * 100)).mkdir(parents=True)
    names = [f"{number}" for number in range(500)]
    for name in names:
        (tmp_path / name).symlink_to("d/" * 100 + "../" * 100)
    calls = counted(monkeypatch)
    for path in ("/".join(names) + "/x.img", f"missing/../{'/'.join(names)}"):
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            host_files.followed(f"{tmp_path}/{path}")
    assert host_files.followed(f"{tmp_path}/1/2/x.img") == f"{tmp_path}/x.img"
    assert 0 < sum(calls.values()) < 2 * 2 * host_files.PATH_MAX


@pytest.mark.parametrize(
    "path",
    [
        *(
            "folder/file",
            "folder//./file/",
            "to-folder/file",
            "to-folder/..",
            "up/file",
            "absolute/file",
            "../../../..",
        ),
        *("missing", "missing/a/../b", "missing/../to-folder/file", "to-missing/x", "to-missing/../to-folder"),
        *("folder/file/x", "folder/file/../file", "to-file/x/../..", "x" * 300, "folder/" + "x" * 300 + "/../../up"),
    ],
)
def test_a_path_is_followed_as_python_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    for name, target in (
        *(("to-folder", "folder"), ("to-file", "folder/file"), ("up", "folder/../to-folder")),
        *(("absolute", f"{tmp_path}/up"), ("to-missing", "folder/gone")),
    ):
        (tmp_path / name).symlink_to(target)
    assert host_files.followed(f"{tmp_path}/{path}") == os.path.realpath(f"{tmp_path}/{path}")
    monkeypatch.chdir(tmp_path)
    assert host_files.followed(path) == os.path.realpath(path)


def test_a_path_is_not_given_out_half_followed_for_lack_of_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def full(name: str, flags: int, **folder: int) -> int:
        if name == tmp_path.name:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(name, flags, **folder)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="Too many open files"):
        host_files.real_path(f"{tmp_path}/file")


@pytest.mark.parametrize("ask", ALL)
def test_what_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], bool]) -> None:
    monkeypatch.setattr(os, "stat", broken)
    with pytest.raises(OSError, match="Input/output error"):
        ask("/file")


def test_a_saved_guest_is_not_given_up_where_nobody_can_look_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "stat", broken)
    with pytest.raises(OSError, match="Input/output error"):
        has_managed_save("/save", "db1", "")


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


def test_an_absolute_path_is_followed_in_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert host_files.followed(str(tmp_path)) == str(tmp_path)
