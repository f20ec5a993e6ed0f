# SPDX-License-Identifier: Apache-2.0
"""The nested page table of a guest (AMD's NPT), read from outside: the host's memory, by the monitor of its QEMU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.lab.errors import LabError
from tests.lab.host import XenHost

ENTRIES = 512
PRESENT, PWT, PCD, LARGE = 1, 1 << 3, 1 << 4, 1 << 7
FRAME_BITS = (1 << 52) - (1 << 12)
LEVELS = (27, 18, 9, 0)
"""By level from the root, the number of bits of a guest frame below those that are the index."""
ReadTable = Callable[[int], Sequence[int]]
"""Returns the entries of the table at an address of the host."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """An entry that maps guest frames: `count` of them, from `gfn` to `mfn` on."""

    gfn: int
    count: int
    mfn: int
    flags: int

    @property
    def is_cached(self) -> bool:
        """True when the entry leaves the memory write-back: neither PCD nor PWT is set."""
        return not self.flags & (PCD | PWT)


def leaves(read_table: ReadTable, root: int, gfn: int, count: int) -> Iterator[Leaf]:
    """Yield the entries that map guest frames, in order; those of no frame are left out.

    :param root: address of the top table.
    """
    yield from _walk(read_table, root, 0, 0, gfn, gfn + count)


def _walk(read_table: ReadTable, table: int, level: int, start: int, gfn: int, end: int) -> Iterator[Leaf]:
    span = 1 << LEVELS[level]
    first, last = max(0, (gfn - start) // span), min(ENTRIES - 1, (end - 1 - start) // span)
    entries = read_table(table)
    for index in range(first, last + 1):
        entry, begin = entries[index], start + index * span
        if not entry & PRESENT:
            continue
        if level == len(LEVELS) - 1 or entry & LARGE:
            yield Leaf(begin, span, (entry & FRAME_BITS & -(span << 12)) >> 12, entry & ~FRAME_BITS)
        else:
            yield from _walk(read_table, entry & FRAME_BITS, level + 1, begin, gfn, end)


def of_guest(host: XenHost, domid: int, gfn: int, count: int) -> list[Leaf]:
    """Return the entries that map frames of a running guest.

    :raises LabError: when Xen does not say where its table is.
    """
    said = host.check("xl dmesg -c >/dev/null; xl debug-keys v; sleep 1; xl dmesg").stdout
    found = re.search(rf"Domain {domid} .*?H_CR3 = (0x[0-9a-f]+)", said, re.DOTALL)
    if not found:
        raise LabError(f"Xen does not show the VMCB of domain {domid}:\n{said}")
    return list(leaves(host.read_table, int(found[1], 16) & FRAME_BITS, gfn, count))
