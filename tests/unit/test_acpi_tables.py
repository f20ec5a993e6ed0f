# SPDX-License-Identifier: Apache-2.0
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvdimm_driver.acpi.tables import (
    PERSISTENT_MEMORY,
    ControlRegion,
    Header,
    Nfit,
    PlatformCapabilities,
    RawStructure,
    RegionMapping,
    SpaRange,
    Structure,
    checksum,
    decode,
    seal,
    verify_table,
)
from nvdimm_driver.errors import AcpiError
from nvdimm_driver.model import GIB, KIB, MIB

NFIT = (Path(__file__).parent.parent / "data" / "acpi" / "nfit.bin").read_bytes()
"""From a real QEMU: 256 MiB at 68 GiB in slot 0; 64 MiB at 72 GiB in slot 3, node 2."""

HEADER = Header(b"NFIT", 0, 1, 0, b"OEMOEM", b"OEMTABLE", 7, b"CREA", 9)
IDENTIFIER = st.binary(min_size=6, max_size=6)


def number(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << bits) - 1)


def structure(kind: type[Structure]) -> st.SearchStrategy[Structure]:
    """Return a strategy for structures of a kind, with any values that its format allows."""
    sizes = {"B": 8, "H": 16, "I": 32, "Q": 64}
    values = []
    count = ""
    for code in kind.FORMAT.format.removeprefix("<"):
        if code.isdigit():
            count += code
            continue
        size = int(count or 1)
        count = ""
        values.append(st.binary(min_size=size, max_size=size) if code == "s" else number(sizes[code]))
    assert len(values) == len(fields(kind))
    return st.tuples(*values).map(lambda drawn: kind(*drawn))


RAW = st.builds(RawStructure, st.sampled_from([2, 3, 5, 6, 8, 0xFFFF]), st.binary(max_size=80))
STRUCTURES = st.lists(st.one_of(RAW, *map(structure, (SpaRange, RegionMapping, ControlRegion, PlatformCapabilities))))


def nfit(body: bytes) -> bytes:
    return seal(HEADER, bytes(4) + body)


def test_golden_nfit_is_read_as_it_was_asked_for() -> None:
    parsed = Nfit.parse(NFIT)
    assert [(found.index, found.base, found.length, found.proximity_domain) for found in parsed.of(SpaRange)] == [
        (2, 68 * GIB, 256 * MIB, 0),
        (8, 72 * GIB, 64 * MIB, 2),
    ]
    assert {found.kind for found in parsed.of(SpaRange)} == {PERSISTENT_MEMORY}
    assert [(found.handle, found.spa_index, found.control_index) for found in parsed.of(RegionMapping)] == [
        (1, 2, 3),
        (4, 8, 9),
    ]
    assert [hex(found.serial) for found in parsed.of(ControlRegion)] == ["0x123456", "0x123459"]
    assert parsed.of(PlatformCapabilities) == (PlatformCapabilities(1, bytes(3), 2, 0),)
    assert parsed.to_bytes() == NFIT


def test_decode_shows_every_structure_of_an_nfit_in_a_line() -> None:
    lines = decode(NFIT).splitlines()
    assert lines[0] == "NFIT: 424 bytes, revision 1, OEM 'BOCHS' 'BXPC' 1, creator 'BXPC' 0x1"
    assert lines[1] == (
        "  SPA range 2: persistent memory, base 0x1100000000, length 0x10000000, "
        "proximity domain 0, flags 0x3, attributes 0x8008"
    )
    assert lines[-1] == "  Platform capabilities: 0x2, valid bits 0 to 1"
    assert len(lines) == 8


def test_decode_shows_the_header_of_any_other_table() -> None:
    header = Header(b"SSDT", 0, 2, 0, b"A\x07'\\  ", b"TABLE\0\0\0", 1, b"CREA", 0x20)
    assert decode(seal(header, b"x")) == (r"SSDT: 37 bytes, revision 2, OEM 'A\x07'\\' 'TABLE' 1, creator 'CREA' 0x20")


