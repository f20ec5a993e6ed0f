# SPDX-License-Identifier: Apache-2.0
"""Labels by AML alone: iasl compiles the ASL to the same byte code, and acpiexec runs it on simulated memory."""

from __future__ import annotations

import random
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from nvdimm_driver.acpi import label_methods
from nvdimm_driver.acpi.native import NativeAcpiBuilder, ssdt
from nvdimm_driver.acpi.tables import Header
from nvdimm_driver.model import GIB, KIB, MIB, PAGE, GuestLayout, Placement
from tests.integration.test_acpi_iasl import acpiexec, compiled, recompiled

NVDIMM = Placement(0, 68 * GIB, 64 * MIB, 128 * KIB)
UUID = label_methods.FAMILY.bytes_le.hex(" ")
DATA = Path(__file__).parents[1] / "data/acpi"
ASL = DATA / "labels.asl"


OTHER = Placement(1, 72 * GIB, GIB)


def layout(*nvdimms: Placement, dsm: str = "aml") -> GuestLayout:
    return GuestLayout(GIB, 4 * GIB, 1 << 48, nvdimms, dsm)


def test_the_byte_code_is_what_iasl_makes_of_the_asl(tmp_path: Path) -> None:
    assert ssdt(layout(NVDIMM, OTHER))[Header.SIZE :] == compiled(tmp_path, ASL.read_text())


def test_only_label_areas_that_are_served_change_the_table() -> None:
    plain = ssdt(layout(replace(NVDIMM, label_size=0), OTHER))
    assert ssdt(layout(NVDIMM, OTHER, dsm="none")) == plain
    assert b"_DSM" not in plain


@pytest.mark.parametrize("count", [1, 2, 8, 64, 256])
def test_tables_of_many_survive_iasl(tmp_path: Path, count: int) -> None:
    nvdimms = [replace(NVDIMM, slot=slot, base=(68 + slot) * GIB) for slot in range(count)]
    table = NativeAcpiBuilder().build(layout(*nvdimms)).tables[1]
    assert recompiled(tmp_path, table)[Header.SIZE :] == table[Header.SIZE :]


@pytest.mark.parametrize("label_kib", [128, 129, 131, 2048])
def test_pages_that_a_label_area_touches_are_reserved(label_kib: int) -> None:
    nvdimm = replace(NVDIMM, label_size=label_kib * KIB, label_gap=3 * KIB)
    reserved = label_methods.reservation([nvdimm])
    base, last = nvdimm.label_base // PAGE * PAGE, -(-(nvdimm.label_base + nvdimm.label_size) // PAGE) * PAGE - 1
    assert struct.pack("<QQQQQ", 0, base, last, 0, last + 1 - base) in reserved


def test_a_label_area_elsewhere_is_served_and_reserved_there() -> None:
    size, elsewhere = 128 * KIB, 80 * GIB
    moved = replace(NVDIMM, label_at=elsewhere)
    assert struct.pack("<QQQQQ", 0, elsewhere, elsewhere + size - 1, 0, size) in label_methods.reservation([moved])
    assert label_methods.dsm(moved) == label_methods.dsm(replace(NVDIMM, base=elsewhere - NVDIMM.size))


class Machine:
    """ACPICA's interpreter with the table loaded; its memory starts as zeros."""

    def __init__(self, folder: Path) -> None:
        compiled(folder, (DATA / "put.asl").read_text())
        (folder / "table.aml").rename(folder / "put.aml")
        compiled(folder, ASL.read_text())
        self._folder = folder
        self._orders: list[str] = []

    def dsm(self, function: int, data: bytes = b"\0", *, uuid: str = UUID, revision: int = 1) -> None:
        arguments = f"({uuid}) {revision:#x} {function:#x} [({data.hex(' ')})]"
        self._orders.append(f"evaluate \\_SB.NVDR.NV00._DSM {arguments}")

    def put(self, offset: int, length: int, first: int) -> bytes:
        """Write bytes that count up; return them."""
        self._orders.append(f"evaluate \\PUT {offset:#x} {length:#x} {first:#x}")
        return bytes((first + number) % 256 for number in range(length))

    def run(self) -> list[bytes]:
        """Return the answers to all requests."""
        output = acpiexec(self._folder, "table.aml", "put.aml", orders="\n".join([*self._orders, "quit", ""]))
        answers = output.split("[Buffer] Length ")[1:]
        return [
            bytes.fromhex("".join(re.findall(r"[0-9A-F]{4}: ((?:[0-9A-Fa-f]{2} )+)", answer))) for answer in answers
        ]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def get(offset: int, length: int) -> bytes:
    return struct.pack("<II", offset, length)


def status(value: int) -> bytes:
    return struct.pack("<I", value)


def test_functions_and_size(machine: Machine) -> None:
    machine.dsm(0)
    machine.dsm(0, revision=2)
    machine.dsm(0, uuid="00 " * 15 + "00")
    machine.dsm(4)
    for function in (1, 3, 7, 255):
        machine.dsm(function)
    assert machine.run() == [
        b"\x71",
        b"\0",
        b"\0",
        status(0) + struct.pack("<II", NVDIMM.label_size, PAGE),
        *[status(label_methods.NOT_SUPPORTED)] * 4,
    ]


def test_limits(machine: Machine) -> None:
    size = NVDIMM.label_size
    right = [(0, 0), (0, PAGE), (size - PAGE, PAGE), (size - 1, 1), (size, 0), (1, PAGE)]
    wrong = [(0, PAGE + 1), (size, 1), (size - 1, 2), (size + 1, 0), ((1 << 32) - 1, 1), (0, (1 << 32) - 1)]
    for offset, length in right + wrong:
        machine.dsm(5, get(offset, length))
    for offset, length in wrong:
        machine.dsm(6, get(offset, length) + bytes(16))
    machine.dsm(6, get(0, 9) + bytes(8))  # fewer bytes than announced
    machine.dsm(5, bytes(7))
    answers = machine.run()
    assert answers[: len(right)] == [status(0) + bytes(length) for _, length in right]
    assert answers[len(right) :] == [status(label_methods.INVALID_INPUT)] * (2 * len(wrong) + 2)


def test_what_is_written_is_read_and_nothing_else_changes(machine: Machine) -> None:
    random_ = random.Random(4)
    area, expected = bytearray(NVDIMM.label_size), []
    for _ in range(60):
        length = random_.choice([1, 7, 256, PAGE - 1, PAGE])
        # near a few page borders, so that writes overlap
        offset = max(0, random_.choice([0, PAGE, 2 * PAGE, 31 * PAGE]) + random_.randrange(-300, 300))
        offset = min(offset, NVDIMM.label_size - length)
        area[offset : offset + length] = machine.put(offset, length, random_.randrange(256))
        expected.append(status(0))
        start = max(0, min(offset - 100, NVDIMM.label_size - PAGE))
        machine.dsm(5, get(start, PAGE))
        expected.append(status(0) + bytes(area[start : start + PAGE]))
    assert machine.run() == expected
