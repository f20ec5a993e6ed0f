# SPDX-License-Identifier: Apache-2.0
"""Test doubles of the plug-in classes. The lab checks that the real plug-ins behave as these do."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvdimm_driver import logs
from nvdimm_driver.acpi.native import NativeAcpiBuilder
from nvdimm_driver.acpi.tables import Header, checksum, seal, split
from nvdimm_driver.backing.holders import Holders
from nvdimm_driver.backing.identity import check_same_bytes
from nvdimm_driver.driver import XenNvdimmDriver
from nvdimm_driver.errors import BackingError, InUseError, NotFoundError, NoWriteBackError, XenError
from nvdimm_driver.guest import hot_slots
from nvdimm_driver.lifecycle import start as start_module
from nvdimm_driver.lifecycle.emulators import Emulators
from nvdimm_driver.lifecycle.plan import HostFacts
from nvdimm_driver.model import (
    GIB,
    MIB,
    AcpiTables,
    BackingIdentity,
    DomainSpec,
    Extent,
    GuestLayout,
    Intake,
    Location,
    Namespace,
    NvdimmSpec,
    Progress,
    Space,
    Surveyed,
)
from nvdimm_driver.plugins import AcpiBuilder, Backing, ByteRange, Mapper, unwatched
from nvdimm_driver.pools.rules import Pools
from nvdimm_driver.state import owner_marks, start_steps
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.owner_marks import Mark
from nvdimm_driver.state.start_steps import PreparedStart

UUID = "7c7b0e2e-4a6e-4f0e-9a3b-000000000001"
OTHER_UUID = "7c7b0e2e-4a6e-4f0e-9a3b-000000000002"
NAMESPACE = Namespace("namespace0.0", "fsdax", "pmem0", "ns-0", 5 * GIB, 1 * GIB)


class MemoryBacking(Backing):
    """Files in a dict, path → (inode, size), and their bytes where they matter.

    :ivar opened: ranges that :meth:`open_bytes` has returned for writing.
    :ivar filled: paths passed to :meth:`fill_holes`.
    :ivar times: when each was last written, as :meth:`written_at` returns it.
    """

    name = "memory"

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, int]] = {}
        self.frozen: set[str] = set()
        self.fail_provision: set[str] = set()
        self.fail_space = ""
        self.marks: dict[str, bytes] = {}
        self.next_inode = 100
        self.contents: dict[str, bytearray] = {}
        self.opened: list[MemoryBytes] = []
        self.filled: list[str] = []
        self.namespace = NAMESPACE
        self.times: dict[str, int] = {}

    def owners(self) -> dict[str, Mark]:
        """Return the marks, by path, without the times of their last change."""
        return {path: replace(owner_marks.unpack(path, mark), changed=0) for path, mark in self.marks.items()}

    def describe(self) -> str:
        return "files in memory"

    def handles(self, path: str) -> bool:
        return path.startswith("/mnt/pmem0/")

    def areas(self) -> Sequence[Namespace]:
        return [self.namespace]

    def examine(self, spec: NvdimmSpec) -> Intake:
        exists = spec.path in self.files
        return Intake("memory", not exists, 0 if exists else spec.size, NAMESPACE)

    def provision(
        self, spec: NvdimmSpec, progress: Progress = unwatched, identity: BackingIdentity | None = None
    ) -> BackingIdentity:
        progress(spec.size // 2, spec.size)
        if spec.path in self.fail_provision:
            raise BackingError(f"{spec.path}: no space", hint="free some")
        if identity is not None:
            check_same_bytes(spec.path, self.identify(spec.path), identity)
        elif spec.path not in self.files:
            self.files[spec.path] = (self.next_inode, spec.size)
            self.next_inode += 1
        return self.locate(spec).identity

    def space(self, paths: Sequence[str], taken: Collection[str]) -> Space:
        if self.fail_space:
            raise BackingError(self.fail_space)
        used = sum(size for path, (_, size) in self.files.items())
        return Space(GIB, GIB - used, GIB - used, 2 * MIB, (NAMESPACE,))

    def size(self, path: str) -> int:
        if path not in self.files:
            raise NotFoundError(f"{path}: there is no such file")
        return self.files[path][1]

    def allocate(self, spec: NvdimmSpec) -> NvdimmSpec:
        hidden = replace(spec, path=f"{spec.path}.partial")
        self.provision(hidden)
        return hidden

    def publish(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        if spec.path in self.files:
            raise InUseError(f"{spec.path}: exists now")
        self.files[spec.path] = self.files.pop(f"{spec.path}.partial")
        self.contents[spec.path] = self.contents.pop(f"{spec.path}.partial")

    def fill_holes(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        self.filled.append(spec.path)

    def open_bytes(self, spec: NvdimmSpec, *, write: bool = False) -> ByteRange:
        content = self.contents.setdefault(spec.path, bytearray(self.size(spec.path)))
        found = MemoryBytes(content, spec.size)
        if write:
            self.opened.append(found)
        return found

    def discard(self, spec: NvdimmSpec, identity: BackingIdentity | None = None) -> None:
        del self.files[spec.path]

    def locate(self, spec: NvdimmSpec) -> Location:
        if spec.path not in self.files:
            raise BackingError(f"{spec.path} does not exist")
        inode, size = self.files[spec.path]
        start = NAMESPACE.data_spa + inode % 100 * 128 * MIB
        return Location(BackingIdentity("memory", "ns-0", 0, inode, 1, size), (Extent(0, start, spec.size),))

    def exists(self, path: str) -> bool:
        return path in self.files

    def check_home(self, path: str, identity: BackingIdentity | None = None) -> None:
        if self.fail_space:
            raise BackingError(self.fail_space)

    def mark(self, path: str, owner: bytes | None, identity: BackingIdentity | None = None) -> None:
        if path in self.frozen:
            return
        self.marks.pop(path, None)
        if owner is not None:
            self.marks[path] = owner

    def move(self, source: str, target: str, identity: BackingIdentity | None = None) -> None:
        self.files[target] = self.files.pop(source)
        self.marks[target] = self.marks.pop(source)

    def survey(self, paths: Sequence[str]) -> Iterator[Surveyed]:
        if self.fail_space:
            raise BackingError(self.fail_space)
        for path in sorted(self.files):
            if any(path.startswith(f"{top}/") for top in paths):
                yield self._surveyed(path)

    def inspect(self, path: str, identity: BackingIdentity | None = None) -> Surveyed | None:
        if path not in self.files:
            if identity is not None:
                raise BackingError(f"{path} does not exist")
            return None
        if identity is not None:
            check_same_bytes(path, self.identify(path), identity)
        return self._surveyed(path)

    def _surveyed(self, path: str) -> Surveyed:
        frozen = path in self.frozen
        return Surveyed(path, self.marks.get(path), frozen, frozen, identity=self.identify(path))

    def freeze(self, path: str, identity: BackingIdentity | None = None) -> None:
        self.frozen.add(path)

    def thaw(self, path: str, identity: BackingIdentity | None = None) -> None:
        self.frozen.discard(path)

    def written_at(self, path: str) -> int | None:
        return self.times.get(path)

    def check_labels(self, spec: NvdimmSpec) -> None:
        pass

    def open_labels(self, spec: NvdimmSpec, identity: BackingIdentity) -> ByteRange:
        return MemoryBytes(bytes(spec.label_size))


class MemoryDevices(MemoryBacking):
    """Devices of 128 MiB, or parts of them, in place of the files: nothing is recorded on them.

    :ivar ranges: uid of the namespace, and first byte in it, by path.
    """

    mark = Backing.mark
    inspect = Backing.inspect
    survey = Backing.survey  # type: ignore[assignment]

    def __init__(self, *paths: str) -> None:
        super().__init__()
        self.ranges: dict[str, tuple[str, int]] = {}
        for number, path in enumerate(paths):
            self.add(path, f"ns-{number}")

    def add(self, path: str, uid: str, start: int = 0, size: int = 128 * MIB) -> None:
        """Let a device be at a path."""
        self.files[path], self.ranges[path] = (0, size), (uid, start)

    def handles(self, path: str) -> bool:
        return path in self.files

    def find(self, identity: BackingIdentity) -> str:
        """Return the device, or which one it is a part of."""
        known = [path for path, (uid, _) in self.ranges.items() if uid == identity.device and path in self.files]
        return f"the namespace of {known[0]}" if known else ""

    def rename(self, old: str, new: str) -> None:
        """Let a device have another name, as after a boot."""
        for by_path in (self.files, self.ranges):
            by_path[new] = by_path.pop(old)  # type: ignore[assignment]

    def exchange(self, one: str, other: str) -> None:
        """Let two devices have each other's names, as after a boot."""
        for by_path in (self.files, self.ranges):
            by_path[one], by_path[other] = by_path[other], by_path[one]  # type: ignore[assignment]

    def locate(self, spec: NvdimmSpec) -> Location:
        if spec.path not in self.files:
            raise BackingError(f"{spec.path} does not exist")
        size = self.size(spec.path)
        uid, start = self.ranges[spec.path]
        spa = NAMESPACE.data_spa + int(uid.partition("-")[2]) * 128 * MIB + start
        return Location(BackingIdentity(self.name, uid, start, 0, 0, size), (Extent(0, spa, spec.size),))

    def written_at(self, path: str) -> int | None:
        return 0