@given(STRUCTURES, st.binary(min_size=4, max_size=4), IDENTIFIER)
def test_nfit_round_trip(structures: list[Structure], reserved: bytes, oem_id: bytes) -> None:
    header = Header(b"NFIT", 0, 1, 0, oem_id, b"OEMTABLE", 7, b"CREA", 9)
    table = Nfit(header, tuple(structures), reserved).to_bytes()
    verify_table(table)
    parsed = Nfit.parse(table)
    assert (list(parsed.structures), parsed.reserved, parsed.header.oem_id) == (structures, reserved, oem_id)
    assert parsed.to_bytes() == table


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_acpi_error(data: bytes) -> None:
    with pytest.raises(AcpiError):
        Nfit.parse(data)
    with pytest.raises(AcpiError):
        decode(data)


@given(st.binary(max_size=300))
def test_no_body_raises_anything_but_acpi_error(body: bytes) -> None:
    table = nfit(body)
    try:
        parsed = Nfit.parse(table)
    except AcpiError:
        return
    assert parsed.to_bytes() == table


@given(st.integers(0, len(NFIT) - 1))
def test_truncated_table_is_refused(length: int) -> None:
    with pytest.raises(AcpiError):
        verify_table(NFIT[:length])


@given(st.integers(0, len(NFIT) - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(offset: int, change: int) -> None:
    changed = bytearray(NFIT)
    changed[offset] ^= change
    with pytest.raises(AcpiError):
        verify_table(bytes(changed))


@given(st.binary(max_size=600))
def test_checksum_makes_the_sum_zero(data: bytes) -> None:
    assert (sum(data) + checksum(data)) % 256 == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\0\0", "2 bytes at 0x28 are too few"),
        (b"\0\0\0\0", "type 0 at 0x28 says it has 0 bytes; it can have 4 to 4"),
        (b"\x05\0\x09\0----", "type 5 at 0x28 says it has 9 bytes; it can have 4 to 8"),
    ],
)
def test_structure_of_impossible_length(body: bytes, message: str) -> None:
    with pytest.raises(AcpiError, match=message):
        Nfit.parse(nfit(body))


def test_spa_range_with_location_cookie_is_kept_raw() -> None:
    """ACPI 6.4 made the structure 8 bytes longer."""
    body = bytes(range(60))
    table = nfit(b"\0\0\x40\0" + body)
    assert Nfit.parse(table).structures == (RawStructure(0, body),)
    assert Nfit.parse(table).to_bytes() == table


def test_not_an_nfit() -> None:
    with pytest.raises(AcpiError, match="SSDT is not an NFIT"):
        Nfit.parse(seal(Header(b"SSDT", 0, 1, 0, bytes(6), bytes(8), 0, bytes(4), 0), b""))


def test_signature_of_other_characters() -> None:
    with pytest.raises(AcpiError, match="has signature 'nf"):
        verify_table(seal(Header(b"nfit", 0, 1, 0, bytes(6), bytes(8), 0, bytes(4), 0), b""))


@pytest.mark.parametrize("index", [-1, 1 << 16])
def test_value_out_of_range_of_its_field(index: int) -> None:
    with pytest.raises(AcpiError, match="SpaRange cannot be encoded"):
        SpaRange(index, 0, 0, 0, bytes(16), 0, 0, 0).to_bytes()


@pytest.mark.parametrize("length", [15, 17])
def test_bytes_of_another_length_than_their_field(length: int) -> None:
    """The struct module itself pads or truncates."""
    with pytest.raises(AcpiError, match="SpaRange cannot be encoded: bytes of a wrong length"):
        SpaRange(1, 0, 0, 0, bytes(length), 0, 0, 0).to_bytes()


def test_raw_structure_too_long() -> None:
    with pytest.raises(AcpiError, match="type 5 and 65536 bytes cannot be encoded"):
        RawStructure(5, bytes(64 * KIB)).to_bytes()
