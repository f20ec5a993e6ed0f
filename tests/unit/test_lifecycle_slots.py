# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import sqlite3
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest

from nvdimm_driver.doctor.repair import look
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import LayoutError
from nvdimm_driver.lifecycle.slots import assign
from nvdimm_driver.model import GIB, MIB, BackingIdentity, DomainSpec, NvdimmSpec, Pool, Progress
from nvdimm_driver.plugins import unwatched
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.state.schema import SCHEMAS
from tests.unit.doubles import UUID, MemoryBacking, RecordingMapper, domain, make_driver

A, B, C = "/mnt/pmem0/a", "/mnt/pmem0/b", "/mnt/pmem0/c"


def unplaced(*paths: str, given: dict[str, int] | None = None, uuid: str | None = UUID) -> DomainSpec:
    """Return a domain whose XML leaves the slots open, but for those given, as the parser does."""
    taken = set((given or {}).values())
    free = iter(sorted({*range(256)} - taken))
    slots = {path: (given or {}).get(path, -1) for path in paths}
    found = domain(*paths, uuid=uuid)
    specs = [
        dataclasses.replace(each, slot=slots[each.path] if slots[each.path] >= 0 else next(free))
        for each in found.nvdimms
    ]
    specs.sort(key=lambda spec: spec.slot)
    return dataclasses.replace(found, nvdimms=tuple(specs), unplaced=frozenset({*paths} - {*(given or {})}))


def slots(driver: XenNvdimmDriver) -> dict[str, int]:
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    return {item.spec.path: item.spec.slot for item in record.allocations}


def placed(driver: XenNvdimmDriver) -> dict[str, tuple[int, int | None]]:
    """Return slot and base of each NVDIMM in the ledger, by path."""
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    return {item.spec.path: (item.spec.slot, item.base) for item in record.allocations}


def before_base(driver: XenNvdimmDriver) -> int | None:
    """Return the base of the domain's first NVDIMM."""
    return next(iter(placed(driver).values()))[1]


@pytest.fixture
def backing() -> MemoryBacking:
    return MemoryBacking()


@pytest.fixture
def driver(tmp_path: Path, backing: MemoryBacking) -> XenNvdimmDriver:
    return make_driver(tmp_path, backing, RecordingMapper())


def test_the_lowest_free_slots_in_document_order() -> None:
    assert [(each.path, each.slot) for each in assign(unplaced(A, B, C, given={C: 0}), {})] == [(C, 0), (A, 1), (B, 2)]


def test_an_nvdimm_that_stays_keeps_its_slot(driver: XenNvdimmDriver) -> None:
    driver.define(unplaced(A, B))
    assert slots(driver) == {A: 0, B: 1}
    driver.define(unplaced(B))
    assert slots(driver) == {B: 1}
    driver.define(unplaced(B, C))
    assert slots(driver) == {B: 1, C: 0}
    driver.define(unplaced(C, A, B))
    assert slots(driver) == {B: 1, C: 0, A: 2}


def test_the_plan_shows_the_slots_of_the_define(driver: XenNvdimmDriver) -> None:
    driver.define(unplaced(A, B))
    plan = driver.plan(unplaced(B, uuid=None))
    assert [spec.slot for spec in plan.domain.nvdimms] == [1]
    assert [each.slot for each in plan.layout.nvdimms] == [1]


def test_a_start_of_a_definition_without_addresses_keeps_the_slots(driver: XenNvdimmDriver) -> None:
    """Such as one that an earlier version has defined: its libvirt definition has none."""
    driver.define(unplaced(A, B))
    driver.define(unplaced(B))
    driver.prepare(unplaced(B))
    assert slots(driver) == {B: 1}


def test_a_slot_that_another_one_keeps_is_refused(driver: XenNvdimmDriver) -> None:
    driver.define(unplaced(A))
    with pytest.raises(LayoutError, match=f"{B}: slot 0 is taken by {A}.*write another slot"):
        driver.define(unplaced(A, B, given={B: 0}))
    assert slots(driver) == {A: 0}


