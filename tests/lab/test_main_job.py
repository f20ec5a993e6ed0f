# SPDX-License-Identifier: Apache-2.0
"""From domain XML to a guest's /dev/pmem0, on a real Xen: the guest reads what dom0 writes, and vice versa."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests import tried
from tests.lab import operator
from tests.lab.guest import Guest, pattern
from tests.lab.host import XenHost
from tests.waiting import wait_until

pytestmark = pytest.mark.lab
MIB = 1 << 20
FILE, DEVICE = "/mnt/pmem0/db1.img", "/dev/pmem1"
FILE_MIB, DEVICE_MIB = 48, 32
NVDIMMS = ((FILE, FILE_MIB), (DEVICE, DEVICE_MIB))


@pytest.fixture(scope="module")
def xen(driver_host: XenHost) -> Iterator[XenHost]:
    """Yield the host with the driver and a fragmented file system."""
    operator.fragment(driver_host, "/mnt/pmem0", 16)
    yield driver_host
    driver_host.check("rm /mnt/pmem0/filler-*")


@pytest.fixture(scope="module")
def guest(xen: XenHost) -> Iterator[Guest]:
    """Yield a guest with two NVDIMMs with bytes from dom0: a file in several extents, and the raw namespace."""
    operator.define(xen, "db1", [operator.nvdimm(*each) for each in NVDIMMS])
    for seed, (path, size_mib) in enumerate(NVDIMMS):
        write_from_dom0(xen, path, size_mib, seed)
    operator.count_memory_mappings(xen)
    started = operator.start(xen, "db1")
    yield started
    if started.exists():
        xen.check("virsh -q -c xen:///system destroy db1")
    operator.remove(xen, "db1")


def write_from_dom0(xen: XenHost, path: str, size_mib: int, seed: int) -> None:
    """Write a pattern to a file or device in dom0."""
    xen.write("/tmp/pattern", pattern(seed, MIB))
    xen.check(
        f"set -o pipefail; for i in $(seq {size_mib}); do cat /tmp/pattern; done | "
        f"dd of={path} bs=1M iflag=fullblock conv=notrunc oflag=direct status=none && sync {path}"
    )


def same_bytes(xen: XenHost, guest: Guest) -> None:
    """Check that the guest and dom0 read the same bytes of each NVDIMM."""
    for disk, (path, size_mib) in zip(operator.disks(guest.report()), NVDIMMS, strict=True):
        seen = guest.sha256(disk, 0, size_mib * MIB)
        assert seen == operator.host_sha256(xen, path, 0, size_mib * MIB), disk


def test_the_host_is_of_the_release(xen: XenHost, guest: Guest, record_property: tried.Record) -> None:
    kernel = guest.check("run", "uname -r").strip()
    tried.record(record_property, lambda command: xen.check(command).stdout, tried.COMMANDS, tests="lab", guests=kernel)
    assert xen.check("xl info xen_version").stdout.startswith(xen.images.release.xen)


def test_the_guest_sees_what_was_asked_for(xen: XenHost, guest: Guest) -> None:
    report = guest.wait_report()
    sizes = {f"/dev/{disk.name}": disk.size for disk in report.disks}
    assert [sizes[disk] for disk in operator.disks(report)] == [size_mib * MIB for _, size_mib in NVDIMMS]
    assert sorted(dimm.handle for dimm in report.dimms) == [1, 2]
    assert report.problems == ()
    bases = [item["base"] for item in operator.show(xen, "db1")["nvdimms"]]
    assert sorted(region.resource or 0 for region in report.regions) == bases


def test_the_mapping_costs_what_was_planned(xen: XenHost, guest: Guest) -> None:
    """Over several extents, all entries are of 2 MiB, and the hypercalls are as many as the log has."""
    guest.wait_report()
    plan = json.loads(xen.check(f"{operator.NVDIMMCTL} plan --json /root/db1.xml").stdout)
    counted = operator.memory_mappings_counted(xen)
    line = re.findall(
        r"event=started .* extents=(\d+) superpages=(\d+) pages=(\d+) hypercalls=(\d+)",
        xen.get(operator.LOG).decode(),
    )[-1]
    extents, superpages, pages, hypercalls = map(int, line)
    assert extents == len(plan["mappings"]) >= 4
    assert {"superpage_entries": superpages, "page_entries": pages, "hypercalls": hypercalls} == plan["cost"]
    assert superpages == (FILE_MIB + DEVICE_MIB) // 2
    assert pages == 0
    assert hypercalls == counted


def test_both_sides_read_what_the_other_wrote(xen: XenHost, guest: Guest) -> None:
    on_file, on_device = operator.disks(guest.wait_report())
    same_bytes(xen, guest)
    guest.write(on_file, 5 * MIB, 20 * MIB, 11)
    guest.write(on_device, 3 * MIB, 4 * MIB, 12)
    same_bytes(xen, guest)
    assert xen.check(f"dd if={FILE} bs=1M skip=5 count=1 iflag=direct status=none | head -c 64").stdout.encode() == (
        pattern(11, 64)
    )


def test_the_file_is_frozen_while_the_guest_has_it(xen: XenHost, guest: Guest) -> None:
    guest.wait_report()
    for command in (f"truncate -s 1M {FILE}", f"fallocate -p -o 0 -l 4096 {FILE}", f"rm -f {FILE}"):
        refused = xen.run(command)
        assert refused.returncode != 0
        assert "not permitted" in refused.stderr


def test_what_an_operator_can_look_at_meanwhile(xen: XenHost, guest: Guest) -> None:
    guest.wait_report()
    rows = json.loads(xen.check(f"{operator.NVDIMMCTL} list -f json").stdout)
    assert [(row["Domain"], row["Slot"], row["Path"], row["Size"], row["State"]) for row in rows] == [
        ("db1", slot, path, size_mib * MIB, "mapped") for slot, (path, size_mib) in enumerate(NVDIMMS)
    ]
    decoded = xen.check(f"{operator.NVDIMMCTL} acpi dump --decode db1").stdout
    assert "NFIT" in decoded
    shown = operator.show(xen, "db1")
    assert shown["cache"] == "uncached"
    for item in shown["nvdimms"]:
        assert f"{item['base']:#x}" in decoded
    listed = xen.check(f"{operator.NVDIMMCTL} acpi dump --all -o /root/tables db1").stdout.split()
    found = {group: {path.split("/")[-1] for path in listed if f"/{group}/" in path} for group in ("qemu", "guest")}
    assert {"dsdt.dat", "facp.dat", "apic.dat", "nfit.dat", "ssdt1.dat"} <= found["guest"]
    assert {"dsdt.dat", "facp.dat", "apic.dat"} <= found["qemu"]
    xen.check("cd /root/tables && cmp nvdimm/nfit.dat guest/nfit.dat && cat guest/ssdt*.dat | grep -q ACPI0012")
    unchanged = xen.check(f"{operator.NVDIMMCTL} register").stdout.splitlines()
    assert [line.split()[0] for line in unchanged] == ["unchanged", "unchanged", "unchanged", "loaded", "no"]
    refused = xen.run(f"{operator.NVDIMMCTL} unregister")
    assert refused.returncode not in (0, 1)
    assert "db1" in refused.stderr


def test_what_libvirt_stores_is_restored_and_rewritten_byte_for_byte(xen: XenHost, guest: Guest) -> None:
    """By hand, without nvdimmd: dump, restore, rewrite, define."""
    guest.wait_report()
    direct = "virsh -q -c xen+unix:///system?socket=/run/libvirt/libvirt-sock"
    xen.check(
        f"set -e; cd /tmp; {direct} dumpxml --inactive --security-info db1 >libvirt.xml\n"
        f"{operator.NVDIMMCTL} restore libvirt.xml >restored.xml\n"
        f"{operator.NVDIMMCTL} rewrite restored.xml >rewritten.xml\n"
        f"cmp libvirt.xml rewritten.xml; {direct} define rewritten.xml"
    )
    restored = xen.get("/tmp/restored.xml").decode()
    assert restored.count("<memory model='nvdimm'") == len(NVDIMMS)
    assert "nvdimm-driver" not in restored


@pytest.mark.thorough
def test_its_bytes_are_there_after_a_reboot(xen: XenHost, guest: Guest) -> None:
    guest.wait_report()
    before = xen.check("xl domid db1").stdout
    guest.reboot()
    assert xen.check("xl domid db1").stdout != before
    same_bytes(xen, guest)


def test_its_bytes_are_there_after_destroy_and_start(xen: XenHost, guest: Guest) -> None:
    guest.wait_report()
    xen.check("virsh -q -c xen:///system destroy db1")
    assert operator.show(xen, "db1")["state"] == "off"
    assert "i" not in xen.check(f"lsattr {FILE}").stdout.split()[0]
    again = operator.start(xen, "db1")
    assert again.wait_report().problems == ()
    same_bytes(xen, again)
    again.poweroff()
    wait_until(lambda: operator.show(xen, "db1")["state"] == "off", "the end of the guest")
    assert "i" not in xen.check(f"lsattr {FILE}").stdout.split()[0]


def test_unregister_removes_what_register_installs(xen: XenHost, guest: Guest) -> None:
    assert not guest.exists()
    files = ("/etc/libvirt/hooks/libxl.d/50-nvdimm", "/usr/libexec/xen/bin/nvdimm-device-model")
    xen.check(f"{operator.NVDIMMCTL} unregister")
    assert not any(map(xen.exists, files))
    assert operator.show(xen, "db1")["name"] == "db1"
    xen.check(f"{operator.NVDIMMCTL} register")
    assert all(map(xen.exists, files))
