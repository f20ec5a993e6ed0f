# SPDX-License-Identifier: Apache-2.0
"""Hot-plug slots in AML: iasl compiles the ASL to the same byte code, and acpiexec runs it on simulated memory."""

import re
import struct
from pathlib import Path

import pytest

from nvdimm_driver.acpi.native import NativeAcpiBuilder, slot_records, ssdt
from nvdimm_driver.acpi.qemu import QemuAcpiBuilder
from nvdimm_driver.acpi.tables import Header, Nfit
from nvdimm_driver.guest import hot_slots
from nvdimm_driver.guest.hot_slots import ADDRESS, EJECT, PAGE, RECORD, SlotRecord
from nvdimm_driver.model import GIB, KIB, GuestLayout, Placement
from nvdimm_driver.plugins import AcpiBuilder
from tests.integration.test_acpi_iasl import acpiexec, compiled, iasl, recompiled

ASL = """
DefinitionBlock ("", "SSDT", 2, "NVDRV ", "NVDIMM", 1)
{
    Scope (\\_SB)
    {
        OperationRegion (HPRG, SystemMemory, 0xFD040000, 0x10)
        Field (HPRG, DWordAcc, NoLock, Preserve) { Offset (8), HPEV, 32 }
        OperationRegion (HR00, SystemMemory, 0xFD041000, 0x200)
        Field (HR00, DWordAcc, NoLock, Preserve)
        {
            HW00, 32, HP00, 32, HA00, 32, HE00, 32, HO00, 32, HS00, 32, HL00, 32, HZ00, 32, HB00, 64, HX00, 32,
            Offset (64), HF00, 3584
        }
        OperationRegion (HR01, SystemMemory, 0xFD041200, 0x200)
        Field (HR01, DWordAcc, NoLock, Preserve)
        {
            HW01, 32, HP01, 32, HA01, 32, HE01, 32, HO01, 32, HS01, 32, HL01, 32, HZ01, 32, HB01, 64, HX01, 32,
            Offset (64), HF01, 3584
        }
        Device (NC00)
        {
            Name (_HID, "ACPI0004")
            Name (_UID, 1)
            Method (_STA, 0, Serialized) { If (HW00 == HE00) { Return (0) } Return (0x0F) }
            Method (_EJ0, 1, Serialized) { Store (HW00, HE00) }
            Method (_OST, 3, Serialized) { Store (Arg0, HO00) Store (Arg1, HS00) }
            Device (NVDR)
            {
                Name (_HID, "ACPI0012")
                Name (_UID, 1)
                Method (_FIT, 0, Serialized) { Store (HW00, HA00) Store (HF00, Local0) Return (Mid (Local0, 0, HL00)) }
                Device (NV00)
                {
                    Name (_ADR, 1)
                }
            }
        }
        Device (NC01)
        {
            Name (_HID, "ACPI0004")
            Name (_UID, 2)
            Method (_STA, 0, Serialized) { If (HW01 == HE01) { Return (0) } Return (0x0F) }
            Method (_EJ0, 1, Serialized) { Store (HW01, HE01) }
            Method (_OST, 3, Serialized) { Store (Arg0, HO01) Store (Arg1, HS01) }
            Device (NVDR)
            {
                Name (_HID, "ACPI0012")
                Name (_UID, 2)
                Method (_FIT, 0, Serialized) { Store (HW01, HA01) Store (HF01, Local0) Return (Mid (Local0, 0, HL01)) }
                Device (NV01)
                {
                    Name (_ADR, 2)
                }
            }
        }
        Device (NVGE)
        {
            Name (_HID, "ACPI0013")
            Name (_UID, "NVDIMM hot-plug")
            Name (_CRS, ResourceTemplate () { Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { 47 } })
            Name (HQ00, 1)
            Name (HQ01, 0)
            Method (_EVT, 1, Serialized)
            {
                Add (HPEV, 1, HPEV)
                If (HP00 != HQ00)
                {
                    Store (HP00, HQ00)
                    If (HX00 == 3) { Notify (NC00, 3) } Else { Notify (NC00, 1) }
                }
                If (HP01 != HQ01)
                {
                    Store (HP01, HQ01)
                    If (HX01 == 3) { Notify (NC01, 3) } Else { Notify (NC01, 1) }
                }
            }
        }
    }
}
"""

