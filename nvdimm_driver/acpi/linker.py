# SPDX-License-Identifier: Apache-2.0
"""Runs QEMU's table-loader script as a guest's firmware does, and extracts each ACPI table. Pure.

QEMU gives its firmware the tables in a few files and a script (``etc/table-loader``). The script says where in memory
the files go and which bytes depend on their addresses. Source: QEMU, hw/acpi/bios-linker-loader.c.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from nvdimm_driver.acpi.tables import checksum, text
from nvdimm_driver.acpi.walk import tables
from nvdimm_driver.errors import AcpiError

RSDP_FILE = "etc/acpi/rsdp"

ENTRY_SIZE = 128

_ZONES = {1: (0xFC000000, 1 << 32), 2: (0xF0000, 0x100000)}
"""(First address, limit) of each zone for files: high memory, and the segment that is searched for the RSDP."""


@dataclass(frozen=True)
class Linked:
    """The files after the script has run, and the guest-physical address of each allocated file."""

    files: Mapping[str, bytes]
    addresses: Mapping[str, int]


def link(script: bytes, files: Mapping[str, bytes], places: Mapping[str, int] | None = None) -> Linked:
    """Run a table-loader script over the files it names.

    :param places: fixed addresses of files, by name; the firmware chooses all others.
    :raises AcpiError: when a command is invalid or refers to anything outside the files.
    """
    if len(script) % ENTRY_SIZE:
        raise AcpiError(f"table-loader script of {len(script)} bytes: not a multiple of {ENTRY_SIZE}")
    run = _Run(files, places or {})
    for offset in range(0, len(script), ENTRY_SIZE):
        run.command(script[offset : offset + ENTRY_SIZE])
    return Linked({name: bytes(content) for name, content in run.files.items()}, run.addresses)


def split(linked: Linked) -> tuple[bytes, ...]:
    """Return every table that the RSDP leads to, as :func:`.walk.tables` does.

    :raises AcpiError: when an address or a table is wrong.
    """

    def read(address: int, length: int) -> bytes:
        for name, base in linked.addresses.items():
            if base <= address < base + len(linked.files[name]):
                return linked.files[name][address - base :][:length]
        raise AcpiError(f"there is no table at {address:#x}: no file is at this address")

    return tables(linked.files.get(RSDP_FILE, b""), read)


class _Run:
    """One run of a script: checks each command, then applies it to copies of the files."""

    def __init__(self, files: Mapping[str, bytes], places: Mapping[str, int]) -> None:
        self.files = {name: bytearray(content) for name, content in files.items()}
        self.addresses: dict[str, int] = {}
        self._places = places
        self._next = {zone: first for zone, (first, _) in _ZONES.items()}

    def command(self, entry: bytes) -> None:
        (code,) = struct.unpack_from("<I", entry)
        match code:
            case 0:  # the script's padding
                return
            case 1:  # ALLOCATE
                name, align, zone = struct.unpack_from("<56sIB", entry, 4)
                self._allocate(_name(name), align, zone)
            case 2:  # ADD_POINTER
                target, source, offset, size = struct.unpack_from("<56s56sIB", entry, 4)
                self._add_pointer(_name(target), _name(source), offset, size)
            case 3:  # ADD_CHECKSUM
                name, offset, start, length = struct.unpack_from("<56sIII", entry, 4)
                self._add_checksum(_name(name), offset, start, length)
            case 4:  # WRITE_POINTER
                target, source, offset, value, size = struct.unpack_from("<56s56sIIB", entry, 4)
                self._write_pointer(_name(target), _name(source), offset, value, size)
            case _:
                raise AcpiError(f"table-loader: unknown command {code}")

    def _allocate(self, name: str, align: int, zone: int) -> None:
        content = self._file(name)
        if zone not in _ZONES:
            raise AcpiError(f"table-loader: {name!r} is to be allocated in the unknown zone {zone}")
        if name in self.addresses:
            raise AcpiError(f"table-loader: {name!r} is allocated twice")
        if align == 0 or align & (align - 1):
            raise AcpiError(f"table-loader: {name!r} is aligned to {align}, which is not a power of two")
        if name in self._places:
            self.addresses[name] = self._places[name]
            return
        address = (self._next[zone] + align - 1) & -align
        end = address + len(content)
        if end > _ZONES[zone][1]:
            raise AcpiError(f"table-loader: {name!r} would end at {end:#x}, beyond {_ZONES[zone][1]:#x}")
        self.addresses[name] = address
        self._next[zone] = end

    def _add_pointer(self, target: str, source: str, offset: int, size: int) -> None:
        field = self._field(target, offset, size)
        value = int.from_bytes(field, "little")
        self._set(target, offset, size, self._address(source, value))

    def _add_checksum(self, name: str, offset: int, start: int, length: int) -> None:
        content = self._file(name)
        if offset >= len(content) or start + length > len(content):
            raise AcpiError(
                f"table-loader: checksum at {offset:#x} over {length} bytes at {start:#x} of {name!r}, "
                f"which has {len(content)} bytes"
            )
        content[offset] = (content[offset] + checksum(content[start : start + length])) & 0xFF

    def _write_pointer(self, target: str, source: str, offset: int, value: int, size: int) -> None:
        self._field(target, offset, size)
        self._set(target, offset, size, self._address(source, value))

    def _file(self, name: str) -> bytearray:
        if name not in self.files:
            raise AcpiError(f"table-loader: there is no file {name!r}")
        return self.files[name]

    def _address(self, name: str, offset: int) -> int:
        if name not in self.addresses:
            raise AcpiError(f"table-loader: pointer to {name!r}, which is not allocated")
        if offset >= len(self.files[name]):
            raise AcpiError(
                f"table-loader: pointer to byte {offset:#x} of {name!r}, which has {len(self.files[name])} bytes"
            )
        return self.addresses[name] + offset

    def _field(self, name: str, offset: int, size: int) -> bytes:
        content = self._file(name)
        if size not in (1, 2, 4, 8):
            raise AcpiError(f"table-loader: pointer of {size} bytes in {name!r}; 1, 2, 4 or 8 are possible")
        if offset + size > len(content):
            raise AcpiError(f"table-loader: pointer at {offset:#x} of {name!r}, which has {len(content)} bytes")
        return bytes(content[offset : offset + size])

    def _set(self, name: str, offset: int, size: int, value: int) -> None:
        if value >> (8 * size):
            raise AcpiError(f"table-loader: address {value:#x} does not fit {size} bytes at {offset:#x} of {name!r}")
        self.files[name][offset : offset + size] = value.to_bytes(size, "little")


def _name(field: bytes) -> str:
    name = field.split(b"\0", 1)[0]
    try:
        return name.decode("ascii")
    except UnicodeDecodeError as error:
        raise AcpiError(f"table-loader: file name '{text(name)}' is not ASCII") from error
