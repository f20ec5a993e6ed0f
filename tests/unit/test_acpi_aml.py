# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvdimm_driver.acpi import aml
from nvdimm_driver.errors import AcpiError


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),  # Zero
        (1, "01"),  # One
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x10000, "0c00000100"),
        (0xFFFFFFFF, "0cffffffff"),
        (1 << 32, "0e0000000001000000"),
        ((1 << 64) - 1, "0effffffffffffffff"),
    ],
)
def test_integer(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integer_out_of_range(value: int) -> None:
    with pytest.raises(AcpiError, match="2\\^64-1"):
        aml.integer(value)


@pytest.mark.parametrize(
    ("length", "lead"),
    [
        (0, "01"),
        (62, "3f"),  # the largest in one byte
        (63, "4104"),
        (0xFFD, "4fff"),  # the largest in two bytes
        (0xFFE, "810001"),
        (0xFFFFC, "8fffff"),
        (0xFFFFD, "c1000001"),
    ],
)
def test_package_length_counts_itself(length: int, lead: str) -> None:
    assert aml.package(bytes(length)) == bytes.fromhex(lead) + bytes(length)


@given(st.integers(0, 1 << 21))
def test_package_length_says_what_there_is(length: int) -> None:
    package = aml.package(bytes(length))
    extra = package[0] >> 6
    said = package[0] & 0x3F if not extra else package[0] & 0xF | int.from_bytes(package[1 : 1 + extra], "little") << 4
    assert said == len(package)


def test_name() -> None:
    # Name (_ADR, 0x0100)
    assert aml.name("_ADR", aml.integer(0x100)) == b"\x08_ADR\x0b\x00\x01"


def test_string() -> None:
    # Name (_HID, "ACPI0012")
    assert aml.name("_HID", aml.string("ACPI0012")) == b"\x08_HID\x0dACPI0012\0"


def test_scope_and_device() -> None:
    # Scope (\_SB) { Device (NV0) { Name (_ADR, One) } }
    device = b"\x5b\x82\x0b" + b"NV0_" + b"\x08_ADR\x01"
    assert aml.scope("_SB", aml.device("NV0", aml.name("_ADR", aml.integer(1)))) == b"\x10\x13\\_SB_" + device


@pytest.mark.parametrize("name", ["", "TOOLONG", "0ABC", "nv00", "A-B", "NV\n", "NÄ"])
def test_not_a_name(name: str) -> None:
    with pytest.raises(AcpiError, match="not an ACPI name"):
        aml.name_segment(name)


@pytest.mark.parametrize("value", ["ä", "a\0b"])
def test_not_a_string(value: str) -> None:
    with pytest.raises(AcpiError, match="ASCII without NUL"):
        aml.string(value)


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=20))
def test_named_integers_reads_back_what_was_written(values: list[int]) -> None:
    devices = [aml.device("DEV", aml.name("_UID", b"\x0a\x07"), aml.name("_ADR", aml.integer(v))) for v in values]
    assert aml.named_integers(aml.scope("_SB", *devices), "_ADR") == tuple(values)


@given(st.integers(2, (1 << 64) - 1), st.data())
def test_named_integers_takes_no_half_number(value: int, data: st.DataObject) -> None:
    whole = aml.integer(value)
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert aml.named_integers(b"\x08_ADR" + whole, "_ADR") == (value,)
    assert aml.named_integers(b"\x08_ADR" + whole[:cut], "_ADR") == ()


def test_named_integers_leaves_out_what_is_no_integer() -> None:
    assert aml.named_integers(aml.name("_ADR", aml.string("x")) + b"\x08_ADR\x0c\x01", "_ADR") == ()
