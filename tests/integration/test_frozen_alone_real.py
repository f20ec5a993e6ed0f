# SPDX-License-Identifier: Apache-2.0
"""A frozen file is root's alone: nobody opens it in the moment in which it is mutable; on real ext4 and XFS."""

from __future__ import annotations

import logging
import os
import signal
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvdimm_driver.backing import fsdax, inode, paths
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import BackingError, InUseError
from nvdimm_driver.model import MIB, Allocation, BackingIdentity
from tests.integration.loop_pmem import MKFS, FileSystem
from tests.integration.test_frozen_real import Writer
from tests.integration.test_ownership_real import SIZE, Host, empty, is_immutable, killed
from tests.unit.doubles import UUID

NOBODY = 65534


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    """A host with a domain whose NVDIMM is a user's own file."""
    host = Host(tmp_path, file_systems[request.param])
    host.driver.define(host.domain("a.img", label_size=MIB))
    os.chown(host.path("a.img"), NOBODY, NOBODY)
    yield host
    empty(file_systems[request.param])


def starts(host: Host) -> tuple[Allocation, BackingIdentity]:
    """Start the domain; return its NVDIMM, and that one's identity."""
    host.run(host.domain("a.img", label_size=MIB))
    (item,) = host.record().allocations
    assert item.identity
    return item, item.identity


def access(host: Host) -> tuple[int, int]:
    """Return owner and mode of the file."""
    found = os.stat(host.path("a.img"))
    return found.st_uid, stat.S_IMODE(found.st_mode)


def truncate_when_it_can_be_opened(path: str) -> int:
    """Begin a process of the file's owner, who has no privileges, that opens it as soon as that can be."""
    ready, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        assert os.read(ready, 1)
        os.close(ready)
        return child
    try:
        os.chdir(os.path.dirname(path))
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os.write(told, b"x")
        while True:
            try:
                fd = os.open(os.path.basename(path), os.O_RDWR)
            except OSError:
                continue
            time.sleep(0.5)  # it is immutable again
            os.ftruncate(fd, 4096)
            os._exit(0)
    finally:
        os._exit(1)


def test_its_owner_cannot_open_it_while_its_labels_are_opened(host: Host) -> None:
    item, identity = starts(host)
    child = truncate_when_it_can_be_opened(host.path("a.img"))
    for _ in range(50):
        host.backing.open_labels(item.spec, identity).close()
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it has opened the file"
    assert is_immutable(host.path("a.img"))
    assert os.path.getsize(host.path("a.img")) == SIZE


def test_freezing_takes_the_file_from_those_who_may_write_it(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    os.chmod(host.path("a.img"), 0o664)
    with caplog.at_level(logging.WARNING):
        starts(host)
    assert access(host) == (0, 0o644)
    assert f"{host.path('a.img')} was made root's" in caplog.text
    assert f"its owner was user {NOBODY}, its mode 664" in caplog.text
    host.mapper.alive.clear()
    host.driver.reconcile()
    assert (access(host), is_immutable(host.path("a.img"))) == ((0, 0o644), False)


@pytest.mark.parametrize("mode", [0o4755, 0o2775, 0o6777, 0o4700, 0o2664])
def test_freezing_makes_no_program_that_runs_as_root(host: Host, mode: int) -> None:
    os.chmod(host.path("a.img"), mode)
    starts(host)
    assert access(host) == (0, mode & 0o755)


def test_a_program_of_roots_that_an_earlier_version_made_is_none_after_the_next_start(host: Host) -> None:
    os.chown(host.path("a.img"), 0, NOBODY)
    os.chmod(host.path("a.img"), 0o4755)
    starts(host)
    assert access(host) == (0, 0o755)


@pytest.mark.parametrize("moment", ["fchown", "fchmod"])
def test_its_owner_makes_no_program_of_roots_in_the_moment(
    host: Host, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner sets the bits just before the file becomes root's, or tries to just after."""

    def meanwhile(change: Callable[[int, int], None]) -> Callable[..., None]:
        def changes(fd: int, *values: int) -> None:
            as_nobody(lambda: os.chmod(f"/proc/self/fd/{fd}", 0o6777))
            change(fd, *values)

        return changes

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, meanwhile(getattr(os, moment)))
        starts(host)
    assert access(host) == (0, 0o755 if moment == "fchown" else 0o600)


def test_freezing_takes_the_file_from_an_access_control_list(host: Host) -> None:
    """User nobody may read and write it, by his entry."""
    entries = [
        (0x01, 6, 0xFFFFFFFF),
        (0x02, 6, NOBODY),
        (0x04, 4, 0xFFFFFFFF),
        (0x10, 6, 0xFFFFFFFF),
        (0x20, 0, 0xFFFFFFFF),
    ]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in entries)
    os.chown(host.path("a.img"), 0, 0)
    os.setxattr(host.path("a.img"), "system.posix_acl_access", acl)
    assert may_be_opened_by_nobody(host)
    starts(host)
    with open(host.path("a.img"), "rb") as file, inode.thawed(file.fileno()):
        assert not may_be_opened_by_nobody(host)


