# SPDX-License-Identifier: Apache-2.0
"""The domain XML that Nova emits for ``hw:pmem=6GB,16GB``, unchanged: tests/nova/driver/test_libxl.py."""

from __future__ import annotations

from pathlib import Path

from nvdimm_driver.model import GIB, MIB, DomainSpec, NvdimmSpec
from nvdimm_driver.xml.parse_domain import extract
from nvdimm_driver.xml.rewrite import restore, rewrite

EMITTED = (Path(__file__).parents[1] / "data/nova/domain.xml").read_text()
UUID = "7c7b0e2e-4a6e-4f0e-9a3b-0000000000aa"


def nvdimm(slot: int, path: str, size: int) -> NvdimmSpec:
    return NvdimmSpec(slot, path, size, label_size=2 * MIB, alignsize=2 * MIB, node=0, pmem=True)


def test_it_says_what_nova_means() -> None:
    nvdimms = nvdimm(0, "/mnt/pmem0/ns0", 6 * GIB), nvdimm(1, "/dev/dax0.0", 16 * GIB)
    unplaced = frozenset(each.path for each in nvdimms)
    assert extract(EMITTED) == DomainSpec(
        "instance-00000001", UUID, 512 * MIB, None, nvdimms, unplaced=unplaced, hot_slots=2
    )
    assert [each.visible_size for each in nvdimms] == [6 * GIB - 2 * MIB, 16 * GIB - 2 * MIB], "nothing is rounded away"


def test_it_is_rewritten_and_comes_back() -> None:
    rewritten = rewrite(EMITTED, "/dm")
    assert "<emulator>/dm</emulator>" in rewritten
    assert "nvdimm" not in rewritten.partition("</metadata>")[2]
    restored = restore(rewritten)
    assert extract(restored) == extract(EMITTED)
    assert rewrite(restored, "/dm") == rewritten
