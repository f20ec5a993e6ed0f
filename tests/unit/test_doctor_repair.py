# SPDX-License-Identifier: Apache-2.0
"""The inconsistencies that check finds on a host in memory; tests/lab has them, and their repair, on real files."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest

from nvdimm_driver.cmd.ctl.check import _repair
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.doctor.repair_view import Inconsistency
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import InUseError
from nvdimm_driver.model import KIB, MIB, SUPERPAGE, Allocation, Location, NvdimmSpec, Pool
from nvdimm_driver.pools.rules import Pools
from tests.unit.doubles import OTHER_UUID, UUID, MemoryBacking, RecordingMapper, make_driver, map_prepared
from tests.unit.test_pools_rules import domain

POOL = Pool("main", "memory", ("/mnt/pmem0",), None, SUPERPAGE, 128 * KIB, False)
A, B, C = "/mnt/pmem0/a", "/mnt/pmem0/b", "/mnt/pmem0/c"


@pytest.fixture
def backing() -> MemoryBacking:
    return MemoryBacking()


@pytest.fixture
def mapper() -> RecordingMapper:
    return RecordingMapper()


@pytest.fixture
def driver(tmp_path: Path, backing: MemoryBacking, mapper: RecordingMapper) -> XenNvdimmDriver:
    driver = make_driver(tmp_path, backing, mapper, pools=Pools([POOL]))
    driver.define(domain((A, 64 * MIB), (B, 32 * MIB)))
    return driver


def mend(driver: XenNvdimmDriver) -> list[Inconsistency]:
    """Repair what is found; return what is left."""
    for finding in look(driver):
        assert finding.mend, finding
        finding.mend()
    return look(driver)


def test_all_is_well(driver: XenNvdimmDriver) -> None:
    assert look(driver) == []


def test_what_is_given_up_is_not_marked_any_more(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    assert set(backing.marks) == {A, B}
    driver.define(domain((A, 64 * MIB)))
    assert set(backing.marks) == {A}
    driver.drop_claims(UUID)
    assert backing.marks == {}
    assert look(driver) == []


def test_a_lost_ledger_is_made_again(
    tmp_path: Path, driver: XenNvdimmDriver, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    before = driver.ledger.find_domain(UUID)
    (tmp_path / "new").mkdir()
    new = make_driver(tmp_path / "new", backing, mapper, pools=Pools([POOL]))
    found = look(new)
    assert [(each.domain, each.path) for each in found] == [("db1", A), ("db1", B)]
    assert "slot 0 of db1" in found[0].problem
    assert mend(new) == []
    assert new.ledger.find_domain(UUID) == before


def test_a_ledger_that_is_behind(driver: XenNvdimmDriver) -> None:
    """A ledger from a backup, which has only the first NVDIMM."""
    before = driver.ledger.find_domain(UUID)
    assert before
    driver.ledger.store(UUID, before.name, before.ram, before.allocations[:1], dsm=before.dsm)
    assert [each.path for each in look(driver)] == [B]
    assert mend(driver) == []
    assert driver.ledger.find_domain(UUID) == before


def test_two_nvdimms_at_one_base(driver: XenNvdimmDriver) -> None:
    """An undo of an earlier version could write that into the ledger. The later change keeps its base."""
    before = driver.ledger.find_domain(UUID)
    assert before
    first, second = before.allocations
    moved = dataclasses.replace(first, base=second.base)
    driver.ledger.store(UUID, before.name, before.ram, [moved, second], dsm=before.dsm, marked={A: 0})
    assert [each.path for each in look(driver)] == [A, B]
    kept = partial(look, driver, lambda _: domain((A, 64 * MIB)))
    (out_of_date, crowded) = kept()
    assert (out_of_date.path, crowded.path) == (A, B)
    assert "has guest-physical addresses of it" in crowded.problem
    for finding in (out_of_date, crowded):
        assert finding.mend
        finding.mend()
    assert kept() == []
    after = driver.ledger.find_domain(UUID)
    assert after
    assert [item.base for item in after.allocations] == [second.base, None]
    driver.prepare(domain((A, 64 * MIB), (B, 32 * MIB)))
    started = driver.ledger.find_domain(UUID)
    assert started
    one, other = started.allocations
    assert one.base is not None
    assert one.base == second.base
    assert other.base is not None
    assert other.base >= one.placement.end or other.placement.end <= one.base


def test_a_file_that_was_moved(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    backing.move(A, "/mnt/pmem0/other")
    assert [each.problem for each in look(driver)] == ["it is not there; it was moved to /mnt/pmem0/other"]
    assert mend(driver) == []
    assert set(backing.files) == {A, B}


def test_a_file_that_is_gone(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    del backing.files[A], backing.marks[A]
    assert [(each.path, each.problem) for each in look(driver)] == [(A, "it is not there")]
    (left,) = look(driver)
    assert (left.path, left.mend) == (A, None)
    assert left.remedy.startswith("restore a backup, if there is one")
    assert left.remedy.endswith(f"nvdimmctl check --repair --zeros {A}")
    (found,) = look(driver, zeros=[A])
    assert found.mend
    found.mend()
    (left,) = look(driver)
    assert (left.path, left.mend) == (A, None)
    assert "it is not provisioned" in left.problem
    record = driver.ledger.find_domain(UUID)
    assert record
    assert [item.ready for item in record.allocations] == [False, True]
    driver.define(domain((A, 64 * MIB), (B, 32 * MIB)))
    assert look(driver) == []


def test_a_file_in_no_pool_that_was_put_in_the_place_of_another_is_named(
    tmp_path: Path, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    driver = make_driver(tmp_path, backing, mapper, pools=Pools([], any_path=True))
    driver.define(domain((A, 64 * MIB)))
    driver.define(dataclasses.replace(domain((B, 64 * MIB)), uuid=OTHER_UUID, name="db2"))
    backing.marks[A] = backing.marks.pop(B)
    del backing.files[B]
    found = {each.path: each for each in look(driver)}
    assert f"its mark says that it is domain db2's ({OTHER_UUID})" in found[A].problem
    assert found[A].mend is None


def test_a_device_that_is_gone_is_not_given_up(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    """Its bytes exist under another name: the next domain that gets them must be refused."""
    record = driver.ledger.find_domain(UUID)
    assert record
    device, other = record.allocations
    assert device.identity
    identity = dataclasses.replace(device.identity, inode=0, device="namespace9.0")
    device = dataclasses.replace(device, identity=identity)
    driver.ledger.store(UUID, record.name, record.ram, [device, other], dsm=record.dsm)
    del backing.files[A], backing.marks[A]
    (found,) = look(driver)
    assert (found.path, found.problem, found.mend) == (A, "it is not there", None)
    assert f"nvdimmctl release --lost --slot 0 {record.uuid}" in found.remedy


def test_another_device_is_not_taken(
    driver: XenNvdimmDriver, backing: MemoryBacking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices get other names at a boot: the bytes under this one may be anybody's."""
    there = backing.locate

    def another(spec: NvdimmSpec) -> Location:
        found = there(spec)
        return dataclasses.replace(found, identity=dataclasses.replace(found.identity, inode=0, device="namespace9.0"))

    monkeypatch.setattr(backing, "locate", another)
    backing.marks.clear()  # a device has its mark by its bytes
    for found in look(driver):
        assert "its namespace is namespace9.0" in found.problem
        assert found.mend is None
    assert len(look(driver)) == 2


