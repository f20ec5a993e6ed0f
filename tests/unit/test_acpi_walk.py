# SPDX-License-Identifier: Apache-2.0
"""Finding ACPI tables from the RSDP in the memory of a guest."""

from __future__ import annotations

import struct

import pytest

from nvdimm_driver.acpi.tables import Header, checksum, seal
from nvdimm_driver.acpi.walk import Read, find
from nvdimm_driver.errors import AcpiError

RSDP, ROOT, FADT, DSDT, OTHER = 0xEA020, 0xFC000000, 0xFC000100, 0xFC000400, 0xFC000500


def table(signature: bytes, body: bytes) -> bytes:
    return seal(Header(signature, 0, 1, 0, b"TEST  ", b"TEST    ", 1, b"TEST", 1), body)


def memory(root: bytes) -> dict[int, bytes]:
    """Return a guest's memory as firmware leaves it; the RSDP is not at the start of the searched area."""
    fadt = table(b"FACP", struct.pack("<II", 0, DSDT).ljust(120, b"\0"))
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"TEST  ", 2, ROOT, 36, ROOT, 0))
    rsdp[8] = checksum(rsdp[:20])
    rsdp[32] = checksum(rsdp)
    return {RSDP: bytes(rsdp), ROOT: root, FADT: fadt, DSDT: table(b"DSDT", b"code"), OTHER: table(b"NFIT", bytes(4))}


def reader(regions: dict[int, bytes]) -> Read:
    def read(address: int, length: int) -> bytes:
        data = bytearray(length)
        for base, content in regions.items():
            for index, byte in enumerate(content):
                if 0 <= base + index - address < length:
                    data[base + index - address] = byte
        return bytes(data)

    return read


XSDT = table(b"XSDT", struct.pack("<QQ", FADT, OTHER))


def test_all_tables_of_a_guest_are_found() -> None:
    regions = memory(XSDT)
    assert find(reader(regions)) == (regions[FADT], regions[DSDT], regions[OTHER])


def test_more_tables_than_there_can_be_are_not_read() -> None:
    regions = {RSDP: memory(XSDT)[RSDP], ROOT: table(b"XSDT", struct.pack("<Q", ROOT) * 65)}
    with pytest.raises(AcpiError, match="names 65 tables; at most 64 are plausible"):
        find(reader(regions))


def test_tables_that_are_large_together_are_not_kept() -> None:
    large = table(b"SSDT", bytes((1 << 20) - 36))
    regions = memory(table(b"XSDT", struct.pack("<Q", OTHER) * 10)) | {OTHER: large}

    def read(address: int, length: int) -> bytes:
        return large[:length] if address == OTHER else reader(memory(regions[ROOT]))(address, length)

    with pytest.raises(AcpiError, match=r"more than 4(\.00)? MiB together"):
        find(read)


@pytest.mark.parametrize(
    ("address", "content", "reason"),
    [
        (RSDP, b"", "no RSDP"),
        (ROOT, table(b"SSDT", b""), "not XSDT"),
        (ROOT, table(b"XSDT", bytes(7)), "not a whole number of addresses"),
        (DSDT, table(b"SSDT", b"code"), "not DSDT"),
        (OTHER, table(b"NFIT", bytes(4))[:-1] + b"\1", "wrong checksum"),
        (OTHER, b"NFIT" + b"\xff" * 32, "has 4.00 GiB; at most 1 MiB is plausible"),
        (OTHER, bytes(36), "shorter than its header"),
    ],
)
def test_what_is_wrong_in_a_guest_is_an_error(address: int, content: bytes, reason: str) -> None:
    regions = memory(XSDT)
    regions[address] = content
    with pytest.raises(AcpiError, match=reason):
        find(reader(regions))
