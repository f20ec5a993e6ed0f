# SPDX-License-Identifier: Apache-2.0
"""The domctl and the dry-run mapper, against a small model of the hypervisor and of xenstore."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import _cffi_backend
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvdimm_driver.errors import LayoutError, NoWriteBackError, XenError
from nvdimm_driver.guest import p2m
from nvdimm_driver.plugins import Mapper
from nvdimm_driver.xen import domctl
from nvdimm_driver.xen.domctl import DomctlMapper, guest_runs, page_tables
from nvdimm_driver.xen.dry_run import DryRunMapper
from nvdimm_driver.xen.libxenctrl import DELETE_CACHEATTR, PAGE, WRITE_BACK, Xen
from nvdimm_driver.xen.write_back import MARK
from nvdimm_driver.xen.xenstore import Xenstore

Frames = tuple[int, int, int]

DOMID = 7
UUID = "7c7b0e2e-4a6e-4f0e-9a3b-000000000001"
KEYS = f"/local/domain/{DOMID}/hvmloader/acpi"
TABLES = 0xFD001000


class FakeXen(Xen):
    """Keeps a domain's permissions and mappings as Xen does, and fails at the calls with the given numbers."""

    def __init__(self, *fail_at: int, refuse_pins: bool = False) -> None:
        self.fail_at = fail_at
        self.refuse_pins = refuse_pins
        self.log: list[tuple[Any, ...]] = []
        self.granted: list[tuple[int, int]] = []
        self.mapped: list[Frames] = []
        self.pinned: list[tuple[int, int]] = []
        self.pool = 5 << 20
        self.memory: dict[int, bytearray] = {}
        self.e820: list[tuple[int, int, int]] = []
        self.domains = {DOMID}
        self.hap = True

    def note(self, name: str, *arguments: Any) -> None:
        if len(self.log) in self.fail_at:
            self.log.append(("failed", name, *arguments))
            raise XenError(f"{name}: ENOMEM, call {len(self.log) - 1}")
        self.log.append((name, *arguments))

    def iomem_permission(self, domid: int, mfn: int, count: int, allow: bool) -> None:
        self.note("iomem_permission", domid, mfn, count, allow)
        if allow:
            self.granted.append((mfn, count))
        else:
            self.granted.remove((mfn, count))

    def memory_mapping(self, domid: int, gfn: int, mfn: int, count: int, add: bool) -> None:
        self.note("memory_mapping", domid, gfn, mfn, count, add)
        if add:
            assert any(first <= mfn and mfn + count <= first + n for first, n in self.granted), "EPERM"
            self.mapped.append((gfn, mfn, count))
            return
        inside = [run for run in self.mapped if gfn <= run[0] and run[0] + run[2] <= gfn + count]
        assert sum(run[2] for run in inside) == count, "EINVAL: not all of it is mapped"
        assert all(run[1] - run[0] == mfn - gfn for run in inside)
        self.mapped = [run for run in self.mapped if run not in inside]

    def paging_pool(self, domid: int) -> int:
        return self.pool

    def set_paging_pool(self, domid: int, size: int) -> None:
        self.note("set_paging_pool", domid, size)
        assert size % PAGE == 0
        self.pool = size

    def pin_memory_cacheattr(self, domid: int, gfn: int, count: int, memory_type: int) -> bool:
        if self.refuse_pins:
            return False
        self.note("pin_memory_cacheattr", domid, gfn, count, memory_type)
        if memory_type == WRITE_BACK:
            self.pinned.append((gfn, count))
        else:
            assert memory_type == DELETE_CACHEATTR
            self.pinned.remove((gfn, count))
        return True

    def machine_memory_map(self) -> list[tuple[int, int, int]]:
        return self.e820

    def capabilities(self) -> str:
        return f"xen-3.0-x86_64 {MARK}"

    def command_line(self) -> str:
        return "mmio-relax"

    def has_hap(self, domid: int) -> bool:
        return self.hap

    def maximum_gfn(self, domid: int) -> int | None:
        return 0xFEFFF if domid in self.domains else None

    def populate_physmap_exact(self, domid: int, gfn: int, count: int) -> None:
        self.note("populate_physmap_exact", domid, gfn, count)
        self.memory |= {gfn + n: bytearray(PAGE) for n in range(count)}

    def read_memory(self, domid: int, address: int, length: int) -> bytes:
        return bytes(self.memory[at // PAGE][at % PAGE] for at in range(address, address + length))

    def write_memory(self, domid: int, address: int, data: bytes) -> None:
        self.note("write_memory", domid, address, len(data))
        for at, byte in enumerate(data, address):
            self.memory[at // PAGE][at % PAGE] = byte


class FakeXenstore(Xenstore):
    def __init__(self, entries: dict[str, str] | None = None) -> None:
        self.entries = {} if entries is None else entries

    def read(self, path: str) -> str | None:
        return self.entries.get(path)

    def names(self, path: str) -> list[str]:
        below = [entry.removeprefix(f"{path}/") for entry in self.entries if entry.startswith(f"{path}/")]
        return sorted({entry.partition("/")[0] for entry in below})

    def write(self, path: str, value: str) -> None:
        self.entries[path] = value


def mapper(xen: FakeXen, entries: dict[str, str] | None = None) -> DomctlMapper:
    return DomctlMapper(xen, FakeXenstore(entries))


def table(signature: bytes = b"NFIT", size: int = 64) -> bytes:
    return struct.pack("<4sI", signature, size).ljust(size, signature[:1])


SMALL = st.integers(1, 200) | st.sampled_from([512, 700])
LARGE = SMALL | st.sampled_from([64 * 512, 70 * 512 + 3])


@st.composite
def plans(draw: st.DrawFn, counts: st.SearchStrategy[int] = LARGE) -> list[Frames]:
    """Draw the mappings of a guest: adjacent or apart, with or without possible superpages."""
    mappings: list[Frames] = []
    gfn = mfn = 0x140000
    for _ in range(draw(st.integers(1, 4))):
        gfn += draw(st.sampled_from([0, 0, 1, 512, 1 << 18]))
        mfn += draw(st.sampled_from([0, 1, 511, 512]))
        count = draw(counts)
        mappings.append((gfn, mfn, count))
        gfn, mfn = gfn + count, mfn + count
    return mappings


@settings(deadline=None)
@given(plans())
def test_map_does_what_was_asked_in_as_many_hypercalls_as_it_costs(mappings: list[Frames]) -> None:
    xen = FakeXen()
    hypercalls = mapper(xen).map(DOMID, mappings)
    assert hypercalls == p2m.cost(mappings)[2]
    assert xen.granted == [(mfn, count) for _, mfn, count in mappings]
    assert [call[2:5] for call in xen.log if call[0] == "memory_mapping"] == mappings
    assert sum(count for _, count in xen.pinned) == sum(count for *_, count in mappings)
    names = [call[0] for call in xen.log]
    assert "pin_memory_cacheattr" not in names[names.index("memory_mapping") :], "NPT looks at no pin afterwards"


@settings(deadline=None)
@given(plans())
def test_nothing_is_pinned_or_cut_for_a_guest_that_is_uncached(mappings: list[Frames]) -> None:
    xen = FakeXen(refuse_pins=True)
    first, last = mappings[0], mappings[-1]
    assert mapper(xen).map(DOMID, mappings, [(first[0], last[0] + last[2] - first[0])]) == p2m.cost(mappings)[2]
    assert (xen.mapped, xen.pinned) == (mappings, [])


@settings(deadline=None)
@given(plans(SMALL))
def test_every_failure_is_taken_back_in_reverse_order(mappings: list[Frames]) -> None:
    whole = FakeXen()
    mapper(whole).map(DOMID, mappings)
    for position in range(len(whole.log)):
        xen = FakeXen(position)
        with pytest.raises(XenError, match=f"call {position}"):
            mapper(xen).map(DOMID, mappings)
        assert (xen.granted, xen.mapped, xen.pinned) == ([], [], [])
        assert xen.log[:position] == whole.log[:position]
        done = xen.log[:position]
        undo = [(*call[:-1], False) for call in reversed(done) if call[0] == "memory_mapping"]
        undo += [(*call[:-1], False) for call in reversed(done) if call[0] == "iomem_permission"]
        undo += [(*call[:-1], DELETE_CACHEATTR) for call in reversed(done) if call[0] == "pin_memory_cacheattr"]
        assert xen.log[position + 1 :] == undo


@settings(deadline=None)
@given(plans())
def test_unmap_undoes_map(mappings: list[Frames]) -> None:
    xen = FakeXen()
    mapper(xen).map(DOMID, mappings)
    mapper(xen).unmap(DOMID, mappings)
    assert (xen.granted, xen.mapped, xen.pinned) == ([], [], [])


def test_a_failure_to_take_back_is_told_with_the_first_one_and_the_rest_goes_on() -> None:
    xen = FakeXen(6, 7)  # after pool, two pins, grant, map, grant, the second mapping fails; then the first's removal
    with pytest.raises(XenError) as caught:
        mapper(xen).map(DOMID, [(0x140000, 0x200000, 8), (0x150000, 0x210000, 8)])
    assert "call 6; then rolling back failed: " in caught.value.message
    assert "call 7" in caught.value.message
    assert f"domain {DOMID}" in caught.value.hint
    assert xen.mapped == [(0x140000, 0x200000, 8)]
    assert (xen.granted, xen.pinned) == ([], [])


def test_unmap_goes_on_after_a_failure_and_tells_it() -> None:
    xen = FakeXen()
    mappings = [(0x140000, 0x200000, 8), (0x150000, 0x210000, 8)]
    mapper(xen).map(DOMID, mappings)
    failing = len(xen.log)
    xen.fail_at = (failing,)
    with pytest.raises(XenError, match=f"call {failing}"):
        mapper(xen).unmap(DOMID, mappings)
    assert (xen.granted, xen.mapped) == ([], [(0x150000, 0x210000, 8)])


def test_why_a_guest_cannot_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    xen = FakeXen()
    apart = [(0x140000 + 1024 * n, 0x200000 + 1024 * n, 512) for n in range(64)]
    monkeypatch.setattr(domctl, "dom0_kind", lambda: "PV")
    assert mapper(xen).write_back_fault(apart, (), DOMID) == ""
    assert "65 separate ranges" in mapper(xen).write_back_fault([*apart, (1, 1, 1)], ())
    assert mapper(xen).write_back_fault([*apart, (1, 1, 1)], [(1, 1)]) == ""
    xen.hap = False
    assert "hap is off" in mapper(xen).write_back_fault(apart, (), DOMID)
    monkeypatch.setattr(domctl, "dom0_kind", lambda: "PVH")
    assert "dom0 is PVH" in mapper(xen).write_back_fault(apart, ())


def test_where_write_back_is_refused_nothing_is_left() -> None:
    xen = FakeXen(refuse_pins=True)
    with pytest.raises(NoWriteBackError, match="512 frames of domain 7, gfn 0x140000, after 0 other ranges"):
        mapper(xen).map(DOMID, [(0x140000, 0x200000, 512)])
    assert (xen.granted, xen.mapped, xen.pinned) == ([], [], [])


@settings(deadline=None)
@given(plans(), st.data())
def test_mappings_are_cut_at_what_is_not_cached(mappings: list[Frames], data: st.DataObject) -> None:
    gfn, _, count = data.draw(st.sampled_from(mappings))
    first = data.draw(st.integers(0, count - 1))
    hole = (gfn + first, data.draw(st.integers(1, count - first)))
    xen = FakeXen()
    mapper(xen).map(DOMID, mappings, [hole])
    offsets = {gfn + n: mfn - gfn for gfn, mfn, count in mappings for n in range(count)}
    assert {gfn + n: mfn - gfn for gfn, mfn, count in xen.mapped for n in range(count)} == offsets
    inside = [each for each in xen.mapped if hole[0] <= each[0] < sum(hole)]
    assert sum(each[2] for each in inside) == hole[1], "no mapping is in it and beside it"
    assert not any(gfn < sum(hole) and hole[0] < gfn + count for gfn, count in xen.pinned)
    assert sum(count for _, count in xen.pinned) == len(offsets) - hole[1]
    mapper(xen).unmap(DOMID, mappings, [hole])
    assert (xen.granted, xen.mapped, xen.pinned) == ([], [], [])


@settings(deadline=None)
@given(plans())
def test_the_paging_pool_grows_by_all_the_page_tables(mappings: list[Frames]) -> None:
    tables: set[tuple[int, int]] = set()
    for gfn, mfn, count in mappings:
        front, superpages, _ = p2m.entries(gfn, mfn, count)
        small = set(range(gfn, gfn + count)) - set(range(gfn + front, gfn + front + 512 * superpages))
        tables |= {(9, n >> 9) for n in small} | {
            (shift, n >> shift) for n in (gfn, gfn + count - 1) for shift in (18, 27)
        }
    needed = len(tables)
    assert needed <= page_tables(mappings) <= needed + 5 * len(mappings)  # neighbours can share tables
    xen = FakeXen()
    before = xen.pool
    mapper(xen).map(DOMID, mappings)
    assert xen.pool - before >= needed * PAGE
    assert xen.pool - before <= needed * PAGE + (3 << 20)


def test_page_tables_of_a_tebibyte() -> None:
    tebibyte = 1 << 28
    assert page_tables([(1 << 28, 1 << 29, tebibyte)]) * PAGE == pytest.approx(4 << 20, rel=0.01)
    assert page_tables([(1 << 28, (1 << 29) + 1, tebibyte)]) * PAGE == pytest.approx(2 << 30, rel=0.01)


@settings(deadline=None)
@given(plans(), st.randoms())
def test_guest_runs_have_each_frame_once_and_no_neighbours(mappings: list[Frames], random: Any) -> None:
    random.shuffle(mappings)
    runs = guest_runs(mappings)
    assert {n for gfn, count in runs for n in range(gfn, gfn + count)} == {
        n for gfn, _, count in mappings for n in range(gfn, gfn + count)
    }
    assert all(gfn + count < following for (gfn, count), (following, _) in pairwise(runs))


def test_ram_is_every_frame_that_ram_touches() -> None:
    xen = FakeXen()
    xen.e820 = [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0x100000, 0x1000, 1),
        (0x140000000, 0x40000000, 12),
        (0x800, 0, 1),
    ]
    assert mapper(xen).ram() == [(0, 0xA0), (0x100, 1)]


@pytest.mark.parametrize(
    ("domains", "entry", "alive"),
    [
        ({DOMID}, f"/vm/{UUID}", True),
        ({DOMID}, f"/vm/{UUID.upper()}", True),
        ({DOMID}, "/vm/7c7b0e2e-4a6e-4f0e-9a3b-000000000002", False),
        ({DOMID}, None, True),
        (set(), f"/vm/{UUID}", False),
        (set(), None, False),
    ],
)
def test_a_domain_lives_while_xen_has_it_and_it_is_not_another(
    domains: set[int], entry: str | None, alive: bool
) -> None:
    xen = FakeXen()
    xen.domains = domains
    entries = {} if entry is None else {f"/local/domain/{DOMID}/vm": entry}
    assert mapper(xen, entries).is_alive(DOMID, UUID) is alive


def test_uuid_is_what_xenstore_has() -> None:
    assert mapper(FakeXen(), {f"/local/domain/{DOMID}/vm": f"/vm/{UUID}"}).uuid(DOMID) == UUID
    assert mapper(FakeXen()).uuid(DOMID) is None


def test_a_guest_copies_what_all_its_xen_disks_transfer() -> None:
    """Xen grants no frame of an NVDIMM: without a copy, a disk with a buffer in one fails."""
    disks = f"/local/domain/{DOMID}/device/vbd"
    entries = {
        f"{disks}/51712/trusted": "1",
        f"{disks}/51728/state": "1",
        f"/local/domain/{DOMID}1/device/vbd/51712/trusted": "1",
    }
    mapper(FakeXen(), entries).copy_disk_buffers(DOMID)
    assert (entries[f"{disks}/51712/trusted"], entries[f"{disks}/51728/trusted"]) == ("0", "0")
    assert entries[f"/local/domain/{DOMID}1/device/vbd/51712/trusted"] == "1"


def test_deliver_puts_tables_where_hvmloader_is_told() -> None:
    xen, entries, tables = FakeXen(), dict[str, str](), table(size=5000) + table(b"SSDT", 100)
    mapper(xen, entries).deliver(DOMID, tables)
    assert entries == {f"{KEYS}/address": "0xfd001000", f"{KEYS}/length": hex(5100)}
    assert set(xen.memory) == {0xFD001, 0xFD002}
    assert xen.read_memory(DOMID, TABLES, 5100) == tables


@settings(deadline=None)
@given(st.integers(0, PAGE - 1), st.integers(36, 2 * PAGE))
def test_deliver_keeps_the_users_table_first(offset: int, size: int) -> None:
    xen, users, ours = FakeXen(), table(b"SLIC", size), table() + table(b"SSDT")
    xen.memory = {0x1A0 + n: bytearray(PAGE) for n in range(3)}
    address = 0x1A0 * PAGE + offset
    xen.write_memory(DOMID, address, users)
    entries = {f"{KEYS}/address": hex(address), f"{KEYS}/length": hex(size)}
    mapper(xen, entries).deliver(DOMID, ours)
    assert entries == {f"{KEYS}/address": "0xfd001000", f"{KEYS}/length": hex(size + len(ours))}
    assert xen.read_memory(DOMID, TABLES, size + len(ours)) == users + ours


def test_63_pages_of_tables_fit_and_no_byte_more() -> None:
    xen, limit = FakeXen(), 63 * PAGE
    mapper(xen).deliver(DOMID, table(size=limit))
    assert set(xen.memory) == set(range(0xFD001, 0xFD040))
    with pytest.raises(LayoutError, match=r"252\.00 KiB .* 252 KiB \(63 pages\) fit"):
        mapper(FakeXen()).deliver(DOMID, table(size=limit + 1))
    users = {f"{KEYS}/address": "0x100000", f"{KEYS}/length": hex(limit + 1)}
    with pytest.raises(LayoutError, match=r"252\.00 KiB .* 252 KiB \(63 pages\) fit"):
        mapper(FakeXen(), users).deliver(DOMID, table())


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (table()[:-1], "table 0 at byte 0 says it has 64 bytes; it can have 36 to 63"),
        (table() + b"\0" * 8, "table 1 at byte 64 says it has 0 bytes"),
        (table() + b"\0" * 40, "table 1 at byte 64 says it has 0 bytes; it can have 36 to 40"),
        (table() + struct.pack("<4sI", b"SSDT", 35).ljust(64), "table 1 at byte 64 says it has 35 bytes"),
        (table() * 5, "5 ACPI tables"),
    ],
)
def test_tables_that_hvmloader_would_trip_over_are_refused(tables: bytes, message: str) -> None:
    xen, entries = FakeXen(), dict[str, str]()
    with pytest.raises(LayoutError, match=message):
        mapper(xen, entries).deliver(DOMID, tables)
    assert (xen.log, entries) == ([], {})