def test_provisioning_that_a_power_loss_has_cut(driver: XenNvdimmDriver) -> None:
    """The ledger has the intent, and the file does not exist: it gets its name only at the end."""
    other = dataclasses.replace(domain((C, 64 * MIB)), uuid=OTHER_UUID, name="db2")
    driver.ledger.begin_define(other, lambda: None)
    driver.ledger.record_progress(OTHER_UUID, 0, 42)
    with driver.locks.changing(OTHER_UUID):
        assert look(driver) == [], "the define is under way"
    (found,) = look(driver)
    assert (found.domain, found.path) == ("db2", C)
    assert found.problem == (
        "a define that was interrupted wants it (42% of it is written), and no other domain can have its path"
    )
    with pytest.raises(InUseError, match="belongs to domain db2"):
        driver.define(domain((A, 64 * MIB), (B, 32 * MIB), (C, 64 * MIB)))
    driver.define(other)
    assert look(driver) == []
    driver.forget(OTHER_UUID)
    driver.ledger.begin_define(other, lambda: None)
    assert mend(driver) == []
    assert driver.ledger.find_domain(OTHER_UUID) is None
    driver.define(domain((A, 64 * MIB), (B, 32 * MIB), (C, 64 * MIB)))


@pytest.mark.parametrize("since", ["defined", "defined elsewhere", "given up"])
def test_a_killed_define_is_not_finished_after_the_domain_was_changed(
    driver: XenNvdimmDriver, backing: MemoryBacking, since: str
) -> None:
    had = domain((A, 64 * MIB), (B, 32 * MIB))
    wanted = domain((A, 64 * MIB), (C, 64 * MIB))
    defined = [wanted]
    driver.begin(wanted, driver.check(wanted))
    (found,) = [each for each in look(driver, lambda _: defined[0]) if each.path == C]
    assert found.mend is not None
    if since == "defined":
        driver.define(domain((A, 64 * MIB)))
    elif since == "defined elsewhere":
        defined[0] = had
    else:
        driver.cancel(wanted, ())
        defined[0] = had
    with pytest.raises(InUseError, match="changed meanwhile"):
        found.mend()
    assert C not in backing.files


