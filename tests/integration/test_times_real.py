# SPDX-License-Identifier: Apache-2.0
"""The time that a guest's file gets when it is thawed, and what is written then, on real ext4 and XFS."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvdimm_driver.backing import fsdax, inode
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import RefusedError
from nvdimm_driver.model import Touch
from tests.integration import loop_pmem
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_frozen_real import Writer, modified, xfs
from tests.integration.test_ownership_real import SIZE, Host, empty, is_immutable, killed
from tests.unit.doubles import UUID

__all__ = ["xfs"]
LONG_AGO = 10**9
LATER = 2 * 10**9


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param])
    empty(file_systems[request.param])


@pytest.fixture
def whole_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host whose file system keeps times in seconds, as ext4 does with inodes of 128 bytes."""
    monkeypatch.setitem(loop_pmem.MKFS, "ext4", [*MKFS["ext4"], "-I", "128"])
    (tmp_path / "fs").mkdir()
    file_system = FileSystem(tmp_path / "fs", "ext4")
    yield Host(tmp_path, file_system)
    empty(file_system)
    file_system.close()


def has_ended(host: Host, *, written: int = LONG_AGO) -> None:
    """Let a guest run and end; its start is not put away yet."""
    host.driver.define(host.domain("a.img"))
    os.utime(host.path("a.img"), (written, written))
    host.run(host.domain("a.img"))
    host.mapper.alive.clear()


def goes_on(host: Host) -> bool:
    """Return True if the saved guest can go on."""
    try:
        host.another().check_restore(UUID)
    except RefusedError as error:
        if "was written on the host" in error.message:
            return False
        raise
    return True


def write_when_it_can_be_opened(path: str) -> int:
    """Begin a process that opens a file for writing as soon as that can be, and changes it at once."""
    ready, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        assert os.read(ready, 1)
        os.close(ready)
        return child
    try:
        os.write(told, b"x")
        while True:
            with suppress(OSError):
                os.pwrite(os.open(path, os.O_RDWR), b"changed", 0)
                os._exit(0)
    finally:
        os._exit(1)


def test_a_write_in_the_moment_in_which_a_file_is_thawed_is_seen(host: Host) -> None:
    for _ in range(30):
        has_ended(host)
        child = write_when_it_can_be_opened(host.path("a.img"))
        host.another().reconcile()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert host.read("a.img")[:7] == b"changed"
        assert not goes_on(host)


