# SPDX-License-Identifier: Apache-2.0
"""The mapper for a stock Xen: machine frames by domctls, ACPI tables through hvmloader's two xenstore keys."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from nvdimm_driver import caching
from nvdimm_driver.errors import LayoutError, NoWriteBackError, XenError
from nvdimm_driver.guest import hot_slots, p2m
from nvdimm_driver.guest.p2m import DSM_GFN, TABLES_GFN
from nvdimm_driver.plugins import Mapper
from nvdimm_driver.sizes import align_up, human, units
from nvdimm_driver.xen import frames_in_use, write_back
from nvdimm_driver.xen.libxenctrl import (
    DELETE_CACHEATTR,
    E820_RAM,
    PAGE,
    WRITE_BACK,
    Xen,
    dom0_kind,
    hypervisor,
)
from nvdimm_driver.xen.xenstore import Xenstore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Frames = tuple[int, int, int]

MIB = 1 << 20

FIRST_RESERVED = 0x7FF0
"""DOMID_FIRST_RESERVED of xen/include/public/xen.h: no domain has this id, or a higher one."""
TABLES_PAGES = 63
"""With the ``_DSM`` page, 64 of the 256 pages that libxl leaves free below the domain's memory limit."""
PINNED_RANGES = 64
"""MAX_PINNED_CACHEATTR_RANGES (xen/arch/x86/hvm/mtrr.c), of a domain."""
TABLES_COUNT = 4
"""hvmloader takes 15 secondary tables, makes up to 11 of them itself, and drops the last ones silently
(tools/libacpi/build.c:construct_secondary_tables, construct_passthrough_tables)."""
ACPI_HEADER = 36


