# SPDX-License-Identifier: Apache-2.0
"""NVDIMMs that are plugged into a running guest with plain virsh, and taken out of it."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

import pytest

from tests.lab import operator
from tests.lab.guest import Guest
from tests.lab.host import XenHost

pytestmark = [pytest.mark.lab, pytest.mark.thorough]
MIB = 1 << 20
NAME = "hot"
FILES = [f"/mnt/pmem0/hot{number}.img" for number in range(4)]
DISK = "/tmp/guest-tools.img"
CONF = "/etc/nvdimm-driver/nvdimm-driver.conf"


@pytest.fixture(scope="module")
def guest(driver_host: XenHost) -> Iterator[Guest]:
    """Yield a guest with ndctl, one NVDIMM, and room for more."""
    driver_host.write(CONF, b"[xen]\nhotplug = true\n")
    driver_host.put(driver_host.images.guest_tools_disk, DISK)
    xml = operator.domain_xml(NAME, [operator.nvdimm(FILES[0], 16)], ram_mib=256, disk=DISK, dsm="aml")
    driver_host.write(f"/root/{NAME}.xml", xml.encode())
    driver_host.check(f"{operator.VIRSH} define /root/{NAME}.xml")
    started = operator.start(driver_host, NAME)
    yield started
    if started.exists():
        driver_host.check(f"{operator.VIRSH} destroy {NAME}")
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm -f {' '.join(FILES)} {DISK} {CONF}")


def attach(host: XenHost, file: str, size_mib: int, *flags: str, label_kib: int = 0) -> None:
    host.write("/root/device.xml", operator.nvdimm(file, size_mib, label_kib=label_kib).encode())
    host.check(f"{operator.VIRSH} attach-device {NAME} /root/device.xml {' '.join(flags)}")


def eject(guest: Guest, slot: int) -> None:
    """Do what a guest's administrator does, or a rule of udev, a little later."""
    guest.check(
        "run",
        f"n=$(basename $(dirname $(grep -l NC{slot:02X} /sys/bus/acpi/devices/ACPI0004*/path))); "
        f"(sleep 3; echo 0 >/sys/devices/system/container/$n/online; echo 1 >/sys/bus/acpi/devices/$n/eject) "
        ">/tmp/eject 2>&1 &",
    )


def test_it_boots_with_slots(guest: Guest) -> None:
    report = guest.wait_report()
    assert report.problems == ()
    assert [region.size for region in report.regions] == [16 * MIB]


def test_plugged_nvdimms_have_the_bytes_of_their_files(driver_host: XenHost, guest: Guest) -> None:
    attach(driver_host, FILES[1], 32, "--live")
    guest.check("run", "i=0; while [ ! -b /dev/pmem1 ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done")
    report = guest.report()
    assert report.problems == ()
    assert sorted(region.size for region in report.regions) == [16 * MIB, 32 * MIB]
    guest.write("/dev/pmem1", 0, MIB, seed=3)
    assert operator.host_sha256(driver_host, FILES[1], 0, MIB) == guest.sha256("/dev/pmem1", 0, MIB)
    assert guest.sha256("/dev/pmem1", 4 * MIB, MIB) == sha256(bytes(MIB)).hexdigest()
    shown = driver_host.check(f"{operator.VIRSH} dumpxml {NAME}").stdout
    assert FILES[1] in shown
    assert FILES[1] not in driver_host.check(f"{operator.VIRSH} dumpxml --inactive {NAME}").stdout


def test_detached_after_the_guest_has_ejected_it(driver_host: XenHost, guest: Guest) -> None:
    known = guest.sha256("/dev/pmem1", 0, 32 * MIB)
    eject(guest, 1)
    driver_host.write("/root/device.xml", operator.nvdimm(FILES[1], 32).encode())
    driver_host.check(f"{operator.VIRSH} detach-device {NAME} /root/device.xml --live")
    assert [region.size for region in guest.report().regions] == [16 * MIB]
    assert operator.host_sha256(driver_host, FILES[1], 0, 32 * MIB) == known
    assert FILES[1] not in driver_host.check(f"{operator.VIRSH} dumpxml {NAME}").stdout
    driver_host.check(f"touch -c {FILES[1]} && echo >>{FILES[1]} && truncate -s 32M {FILES[1]}")
