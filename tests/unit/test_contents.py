# SPDX-License-Identifier: Apache-2.0
"""Provisioning, import, export and wiping: what is refused, and what an interruption leaves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from nvdimm_driver.contents.shared_checks import reporting_errors_of
from nvdimm_driver.doctor.repair import look
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import (
    BackingError,
    InUseError,
    NotFoundError,
    RefusedError,
    UnsupportedError,
)
from nvdimm_driver.model import KIB, MIB, SUPERPAGE, BackingIdentity, DomainSpec, NvdimmSpec, Pool, Progress
from nvdimm_driver.plugins import ByteRange, unwatched
from nvdimm_driver.pools.rules import Pools
from tests.unit import doubles
from tests.unit.doubles import OTHER_UUID, UUID, MemoryBacking, MemoryBytes, RecordingMapper, make_driver, map_prepared
from tests.unit.label_areas import label_area

A, B = "/mnt/pmem0/a", "/mnt/pmem0/b"
SIZE = 4 * MIB


def watch(what: str) -> Progress:
    return unwatched


def interrupted(what: str) -> Progress:
    def tell(done: int, total: int) -> None:
        raise KeyboardInterrupt

    return tell


def domain(*paths: str, uuid: str = UUID) -> DomainSpec:
    small = tuple(replace(each, size=SIZE) for each in doubles.domain(*paths).nvdimms)
    return replace(doubles.domain(*paths, uuid=uuid), nvdimms=small)


def pool(name: str = "main", *paths: str, wipe: bool = False, quota: int | None = None) -> Pool:
    return Pool(name, "memory", paths or ("/mnt/pmem0",), quota, SUPERPAGE, 128 * KIB, wipe)


class Host:
    """A driver with one pool of files in memory."""

    def __init__(self, folder: Path, *, wipe: bool = False, quota: int | None = None) -> None:
        self.folder = folder
        self.backing, self.mapper = MemoryBacking(), RecordingMapper()
        self.driver: XenNvdimmDriver = make_driver(
            folder, self.backing, self.mapper, pools=Pools([pool(wipe=wipe, quota=quota)])
        )
        self.importer, self.exporter, self.wiper = self.driver.importer, self.driver.exporter, self.driver.wiper

    def fill(self, path: str, data: bytes) -> None:
        self.backing.contents[path] = bytearray(data.ljust(SIZE, b"\1"))

    def run(self, *paths: str) -> None:
        record = self.driver.ledger.find_domain(UUID)
        if record is None or record.start is None:
            self.driver.ledger.begin_start(UUID, list(paths))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def defined(host: Host) -> Host:
    host.driver.define(domain(A, B))
    for path in (A, B):
        host.fill(path, b"data")
    return host


def spec(path: str = A, size: int = SIZE) -> NvdimmSpec:
    return NvdimmSpec(0, path, size)


def test_provision(host: Host) -> None:
    told: list[str] = []

    def record(what: str) -> Progress:
        told.append(what)
        return unwatched

    assert host.importer.provision(spec(), record).creates
    assert told == ["writing zeros"]
    assert host.backing.files[A][1] == SIZE
    assert not host.importer.provision(spec(), watch).creates
    assert host.driver.ledger.domains() == ()


def test_what_a_domain_has_is_not_provisioned_or_imported(defined: Host, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(SIZE))
    for attempt in (
        lambda: defined.importer.provision(spec(), watch),
        lambda: defined.importer.import_in_place(A, None, 0, watch),
        lambda: defined.importer.import_copy(str(tmp_path / "source"), A, None, 0, watch),
    ):
        with pytest.raises(InUseError, match=f"{A} belongs to domain db1"):
            attempt()
    assert defined.backing.opened == []


def test_bytes_that_a_domain_has_under_another_path_are_its_own(defined: Host) -> None:
    other = "/mnt/pmem0/other"
    defined.backing.files[other] = defined.backing.files[A]
    with pytest.raises(InUseError, match=f"{other} belongs to domain db1"):
        defined.importer.provision(spec(other), watch)
    defined.run(A, B)
    with pytest.raises(InUseError, match="db1 is running"):
        wipe_path(defined, other)
    assert defined.exporter.is_in_use(other)


def test_outside_of_the_pools_nothing_is_done(host: Host, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(SIZE))
    outside = "/srv/a"
    for attempt in (
        lambda: host.importer.provision(spec(outside), watch),
        lambda: host.importer.import_in_place(outside, None, None, watch),
        lambda: host.importer.import_copy(str(tmp_path / "source"), outside, None, 0, watch),
        lambda: host.wiper.wipe(spec(outside), watch),
    ):
        with pytest.raises(RefusedError, match="in none of the host's pools"):
            attempt()


def test_a_quota_holds_for_what_is_provisioned(tmp_path: Path) -> None:
    host = Host(tmp_path, quota=SIZE)
    host.driver.define(domain(A))
    with pytest.raises(RefusedError, match="quota"):
        host.importer.provision(spec(B), watch)


def test_adopting_finds_the_label_area(host: Host) -> None:
    host.backing.files[A] = (1, SIZE)
    host.fill(A, bytes(SIZE - 256 * KIB) + label_area(256 * KIB))
    assert host.importer.import_in_place(A, None, None, watch) == replace(spec(), label_size=256 * KIB)
    assert host.importer.import_in_place(A, None, 0, watch) == spec()
    assert host.importer.import_in_place(A, 2 * MIB, 0, watch) == spec(size=2 * MIB)
    assert host.backing.filled == [A, A, A]


def test_what_cannot_be_adopted(host: Host) -> None:
    host.backing.files[A] = (1, SIZE)
    with pytest.raises(NotFoundError, match="no such file"):
        host.importer.import_in_place(B, None, None, watch)
    with pytest.raises(BackingError, match=r"not a multiple of 2 MiB.*--size"):
        host.importer.import_in_place(A, SIZE - 1, None, watch)
    with pytest.raises(BackingError, match="a label area has 128 KiB or more"):
        host.importer.import_in_place(A, None, 64 * KIB, watch)
    host.fill(A, b"QFI\xfb\0\0\0\3")
    with pytest.raises(UnsupportedError, match=r"qcow2.*qemu-img convert -f qcow2 -O raw"):
        host.importer.import_in_place(A, None, None, watch)
    assert host.backing.filled == []


def test_copying_in(host: Host, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(SIZE - 128 * KIB) + label_area(128 * KIB))
    found = host.importer.import_copy(str(source), A, None, None, watch)
    assert found == replace(spec(), label_size=128 * KIB)
    assert host.backing.contents[A] == source.read_bytes()
    assert list(host.backing.files) == [A]


def test_a_file_that_is_larger_than_its_nvdimm(host: Host, tmp_path: Path) -> None:
    """On KVM, the labels are at the end of the NVDIMM, not of the file."""
    source = tmp_path / "source"
    nvdimm = os.urandom(SIZE - 128 * KIB) + label_area(128 * KIB)
    source.write_bytes(nvdimm + bytes(2 * MIB))
    host.backing.files[B], host.backing.contents[B] = (1, SIZE + 2 * MIB), bytearray(source.read_bytes())
    attempts: list[Callable[[], object]] = [
        lambda: host.importer.import_copy(str(source), A, None, None, watch),
        lambda: host.importer.import_in_place(B, None, None, watch),
    ]
    for attempt in attempts:
        with pytest.raises(BackingError, match=f"one of 128 KiB that ends at 4 MiB.*--size {SIZE}"):
            attempt()
    with pytest.raises(BackingError, match=r"no label area ends at 2 MiB \(.*--label-size"):
        host.importer.import_copy(str(source), A, 2 * MIB, None, watch)
    assert A not in host.backing.files
    for label_size in (None, 128 * KIB):
        host.backing.files.pop(A, None)
        found = host.importer.import_copy(str(source), A, SIZE, label_size, watch)
        assert found == replace(spec(), label_size=128 * KIB)
        assert host.backing.contents[A][:SIZE] == nvdimm
    assert host.importer.import_in_place(B, None, 0, watch) == spec(B, SIZE + 2 * MIB), "it is told to be data"


def test_a_label_area_hides_no_data(host: Host) -> None:
    """A pool's label size is for new NVDIMMs, and for those that a killed provision has left."""

    def default() -> int:
        return host.importer.default_label_size(A, SIZE, 256 * KIB)

    assert default() == 256 * KIB
    host.importer.provision(spec(), watch)
    assert default() == 256 * KIB
    host.fill(A, b"data")
    assert default() == 0
    host.fill(A, bytes(SIZE - 128 * KIB) + label_area(128 * KIB))
    assert default() == 128 * KIB