class DomctlMapper(Mapper):
    """Maps with XEN_DOMCTL_memory_mapping. The guest must be paused and must not have run yet."""

    def __init__(self, xen: Xen | None = None, xenstore: Xenstore | None = None) -> None:
        """Use these connections; open a missing one when it is first needed."""
        self._xen = xen
        self._xenstore = xenstore

    @property
    def xen(self) -> Xen:
        """The connection to the hypervisor."""
        if self._xen is None:
            self._xen = Xen()
        return self._xen

    @property
    def xenstore(self) -> Xenstore:
        """The connection to xenstore."""
        if self._xenstore is None:
            self._xenstore = Xenstore()
        return self._xenstore

    def describe(self) -> str:
        return "maps host frames with Xen domctls; needs root in dom0 and libxenctrl of the running Xen (4.17 or newer)"

    def ram(self) -> list[tuple[int, int]]:
        ranges = []
        for address, size, kind in self.xen.machine_memory_map():
            if kind == E820_RAM and size:
                first, last = address // PAGE, (address + size - 1) // PAGE  # a frame that is partly RAM counts as RAM
                ranges.append((first, last - first + 1))
        return ranges

    def is_alive(self, domid: int, uuid: str) -> bool:
        # A dying domain loses its xenstore entries first: a domain without an entry may be the one asked for.
        return self.xen.maximum_gfn(domid) is not None and self.uuid(domid) in (None, uuid.lower())

    def guests(self) -> list[tuple[int, str | None]]:
        return [
            (domid, self.uuid(domid)) for domid in range(1, FIRST_RESERVED) if self.xen.maximum_gfn(domid) is not None
        ]

    def guest_end(self, domid: int) -> int:
        last = self.xen.maximum_gfn(domid)
        if last is None:
            raise XenError(f"domain {domid} is gone", hint="its creation was aborted or timed out")
        return last + 1

    def uuid(self, domid: int) -> str | None:
        vm = self.xenstore.read(f"/local/domain/{domid}/vm")
        return None if vm is None else vm.removeprefix("/vm/").lower()

    def write_back_fault(
        self, mappings: Sequence[Frames], uncached: Sequence[tuple[int, int]], domid: int | None = None
    ) -> str:
        if fault := write_back.find_fault(self.xen.capabilities(), self.xen.command_line(), dom0_kind()):
            return fault
        ranges = len(guest_runs(mappings, uncached))
        if ranges > PINNED_RANGES:
            return f"its NVDIMMs are {ranges} separate ranges without their label areas, and Xen takes {PINNED_RANGES}"
        return caching.SHADOW if domid is not None and not self.xen.has_hap(domid) else ""

    def map(self, domid: int, mappings: Sequence[Frames], uncached: Sequence[tuple[int, int]] = ()) -> int:
        pieces = cut(mappings, uncached)
        self._raise_paging_pool(domid, pieces)
        granted: list[Frames] = []
        mapped: list[Frames] = []
        pinned: list[tuple[int, int]] = []
        try:
            for run in guest_runs(mappings, uncached):  # before the mapping: Xen looks at NPT's entries then, only
                if not self.xen.pin_memory_cacheattr(domid, *run, WRITE_BACK):
                    raise NoWriteBackError(
                        f"Xen refuses write-back for {run[1]} frames of domain {domid}, gfn {run[0]:#x}, after "
                        f"{len(pinned)} other ranges",
                        hint="with cache 'auto', the guest starts uncached",
                    )
                pinned.append(run)
            for gfn, mfn, count in pieces:
                self.xen.iomem_permission(domid, mfn, count, True)
                granted.append((gfn, mfn, count))
                # libxc splits this into hypercalls of 64 entries and removes the whole range when one fails.
                self.xen.memory_mapping(domid, gfn, mfn, count, True)
                mapped.append((gfn, mfn, count))
        except BaseException as error:
            failures = self._undo(domid, granted, mapped, pinned)
            if failures:
                raise XenError(
                    f"{error}; then rolling back failed: {'; '.join(failures)}",
                    hint=f"destroy domain {domid}: that drops its mappings and permissions",
                ) from error
            raise
        return p2m.cost(pieces)[2]

    def unmap(self, domid: int, mappings: Sequence[Frames], uncached: Sequence[tuple[int, int]] = ()) -> None:
        pieces = cut(mappings, uncached)
        failures = self._undo(domid, pieces, pieces, guest_runs(mappings, uncached))
        if failures:
            raise XenError("; ".join(failures), hint=f"destroy domain {domid}: that drops its mappings and permissions")

    def announce(self, domid: int, mappings: Sequence[Frames]) -> None:
        frames_in_use.announce(self.xenstore, domid, [(mfn, count) for _, mfn, count in mappings])

    def frames_of_guests(self) -> list[tuple[int, int, int]]:
        if self._xenstore is None and hypervisor() != "xen":
            return []  # without Xen, there are no guests, and the operator can prepare backings
        return [
            (domid, mfn, count)
            for domid in frames_in_use.domids(self.xenstore)
            for mfn, count in frames_in_use.read(self.xenstore, domid)
            if self.xen.maximum_gfn(domid) is not None
        ]

    def deliver(self, domid: int, tables: bytes) -> None:
        folder = f"/local/domain/{domid}/hvmloader/acpi"
        users = self._users_tables(domid, folder)
        number = count_tables(users, "the user's ACPI tables") + count_tables(tables, "the NVDIMM tables")
        if number > TABLES_COUNT:
            raise LayoutError(
                f"{number} ACPI tables for domain {domid}; hvmloader is only sure to take {TABLES_COUNT}",
                hint="put fewer tables into <os><acpi><table>",
            )
        together = users + tables
        _check_size(domid, len(together))
        self.xen.populate_physmap_exact(domid, TABLES_GFN, units(len(together), PAGE))
        self.xen.write_memory(domid, TABLES_GFN * PAGE, together)
        self.xenstore.write(f"{folder}/address", hex(TABLES_GFN * PAGE))
        self.xenstore.write(f"{folder}/length", hex(len(together)))

    def read(self, domid: int, address: int, length: int) -> bytes:
        return self.xen.read_memory(domid, address, length)

    def write(self, domid: int, address: int, data: bytes) -> None:
        self.xen.write_memory(domid, address, data)

    def give_dsm_page(self, domid: int) -> None:
        self.xen.populate_physmap_exact(domid, DSM_GFN, 1)

    def give_slots(self, domid: int, pages: bytes) -> None:
        self.xen.populate_physmap_exact(domid, hot_slots.FIRST_GFN, units(len(pages), PAGE))
        self.xen.write_memory(domid, hot_slots.ADDRESS, pages)

    def raise_slot_event(self, domid: int) -> None:
        self.xen.raise_pci_interrupt(domid, hot_slots.PCI_DEVICE)

    def copy_disk_buffers(self, domid: int) -> None:
        folder = f"/local/domain/{domid}/device/vbd"
        for disk in self.xenstore.names(folder):
            self.xenstore.write(f"{folder}/{disk}/trusted", "0")

    def close(self) -> None:
        """Close the open connections. Can be repeated; the mapper can be used again."""
        xen, self._xen = self._xen, None
        if xen is not None:
            xen.close()
        xenstore, self._xenstore = self._xenstore, None
        if xenstore is not None:
            xenstore.close()

    def _raise_paging_pool(self, domid: int, mappings: Sequence[Frames]) -> None:
        """Enlarge the paging pool, which libxl has sized for RAM alone, by the page tables of the mappings.

        Xen does not report how much of the pool is free. The pool is not shrunk later: Xen frees it with the domain.
        """
        size = page_tables(mappings) * PAGE
        more = align_up(size, MIB) + MIB
        self.xen.set_paging_pool(domid, self.xen.paging_pool(domid) + more)

    def _undo(
        self,
        domid: int,
        granted: Sequence[Frames],
        mapped: Sequence[Frames],
        pinned: Sequence[tuple[int, int]],
    ) -> list[str]:
        """Undo everything in reverse order, also after a failure; return the failures."""
        failures = []
        for gfn, mfn, count in reversed(mapped):
            try:
                if count:
                    self.xen.memory_mapping(domid, gfn, mfn, count, False)
            except XenError as error:
                failures.append(str(error))
        for _, mfn, count in reversed(granted):
            try:
                self.xen.iomem_permission(domid, mfn, count, False)
            except XenError as error:
                failures.append(str(error))
        for run in reversed(pinned):
            try:
                self.xen.pin_memory_cacheattr(domid, *run, DELETE_CACHEATTR)
            except XenError as error:
                failures.append(str(error))
        return failures

    def _users_tables(self, domid: int, folder: str) -> bytes:
        """Return the tables that libxl put into the guest for ``<os><acpi><table>``; empty without any."""
        address, length = self.xenstore.read(f"{folder}/address"), self.xenstore.read(f"{folder}/length")
        if address is None and length is None:
            return b""
        try:
            start, size = int(address or "", 0), int(length or "", 0)
        except ValueError:
            raise XenError(
                f"{folder}: address '{address or ''}' and length '{length or ''}' must be numbers",
                hint="libxl writes them for <os><acpi><table>; try without that element",
            ) from None
        if start == TABLES_GFN * PAGE:
            raise XenError(f"domain {domid} has its ACPI tables already", hint="each domain gets its tables once")
        _check_size(domid, size)
        return self.xen.read_memory(domid, start, size) if size else b""


