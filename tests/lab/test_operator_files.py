# SPDX-License-Identifier: Apache-2.0
"""Bytes of NVDIMMs: a backing is made before its domain, exported, wiped, imported, and read by a guest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest

from tests.lab import operator
from tests.lab.guest import Guest
from tests.lab.host import Result, XenHost

pytestmark = pytest.mark.lab
MIB = 1 << 20
SIZE_MIB, LABEL_KIB = 34, 2048
FIRST, SECOND = "/mnt/pmem0/first.img", "/mnt/pmem0/second.img"
COPY, DISK = "/root/copy.img", "/tmp/guest-tools.img"


@pytest.fixture(scope="module")
def xen(driver_host: XenHost) -> Iterator[XenHost]:
    """Yield the host with a guest disk that has tools."""
    driver_host.put(driver_host.images.guest_tools_disk, DISK)
    yield driver_host
    driver_host.check(f"rm -f {DISK} {COPY} {FIRST} {SECOND}")


def nvdimmctl(xen: XenHost, words: str, status: int = 0) -> Result:
    """Run nvdimmctl, which must end with that status."""
    done = xen.run(f"{operator.NVDIMMCTL} {words}")
    assert done.returncode == status, done
    return done


def define(xen: XenHost, name: str, device: str) -> Guest:
    """Define and start a domain whose XML has the device that an operator pasted into it."""
    xml = operator.domain_xml(name, [device], ram_mib=256, disk=DISK, dsm="aml")
    xen.write(f"/root/{name}.xml", xml.encode())
    xen.check(f"{operator.VIRSH} define /root/{name}.xml")
    return operator.start(xen, name)


def namespaces(guest: Guest) -> list[dict[str, Any]]:
    """Return the guest's namespaces as ndctl lists them."""
    found = json.loads(guest.check("run", "ndctl list -N"))
    return found if isinstance(found, list) else [found]


@pytest.mark.thorough
def test_bytes_go_out_and_come_back(xen: XenHost) -> None:
    made = nvdimmctl(xen, f"provision --pool main first.img --size {SIZE_MIB}M --label-size {LABEL_KIB}K").stdout
    assert f"<path>{FIRST}</path>" in made
    assert operator.host_sha256(xen, FIRST, 0, SIZE_MIB * MIB) == sha256(bytes(SIZE_MIB * MIB)).hexdigest()

    guest = define(xen, "first", made)
    assert guest.wait_report().problems == ()
    guest.check("run", "ndctl disable-region region0 && ndctl init-labels nmem0 && ndctl enable-region region0")
    guest.check("run", "ndctl create-namespace -m raw", timeout=300)
    (namespace,) = namespaces(guest)
    guest.write(f"/dev/{namespace['blockdev']}", 0, 4 * MIB, 17)
    seen = guest.sha256(f"/dev/{namespace['blockdev']}", 0, 8 * MIB)
    for words in (f"export first {COPY}", f"wipe -y {FIRST}"):
        assert "first is running" in nvdimmctl(xen, words, 4).stderr
    guest.poweroff()

    content = operator.host_sha256(xen, FIRST, 0, SIZE_MIB * MIB)
    assert nvdimmctl(xen, f"export first {COPY}").stdout.split() == [content, COPY]
    assert operator.host_sha256(xen, COPY, 0, SIZE_MIB * MIB) == content
    assert "all zeros" in nvdimmctl(xen, "wipe --yes first").stdout
    assert operator.host_sha256(xen, FIRST, 0, SIZE_MIB * MIB) == sha256(bytes(SIZE_MIB * MIB)).hexdigest()

    taken = nvdimmctl(xen, f"import {COPY} --pool main --name second.img").stdout
    with_slot = made.replace("</target>\n", "</target>\n  <address type='dimm' slot='0'/>\n")
    assert taken == with_slot.replace(FIRST, SECOND), "size, label area and slot are found in the copy"
    assert operator.host_sha256(xen, SECOND, 0, SIZE_MIB * MIB) == content
    guest = define(xen, "second", taken)
    assert guest.wait_report().problems == ()
    assert namespaces(guest) == [namespace]
    assert guest.sha256(f"/dev/{namespace['blockdev']}", 0, 8 * MIB) == seen
    guest.poweroff()
    for name, path in (("first", FIRST), ("second", SECOND)):
        xen.check(f"{operator.VIRSH} undefine {name}")
        assert f"{path}: deleted" in nvdimmctl(xen, f"release --yes --delete {name}").stdout
        assert not xen.exists(path)


@pytest.mark.thorough
def test_a_raw_namespace_is_wiped_and_copied(xen: XenHost) -> None:
    xen.check("seq 3000000 | head -c 16M | dd of=/dev/pmem1 bs=1M iflag=fullblock oflag=direct status=none")
    xen.check("dd if=/dev/pmem1 of=/root/before bs=1M count=16 iflag=direct status=none")
    size = int(xen.check("blockdev --getsize64 /dev/pmem1").stdout)
    exported = nvdimmctl(xen, f"export /dev/pmem1 {COPY}-raw").stdout.split()[0]
    xen.check(f"cmp -n {16 * MIB} /root/before {COPY}-raw")
    assert "--force overwrites it" in nvdimmctl(xen, "import /root/before --pool device --name pmem1", 5).stderr
    nvdimmctl(xen, "wipe -y /dev/pmem1")
    assert operator.host_sha256(xen, "/dev/pmem1", 0, size) == sha256(bytes(size)).hexdigest()
    taken = nvdimmctl(xen, "import /root/before --pool device --name pmem1 --force").stdout
    assert "<path>/dev/pmem1</path>" in taken
    xen.check(f"cmp -n {16 * MIB} /root/before /dev/pmem1")
    assert len(exported) == 64
    xen.check(f"rm /root/before {COPY}-raw")
    nvdimmctl(xen, "wipe -y /dev/pmem1")