def test_a_killed_define_is_not_given_up_after_libvirt_has_got_it(driver: XenNvdimmDriver) -> None:
    wanted = domain((A, 64 * MIB), (C, 64 * MIB))
    defined = [domain((A, 64 * MIB), (B, 32 * MIB))]
    driver.begin(wanted, driver.check(wanted))
    (found,) = [each for each in look(driver, lambda _: defined[0]) if each.path == C]
    assert found.remedy.startswith("give that up")
    assert found.mend is not None
    defined[0] = wanted
    with pytest.raises(InUseError, match="changed meanwhile"):
        found.mend()
    record = driver.ledger.find_domain(UUID)
    assert record
    assert C in {item.spec.path for item in record.intents}


def test_an_nvdimm_whose_contents_were_given_up(driver: XenNvdimmDriver) -> None:
    other = dataclasses.replace(domain((C, 64 * MIB)), uuid=OTHER_UUID, name="db2")
    driver.ledger.store(OTHER_UUID, "db2", 512 * MIB, [Allocation(OTHER_UUID, other.nvdimms[0])])
    (found,) = look(driver)
    assert (found.domain, found.path, found.mend) == ("db2", C, None)
    assert found.problem == "it is not provisioned (0% of it is written), and no other domain can have its path"
    assert found.remedy == (
        "unless a define is running: restore a backup first, if any, and repeat this; a define makes a new backing, of "
        "zeros, where nothing is; or give it up: nvdimmctl release --slot 0 " + OTHER_UUID
    )
    driver.define(other)
    assert look(driver) == []