def guest_runs(mappings: Sequence[Frames], uncached: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """Return the guest frames of the mappings as runs (gfn, count).

    Adjacent runs are joined because Xen pins at most 64 ranges.

    :param uncached: frames to leave out.
    """
    runs: list[tuple[int, int]] = []
    for gfn, _, count in sorted(mappings):
        if runs and sum(runs[-1]) == gfn:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((gfn, count))
    for hole in uncached:
        runs = [part for run in runs for part in _without(run, hole)]
    return runs


def cut(mappings: Sequence[Frames], uncached: Sequence[tuple[int, int]]) -> list[Frames]:
    """Return the mappings, cut where uncached frames begin or end.

    Xen maps no entry of 2 MiB across the end of a call. On NPT, one that is pinned in part would be uncached.
    """
    edges = sorted({edge for gfn, count in uncached for edge in (gfn, gfn + count)})
    pieces = []
    for gfn, mfn, count in mappings:
        begin = gfn
        for end in (*edges[bisect_right(edges, gfn) : bisect_left(edges, gfn + count)], gfn + count):
            pieces.append((begin, mfn + begin - gfn, end - begin))
            begin = end
    return pieces


def _without(run: tuple[int, int], hole: tuple[int, int]) -> list[tuple[int, int]]:
    """Return a run of frames without a hole: up to two runs."""
    (gfn, count), (first, frames_out) = run, hole
    before = (gfn, min(count, first - gfn))
    behind = max(gfn, first + frames_out)
    return [part for part in (before, (behind, gfn + count - behind)) if part[1] > 0]


def page_tables(mappings: Sequence[Frames]) -> int:
    """Return the maximum number of page-table pages that the mappings need.

    That is one for each 2 MiB of guest-physical space not mapped by a single entry, each GiB and each 512 GiB.
    """
    pages = 0
    for gfn, mfn, count in mappings:
        front, superpages, behind = p2m.entries(gfn, mfn, count)
        pages += (front > 0) + (behind > 0) if superpages else _touched(gfn, count, 9)
        pages += _touched(gfn, count, 18) + _touched(gfn, count, 27)
    return pages


def count_tables(tables: bytes, what: str) -> int:
    """Return the number of concatenated ACPI tables.

    hvmloader finds the next table by the length of the last and checks nothing (construct_passthrough_tables). With a
    wrong length, it would copy whatever follows.

    :raises LayoutError: when the lengths do not add up.
    """
    number = offset = 0
    while offset < len(tables):
        length = int.from_bytes(tables[offset + 4 : offset + 8], "little")
        if not ACPI_HEADER <= length <= len(tables) - offset:
            raise LayoutError(
                f"{what}: table {number} at byte {offset} says it has {length} bytes; "
                f"it can have {ACPI_HEADER} to {len(tables) - offset}",
                hint="the file must consist of whole ACPI tables, one after the other",
            )
        offset += length
        number += 1
    return number


def _touched(gfn: int, count: int, shift: int) -> int:
    return ((gfn + count - 1) >> shift) - (gfn >> shift) + 1


def _check_size(domid: int, size: int) -> None:
    limit = TABLES_PAGES * PAGE
    if size > limit:
        raise LayoutError(
            f"{human(size)} of ACPI tables for domain {domid}; {human(limit)} ({TABLES_PAGES} pages) fit",
            hint="use fewer NVDIMMs, or a smaller table in <os><acpi><table>",
        )
