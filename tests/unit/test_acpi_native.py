# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvdimm_driver.acpi import native
from nvdimm_driver.acpi.native import NativeAcpiBuilder, nfit
from nvdimm_driver.acpi.tables import Header, Nfit, RegionMapping, SpaRange, seal, verify_table
from nvdimm_driver.acpi.verify import check_layout, check_space, check_tables
from nvdimm_driver.errors import AcpiError, LayoutError
from nvdimm_driver.model import GIB, KIB, MIB, PAGE, GuestLayout, Placement

NFIT = (Path(__file__).parent.parent / "data" / "acpi" / "nfit.bin").read_bytes()
TWO = (Placement(0, 68 * GIB, 256 * MIB), Placement(3, 72 * GIB, 64 * MIB, 128 * KIB, 2))


def layout(*nvdimms: Placement) -> GuestLayout:
    return GuestLayout(GIB, 4 * GIB, 1 << 48, nvdimms)


def ssdt(handles: list[int]) -> bytes:
    return native.ssdt(layout(*(Placement(handle - 1, (67 + handle) * GIB, GIB) for handle in handles)))


@st.composite
def layouts(draw: st.DrawFn) -> GuestLayout:
    slots = draw(st.lists(st.integers(0, 255), min_size=1, max_size=12, unique=True))
    base = 4 * GIB
    nvdimms = []
    for slot in slots:
        base += draw(st.integers(0, 1 << 30)) * PAGE
        size = draw(st.integers(1, 1 << 30)) * PAGE
        nvdimms.append(Placement(slot, base, size, node=draw(st.none() | st.integers(0, 127))))
        base += size
    return layout(*sorted(nvdimms, key=lambda placement: placement.slot))


def test_golden_ssdt() -> None:
    # DefinitionBlock ("", "SSDT", 2, "NVDRV ", "NVDIMM", 1) {
    #     Scope (\_SB) {
    #         Device (NVDR) {
    #             Name (_HID, "ACPI0012")
    #             Device (NV00) { Name (_ADR, One) }
    #             Device (NV0F) { Name (_ADR, 0x10) }
    #             Device (NVFF) { Name (_ADR, 0x0100) }
    #         }
    #     }
    # }
    children = (
        b"\x5b\x82\x0bNV00\x08_ADR\x01"
        b"\x5b\x82\x0cNV0F\x08_ADR\x0a\x10"
        b"\x5b\x82\x0dNVFF\x08_ADR\x0b\x00\x01"
    )  # fmt: skip
    root = b"\x5b\x82\x3eNVDR\x08_HID\x0dACPI0012\0" + children
    scope = b"\x10\x47\x04\\_SB_" + root
    header = b"SSDT\x6c\0\0\0\x02\x00NVDRV NVDIMM\0\0\x01\0\0\0NVDR\x01\0\0\0"
    table = ssdt([1, 16, 256])
    assert table[:9] + b"\0" + table[10:] == header + scope
    assert sum(table) % 256 == 0


@pytest.mark.parametrize("handle", [0, 257])
def test_ssdt_of_a_handle_without_a_slot(handle: int) -> None:
    with pytest.raises(AcpiError, match="not an ACPI name"):
        ssdt([handle])


def test_nfit_has_the_structures_of_qemu() -> None:
    assert Nfit.parse(nfit(layout(*TWO))).structures == Nfit.parse(NFIT).structures
    assert Nfit.parse(nfit(layout(*TWO))).header.oem_id == b"NVDRV "


@settings(max_examples=50)
@given(layouts())
def test_native_builder_says_what_the_layout_says(asked: GuestLayout) -> None:
    tables = NativeAcpiBuilder().build(asked).tables
    assert [verify_table(table).signature for table in tables] == [b"NFIT", b"SSDT"]
    parsed = Nfit.parse(tables[0])
    spans = {found.index: (found.base, found.length, found.proximity_domain) for found in parsed.of(SpaRange)}
    got = {mapping.handle: spans[mapping.spa_index] for mapping in parsed.of(RegionMapping)}
    assert got == {found.slot + 1: (found.base, found.size, found.node or 0) for found in asked.nvdimms}