def test_a_copy_with_a_mark(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    backing.files["/mnt/pmem0/copy"] = (500, 64 * MIB)
    backing.marks["/mnt/pmem0/copy"] = backing.marks[A]
    (finding,) = look(driver)
    assert (finding.path, finding.remedy) == ("/mnt/pmem0/copy", "remove the mark")
    assert A in finding.problem
    assert mend(driver) == []
    assert set(backing.marks) == {A, B}


def test_a_file_without_or_with_a_wrong_mark(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    del backing.marks[A]
    backing.marks[B] = b"scribble"
    assert [each.remedy for each in look(driver)] == ["write its mark", "write its mark"]
    assert mend(driver) == []


def test_a_mark_of_nobody_that_cannot_be_read(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    backing.files["/mnt/pmem0/c"] = (500, MIB)
    backing.marks["/mnt/pmem0/c"] = b"scribble"
    assert [each.remedy for each in look(driver)] == ["remove the mark"]
    assert mend(driver) == []


def test_another_file_in_its_place_is_taken(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    backing.files[A] = (700, 64 * MIB)
    (finding,) = look(driver)
    assert finding.problem == "it is not the backing that was provisioned: its inode is 700, it was 100"
    assert mend(driver) == []
    record = driver.ledger.find_domain(UUID)
    assert record
    assert record.allocations[0].identity
    assert record.allocations[0].identity.inode == 700


def test_a_start_that_is_over(driver: XenNvdimmDriver, backing: MemoryBacking, mapper: RecordingMapper) -> None:
    driver.prepare(domain((A, 64 * MIB), (B, 32 * MIB)))
    mapper.alive[7] = UUID
    map_prepared(driver.ledger, 7)
    assert look(driver) == []
    del mapper.alive[7]
    assert [each.problem for each in look(driver)] == ["its start as domid 7 is over, but was not cleaned up"]
    assert mend(driver) == []
    assert backing.frozen == set()


def test_a_frozen_file_that_no_start_has(
    driver: XenNvdimmDriver, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    backing.frozen.add(A)
    mapper.alive[3] = OTHER_UUID
    assert mend(driver) == []
    assert backing.frozen == set()


def test_a_frozen_file_of_a_guest_that_may_be_running_stays_so(
    driver: XenNvdimmDriver, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    """The ledger was lost while the guest ran, or the guest is dying."""
    backing.frozen.add(A)
    mapper.alive[3] = None  # type: ignore[assignment]
    (finding,) = look(driver)
    assert (finding.mend, finding.remedy) == (None, "shut down the guest with domid 3 first: it may own the file")


def test_a_frozen_file_of_a_guest_that_runs_stays_so_and_its_start_is_known_again(
    driver: XenNvdimmDriver, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    """The ledger was lost while the guest ran, or the guest is dying."""
    backing.frozen.add(A)
    mapper.alive[3] = UUID
    (finding,) = look(driver)
    assert (finding.path, finding.remedy) == (A, "write into the ledger that the guest with domid 3 has it")
    assert mend(driver) == []
    assert backing.frozen == {A}
    record = driver.ledger.find_domain(UUID)
    assert record
    assert record.start
    assert (record.start.domid, record.start.state, record.start.paths) == (3, "mapped", (A,))


def test_all_files_of_a_guest_that_runs_are_known_again_with_the_first(
    driver: XenNvdimmDriver, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    """The ledger is from a backup, of when the guest was off; each file has a finding, and none fails."""
    driver.define(domain((A, 64 * MIB), (B, 32 * MIB)))
    backing.frozen |= {A, B}
    mapper.alive[3] = UUID
    findings = look(driver)
    assert [finding.path for finding in findings] == [A, B]
    for finding in findings:
        assert finding.mend
        finding.mend()
    assert look(driver) == []
    (record,) = driver.ledger.started_domains()
    assert record.start
    assert record.start.paths == (A, B)


def test_a_ledger_that_is_lost_while_guests_run_is_made_again_with_their_starts(
    tmp_path: Path, driver: XenNvdimmDriver, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    """Until then, and after, nobody gets their files or frames."""
    whole, other = domain((A, 64 * MIB), (B, 32 * MIB)), domain((A, 64 * MIB))
    other = dataclasses.replace(other, uuid=OTHER_UUID, name="db2")
    driver.prepare(whole)
    mapper.alive[7] = UUID
    map_prepared(driver.ledger, 7)
    frames = driver.ledger.frames_of_others(OTHER_UUID)
    (tmp_path / "new").mkdir()
    new = make_driver(tmp_path / "new", backing, mapper, pools=Pools([POOL]))
    for refused in (new.plan, new.define, new.prepare):
        with pytest.raises(InUseError, match=rf"{A} has the mark of domain db1 .*nvdimmctl check --repair"):
            refused(other)
    assert _repair(lambda: look(new))
    assert look(new) == []
    with pytest.raises(InUseError, match=f"{A} belongs to domain db1"):
        new.define(other)
    assert backing.frozen == {A, B}
    assert new.ledger.frames_of_others(OTHER_UUID) == frames
    with pytest.raises(InUseError, match="running or starting"):
        new.forget(UUID)
    with pytest.raises(InUseError, match="already has its NVDIMMs, as domid 7"):
        new.prepare(whole)
    del mapper.alive[7]
    new.release(UUID)
    assert backing.frozen == set()
    new.prepare(whole)
    assert new.ledger.find_domain(UUID).allocations == driver.ledger.find_domain(UUID).allocations  # type: ignore[union-attr]


def test_a_frozen_file_without_a_mark_is_nobodys(
    driver: XenNvdimmDriver, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    """Its guest was redefined without it while it ran, and then the ledger was lost."""
    backing.files[C] = (105, 64 * MIB)
    backing.frozen.add(C)
    mapper.alive[3] = OTHER_UUID
    with pytest.raises(InUseError, match=f"{C} is immutable for a guest that the ledger does not know"):
        driver.define(domain((A, 64 * MIB), (B, 32 * MIB), (C, 64 * MIB)))
    (finding,) = look(driver)
    assert finding.remedy == "shut down the guest with domid 3 first: it may own the file"
    mapper.alive.clear()
    assert mend(driver) == []
    driver.define(domain((A, 64 * MIB), (B, 32 * MIB), (C, 64 * MIB)))


def test_a_ledger_from_a_backup_starts_nobody_with_anothers_file(
    driver: XenNvdimmDriver, backing: MemoryBacking
) -> None:
    """It says that db1 has the file, which db1 gave up since, and db2 took."""
    before = driver.ledger.find_domain(UUID)
    assert before
    driver.define(domain((B, 32 * MIB)))
    driver.define(dataclasses.replace(domain((A, 64 * MIB)), uuid=OTHER_UUID, name="db2"))
    driver.ledger.forget(OTHER_UUID)
    driver.ledger.store(UUID, before.name, before.ram, before.allocations, dsm=before.dsm)
    with pytest.raises(InUseError, match=f"{A} has the mark of domain db2"):
        driver.prepare(domain((A, 64 * MIB), (B, 32 * MIB)))
    assert backing.frozen == set()


def test_a_pool_that_cannot_be_looked_at(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    backing.fail_space = "/mnt/pmem0 is not mounted"
    assert [(each.problem, each.mend) for each in look(driver)] == [("pool main: /mnt/pmem0 is not mounted", None)]


def test_a_fault_of_one_repair_leaves_the_others_to_be_done() -> None:
    def fail() -> None:
        raise KeyError(256)

    done: list[str] = []
    found = [
        Inconsistency("x", UUID, A, "a problem", "a remedy", fail),
        Inconsistency("y", OTHER_UUID, B, "a problem", "a remedy", lambda: done.append(B)),
    ]
    rows = _repair(lambda: [each for each in found if each.path not in done])
    assert [row[-1][:17] for row in rows] == ["no: KeyError: 256", "yes"]
    assert done == [B]