@pytest.mark.parametrize(
    "keys",
    [
        {f"{KEYS}/address": "0x100000"},
        {f"{KEYS}/length": "0x40"},
        {f"{KEYS}/address": "low", f"{KEYS}/length": "0x40"},
        {f"{KEYS}/address": "0xfd001000", f"{KEYS}/length": "0x40"},
    ],
)
def test_hvmloader_keys_that_cannot_be_libxls_are_refused(keys: dict[str, str]) -> None:
    xen = FakeXen()
    with pytest.raises(XenError, match=f"domain.{DOMID}"):
        mapper(xen, dict(keys)).deliver(DOMID, table())
    assert xen.log == []


@pytest.mark.parametrize("position", [0, 1])
def test_hvmloader_is_told_nothing_when_the_tables_are_not_there(position: int) -> None:
    entries: dict[str, str] = {}
    with pytest.raises(XenError, match=f"call {position}"):
        mapper(FakeXen(position), entries).deliver(DOMID, table())
    assert entries == {}


@settings(deadline=None)
@given(plans())
def test_the_dry_run_says_what_the_real_one_does(mappings: list[Frames]) -> None:
    xen, entries = FakeXen(), dict[str, str]()
    xen.pool = 0
    dry = DryRunMapper()
    steps: list[Mapper] = [mapper(xen, entries), dry]
    assert len({step.map(DOMID, mappings) for step in steps}) == 1
    for step in steps:
        step.deliver(DOMID, table())
    assert dry.calls == xen.log + [("xenstore_write", path, value) for path, value in entries.items()]