POKE = """
DefinitionBlock ("", "SSDT", 2, "TEST", "POKE", 1)
{
    Method (POKE, 2, Serialized)
    {
        OperationRegion (PREG, SystemMemory, Arg0, 4)
        Field (PREG, DWordAcc, NoLock, Preserve) { PVAL, 32 }
        PVAL = Arg1
        Return (PVAL)
    }
    Method (PEEK, 1, Serialized)
    {
        OperationRegion (PREG, SystemMemory, Arg0, 4)
        Field (PREG, DWordAcc, NoLock, Preserve) { PVAL, 32 }
        Return (PVAL)
    }
}
"""

ONE = Placement(0, 68 * GIB, GIB)


def layout(*nvdimms: Placement, hot_slots: int = 2, dsm: str = "none") -> GuestLayout:
    return GuestLayout(GIB, 4 * GIB, 1 << 48, nvdimms, dsm=dsm, hot_slots=hot_slots)


def test_the_asl_compiles_to_its_bytes(tmp_path: Path) -> None:
    assert ssdt(layout(ONE))[Header.SIZE :] == compiled(tmp_path, ASL)


@pytest.mark.parametrize("dsm", ["none", "aml"])
@pytest.mark.parametrize("count", [1, 8, 64, 256])
def test_iasl_reads_it_without_a_warning(tmp_path: Path, count: int, dsm: str) -> None:
    table = ssdt(layout(Placement(0, 68 * GIB, GIB, 128 * KIB), hot_slots=count, dsm=dsm))
    assert recompiled(tmp_path, table)[Header.SIZE :] == table[Header.SIZE :]
    (tmp_path / "table.aml").write_bytes(table)
    iasl(tmp_path, "-d", "table.aml")


def test_dom0_writes_no_word_of_the_guest() -> None:
    record = SlotRecord(1, 2, taken=3, ejected=4, answer=(5, 6), structures=b"abc")
    written = {at + each for at, data in record.writes(0) for each in range(len(data))}
    assert written == {*range(hot_slots.address_of(0), hot_slots.address_of(1))} - {
        hot_slots.address_of(0) + each for each in range(8, 24)
    }
    parsed = SlotRecord.parse(record.to_bytes())
    assert (parsed.plugs, parsed.requests, parsed.taken, parsed.ejected, parsed.answer) == (1, 2, 3, 4, (5, 6))


def test_a_guest_without_hot_slots_has_the_tables_of_before() -> None:
    assert b"ACPI0013" not in ssdt(layout(ONE, hot_slots=0))
    assert slot_records(layout(ONE, hot_slots=0), NativeAcpiBuilder().build(layout(ONE)).tables[0]) == {}


@pytest.mark.parametrize("builder", [QemuAcpiBuilder(), NativeAcpiBuilder()], ids=["qemu", "native"])
def test_each_record_has_the_structures_of_its_nvdimm(builder: AcpiBuilder) -> None:
    asked = layout(ONE, Placement(3, 70 * GIB, GIB, 128 * KIB, label_gap=4 * KIB), hot_slots=2, dsm="aml")
    tables = builder.build(asked).tables
    records = slot_records(asked, tables[0])
    assert asked.slots == range(4), "those of its NVDIMMs are among them"
    assert {slot: (each.label_base, each.label_size) for slot, each in records.items()} == {
        0: (0, 0),
        3: (71 * GIB + 4 * KIB, 128 * KIB),
    }
    whole = Nfit.parse(tables[0])
    for slot, record in records.items():
        assert record.structures == whole.of_nvdimm(slot + 1)
        assert SlotRecord.parse(record.to_bytes()).structures == record.structures
        assert record.structures.count(struct.pack("<Q", asked.nvdimms[0 if slot == 0 else 1].base)) == 1


