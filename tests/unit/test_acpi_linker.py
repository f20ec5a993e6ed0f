# SPDX-License-Identifier: Apache-2.0
import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nvdimm_driver.acpi.linker import Linked, link, split
from nvdimm_driver.acpi.tables import Header, checksum, seal
from nvdimm_driver.errors import AcpiError

DATA = Path(__file__).parent.parent / "data" / "acpi"
SCRIPT = (DATA / "table-loader.bin").read_bytes()
NFIT = (DATA / "nfit.bin").read_bytes()
FILES = {
    "etc/acpi/rsdp": (DATA / "rsdp.bin").read_bytes(),
    "etc/acpi/tables": (DATA / "tables.bin").read_bytes().ljust(1 << 17, b"\0"),
    "etc/acpi/nvdimm-mem": bytes(4096),
}
HIGH = 0xFC000000


def allocate(name: bytes, align: int = 16, zone: int = 1) -> bytes:
    return struct.pack("<I56sIB63x", 1, name, align, zone)


def add_pointer(target: bytes, source: bytes, offset: int, size: int) -> bytes:
    return struct.pack("<I56s56sIB7x", 2, target, source, offset, size)


def add_checksum(name: bytes, offset: int, start: int, length: int) -> bytes:
    return struct.pack("<I56sIII56x", 3, name, offset, start, length)


def write_pointer(target: bytes, source: bytes, offset: int, value: int, size: int) -> bytes:
    return struct.pack("<I56s56sIIB3x", 4, target, source, offset, value, size)


def table(signature: bytes, body: bytes = b"") -> bytes:
    return seal(Header(signature, 0, 1, 0, b"OEMOEM", b"OEMTABLE", 7, b"CREA", 9), body)


def test_real_script_of_qemu() -> None:
    tables = split(link(SCRIPT, FILES))
    assert [found[:4] for found in tables] == [b"FACP", b"DSDT", b"APIC", b"HPET", b"SRAT", b"SSDT", b"NFIT", b"WAET"]
    assert tables[6] == NFIT


def test_real_script_patches_the_address_of_the_dsm_page() -> None:
    linked = link(SCRIPT, FILES)
    ssdt = split(linked)[5]
    assert ssdt[ssdt.index(b"\x08MEMA\x0c") + 6 :][:4] == linked.addresses["etc/acpi/nvdimm-mem"].to_bytes(4, "little")


def test_every_command() -> None:
    script = (
        allocate(b"low", zone=2)
        + allocate(b"first")
        + allocate(b"second", align=64)
        + add_pointer(b"low", b"second", 4, 4)
        + add_checksum(b"low", 0, 0, 8)
        + write_pointer(b"host", b"first", 0, 2, 8)
        + bytes(128)
    )
    files = {"low": bytes(4) + b"\x01\0\0\0", "first": b"abc", "second": b"de", "host": bytes(8), "unused": b"x"}
    linked = link(script, files)
    assert linked.addresses == {"low": 0xF0000, "first": HIGH, "second": HIGH + 64}
    pointer = (HIGH + 64 + 1).to_bytes(4, "little")
    assert linked.files["low"] == bytes([checksum(pointer), 0, 0, 0]) + pointer
    assert linked.files["host"] == (HIGH + 2).to_bytes(8, "little")
    assert linked.files["unused"] == b"x"
    assert files["low"] == bytes(4) + b"\x01\0\0\0"  # the argument is unchanged


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (bytes(127), "not a multiple of 128"),
        (struct.pack("<I124x", 5), "unknown command 5"),
        (allocate(b"none"), "no file 'none'"),
        (allocate(b"\xff"), r"file name '\\xff' is not ASCII"),
        (allocate(b"f", align=0), "aligned to 0"),
        (allocate(b"f", align=3), "aligned to 3"),
        (allocate(b"f", align=1 << 31) + allocate(b"g", align=1 << 31), "'f' would end at 0x100000008"),
        (allocate(b"f", zone=3), "unknown zone 3"),
        (allocate(b"large", zone=2), "beyond 0x100000"),
        (allocate(b"f") * 2, "allocated twice"),
        (add_pointer(b"f", b"g", 0, 4), "to 'g', which is not allocated"),
        (allocate(b"g") + add_pointer(b"f", b"g", 5, 4), "pointer at 0x5 of 'f', which has 8 bytes"),
        (allocate(b"g") + add_pointer(b"f", b"g", 0, 3), "pointer of 3 bytes"),
        (allocate(b"g") + add_pointer(b"f", b"g", 0, 2), "does not fit 2 bytes"),
        (allocate(b"g") + add_pointer(b"ff", b"g", 0, 4), "byte 0xffffffff of 'g', which has 8 bytes"),
        (add_checksum(b"f", 8, 0, 8), "which has 8 bytes"),
        (add_checksum(b"f", 0, 1, 8), "which has 8 bytes"),
        (allocate(b"g") + write_pointer(b"f", b"g", 0, 8, 4), "byte 0x8 of 'g'"),
        (allocate(b"g") + write_pointer(b"f", b"g", 8, 0, 4), "pointer at 0x8 of 'f'"),
    ],
)
def test_script_that_is_wrong(script: bytes, message: str) -> None:
    files = {"f": bytes(8), "g": bytes(8), "ff": b"\xff" * 8, "large": bytes(1 << 17)}
    with pytest.raises(AcpiError, match=message):
        link(script, files)


