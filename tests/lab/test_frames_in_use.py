# SPDX-License-Identifier: Apache-2.0
"""The last guard between guests is Xen's and xenstore's own list, and not the ledger alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import operator
from tests.lab.guest import Guest
from tests.lab.host import XenHost

pytestmark = [pytest.mark.lab, pytest.mark.thorough]
DEVICE, SIZE_MIB = "/dev/pmem1", 16
STATE = "/var/lib/nvdimm-driver"
KNOWN = f"{STATE}/ledger* {STATE}/devices {STATE}-in-use"
"""The ledger, and all that would tell of it, or of the device's owner."""
ONE, TWO = "frames1", "frames2"
LEGACY = "virsh -q -c 'xen:///system?mode=legacy'"  # nvdimmd is not asked
BLIND = "[libvirt]\ndefinition_dirs =\n"
BLIND_FILE = "/etc/nvdimm-driver/nvdimm-driver.conf.d/zz-blind.conf"
"""The driver does not see libvirt's files."""
NOWHERE = "/root/nowhere.conf"
WITHOUT_LIBVIRT = f"--config-file /etc/nvdimm-driver/nvdimm-driver.conf.d/pools.conf --config-file {NOWHERE}"
"""libvirt cannot be asked whose a device is."""


@pytest.fixture
def guest(driver_host: XenHost) -> Iterator[Guest]:
    """Yield a guest with a device; the ledger is lost while it runs, with the mark of the device."""
    operator.define(driver_host, ONE, [operator.nvdimm(DEVICE, SIZE_MIB)])
    operator.start(driver_host, ONE)
    driver_host.check("pkill nvdimm-holder")  # another guard: while it has the device, nobody else can open it
    driver_host.check(f"mkdir /root/lost && mv {KNOWN} /root/lost && {operator.NVDIMMCTL} list")
    nowhere = f"[rpc]\nlibvirt_socket = /run/nowhere\nlibvirt_direct_socket = /run/nowhere\n{BLIND}"
    driver_host.write(NOWHERE, nowhere.encode())
    yield Guest(driver_host, ONE)
    driver_host.run(f"{operator.VIRSH} undefine {TWO}; {operator.NVDIMMCTL} release --yes {TWO}")
    driver_host.check(
        f"rm -rf {NOWHERE} {BLIND_FILE} {KNOWN}; mv /root/lost/*-in-use {STATE}-in-use && mv /root/lost/* {STATE} && "
        "rmdir /root/lost"
    )
    driver_host.check(f"{operator.VIRSH} destroy {ONE}")
    operator.remove(driver_host, ONE)


def test_no_two_guests_have_the_frames_of_a_device_after_the_ledger_was_lost(
    driver_host: XenHost, guest: Guest
) -> None:
    domid = driver_host.check(f"xl domid {ONE}").stdout.strip()
    announced = driver_host.check(f"xenstore-read /libxl/{domid}/nvdimm-driver/0").stdout
    assert [int(word.split("+")[1], 16) for word in announced.split()] == [SIZE_MIB << 8]
    assert driver_host.check(f"xenstore-ls -p /libxl/{domid} | grep nvdimm-driver").stdout.endswith("(n0)\n")

    wiped = driver_host.run(f"{operator.NVDIMMCTL} wipe --yes {DEVICE}")
    assert (wiped.returncode, f"{DEVICE}: " in wiped.stderr, ONE in wiped.stderr) == (4, True, True), wiped
    wiped = driver_host.run(f"{operator.NVDIMMCTL} {WITHOUT_LIBVIRT} wipe --yes {DEVICE}")
    assert (wiped.returncode, f"the guest with domid {domid} has it" in wiped.stderr) == (4, True), wiped
    xml = operator.domain_xml(TWO, [operator.nvdimm(DEVICE, SIZE_MIB)])
    driver_host.write(f"/root/{TWO}.xml", xml.encode())
    driver_host.check(
        f"sed 's/{ONE}/{TWO}/; s,<uuid>.*</uuid>,,' /etc/libvirt/libxl/{ONE}.xml >/root/stored.xml && "
        f"{LEGACY} define /root/stored.xml"
    )
    commands = (f"{operator.VIRSH} define /root/{TWO}.xml", f"{operator.VIRSH} start {TWO}", f"{LEGACY} start {TWO}")
    for command in commands:
        refused = driver_host.run(command)
        assert refused.returncode == 1, refused
    assert f"{DEVICE} is in libvirt's definition of domain {ONE}, too" in driver_host.run(commands[0]).stderr
    driver_host.write(BLIND_FILE, BLIND.encode())
    refused = driver_host.run(commands[2])
    assert refused.returncode == 1, refused
    assert f"in use by the running domain with domid {domid}" in operator.show(driver_host, TWO)["last_fault"]
    assert driver_host.run(f"xl domid {TWO}").returncode
    assert guest.exists()
