# SPDX-License-Identifier: Apache-2.0
"""A saved guest goes on only with the NVDIMMs that it had."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.acpi.tables import Header, Nfit, RegionMapping, seal
from nvdimm_driver.cmd.device_model import attach
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import AcpiError, InUseError, LayoutError, RefusedError, UnsupportedError, XenError
from nvdimm_driver.lifecycle import saved_guest
from nvdimm_driver.lifecycle.emulators import Emulators
from nvdimm_driver.model import GIB, MIB, BackingIdentity, DomainSpec, NvdimmSpec
from tests.unit.doubles import OTHER_UUID, UUID, MemoryBacking, RecordingMapper, domain, make_driver

A, B, C = "/mnt/pmem0/a", "/mnt/pmem0/b", "/mnt/pmem0/c"
Image = dict[int, bytes]


class Bench:
    """A driver whose domain is started, saved and restored."""

    def __init__(self, folder: Path, dsm: str = "none") -> None:
        self.folder = folder
        self.backing = MemoryBacking()
        self.mapper = RecordingMapper()
        self.dsm = dsm
        self.domid = 4
        self.had: dict[int, int | None] = {}

    def driver(self) -> XenNvdimmDriver:
        return make_driver(self.folder, self.backing, self.mapper, dsm=self.dsm)

    def start(self) -> None:
        self.domid += 1
        self.mapper.alive = {self.domid: UUID}
        self.had = self.bases()
        self._attach(restored=False)
        self.mapper.boot(self.domid)

    def save(self) -> Image:
        """Save the guest as libvirt does: its domain is destroyed, and the hook is told of that."""
        image = dict(self.mapper.memory.pop(self.domid))
        self.end()
        return image

    def end(self) -> None:
        self.mapper.alive.clear()
        self.driver().release(UUID)

    def restore(self, image: Image, spec: DomainSpec | None = None) -> None:
        """Restore a guest. libvirt gives the hook the definition in the image, which is the domain's by default."""
        self.domid += 1
        if spec is not None:
            self.driver().prepare(spec)
        self.mapper.restore(self.domid, UUID, image)
        self._attach(restored=True)

    def refused(self, image: Image, spec: DomainSpec | None = None) -> str:
        with pytest.raises(RefusedError) as caught:
            self.restore(image, spec)
        assert self.domid not in self.mapper.mapped
        self.end()
        return str(caught.value)

    def bases(self) -> dict[int, int | None]:
        """Return the bases of the domain's NVDIMMs, by slot."""
        record = self.driver().ledger.find_domain(UUID)
        return {item.spec.slot: item.base for item in record.allocations} if record else {}

    def _attach(self, *, restored: bool) -> None:
        driver = self.driver()
        attach(
            self.domid,
            driver.ledger,
            self.mapper,
            str(self.folder),
            driver.prepare_known,
            lambda *_: None,
            restored=restored,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_guest_goes_on_again_and_again(bench: Bench) -> None:
    bench.driver().define(domain(A, B))
    bench.start()
    numbers = set()
    for _ in range(3):
        image = bench.save()
        (nfit,) = (data for data in image.values() if data[:4] == b"NFIT")
        numbers.add(Header.parse(nfit).oem_revision)
        assert not sum(nfit) & 0xFF
        bench.restore(image)
    assert len(numbers) == 3


def test_an_image_is_good_only_once(bench: Bench) -> None:
    """After the first restore, the guest has written to its NVDIMMs; the image does not know that."""
    bench.driver().define(domain(A))
    bench.start()
    image = bench.save()
    bench.restore(image)
    bench.save()
    assert "since it was saved, its domain was started" in bench.refused(image)


def test_a_start_between_save_and_restore(bench: Bench) -> None:
    bench.driver().define(domain(A))
    bench.start()
    image = bench.save()
    bench.start()
    bench.end()
    assert "since it was saved, its domain was started" in bench.refused(image)


def test_a_guest_that_was_cached_goes_on_where_it_cannot_be(bench: Bench) -> None:
    """To refuse it would cost the guest; uncached, it is only slow. A guest that boots is refused."""
    cached = dataclasses.replace(domain(A), cache="write-back")
    bench.mapper.fault = ""
    bench.driver().define(cached)
    bench.driver().prepare(cached)
    bench.start()
    image = bench.save()
    bench.mapper.fault = "this Xen is stock"
    bench.driver().try_restore(UUID, cached)
    bench.restore(image, cached)
    record = bench.driver().ledger.find_domain(UUID)
    assert record is not None
    assert record.start is not None
    assert record.start.cache == "uncached"
    *_, started = (event for event in bench.driver().ledger.events() if event.kind == "started")
    assert (started.detail["cache"], started.detail["cache_wanted"]) == ("uncached", "write-back")
    bench.end()
    with pytest.raises(XenError, match="this Xen is stock"):
        bench.start()


def test_a_guest_goes_on_with_the_cache_of_its_image_and_the_definition_keeps_its_own(bench: Bench) -> None:
    bench.mapper.fault = ""
    bench.driver().define(domain(A))
    bench.start()
    image = bench.save()
    bench.driver().define(dataclasses.replace(domain(A), cache="uncached"))
    bench.restore(image, domain(A))
    record = bench.driver().ledger.find_domain(UUID)
    assert record is not None
    assert record.start is not None
    assert (record.start.cache, record.cache) == ("write-back", "uncached")
    bench.end()
    bench.start()
    record = bench.driver().ledger.find_domain(UUID)
    assert record is not None
    assert record.start is not None
    assert (record.start.cache, record.cache) == ("uncached", "uncached")


def test_a_start_that_failed_does_no_harm(bench: Bench) -> None:
    bench.driver().define(domain(A))
    bench.start()
    image = bench.save()
    bench.mapper.fail = "map"
    with pytest.raises(Exception, match="EPERM"):
        bench.start()
    bench.end()
    bench.mapper.fail = ""
    bench.restore(image)


def test_an_nvdimm_that_was_detached_and_came_back_elsewhere(bench: Bench) -> None:
    a, b, c = (NvdimmSpec(slot, path, 4 * MIB) for slot, path in enumerate((A, B, C)))
    whole = dataclasses.replace(domain(A), nvdimms=(a, c))
    driver = bench.driver()
    driver.define(dataclasses.replace(whole, nvdimms=(a, b, c)))
    driver.define(whole)  # c stays behind the place of b
    bench.start()
    image = bench.save()
    bench.driver().define(dataclasses.replace(whole, nvdimms=(a,)))
    bench.driver().check_restore(UUID)
    bench.restore(image, whole)
    assert bench.bases() == {0: bench.had[0], 2: bench.had[2]}


def test_a_definition_that_changed_under_the_running_guest(bench: Bench) -> None:
    """libvirt restores with the definition in the image, and keeps the other one for the next start."""
    for change in (domain(A, B, C), domain(A), domain(A, B, ram=200 * GIB), None):
        bench.driver().define(domain(A, B))
        bench.start()
        if change is None:
            bench.driver().drop_claims(UUID)
        else:
            bench.driver().define(change)
        image = bench.save()
        bench.driver().check_restore(UUID)
        bench.restore(image, domain(A, B))
        assert bench.bases().items() >= bench.had.items()
        bench.end()


def test_an_nvdimm_that_was_attached_since_stays_the_domains(bench: Bench) -> None:
    bench.driver().define(domain(A))
    bench.start()
    image = bench.save()
    bench.driver().define(domain(A, B))
    bench.restore(image, domain(A))
    assert set(bench.bases()) == {0, 1}
    bench.save()
    bench.driver().define(domain(A))
    taken = dataclasses.replace(domain(A).nvdimms[0], path=B)
    bench.driver().define(dataclasses.replace(domain(A), nvdimms=(taken,)))
    bench.driver().prepare(domain(A))
    record = bench.driver().ledger.find_domain(UUID)
    assert record is not None
    assert {item.spec.path: item.spec.slot for item in record.allocations} == {A: 0, B: 256}, "out of the way, and kept"
    assert [item.spec.path for item in record.started] == [A]


def test_bases_that_a_definition_has_chosen_since(bench: Bench) -> None:
    """They come after those that the saved guest knows, also when the definition has one more NVDIMM by now."""
    bench.driver().define(domain(A, B))
    bench.start()
    bench.driver().define(domain(A, B, ram=200 * GIB))
    bench.driver().define(domain(A, B, C))
    image = bench.save()
    bench.driver().check_restore(UUID)
    bench.restore(image, domain(A, B))
    assert bench.bases().items() >= bench.had.items()
    bench.end()
    bench.driver().define(domain(A, B, ram=200 * GIB))
    moved = bench.bases()
    bench.driver().define(domain(A, B, ram=200 * GIB))
    assert bench.bases() == moved


def test_another_partition_of_the_same_namespace_spoils_nothing(bench: Bench) -> None:
    bench.driver().define(domain(A))
    bench.start()
    bench.save()
    driver = bench.driver()
    run = driver.ledger.find_run(UUID)
    assert run is not None
    device = BackingIdentity("pmem", "ns-9", 0, 0, 0, 64 * MIB)
    raw = json.loads(run.nvdimms)
    raw[0] |= saved_guest._bytes(device)
    run = run._replace(nvdimms=json.dumps(raw))
    assert saved_guest.has_bytes_of(run, dataclasses.replace(device, start=32 * MIB))
    assert not saved_guest.has_bytes_of(run, dataclasses.replace(device, start=64 * MIB))


def test_a_label_server_serves_what_the_guest_has(tmp_path: Path) -> None:
    """An NVDIMM that was attached since the save may become another domain's while the guest runs."""
    bench = Bench(tmp_path, dsm="none")
    bench.driver().define(domain(A, label_size=MIB))
    bench.start()
    image = bench.save()
    bench.driver().define(domain(A, B, label_size=MIB))
    bench.restore(image, domain(A, label_size=MIB))
    record = bench.driver().ledger.find_domain(UUID)
    assert record is not None
    assert {item.spec.path for item in record.allocations} == {A, B}
    assert [item.spec.path for item in record.started] == [A]


def test_live_ram_is_checked_against_what_the_guest_has(bench: Bench) -> None:
    bench.driver().define(domain(A))
    bench.start()
    bench.driver().define(domain(A, ram=200 * GIB))
    with pytest.raises(LayoutError, match="its NVDIMM in slot 0 is at 0x1100000000"):
        bench.driver().check_running_ram(UUID, 150 * GIB)
    bench.driver().drop_claims(UUID)
    with pytest.raises(LayoutError, match="its NVDIMM in slot 0 is at 0x1100000000"):
        bench.driver().check_running_ram(UUID, 150 * GIB)
    with sqlite3.connect(bench.folder / "ledger.sqlite") as database:
        database.execute("DELETE FROM run")  # as of a guest that an earlier version has started
    bench.driver().check_running_ram(UUID, 150 * GIB)


def test_another_guest_that_had_the_nvdimm_meanwhile(bench: Bench) -> None:
    bench.driver().define(domain(A, B))
    bench.start()
    image = bench.save()
    driver = bench.driver()
    driver.define(domain(A))
    other = domain(B, uuid=OTHER_UUID, name="db2")
    driver.define(other)
    driver.prepare(other)
    record = driver.ledger.find_domain(OTHER_UUID)
    assert record is not None
    assert record.start is not None
    driver.starts.put_away(record.start)
    driver.forget(OTHER_UUID)
    with pytest.raises(RefusedError, match="had by another guest"):
        driver.check_restore(UUID)
    assert "had by another guest" in bench.refused(image, domain(A, B))


def test_an_nvdimm_that_another_domain_has_now(bench: Bench) -> None:
    bench.driver().define(domain(A, B))
    bench.start()
    bench.save()
    bench.driver().define(domain(A))
    bench.driver().define(domain(B, uuid=OTHER_UUID, name="db2"))
    with pytest.raises(InUseError, match=f"{B} belongs to domain db2"):
        bench.driver().check_restore(UUID)


def test_an_end_that_is_cut_off_after_the_files_are_mutable(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.driver().define(domain(A))
    bench.start()
    driver = bench.driver()
    monkeypatch.setattr(driver.starts, "thaw", lambda *_, **more: sys.exit())
    image = dict(bench.mapper.memory.pop(bench.domid))
    bench.mapper.alive.clear()
    with pytest.raises(SystemExit):
        driver.release(UUID)
    bench.backing.times[A] = 9
    assert "was written on the host at 1970" in bench.refused(image)


def test_an_end_that_nobody_was_told_of(bench: Bench) -> None:
    """A label server has written labels in this run, and the hook gave up waiting for Xen."""
    bench.driver().define(domain(A))
    bench.start()
    bench.backing.times[A] = 9
    image = dict(bench.mapper.memory.pop(bench.domid))
    with pytest.raises(InUseError, match="which Xen still has"):
        bench.driver().check_restore(UUID)
    bench.mapper.alive.clear()
    bench.driver().check_restore(UUID)
    bench.restore(image)


def test_an_nfit_with_more_nvdimms_than_there_can_be(bench: Bench) -> None:
    bench.driver().define(domain(A))
    bench.start()
    image = bench.save()
    (nfit,) = (data for data in image.values() if data[:4] == b"NFIT")
    table = Nfit.parse(nfit)
    many = dataclasses.replace(table, structures=table.structures + table.of(RegionMapping) * 300).to_bytes()
    twice = dataclasses.replace(table, structures=table.structures + table.of(RegionMapping)).to_bytes()
    for forged, reason in ((many, "has 301 NVDIMMs, and 256 are possible"), (twice, "has an NVDIMM twice")):
        assert reason in bench.refused({at: forged if data == nfit else data for at, data in image.items()})


def test_an_nvdimm_that_was_given_up_and_made_anew(bench: Bench) -> None:
    bench.driver().define(domain(A))
    bench.start()
    image = bench.save()
    driver = bench.driver()
    driver.forget(UUID)
    driver.define(domain(A))
    assert "its NVDIMMs were given up" in bench.refused(image)


def test_another_file_at_the_path(bench: Bench) -> None:
    bench.driver().define(domain(A))
    bench.start()
    image = bench.save()
    bench.backing.files[A] = (101, 64 * MIB)
    (replaced,) = look(bench.driver())
    assert replaced.mend
    replaced.mend()
    assert "slot 0: its inode is 101, and the guest knows 100" in bench.refused(image)


def test_a_file_that_was_written_meanwhile(bench: Bench) -> None:
    bench.driver().define(domain(A))
    bench.start()
    bench.backing.times[A] = 5  # by a label server, while the guest ran
    image = bench.save()
    bench.backing.times[A] = 1_700_000_000_000_000_000
    assert f"{A} was written on the host at 2023-11-14 22:13:20 UTC" in bench.refused(image)
    bench.backing.times[A] = 5
    bench.restore(image)


def test_a_file_that_was_wiped_meanwhile(bench: Bench) -> None:
    bench.driver().define(domain(A))
    bench.start()
    image = bench.save()
    driver = bench.driver()
    spec = domain(A).nvdimms[0]
    driver.wiper.wipe(spec, lambda _: lambda done, total: None, owners=driver.wiper.owners([spec]))
    assert "overwritten by nvdimmctl" in bench.refused(image)


def test_a_device_that_was_overwritten_while_it_was_nobodys(bench: Bench) -> None:
    bench.backing.files[B] = (101, 64 * MIB)
    bench.driver().define(domain(A, B))
    bench.start()
    bench.save()
    driver = bench.driver()
    driver.define(domain(A))
    wanted = domain(B).nvdimms[0]
    driver.importer._checks.tell_overwritten(B, bench.backing.open_bytes(wanted, write=True))
    with pytest.raises(RefusedError, match="overwritten by nvdimmctl"):
        driver.check_restore(UUID)


def test_another_server_of_labels(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dsm="none")
    bench.driver().define(domain(A, label_size=MIB))
    bench.start()
    image = bench.save()
    bench.dsm = "aml"
    assert "slot 0: its label server is aml, and the guest knows none" in bench.refused(image)


def with_header(image: Image, **fields: Any) -> Image:
    """Return a guest's memory in which the NFIT's header has other fields."""
    return {
        address: seal(dataclasses.replace(Header.parse(data), **fields), data[36:]) if data[:4] == b"NFIT" else data
        for address, data in image.items()
    }


def test_a_guest_that_an_earlier_version_has_started(bench: Bench) -> None:
    bench.driver().define(domain(A, B))
    bench.start()
    image = with_header(bench.save(), oem_revision=saved_guest.UNNUMBERED)
    with sqlite3.connect(bench.folder / "ledger.sqlite") as database:
        database.executescript("DELETE FROM run; INSERT INTO unnumbered (uuid) SELECT uuid FROM domain")
    moved = dataclasses.replace(domain(A, B).nvdimms[0], slot=2)
    assert "an NVDIMM in slot 0" in bench.refused(
        image, dataclasses.replace(domain(A, B), nvdimms=(domain(A, B).nvdimms[1], moved))
    )
    bench.driver().define(domain(A, B))
    bench.driver().check_restore(UUID)
    bench.restore(image)
    bench.save()
    assert "its domain was started" in bench.refused(image)


@pytest.mark.parametrize("numbered", [True, False], ids=["this version", "an earlier version"])
def test_a_redefinition_may_have_other_words_for_a_path(bench: Bench, numbered: bool) -> None:
    """The saved guest comes back with its own, which must lead to the same bytes still."""
    bench.driver().define(domain(A))
    bench.start()
    bench.save()
    if not numbered:
        with sqlite3.connect(bench.folder / "ledger.sqlite") as database:
            database.execute("DELETE FROM run")
    driver = bench.driver()
    bench.backing.files[B] = bench.backing.files[A]  # as by a bind mount
    driver.check_redefinition(driver.plan(domain(B)))
    moved = bench.backing.files.pop(A)
    with pytest.raises(UnsupportedError, match=f"by the path {A}, which is not there any more"):
        driver.check_redefinition(driver.plan(domain(B)))
    bench.backing.files[A] = (107, 64 * MIB)
    with pytest.raises(UnsupportedError, match=f"by the path {A}, which"):
        driver.check_redefinition(driver.plan(domain(B)))
    bench.backing.files[A] = moved
    with pytest.raises(UnsupportedError, match="managed save, whose guest has other NVDIMMs"):
        driver.check_redefinition(driver.plan(domain(B, C)))


def test_a_guest_without_an_nfit(bench: Bench) -> None:
    bench.driver().define(domain(A))
    bench.start()
    image = bench.save()
    with pytest.raises(AcpiError, match="no RSDP"):
        bench.restore({})
    bench.end()
    with pytest.raises(AcpiError, match="no NFIT"):
        bench.restore(with_header(image, signature=b"OEM1"))


def test_it_can_be_asked_before_libvirt_removes_the_image(bench: Bench) -> None:
    bench.driver().define(domain(A))
    bench.start()
    bench.save()
    bench.driver().check_restore(UUID)
    bench.backing.times[A] = 7
    with pytest.raises(RefusedError, match="was written on the host"):
        bench.driver().check_restore(UUID)
    assert bench.driver().ledger.find_domain("00000000-0000-0000-0000-000000000000") is None
    with pytest.raises(RefusedError, match="the ledger does not have the run that it was saved in"):
        bench.driver().check_restore("00000000-0000-0000-0000-000000000000")


def test_its_start_is_tried_before_libvirt_removes_the_image(bench: Bench) -> None:
    """Nothing is left of the trial: another start, or the restore itself, comes after it as if it had not been."""
    bench.driver().define(domain(A, B))
    bench.start()
    image = bench.save()
    driver = bench.driver()
    had = driver.ledger.find_run(UUID)
    for _ in range(2):
        driver.try_restore(UUID)
        record = driver.ledger.find_domain(UUID)
        assert record is not None
        assert (record.start, driver.ledger.find_run(UUID), bench.backing.frozen) == (None, had, set())
    bench.restore(image)


def test_its_emulator_and_cache_are_remembered(bench: Bench) -> None:
    driver, spec = bench.driver(), dataclasses.replace(domain(A), emulator="/opt/qemu", cache="uncached")
    driver.define(spec)
    driver.prepare(spec)
    bench.start()
    bench.save()
    run = driver.ledger.find_run(UUID)
    assert run is not None
    assert saved_guest.domain_of(run, UUID) == spec
    driver.emulators = Emulators("/usr/bin/real-qemu")
    with pytest.raises(RefusedError, match="/opt/qemu, which is not in"):
        driver.try_restore(UUID)


def test_numbers_differ_and_fit() -> None:
    numbers = {saved_guest.new_number() for _ in range(50)}
    assert len(numbers) == 50
    assert all(saved_guest.UNNUMBERED < number < 1 << 32 for number in numbers)
