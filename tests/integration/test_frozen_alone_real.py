# SPDX-License-Identifier: Apache-2.0
"""A frozen file is root's alone: nobody opens it in the moment in which it is mutable; on real ext4 and XFS."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvdimm_driver.backing import fsdax, inode, paths
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import BackingError, InUseError
from nvdimm_driver.model import MIB, Allocation, BackingIdentity, NvdimmSpec
from tests.integration.loop_pmem import MKFS, FileSystem, lease_break_time, run
from tests.integration.test_frozen_real import Writer
from tests.integration.test_ownership_real import SIZE, Host, another_user, empty, is_immutable, killed
from tests.unit.doubles import UUID, map_prepared

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


def test_freezing_takes_the_file_from_all_others(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    os.chmod(host.path("a.img"), 0o664)
    with caplog.at_level(logging.WARNING):
        starts(host)
    assert access(host) == (0, 0o600)
    assert f"{host.path('a.img')} was made root's" in caplog.text
    assert f"its owner was user {NOBODY}, its mode 664" in caplog.text
    host.mapper.alive.clear()
    host.driver.reconcile()
    assert (access(host), is_immutable(host.path("a.img"))) == ((0, 0o600), False)


@pytest.mark.parametrize("mode", [0o4755, 0o2775, 0o6777, 0o4700, 0o2664])
def test_freezing_makes_no_program_that_runs_as_root(host: Host, mode: int) -> None:
    os.chmod(host.path("a.img"), mode)
    starts(host)
    assert access(host) == (0, 0o600)


def test_a_program_of_roots_that_an_earlier_version_made_is_none_after_the_next_start(host: Host) -> None:
    os.chown(host.path("a.img"), 0, NOBODY)
    os.chmod(host.path("a.img"), 0o4755)
    starts(host)
    assert access(host) == (0, 0o600)


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
    assert access(host) == (0, 0o600)


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
    with open(host.path("a.img"), "rb") as file, inode.append_only(file.fileno()):
        assert not may_be_opened_by_nobody(host)


@pytest.mark.parametrize("how", ["unlink", "rename", "truncate", "link"])
def test_the_owner_of_its_folder_cannot_change_it_while_its_labels_are_opened(
    host: Host, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He needs no right to the file for the first two; root has all, and cannot either."""
    item, identity = starts(host)
    path, tried = host.path("a.img"), []
    change: dict[str, Callable[[], object]] = {
        "unlink": lambda: os.unlink(path),
        "rename": lambda: os.rename(path, f"{path}.old"),
        "truncate": lambda: os.truncate(path, 0),
        "link": lambda: os.link(path, f"{path}.link"),
    }

    def meanwhile(fd: int, flags: int) -> int:
        assert not is_immutable(path), "the test has hit the moment"
        with pytest.raises(PermissionError):
            change[how]()
        tried.append(fd)
        return paths.open_again(fd, flags)

    with monkeypatch.context() as patch:
        patch.setattr(inode, "open_again", meanwhile)
        host.backing.open_labels(item.spec, identity).close()
    assert tried
    assert is_immutable(path)


def test_the_owner_of_its_folder_finds_no_moment_to_delete_it(host: Host) -> None:
    item, identity = starts(host)
    os.chown(host.fs.root, NOBODY, NOBODY)
    try:
        child = unlink_when_that_is_allowed(host.path("a.img"))
        for _ in range(50):
            host.backing.open_labels(item.spec, identity).close()
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it has deleted the file"
    finally:
        os.chown(host.fs.root, 0, 0)
    assert is_immutable(host.path("a.img"))


def unlink_when_that_is_allowed(path: str) -> int:
    """Begin a process of the folder's owner, who has no privileges, that deletes a file as soon as it can."""
    ready, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        assert os.read(ready, 1)
        os.close(ready)
        return child
    try:
        os.chdir(os.path.dirname(path))
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os.write(told, b"x")
        while True:
            with suppress(PermissionError):
                os.unlink(os.path.basename(path))
                os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("frozen_by", ["this version", "an earlier version, which wrote no inode into its mark"])
