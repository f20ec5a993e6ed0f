# SPDX-License-Identifier: Apache-2.0
"""The dry-run mapper: the real mapper with a hypervisor and a xenstore that only record the calls."""

from __future__ import annotations

from nvdimm_driver.xen.domctl import DomctlMapper
from nvdimm_driver.xen.libxenctrl import E820_RAM, PAGE, Xen
from nvdimm_driver.xen.xenstore import Xenstore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    Call = tuple[Any, ...]
    Frames = tuple[int, int, int]


class DryRunMapper(DomctlMapper):
    """Records the calls and makes none. Needs neither Xen nor its libraries; no domain is alive.

    :ivar calls: (function, argument, …) in order; the size in set_paging_pool is what is added to the pool.
    """

    def __init__(self, ram: Sequence[tuple[int, int]] = ()) -> None:
        """Record calls for a machine with this RAM, given as ranges of frames (mfn, count)."""
        self.calls: list[Call] = []
        super().__init__(_RecordingXen(ram, self.calls), _RecordingXenstore(self.calls))

    def write_back_fault(
        self, mappings: Sequence[Frames], uncached: Sequence[tuple[int, int]], domid: int | None = None
    ) -> str:
        return "no hypervisor is asked"

    def describe(self) -> str:
        return "records the calls that domctl would make; needs nothing"

    def close(self) -> None:
        """Do nothing: there is no connection to close."""


class _RecordingXen(Xen):
    def __init__(self, ram: Sequence[tuple[int, int]], calls: list[Call]) -> None:
        self._ram = ram
        self._calls = calls

    def iomem_permission(self, domid: int, mfn: int, count: int, allow: bool) -> None:
        self._calls.append(("iomem_permission", domid, mfn, count, int(allow)))

    def memory_mapping(self, domid: int, gfn: int, mfn: int, count: int, add: bool) -> None:
        self._calls.append(("memory_mapping", domid, gfn, mfn, count, int(add)))

    def paging_pool(self, domid: int) -> int:
        return 0

    def set_paging_pool(self, domid: int, size: int) -> None:
        self._calls.append(("set_paging_pool", domid, size))

    def pin_memory_cacheattr(self, domid: int, gfn: int, count: int, memory_type: int) -> bool:
        self._calls.append(("pin_memory_cacheattr", domid, gfn, count, memory_type))
        return True

    def machine_memory_map(self) -> list[tuple[int, int, int]]:
        return [(mfn * PAGE, count * PAGE, E820_RAM) for mfn, count in self._ram]

    def maximum_gfn(self, domid: int) -> int | None:
        return None

    def populate_physmap_exact(self, domid: int, gfn: int, count: int) -> None:
        self._calls.append(("populate_physmap_exact", domid, gfn, count))

    def raise_pci_interrupt(self, domid: int, device: int) -> None:
        self._calls.append(("raise_pci_interrupt", domid, device))

    def write_memory(self, domid: int, address: int, data: bytes) -> None:
        self._calls.append(("write_memory", domid, address, len(data)))


class _RecordingXenstore(Xenstore):
    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls

    def read(self, path: str) -> str | None:
        return None

    def names(self, path: str) -> list[str]:
        return []

    def write(self, path: str, value: str) -> None:
        self._calls.append(("xenstore_write", path, value))