def patched(rsdp: bytes, *tables: bytes) -> Linked:
    return Linked({"etc/acpi/rsdp": rsdp, "t": b"".join(tables)}, {"etc/acpi/rsdp": 0xF0000, "t": HIGH})


def rsdp1(address: int) -> bytes:
    body = b"RSD PTR \0OEMOEM\0" + address.to_bytes(4, "little")
    return body[:8] + bytes([checksum(body)]) + body[9:]


def rsdp2(address: int) -> bytes:
    body = b"RSD PTR \0OEMOEM\x02" + bytes(4)
    body = body[:8] + bytes([checksum(body)]) + body[9:] + (36).to_bytes(4, "little") + address.to_bytes(8, "little")
    return body + bytes([checksum(body)]) + bytes(3)


def test_xsdt_is_walked() -> None:
    root = table(b"XSDT", (HIGH + 44).to_bytes(8, "little"))
    assert split(patched(rsdp2(HIGH), root, table(b"SSDT", b"x"))) == (table(b"SSDT", b"x"),)


def test_fadt_with_x_dsdt_only() -> None:
    root = table(b"RSDT", (HIGH + 40).to_bytes(4, "little"))
    fadt = table(b"FACP", bytes(104) + (HIGH + 40 + 148).to_bytes(8, "little"))
    assert split(patched(rsdp1(HIGH), root, fadt, table(b"DSDT"))) == (fadt, table(b"DSDT"))


@pytest.mark.parametrize(
    ("linked", "message"),
    [
        (Linked({}, {}), "not an RSDP"),
        (patched(rsdp1(HIGH)[:-1] + b"\0"), "not an RSDP with a correct checksum"),
        (patched(rsdp2(HIGH)[:20]), "extended checksum"),
        (patched(rsdp2(HIGH)[:-4] + b"\0\0\0\0", table(b"XSDT")), "extended checksum"),
        (patched(rsdp1(0)), "no table at 0x0"),
        (patched(rsdp1(HIGH), table(b"XSDT")), "is 'XSDT', not RSDT"),
        (patched(rsdp1(HIGH), table(b"RSDT", b"123")), "not a whole number of addresses"),
        (patched(rsdp1(HIGH), table(b"RSDT")[:-1]), "shorter than its header"),
        (patched(rsdp1(HIGH), table(b"RSDT", b"1234")[:-1]), "says it has 40 bytes, but has 39"),
        (patched(rsdp1(HIGH), table(b"RSDT", (HIGH + 40).to_bytes(4, "little")), table(b"FACP")), "no table at 0x0"),
    ],
)
def test_tables_that_are_wrong(linked: Linked, message: str) -> None:
    with pytest.raises(AcpiError, match=message):
        split(linked)


COMMANDS = st.integers(0, len(SCRIPT) - 1)


@given(st.lists(st.tuples(COMMANDS, st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_script_raises_nothing_but_acpi_error(changes: list[tuple[int, int]]) -> None:
    script = bytearray(SCRIPT)
    for offset, value in changes:
        script[offset] = value
    try:
        tables = split(link(bytes(script), FILES))
    except AcpiError:
        return
    assert all(sum(found) % 256 == 0 for found in tables)


@given(st.integers(0, 12000))
@example(0)
def test_truncated_file_raises_nothing_but_acpi_error(length: int) -> None:
    cut = FILES | {"etc/acpi/tables": FILES["etc/acpi/tables"][:length]}
    used = len((DATA / "tables.bin").read_bytes())
    if length < used:
        with pytest.raises(AcpiError):
            split(link(SCRIPT, cut))
    else:
        assert NFIT in split(link(SCRIPT, cut))


@given(st.binary(max_size=400))
def test_any_rsdp_raises_nothing_but_acpi_error(rsdp: bytes) -> None:
    with pytest.raises(AcpiError):
        split(patched(rsdp, table(b"RSDT")))
