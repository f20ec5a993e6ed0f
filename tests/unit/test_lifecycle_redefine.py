# SPDX-License-Identifier: Apache-2.0
"""A redefinition keeps the guest's bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, LedgerError, RefusedError, UnsupportedError
from nvdimm_driver.model import KIB, MIB, SUPERPAGE, BackingIdentity, DomainSpec, NvdimmSpec, Pool
from nvdimm_driver.plugins import ByteRange
from nvdimm_driver.pools.rules import Pools
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
from tests.unit.label_areas import label_area

A, B = "/mnt/pmem0/a", "/mnt/pmem0/b"
LABEL = 128 * KIB


class Host:
    """A driver, and a domain with one NVDIMM of 64 MiB on a larger file."""

    def __init__(self, folder: Path, label_size: int, alignsize: int | None = None) -> None:
        self.backing = MemoryBacking()
        self.backing.files[A] = (100, 128 * MIB)
        self.backing.next_inode = 102
        self.driver = make_driver(folder, self.backing, RecordingMapper())
        self.domain = domain(A, label_size=label_size)
        self.domain = self.changed(alignsize=alignsize)
        self.content = self.backing.contents.setdefault(A, bytearray(128 * MIB))
        self.driver.define(self.domain)

    def changed(self, **values: int | str | None) -> DomainSpec:
        """Return the domain with another NVDIMM."""
        (nvdimm,) = self.domain.nvdimms
        return replace(self.domain, nvdimms=(replace(nvdimm, **values),))  # type: ignore[arg-type]

    def redefine(self, **values: int | str | None) -> NvdimmSpec:
        changed = self.changed(**values)
        self.driver.define(changed, self.driver.check(changed))
        return changed.nvdimms[0]


def begin(host: Host) -> None:
    """Let the domain's guest run, and end."""
    start = started(host.driver.ledger)
    host.driver.ledger.begin_mapping(start, 5)
    host.driver.ledger.finish_mapping(start)
    host.driver.release(UUID)


@pytest.mark.parametrize("state", ["prepared", "mapping", "mapped"])
def test_a_guest_that_runs_may_write_to_all_of_its_nvdimm(tmp_path: Path, state: str) -> None:
    """The end is 0 now: what the guest writes there would be a label area at its next start."""
    host = Host(tmp_path, 0)
    host.driver.prepare(host.domain)
    start = started(host.driver.ledger)
    if state != "prepared":
        host.driver.ledger.begin_mapping(start, 5)
    if state == "mapped":
        host.driver.ledger.finish_mapping(start)
    labelled = host.changed(label_size=LABEL)
    for refused in (host.driver.plan, host.driver.define):
        with pytest.raises(RefusedError, match=r"/a: domain db1 runs, and its guest may write to the end of the guest"):
            refused(labelled)
    host.driver.define(domain(B))  # by way of a definition without it
    with pytest.raises(RefusedError, match="domain db1 runs"):
        host.driver.define(labelled)
    host.driver.define(host.changed(node=0, size=128 * MIB))


def test_a_start_that_begins_during_a_define_is_seen_before_that_is_stored(tmp_path: Path) -> None:
    host = Host(tmp_path, 0)
    labelled = host.changed(label_size=LABEL)
    plan = host.driver.check(labelled)
    provision = host.backing.provision

    def meanwhile(spec: NvdimmSpec, *rest: Any) -> BackingIdentity:
        host.driver.prepare(host.domain)
        return provision(spec, *rest)

    host.backing.provision = meanwhile  # type: ignore[assignment,method-assign]
    with pytest.raises(RefusedError, match="domain db1 runs"):
        host.driver.define(labelled, plan)
    assert [item.spec.label_size for item in host.driver.ledger.domains()[0].allocations] == [0]