class MemoryBytes(ByteRange):
    """Bytes in memory: a bytearray itself, or a copy of other bytes; a write raises ``broken``."""

    def __init__(self, content: bytes | bytearray, size: int | None = None) -> None:
        self.size = len(content) if size is None else size
        self.content = content if isinstance(content, bytearray) else bytearray(content)
        self.broken: BaseException | None = None
        self.writes: list[tuple[int, int]] = []
        self.synced = self.closed = 0

    def sync(self) -> None:
        self.synced = len(self.writes)

    def close(self) -> None:
        self.closed += 1

    def _read(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset : offset + length])

    def _write(self, offset: int, data: bytes) -> None:
        if self.broken:
            raise self.broken
        self.content[offset : offset + len(data)] = data
        self.writes.append((offset, len(data)))


class TablesOfNative(AcpiBuilder):
    """The tables of ``native``, also for a guest with a label server, which ``native`` itself refuses."""

    def describe(self) -> str:
        return "native"

    def build(self, layout: GuestLayout) -> AcpiTables:
        return NativeAcpiBuilder().build(replace(layout, dsm="none"))


class RecordingMapper(Mapper):
    """Knows the running domids; records what is mapped and delivered.

    :ivar memory: by domid, the guest's memory as far as it matters, by address.
    """

    def __init__(self, alive: dict[int, str] | None = None) -> None:
        self.alive = {} if alive is None else alive
        self.mapped: dict[int, list[tuple[int, int, int]]] = {}
        self.announced: dict[int, list[tuple[int, int]]] = {}
        self.uncached: dict[int, list[tuple[int, int]]] = {}
        self.delivered: dict[int, bytes] = {}
        self.dsm_pages: set[int] = set()
        self.copying: set[int] = set()
        self.memory: dict[int, dict[int, bytes]] = {}
        self.events: list[int] = []
        self.fail: str = ""
        self.fault = "this Xen is stock"
        self.refuses_pins = False
        self.guest_frames = 0xFEFFF + 1
        self.closed = 0
        self.ram_ranges = [(0, 4 * GIB // 4096)]

    def describe(self) -> str:
        return "records"

    def close(self) -> None:
        self.closed += 1

    def ram(self) -> list[tuple[int, int]]:
        return self.ram_ranges

    def is_alive(self, domid: int, uuid: str) -> bool:
        return self.alive.get(domid) == uuid

    def guests(self) -> list[tuple[int, str | None]]:
        return [*self.alive.items()]

    def guest_end(self, domid: int) -> int:
        return self.guest_frames

    def uuid(self, domid: int) -> str | None:
        return self.alive.get(domid)

    def write_back_fault(
        self,
        mappings: Sequence[tuple[int, int, int]],
        uncached: Sequence[tuple[int, int]],
        domid: int | None = None,
    ) -> str:
        return self.fault

    def map(
        self, domid: int, mappings: Sequence[tuple[int, int, int]], uncached: Sequence[tuple[int, int]] = ()
    ) -> int:
        if self.fail == "map":
            raise XenError("EPERM", hint="no")
        if self.refuses_pins and sum(count for _, count in uncached) < sum(count for *_, count in mappings):
            raise NoWriteBackError("ENOSPC")
        had = self.mapped.get(domid, [])
        is_more = {gfn for gfn, *_ in had}.isdisjoint(gfn for gfn, *_ in mappings)  # else it is another guest's
        self.mapped[domid] = [*(had if is_more else ()), *mappings]
        self.uncached[domid] = [*(self.uncached.get(domid, ()) if is_more else ()), *uncached]
        return len(mappings)

    def unmap(
        self, domid: int, mappings: Sequence[tuple[int, int, int]], uncached: Sequence[tuple[int, int]] = ()
    ) -> None:
        had = self.mapped.pop(domid)
        assert {*mappings} <= {*had}
        if left := [each for each in had if each not in mappings]:
            self.mapped[domid] = left
        else:
            assert self.uncached.pop(domid) == list(uncached)

    def announce(self, domid: int, mappings: Sequence[tuple[int, int, int]]) -> None:
        self.announced[domid] = [(mfn, count) for _, mfn, count in mappings]

    def frames_of_guests(self) -> list[tuple[int, int, int]]:
        return [(domid, *each) for domid in self.alive for each in self.announced.get(domid, ())]

    def deliver(self, domid: int, tables: bytes) -> None:
        if self.fail == "deliver":
            raise XenError("ENOMEM", hint="no")
        self.delivered[domid] = tables

    def copy_disk_buffers(self, domid: int) -> None:
        self.copying.add(domid)

    def read(self, domid: int, address: int, length: int) -> bytes:
        if domid not in self.memory:
            raise XenError("there is no guest")
        found = bytearray(length)
        for start, data in self.memory[domid].items():
            low, high = max(start, address), min(start + len(data), address + length)
            if low < high:
                found[low - address : high - address] = data[low - start : high - start]
        return bytes(found)

    def write(self, domid: int, address: int, data: bytes) -> None:
        self.memory[domid][address] = data

    def boot(self, domid: int) -> None:
        """Do what the guest's firmware does: put the tables that were delivered where an operating system looks."""
        tables = {0xFC000000 + 0x10000 * n: table for n, table in enumerate(split(self.delivered[domid]))}
        header = Header(b"RSDT", 0, 1, 0, b"XEN   ", b"HVM     ", 0, b"HVML", 0)
        rsdt = seal(header, b"".join(address.to_bytes(4, "little") for address in tables))
        rsdp = bytearray(b"RSD PTR \0XEN   \0" + (0xFC0F0000).to_bytes(4, "little"))
        rsdp[8] = checksum(rsdp)
        slots = {at: data for at, data in self.memory.get(domid, {}).items() if at >= hot_slots.ADDRESS}
        self.memory[domid] = {0xE0000: bytes(rsdp), 0xFC0F0000: rsdt, **tables, **slots}

    def restore(self, domid: int, uuid: str, image: dict[int, bytes]) -> None:
        """Do what a restore does before it runs the device model."""
        self.alive = {domid: uuid}
        self.announced.pop(domid, None)
        self.memory[domid] = dict(image)

    def give_dsm_page(self, domid: int) -> None:
        self.dsm_pages.add(domid)

    def give_slots(self, domid: int, pages: bytes) -> None:
        self.memory.setdefault(domid, {})[hot_slots.ADDRESS] = pages

    def raise_slot_event(self, domid: int) -> None:
        self.events.append(domid)


class RecordingHolders(Holders):
    """Holders without processes.

    :ivar running: by number, the uuid of the domain that it is of.
    """

    def __init__(self) -> None:
        self.running: dict[int, str] = {}
        self._opened: dict[int, list[os.stat_result]] = {}
        self._next = 1

    def start(self, uuid: str, name: str, descriptors: Sequence[int]) -> int:
        self._next += 1
        self.running[self._next] = uuid
        self._opened[self._next] = [os.fstat(each) for each in descriptors]
        return self._next

    def find_holding(self, uuid: str, path: str) -> list[int]:
        wanted = os.stat(path)
        return [
            number for number in self.find(uuid) if any(os.path.samestat(each, wanted) for each in self._opened[number])
        ]

    def held(self) -> set[str]:
        return set(self.running.values())

    def has(self, uuid: str) -> bool:
        return uuid in self.running.values()

    def find(self, uuid: str) -> list[int]:
        return [number for number, each in self.running.items() if each == uuid]

    def kill(self, uuid: str, pids: Collection[int]) -> None:
        for number in pids:
            self.running.pop(number, None)

    def deleted(self) -> list[tuple[int, str, str, str]]:
        return []


def make_driver(
    folder: Path,
    backing: MemoryBacking,
    mapper: RecordingMapper,
    *,
    dsm: str = "none",
    cache: str = "auto",
    hotplug: bool = False,
    namespace: Namespace = NAMESPACE,
    acpi: AcpiBuilder | None = None,
    bad: tuple[tuple[int, int], ...] = (),
    pools: Pools | None = None,
    ledger: type[Ledger] = Ledger,
    holders: Holders | None = None,
) -> XenNvdimmDriver:
    """Return a driver whose state is in a folder of the test."""
    backing.namespace = namespace
    return XenNvdimmDriver(
        ledger=ledger(str(folder / "ledger.sqlite"), logs.tell),
        state_dir=folder,
        backings=[backing],
        acpi=acpi or NativeAcpiBuilder(),
        mapper=mapper,
        host=HostFacts(46, lambda: bad),
        emulators=Emulators("/usr/bin/real-qemu", ["/opt/qemu"], lambda path: None),
        gap=64 * GIB,
        dsm=dsm,
        cache=cache,
        hotplug=hotplug,
        pools=pools or Pools([], any_path=True),
        holders=holders or RecordingHolders(),
    )


def boot_host(monkeypatch: pytest.MonkeyPatch, boot_id: str) -> None:
    """Let the host be in the boot of that id."""
    for module in (start_module, start_steps):
        monkeypatch.setattr(module, "host_boot_id", lambda: boot_id)


def started(ledger: Ledger, uuid: str = UUID) -> PreparedStart:
    """Return the prepared start of the domain."""
    start = ledger.find_prepared(uuid)
    assert start is not None
    return start


def map_prepared(ledger: Ledger, domid: int, uuid: str = UUID) -> None:
    """Take the prepared start of the domain to its last state, as the device model of that domid does."""
    start = started(ledger, uuid)
    ledger.begin_mapping(start, domid)
    ledger.finish_mapping(start)


def domain(
    *paths: str, uuid: str | None = UUID, name: str = "db1", ram: int = 512 * MIB, label_size: int = 0
) -> DomainSpec:
    """Return a domain with one NVDIMM of 64 MiB for each path."""
    nvdimms = tuple(NvdimmSpec(slot, path, 64 * MIB, label_size) for slot, path in enumerate(paths))
    return DomainSpec(name, uuid, ram, None, nvdimms)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return how often each call that finds what is at a path is made from now on."""
    calls: Counter[str] = Counter()

    def counting(name: str, call: Any) -> Any:
        def count(*words: object, **more: object) -> Any:
            calls[name] += 1
            return call(*words, **more)

        return count

    for name in ("lstat", "open", "readlink", "stat"):
        monkeypatch.setattr(os, name, counting(name, getattr(os, name)))
    return calls
