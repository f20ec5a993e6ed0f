# SPDX-License-Identifier: Apache-2.0
"""Who can still write a frozen file, or read what a guest writes to it, on real ext4 and XFS."""

from __future__ import annotations

import json
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.backing import inode
from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import BackingError, InUseError, RefusedError
from nvdimm_driver.model import MIB, DomainSpec, NvdimmSpec, Touch
from nvdimm_driver.plugins import DOUBTFUL
from nvdimm_driver.state.ledger import Ledger
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import DATA, SIZE, Host, empty, is_immutable, killed
from tests.unit.doubles import OTHER_UUID, UUID


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems[request.param])
    empty(file_systems[request.param])


@pytest.fixture
def xfs(tmp_path: Path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:
    yield Host(tmp_path, file_systems["xfs"])
    empty(file_systems["xfs"])


class Writer:
    """A program that may write a file, by what it has opened or mapped."""

    def __init__(self, path: str, way: str, flags: int = 0) -> None:
        ready, told = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                fd = os.open(path, os.O_RDWR | flags)
                if way == "mapping":
                    mapping = mmap.mmap(fd, SIZE)
                    os.close(fd)
                    assert len(mapping) == SIZE
                os.write(told, b"x")
                signal.pause()
            finally:
                os._exit(1)
        os.close(told)
        assert os.read(ready, 1)
        os.close(ready)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.mark.parametrize("way", ["descriptor", "mapping"])
def test_a_file_that_a_program_may_write_is_for_no_guest(host: Host, way: str) -> None:
    host.define("a.img")
    child = Writer(host.path("a.img"), way)
    with pytest.raises(InUseError, match=rf"a\.img: process {child.pid} .* may write it"):
        host.driver.prepare(host.domain("a.img"))
    child.end()
    assert host.record().start is None
    host.driver.prepare(host.domain("a.img"))


def test_a_file_that_a_program_reads_is_for_a_guest(host: Host) -> None:
    host.define("a.img")
    with open(host.path("a.img"), "rb"):
        host.driver.prepare(host.domain("a.img"))


def test_xfs_lets_a_program_write_what_was_made_immutable_since(xfs: Host) -> None:
    """The fact that the check is for; ext4 refuses the write."""
    xfs.define("a.img")
    with open(xfs.path("a.img"), "r+b", buffering=0) as file:
        xfs.backing.freeze(xfs.path("a.img"))
        os.pwrite(file.fileno(), b"changed", 0)
        os.ftruncate(file.fileno(), 4096)
    assert os.path.getsize(xfs.path("a.img")) == 4096
    with open(xfs.path("a.img"), "rb") as file:
        assert inode.is_immutable(file.fileno())
        assert not inode.has_writer(file.fileno())


def test_what_a_reflink_shares_is_copied_by_check(xfs: Host) -> None:
    xfs.run(xfs.domain("a.img"))
    with open(xfs.path("a.img"), "rb") as file:
        inode.thaw(file.fileno())
    with open(xfs.path("a.img"), "r+b") as file:  # in its place
        file.write(DATA)
    xfs.backing.freeze(xfs.path("a.img"))
    run("cp", "--reflink=always", xfs.path("a.img"), xfs.path("clone"))  # XFS lets it be made of an immutable file
    (found,) = look(xfs.driver)
    assert (found.domain, found.mend) == ("x", None), "the guest has these blocks"
    assert found.problem == "it shares blocks with another file (reflink)"
    assert found.remedy == (
        "the reader of that copy sees what the guest writes: delete the copy, and not this file; for a backup, shut "
        "the domain down, and make it with 'nvdimmctl export'"
    )

    xfs.mapper.alive.clear()
    xfs.driver.release(xfs.record().uuid)
    with pytest.raises(BackingError, match="nvdimmctl check' says"):
        xfs.driver.prepare(xfs.domain("a.img"))
    found, copy = look(xfs.driver)
    assert (found.path, found.remedy) == (xfs.path("a.img"), "copy what is shared")
    assert (copy.path, copy.problem, copy.mend) == (xfs.path("clone"), DOUBTFUL, None), "it is no backup"
    assert found.mend
    found.mend()
    os.unlink(xfs.path("clone"))
    assert look(xfs.driver) == []
    identity = xfs.record().allocations[0].identity
    assert xfs.backing.locate(xfs.domain("a.img").nvdimms[0]).identity == identity
    assert xfs.read("a.img") == DATA
    xfs.driver.prepare(xfs.domain("a.img"))


def test_a_shared_file_is_not_copied_under_a_start(xfs: Host) -> None:
    xfs.define("a.img")
    run("cp", "--reflink=always", xfs.path("a.img"), xfs.path("clone"))
    item = xfs.record().allocations[0]
    with xfs.backing.open_bytes(item.spec, write=True), pytest.raises(InUseError, match="is being overwritten"):
        xfs.backing.unshare(item.spec, item.identity)


def modified(host: Host, name: str = "a.img") -> int:
    return os.stat(host.path(name)).st_mtime_ns


def test_a_backup_sees_that_a_guest_has_run(host: Host) -> None:
    """A guest's stores do not change the time by which rsync and cp -u find what is new."""
    host.define("a.img")
    before = modified(host)
    host.run(host.domain("a.img"))
    assert modified(host) == before
    host.mapper.alive.clear()
    host.driver.reconcile()
    assert modified(host) > before
    assert not is_immutable(host.path("a.img"))
    run = host.driver.ledger.find_run(UUID)
    assert run is not None
    assert json.loads(run.written) == {"0": modified(host)}


def test_a_start_that_maps_nothing_leaves_the_time(host: Host) -> None:
    """A saved guest that was to go on may be tried again."""
    host.define("a.img")
    before = modified(host)
    host.driver.prepare(host.domain("a.img"))
    host.driver.release(UUID)
    assert modified(host) == before


@pytest.mark.parametrize("step", ["note_written", "end_start"])
def test_what_is_written_after_a_file_was_thawed_is_seen_though_the_end_was_killed(
    host: Host, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A repeated end does not take the time of that write for its own."""
    host.define("a.img")
    host.run(host.domain("a.img"))
    host.mapper.alive.clear()

    def end() -> None:
        monkeypatch.setattr(Ledger, step, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        host.another().reconcile()

    killed(end)
    thawed = step == "end_start"
    assert is_immutable(host.path("a.img")) is not thawed
    if thawed:
        Path(host.path("a.img")).write_bytes(DATA)
    host.driver.reconcile()
    assert host.record().start is None
    run = host.driver.ledger.find_run(UUID)
    assert run is not None
    assert (json.loads(run.written) == {"0": modified(host)}) is not thawed


@pytest.mark.parametrize("step", ["note_written", "thaw_unless", "end_start"])
def test_a_saved_guest_goes_on_though_two_processes_have_put_its_start_away(
    host: Host, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The hook's release, and nvdimmd's reconcile for any client, which is late with its thaw."""
    host.define("a.img")
    host.run(host.domain("a.img"))
    host.mapper.alive.clear()
    start, late = host.record().start, host.another()
    assert start
    thaw = late.backings[0].thaw_unless
    owner = host.driver.ledger if hasattr(host.driver.ledger, step) else host.driver.backings[0]
    begin = getattr(owner, step)

    def overtaken(*arguments: Any) -> None:
        def overtake(*words: Any, **options: Any) -> object:
            thaw(*arguments)
            return begin(*words, **options)

        monkeypatch.setattr(owner, step, overtake)
        host.driver.starts.put_away(start, kind="released")

    monkeypatch.setattr(late.backings[0], "thaw_unless", overtaken)
    late.starts.put_away(start, kind="put-away")
    host.driver.check_restore(UUID)
    Path(host.path("a.img")).write_bytes(DATA)
    with pytest.raises(RefusedError, match="was written on the host"):
        host.driver.check_restore(UUID)


def test_a_file_of_a_guest_that_runs_stays_immutable_when_another_start_with_it_ends(host: Host) -> None:
    """Both have it: the first one's ledger was lost meanwhile, say."""
    host.define("a.img")
    host.run(host.domain("a.img"))
    before = modified(host)
    host.backing.thaw_unless(host.path("a.img"), lambda _: True, touch=Touch((before,), 2 * before))
    assert modified(host) == before
    host.driver.starts.thaw_unknown(host.path("a.img"))
    assert (modified(host), is_immutable(host.path("a.img"))) == (before, True)


@pytest.mark.parametrize("redefined", [False, True], ids=["as defined", "redefined without it"])
def test_a_start_that_was_killed_has_no_other_domains_file_thawed(
    host: Host, redefined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a running guest's file is renamed to where the file of the killed start was."""
    for name in ("g", "g/x", "g/p"):
        os.mkdir(host.path(name))
    host.run(host.domain("g/x/v.img"))
    evil = DomainSpec("evil", OTHER_UUID, 512 * MIB, None, (NvdimmSpec(0, host.path("g/p/v.img"), SIZE),))
    host.driver.define(evil)
    with monkeypatch.context() as patch:
        patch.setattr(FsdaxBacking, "freeze_for", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        killed(lambda: host.another().prepare(evil))
    host.driver.drop_claims(OTHER_UUID)
    if redefined:
        host.driver.drop_claims(UUID)
    os.rename(host.path("g/p"), host.path("g/aside"))
    os.rename(host.path("g/x"), host.path("g/p"))
    host.driver.starts.abandoned_seconds = 0
    host.driver.reconcile()
    record = host.driver.ledger.find_domain(OTHER_UUID)
    assert record is None or record.start is None
    assert host.record().start
    assert is_immutable(host.path("g/p/v.img"))
