# SPDX-License-Identifier: Apache-2.0
"""The mapping calls of a start: compared with Xen's own (`xl create` with iomem=), and when Xen refuses one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.lab import operator
from tests.lab.guest import xl_config
from tests.lab.host import XenHost

pytestmark = [pytest.mark.lab, pytest.mark.thorough]
NAME = "mapped"
PYTHON = "/usr/bin/python3"
# The domctl mapper on a paused domain of xl: the second range is beyond the machine's address space.
MAP_AND_FAIL = """\
import json, sys
from nvdimm_driver.errors import XenError
from nvdimm_driver.xen.domctl import DomctlMapper
domid, mappings = int(sys.argv[1]), json.loads(sys.argv[2])
mapper = DomctlMapper()
try:
    mapper.map(domid, [*map(tuple, mappings), (mappings[0][0] + (1 << 20), 1 << 41, 1)])
except XenError as error:
    print(error)
else:
    sys.exit("Xen took a frame that is not there")
"""


@pytest.fixture(scope="module")
def mappings(driver_host: XenHost) -> Iterator[list[dict[str, int]]]:
    """Define a domain with an NVDIMM in several extents and one of 128 MiB; yield its mappings."""
    operator.fragment(driver_host, "/mnt/pmem0", 8)
    nvdimms = [operator.nvdimm("/mnt/pmem0/mapped.img", 48), operator.nvdimm("/dev/pmem1", 128)]
    operator.define(driver_host, NAME, nvdimms)
    plan = json.loads(driver_host.check(f"{operator.NVDIMMCTL} plan --json /root/{NAME}.xml").stdout)
    yield plan["mappings"]
    operator.remove(driver_host, NAME)
    driver_host.check("rm /mnt/pmem0/mapped.img /mnt/pmem0/filler-*")


def create_paused(host: XenHost, name: str, extra: str = "") -> int:
    """Create a paused domain with xl; return its domid."""
    host.write(f"/root/{name}.cfg", xl_config(name, extra=extra).encode())
    host.check(f"xl create -p /root/{name}.cfg")
    return int(host.check(f"xl domid {name}").stdout)


def test_no_more_hypercalls_than_xl_makes_for_the_same_ranges(
    driver_host: XenHost, mappings: list[dict[str, int]]
) -> None:
    assert len(mappings) >= 4
    operator.count_memory_mappings(driver_host)
    driver_host.check(f"virsh -q -c xen:///system start --paused {NAME}")
    ours = operator.memory_mappings_counted(driver_host)
    driver_host.check(f"virsh -q -c xen:///system destroy {NAME}")
    ranges = [f"{item['mfn']:#x},{item['frames']:#x}@{item['gfn']:#x}" for item in mappings]
    operator.count_memory_mappings(driver_host)
    create_paused(driver_host, "reference", f"iomem = {json.dumps(ranges)}")
    reference = operator.memory_mappings_counted(driver_host)
    driver_host.check("xl destroy reference")
    print(f"memory_mapping hypercalls for {len(mappings)} extents: the driver {ours}, xl with iomem= {reference}")
    assert 0 < ours <= reference


def test_a_refusal_in_the_middle_is_taken_back(driver_host: XenHost, mappings: list[dict[str, int]]) -> None:
    domid = create_paused(driver_host, "refused")
    try:
        before = io_memory(driver_host, domid)
        triples = json.dumps([[item["gfn"], item["mfn"], item["frames"]] for item in mappings])
        driver_host.write("/root/map.py", MAP_AND_FAIL.encode())
        said = driver_host.check(f"{PYTHON} /root/map.py {domid} '{triples}'").stdout
        assert "0x20000000000" in said
        assert "rolling back" not in said
        assert io_memory(driver_host, domid) == before
    finally:
        driver_host.check("xl destroy refused")


def io_memory(host: XenHost, domid: int) -> str:
    """Return the ranges of I/O memory that Xen lets a domain map, as its debug key 'q' prints them."""
    host.check("xl dmesg -c >/dev/null; xl debug-keys q; sleep 1")
    text = host.check("xl dmesg").stdout
    found = re.search(rf"General information for domain {domid}:.*?I/O Memory *\{{(.*?)\}}", text, re.DOTALL)
    assert found, text
    return found[1]
