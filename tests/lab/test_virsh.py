# SPDX-License-Identifier: Apache-2.0
"""A domain's life with plain virsh, whose users need not know of the driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import operator
from tests.lab.guest import Guest, install_guest
from tests.lab.host import Result, XenHost

pytestmark = pytest.mark.lab
MIB = 1 << 20
NAME = "plain"
FILE = "/mnt/pmem0/plain.img"
BASE = 5 << 30  # a save goes through all frames up to the guest's last one: with the usual gap that takes minutes here
NVDIMM = operator.nvdimm(FILE, 16).replace("</memory>", f"<address type='dimm' slot='0' base='{BASE:#x}'/></memory>")


@pytest.fixture(scope="module")
def xen(driver_host: XenHost) -> Iterator[XenHost]:
    """Yield the host with nvdimmd, and a domain with an NVDIMM, defined with virsh."""
    install_guest(driver_host)
    xml = operator.domain_xml(NAME, [NVDIMM], on_crash="restart")
    driver_host.write(f"/root/{NAME}.xml", xml.encode())
    virsh(driver_host, f"define /root/{NAME}.xml")
    yield driver_host
    if Guest(driver_host, NAME).exists():
        virsh(driver_host, f"destroy {NAME}")
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm -f {FILE}")


@pytest.fixture
def guest(xen: XenHost) -> Guest:
    """Start that domain; return its guest."""
    found = Guest(xen, NAME)
    if not found.exists():
        virsh(xen, f"start {NAME}")
        found.wait_report()
    return found


def virsh(xen: XenHost, command: str) -> str:
    """Run a virsh command that has to succeed; return its output."""
    return xen.check(f"{operator.VIRSH} {command}").stdout


def refused(xen: XenHost, command: str) -> Result:
    """Run a virsh command that must fail; return its result."""
    result = xen.run(f"{operator.VIRSH} {command}")
    assert result.returncode == 1, result
    return result


def test_what_was_defined_is_what_is_shown(xen: XenHost) -> None:
    shown = virsh(xen, f"dumpxml --inactive {NAME}")
    assert "<memory model='nvdimm' access='shared'>" in shown
    assert operator.show(xen, NAME)["nvdimms"][0]["base"] == BASE
    assert f"<path>{FILE}</path>" in shown
    assert "nvdimm-d" not in shown
    assert xen.check(f"stat -c '%s %a %U' {FILE}").stdout.split() == [str(16 * MIB), "600", "root"]


def test_edit_adds_an_nvdimm(xen: XenHost) -> None:
    second = operator.nvdimm("/mnt/pmem0/second.img", 16).replace("'", '"')
    xen.write("/root/editor", f"#!/bin/sh\nsed -i 's|</devices>|{second}</devices>|' \"$1\"\n".encode(), 0o755)
    xen.check(f"EDITOR=/root/editor {operator.VIRSH} edit {NAME}")
    assert [item["path"] for item in operator.show(xen, NAME)["nvdimms"]] == [FILE, "/mnt/pmem0/second.img"]
    xen.write("/root/second.xml", second.encode())
    virsh(xen, f"detach-device --config {NAME} /root/second.xml")
    assert [item["path"] for item in operator.show(xen, NAME)["nvdimms"]] == [FILE]
    xen.check("rm /mnt/pmem0/second.img")


def test_live_changes_and_migration_are_refused_with_the_reason(xen: XenHost, guest: Guest) -> None:
    assert guest.exists()
    xen.write("/root/more.xml", operator.nvdimm("/mnt/pmem0/more.img", 16).encode())
    assert "running domain" in refused(xen, f"attach-device --live {NAME} /root/more.xml").stderr
    assert "cannot be migrated" in refused(xen, f"migrate --live {NAME} xen:///system").stderr
    assert not xen.exists("/mnt/pmem0/more.img")


@pytest.mark.thorough
def test_save_and_restore(xen: XenHost, guest: Guest) -> None:
    disk = "/dev/pmem0"
    guest.write(disk, 0, MIB, 5)
    virsh(xen, f"save {NAME} /tmp/plain.save")
    assert operator.show(xen, NAME)["state"] == "off"
    virsh(xen, "restore /tmp/plain.save")
    assert guest.sha256(disk, 0, MIB) == operator.host_sha256(xen, FILE, 0, MIB)
    xen.check("rm /tmp/plain.save")


def test_managed_save(xen: XenHost, guest: Guest) -> None:
    guest.write("/dev/pmem0", 0, MIB, 7)
    virsh(xen, f"managedsave {NAME}")
    assert operator.show(xen, NAME)["state"] == "off"
    virsh(xen, f"start {NAME}")
    assert guest.sha256("/dev/pmem0", 0, MIB) == operator.host_sha256(xen, FILE, 0, MIB)


def test_suspend_and_resume(xen: XenHost, guest: Guest) -> None:
    virsh(xen, f"suspend {NAME}")
    assert virsh(xen, f"domstate {NAME}").strip() == "paused"
    virsh(xen, f"resume {NAME}")
    assert guest.report().disks[0].size == 16 * MIB


@pytest.mark.thorough
def test_a_reboot_that_libvirt_asks_for(xen: XenHost, guest: Guest) -> None:
    report = guest.next_boot(lambda: virsh(xen, f"reboot {NAME}"))
    assert (report.disks[0].size, report.problems) == (16 * MIB, ())
    assert "not supported by the connection driver: virDomainReset" in refused(xen, f"reset {NAME}").stderr


@pytest.mark.thorough
def test_a_guest_that_crashes_is_started_again(xen: XenHost, guest: Guest) -> None:
    guest.write("/dev/pmem0", 0, MIB, 8)
    before = operator.host_sha256(xen, FILE, 0, MIB)
    report = guest.next_boot(lambda: guest.check("crash"))
    assert (report.disks[0].size, report.problems) == (16 * MIB, ())
    assert guest.sha256("/dev/pmem0", 0, MIB) == before


@pytest.mark.thorough
def test_two_guests_at_once_have_each_their_own(xen: XenHost, guest: Guest) -> None:
    operator.define(xen, "other", [operator.nvdimm("/mnt/pmem0/other.img", 16)])
    other = operator.start(xen, "other")
    other.wait_report()
    for seed, each in enumerate((guest, other)):
        each.write("/dev/pmem0", 0, MIB, seed)
    sums = [each.sha256("/dev/pmem0", 0, MIB) for each in (guest, other)]
    assert sums[0] != sums[1]
    files = (FILE, "/mnt/pmem0/other.img")
    assert [operator.host_sha256(xen, file, 0, MIB) for file in files] == sums
    other.poweroff()
    assert guest.sha256("/dev/pmem0", 0, MIB) == sums[0]
    operator.remove(xen, "other")
    xen.check("rm /mnt/pmem0/other.img")


def test_libvirtd_and_nvdimmd_restarted_under_a_running_guest(xen: XenHost, guest: Guest) -> None:
    """An interactive virsh that was connected to the killed nvdimmd reconnects to the new one by itself."""
    xen.check(
        f"mkfifo /root/orders; {operator.VIRSH} </root/orders >/root/said 2>&1 & "
        "sleep infinity >/root/orders & echo $! >/root/holder.pid; "
        f"echo 'domstate {NAME}' >/root/orders; timeout 300 sh -c 'until grep running /root/said; do sleep 0.2; done'"
    )
    xen.check(f"kill -KILL $(cat {operator.NVDIMMD_PID})")
    operator.restart_libvirtd(xen, uri="xen+unix:///system?socket=/run/libvirt/libvirt-sock")
    operator.start_nvdimmd(xen)
    assert virsh(xen, f"domstate {NAME}").strip() == "running"
    xen.check(f"echo 'domstate {NAME}' >/root/orders; kill $(cat /root/holder.pid); rm /root/orders")
    said = xen.check("timeout 300 sh -c 'while pgrep -x virsh >/dev/null; do sleep 0.1; done'; cat /root/said").stdout
    assert "Reconnected to the hypervisor" in said
    assert said.count("running") == 2
    guest.check("report")


def test_shutdown_undefine_and_define_again_keep_the_bytes(xen: XenHost, guest: Guest) -> None:
    guest.write("/dev/pmem0", MIB, MIB, 6)
    before = operator.host_sha256(xen, FILE, 0, 2 * MIB)
    virsh(xen, f"shutdown {NAME}")
    guest.wait_end()
    assert operator.show(xen, NAME)["state"] == "off"
    virsh(xen, f"undefine {NAME}")
    virsh(xen, f"define /root/{NAME}.xml")
    again = Guest(xen, NAME)
    virsh(xen, f"start {NAME}")
    again.wait_report()
    assert again.sha256("/dev/pmem0", 0, 2 * MIB) == before
    virsh(xen, f"destroy {NAME}")


@pytest.mark.thorough
def test_xl_starts_what_libvirt_gives_it(xen: XenHost) -> None:
    virsh(xen, f"domxml-to-native xen-xl --domain {NAME} >/root/{NAME}.cfg")
    guest = Guest(xen, NAME)
    xen.check(f"xl create /root/{NAME}.cfg")
    assert guest.wait_report().disks[0].size == 16 * MIB
    xen.check(f"xl destroy {NAME}")
    assert operator.show(xen, NAME)["state"] == "off"