def test_what_is_killed_in_the_moment_is_immutable_after_the_next_opening(
    host: Host, frozen_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, identity = starts(host)
    with open(host.path("a.img"), "rb") as file:
        if frozen_by != "this version":
            inode._set_immutable(file.fileno(), False)
            os.setxattr(file.fileno(), "trusted.nvdimm_driver.frozen", b"")
            inode._set_immutable(file.fileno(), True)
        with monkeypatch.context() as patch:
            patch.setattr(inode, "open_again", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            killed(lambda: host.backing.open_labels(item.spec, identity))
        assert not is_immutable(host.path("a.img")), "the test has hit the moment"
        assert inode.is_frozen(file.fileno())
        host.backing.open_labels(item.spec, identity).close()
        assert is_immutable(host.path("a.img"))
    host.mapper.alive.clear()
    host.driver.reconcile()
    os.unlink(host.path("a.img"))


def test_the_end_of_a_guest_frees_a_file_whose_opening_was_killed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    item, identity = starts(host)
    with monkeypatch.context() as patch:
        patch.setattr(inode, "open_again", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        killed(lambda: host.backing.open_labels(item.spec, identity))
    host.mapper.alive.clear()
    host.driver.reconcile()
    os.truncate(host.path("a.img"), 0)
    os.unlink(host.path("a.img"))


def test_who_might_read_it_cannot_any_more(host: Host) -> None:
    """A reader could make a reflink of it on XFS, and keep the domain from its next start."""
    os.chmod(host.path("a.img"), 0o644)
    folder = os.open(host.fs.root, os.O_PATH)
    assert as_nobody(lambda: os.open("a.img", os.O_RDONLY, dir_fd=folder))
    starts(host)
    assert not as_nobody(lambda: os.open("a.img", os.O_RDONLY, dir_fd=folder))
    os.close(folder)


def lease_to_read(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)


def test_a_start_ends_a_lease_of_its_former_owner_to_read_it(host: Host) -> None:
    """That lease does not keep the start from opening the file, but would keep a label server from that."""
    os.chmod(host.path("a.img"), 0o644)
    with lease_break_time(1), another_user(lease_to_read, host.path("a.img")):
        item, identity = starts(host)
        with open(host.path("a.img"), "rb") as file:
            assert not inode.has_writer(file.fileno())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fsdax, "_LEASE_SECONDS", 0)
            host.backing.open_labels(item.spec, identity).close()


def test_who_waits_for_a_lease_keeps_no_other_from_freezing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(host.path("b.img")).write_bytes(bytes(SIZE))
    os.chmod(host.path("a.img"), 0o644)
    another = host.another().backings[0]
    waited = []

    def another_freezes(seconds: float) -> None:
        waited.append(seconds)
        another.freeze(host.path("b.img"))
        time.sleep(seconds)

    monkeypatch.setattr(paths, "time", SimpleNamespace(monotonic=time.monotonic, sleep=another_freezes))
    with lease_break_time(1), another_user(lease_to_read, host.path("a.img")):
        starts(host)
    assert waited
    assert is_immutable(host.path("b.img"))


def test_a_lease_leaves_the_file_immutable_while_a_label_server_waits(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of root's can take one also later."""
    item, identity = starts(host)
    seen = []

    def waits(seconds: float) -> None:
        seen.append(is_immutable(host.path("a.img")))
        time.sleep(seconds)

    monkeypatch.setattr(paths, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits))
    monkeypatch.setattr(fsdax, "_LEASE_SECONDS", 0.3)
    with open(host.path("a.img"), "rb") as file:
        assert inode._take_lease(file.fileno())
        with pytest.raises(BackingError, match="Resource temporarily unavailable") as caught:
            host.backing.open_labels(item.spec, identity)
        assert "another program has a lease on it" in caught.value.hint
        assert seen
        assert all(seen)
        assert is_immutable(host.path("a.img"))
    host.backing.open_labels(item.spec, identity).close()


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


def test_a_file_of_roots_alone_stays_as_it_is(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    os.chown(host.path("a.img"), 0, NOBODY)
    with caplog.at_level(logging.WARNING):
        starts(host)
    assert access(host) == (0, 0o600)
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
    run("chattr", "-i", host.path("a.img"))
    host.backing.open_labels(item.spec, identity).close()
    assert (access(host)[0], is_immutable(host.path("a.img"))) == (0, True)


def test_a_program_of_roots_that_opens_it_in_the_moment_is_seen(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    item, identity = starts(host)
    others = []

    def meanwhile(fd: int, flags: int) -> int:
        others.append(Writer(host.path("a.img"), "descriptor", os.O_APPEND))
        return paths.open_again(fd, flags)

    with monkeypatch.context() as patch:
        patch.setattr(inode, "open_again", meanwhile)
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
        patch.setattr(inode, "open_again", fails)
        with pytest.raises(BackingError, match="No space left on device"):
            host.backing.open_labels(item.spec, identity)
    assert is_immutable(host.path("a.img"))


@pytest.mark.parametrize("flag", ["i", "a"])
def test_no_guest_starts_with_a_file_that_somebody_else_has_made_immutable(host: Host, flag: str) -> None:
    """It could get no number and no time, and its owner could go on reading it."""
    path, domain = host.path("a.img"), host.domain("a.img", label_size=MIB)
    run("chattr", f"+{flag}", path)
    with pytest.raises(BackingError, match=r"not by the driver, so that no guest starts with it") as caught:
        host.driver.prepare(domain)
    assert "chattr -ia" in caught.value.hint
    assert host.record().start is None
    assert flag in run("lsattr", path).split()[0]
    assert access(host)[0] == NOBODY
    with pytest.raises(BackingError, match="no guest starts with it"):
        host.driver.plan(domain)
    (found,) = look(host.driver)
    assert (found.path, found.problem) == (path, caught.value.message.removeprefix(f"{path}: "))
    assert (found.remedy, found.mend) == (caught.value.hint, None)
    run("chattr", f"-{flag}", path)
    assert look(host.driver) == []
    starts(host)
    assert (access(host), is_immutable(path)) == ((0, 0o600), True)


def test_a_copy_that_has_the_flag_of_a_frozen_file_is_refused_until_that_is_taken_away(host: Host) -> None:
    """xfsrestore gives it the flag and the attribute that says so, which has another file's number of inode."""
    with open(host.path("a.img"), "rb") as file:
        os.setxattr(file.fileno(), inode._FROZEN, b"1 1")
        inode._set_immutable(file.fileno(), True)
    with pytest.raises(BackingError, match="is immutable or append-only, and not by the driver"):
        host.driver.prepare(host.domain("a.img", label_size=MIB))
    run("chattr", "-i", host.path("a.img"))
    host.driver.prepare(host.domain("a.img", label_size=MIB))
    assert (access(host), is_immutable(host.path("a.img"))) == ((0, 0o600), True)
    host.driver.release(UUID)
    assert not is_immutable(host.path("a.img"))


def test_check_names_the_file_of_a_running_guest_that_somebody_else_has_made_immutable(host: Host) -> None:
    """An earlier version has started it: its reboot would fail."""
    starts(host)
    with open(host.path("a.img"), "rb") as file:
        inode.thaw(file.fileno())
    run("chattr", "+i", host.path("a.img"))
    assert any("is immutable or append-only, and not by the driver" in each.problem for each in look(host.driver))


def test_a_running_domain_is_not_defined_with_a_file_that_somebody_else_has_made_immutable(host: Host) -> None:
    first = host.domain("a.img", label_size=MIB)
    both = replace(first, nvdimms=(*first.nvdimms, NvdimmSpec(1, host.path("b.img"), SIZE)))
    host.driver.define(both)
    run("chattr", "+i", host.path("b.img"))
    host.mapper.alive[7] = UUID
    host.driver.prepare(first)
    map_prepared(host.driver.ledger, 7)
    with pytest.raises(BackingError, match="is immutable or append-only, and not by the driver"):
        host.driver.define(both)
    run("chattr", "-i", host.path("b.img"))


def test_no_repair_takes_a_file_that_somebody_else_has_made_immutable(host: Host) -> None:
    """It could not get its mark: the ledger would have the file, and each start would fail."""
    host.driver.define(host.domain("a.img"))
    run("cp", "-a", host.path("a.img"), host.path("copy"))
    os.rename(host.path("copy"), host.path("a.img"))
    before = host.record().allocations
    (found,) = look(host.driver)
    run("chattr", "+i", host.path("a.img"))
    try:
        assert found.mend
        with pytest.raises(BackingError, match="and not by the driver"):
            found.mend()
        assert host.record().allocations == before
        (found,) = look(host.driver)
        assert ("and not by the driver" in found.problem, found.mend) == (True, None)
    finally:
        run("chattr", "-i", host.path("a.img"))
    (found,) = look(host.driver)
    assert found.mend
    found.mend()
    host.driver.prepare(host.domain("a.img"))


def test_a_start_that_is_refused_leaves_nothing_behind_though_a_mark_cannot_be_written(host: Host) -> None:
    host.driver.define(host.domain("a.img"))
    os.removexattr(host.path("a.img"), inode._OWNER)
    run("chattr", "+i", host.path("a.img"))
    try:
        with pytest.raises(BackingError, match="and not by the driver"):
            host.driver.prepare(host.domain("a.img"))
        assert host.record().start is None
    finally:
        run("chattr", "-i", host.path("a.img"))
    host.driver.prepare(host.domain("a.img"))
