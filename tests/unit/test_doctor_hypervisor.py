# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from nvdimm_driver.doctor.finding import Result
from nvdimm_driver.doctor.hypervisor import (
    Hypervisor,
    check,
    check_dom0,
    check_hap,
    check_memory_type,
    check_mmio_relax,
)
from nvdimm_driver.xen.libxenctrl import HAP
from nvdimm_driver.xen.write_back import MARK
from tests.unit.test_xen_libxenctrl import host


def xen(capabilities: int = HAP, command_line: str = "") -> Hypervisor:
    return Hypervisor("4.17", capabilities, command_line)


def test_without_xen_all_that_depends_on_it_fails(tmp_path: Path) -> None:
    found = list(check(tmp_path))
    assert {each.result for each in found} == {Result.FAIL}
    assert found[0].check == "Xen"
    assert "boot this machine into Xen" in found[0].hint
    assert [each.check for each in found[1:]] == ["dom0", "toolstack library", "HAP", "memory type", "mmio-relax"]
    assert {each.message for each in found[1:]} == {"cannot be checked without Xen"}


def test_with_a_library_of_another_version(tmp_path: Path) -> None:
    host(tmp_path, "4.98")
    found = {each.check: each for each in check(tmp_path)}
    assert found["Xen"].result == Result.PASS
    assert found["toolstack library"].result == Result.FAIL
    assert "Xen 4.98 is running" in found["toolstack library"].message
    others = [found[name] for name in ("HAP", "memory type", "mmio-relax")]
    assert {each.message for each in others} == {"cannot be checked without the toolstack library"}
    assert {each.result for each in others} == {Result.FAIL}


@pytest.mark.parametrize(
    ("capabilities", "kind", "result", "message"),
    [
        ("control_d", "PV", Result.PASS, "PV"),
        ("control_d", "PVH", Result.PASS, "PVH"),
        ("control_d", "", Result.PASS, "of unknown kind"),
        ("", "HVM", Result.FAIL, "this is not dom0"),
    ],
)
def test_dom0(capabilities: str, kind: str, result: Result, message: str) -> None:
    found = check_dom0(capabilities, kind)
    assert found.result == result
    assert found.message.startswith(message)


def test_hap() -> None:
    assert check_hap(xen()).result == Result.PASS
    assert check_hap(xen(~HAP)).result == Result.FAIL


@pytest.mark.parametrize(
    ("command_line", "kind", "result"),
    [
        ("dom0_mem=4G mmio-relax", "PV", Result.PASS),
        ("dom0_mem=4G", "PV", Result.NOTE),
        ("mmio-relax", "PVH", Result.NOTE),
    ],
)
def test_mmio_relax(command_line: str, kind: str, result: Result) -> None:
    assert check_mmio_relax(xen(command_line=command_line), kind).result == result


@pytest.mark.parametrize(
    ("words", "command_line", "kind", "result", "says"),
    [
        ("xen-3.0-x86_64 hvm-3.0-x86_64", "mmio-relax", "PV", Result.WARN, "stock Xen"),
        (f"xen-3.0-x86_64 {MARK}", "", "PV", Result.WARN, "mmio-relax is not on"),
        (f"xen-3.0-x86_64 {MARK}", "mmio-relax", "PVH", Result.WARN, "dom0 is PVH"),
        (f"xen-3.0-x86_64 {MARK}", "mmio-relax", "PV", Result.PASS, "write-back"),
    ],
)
def test_memory_type(words: str, command_line: str, kind: str, result: Result, says: str) -> None:
    found = check_memory_type(Hypervisor("4.17", HAP, command_line, words), kind)
    assert found.result == result
    assert says in found.message
