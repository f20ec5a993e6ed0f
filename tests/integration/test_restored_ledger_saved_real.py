# SPDX-License-Identifier: Apache-2.0
"""Guests that were saved, and a ledger from a backup, which does not know who has had their files since; ext4 and XFS.

A file that is immutable for a guest has the number of the run that it was made so for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from nvdimm_driver.backing import inode
from nvdimm_driver.backing.fsdax import FsdaxBacking
from nvdimm_driver.cmd.device_model import attach
from nvdimm_driver.doctor import repair_ledger
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.errors import BackingError, InUseError, NvdimmError, RefusedError
from nvdimm_driver.lifecycle.plan import Planner
from nvdimm_driver.lifecycle.start import Starts
from nvdimm_driver.model import DomainSpec, NvdimmSpec
from nvdimm_driver.state.start_steps import StartSteps
from tests.integration.loop_pmem import MKFS, FileSystem, run
from tests.integration.test_ownership_real import SIZE, Host, empty, is_immutable
from tests.integration.test_restored_ledger_real import back_up, repair, restore
from tests.unit.doubles import UUID, boot_host

Image = dict[int, bytes]


@pytest.fixture(params=list(MKFS))
def host(request: pytest.FixtureRequest, tmp_path, file_systems: dict[str, FileSystem]) -> Iterator[Host]:  # type: ignore[no-untyped-def]
    host = Host(tmp_path, file_systems[request.param])
    os.mkdir(host.path("in"))
    host.driver.define(host.domain("in/a.img"))
    yield host
    empty(file_systems[request.param])


def boot(host: Host, domid: int, image: Image | None = None, domain: DomainSpec | None = None) -> None:
    """Boot the domain, or have a saved guest go on."""
    driver = host.another()
    driver.prepare(domain or host.domain("in/a.img"))
    host.mapper.alive[domid] = UUID
    if image is not None:
        host.mapper.memory[domid] = dict(image)
    restored = image is not None
    attach(domid, driver.ledger, host.mapper, str(host.folder), driver.prepare_known, _no_labels, restored=restored)
    if not restored:
        host.mapper.boot(domid)


def _no_labels(folder: str, domid: int, uuid: str) -> None:
    raise AssertionError


def end(host: Host, domid: int) -> Image:
    """End the guest, as its save does; return its memory."""
    del host.mapper.alive[domid]
    host.another().release(UUID)
    return host.mapper.memory[domid]


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("backup", ["while it ran", "while it was saved"])
def test_a_saved_guest_goes_on_once_though_its_ledger_comes_back(host: Host, backup: str, repaired: bool) -> None:
    boot(host, 5)
    if backup == "while it ran":
        back_up(host)
    image = end(host, 5)
    if backup == "while it was saved":
        back_up(host)
    boot(host, 6, image)
    restore(host)
    end(host, 6)
    if repaired:
        assert repair(host) == []
    with pytest.raises(RefusedError, match="cannot go on"):
        boot(host, 7, image)
    host.another().release(UUID)
    assert not is_immutable(host.path("in/a.img"))


def test_a_saved_guest_goes_on_once_though_the_start_that_comes_back_was_only_prepared(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot(host, 5)
    image = end(host, 5)
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(host.driver.planner, "plan_start", _killed)
        patch.setattr(host.driver.starts, "put_away", lambda start: None)
        host.driver.prepare(host.domain("in/a.img"))
    back_up(host)
    boot(host, 6, image)
    restore(host)
    end(host, 6)
    with pytest.raises(RefusedError, match="cannot go on"):
        boot(host, 7, image)


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("step", ["begin_mapping", "finish_mapping"])
def test_a_saved_guest_goes_on_once_though_the_ledger_that_comes_back_has_not_seen_it_run(
    host: Host, monkeypatch: pytest.MonkeyPatch, step: str, repaired: bool
) -> None:
    """The backup was made while the guest was restored, which takes minutes; its file has the number of that start."""
    boot(host, 5)
    image = end(host, 5)
    back_up_before(host, monkeypatch, step, image)
    put_back(host)
    if repaired:
        found = [each for each in look(host.driver) if "is from a backup" in each.problem]
        assert [each.problem.partition(",")[0] for each in found] == ["its guest runs with domid 6"]
        monkeypatch.setattr(Starts, "abandoned_seconds", 0)  # until then, its device model might be mapping still
        take_over(host)
    end(host, 6)
    with pytest.raises(RefusedError, match="cannot go on"):
        boot(host, 7, image)


@pytest.mark.parametrize("accepted", [False, True])
def test_a_ledger_is_taken_over_with_no_start_that_may_have_run_since(
    host: Host, monkeypatch: pytest.MonkeyPatch, accepted: bool
) -> None:
    """The guest has ended, and that was not put away: its file has the number that the ledger has for its start."""
    boot(host, 5)
    image = end(host, 5)
    back_up_before(host, monkeypatch, "begin_mapping", image)
    put_back(host)
    host.mapper.announce(6, ())
    del host.mapper.alive[6]
    assert look(host.driver) == []
    if accepted:
        repair_ledger.take_over(host.driver, [UUID])
    else:
        with pytest.raises(InUseError, match=r"starting, now or when the ledger's backup was made: "):
            repair_ledger.take_over(host.driver)
    monkeypatch.setattr(Starts, "abandoned_seconds", 0)
    assert repair(host) == []
    assert host.record().start is None
    repair_ledger.take_over(host.driver)
    with pytest.raises(RefusedError, match="cannot go on"):
        boot(host, 7, image)


@pytest.mark.parametrize("domid", [5, 6], ids=["the same domid", "another domid"])
def test_a_guest_that_is_saved_after_the_repair_of_a_ledger_of_before_a_boot_goes_on(
    host: Host, monkeypatch: pytest.MonkeyPatch, domid: int
) -> None:
    """Domids begin anew at each boot: the guest of now may have the one that the ledger has of then."""
    boot_host(monkeypatch, "one")
    boot(host, 5)
    back_up(host)
    image = end(host, 5)
    boot_host(monkeypatch, "two")
    boot(host, domid, image)
    put_back(host)
    take_over(host)
    saved = end(host, domid)
    host.another().check_restore(UUID)
    boot(host, 8, saved)


def back_up_before(host: Host, monkeypatch: pytest.MonkeyPatch, step: str, image: Image) -> None:
    """Have a saved guest go on, and copy the ledger before that step."""
    real = getattr(StartSteps, step)

    def copy_first(*args: Any, **options: Any) -> object:
        back_up(host)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StartSteps, step, copy_first)
        boot(host, 6, image)


def put_back(host: Host) -> None:
    """Rename the copy of the ledger to its name."""
    host.driver.ledger.close()
    for file in host.folder.glob("ledger.sqlite*"):
        file.unlink()
    (host.folder / "backup").rename(host.folder / "ledger.sqlite")
    host.driver = host.another()


def take_over(host: Host) -> None:
    """Repair, as 'check --repair' does; the ledger is the one in use then."""
    assert repair(host) == []
    host.driver.ledger.take_over(compared=True)


def _killed(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_a_saved_guest_goes_on_after_a_start_that_has_failed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file was frozen for another run, which the ledger knows."""
    boot(host, 5)
    image = end(host, 5)
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Planner, "plan_start", _killed)
        host.another().prepare(host.domain("in/a.img"))
    boot(host, 6, image)