def test_a_start_that_is_refused_for_a_slot_is_recorded(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(unplaced(A))
    backing.files[B] = (101, 64 * MIB)
    with pytest.raises(LayoutError, match="slot 0 is taken"):
        driver.prepare(unplaced(A, B, given={B: 0}))
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    assert "slot 0 is taken" in record.fault


def test_the_user_may_exchange_slots(driver: XenNvdimmDriver) -> None:
    driver.define(unplaced(A, B))
    driver.define(unplaced(A, B, given={A: 1, B: 0}))
    assert slots(driver) == {A: 1, B: 0}


def test_a_backing_is_known_by_its_bytes_under_a_new_path(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(unplaced(A, B))
    backing.files[C] = backing.files.pop(B)
    driver.define(unplaced(C))
    assert slots(driver) == {C: 1}


def test_bytes_go_before_paths(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(unplaced(A, B))
    backing.files[C] = backing.files.pop(A)
    driver.define(unplaced(A, B, C))
    assert slots(driver) == {C: 0, B: 1, A: 2}


def test_a_path_in_other_words_is_the_same_path(driver: XenNvdimmDriver) -> None:
    driver.define(unplaced(A, B))
    plan = driver.plan(unplaced("/mnt/pmem0/./b"))
    assert [spec.slot for spec in plan.domain.nvdimms] == [1]
    assert plan.domain.nvdimms[0].size == 64 * MIB


def test_a_ledger_of_the_version_before_keeps_slots_bases_and_sizes(tmp_path: Path, backing: MemoryBacking) -> None:
    """Its domains have no addresses in libvirt, and bases that this version would not choose."""
    backing.files = {A: (100, 64 * MIB), B: (101, 64 * MIB)}
    rows = {A: (0, 100, 0x1100000000), B: (1, 101, 0x1104000000)}
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        database.executescript("".join(SCHEMAS[:3]))
        database.execute("INSERT INTO domain (uuid, name, ram) VALUES (?, 'db1', ?)", (UUID, 512 * MIB))
        for path, (slot, inode, base) in rows.items():
            database.execute(
                "INSERT INTO allocation VALUES "
                "(?, ?, ?, ?, 0, NULL, NULL, NULL, 0, 'memory', 'ns-0', 0, ?, 1, ?, ?, 100)",
                (UUID, slot, path, 64 * MIB, inode, 64 * MIB, base),
            )
        database.execute("PRAGMA user_version = 3")
    driver = make_driver(tmp_path, backing, RecordingMapper())
    driver.prepare(unplaced(A, B))
    driver.release(UUID)
    for wanted in (unplaced(A, B), unplaced(B), unplaced(B, C)):
        driver.define(wanted)
        record = driver.ledger.find_domain(UUID)
        assert record is not None
        item = next(each for each in record.allocations if each.spec.path == B)
        assert (item.spec.slot, item.spec.size, item.base) == (1, 64 * MIB, 0x1104000000)
    assert slots(driver) == {C: 0, B: 1}


def test_the_slot_comes_back_after_a_restore_of_another_nvdimm_in_it(driver: XenNvdimmDriver) -> None:
    """The definition, made by an earlier version, has no addresses; the saved image has another NVDIMM in slot 0."""
    driver.define(unplaced(A))
    driver.define(unplaced(B, C))
    before = placed(driver)
    assert slots(driver) == {B: 0, C: 1}
    for _ in range(2):
        driver.prepare(unplaced(A))
        driver.release(UUID)
        assert slots(driver) == {A: 0, B: 256, C: 1}
        driver.prepare(unplaced(B, C))
        driver.release(UUID)
        assert placed(driver).items() >= before.items()
        assert slots(driver) == {A: 256, B: 0, C: 1}
    driver.define(unplaced(B, C))
    assert placed(driver) == before


class Copying(MemoryBacking):
    """Keeps the ledger as it is whenever a backing is provisioned or marked, and so as a kill would leave it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.copies: list[Path] = []
        self.numbers = count()

    def provision(
        self, spec: NvdimmSpec, progress: Progress = unwatched, identity: BackingIdentity | None = None
    ) -> BackingIdentity:
        self._copy()
        return super().provision(spec, progress, identity)

    def mark(self, path: str, owner: bytes | None, identity: BackingIdentity | None = None) -> None:
        self._copy()
        super().mark(path, owner, identity)

    def _copy(self) -> None:
        self.copies.append(self.folder / f"copy-{next(self.numbers)}")
        self.copies[-1].mkdir()
        source = sqlite3.connect(self.folder / "ledger.sqlite")
        with closing(source), closing(sqlite3.connect(self.copies[-1] / "ledger.sqlite")) as target:
            source.backup(target)


def test_a_slot_comes_back_after_a_kill(tmp_path: Path) -> None:
    """While the restored guest's NVDIMM is provisioned, and before it is marked."""
    backing = Copying(tmp_path)
    driver = make_driver(tmp_path, backing, RecordingMapper())
    driver.define(unplaced(A))
    driver.define(unplaced(B))
    before = placed(driver)
    backing.copies.clear()
    driver.prepare(unplaced(A))
    driver.release(UUID)
    copies = [*backing.copies]
    assert len(copies) == 3, "provision A, mark A and B"
    for number, folder in enumerate(copies):
        after = make_driver(folder, backing, RecordingMapper())
        after.ledger.take_over(compared=True)
        assert slots(after) == ({A: 0, B: 256} if number else {B: 0}), "all at once, when all is provisioned"
        after.prepare(unplaced(B))
        assert placed(after).items() >= before.items()


def test_a_slot_comes_back_after_the_ledger_was_made_anew(tmp_path: Path, backing: MemoryBacking) -> None:
    """From the marks, which also have the numbers of NVDIMMs that are set aside."""
    pools = Pools([Pool("main", "memory", ("/mnt/pmem0",), None, MIB, 0, False)])
    first = make_driver(tmp_path, backing, RecordingMapper(), pools=pools)
    first.define(unplaced(A))
    first.define(unplaced(B))
    before = placed(first)
    first.prepare(unplaced(A))
    first.release(UUID)
    (tmp_path / "new").mkdir()
    driver = make_driver(tmp_path / "new", backing, RecordingMapper(), pools=pools)
    for finding in look(driver):
        assert finding.mend
        finding.mend()
    assert look(driver) == []
    assert slots(driver) == {A: 0, B: 256}
    driver.prepare(unplaced(B))
    assert placed(driver).items() >= before.items()


def test_what_is_set_aside_is_in_no_guest(driver: XenNvdimmDriver) -> None:
    driver.define(unplaced(A))
    fixed = dataclasses.replace(unplaced(B).nvdimms[0], base=before_base(driver))
    driver.define(dataclasses.replace(unplaced(B), nvdimms=(fixed,)))
    driver.prepare(unplaced(A))
    driver.release(UUID)
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    assert [item.spec.path for item in record.started] == [A]
    assert driver.build_tables(record).tables
    driver.check_ram(UUID, [A], 1024 * MIB)
    driver.prepare_known(UUID)
    assert [item.spec.path for item in record.allocations] == [A, B]


@pytest.mark.parametrize("slot", [0, 1])
def test_what_is_kept_until_it_is_wiped_takes_no_room_beside_ram(tmp_path: Path, slot: int) -> None:
    """Also in another slot at the same address, or where the RAM will be."""
    pool = Pool("main", "memory", ("/mnt/pmem0",), None, MIB, 0, True)
    driver: XenNvdimmDriver = make_driver(tmp_path, MemoryBacking(), RecordingMapper(), pools=Pools([pool]))

    def based(path: str, base: int) -> DomainSpec:
        found = unplaced(path, given={path: slot if path == B else 0})
        return dataclasses.replace(found, nvdimms=(dataclasses.replace(found.nvdimms[0], base=base),))

    driver.define(based(A, 80 * GIB))
    for base in (80 * GIB, 600 * GIB):
        driver.define(based(B, base))
        assert {*placed(driver)} == {A, B}
        driver.check_ram(UUID, [B], base - 8 * GIB)
        with pytest.raises(LayoutError, match="overlaps the guest's RAM"):
            driver.check_ram(UUID, [B], base + 8 * GIB)


def test_what_is_set_aside_gets_another_slot_when_it_is_attached_again(tmp_path: Path) -> None:
    """It had to be kept until it was wiped, and another one has its slot."""
    pool = Pool("main", "memory", ("/mnt/pmem0",), None, MIB, 0, True)
    driver: XenNvdimmDriver = make_driver(tmp_path, MemoryBacking(), RecordingMapper(), pools=Pools([pool]))
    driver.define(unplaced(A))
    driver.define(unplaced(B))
    assert slots(driver) == {A: 256, B: 0}
    driver.define(driver.definitions.keep_slots(unplaced(A, B, given={B: 0})))
    assert slots(driver) == {A: 1, B: 0}


@pytest.mark.parametrize(("old", "now"), [(A, B), (B, A)])
def test_the_one_that_the_guest_has_keeps_its_slot(tmp_path: Path, old: str, now: str) -> None:
    """The other one, which is kept until it is wiped, comes back by an XML without addresses."""
    pool = Pool("main", "memory", ("/mnt/pmem0",), None, MIB, 0, True)
    driver: XenNvdimmDriver = make_driver(tmp_path, MemoryBacking(), RecordingMapper(), pools=Pools([pool]))
    driver.define(unplaced(old))
    driver.define(unplaced(now))
    assert slots(driver) == {now: 0, old: 256}
    driver.define(unplaced(old, now))
    assert slots(driver) == {now: 0, old: 1}


def test_several_that_are_set_aside_from_one_slot(driver: XenNvdimmDriver) -> None:
    for path in (A, B, C):
        driver.define(unplaced(path))
        driver.forget(UUID)
    driver.define(unplaced(A))
    driver.prepare(unplaced(B))
    driver.release(UUID)
    driver.prepare(unplaced(C))
    driver.release(UUID)
    assert slots(driver) == {A: 256, B: 512, C: 0}
    driver.prepare(unplaced(B))
    assert slots(driver) == {A: 256, B: 0, C: 512}


def test_a_renamed_nvdimm_of_a_restored_guest_is_not_set_aside_from_itself(
    driver: XenNvdimmDriver, backing: MemoryBacking
) -> None:
    driver.define(unplaced(A))
    backing.files[B] = backing.files.pop(A)
    driver.prepare(unplaced(B, given={B: 0}))
    assert slots(driver) == {B: 0}


def test_the_start_that_is_taken_up_of_a_guest_has_one_nvdimm_in_each_slot(driver: XenNvdimmDriver) -> None:
    """Both are frozen: the one that is set aside was left so by a guest before."""
    driver.define(unplaced(A))
    driver.forget(UUID)
    driver.define(unplaced(B))
    driver.prepare(unplaced(A))
    driver.release(UUID)
    record = driver.ledger.find_domain(UUID)
    assert record
    assert slots(driver) == {A: 0, B: 256}
    driver.take_up_running(record, 7, {A, B})
    found = driver.ledger.find_domain(UUID)
    assert found
    assert found.start
    assert found.start.paths == (A,)
