# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import product

import pytest

from nvdimm_driver import caching
from nvdimm_driver.errors import XenError
from nvdimm_driver.xen.write_back import MARK, find_fault, has_mmio_relax

COMMAND_LINES = [
    ("mmio-relax", True),
    ("mmio-relax=all", True),
    ("mmio-relax=1 console=com1", True),
    ("mmio-relax=off", False),
    ("mmio-relax no-mmio-relax", False),
    ("x-mmio-relax", False),
    ("mmio-relax=True", False),
    ("mmio-relax=dom0", False),
    ("mmio-relax=all,", False),
    ("mmio-relax\tconsole=com1", False),
    ("mmio-relax=0 mmio-relax=enable", True),
    ("", False),
]


@pytest.mark.parametrize(("command_line", "on"), COMMAND_LINES)
def test_mmio_relax_on_the_command_line(command_line: str, on: bool) -> None:
    assert has_mmio_relax(command_line) == on


def test_everything_has_to_hold() -> None:
    marks = {f"hvm-3.0-x86_64 {MARK} x": True, f"hvm-3.0-x86_64 {MARK}-2": False, "": False}
    kinds = {"PV": True, "PVH": False, "": False}
    for (words, marked), (line, relaxed), (kind, known) in product(marks.items(), COMMAND_LINES, kinds.items()):
        assert (find_fault(words, line, kind) == "") == (marked and relaxed and known)


@pytest.mark.parametrize(
    ("wanted", "fault", "gets"),
    [
        ("auto", "", "write-back"),
        ("auto", "stock", "uncached"),
        ("write-back", "", "write-back"),
        ("uncached", "", "uncached"),
        ("uncached", "stock", "uncached"),
    ],
)
def test_what_a_guest_gets(wanted: str, fault: str, gets: str) -> None:
    assert caching.choose(wanted, lambda: fault) == gets


def test_only_write_back_will_do() -> None:
    with pytest.raises(XenError, match=r"\(cache = write-back\), and that is not possible: stock"):
        caching.choose("write-back", lambda: "stock")
