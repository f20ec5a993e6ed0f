# SPDX-License-Identifier: Apache-2.0
"""The power fails a moment after a guest has ended, or a start has failed; on real ext4 and XFS.

The ledger is on another disk, and has all that was committed. Of the files' file system, all is lost that was not
synced: the tests go on with the image as the last fsync has left it, whatever the kernel has written since by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nvdimm_driver.doctor.repair import look
from nvdimm_driver.lifecycle.plan import Planner
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import Host, empty, is_immutable
from tests.integration.test_restored_ledger_real import repair
from tests.integration.test_restored_ledger_saved_real import boot, end
from tests.unit.doubles import UUID, boot_host

CutPower = Callable[[], None]


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    file_system = FileSystem(tmp_path_factory.mktemp("fs"), request.param)
    host = Host(tmp_path, file_system)
    os.mkdir(host.path("in"))
    host.driver.define(host.domain("in/a.img"))
    yield host
    empty(file_system)
    file_system.close()


@pytest.fixture
def cut_power(host: Host, monkeypatch: pytest.MonkeyPatch) -> CutPower:
    """Return what cuts the power; only what is synced by this process from now on is there afterwards."""
    sync, synced = os.fsync, host.fs.memory / "synced"

    def copy() -> None:
        run("cp", "--sparse=always", host.fs.image, synced)

    def then_copy(fd: int) -> None:
        sync(fd)
        if os.fstat(fd).st_dev == host.fs.device:
            copy()

    def cut() -> None:
        monkeypatch.setattr(os, "fsync", sync)
        host.fs.replace(synced)
        host.mapper.alive.clear()
        boot_host(monkeypatch, "the next")

    run("sync", "-f", host.fs.root)
    copy()
    monkeypatch.setattr(os, "fsync", then_copy)
    return cut


def test_what_a_guest_has_had_is_thawed_for_good(host: Host, cut_power: CutPower) -> None:
    boot(host, 5)
    image = end(host, 5)
    cut_power()
    assert look(host.driver) == []
    host.another().try_restore(UUID)
    boot(host, 7, image)


def test_what_a_guest_has_had_can_be_released(host: Host, cut_power: CutPower) -> None:
    boot(host, 5)
    end(host, 5)
    cut_power()
    host.another().forget(UUID)


def test_no_change_of_a_domain_makes_its_file_immutable(host: Host, cut_power: CutPower) -> None:
    boot(host, 5)
    end(host, 5)
    cut_power()
    host.another().define(host.domain("in/a.img", ram=256 << 20))
    assert not is_immutable(host.path("in/a.img"))


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("failed", ["a start", "a trial"])
def test_a_saved_guest_goes_on_after_a_start_that_has_failed(
    host: Host, cut_power: CutPower, monkeypatch: pytest.MonkeyPatch, failed: str, repaired: bool
) -> None:
    """Nobody has written the file, which must not have the number of that start any more: the ledger forgets it."""
    boot(host, 5)
    image = end(host, 5)
    if failed == "a trial":
        host.another().try_restore(UUID)
    else:
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Planner, "plan_start", _interrupted)
            host.another().prepare(host.domain("in/a.img"))
    cut_power()
    if repaired:
        assert repair(host) == []
    host.another().try_restore(UUID)
    boot(host, 7, image)


def _interrupted(*args: object, **options: object) -> None:
    raise KeyboardInterrupt