def may_be_opened_by_nobody(host: Host) -> bool:
    folder = os.open(host.fs.root, os.O_PATH)
    done = as_nobody(lambda: os.open("a.img", os.O_RDWR, dir_fd=folder))
    os.close(folder)
    return done


def as_nobody(act: Callable[[], object]) -> bool:
    """Do it as a user without privileges; return True when that was allowed."""
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_file_of_roots_stays_as_it_is(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    os.chown(host.path("a.img"), 0, NOBODY)
    os.chmod(host.path("a.img"), 0o640)
    with caplog.at_level(logging.WARNING):
        starts(host)
    assert access(host) == (0, 0o640)
    assert os.stat(host.path("a.img")).st_gid == NOBODY
    assert "was made root's" not in caplog.text


def test_who_has_opened_it_before_keeps_the_guest_from_starting(host: Host) -> None:
    child = Writer(host.path("a.img"), "descriptor")
    with pytest.raises(InUseError, match=rf"a\.img: process {child.pid} .* may write it"):
        host.driver.prepare(host.domain("a.img", label_size=MIB))
    child.end()
    starts(host)


def test_the_labels_of_a_guest_that_an_earlier_version_has_started_are_not_opened(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(inode, "_make_roots_alone", lambda fd: None)
        item, identity = starts(host)
    with pytest.raises(BackingError, match="others than root may write it") as caught:
        host.backing.open_labels(item.spec, identity)
    assert caught.value.hint == "shut the guest down and start it again: the start makes the file root's alone"
    assert is_immutable(host.path("a.img"))
    assert access(host)[0] == NOBODY
    host.mapper.alive.clear()
    host.driver.reconcile()
    item, identity = starts(host)
    host.backing.open_labels(item.spec, identity).close()


def test_what_an_earlier_version_has_left_mutable_is_roots_when_it_is_frozen_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(inode, "_make_roots_alone", lambda fd: None)
        item, identity = starts(host)
        patch.setattr(fsdax, "check_roots_alone", lambda fd, path: None)
        patch.setattr(fsdax, "opened_again", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        killed(lambda: host.backing.open_labels(item.spec, identity))
    assert not is_immutable(host.path("a.img")), "the test has hit the moment"
    host.backing.open_labels(item.spec, identity).close()
    assert (access(host)[0], is_immutable(host.path("a.img"))) == (0, True)


def test_a_program_of_roots_that_opens_it_in_the_moment_is_seen(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    item, identity = starts(host)
    others = []

    def meanwhile(fd: int, flags: int) -> object:
        others.append(Writer(host.path("a.img"), "descriptor"))
        return paths.opened_again(fd, flags)

    with monkeypatch.context() as patch:
        patch.setattr(fsdax, "opened_again", meanwhile)
        with pytest.raises(InUseError) as caught:
            host.backing.open_labels(item.spec, identity)
    assert f"process {others[0].pid} " in caught.value.message
    assert is_immutable(host.path("a.img"))
    (found,) = look(host.driver)
    assert (found.domain, found.path, found.mend) == ("x", host.path("a.img"), None)
    assert found.problem.startswith(f"process {others[0].pid} ")
    assert found.remedy == "end that program, or have it close the file"
    others[0].end()
    with host.backing.open_labels(item.spec, identity):
        host.another().backings[0].open_labels(item.spec, identity).close()
    assert look(host.driver) == []


def test_check_takes_no_label_server_for_a_stranger(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    item, identity = starts(host)
    with host.backing.open_labels(item.spec, identity):
        (found,) = look(host.driver)
        assert found.problem.startswith(f"process {os.getpid()} ")
        monkeypatch.setattr(host.driver.starts.label_servers, "find", lambda uuid: [os.getpid()] * (uuid == UUID))
        assert look(host.driver) == []


def test_an_error_in_the_moment_leaves_the_file_immutable(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    item, identity = starts(host)

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "setxattr", fails)
        with pytest.raises(BackingError, match="No space left on device"):
            host.backing.open_labels(item.spec, identity)
    assert is_immutable(host.path("a.img"))