def test_an_nvdimm_does_not_get_smaller(tmp_path: Path) -> None:
    host = Host(tmp_path, 0)
    with pytest.raises(RefusedError, match=r"/a: has 64 MiB and would have 62 MiB: the guest would lose its end"):
        host.redefine(size=62 * MIB)
    (record,) = host.driver.ledger.domains()
    assert record.allocations[0].spec.size == 64 * MIB


def test_an_nvdimm_without_labels_can_grow(tmp_path: Path) -> None:
    host = Host(tmp_path, 0)
    host.content[64 * MIB - 1] = 1
    assert host.redefine(size=128 * MIB).size == 128 * MIB


@pytest.mark.parametrize("values", [{"label_size": 2 * LABEL}, {"label_size": 0}, {"size": 128 * MIB, "label_size": 0}])
@pytest.mark.parametrize("valid", [(True, True), (False, True)])
def test_labels_stay_where_they_are(tmp_path: Path, values: dict[str, int], valid: tuple[bool, bool]) -> None:
    host = Host(tmp_path, LABEL)
    host.content[64 * MIB - LABEL : 64 * MIB] = label_area(LABEL, valid=valid)
    with pytest.raises(RefusedError, match=r"/a: its label area, 128 KiB at 0x3fe0000, is in use, and would"):
        host.redefine(**values)
    host.redefine(base=0x2000000000)


@pytest.mark.parametrize("values", [{"label_size": 2 * LABEL}, {"label_size": 0}, {"size": 128 * MIB}])
def test_a_label_area_without_labels_can_change(tmp_path: Path, values: dict[str, int]) -> None:
    host = Host(tmp_path, LABEL)
    host.content[0] = host.content[64 * MIB - 2 * LABEL - 1] = 1
    host.redefine(**values)


@pytest.mark.parametrize("at", [32 * MIB, 64 * MIB - LABEL - 1])
def test_a_label_area_does_not_come_to_lie_over_data(tmp_path: Path, at: int) -> None:
    host = Host(tmp_path, LABEL)
    host.content[at] = 1
    with pytest.raises(RefusedError, match=r"the end of the guest's data, .* at 0x2000000, is in use, .* of 32 MiB"):
        host.redefine(label_size=32 * MIB)


def test_a_new_label_area_does_not_come_to_lie_over_data(tmp_path: Path) -> None:
    host = Host(tmp_path, 0)
    host.content[64 * MIB - LABEL] = 1
    with pytest.raises(RefusedError, match="the end of the guest's data, 128 KiB at 0x3fe0000"):
        host.redefine(label_size=LABEL)


def test_a_new_alignsize_does_not_hide_data(tmp_path: Path) -> None:
    host = Host(tmp_path, LABEL)
    host.content[62 * MIB] = 1
    with pytest.raises(RefusedError, match="the end of the guest's data, 1920 KiB at 0x3e00000"):
        host.redefine(alignsize=2 * MIB)


def test_bytes_between_data_and_labels_are_nobodys(tmp_path: Path) -> None:
    host = Host(tmp_path, LABEL, alignsize=2 * MIB)
    host.content[62 * MIB] = 1
    host.redefine(alignsize=4 * KIB)


def test_wiped_bytes_are_not_in_use(tmp_path: Path) -> None:
    host = Host(tmp_path, LABEL)
    host.content[64 * MIB - LABEL : 64 * MIB] = label_area(LABEL)
    (record,) = host.driver.ledger.domains()
    host.driver.wiper.wipe(record.allocations[0].spec, lambda name: lambda done, total: None, record)
    host.redefine(label_size=2 * LABEL)


def test_without_the_nvdimm_first_anything_goes(tmp_path: Path) -> None:
    host = Host(tmp_path, LABEL)
    host.content[64 * MIB - LABEL : 64 * MIB] = label_area(LABEL)
    host.driver.define(domain("/mnt/pmem0/b"))
    assert host.redefine(size=32 * MIB, label_size=0).size == 32 * MIB
    assert any(host.content[64 * MIB - LABEL : 64 * MIB])


