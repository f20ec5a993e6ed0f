# SPDX-License-Identifier: Apache-2.0
"""Encoding and decoding of ACPI tables: the common header, and the whole NFIT. Pure.

Source: ACPI 6.5, §5.2.6 (header) and §5.2.25 (NFIT). All numbers are little endian; sizes and addresses are in bytes.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import astuple, dataclass, replace
from typing import ClassVar, Self, TypeVar

from nvdimm_driver.errors import AcpiError

PERSISTENT_MEMORY = uuid.UUID("66f0d379-b4f3-4074-ac43-0d3318b78cdb")
"""Address range type of byte-addressable persistent memory (ACPI 6.5, table 5.125)."""

NVDIMM_VENDOR = 0x8086
"""Vendor of an NVDIMM of QEMU (hw/acpi/nvdimm.c:nvdimm_build_structure_dcr), and of the driver."""

_CHECKSUM_OFFSET = 9
_T = TypeVar("_T", bound="Structure")


def checksum(data: bytes | bytearray) -> int:
    """Return the byte that, added to the sum of ``data``, makes it 0 modulo 256."""
    return -sum(data) & 0xFF


def serial_number(slot: int) -> int:
    """Return the serial number of an NVDIMM of QEMU (hw/acpi/nvdimm.c:nvdimm_slot_to_sn), and of the driver."""
    return 0x123456 + slot


@dataclass(frozen=True)
class Header:
    """The first 36 bytes of a table (ACPI 6.5 §5.2.6).

    :ivar length: bytes of the whole table, including the header.
    """

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<4sIBB6s8sI4sI")
    SIZE: ClassVar[int] = FORMAT.size

    signature: bytes
    length: int
    revision: int
    checksum: int
    oem_id: bytes
    oem_table_id: bytes
    oem_revision: int
    creator_id: bytes
    creator_revision: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read the header at the start of ``data``.

        :raises AcpiError: when there are fewer than 36 bytes.
        """
        if len(data) < cls.SIZE:
            raise AcpiError(f"ACPI table of {len(data)} bytes: shorter than its header of {cls.SIZE} bytes")
        return cls(*cls.FORMAT.unpack_from(data))

    def to_bytes(self) -> bytes:
        return _pack(self.FORMAT, self)

    def __str__(self) -> str:
        return (
            f"{text(self.signature)}: {self.length} bytes, revision {self.revision}, "
            f"OEM '{text(self.oem_id)}' '{text(self.oem_table_id)}' {self.oem_revision}, "
            f"creator '{text(self.creator_id)}' {self.creator_revision:#x}"
        )


def text(data: bytes) -> str:
    """Return a header's identifier as text without its padding; other than printable ASCII is escaped (``\\xNN``)."""
    return data.rstrip(b" \0").decode("latin-1").encode("unicode_escape").decode("ascii")


def seal(header: Header, body: bytes) -> bytes:
    """Return the table with this header and body; length and checksum are computed, whatever the header has.

    :raises AcpiError: when a value of the header does not fit its field.
    """
    header = replace(header, length=Header.SIZE + len(body), checksum=0)
    table = bytearray(header.to_bytes() + body)
    table[_CHECKSUM_OFFSET] = checksum(table)
    return bytes(table)


