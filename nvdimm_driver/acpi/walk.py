# SPDX-License-Identifier: Apache-2.0
"""Finding all ACPI tables from the RSDP, in the files of a QEMU or in the memory of a guest. Pure."""

from __future__ import annotations

import struct
from collections.abc import Callable

from nvdimm_driver.acpi.tables import Header, text, verify_table
from nvdimm_driver.errors import AcpiError
from nvdimm_driver.sizes import human

Read = Callable[[int, int], bytes]
"""(address, length) → bytes; fewer where there are no more."""

RSDP_AREA, RSDP_AREA_SIZE, RSDP_ALIGN = 0xE0000, 0x20000, 16
"""Area in which a BIOS puts the RSDP (ACPI 6.5 §5.2.5.1)."""
_MAX_TABLE = 1 << 20
_MAX_TOGETHER = 4 << 20
_MAX_TABLES = 64


def find(read: Read) -> tuple[bytes, ...]:
    """Return every table in the memory of a guest.

    :raises AcpiError: when there is no RSDP, or an address or a table is wrong.
    """
    return tables(_rsdp(read), read)


def locate(read: Read, signature: bytes) -> tuple[int, bytes]:
    """Return the address of a table in the memory of a guest, and the table.

    :raises AcpiError: when there is none, or as :func:`find` does.
    """
    for address in _addresses(_rsdp(read), read):
        if read(address, 4) == signature:
            return address, _table(read, address)
    raise AcpiError(f"the guest has no {text(signature)}")


def tables(rsdp: bytes, read: Read) -> tuple[bytes, ...]:
    """Follow the RSDP to the RSDT or XSDT; return every table that this names, and the FADT's DSDT.

    The root table itself (nothing but addresses) and the FACS (no checksum) are left out.

    :raises AcpiError: when an address or a table is wrong.
    """
    found: list[bytes] = []
    for address in _addresses(rsdp, read):
        found.append(_table(read, address))
        if found[-1][:4] == b"FACP":
            found.append(_dsdt(found[-1], read))
        if sum(map(len, found)) > _MAX_TOGETHER:
            raise AcpiError(f"the tables have more than {human(_MAX_TOGETHER)} together, which is not plausible")
    return tuple(found)


def _rsdp(read: Read) -> bytes:
    area = read(RSDP_AREA, RSDP_AREA_SIZE)
    for offset in range(0, len(area), RSDP_ALIGN):
        rsdp = area[offset : offset + 36]
        if rsdp.startswith(b"RSD PTR ") and not sum(rsdp[:20]) & 0xFF:
            return rsdp
    raise AcpiError("the guest has no RSDP", hint="it has no ACPI, or its firmware has not made the tables yet")


def _addresses(rsdp: bytes, read: Read) -> list[int]:
    """Return the address of each table that the RSDT or XSDT names."""
    root = _root(rsdp, read)
    entry = "<I" if root[:4] == b"RSDT" else "<Q"
    try:
        entries = list(struct.iter_unpack(entry, root[Header.SIZE :]))
    except struct.error as error:
        raise AcpiError(f"{text(root[:4])} of {len(root)} bytes: not a whole number of addresses") from error
    if len(entries) > _MAX_TABLES:
        raise AcpiError(f"{text(root[:4])} names {len(entries)} tables; at most {_MAX_TABLES} are plausible")
    return [address for (address,) in entries]


def _root(rsdp: bytes, read: Read) -> bytes:
    """Return the RSDT or XSDT that the RSDP points to (ACPI 6.5 §5.2.5.3)."""
    if len(rsdp) < 20 or rsdp[:8] != b"RSD PTR " or sum(rsdp[:20]) & 0xFF:
        raise AcpiError(f"not an RSDP with a correct checksum: {rsdp[:36].hex()}")
    if rsdp[15] < 2:
        return _named(read, int.from_bytes(rsdp[16:20], "little"), b"RSDT")
    if len(rsdp) < 36 or sum(rsdp[:36]) & 0xFF:
        raise AcpiError(f"the RSDP has a wrong extended checksum: {rsdp[:36].hex()}")
    return _named(read, int.from_bytes(rsdp[24:32], "little"), b"XSDT")


def _dsdt(fadt: bytes, read: Read) -> bytes:
    """Return the table that a FADT names in DSDT or, if that is 0, X_DSDT (ACPI 6.5 §5.2.9)."""
    address = int.from_bytes(fadt[40:44], "little") or int.from_bytes(fadt[140:148], "little")
    return _named(read, address, b"DSDT")


def _named(read: Read, address: int, signature: bytes) -> bytes:
    table = _table(read, address)
    if table[:4] != signature:
        raise AcpiError(f"table at {address:#x} is '{text(table[:4])}', not {text(signature)}")
    return table


def _table(read: Read, address: int) -> bytes:
    length = Header.parse(read(address, Header.SIZE)).length
    if length > _MAX_TABLE:
        raise AcpiError(
            f"the table at {address:#x} says it has {human(length)}; at most {human(_MAX_TABLE)} is plausible"
        )
    table = read(address, length)
    verify_table(table)
    return table