def test_another_file_at_the_path_is_not_taken_for_the_nvdimm(tmp_path: Path) -> None:
    host = Host(tmp_path, 0)
    host.backing.files[A] = (101, 128 * MIB)
    with pytest.raises(BackingError, match="not the backing that was provisioned: its inode is 101, it was 100"):
        host.redefine()
    with pytest.raises(BackingError, match="not the backing that was provisioned"):
        host.driver.prepare(replace(host.domain, ram=2 * host.domain.ram))
    (record,) = host.driver.ledger.domains()
    assert [item.identity and item.identity.inode for item in record.allocations] == [100]


def test_a_new_path_does_not_hide_bytes(tmp_path: Path) -> None:
    host = Host(tmp_path, LABEL)
    host.content[64 * MIB - LABEL] = 1
    host.backing.files[B] = host.backing.files.pop(A)
    host.backing.contents[B] = host.content
    with pytest.raises(RefusedError, match=f"{B}: has 64 MiB and would have 62 MiB"):
        host.redefine(path=B, size=62 * MIB)
    with pytest.raises(RefusedError, match=f"{B}: its label area, 128 KiB at 0x3fe0000, is in use"):
        host.redefine(path=B, label_size=0)


def test_an_nvdimm_may_be_as_the_last_guest_had_it(tmp_path: Path) -> None:
    """The definition has made it larger since, and no guest has seen that."""
    host = Host(tmp_path, 0)
    host.driver.prepare(host.domain)
    begin(host)
    host.redefine(size=128 * MIB)
    assert host.redefine(size=64 * MIB).size == 64 * MIB
    host.redefine(size=128 * MIB)
    (record,) = host.driver.ledger.domains()
    host.driver.wiper.wipe(record.allocations[0].spec, lambda name: lambda done, total: None, record)
    with pytest.raises(RefusedError, match="the guest would lose its end"):
        host.redefine(size=64 * MIB)


def test_an_enlarged_file_is_the_same(tmp_path: Path) -> None:
    host = Host(tmp_path, LABEL)
    host.content[64 * MIB - LABEL] = 1
    host.backing.files[A] = (100, 192 * MIB)
    with pytest.raises(RefusedError, match="its label area"):
        host.redefine(size=128 * MIB, label_size=0)
    host.redefine(size=128 * MIB)
    assert host.content[128 * MIB - LABEL] == 1, "its labels move to its new end"


class Unreadable(MemoryBacking):
    def open_bytes(self, spec: NvdimmSpec, *, write: bool = False) -> ByteRange:
        raise UnsupportedError("not from the host")


def test_bytes_that_the_host_cannot_read_are_in_use(tmp_path: Path) -> None:
    host = Host(tmp_path, LABEL)
    unreadable = Unreadable()
    unreadable.files = host.backing.files
    driver: XenNvdimmDriver = make_driver(tmp_path, unreadable, RecordingMapper())
    driver.plan(host.domain)
    with pytest.raises(RefusedError, match="its label area"):
        driver.plan(host.changed(label_size=0))
    with pytest.raises(UnsupportedError, match="not from the host"):
        driver.plan(host.changed(size=128 * MIB))


class Broken(MemoryBacking):
    def open_bytes(self, spec: NvdimmSpec, *, write: bool = False) -> ByteRange:
        raise AssertionError("a read of device-dax ends the process")


def test_bad_blocks_are_in_use_and_not_read(tmp_path: Path) -> None:
    host = Host(tmp_path, LABEL)
    broken = Broken()
    broken.files = host.backing.files
    bad = ((NAMESPACE.data_spa + 64 * MIB - LABEL, 512),)
    driver = make_driver(tmp_path, broken, RecordingMapper(), bad=bad)
    for values in ({"label_size": 0}, {"size": 128 * MIB}):
        with pytest.raises(RefusedError, match="its label area"):
            driver.plan(host.changed(**values))