@pytest.mark.parametrize(
    ("nvdimms", "message"),
    [
        ((), "0 NVDIMMs: 1 to 256"),
        (tuple(Placement(slot, (4 + slot) * GIB, GIB) for slot in range(257)), "257 NVDIMMs"),
        ((Placement(256, 4 * GIB, GIB),), "slots are 0 to 255"),
        ((Placement(-1, 4 * GIB, GIB),), "slots are 0 to 255"),
        ((Placement(0, 3 * GIB, GIB),), "overlaps the first 4 GiB"),
        ((Placement(0, 4 * GIB + 1, GIB),), "must be multiples of 4 KiB"),
        ((Placement(0, 4 * GIB, GIB + 512),), "must be multiples of 4 KiB"),
        ((Placement(0, 4 * GIB, 0),), "size not 0"),
        ((Placement(0, 4 * GIB, -PAGE),), "size not 0"),
        ((Placement(0, 4 * GIB, 1 << 48),), "beyond the guest's address limit, 0x1000000000000"),
        ((Placement(0, 4 * GIB, GIB, node=128),), "NUMA node 128; 0 to 127"),
        ((Placement(0, 4 * GIB, GIB, node=-1),), "NUMA node -1"),
        ((Placement(0, 5 * GIB, GIB), Placement(1, 4 * GIB, GIB + PAGE)), "slot 0: .* overlaps the NVDIMM in slot 1"),
        ((Placement(7, 4 * GIB, GIB), Placement(7, 5 * GIB, GIB)), "2 NVDIMMs are in slot 7"),
    ],
)
def test_layout_that_no_table_can_say(nvdimms: tuple[Placement, ...], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_layout(layout(*nvdimms))
    with pytest.raises(LayoutError, match=message):
        NativeAcpiBuilder().build(layout(*nvdimms))


def test_good_tables_pass_whatever_their_order() -> None:
    check_tables(layout(*TWO), (NFIT, ssdt([1, 4])))
    check_tables(layout(*TWO), (ssdt([4, 1]), NFIT))
    check_tables(layout(*reversed(TWO)), (NFIT, ssdt([1, 2, 3, 4])))


def changed(change: Callable[[Nfit], Nfit]) -> bytes:
    return change(Nfit.parse(NFIT)).to_bytes()


def first(kind: type[SpaRange] | type[RegionMapping], **values: int | bytes) -> bytes:
    """Return the golden NFIT with other values in its first structure of a kind."""

    def change(parsed: Nfit) -> Nfit:
        target = parsed.of(kind)[0]
        return replace(
            parsed,
            structures=tuple(
                replace(found, **values) if found is target else found  # type: ignore[arg-type]
                for found in parsed.structures
            ),
        )

    return changed(change)


def broken_checksum(table: bytes) -> bytes:
    return table[:-1] + bytes([table[-1] ^ 1])


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ((NFIT,), "one NFIT and one SSDT"),
        ((NFIT, NFIT, ssdt([1, 4])), "one NFIT and one SSDT"),
        ((broken_checksum(NFIT), ssdt([1, 4])), "wrong checksum"),
        ((NFIT, broken_checksum(ssdt([1, 4]))), "wrong checksum"),
        ((NFIT, ssdt([1, 2, 3])), "no device with _ADR 4$"),
        ((NFIT, seal(Header.parse(ssdt([1])), b"\x08_ADR\x01\x08_ADR\x0a\x04")), "no ACPI0012 device"),
        ((first(SpaRange, base=68 * GIB + PAGE), ssdt([1, 4])), "handle 1 has .* expected .* 0x1100000000"),
        ((first(SpaRange, length=PAGE), ssdt([1, 4])), "handle 1 has"),
        ((first(SpaRange, proximity_domain=1), ssdt([1, 4])), "handle 1 has"),
        ((first(SpaRange, guid=bytes(16)), ssdt([1, 4])), "handle 1 has"),
        ((first(SpaRange, index=8), ssdt([1, 4])), "occurs twice"),
        ((first(SpaRange, index=5), ssdt([1, 4])), "SPA range 2, which does not exist"),
        ((first(RegionMapping, handle=4), ssdt([1, 4])), "occurs twice"),
        ((first(RegionMapping, handle=2), ssdt([1, 2, 4])), "handles 2, 4; expected handles 1, 4, with"),
        ((first(RegionMapping, size=PAGE), ssdt([1, 4])), "handle 1 has"),
        ((first(RegionMapping, offset=PAGE), ssdt([1, 4])), "handle 1 has"),
        ((first(RegionMapping, spa_index=8), ssdt([1, 4])), "handle 1 has"),
    ],
)
def test_tables_that_say_something_else(tables: tuple[bytes, ...], message: str) -> None:
    with pytest.raises(AcpiError, match=message):
        check_tables(layout(*TWO), tables)


def test_tables_of_one_nvdimm_are_not_those_of_two() -> None:
    with pytest.raises(AcpiError, match="handles 1, 4; expected handles 1, with"):
        check_tables(layout(TWO[0]), (NFIT, ssdt([1, 4])))


def test_space_to_the_byte() -> None:
    check_space([bytes(63 * PAGE - 1), bytes(1)])
    with pytest.raises(LayoutError, match=r"252\.00 KiB; 252 KiB fit"):
        check_space([bytes(63 * PAGE), bytes(1)])


def test_space_in_the_list_of_hvmloader() -> None:
    check_space([b"a", b"b"], other_tables_count=7)
    with pytest.raises(LayoutError, match=r"2 ACPI tables of the driver and 8 .* takes 9"):
        check_space([b"a", b"b"], other_tables_count=8)


def test_256_nvdimms_fit() -> None:
    nvdimms = tuple(Placement(slot, (4 + slot) * GIB, GIB) for slot in range(256))
    tables = NativeAcpiBuilder().build(layout(*nvdimms)).tables
    assert sum(map(len, tables)) < 63 * PAGE
