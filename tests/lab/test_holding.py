# SPDX-License-Identifier: Apache-2.0
"""What the host's tools can do to the backings of a running guest: nothing, until Xen no longer has the guest."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.lab import operator
from tests.lab.host import XenHost

pytestmark = [pytest.mark.lab, pytest.mark.thorough]
NAME, FILE = "held", "/mnt/pmem0/held.img"
MOUNT = "mount -o dax,nosuid,nodev,noexec /dev/pmem0 /mnt/pmem0"
TAKEN = {
    "umount /mnt/pmem0": "busy",
    "mkfs.ext4 -q -F /dev/pmem0": "is mounted",
    "ndctl disable-namespace namespace0.0": "Device or resource busy",
    "ndctl destroy-namespace -f namespace0.0": "Device or resource busy",
    "ndctl create-namespace -f -e namespace0.0 -m raw": "Device or resource busy",
    "mkfs.ext4 -q -F /dev/pmem1": "in use by the system",
    "mkfs.xfs -q -f /dev/pmem1": "Device or resource busy",
    "wipefs --all /dev/pmem1": "Device or resource busy",
    "mount /dev/pmem1 /mnt/dax": "busy|Can't open blockdev",  # the second since util-linux 2.39
    "ndctl disable-namespace namespace1.0": "Device or resource busy",
    "ndctl destroy-namespace -f namespace1.0": "Device or resource busy",
    "ndctl create-namespace -f -e namespace1.0 -m fsdax": "Device or resource busy",
}
"""What an operator could do by mistake to the namespaces of a file and of a raw device, and what the tool says (regex).

None of them may get through: with this kernel, a PV dom0 crashes when a namespace is taken down.
"""
OUT_OF_SIGHT = {
    "mkfs.ext4 -q -F /dev/pmem0": "in use by the system",
    "mkfs.xfs -q -f /dev/pmem0": "Device or resource busy",
    "ndctl destroy-namespace -f namespace0.0": "Device or resource busy",
}
"""The same after 'umount --lazy', which succeeds."""
# What mount, mkfs and ndctl ask for before they take a device.
TAKE = "python3 -c 'import os, sys; os.open(sys.argv[1], os.O_RDWR | os.O_EXCL)'"


@pytest.fixture(scope="module")
def xen(driver_host: XenHost) -> Iterator[XenHost]:
    """Define a domain with a file and a raw namespace."""
    nvdimms = [operator.nvdimm(FILE, 16), operator.nvdimm("/dev/pmem1", 128)]
    operator.define(driver_host, NAME, nvdimms)
    yield driver_host
    driver_host.run(f"{operator.VIRSH} destroy {NAME}")
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm {FILE}")


def refused(host: XenHost, commands: dict[str, str]) -> None:
    """Check that each command fails, and says that it does."""
    for command, reason in commands.items():
        done = host.run(f"{command} </dev/null")
        assert done.returncode != 0, command
        assert re.search(reason, done.stderr), done


def holders(host: XenHost) -> list[str]:
    return host.run("pgrep -x nvdimm-holder").stdout.split()


def test_nothing_takes_the_backings_until_the_guest_has_ended(xen: XenHost) -> None:
    """Not even when QEMU is dead, and while the file system is mounted nowhere."""
    xen.check(f"{operator.VIRSH} start --paused {NAME}")
    domid = xen.check(f"xl domid {NAME}").stdout.strip()
    refused(xen, TAKEN)
    qemu = xen.check(f"pgrep -f -- '-xen-domid {domid} '").stdout.split()
    xen.check(f"kill -KILL {' '.join(qemu)}; while kill -0 {qemu[0]} 2>/dev/null; do sleep 0.1; done")
    refused(xen, TAKEN)
    xen.check("umount --lazy /mnt/pmem0")
    refused(xen, OUT_OF_SIGHT)
    xen.check(MOUNT)
    assert NAME in xen.check("xl list").stdout
    xen.check(f"{operator.VIRSH} destroy {NAME}")
    assert holders(xen) == []
    xen.check(f"umount /mnt/pmem0 && {TAKE} /dev/pmem0 && {TAKE} /dev/pmem1 && {MOUNT}")
    assert "i" not in xen.check(f"lsattr {FILE}").stdout.split()[0]


def test_a_holder_outlives_libvirtd_and_nvdimmd_and_a_lost_one_is_replaced(xen: XenHost) -> None:
    xen.check(f"{operator.VIRSH} start --paused {NAME}")
    before = holders(xen)
    assert len(before) == 1
    operator.restart_libvirtd(xen)
    operator.stop_nvdimmd(xen)
    operator.start_nvdimmd(xen)
    assert holders(xen) == before
    assert xen.run(f"{operator.NVDIMMCTL} check").stdout.strip() in ("", "[]")
    xen.check(f"kill -KILL {before[0]}")
    assert "running" in xen.check(f"{operator.NVDIMMCTL} show {NAME} -c holder").stdout
    (after,) = holders(xen)
    assert after != before[0]
    refused(xen, TAKEN)
    # a redefine of the running guest locates the device, which is held
    xen.check(f"{operator.VIRSH} dumpxml --inactive {NAME} >/root/again.xml && {operator.VIRSH} define /root/again.xml")
    xen.check(f"{operator.VIRSH} destroy {NAME}")
    assert holders(xen) == []


def test_a_program_that_does_not_ask_can_write_a_raw_device(xen: XenHost) -> None:
    """A limit that the guide names."""
    xen.check(f"{operator.VIRSH} start --paused {NAME}")
    xen.check("dd if=/dev/pmem1 of=/root/first bs=4096 count=1 iflag=direct status=none")
    xen.check("dd if=/root/first of=/dev/pmem1 bs=4096 count=1 oflag=direct conv=notrunc status=none")
    xen.check(f"{operator.VIRSH} destroy {NAME}")