def test_pages_have_each_record_in_its_place() -> None:
    record = SlotRecord(1, 1, structures=b"abc", label_size=7, label_base=9)
    pages = hot_slots.pages(9, {8: record})
    assert len(pages) == 3 * PAGE
    assert pages[:8] == b"NVHP" + (9).to_bytes(4, "little")
    assert pages[PAGE + 8 * RECORD :][:RECORD] == record.to_bytes()
    assert not any(pages[8 : PAGE + 8 * RECORD])
    assert hot_slots.address_of(8) == ADDRESS + PAGE + 8 * RECORD


class Machine:
    """ACPICA's interpreter with the table loaded; its memory starts as zeros."""

    def __init__(self, folder: Path, table: bytes) -> None:
        self._folder = folder
        compiled(folder, POKE)
        (folder / "table.aml").rename(folder / "poke.aml")
        (folder / "slots.aml").write_bytes(table)
        self._orders: list[str] = []

    def write(self, slot: int, record: SlotRecord) -> None:
        """Write a record as dom0 does."""
        for address, data in record.writes(slot):
            for at in range(0, len(data), 4):
                (word,) = struct.unpack_from("<I", data, at)
                if word or at < 24:
                    self._orders.append(f"evaluate \\POKE {address + at:#x} {word:#x}")

    def evaluate(self, what: str) -> None:
        self._orders.append(f"evaluate {what}")

    def run(self) -> str:
        return acpiexec(self._folder, "slots.aml", "poke.aml", orders="\n".join([*self._orders, "quit", ""]))


def test_acpiexec_plugs_asks_and_ejects(tmp_path: Path) -> None:
    machine, at = Machine(tmp_path, ssdt(layout(ONE))), hot_slots.address_of(1)
    structures = bytes(range(1, 201))
    machine.write(0, SlotRecord(1, 1))
    machine.evaluate("\\_SB.NC01._STA")
    machine.write(1, SlotRecord(1, 1, structures=structures))
    machine.evaluate("\\_SB.NC01._STA")
    machine.evaluate("\\_SB.NVGE._EVT 47")
    machine.evaluate("\\_SB.NC01.NVDR._FIT")
    machine.evaluate(f"\\PEEK {at + 8:#x}")
    machine.write(1, SlotRecord(1, 2, structures=structures, request=EJECT))
    machine.evaluate("\\_SB.NVGE._EVT 47")
    machine.evaluate("\\_SB.NC01._OST 3 0x82 (00)")
    machine.evaluate("\\_SB.NC01._EJ0 1")
    machine.evaluate("\\_SB.NC01._STA")
    for offset in (12, 16, 20):
        machine.evaluate(f"\\PEEK {at + offset:#x}")
    machine.evaluate(f"\\PEEK {ADDRESS + 8:#x}")
    output = machine.run()
    returned = re.sub(r"(?s)- evaluate \\POKE.*?(?=- )", "", output)
    integers = [int(each, 16) for each in re.findall(r"\[Integer\] = ([0-9A-F]{16})", returned)]
    assert integers == [0, 0x0F, 1, 0, 1, 3, 0x82, 2], output
    found = re.search(r"\[Buffer\] Length C8 = +((?:.*\n)+?)\n", output)
    assert found, output
    fit = bytes.fromhex("".join(re.findall(r"[0-9A-F]{4}: ((?:[0-9A-Fa-f]{2} )+)", found[1])))
    assert fit == structures
    assert re.findall(r"Received a System Notify on \[(\w+)\] \w+ Value (\w+)", output) == [
        *(("NC01", "0x01"), ("NC01", "0x03"))
    ], output
