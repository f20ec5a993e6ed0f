# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from nvdimm_driver.acpi.native import NativeAcpiBuilder
from nvdimm_driver.acpi.tables import Nfit, PlatformCapabilities
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import (
    BackingError,
    DomainXmlError,
    GuardError,
    InUseError,
    LayoutError,
    LedgerError,
    NvdimmError,
    XenError,
)
from nvdimm_driver.model import (
    GIB,
    KIB,
    MIB,
    AcpiTables,
    BackingIdentity,
    DomainSpec,
    GuestLayout,
    Namespace,
    NvdimmSpec,
    Progress,
)
from nvdimm_driver.plugins import unwatched
from tests.unit.doubles import (
    NAMESPACE,
    OTHER_UUID,
    UUID,
    MemoryBacking,
    RecordingMapper,
    domain,
    make_driver,
    map_prepared,
    started,
)

A, B, C = "/mnt/pmem0/a", "/mnt/pmem0/b", "/mnt/pmem0/c"


@pytest.fixture
def backing() -> MemoryBacking:
    return MemoryBacking()


@pytest.fixture
def mapper() -> RecordingMapper:
    return RecordingMapper()


@pytest.fixture
def driver(tmp_path: Path, backing: MemoryBacking, mapper: RecordingMapper) -> XenNvdimmDriver:
    return make_driver(tmp_path, backing, mapper)


def bases(driver: XenNvdimmDriver, uuid: str = UUID) -> list[int | None]:
    record = driver.ledger.find_domain(uuid)
    assert record is not None
    return [item.base for item in record.allocations]