def verify_table(table: bytes) -> Header:
    """Return the header of a table after checking its signature, length and checksum.

    A guest's firmware checks none of these (tools/libacpi/build.c:construct_passthrough_tables), so the driver must.

    :raises AcpiError: when one is wrong.
    """
    header = Header.parse(table)
    if not all(byte in b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_" for byte in header.signature):
        raise AcpiError(f"ACPI table has signature '{text(header.signature)}', not four capital letters, digits or _")
    name = text(header.signature)
    if header.length != len(table):
        raise AcpiError(f"ACPI table {name} says it has {header.length} bytes, but has {len(table)}")
    if sum(table) & 0xFF:
        raise AcpiError(f"ACPI table {name} has a wrong checksum: its bytes add up to {sum(table) & 0xFF:#x}, not 0")
    return header


def split(blob: bytes) -> list[bytes]:
    """Check and return the tables that are concatenated in ``blob``.

    :raises AcpiError: when one is malformed.
    """
    found = []
    while blob:
        length = Header.parse(blob).length
        verify_table(blob[:length])
        found.append(blob[:length])
        blob = blob[length:]
    return found


@dataclass(frozen=True)
class Structure:
    """Base of the NFIT structures, which all start with a 16-bit type and a 16-bit length.

    Subclasses list the fields after these two in the order of the format. They include the reserved fields, so that
    parsing and encoding preserve every byte.
    """

    TYPE: ClassVar[int]
    FORMAT: ClassVar[struct.Struct]

    def to_bytes(self) -> bytes:
        """Return the structure with its type and length.

        :raises AcpiError: when a value does not fit its field.
        """
        body = _pack(self.FORMAT, self)
        return struct.pack("<HH", self.TYPE, 4 + len(body)) + body

    @classmethod
    def parse(cls, body: bytes) -> Self:
        return cls(*cls.FORMAT.unpack(body))


@dataclass(frozen=True)
class SpaRange(Structure):
    """System Physical Address Range (§5.2.25.2).

    :ivar index: number by which a :class:`RegionMapping` refers to it; not 0.
    :ivar flags: bit mask; 1: control region is for hot-add management only, 2: ``proximity_domain`` is valid.
    :ivar guid: type of the range, in the mixed byte order of EFI.
    :ivar attributes: EFI memory attributes.
    """

    TYPE = 0
    FORMAT = struct.Struct("<HHII16sQQQ")

    index: int
    flags: int
    reserved: int
    proximity_domain: int
    guid: bytes
    base: int
    length: int
    attributes: int

    @property
    def kind(self) -> uuid.UUID:
        return uuid.UUID(bytes_le=self.guid)

    def __str__(self) -> str:
        kind = "persistent memory" if self.kind == PERSISTENT_MEMORY else f"type {self.kind}"
        return (
            f"SPA range {self.index}: {kind}, base {self.base:#x}, length {self.length:#x}, "
            f"proximity domain {self.proximity_domain}, flags {self.flags:#x}, attributes {self.attributes:#x}"
        )


@dataclass(frozen=True)
class RegionMapping(Structure):
    """NVDIMM Region Mapping (§5.2.25.3): maps an SPA range to an NVDIMM.

    :ivar handle: the NVDIMM's device handle, ``_ADR`` of its device.
    :ivar size: bytes of the region.
    :ivar offset: bytes from the start of the SPA range.
    :ivar dpa: address of the region within the NVDIMM.
    """

    TYPE = 1
    FORMAT = struct.Struct("<IHHHHQQQHHHH")

    handle: int
    physical_id: int
    region_id: int
    spa_index: int
    control_index: int
    size: int
    offset: int
    dpa: int
    interleave_index: int
    interleave_ways: int
    flags: int
    reserved: int

    def __str__(self) -> str:
        return (
            f"Region mapping: handle {self.handle:#x}, SPA range {self.spa_index}, control region "
            f"{self.control_index}, size {self.size:#x}, offset {self.offset:#x}, DPA {self.dpa:#x}, "
            f"interleave ways {self.interleave_ways}, state flags {self.flags:#x}"
        )


@dataclass(frozen=True)
class ControlRegion(Structure):
    """NVDIMM Control Region (§5.2.25.6) of 80 bytes.

    :ivar interface_code: format interface code (JEDEC): how software accesses the NVDIMM.
    :ivar block_windows: number of block control windows.
    :ivar window: the block control window's fields, unused here.
    """

    TYPE = 4
    FORMAT = struct.Struct("<HHHHHHHBBHHIHH48s")

    index: int
    vendor: int
    device: int
    revision: int
    subsystem_vendor: int
    subsystem_device: int
    subsystem_revision: int
    valid_fields: int
    manufacturing_location: int
    manufacturing_date: int
    reserved: int
    serial: int
    interface_code: int
    block_windows: int
    window: bytes

    def __str__(self) -> str:
        return (
            f"Control region {self.index}: vendor {self.vendor:#06x}, device {self.device:#06x}, revision "
            f"{self.revision}, serial number {self.serial:#010x}, interface code {self.interface_code:#06x}, "
            f"block windows {self.block_windows}"
        )


@dataclass(frozen=True)
class PlatformCapabilities(Structure):
    """Platform Capabilities (§5.2.25.9).

    :ivar highest_bit: the highest valid bit of ``capabilities``.
    :ivar capabilities: bit mask; 1: CPU caches are flushed on power loss, 2: the memory controller's buffers are.
    """

    TYPE = 7
    FORMAT = struct.Struct("<B3sII")

    highest_bit: int
    reserved: bytes
    capabilities: int
    reserved2: int

    def __str__(self) -> str:
        return f"Platform capabilities: {self.capabilities:#x}, valid bits 0 to {self.highest_bit}"


@dataclass(frozen=True)
class RawStructure(Structure):
    """A structure of another type (interleave, SMBIOS, block data window, flush hints) or of unexpected length."""

    type: int
    body: bytes

    def to_bytes(self) -> bytes:
        try:
            return struct.pack("<HH", self.type, 4 + len(self.body)) + self.body
        except struct.error as error:
            raise AcpiError(
                f"NFIT structure of type {self.type} and {len(self.body)} bytes cannot be encoded: {error}"
            ) from error

    def __str__(self) -> str:
        return f"Structure of type {self.type}: {self.body.hex(' ', 4)}"


_KNOWN: dict[int, type[Structure]] = {
    known.TYPE: known for known in (SpaRange, RegionMapping, ControlRegion, PlatformCapabilities)
}


@dataclass(frozen=True)
class Nfit:
    """An NVDIMM Firmware Interface Table.

    :ivar header: its length and checksum are ignored; :meth:`to_bytes` computes them.
    """

    header: Header
    structures: tuple[Structure, ...]
    reserved: bytes = bytes(4)

    @classmethod
    def parse(cls, table: bytes) -> Self:
        """Parse a whole NFIT; ``Nfit.parse(table).to_bytes() == table``.

        :raises AcpiError: when the table or a structure's length is wrong.
        """
        header = verify_table(table)
        if header.signature != b"NFIT":
            raise AcpiError(f"ACPI table {text(header.signature)} is not an NFIT")
        start = Header.SIZE + 4
        if len(table) < start:
            raise AcpiError(f"NFIT of {len(table)} bytes: it must have at least {start}")
        return cls(header, tuple(_structures(table, start)), table[Header.SIZE : start])

    def to_bytes(self) -> bytes:
        """Return the table.

        :raises AcpiError: when a value does not fit its field.
        """
        return seal(self.header, self.reserved + b"".join(structure.to_bytes() for structure in self.structures))

    @classmethod
    def of_structures(cls, data: bytes) -> Self:
        """Return a table with these structures, and a header of zeros.

        :raises AcpiError: when a structure's length is wrong.
        """
        return cls(Header(b"NFIT", 0, 1, 0, bytes(6), bytes(8), 0, bytes(4), 0), tuple(_structures(data, 0)))

    def of_nvdimm(self, handle: int) -> bytes:
        """Return the structures of one NVDIMM, and those that are of no NVDIMM.

        :raises AcpiError: when it has none, or its range or control region is missing.
        """
        mapping = next((each for each in self.of(RegionMapping) if each.handle == handle), None)
        if mapping is None:
            raise AcpiError(f"NFIT: no region mapping has handle {handle}")
        spa = [each for each in self.of(SpaRange) if each.index == mapping.spa_index]
        control = [each for each in self.of(ControlRegion) if each.index == mapping.control_index]
        if len(spa) != 1 or len(control) != 1:
            raise AcpiError(f"NFIT: handle {handle} has {len(spa)} SPA ranges and {len(control)} control regions")
        found = (*spa, mapping, *control, *self.of(PlatformCapabilities))
        return b"".join(each.to_bytes() for each in found)

    def of(self, kind: type[_T]) -> tuple[_T, ...]:
        """Return the structures of one kind, in order."""
        return tuple(structure for structure in self.structures if isinstance(structure, kind))

    def __str__(self) -> str:
        return "\n".join([str(self.header), *(f"  {structure}" for structure in self.structures)])


def decode(table: bytes) -> str:
    """Return a table as text: one line for its header and, for an NFIT, one for each structure.

    :raises AcpiError: when the table is malformed.
    """
    header = verify_table(table)
    return str(Nfit.parse(table)) if header.signature == b"NFIT" else str(header)


def _structures(table: bytes, offset: int) -> list[Structure]:
    found: list[Structure] = []
    while offset < len(table):
        if len(table) - offset < 4:
            raise AcpiError(f"NFIT: {len(table) - offset} bytes at {offset:#x} are too few for a structure")
        kind, length = struct.unpack_from("<HH", table, offset)
        if not 4 <= length <= len(table) - offset:
            raise AcpiError(
                f"NFIT: structure of type {kind} at {offset:#x} says it has {length} bytes; "
                f"it can have 4 to {len(table) - offset}"
            )
        body = table[offset + 4 : offset + length]
        known = _KNOWN.get(kind)
        exact = known is not None and known.FORMAT.size == len(body)
        found.append(known.parse(body) if known and exact else RawStructure(kind, body))
        offset += length
    return found


def _pack(layout: struct.Struct, value: Header | Structure) -> bytes:
    """Pack the fields of a dataclass; bytes must have their field's exact length."""
    try:
        packed = layout.pack(*astuple(value))
    except struct.error as error:
        raise AcpiError(f"{type(value).__name__} cannot be encoded: {error}") from error
    if type(value)(*layout.unpack(packed)) != value:  # struct pads and truncates bytes silently
        raise AcpiError(f"{type(value).__name__} cannot be encoded: bytes of a wrong length")
    return packed