def test_a_saved_guest_goes_on_though_its_file_was_away_at_its_end(host: Host) -> None:
    """It is immutable still, for the guest's own run."""
    boot(host, 5)
    os.rename(host.path("in"), host.path("away"))
    image = end(host, 5)
    os.rename(host.path("away"), host.path("in"))
    assert host.record().start is None
    assert is_immutable(host.path("in/a.img"))
    boot(host, 6, image)


@contextmanager
def unmounted(host: Host) -> Iterator[None]:
    """Let the file system of a host be away, as after a boot with an entry in fstab that has nofail."""
    run("mount", "-t", "tmpfs", "none", host.fs.root)
    yield
    run("umount", host.fs.root)


def lose_power(host: Host, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Let the host lose power at that step of a start; nothing of the domain is thawed then."""
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(StartSteps, step, _killed)
        patch.setattr(Starts, "put_away", lambda start, *args, **options: None)
        host.mapper.memory[6] = {}
        boot(host, 6, {})
    host.mapper.alive.clear()


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize(
    ("step", "numbered"),
    [("finish_preparing", True), ("find_prepared", True), ("find_prepared", False)],
    ids=["while it was prepared", "after that", "after that, by the version before"],
)
def test_a_saved_guest_goes_on_after_a_start_that_a_loss_of_power_has_ended(
    host: Host, monkeypatch: pytest.MonkeyPatch, step: str, numbered: bool, repaired: bool
) -> None:
    """libxl reads the guest's RAM for minutes, and nobody has written the file, which is away when the host is up."""
    boot(host, 5)
    image = end(host, 5)
    with monkeypatch.context() as patch:
        if not numbered:
            patch.setattr(inode, "_set_run", lambda fd, run: None)
        lose_power(host, patch, step)
    boot_host(monkeypatch, "the next")
    with unmounted(host):
        host.another().reconcile()
        with pytest.raises(NvdimmError):
            host.another().prepare(host.domain("in/a.img"))
    assert host.record().start is None
    assert is_immutable(host.path("in/a.img"))
    if repaired:
        assert repair(host) == []
        assert not is_immutable(host.path("in/a.img"))
    for _ in range(2):
        host.another().try_restore(UUID)
    boot(host, 7, image)
    assert host.driver.ledger.never_run(UUID) == set()


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("at", ["its path", "another path"])
def test_a_repair_costs_no_saved_guest_whose_file_was_away_at_its_end(host: Host, at: str, written: bool) -> None:
    """Nobody but the guest has written the file; its time changes, by which backups see what the guest has written."""
    boot(host, 5)
    before = os.stat(host.path("in/a.img")).st_mtime_ns
    os.rename(host.path("in"), host.path("away"))
    image = end(host, 5)
    if at == "its path":
        os.rename(host.path("away"), host.path("in"))
    assert [each.remedy for each in repair(host)] == ([] if at == "its path" else ["move it back"])
    if at == "another path":
        os.rename(host.path("away"), host.path("in"))
    assert not is_immutable(host.path("in/a.img"))
    assert os.stat(host.path("in/a.img")).st_mtime_ns > before
    if written:
        os.utime(host.path("in/a.img"))
        with pytest.raises(RefusedError, match="was written on the host"):
            host.another().try_restore(UUID)
        return
    host.another().try_restore(UUID)
    boot(host, 6, image)


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("fault", ["killed", "read-only"])
def test_a_saved_guest_goes_on_though_its_file_was_away_when_its_end_was_repeated(
    host: Host, monkeypatch: pytest.MonkeyPatch, fault: str, repaired: bool
) -> None:
    """The time that the file was to have was noted, and it could not be thawed; it was unmounted for fsck, say."""
    boot(host, 5)
    image = host.mapper.memory[5]
    if fault == "killed":
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Starts, "thaw", _killed)
            end(host, 5)
    else:
        run("mount", "-o", "remount,ro", host.fs.root)
        try:
            with pytest.raises(BackingError, match="Read-only file system"):
                end(host, 5)
        finally:
            run("mount", "-o", "remount,rw", host.fs.root)
    assert host.record().start is not None
    with unmounted(host):
        host.another().reconcile()
    assert host.record().start is None
    if repaired:
        assert repair(host) == []
    host.another().try_restore(UUID)
    boot(host, 7, image)