def test_an_interrupted_import_is_under_another_name(host: Host, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(SIZE))
    with pytest.raises(KeyboardInterrupt):
        host.importer.import_copy(str(source), A, None, 0, interrupted)
    assert A not in host.backing.files
    host.importer.import_copy(str(source), A, None, 0, watch)
    assert host.backing.contents[A] == source.read_bytes()
    *_, copying, verifying = host.backing.opened
    assert copying.writes[0] == (MIB, MIB), "the first chunk was there"
    assert verifying.writes == []


def test_sizes_of_imports(host: Host, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * (MIB + 1))
    with pytest.raises(BackingError, match=r"1.00 MiB \(1048577 bytes\) is not a multiple of 2 MiB"):
        host.importer.import_copy(str(source), A, None, None, watch)
    assert host.importer.import_copy(str(source), A, 2 * MIB, None, watch) == spec(size=2 * MIB)
    assert host.backing.contents[A] == source.read_bytes().ljust(2 * MIB, b"\0")
    source.write_bytes(bytes(2 * MIB) + label_area(2 * MIB))
    for size in (2 * MIB, 8 * MIB):
        with pytest.raises(BackingError, match="leave --size out"):
            host.importer.import_copy(str(source), B, size, None, watch)


class Anywhere(MemoryBacking):
    def handles(self, path: str) -> bool:
        return True


