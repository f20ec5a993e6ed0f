# SPDX-License-Identifier: Apache-2.0
"""Cost of mappings in p2m entries and hypercalls. Pure, and imports little: the device model uses it.

A mapping is a tuple (gfn, mfn, count) of 4 KiB frames.
"""

from __future__ import annotations

from nvdimm_driver.sizes import units

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

SUPERPAGE_FRAMES = 512
DSM_GFN = 0xFD000
"""The guest's page for requests to a label server (MEMA in QEMU's SSDT), followed by the guest's ACPI tables. hvmloader
reports this range as RESERVED; it is clear of its ACPI arena, PCI BARs, IOAPIC, HPET, TPM and MSI."""
TABLES_GFN = DSM_GFN + 1
ENTRIES_PER_HYPERCALL = 64
"""xen/arch/x86/mm/p2m.c: MAP_MMIO_MAX_ITER."""


def entries(gfn: int, mfn: int, count: int) -> tuple[int, int, int]:
    """Return how many p2m entries a mapping takes: (leading 4 KiB, 2 MiB, trailing 4 KiB).

    Xen uses a 2 MiB entry wherever both frame numbers are multiples of 512 and 512 frames are left
    (xen/arch/x86/mm/p2m.c:mmio_order).
    """
    front = -gfn % SUPERPAGE_FRAMES
    if (gfn - mfn) % SUPERPAGE_FRAMES or front >= count:
        return count, 0, 0
    superpages, behind = divmod(count - front, SUPERPAGE_FRAMES)
    return front, superpages, behind


def cost(mappings: Iterable[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Return the cost of mappings: (2 MiB entries, 4 KiB entries, memory_mapping hypercalls)."""
    larger = smaller = hypercalls = 0
    for gfn, mfn, count in mappings:
        front, superpages, behind = entries(gfn, mfn, count)
        larger += superpages
        smaller += front + behind
        hypercalls += units(front + superpages + behind, ENTRIES_PER_HYPERCALL)
    return larger, smaller, hypercalls


def summary(mappings: Collection[tuple[int, int, int]]) -> dict[str, int]:
    """Return the number of extents and their :func:`cost`, by name, for the detail of an event."""
    larger, smaller, hypercalls = cost(mappings)
    return {"extents": len(mappings), "superpages": larger, "pages": smaller, "hypercalls": hypercalls}