@pytest.mark.parametrize("thawed", ["both", "the first"])
def test_a_saved_guest_goes_on_though_a_file_was_thawed_before_it_was_away_at_the_repeated_end(
    host: Host, monkeypatch: pytest.MonkeyPatch, thawed: str
) -> None:
    """The end was killed once it had thawed both files, or could not thaw the second one."""
    domain = host.domain("in/a.img")
    domain = replace(domain, nvdimms=(*domain.nvdimms, NvdimmSpec(1, host.path("in/b.img"), SIZE)))
    host.driver.define(domain)
    boot(host, 5, domain=domain)
    image = host.mapper.memory[5]
    thaw = FsdaxBacking.thaw_unless

    def fails(backing: FsdaxBacking, path: str, *args: Any, **options: Any) -> None:
        if path.endswith("b.img"):
            raise BackingError(f"{path}: Input/output error")
        thaw(backing, path, *args, **options)

    with monkeypatch.context() as patch:
        if thawed == "both":
            patch.setattr(StartSteps, "end_start", _killed)
        else:
            patch.setattr(FsdaxBacking, "thaw_unless", fails)
        with pytest.raises((BackingError, KeyboardInterrupt)):
            end(host, 5)
    with unmounted(host):
        host.another().reconcile()
    assert host.record().start is None
    host.another().try_restore(UUID)
    boot(host, 7, image, domain)