def test_an_import_overwrites_nothing_unasked(tmp_path: Path) -> None:
    source, device = tmp_path / "source", "/dev/null"
    source.write_bytes(bytes(SIZE))
    driver = make_driver(tmp_path, Anywhere(), RecordingMapper(), pools=Pools([], any_path=True))
    with pytest.raises(RefusedError, match=r"/dev/null: what is on it would be overwritten .--force"):
        driver.importer.import_copy(str(source), device, None, 0, watch)
    with pytest.raises(RefusedError, match="exists already"):
        driver.importer.import_copy(str(source), str(source), None, 0, watch)
    driver.importer.import_copy(str(source), device, None, 0, watch, overwrite=True)


def test_exporting(defined: Host, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    digest = defined.exporter.export(spec(), str(copy), watch, overwrite=False, running=False)
    assert copy.read_bytes() == defined.backing.contents[A]
    assert digest == sha256(copy.read_bytes()).hexdigest()
    with pytest.raises(RefusedError, match=r"exists already .--force"):
        defined.exporter.export(spec(), str(copy), watch, overwrite=False, running=False)
    defined.fill(A, b"other")
    defined.exporter.export(spec(), str(copy), watch, overwrite=True, running=False)
    assert copy.read_bytes() == defined.backing.contents[A]
    assert not (tmp_path / ".copy.export").exists()


def test_an_interrupted_export_goes_on(defined: Host, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        defined.exporter.export(spec(), str(tmp_path / "copy"), interrupted, overwrite=False, running=False)
    assert not (tmp_path / "copy").exists()
    partial = tmp_path / ".copy.export"
    assert partial.read_bytes()[: MIB + 1] == defined.backing.contents[A][:MIB] + b"\0"
    defined.exporter.export(spec(), str(tmp_path / "copy"), watch, overwrite=False, running=False)
    assert (tmp_path / "copy").read_bytes() == defined.backing.contents[A]
    assert not partial.exists()


def test_what_runs_is_not_exported_unless_forced(defined: Host, tmp_path: Path) -> None:
    defined.run(A)
    with pytest.raises(InUseError, match="db1 is running"):
        defined.exporter.export(spec(), str(tmp_path / "copy"), watch, overwrite=True, running=False)
    defined.exporter.export(spec(), str(tmp_path / "copy"), watch, overwrite=False, running=True)


def test_a_domain_that_was_started_meanwhile_spoils_the_copy(defined: Host, tmp_path: Path) -> None:
    def start(what: str) -> Progress:
        defined.run(A)
        return unwatched

    with pytest.raises(InUseError, match="db1 is running"):
        defined.exporter.export(spec(), str(tmp_path / "copy"), start, overwrite=False, running=False)
    assert not (tmp_path / "copy").exists()


def test_what_runs_is_not_copied_into_a_pool(defined: Host, tmp_path: Path) -> None:
    defined.run(A)
    with pytest.raises(InUseError, match="db1 is running"):
        defined.importer.import_copy(A, "/mnt/pmem0/moved", None, 0, watch)


def test_a_domain_that_ran_meanwhile_spoils_a_copy(defined: Host, tmp_path: Path) -> None:
    """It has started after the first check, and has ended before the last one."""

    def run(what: str) -> Progress:
        defined.driver.prepare(domain(A, B))
        map_prepared(defined.driver.ledger, 5)
        assert defined.driver.release(UUID) == ""
        return unwatched

    with pytest.raises(InUseError, match=f"{A}: a domain ran with it while it was copied, .*copy it again"):
        defined.exporter.export(spec(), str(tmp_path / "copy"), run, overwrite=False, running=False)
    assert not (tmp_path / "copy").exists()


def test_what_the_system_says_is_told_with_the_path(defined: Host, tmp_path: Path) -> None:
    class Broken(MemoryBacking):
        def open_bytes(self, spec: NvdimmSpec, *, write: bool = False) -> ByteRange:
            opened = MemoryBytes(b"x" * SIZE)
            opened.broken = OSError(28, "No space left on device")
            return opened

    backing = Broken()
    backing.files[f"{B}1"] = (900, SIZE)
    wiper = make_driver(tmp_path, backing, RecordingMapper()).wiper
    with pytest.raises(BackingError, match=rf"{B}1: No space left on device .make room"):
        wiper.wipe(spec(f"{B}1"), watch)


def test_a_domains_backing_is_no_destination(defined: Host) -> None:
    with pytest.raises(InUseError, match=f"{B} belongs to"):
        defined.exporter.export(spec(), B, watch, overwrite=True, running=False)


def wipe_path(host: Host, path: str) -> None:
    """Wipe what is at a path, as nvdimmctl does, which has named the domains that have it."""
    host.wiper.wipe(spec(path), watch, owners=host.wiper.owners([spec(path)]))


def test_wiping(defined: Host) -> None:
    before = defined.driver.ledger.find_domain(UUID)
    wipe_path(defined, A)
    assert defined.backing.contents[A] == bytes(SIZE)
    assert defined.backing.opened[-1].synced
    assert defined.backing.opened[-1].closed
    assert defined.backing.contents[B] != bytes(SIZE)
    assert defined.driver.ledger.find_domain(UUID) == before
    with pytest.raises(NotFoundError):
        defined.wiper.wipe(spec("/mnt/pmem0/none"), watch)


def test_what_runs_is_not_wiped(defined: Host) -> None:
    defined.run(A)
    content = bytes(defined.backing.contents[A])
    with pytest.raises(InUseError, match="db1 is running"):
        wipe_path(defined, A)
    assert defined.backing.contents[A] == content
    assert defined.backing.opened == [], "its file is immutable"


def test_what_a_guest_has_that_the_ledger_does_not_know_is_neither_wiped_nor_imported(
    tmp_path: Path, defined: Host
) -> None:
    """A device has no mark, so nothing but Xen's own list shows whose it is after the ledger was lost."""
    (extent,) = defined.backing.locate(spec()).extents
    content = bytes(defined.backing.contents[A])
    defined.driver.forget(UUID)
    defined.mapper.alive[3] = OTHER_UUID
    defined.mapper.announce(3, [(0, (extent.spa + extent.length) // 4096 - 1, 100)])
    for work in (
        lambda: defined.wiper.wipe(spec(), watch),
        lambda: defined.importer.import_in_place(A, None, 0, watch),
        lambda: defined.importer.provision(spec(), watch),
        lambda: defined.exporter.export(spec(), str(tmp_path / "copy"), watch, overwrite=False, running=False),
        lambda: defined.importer.import_copy(A, f"{A}.moved", None, 0, watch),
    ):
        with pytest.raises(InUseError, match="a: the guest with domid 3 has it, and the ledger does not know that"):
            work()
    assert defined.backing.contents[A] == content
    defined.wiper.wipe(spec(B), watch)
    del defined.mapper.alive[3]
    defined.wiper.wipe(spec(), watch)


def test_what_was_put_in_the_place_of_a_domains_backing_is_neither_wiped_nor_deleted(defined: Host) -> None:
    record = defined.driver.ledger.find_domain(UUID)
    assert record is not None
    defined.backing.files[A] = (999, SIZE)
    with pytest.raises(BackingError, match="is not the backing that was provisioned"):
        defined.wiper.wipe(record.allocations[0].spec, watch, record)
    with pytest.raises(BackingError, match="is not the backing that was provisioned"):
        defined.wiper.give_up(record, watch, delete=True)
    assert A in defined.backing.files
    assert defined.driver.ledger.find_domain(UUID) == record


@pytest.mark.parametrize("wipe", [False, True])
@pytest.mark.parametrize("delete", [False, True])
def test_giving_up(tmp_path: Path, wipe: bool, delete: bool) -> None:
    host = Host(tmp_path, wipe=wipe)
    host.driver.define(domain(A, B))
    host.fill(A, content := b"data")
    record = host.driver.ledger.find_domain(UUID)
    assert record is not None
    host.wiper.give_up(record, watch, delete=delete)
    assert host.driver.ledger.find_domain(UUID) is None
    assert (A in host.backing.files) is not delete
    assert (host.backing.contents[A] == bytes(SIZE)) is wipe
    assert host.backing.contents[A].startswith(content) is not wipe


def test_a_claim_stays_until_all_is_wiped(tmp_path: Path) -> None:
    host = Host(tmp_path, wipe=True)
    host.driver.define(domain(A, B))
    host.fill(A, b"data")
    record = host.driver.ledger.find_domain(UUID)
    assert record is not None
    with pytest.raises(KeyboardInterrupt):
        host.wiper.give_up(record, interrupted, delete=True)
    assert host.driver.ledger.find_domain(UUID) == record
    assert host.backing.contents[A] == bytes(MIB) + b"\1" * (SIZE - MIB)
    host.wiper.give_up(record, watch, delete=True)
    assert host.driver.ledger.find_domain(UUID) is None
    assert host.backing.files == {}


def test_a_running_domain_gives_nothing_up(defined: Host) -> None:
    defined.run(A)
    record = defined.driver.ledger.find_domain(UUID)
    assert record is not None
    with pytest.raises(InUseError):
        defined.wiper.give_up(record, watch, delete=True)
    assert A in defined.backing.files


@pytest.mark.parametrize("delete", [False, True])
def test_what_is_gone_can_be_given_up(tmp_path: Path, delete: bool) -> None:
    host = Host(tmp_path)
    host.driver.define(domain(A, uuid=OTHER_UUID))
    del host.backing.files[A]
    record = host.driver.ledger.find_domain(OTHER_UUID)
    assert record is not None
    host.wiper.give_up(record, watch, delete=delete)
    assert host.driver.ledger.domains() == ()


def test_what_is_gone_and_was_to_be_wiped_is_given_up_after_check(tmp_path: Path) -> None:
    host = Host(tmp_path, wipe=True)
    host.driver.define(domain(A))
    del host.backing.files[A]
    record = host.driver.ledger.find_domain(UUID)
    assert record is not None
    with pytest.raises(BackingError, match="it is not there, and pool main has wipe_on_release"):
        host.wiper.give_up(record, watch, delete=False)
    assert host.driver.ledger.find_domain(UUID) == record
    (found,) = look(host.driver, zeros=[A])
    assert found.mend
    found.mend()
    record = host.driver.ledger.find_domain(UUID)
    assert record is not None
    host.wiper.give_up(record, watch, delete=False)
    assert host.driver.ledger.domains() == ()


def test_more_than_an_nvdimm_needs_is_wiped(tmp_path: Path) -> None:
    """A device is larger than its NVDIMM, or a file has become so."""
    host = Host(tmp_path, wipe=True)
    host.backing.files[A] = (100, 2 * SIZE)
    host.backing.contents[A] = bytearray(b"x" * 2 * SIZE)
    host.driver.define(domain(A))
    record = host.driver.ledger.find_domain(UUID)
    assert record is not None
    host.wiper.give_up(record, watch, delete=False)
    assert host.backing.contents[A] == bytes(2 * SIZE)


@pytest.mark.parametrize("slot", [0, 1])
def test_one_of_two_is_given_up(tmp_path: Path, slot: int) -> None:
    host = Host(tmp_path, wipe=True)
    host.driver.define(domain(A, B))
    for path in (A, B):
        host.fill(path, b"data")
    record = host.driver.ledger.find_domain(UUID)
    assert record is not None
    host.wiper.give_up(record, watch, delete=False, slot=slot)
    left = host.driver.ledger.find_domain(UUID)
    assert left is not None
    assert left.allocations == (record.allocations[1 - slot],)
    assert host.backing.contents[(A, B)[slot]] == bytes(SIZE)
    assert host.backing.contents[(B, A)[slot]] != bytes(SIZE)


class DeviceTakenMeanwhile(MemoryBacking):
    """A device that another domain gets, and starts with, between the look at the ledger and the lock."""

    def __init__(self) -> None:
        super().__init__()
        self.take: Callable[[], object] = lambda: None

    def allocate(self, spec: NvdimmSpec) -> NvdimmSpec:
        self.take()
        return spec

    def publish(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        del spec, identity


def test_a_device_that_a_domain_got_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    backing = DeviceTakenMeanwhile()
    backing.files[A] = (100, SIZE)
    backing.contents[A] = bytearray(b"G" * SIZE)
    importer, other = (make_driver(tmp_path, backing, RecordingMapper()) for _ in range(2))

    def start() -> None:
        other.define(domain(A))
        other.prepare(domain(A))

    backing.take = start
    source = tmp_path / "source"
    source.write_bytes(b"S" * SIZE)
    with pytest.raises(InUseError, match="belongs to domain db1"):
        importer.importer.import_copy(str(source), A, None, 0, watch, overwrite=True)
    assert backing.contents[A] == b"G" * SIZE


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            BackingError("the file ends at 0x1000", hint="was it truncated?"),
            "/a: the file ends at 0x1000 (was it truncated?)",
        ),
        (BackingError("/a: is short"), "/a: is short"),
        (OSError(28, "No space left on device"), "/a: No space left on device (make room, or ask for less)"),
    ],
)
def test_what_goes_wrong_with_bytes_is_told_with_the_path(error: Exception, told: str) -> None:
    with pytest.raises(BackingError) as raised, reporting_errors_of("/a"):
        raise error
    assert str(raised.value) == told
