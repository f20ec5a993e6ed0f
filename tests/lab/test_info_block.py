# SPDX-License-Identifier: Apache-2.0
"""A guest writes an info block on its raw namespace, and dom0's kernel obeys it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nvdimm_driver.model import MIB
from tests.lab import operator
from tests.lab.host import XenHost

pytestmark = [pytest.mark.lab, pytest.mark.thorough]
NAME, DEVICE, DISK = "btt", "/dev/pmem1", "/tmp/guest-tools.img"
RAW_AGAIN = (
    "ndctl disable-namespace namespace1.0; echo 1 >/sys/bus/nd/devices/namespace1.0/force_raw; "
    "ndctl enable-namespace namespace1.0"
)


@pytest.fixture
def xen(driver_host: XenHost) -> Iterator[XenHost]:
    """Yield a host with a domain that has all of a raw namespace."""
    size_mib = int(driver_host.check(f"blockdev --getsize64 {DEVICE}").stdout) // MIB
    driver_host.put(driver_host.images.guest_tools_disk, DISK)
    xml = operator.domain_xml(NAME, [operator.nvdimm(DEVICE, size_mib)], ram_mib=256, disk=DISK)
    driver_host.write(f"/root/{NAME}.xml", xml.encode())
    driver_host.check(f"{operator.VIRSH} define /root/{NAME}.xml")
    yield driver_host
    driver_host.check(
        f"dd if=/dev/zero of={DEVICE} bs=1M count=1 conv=fsync status=none; ndctl disable-namespace namespace1.0; "
        "echo 0 >/sys/bus/nd/devices/namespace1.0/force_raw; ndctl enable-namespace namespace1.0"
    )
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm {DISK}")


def test_its_bytes_come_back(xen: XenHost) -> None:
    guest = operator.start(xen, NAME)
    (region,) = guest.wait_report().regions
    namespace = region.name.replace("region", "namespace") + ".0"
    guest.check("run", f"ndctl create-namespace -f -e {namespace} -m sector", timeout=300)
    xen.check(f"{operator.VIRSH} destroy {NAME}")
    written = operator.host_sha256(xen, DEVICE, 0, 16 * MIB)
    xen.check("ndctl disable-namespace namespace1.0")
    # As at a boot; the namespace's own driver gives way to that of sectors, which is no error.
    print(xen.run("ndctl enable-namespace namespace1.0; udevadm settle; ndctl list -Nui -n namespace1.0"))
    assert xen.run(f"test -b {DEVICE}").returncode == 1
    assert xen.run(f"test -b {DEVICE}s").returncode == 0, xen.run("ndctl list -Nui")
    assert xen.run(f"{operator.VIRSH} start {NAME}").returncode == 1
    found = xen.run(f"{operator.NVDIMMCTL} check --max-width 0")
    assert "namespace1.0 is in sector mode now, not raw" in found.stdout, found
    assert RAW_AGAIN in found.stdout, found

    xen.check(RAW_AGAIN)
    assert operator.host_sha256(xen, DEVICE, 0, 16 * MIB) == written
    assert xen.run(f"{operator.NVDIMMCTL} check").returncode == 0
    operator.start(xen, NAME)
    xen.check(f"{operator.VIRSH} destroy {NAME}")