@pytest.mark.parametrize("step", ["before it is thawed", "before it has lost its mark", "after that"])
def test_a_saved_guest_goes_on_though_the_repair_of_its_file_was_killed(
    host: Host, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    boot(host, 5)
    os.rename(host.path("in"), host.path("away"))
    image = end(host, 5)
    os.rename(host.path("away"), host.path("in"))
    thaw = FsdaxBacking.thaw_unless

    def thaw_and_die(*args: Any, **options: Any) -> None:
        thaw(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        if step == "before it has lost its mark":
            patch.setattr(os, "removexattr", _killed)
        else:
            patch.setattr(FsdaxBacking, "thaw_unless", thaw_and_die if step == "after that" else _killed)
        repair(host)
    assert repair(host) == []
    assert look(host.another()) == []
    host.another().try_restore(UUID)
    boot(host, 7, image)


@pytest.mark.parametrize("opened", [False, True])
def test_a_repair_does_not_take_for_the_guests_what_was_written_while_its_file_counted_as_immutable(
    host: Host, opened: bool
) -> None:
    """The flag was taken away by hand; a program has written the file, or may do so."""
    boot(host, 5)
    os.rename(host.path("in"), host.path("away"))
    end(host, 5)
    os.rename(host.path("away"), host.path("in"))
    run("chattr", "-i", host.path("in/a.img"))
    with open(host.path("in/a.img"), "r+b", buffering=0) as file:
        if not opened:
            file.write(b"changed")
            file.close()
        assert repair(host) == []
    with pytest.raises(RefusedError, match="was written on the host"):
        host.another().try_restore(UUID)


@pytest.mark.parametrize("number", [4711, None])
def test_a_repair_lets_no_saved_guest_go_on_over_what_an_unknown_guest_has_had(host: Host, number: int | None) -> None:
    boot(host, 5)
    end(host, 5)
    host.backing.freeze_for(host.path("in/a.img"), number)
    assert repair(host) == []
    with pytest.raises(RefusedError, match="was written on the host"):
        host.another().try_restore(UUID)


def test_a_repair_leaves_the_time_of_a_file_at_another_path_whose_start_never_ran(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot(host, 5)
    image = end(host, 5)
    lose_power(host, monkeypatch, "find_prepared")
    boot_host(monkeypatch, "the next")
    os.rename(host.path("in"), host.path("away"))
    host.another().reconcile()
    assert [each.remedy for each in repair(host)] == ["move it back"]
    os.rename(host.path("away"), host.path("in"))
    host.another().try_restore(UUID)
    boot(host, 7, image)


def test_a_saved_guest_goes_on_though_a_file_of_that_name_is_immutable_for_another_domains_guest(
    host: Host, monkeypatch: pytest.MonkeyPatch, file_systems: dict[str, FileSystem]
) -> None:
    """A restore is cut off by a loss of power; at the boot, another file system is mounted in the place of the pool."""
    boot(host, 5)
    image = end(host, 5)
    lose_power(host, monkeypatch, "find_prepared")
    boot_host(monkeypatch, "the next")
    other = next(each for each in file_systems.values() if each is not host.fs)
    (other.root / "in").mkdir()
    (other.root / "in/a.img").write_bytes(bytes(4096))
    with open(other.root / "in/a.img", "rb") as namesake:
        inode.freeze(namesake.fileno(), 4711)
    run("mount", "--bind", other.root, host.fs.root)
    try:
        host.another().reconcile()
        assert is_immutable(host.path("in/a.img"))
    finally:
        run("umount", host.fs.root)
        empty(other)
    assert host.record().start is None
    host.another().try_restore(UUID)
    boot(host, 7, image)


@pytest.mark.parametrize("step", ["begin_mapping", "finish_mapping"])
def test_a_start_of_a_ledger_from_a_backup_may_have_run_since_though_its_file_is_away(
    host: Host, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    boot(host, 5)
    image = end(host, 5)
    back_up_before(host, monkeypatch, step, image)
    put_back(host)
    boot_host(monkeypatch, "the next")
    host.mapper.alive.clear()
    with unmounted(host):
        host.another().reconcile()
    assert host.record().start is None
    take_over(host)
    with pytest.raises(RefusedError, match="cannot go on"):
        host.another().check_restore(UUID)
    with pytest.raises(RefusedError, match="cannot go on"):
        boot(host, 7, image)


def test_a_trial_spoils_no_saved_guest_for_one_that_the_ledger_does_not_know(host: Host) -> None:
    """Before, it said that the guest could go on, libvirt removed the managed save, and the start was refused."""
    boot(host, 5)
    end(host, 5)
    before = host.driver.ledger.find_run(UUID)
    host.backing.freeze_for(host.path("in/a.img"), 12345)
    with pytest.raises(RefusedError, match="img is immutable for a guest that the ledger does not know"):
        host.another().try_restore(UUID)
    assert host.driver.ledger.find_run(UUID) == before
    assert is_immutable(host.path("in/a.img"))


def test_a_trial_refuses_a_saved_guest_whose_file_the_operator_has_made_immutable(host: Host) -> None:
    """Before libvirt removes the managed save."""
    boot(host, 5)
    image = end(host, 5)
    run("chattr", "+i", host.path("in/a.img"))
    for trial in (host.driver.check_restore, host.driver.try_restore):
        with pytest.raises(BackingError, match="and not by the driver"):
            trial(UUID)
    run("chattr", "-i", host.path("in/a.img"))
    host.another().try_restore(UUID)
    boot(host, 6, image)


def test_a_domain_is_not_started_beside_its_guest_that_the_ledger_does_not_know(host: Host) -> None:
    """Xen has it, and libvirt has lost track of it."""
    back_up(host)
    boot(host, 5)
    restore(host)
    with pytest.raises(InUseError, match="already has its NVDIMMs, as domid 5"):
        host.driver.prepare(host.domain("in/a.img"))
    assert is_immutable(host.path("in/a.img"))


def test_a_file_that_is_frozen_again_keeps_the_number_of_its_run(host: Host) -> None:
    """A repair makes it immutable for the guest that has it."""
    boot(host, 5)
    (before,) = host.backing.survey([host.fs.root.as_posix()])
    host.backing.thaw(host.path("in/a.img"))
    (found,) = [each for each in look(host.driver) if each.problem == "a guest has it, and it is not immutable"]
    assert found.mend is not None
    found.mend()
    (after,) = host.backing.survey([host.fs.root.as_posix()])
    assert after.run == before.run is not None
    image = end(host, 5)
    boot(host, 6, image)


@pytest.mark.parametrize("killed", [False, True])
def test_an_older_copy_with_its_time_is_not_what_the_saved_guest_had(
    host: Host, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Of a file that is mutable again, the time that it had while its guest ran counts no more."""
    path = host.path("in/a.img")
    older = os.stat(path).st_mtime_ns
    boot(host, 5)
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr(StartSteps, "end_start", _killed)
            with pytest.raises(KeyboardInterrupt):
                end(host, 5)
        with unmounted(host):
            host.another().reconcile()
    else:
        end(host, 5)
    assert not is_immutable(path)
    with open(path, "r+b") as file:
        file.write(b"older bytes")
    os.utime(path, ns=(older, older))
    with pytest.raises(RefusedError, match="was written on the host"):
        host.another().try_restore(UUID)
