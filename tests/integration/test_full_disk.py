# SPDX-License-Identifier: Apache-2.0
"""A start when the file system of the driver's state is full to the last byte; real tmpfs, ext4 and XFS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvdimm_driver.backing.locks import Locks
from nvdimm_driver.cmd.device_model import Log, attach
from nvdimm_driver.doctor.storage import check_state
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, FullDiskError, LedgerError
from nvdimm_driver.labels.servers import LabelServers
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.reserve import SIZE, SLICE
from tests.integration.loop_pmem import run
from tests.unit.doubles import OTHER_UUID, UUID, MemoryBacking, RecordingMapper, domain, make_driver

A, B = "/mnt/pmem0/a", "/mnt/pmem0/b"
LOGGING = """
import logging, sys
from nvdimm_driver import conf, logs
logs.to_file("hook", conf.load([sys.argv[1]]))
logging.getLogger("nvdimm_driver").error("a line")
"""


class Disk:
    """A small file system, and a host with the driver's state in it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.root = folder / "mnt"
        self.root.mkdir()
        if kind == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", "size=80m", "none", self.root)
        else:
            image = folder / "image"
            image.touch()
            os.truncate(image, 320 << 20)
            run(f"mkfs.{kind}", "-q", image)
            run("mount", "-o", "loop", image, self.root)
        self.state = self.root / "state"
        self.state.mkdir()
        self.backing, self.mapper = MemoryBacking(), RecordingMapper()
        self.reports: list[str] = []

    def driver(self) -> XenNvdimmDriver:
        """Return the driver as another process has it."""
        return make_driver(self.state, self.backing, self.mapper)

    def fill(self) -> None:
        """Fill it to the last byte."""
        with open(self.root / "filler", "ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass
        run("sync", "-f", self.root)

    def prepare(self) -> None:
        driver = self.driver()
        driver.prepare(domain(A))
        driver.ledger.close()

    def attach(self, domid: int) -> None:
        def no_server(*_: object) -> None:
            raise AssertionError("this guest needs no label server")

        self.mapper.alive = {domid: UUID}
        log = Log(str(self.root / "log"))
        ledger = Ledger(str(self.state / "ledger.sqlite"), log)
        driver = self.driver()
        attach(domid, ledger, self.mapper, str(self.state), driver.prepare_known, no_server, log=log)
        driver.ledger.close()
        ledger.close()

    def end(self) -> None:
        self.mapper.alive = {}
        driver = self.driver()
        driver.release(UUID)
        driver.ledger.close()


@pytest.fixture(params=["tmpfs", "ext4", "xfs"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    made = Disk(tmp_path, request.param)
    driver = made.driver()
    driver.ledger.reserve.keep()
    driver.define(domain(A))
    driver.ledger.close()
    made.prepare()
    made.attach(5)
    yield made
    run("umount", "-l", made.root)


def test_a_guest_reboots_again_and_again_whatever_takes_the_space(disk: Disk) -> None:
    for domid in range(6, 9):
        disk.fill()
        disk.end()
        disk.fill()
        disk.prepare()
        disk.fill()
        disk.attach(domid)
        assert disk.mapper.mapped[domid]
    assert disk.backing.frozen == {A}
    ledger = Ledger(str(disk.state / "ledger.sqlite"))
    assert ledger.has_mapped(UUID, 8)
    assert 0 < ledger.reserve.size() < SIZE
    ledger.close()
    os.truncate(disk.root / "filler", 0)
    driver = disk.driver()
    driver.ledger.reserve.keep()
    assert driver.ledger.reserve.size() == SIZE, "it is kept again when there is room"
    driver.ledger.close()


def test_without_a_slice_a_start_fails_and_the_error_says_why(disk: Disk) -> None:
    disk.end()
    os.unlink(disk.state / "ledger.sqlite-reserve")
    disk.fill()
    with pytest.raises(FullDiskError, match=r"the disk is full \(make room, and try again\)"):
        disk.prepare()
    assert disk.backing.frozen == set()
    os.truncate(disk.root / "filler", 0)
    disk.prepare()


def test_on_a_read_only_file_system_a_start_fails_and_the_error_says_why(disk: Disk) -> None:
    """Linux makes it so after an error (``errors=remount-ro``)."""
    disk.end()
    run("mount", "-o", "remount,ro", disk.root)
    with pytest.raises(LedgerError, match=r"cannot \w+ \S+: its file system is read-only"):
        disk.prepare()
    found = check_state(disk.state / "ledger.sqlite")
    assert "Read-only file system: no domain with NVDIMMs can start" in str(found)
    run("mount", "-o", "remount,rw", disk.root)
    disk.prepare()


def test_on_a_read_only_file_system_a_lock_says_why(disk: Disk) -> None:
    """That it is read-only, and not to run as root."""
    driver = disk.driver()
    driver.ledger.close()
    locks = Locks(disk.state / "locks")
    run("mount", "-o", "remount,ro", disk.root)
    with pytest.raises(LedgerError, match=r"define-\S+: its file system is read-only \(if Linux made it so"):
        driver.locks.changing(UUID)
    with (
        open(__file__, "rb") as file,
        pytest.raises(BackingError, match=r"Read-only file system \(if Linux made it so"),
        locks.freezing(file.fileno(), A),
    ):
        pass
    run("mount", "-o", "remount,rw", disk.root)
    driver.locks.changing(UUID).close()


def test_a_define_does_not_take_the_reserve_and_leaves_all_as_it_was(disk: Disk) -> None:
    driver = disk.driver()
    before = driver.ledger.domains()
    assert driver.ledger.reserve.size() == SIZE
    disk.fill()
    while driver.ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
        pass
    disk.fill()
    with pytest.raises(FullDiskError):
        driver.define(domain(A, B))
    assert driver.ledger.reserve.size() == SIZE
    assert driver.ledger.domains() == before
    driver.ledger.close()


def test_what_is_only_told_fails_nothing(disk: Disk, capfd: pytest.CaptureFixture[str]) -> None:
    os.unlink(disk.state / "ledger.sqlite-reserve")
    counter = LabelServers(disk.state).count_requests(UUID)
    told: list[str] = []
    ledger = Ledger(str(disk.state / "ledger.sqlite"), lambda event: told.append(event.kind))
    before = -1
    while ledger.last_event() != before:
        before = ledger.last_event()
        disk.fill()
        ledger.record_event("undefined", OTHER_UUID, {"kept": "x" * 4096})
    ledger.count_harvest(1.0)
    ledger.clear_fault(UUID)
    ledger.record_failure(UUID, FullDiskError("no room"))
    assert told[-1] == "start-failed"
    counter.add(failed=False)
    ledger.close()


def test_a_log_on_a_full_disk_fails_nothing(disk: Disk) -> None:
    conf = disk.state / "conf"
    conf.write_text(f"[DEFAULT]\nlog_file={disk.root}/other\n")
    disk.fill()
    done = subprocess.run([sys.executable, "-c", LOGGING, conf], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert f"cannot log to {disk.root}/other: No space left on device" in done.stderr


def test_a_slice_is_enough_for_several_starts() -> None:
    assert SIZE // SLICE >= 8
