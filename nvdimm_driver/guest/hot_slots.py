# SPDX-License-Identifier: Apache-2.0
"""Hot-plug slots of a guest: the pages of its RAM in which dom0 and the code in its ACPI tables tell each other.

Each slot has a record. dom0 writes which NVDIMM is in the slot, and asks; the code writes what the guest has done with
it. No word is written by both. The guest can write all of them: what they say is believed only where it alone has the
damage. Pure, and imports little: the device model uses it.

A record has 512 bytes, little endian:

======  ======  =====================================================================================
offset  writer  what
======  ======  =====================================================================================
0       dom0    count of the NVDIMMs that have been put into the slot
4       dom0    count of dom0's requests
8       guest   the first count when it last read which NVDIMM there is
12      guest   the first count when it last ejected one: the slot is empty while both are the same
16, 20  guest   event and status of its last answer (``_OST``, ACPI 6.5 §6.3.5)
24      dom0    bytes of NFIT structures
28, 32  dom0    bytes of the label area in the guest's memory, 0 for none, and its address
40      dom0    the last request: 1 look what is there, 3 eject it
64      dom0    the NFIT structures
======  ======  =====================================================================================
"""

from __future__ import annotations

import struct

from nvdimm_driver.guest.p2m import TABLES_GFN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

PAGE = 4096
FIRST_GFN = TABLES_GFN + 63
"""The first of the pages, behind those of the ACPI tables."""
ADDRESS = FIRST_GFN * PAGE
SIGNATURE = b"NVHP"
"""The first bytes of the first page. Behind it are the count of slots, and the count of interrupts that the guest has
handled."""
SLOTS_OFFSET, EVENTS_OFFSET = 4, 8
RECORD = 512
STRUCTURES_OFFSET = 64
STRUCTURES_MAX = RECORD - STRUCTURES_OFFSET
LOOK, EJECT = 1, 3
GSI = 47
"""The interrupt: INTA of the PCI slot 00:1f, which has no device, and which no other slot shares
(xen/include/asm-x86/hvm/irq.h:hvm_pci_intx_gsi)."""
PCI_DEVICE = 31

_FIXED = struct.Struct("<8IQI")
_COUNTS = struct.Struct("<II")


class SlotRecord:
    """The record of one slot.

    :ivar plugs: count of the NVDIMMs that have been put into it.
    :ivar requests: count of dom0's requests.
    :ivar taken: :attr:`plugs` when the guest last read which NVDIMM there is.
    :ivar ejected: :attr:`plugs` when the guest last ejected one.
    :ivar answer: event and status of the guest's last answer.
    :ivar label_size: bytes; 0 without a label area in the guest's memory.
    :ivar label_base: its guest-physical address.
    :ivar structures: NFIT structures of the NVDIMM.
    :ivar request: the last request.
    """

    __slots__ = (
        *("answer", "ejected", "label_base", "label_size", "plugs", "request", "requests", "structures", "taken"),
    )

    def __init__(
        self,
        plugs: int = 0,
        requests: int = 0,
        taken: int = 0,
        ejected: int = 0,
        answer: tuple[int, int] = (0, 0),
        label_size: int = 0,
        label_base: int = 0,
        structures: bytes = b"",
        request: int = LOOK,
    ) -> None:
        self.plugs = plugs
        self.requests = requests
        self.taken = taken
        self.ejected = ejected
        self.answer = answer
        self.label_size = label_size
        self.label_base = label_base
        self.structures = structures
        self.request = request

    @classmethod
    def parse(cls, record: bytes) -> Self:
        """Read a record; the guest may have written anything into it."""
        plugs, requests, taken, ejected, *answer, length, label_size, label_base, request = _FIXED.unpack_from(record)
        structures = record[STRUCTURES_OFFSET : STRUCTURES_OFFSET + min(length, STRUCTURES_MAX)]
        label = label_size, label_base
        return cls(plugs, requests, taken, ejected, (answer[0], answer[1]), *label, structures, request)

    @property
    def is_empty(self) -> bool:
        """Return True when no NVDIMM has been put into it, or the guest has ejected that."""
        return self.plugs == self.ejected

    @property
    def is_taken(self) -> bool:
        """Return True when the guest has read which NVDIMM there is now."""
        return not self.is_empty and self.taken == self.plugs

    def to_bytes(self) -> bytes:
        """Return the record.

        :raises ValueError: when the structures are too long.
        """
        if len(self.structures) > STRUCTURES_MAX:
            raise ValueError(f"{len(self.structures)} bytes of NFIT structures; {STRUCTURES_MAX} fit")
        counts = self.plugs, self.requests, self.taken, self.ejected
        sizes = len(self.structures), self.label_size, self.label_base
        fixed = _FIXED.pack(*counts, *self.answer, *sizes, self.request)
        return fixed.ljust(STRUCTURES_OFFSET, b"\0") + self.structures.ljust(STRUCTURES_MAX, b"\0")

    def writes(self, slot: int) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
        """Return what dom0 writes, as (address, bytes), in that order: what there is, and then the counts.

        Nothing that the guest writes is among it.
        """
        at, whole = address_of(slot), self.to_bytes()
        return (at + 24, whole[24:]), (at, _COUNTS.pack(self.plugs, self.requests))


def address_of(slot: int) -> int:
    """Return the guest-physical address of a slot's record."""
    return ADDRESS + PAGE + slot * RECORD


def pages(count: int, records: Mapping[int, SlotRecord]) -> bytes:
    """Return what the pages of a guest with slots 0 to ``count - 1`` have when it starts.

    :param records: those that are not empty, by slot.
    """
    whole = bytearray(PAGE + -(-count * RECORD // PAGE) * PAGE)
    whole[:EVENTS_OFFSET] = SIGNATURE + count.to_bytes(4, "little")
    for slot, record in records.items():
        at = address_of(slot) - ADDRESS
        whole[at : at + RECORD] = record.to_bytes()
    return bytes(whole)
