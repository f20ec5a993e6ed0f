# SPDX-License-Identifier: Apache-2.0
"""A file system that fsfreeze(8) has frozen, on real ext4 and XFS: nobody waits for it, and what needs it is refused.

Who changes such a file system waits in the kernel, and cannot be killed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest

from nvdimm_driver.backing import locks
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import NvdimmError
from nvdimm_driver.model import MIB, DomainSpec, NvdimmSpec
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import FORK, SIZE, Host, empty, is_immutable, is_taken
from tests.unit.doubles import OTHER_UUID, UUID


@pytest.fixture(scope="module", params=sorted(MKFS))
def file_system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileSystem]:
    mounted = FileSystem(tmp_path_factory.mktemp(request.param), request.param)
    yield mounted
    mounted.close()


@pytest.fixture
def host(tmp_path: Path, file_system: FileSystem) -> Iterator[Host]:
    """Domain x has run, and nobody has put its start away; y has a file, too."""
    host = Host(tmp_path, file_system)
    host.define("b.img", OTHER_UUID)
    host.run(host.domain("a.img"))
    del host.mapper.alive[7]
    yield host
    empty(file_system)


@contextmanager
def frozen(file_system: FileSystem) -> Iterator[None]:
    """Freeze a file system. Whatever changes it waits, however long: so what it may take is short."""
    run("fsfreeze", "-f", file_system.root)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(locks, "FREEZE_SECONDS", 0.5)
            yield
    finally:
        run("fsfreeze", "-u", file_system.root)


def outcome(work: Callable[[], object]) -> str:
    """Return the error of some work, or "done"; or "waits", if its process waits for the file system."""
    told: SimpleQueue[str] = FORK.SimpleQueue()

    def tell() -> None:
        try:
            work()
            told.put("done")
        except NvdimmError as error:
            told.put(str(error))

    process = FORK.Process(target=tell, daemon=True)
    process.start()
    while process.is_alive():
        if _waits(process.pid):
            return "waits"
        time.sleep(0.01)
    return told.get()


def _waits(pid: int | None) -> bool:
    """Return True when a process waits in the kernel for a semaphore of a file system that is frozen."""
    try:
        return "percpu_rwsem_wait" in Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return False


def anew(host: Host, name: str) -> DomainSpec:
    return DomainSpec("z", "7c7b0e2e-4a6e-4f0e-9a3b-0000000000aa", 512 * MIB, None, (NvdimmSpec(0, name, SIZE),))


def test_what_needs_no_file_goes_on(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    with frozen(host.fs):
        for _ in range(2):
            assert outcome(host.driver.reconcile) == "done"
        assert outcome(lambda: look(host.driver)) == "done"
        assert outcome(host.driver.ledger.domains) == "done"
        host.driver.reconcile()
        assert f"{host.path('a.img')}: its file system takes no changes" in caplog.text
        record = host.driver.ledger.find_domain(UUID)
        assert record
        assert record.start
    wait_for_none(host)
    host.driver.reconcile()
    assert not is_immutable(host.path("a.img"))
    assert look(host.driver) == []


def wait_for_none(host: Host) -> None:
    """Wait until nobody waits for the file system any more, which was frozen."""
    while any(map(is_taken, (host.folder / "locks").glob("freeze-*"))):
        time.sleep(0.01)


CHANGES: dict[str, Callable[[Host, XenNvdimmDriver], object]] = {
    "start": lambda host, driver: driver.prepare(host.domain("b.img", OTHER_UUID)),
    "define of what is there": lambda host, driver: driver.define(anew(host, host.path("there.img"))),
    "define of a new file": lambda host, driver: driver.define(anew(host, host.path("new.img"))),
    "define of a hole": lambda host, driver: driver.define(anew(host, host.path("hole.img"))),
    "end of a start": lambda host, driver: driver.starts.put_away_if_over(driver.ledger.find_domain(UUID)),  # type: ignore[arg-type]
    "wipe": lambda host, driver: host.backing.open_bytes(NvdimmSpec(0, host.path("there.img"), SIZE), write=True),
    "provision": lambda host, driver: host.backing.provision(NvdimmSpec(0, host.path("new.img"), SIZE)),
    "import": lambda host, driver: host.backing.allocate(NvdimmSpec(0, host.path("new.img"), SIZE)),
    "import in place": lambda host, driver: host.backing.fill_holes(NvdimmSpec(0, host.path("hole.img"), SIZE)),
    "deletion": lambda host, driver: host.backing.discard(NvdimmSpec(0, host.path("there.img"), SIZE)),
    "move": lambda host, driver: host.backing.move(host.path("there.img"), host.path("new.img")),
    "extension": lambda host, driver: host.backing.extend(NvdimmSpec(0, host.path("there.img"), 2 * SIZE)),
    "unsharing": lambda host, driver: host.backing.unshare(NvdimmSpec(0, host.path("there.img"), SIZE)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_and_does_not_wait(host: Host, change: str) -> None:
    there, hole = Path(host.path("there.img")), Path(host.path("hole.img"))
    there.write_bytes(b"x" * SIZE)
    with hole.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
    run("sync", "-f", there)
    with frozen(host.fs):
        for _ in range(2):  # the second finds the process that waits
            told = outcome(lambda: CHANGES[change](host, host.driver))
            assert "its file system takes no changes" in told
            assert str(host.fs.root) in told
            assert "fsfreeze -u" in told


def test_nothing_is_refused_any_more_when_it_is_thawed(host: Host) -> None:
    with frozen(host.fs):
        assert "takes no changes: process" in outcome(lambda: host.backing.freeze(host.path("b.img")))
    wait_for_none(host)
    host.backing.freeze(host.path("b.img"))
    assert is_immutable(host.path("b.img"))
    host.backing.thaw(host.path("b.img"))