def test_labels_do_not_move_to_bad_blocks(tmp_path: Path) -> None:
    host = Host(tmp_path, LABEL)
    host.content[64 * MIB - LABEL] = 1
    driver = make_driver(
        tmp_path, host.backing, RecordingMapper(), bad=((NAMESPACE.data_spa + 128 * MIB - LABEL, 512),)
    )
    with pytest.raises(RefusedError, match="its labels would move to 0x7fe0000, where the memory has bad blocks"):
        driver.plan(host.changed(size=128 * MIB))


def test_what_a_guest_runs_with_counts_in_the_quota_until_its_end(tmp_path: Path) -> None:
    """Whether its domain has been redefined with another NVDIMM, or with none."""
    backing, mapper = MemoryBacking(), RecordingMapper({5: UUID})
    pools = Pools([Pool("main", "memory", ("/mnt/pmem0",), 64 * MIB, SUPERPAGE, LABEL, wipe_on_release=False)])
    driver = make_driver(tmp_path, backing, mapper, pools=pools)
    driver.define(domain(A))
    driver.prepare(domain(A))
    map_prepared(driver.ledger, 5)
    with pytest.raises(RefusedError, match="domains have 64 MiB of its quota of 64 MiB"):
        driver.define(domain(B))
    driver.drop_claims(UUID)
    for refused in (domain(B), domain(B, uuid=OTHER_UUID, name="db2")):
        with pytest.raises(RefusedError, match="domains have 64 MiB of its quota of 64 MiB"):
            driver.define(refused)
    driver.define(domain(A))
    driver.drop_claims(UUID)
    mapper.alive.clear()
    driver.release(UUID)
    driver.define(domain(B, uuid=OTHER_UUID, name="db2"))


@pytest.mark.parametrize("left", [(), (B,)], ids=["without any", "with another"])
def test_what_is_only_kept_until_it_is_wiped_is_in_no_guest_that_xl_starts(tmp_path: Path, left: tuple[str]) -> None:
    pools = Pools([Pool("main", "memory", ("/mnt/pmem0",), None, SUPERPAGE, LABEL, wipe_on_release=True)])
    driver = make_driver(tmp_path, MemoryBacking(), RecordingMapper(), pools=pools)
    driver.define(domain(A))
    for _ in range(2):  # it can be repeated
        if left:
            driver.define(domain(*left))
        else:
            driver.drop_claims(UUID)
    if left:
        driver.prepare_known(UUID)
        assert started_paths(driver) == left
    else:
        with pytest.raises(LedgerError, match="no NVDIMMs are known"):
            driver.prepare_known(UUID)
    driver.starts.end_earlier(UUID)
    again = driver.definitions.keep_slots(replace(domain(A), unplaced=frozenset({A})))
    driver.define(again)
    driver.prepare_known(UUID)
    assert started_paths(driver) == (A,)
    assert [item.spec.slot for item in driver.ledger.domains()[0].started] == [0]


def started_paths(driver: XenNvdimmDriver) -> tuple[str, ...]:
    start = driver.ledger.domains()[0].start
    assert start
    return start.paths


def test_what_a_domain_wants_of_the_cache_is_kept(tmp_path: Path) -> None:
    """In the ledger, in the marks, and by a define that fails; a start that no hook has prepared goes by it."""
    host = Host(tmp_path, 0)

    def wanted() -> set[str | None]:
        record = host.driver.ledger.find_domain(UUID)
        assert record is not None
        return {record.cache, *(mark.cache for mark in host.backing.owners().values())}

    assert wanted() == {None}
    host.domain = replace(host.domain, cache="uncached")
    host.driver.define(host.domain, host.driver.check(host.domain))
    assert wanted() == {"uncached"}
    host.backing.fail_provision.add(A)
    with pytest.raises(BackingError):
        host.driver.define(replace(host.changed(size=256 * MIB), cache="write-back"))
    assert wanted() == {"uncached"}
    host.driver.prepare_known(UUID)
    prepared = host.driver.ledger.find_prepared(UUID)
    assert prepared is not None
    assert prepared.cache == "uncached"