def test_who_opens_a_file_while_it_gets_its_time_waits(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes has a time of its own."""
    has_ended(host)
    children, change = [], inode._set_immutable

    def then_opened(fd: int, immutable: bool) -> None:
        change(fd, immutable)
        children.append(write_when_it_can_be_opened(host.path("a.img")))
        with pytest.raises(BlockingIOError):
            os.open(host.path("a.img"), os.O_RDWR | os.O_NONBLOCK)

    monkeypatch.setattr(inode, "_set_immutable", then_opened)
    host.another().reconcile()
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
    assert not goes_on(host)


def test_a_file_that_a_program_may_write_gets_the_present_time(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes need not change the time once more, and nobody can tell."""
    has_ended(host)
    change, programs = inode._set_immutable, []

    def dies(fd: int, immutable: bool) -> None:
        change(fd, immutable)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(inode, "_set_immutable", dies)
        killed(host.another().reconcile)
    programs.append(Writer(host.path("a.img"), "descriptor"))
    host.another().reconcile()
    programs[0].end()
    assert modified(host) > LONG_AGO * 10**9
    assert not goes_on(host)


@pytest.mark.parametrize("number", [1, 2], ids=["mutable", "touched"])
@pytest.mark.parametrize("written", [False, True])
def test_a_saved_guest_goes_on_though_its_end_was_killed_once_its_file_had_its_time(
    host: Host, monkeypatch: pytest.MonkeyPatch, number: int, written: bool
) -> None:
    """Before that, the file could be an older copy, with the time that it had."""
    has_ended(host)
    name, owner = [("_set_immutable", inode), ("utime", os)][number - 1]
    step = getattr(owner, name)

    def dies(*arguments: Any, **named: Any) -> None:
        step(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    driver = host.another()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        killed(driver.reconcile)
    with open(host.path("a.img"), "r+b") as file:
        assert inode.is_frozen(file.fileno()), "the test has hit the moment"
        if written:
            file.write(b"changed")
    host.another().reconcile()
    assert host.record().start is None
    assert not is_immutable(host.path("a.img"))
    assert goes_on(host) is (name == "utime" and not written)


def test_what_its_label_server_has_written_does_not_count(host: Host) -> None:
    """Its stores change the time of an immutable file on DAX, and of no other, so that the test cannot have them."""
    has_ended(host)
    with open(host.path("a.img"), "rb") as file, inode.append_only(file.fileno()):
        os.utime(file.fileno())
    host.another().reconcile()
    assert goes_on(host)


def test_a_write_in_the_second_in_which_the_guest_has_ended_is_seen(whole_seconds: Host) -> None:
    has_ended(whole_seconds)
    whole_seconds.driver.reconcile()
    assert modified(whole_seconds) > LONG_AGO * 10**9
    assert goes_on(whole_seconds)
    Path(whole_seconds.path("a.img")).write_bytes(bytes(SIZE))
    assert not goes_on(whole_seconds)


def test_the_second_that_files_get_is_waited_for_once(whole_seconds: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written in that second has the same time."""
    slept: list[float] = []
    domain = whole_seconds.domain("a.img")
    second = replace(domain.nvdimms[0], slot=1, path=whole_seconds.path("b.img"))
    two = replace(domain, nvdimms=(*domain.nvdimms, second))
    whole_seconds.driver.define(two)
    whole_seconds.run(two)
    whole_seconds.mapper.alive.clear()
    now = time.time_ns()
    clock = SimpleNamespace(sleep=slept.append, time_ns=lambda: now + round(sum(slept) * 10**9))
    monkeypatch.setattr(fsdax, "time", clock)
    whole_seconds.another().reconcile()
    assert (modified(whole_seconds), modified(whole_seconds, "b.img")) == 2 * ((now // 10**9 + 1) * 10**9,)
    assert len(slept) == 1
    assert clock.time_ns() // 10**9 == now // 10**9 + 2


def test_each_end_has_a_time_of_its_own_though_the_clock_was_set_back(host: Host) -> None:
    """An earlier copy, with a time of before that, is not taken for what the guest has written."""
    for time_before in (LATER, LATER + 1):
        has_ended(host, written=time_before)
        host.driver.reconcile()
        assert modified(host) // 10**9 == time_before + 1
        assert goes_on(host)


def test_a_time_in_the_future_is_not_waited_for(whole_seconds: Host) -> None:
    """What is written next has the present time."""
    has_ended(whole_seconds, written=LATER)
    whole_seconds.driver.reconcile()
    assert modified(whole_seconds) < time.time_ns()
    assert goes_on(whole_seconds)


def test_cp_u_copies_what_a_guest_wrote_after_an_earlier_copy(host: Host, tmp_path: Path) -> None:
    """That copy was made while the guest ran: it is newer than the file, until the guest has ended."""
    copy = ("cp", "-u", host.path("a.img"), str(tmp_path / "a.img"))
    has_ended(host)
    run(*copy)
    run("chattr", "-i", host.path("a.img"))
    with open(host.path("a.img"), "r+b", buffering=0) as file:
        file.write(b"changed")
    os.utime(host.path("a.img"), (LONG_AGO, LONG_AGO))
    run("chattr", "+i", host.path("a.img"))
    host.driver.reconcile()
    run(*copy)
    assert (tmp_path / "a.img").read_bytes()[:7] == b"changed"


def test_a_file_that_was_written_before_it_is_thawed_keeps_that_time(host: Host) -> None:
    """A process has left it mutable, and something has frozen it again since."""
    host.define("a.img")
    host.backing.freeze(host.path("a.img"))
    before = modified(host)
    host.backing.thaw_unless(host.path("a.img"), lambda _: False, touch=Touch((before - 1,), before + 10**9))
    assert (modified(host), is_immutable(host.path("a.img"))) == (before, False)


def copied_within_its_file_system(xfs: Host) -> None:
    """Back a saved guest's file up with cp, which makes a reflink on XFS."""
    has_ended(xfs)
    xfs.driver.reconcile()
    run("cp", "--reflink=always", xfs.path("a.img"), xfs.path("copy"))


def repair(host: Host) -> None:
    (found,) = look(host.driver)
    assert (found.remedy, found.mend is not None) == ("copy what is shared", True)
    assert found.mend
    found.mend()
    assert look(host.driver) == []


def test_a_saved_guest_goes_on_after_a_repair_has_copied_what_its_file_shared(xfs: Host) -> None:
    copied_within_its_file_system(xfs)
    before = modified(xfs)
    repair(xfs)
    assert xfs.read("a.img") == xfs.read("copy")
    assert modified(xfs) == before
    assert goes_on(xfs)


def test_a_saved_guest_goes_on_though_such_a_repair_was_killed(xfs: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    copied_within_its_file_system(xfs)
    write = os.pwrite

    def dies(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGKILL)

    (found,) = look(xfs.driver)
    assert found.mend
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", dies)
        killed(found.mend)
    if look(xfs.driver):  # the killed process may have copied all
        repair(xfs)
    assert goes_on(xfs)


@pytest.mark.parametrize("way", ["before", "meanwhile"])
def test_what_is_written_to_a_file_that_shares_blocks_is_seen(
    xfs: Host, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    copied_within_its_file_system(xfs)

    def write(*_: object) -> None:
        with open(xfs.path("a.img"), "r+b") as file:
            file.write(b"changed")

    if way == "before":
        write()
    else:
        monkeypatch.setattr(inode, "set_copy_size", write)
    repair(xfs)
    assert xfs.read("a.img")[:7] == b"changed"
    assert not goes_on(xfs)