def test_plan_touches_nothing(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    plan = driver.plan(domain(A, B, uuid=None))
    assert [intake.creates for intake in plan.intakes] == [True, True]
    assert [mapping.frames for mapping in plan.mappings] == [64 * MIB // 4096] * 2
    assert plan.mappings[0].mfn + plan.mappings[0].frames <= plan.mappings[1].mfn
    assert backing.files == {}
    assert driver.ledger.domains() == ()


class CountingBuilder(NativeAcpiBuilder):
    def __init__(self) -> None:
        self.built = 0

    def build(self, layout: GuestLayout) -> AcpiTables:
        self.built += 1
        return super().build(layout)


def test_a_define_makes_its_plan_once(tmp_path: Path, backing: MemoryBacking, mapper: RecordingMapper) -> None:
    builder = CountingBuilder()
    driver = make_driver(tmp_path, backing, mapper, acpi=builder)
    plan = driver.check(domain(A, B, uuid=None))
    driver.define(domain(A, B), plan)
    assert bases(driver) == [nvdimm.base for nvdimm in plan.layout.nvdimms]
    assert builder.built == 1


def test_tables_are_built_again_for_an_nvdimm_that_is_elsewhere_than_assumed(
    tmp_path: Path, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    builder = CountingBuilder()
    driver = make_driver(tmp_path, backing, mapper, acpi=builder)
    plan = driver.check(domain(A))
    backing.namespace = dataclasses.replace(
        backing.namespace, persistence_domain="cpu_cache"
    )  # the NFIT says which it is
    driver.define(domain(A), plan)
    assert bases(driver) == [plan.layout.nvdimms[0].base]
    assert builder.built == 2


def test_a_base_stays_when_the_slot_has_another_file(driver: XenNvdimmDriver) -> None:
    """It is a backup, say, whose contents need the same alignment; where it is in the machine does not matter."""
    both = domain(A, B)
    second = dataclasses.replace(both, nvdimms=both.nvdimms[1:])
    driver.define(both)
    driver.define(second)
    (before,) = bases(driver)
    restored = dataclasses.replace(second.nvdimms[0], path="/mnt/pmem0/restored")
    driver.define(dataclasses.replace(second, nvdimms=(restored,)))
    assert bases(driver) == [before]
    driver.define(dataclasses.replace(both, nvdimms=(both.nvdimms[0], restored)))
    assert before in bases(driver)[1:]


def test_a_plan_that_is_too_old_does_not_pass_a_path_that_was_taken_since(driver: XenNvdimmDriver) -> None:
    plan = driver.check(domain(A))
    driver.define(domain(A, uuid=OTHER_UUID, name="db2"))
    with pytest.raises(InUseError, match="belongs to domain db2"):
        driver.define(domain(A), plan)
    assert driver.ledger.find_domain(UUID) is None


class OtherMemory(MemoryBacking):
    """A second kind of backing, with an area after that of the first."""

    name = "other"

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def handles(self, path: str) -> bool:
        return path.startswith("/other/")

    def areas(self) -> list[Namespace]:
        return [dataclasses.replace(NAMESPACE, name="other0", uid="other", data_spa=self.first)]


def test_a_domain_gets_frames_of_its_own_backings_alone(
    tmp_path: Path, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    driver = make_driver(tmp_path, backing, mapper)
    driver.backings = driver.planner.backings = [backing, OtherMemory(6 * GIB)]
    assert driver.plan(domain(A)).areas == (NAMESPACE.frames,)
    backing.files[A] = (100 + 8, 64 * MIB)  # 1 GiB further: in the other's area
    with pytest.raises(GuardError, match="not inside one area of persistent memory"):
        driver.plan(domain(A))


def test_backings_that_claim_the_same_memory_are_refused(
    tmp_path: Path, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    driver = make_driver(tmp_path, backing, mapper)
    driver.backings = driver.planner.backings = [backing, OtherMemory(6 * GIB - 4096)]
    with pytest.raises(
        GuardError, match=r"namespace0\.0 of backing memory and other0 of backing other both hand out .* 0x17ffff"
    ):
        driver.plan(domain(A))


def test_label_areas_that_aml_serves_are_mapped(
    tmp_path: Path, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    spec = dataclasses.replace(domain(A).nvdimms[0], label_size=128 * KIB, alignsize=2 * MIB)
    asked = dataclasses.replace(domain(A), nvdimms=(spec,))
    plain = make_driver(tmp_path, backing, mapper).plan(asked)
    plan = make_driver(tmp_path, backing, mapper, dsm="aml").plan(asked)
    assert plan.layout.nvdimms == plain.layout.nvdimms
    (nvdimm,) = plan.layout.nvdimms
    assert nvdimm.label_base == nvdimm.base + 64 * MIB - 128 * KIB
    assert plan.mappings == (
        *plain.mappings,
        (nvdimm.label_base // 4096, plain.mappings[0].mfn + (64 * MIB - 128 * KIB) // 4096, 32),
    )
    assert [b"_DSM" in found.tables.tables[1] for found in (plain, plan)] == [False, True]


@pytest.mark.parametrize(("told", "capabilities"), [("cpu_cache", 3), ("memory_controller", 2), ("", None)])
def test_the_guest_is_told_what_the_host_flushes(
    tmp_path: Path, backing: MemoryBacking, mapper: RecordingMapper, told: str, capabilities: int | None
) -> None:
    namespace = dataclasses.replace(NAMESPACE, persistence_domain=told)
    plan = make_driver(tmp_path, backing, mapper, namespace=namespace).plan(domain(A))
    found = Nfit.parse(plan.tables.tables[0]).of(PlatformCapabilities)
    assert [each.capabilities for each in found] == ([] if capabilities is None else [capabilities])


def test_define_provisions_and_chooses_bases_once(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(domain(A, B))
    assert set(backing.files) == {A, B}
    first = bases(driver)
    driver.define(domain(A, B))
    assert bases(driver) == first
    assert all(base is not None and base >= 4 * GIB for base in first)


def test_a_failed_define_leaves_nothing(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    backing.fail_provision = {B}
    with pytest.raises(BackingError, match="no space"):
        driver.define(domain(A, B))
    assert backing.files == {}
    assert driver.ledger.domains() == ()


def test_a_failed_redefine_leaves_what_was(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(domain(A))
    before = driver.ledger.domains()
    backing.fail_provision = {B}
    with pytest.raises(BackingError, match="no space"):
        driver.define(domain(A, B, ram=GIB))
    assert driver.ledger.domains() == before
    assert set(backing.files) == {A}


def test_a_path_of_another_domain_is_refused_by_name(driver: XenNvdimmDriver) -> None:
    driver.define(domain(A))
    with pytest.raises(InUseError, match=rf"{A} belongs to domain db1 \({UUID}\)"):
        driver.define(domain(A, uuid=OTHER_UUID, name="db2"))
    with pytest.raises(InUseError, match="db1"):
        driver.plan(domain(A, uuid=None, name="db2"))
    assert [record.name for record in driver.ledger.domains()] == ["db1"]


def test_a_plan_without_uuid_is_for_the_domain_of_that_name(driver: XenNvdimmDriver) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    assert [item.base for item in driver.plan(domain(A, uuid=None)).layout.nvdimms] == bases(driver)


def test_xml_without_uuid_whose_name_two_domains_have_is_refused(driver: XenNvdimmDriver) -> None:
    driver.define(domain(A))
    driver.define(domain(B, uuid=OTHER_UUID))
    with pytest.raises(DomainXmlError, match=f"several domains named db1 have NVDIMMs: {UUID}, {OTHER_UUID}"):
        driver.plan(domain(A, B, uuid=None))


def test_the_same_file_under_another_path_is_refused(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(domain(A))
    backing.files[B] = backing.files[A]
    with pytest.raises(InUseError, match=rf"{B} belongs to domain db1"):
        driver.define(domain(B, uuid=OTHER_UUID, name="db2"))
    assert set(backing.files) == {A, B}


def test_a_path_for_no_backing_is_refused(driver: XenNvdimmDriver) -> None:
    with pytest.raises(BackingError, match="/root/a: cannot be the backing"):
        driver.define(domain("/root/a"))


def test_others_see_how_far_a_define_is(
    tmp_path: Path, driver: XenNvdimmDriver, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[bool, int]] = []

    class Watched(MemoryBacking):
        def provision(
            self, spec: NvdimmSpec, progress: Progress = unwatched, identity: BackingIdentity | None = None
        ) -> BackingIdentity:
            for done in range(0, 5 * MIB, MIB):
                progress(done, 4 * MIB)
                record = driver.ledger.find_domain(UUID)
                assert record is not None
                seen.extend((item.ready, item.written) for item in record.intents)
            return super().provision(spec, identity=identity)

    with caplog.at_level("INFO"):
        make_driver(tmp_path, Watched(), RecordingMapper()).define(domain(A))
    assert seen == [(False, percent) for percent in (0, 25, 50, 75, 100)]
    assert f"event=provisioning domain=db1 uuid={UUID} domid=- path={A} written=2097152 bytes=4194304" in caplog.text


def test_prepare_freezes_and_writes_the_plan(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(domain(A, B))
    driver.prepare(domain(A, B))
    assert backing.frozen == {A, B}
    start = started(driver.ledger)
    assert [count for _, _, count in start.mappings] == [64 * MIB // 4096] * 2
    assert [gfn * 4096 for gfn, _, _ in start.mappings] == bases(driver)
    assert start.qemu == "/usr/bin/real-qemu"
    assert driver.tables_file(UUID).read_bytes()[:4] == b"NFIT"


def test_prepare_takes_the_users_emulator(driver: XenNvdimmDriver) -> None:
    driver.define(domain(A))
    driver.prepare(dataclasses.replace(domain(A), emulator="/opt/qemu"))
    assert started(driver.ledger).qemu == "/opt/qemu"


def test_prepare_without_define_takes_what_is_there_and_creates_nothing(
    driver: XenNvdimmDriver, backing: MemoryBacking
) -> None:
    with pytest.raises(BackingError, match=f"{A} is not provisioned"):
        driver.prepare(domain(A))
    assert backing.files == {}
    assert driver.ledger.domains() == ()
    backing.files[A] = (100, 64 * MIB)
    driver.prepare(domain(A))
    assert backing.frozen == {A}


def test_a_replaced_file_is_refused_and_nothing_stays_frozen(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(domain(A, B))
    backing.files[B] = (102, 64 * MIB)
    with pytest.raises(BackingError, match=f"{B} is not the backing that was provisioned"):
        driver.prepare(domain(A, B))
    assert backing.frozen == set()
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    assert record.start is None
    assert "is not the backing that was provisioned" in record.fault


def test_a_refused_start_leaves_another_domains_files_frozen(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    with pytest.raises(InUseError, match=f"{A} belongs to domain db1"):
        driver.prepare(domain(A, uuid=OTHER_UUID, name="thief"))
    assert backing.frozen == {A}


def test_what_a_running_domain_has_stays_its_own_when_it_is_redefined_without(
    driver: XenNvdimmDriver, backing: MemoryBacking
) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    driver.define(domain(B))
    with pytest.raises(InUseError, match=f"{A} belongs to domain db1"):
        driver.define(domain(A, uuid=OTHER_UUID, name="db2"))
    assert backing.frozen == {A}


def test_tables_that_cannot_be_written_undo_the_prepare(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(domain(A))
    driver.tables_file(UUID).parent.parent.write_text("a file where the folder should be")
    with pytest.raises(LedgerError, match="cannot write"):
        driver.prepare(domain(A))
    assert backing.frozen == set()
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    assert record.start is None
    assert "cannot write" in record.fault


def test_frames_in_ram_are_refused(driver: XenNvdimmDriver, backing: MemoryBacking, mapper: RecordingMapper) -> None:
    driver.define(domain(A))
    mapper.ram_ranges.append((5 * GIB // 4096 + 1, 1))
    with pytest.raises(GuardError):
        driver.prepare(domain(A))
    assert backing.frozen == set()


def based(base: int | None, *, ram: int = 512 * MIB) -> DomainSpec:
    """Return a domain with an NVDIMM that has that base in its XML."""
    plain = domain(A, ram=ram)
    return dataclasses.replace(plain, nvdimms=(dataclasses.replace(plain.nvdimms[0], base=base),))


def chosen(driver: XenNvdimmDriver) -> list[int | None]:
    """Return the bases in the ledger."""
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    return [item.base for item in record.allocations]


def test_the_base_that_a_redefinition_gives_wins(driver: XenNvdimmDriver) -> None:
    for base, expected in ((None, 68), (80, 80), (90, 90), (None, 90)):
        asked = based(None if base is None else base * GIB)
        assert [each.base for each in driver.plan(asked).layout.nvdimms] == [expected * GIB]
        driver.define(asked)
        assert chosen(driver) == [expected * GIB]
    driver.prepare(based(None))
    assert started(driver.ledger).mappings[0][0] == 90 * GIB // 4096


def test_a_guest_that_runs_keeps_its_places_when_it_is_redefined(
    driver: XenNvdimmDriver, mapper: RecordingMapper
) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    before = started(driver.ledger)
    map_prepared(driver.ledger, 5)
    mapper.alive[5] = UUID
    driver.define(based(80 * GIB))
    assert chosen(driver) == [80 * GIB]
    with driver.ledger._db as database:
        assert database.execute("SELECT gfn FROM mapping").fetchall() == [(before.mappings[0][0],)]


def test_a_base_that_an_earlier_version_chose_stays(driver: XenNvdimmDriver) -> None:
    """It was a multiple of 2 MiB, and might be in the HyperTransport range."""
    driver.define(domain(A, B))
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    for old in ([68 * GIB, 68 * GIB + 64 * MIB], [68 * GIB, 1014 * GIB + 2 * MIB]):
        items = [dataclasses.replace(item, base=base) for item, base in zip(record.allocations, old, strict=True)]
        driver.ledger.store(UUID, "db1", record.ram, items)
        driver.define(domain(A, B))
        assert chosen(driver) == old
        driver.define(domain(A, B, C))
        assert chosen(driver)[:2] == old
        driver.prepare(domain(A, B, C))
        assert {gfn * 4096 for gfn, *_ in started(driver.ledger).mappings} > set(old)
        driver.release(UUID)
        driver.reconcile()


def test_a_start_takes_the_base_of_the_ledger_not_of_the_xml(driver: XenNvdimmDriver) -> None:
    """An earlier version ignored the base of a redefinition: guests have the one of the ledger until the next one."""
    driver.define(based(80 * GIB))
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    driver.ledger.store(
        UUID, "db1", record.ram, [dataclasses.replace(item, base=70 * GIB) for item in record.allocations]
    )
    driver.prepare(based(80 * GIB))
    assert started(driver.ledger).mappings[0][0] == 70 * GIB // 4096


def test_an_nvdimm_makes_room_for_ram_that_grew(driver: XenNvdimmDriver) -> None:
    driver.define(domain(A))
    driver.check_ram(UUID, [A], 200 * GIB)
    driver.prepare(domain(A, ram=200 * GIB))
    assert chosen(driver) == [265 * GIB]
    assert started(driver.ledger).mappings[0][0] == 265 * GIB // 4096


def test_ram_that_grew_into_an_nvdimm_with_a_base_of_the_users_is_refused(driver: XenNvdimmDriver) -> None:
    driver.define(based(80 * GIB))
    for refused in (
        lambda: driver.check_ram(UUID, [A], 200 * GIB),
        lambda: driver.define(based(80 * GIB, ram=200 * GIB)),
        lambda: driver.prepare(based(80 * GIB, ram=200 * GIB)),
    ):
        with pytest.raises(LayoutError, match=r"at 0x1400000000\) overlaps the guest's RAM of 200 GiB") as caught:
            refused()
        assert "another base or none" in caught.value.hint
    driver.define(based(None, ram=200 * GIB))
    assert chosen(driver) == [265 * GIB]


def test_nvdimms_that_touch_have_their_labels_served_by_aml(
    tmp_path: Path, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    driver = make_driver(tmp_path, backing, mapper, dsm="aml")
    plain = domain(A, B, label_size=128 * KIB)
    size = plain.nvdimms[0].visible_size
    asked = dataclasses.replace(
        plain,
        nvdimms=tuple(
            dataclasses.replace(spec, base=4 * GIB + number * size) for number, spec in enumerate(plain.nvdimms)
        ),
    )
    driver.define(asked)
    driver.prepare(asked)
    start = started(driver.ledger)
    label = 128 * KIB
    assert [(gfn * 4096, count * 4096) for gfn, _, count in start.mappings] == [
        (4 * GIB, size),
        (4 * GIB + size, size + label),  # the data and the label area of the second one
        (4 * GIB + 2 * size + label, label),
    ]
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    assert driver.tables_file(UUID).read_bytes().endswith(driver.build_tables(record).tables[1])


def test_release_thaws_when_the_domain_is_gone(
    driver: XenNvdimmDriver, backing: MemoryBacking, mapper: RecordingMapper
) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    map_prepared(driver.ledger, 5)
    mapper.alive[5] = UUID
    driver.reconcile()
    assert backing.frozen == {A}
    with pytest.raises(InUseError, match="db1 is running"):
        driver.forget(UUID)
    assert driver.release(UUID) == ""
    assert backing.frozen == {A}, "domid 5 still lives"
    del mapper.alive[5]
    driver.reconcile()
    assert backing.frozen == set()
    assert driver.forget(UUID).name == "db1"
    assert driver.ledger.domains() == ()
    assert set(backing.files) == {A}


def test_release_says_why_the_start_failed(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    driver.ledger.begin_mapping(started(driver.ledger), 5)
    driver.ledger.record_failure(UUID, XenError("EPERM"))
    assert driver.release(UUID) == "EPERM"
    assert driver.release(UUID) == "EPERM"
    assert backing.frozen == set()


def test_a_start_of_an_earlier_boot_is_put_away(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    driver.ledger._write([("UPDATE attachment SET boot_id = 'yesterday'", ())])
    driver.reconcile()
    assert backing.frozen == set()
    assert driver.ledger.find_prepared(UUID) is None


def test_a_pending_start_is_left_alone_until_it_is_abandoned(driver: XenNvdimmDriver, backing: MemoryBacking) -> None:
    driver.define(domain(A))
    driver.prepare(domain(A))
    driver.reconcile()
    assert backing.frozen == {A}
    driver.ledger._write([("UPDATE attachment SET since = since - 601", ())])
    driver.reconcile()
    assert backing.frozen == set()


def test_a_domain_without_uuid_cannot_be_defined(driver: XenNvdimmDriver) -> None:
    with pytest.raises(NvdimmError, match="db1 has no uuid"):
        driver.define(domain(A, uuid=None))


def test_a_start_with_bad_blocks_says_so(
    tmp_path: Path, backing: MemoryBacking, mapper: RecordingMapper, caplog: pytest.LogCaptureFixture
) -> None:
    start = NAMESPACE.data_spa
    driver = make_driver(tmp_path, backing, mapper, bad=((start + 4096, 512), (start + MIB, 1024), (1 << 40, 512)))
    assert driver.plan(domain(A)).bad_blocks == ((),)
    driver.define(domain(A))
    driver.prepare(domain(A))
    assert f"event=bad-blocks domain=db1 uuid={UUID} domid=- path={A} bytes=1536 first=0x1000" in caplog.text
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    assert driver.find_bad_blocks(record.allocations[0]) == ((4096, 512), (MIB, 1024))


def test_the_files_of_a_domain_go_with_it(driver: XenNvdimmDriver, mapper: RecordingMapper, tmp_path: Path) -> None:
    driver.define(domain(A))
    driver.define(domain(B, uuid=OTHER_UUID, name="db2"))
    for uuid in (UUID, OTHER_UUID):
        driver.prepare_known(uuid)
    assert {path.name for path in (tmp_path / "domains").iterdir()} == {UUID, OTHER_UUID}
    for uuid, domid in ((UUID, 5), (OTHER_UUID, 6)):
        driver.ledger.begin_mapping(started(driver.ledger, uuid), domid)
        mapper.alive[domid] = uuid
    driver.reconcile()
    mapper.alive.clear()
    driver.release(UUID)
    assert {path.name for path in (tmp_path / "domains").iterdir()} == {UUID, OTHER_UUID}, "defined ones keep them"
    driver.forget(UUID)
    assert [path.name for path in (tmp_path / "domains").iterdir()] == [OTHER_UUID]
    driver.drop_claims(OTHER_UUID)
    driver.reconcile()
    assert [*(tmp_path / "domains").iterdir()] == []


def test_the_files_of_a_guest_with_a_label_server_stay(driver: XenNvdimmDriver, tmp_path: Path) -> None:
    """A label server holds a lock in its folder, whatever has become of the ledger."""
    folder = tmp_path / "domains" / UUID
    folder.mkdir(parents=True)
    lock = driver.starts.label_servers.lock(UUID)
    driver.reconcile()
    assert folder.exists()
    assert lock is not None
    os.close(lock)
    driver.reconcile()
    assert not folder.exists()


def test_a_release_says_why_a_start_that_is_over_cannot_be_put_away(tmp_path: Path, mapper: RecordingMapper) -> None:
    class ReadOnly(MemoryBacking):
        def thaw(self, path: str, identity: BackingIdentity | None = None) -> None:
            raise BackingError(f"{path}: read-only file system")

    driver = make_driver(tmp_path, ReadOnly(), mapper)
    driver.define(domain(A))
    driver.prepare(domain(A))
    driver.starts.abandoned_seconds = 0
    record = driver.ledger.find_domain(UUID)
    assert record is not None
    with pytest.raises(BackingError, match=f"{A}: read-only file system"):
        driver.release_claims(record, lambda what: unwatched, delete=False)
    driver.starts.abandoned_seconds = 600
    driver.locks.seconds = 0.0
    with driver.locks.changing(UUID), pytest.raises(InUseError, match=r"is being defined, .* or released by"):
        driver.release_claims(record, lambda what: unwatched, delete=False)