def test_the_dry_run_has_the_errors_of_the_real_one() -> None:
    dry = DryRunMapper(ram=[(0, 256), (4096, 1)])
    assert dry.ram() == [(0, 256), (4096, 1)]
    assert dry.is_alive(DOMID, UUID) is False
    assert dry.uuid(DOMID) is None
    with pytest.raises(LayoutError, match="5 ACPI tables"):
        dry.deliver(DOMID, table() * 5)
    assert dry.calls == []


def test_the_mapper_imports_nothing_slow() -> None:
    """Run without site, whose .pth files can import anything."""
    code = "import sys, nvdimm_driver.xen.domctl; print(*sys.modules)"
    path = f"{Path(domctl.__file__).parents[2]}{os.pathsep}{Path(_cffi_backend.__file__ or '').parent}"
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    imported = set(run.stdout.split())
    slow = "cffi collections contextlib ctypes dataclasses enum functools glob json logging pathlib re stevedore typing"
    assert "_cffi_backend" in imported
    assert imported.isdisjoint(slow.split())


@settings(deadline=None)
@given(plans(), st.lists(st.tuples(st.integers(0, 1 << 22), st.integers(1, 600)), max_size=4))
def test_what_must_not_be_cached_is_never_pinned(mappings: list[Frames], uncached: list[tuple[int, int]]) -> None:
    """All other frames are pinned as if none were uncached."""

    def frames_of(runs: list[tuple[int, int]]) -> set[int]:
        return {frame for gfn, count in runs for frame in range(gfn, gfn + count)}

    small = [(gfn, mfn, min(count, 2000)) for gfn, mfn, count in mappings]
    holes = uncached + [(gfn + count // 2, 3) for gfn, _, count in small]
    assert frames_of(guest_runs(small, holes)) == frames_of(guest_runs(small)) - frames_of(holes)
    assert all(count > 0 for _, count in guest_runs(small, holes))
    xen = FakeXen()
    mapper(xen).map(DOMID, small, holes)
    assert xen.pinned == guest_runs(small, holes)
    mapper(xen).unmap(DOMID, small, holes)
    assert (xen.granted, xen.mapped, xen.pinned) == ([], [], [])
