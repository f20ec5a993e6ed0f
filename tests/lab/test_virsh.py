"""A domain's life with plain virsh: nobody who uses it has to know that there is a driver in between."""

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


@pytest.fixture(scope="module")
def xen(driver_host: XenHost) -> Iterator[XenHost]:
    """The host with nvdimmd, and a domain with an NVDIMM, defined with virsh."""
    install_guest(driver_host)
    xml = operator.domain_xml(NAME, [operator.nvdimm(FILE, 16)])
    driver_host.write(f"/root/{NAME}.xml", xml.encode())
    virsh(driver_host, f"define /root/{NAME}.xml")
    yield driver_host
    if Guest(driver_host, NAME).exists():
        virsh(driver_host, f"destroy {NAME}")
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm -f {FILE}")


@pytest.fixture
def guest(xen: XenHost) -> Guest:
    """That domain, running."""
    found = Guest(xen, NAME)
    if not found.exists():
        virsh(xen, f"start {NAME}")
        found.wait_report()
    return found


def virsh(xen: XenHost, command: str) -> str:
    return xen.check(f"{operator.VIRSH} {command}").stdout


def refused(xen: XenHost, command: str) -> Result:
    result = xen.run(f"{operator.VIRSH} {command}")
    assert result.returncode == 1, result
    return result


def test_what_was_defined_is_what_is_shown(xen: XenHost) -> None:
    shown = virsh(xen, f"dumpxml --inactive {NAME}")
    assert "<memory model='nvdimm' access='shared'>" in shown
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


def test_save_and_restore(xen: XenHost, guest: Guest) -> None:
    disk = "/dev/pmem0"
    guest.write(disk, 0, MIB, 5)
    virsh(xen, f"save {NAME} /tmp/plain.save")
    assert operator.show(xen, NAME)["state"] == "off"
    virsh(xen, "restore /tmp/plain.save")
    assert guest.sha256(disk, 0, MIB) == operator.host_sha256(xen, FILE, 0, MIB)
    xen.check("rm /tmp/plain.save")


def test_libvirtd_and_nvdimmd_restarted_under_a_running_guest(xen: XenHost, guest: Guest) -> None:
    xen.check(f"kill -KILL $(cat {operator.NVDIMMD_PID})")
    operator.restart_libvirtd(xen, uri="xen+unix:///system?socket=/run/libvirt/libvirt-sock")
    operator.start_nvdimmd(xen)
    assert virsh(xen, f"domstate {NAME}").strip() == "running"
    guest.check("report")


def test_destroy_undefine_and_define_again_keep_the_bytes(xen: XenHost, guest: Guest) -> None:
    guest.write("/dev/pmem0", MIB, MIB, 6)
    before = operator.host_sha256(xen, FILE, 0, 2 * MIB)
    virsh(xen, f"destroy {NAME}")
    virsh(xen, f"undefine {NAME}")
    virsh(xen, f"define /root/{NAME}.xml")
    again = Guest(xen, NAME)
    virsh(xen, f"start {NAME}")
    again.wait_report()
    assert again.sha256("/dev/pmem0", 0, 2 * MIB) == before
    virsh(xen, f"destroy {NAME}")


def test_xl_starts_what_libvirt_gives_it(xen: XenHost) -> None:
    virsh(xen, f"domxml-to-native xen-xl --domain {NAME} >/root/{NAME}.cfg")
    guest = Guest(xen, NAME)
    xen.check(f"xl create /root/{NAME}.cfg")
    assert guest.wait_report().disks[0].size == 16 * MIB
    xen.check(f"xl destroy {NAME}")
    assert operator.show(xen, NAME)["state"] == "off"
