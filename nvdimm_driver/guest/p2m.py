"""How runs of frames become p2m entries and hypercalls. Pure, and imports little: the device model uses it.

A mapping is a tuple (gfn, mfn, count) of 4 KiB frames.
"""

from __future__ import annotations

from nvdimm_driver.sizes import units

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

SUPERPAGE_FRAMES = 512
DSM_GFN = 0xFD000
"""The guest's page for requests to a label server (MEMA in QEMU's SSDT), and behind it its ACPI tables: what hvmloader
reports as RESERVED, clear of its ACPI arena, PCI BARs, IOAPIC, HPET, TPM and MSI."""
TABLES_GFN = DSM_GFN + 1
ENTRIES_PER_HYPERCALL = 64
"""xen/arch/x86/mm/p2m.c: MAP_MMIO_MAX_ITER."""


def entries(gfn: int, mfn: int, count: int) -> tuple[int, int, int]:
    """Cut one mapping into p2m entries: (4 KiB ones in front, 2 MiB ones, 4 KiB ones behind).

    Xen takes a 2 MiB entry wherever both frame numbers are multiples of 512 and 512 frames are left
    (xen/arch/x86/mm/p2m.c:mmio_order).
    """
    front = -gfn % SUPERPAGE_FRAMES
    if (gfn - mfn) % SUPERPAGE_FRAMES or front >= count:
        return count, 0, 0
    superpages, behind = divmod(count - front, SUPERPAGE_FRAMES)
    return front, superpages, behind


def cost(mappings: Iterable[tuple[int, int, int]]) -> tuple[int, int, int]:
    """What the mappings cost: (2 MiB entries, 4 KiB entries, memory_mapping hypercalls)."""
    larger = smaller = hypercalls = 0
    for gfn, mfn, count in mappings:
        front, superpages, behind = entries(gfn, mfn, count)
        larger += superpages
        smaller += front + behind
        hypercalls += units(front + superpages + behind, ENTRIES_PER_HYPERCALL)
    return larger, smaller, hypercalls


def summary(mappings: Collection[tuple[int, int, int]]) -> dict[str, int]:
    """The same by name, and how many extents there are: for the detail of an event."""
    larger, smaller, hypercalls = cost(mappings)
    return {"extents": len(mappings), "superpages": larger, "pages": smaller, "hypercalls": hypercalls}
