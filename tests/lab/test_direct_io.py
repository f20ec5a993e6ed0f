# SPDX-License-Identifier: Apache-2.0
"""A guest's disks, read and written with O_DIRECT; the buffer is a mapping of a file on the guest's DAX file system."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import operator
from tests.lab.guest import Guest
from tests.lab.host import XenHost
from tests.lab.image import make_disk, make_next_disk
from tests.waiting import HANG_SECONDS

pytestmark = pytest.mark.lab
NAME, FILE, DISK = "direct", "/mnt/pmem0/direct.img", "/tmp/guest-direct.img"
PAGE, LARGER, DISK_SIZE = 4096, 65536, 8 << 20
# Behind xvdd, libxl has QEMU emulate no second disk with the same bytes.
XEN_DISKS = """
<disk type='block' device='disk'><driver name='phy'/><source dev='{loop}'/><target dev='xvde' bus='xen'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/tmp/direct-qemu'/>
<target dev='xvdf' bus='xen'/></disk>
"""
IDE_DISK = """
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/tmp/direct-ide'/>
<target dev='hda' bus='ide'/></disk>
"""
AHCI_DISK = (
    *("-device", "ahci,id=sata", "-drive", "file=/tmp/direct-ahci,if=none,id=ahci,format=raw"),
    *("-device", "ide-hd,drive=ahci,bus=sata.0"),
)
WORKS = ("WORKS", "WORKS")
FAILS = ("ERROR Input/output error", "ERROR Input/output error")
HANGS = ("HANG, the device needs a reset",) * 2


def wrong(length: int) -> tuple[str, str]:
    """Return what is printed if a read leaves the buffer as it was, and a write writes zeros."""
    count = f"WRONG BYTES {length} of {length}, from 0 on"
    return f"{count} aa instead of 03", f"{count} 00 instead of 09"


@pytest.fixture(scope="module", params=["", pytest.param("swiotlb=force", marks=pytest.mark.thorough)])
def guest(
    driver_host: XenHost, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    """Yield a guest with a DAX file system on /mnt, Xen disks of the kernel and of QEMU, and disks of IDE and AHCI."""
    folder = tmp_path_factory.mktemp("disk")
    images = driver_host.images
    arguments = f"xen_emul_unplug=unnecessary {request.param}"
    initrds = (*images.full_guest_initrds, images.guest_tools)
    make_disk(folder / "guest.img", images.dom0_kernel, initrds, arguments)
    driver_host.put(folder / "guest.img", DISK)
    make_next_disk(folder / "next.img", DISK_SIZE)
    for each in ("ide", "ahci"):
        driver_host.put(folder / "next.img", f"/tmp/direct-{each}")
    driver_host.check(f"for each in kernel qemu virtio nvme later; do truncate -s {DISK_SIZE} /tmp/direct-$each; done")
    loop = driver_host.check("losetup -f --show /tmp/direct-kernel").stdout.strip()
    xml = operator.domain_xml(NAME, [operator.nvdimm(FILE, 64)], ram_mib=384, disk=DISK)
    xml = xml.replace("</devices>", f"{XEN_DISKS.format(loop=loop)}{IDE_DISK}</devices>")
    ahci = "".join(f"<xen:arg value='{each}'/>" for each in AHCI_DISK)
    xml = xml.replace("</xen:commandline>", f"{ahci}</xen:commandline>")
    driver_host.write(f"/root/{NAME}.xml", xml.encode())
    driver_host.check(f"{operator.VIRSH} define /root/{NAME}.xml")
    started = operator.start(driver_host, NAME)
    started.wait_report()
    started.check("run", "ndctl create-namespace -f -e namespace0.0 -m fsdax --map=mem", timeout=300)
    started.check("run", "mkdir -p /mnt && mkfs.ext4 -q -b 4096 /dev/pmem0 && mount -t ext4 -o dax /dev/pmem0 /mnt")
    yield started
    driver_host.check(f"{operator.VIRSH} destroy {NAME}")
    operator.remove(driver_host, NAME)
    driver_host.check(f"losetup -d {loop}; rm {FILE} {DISK} /tmp/direct-*")


def direct_io(guest: Guest, disk: str, length: int) -> tuple[str, str]:
    """Return what reading and writing a disk did."""
    read, write = guest.check("run", f"directio /mnt/buffer {disk} {length}", timeout=HANG_SECONDS).split("\n")
    return read.removeprefix("read: "), write.removeprefix("write: ")


def wait_for_disks(guest: Guest, *disks: str) -> None:
    """Return when the guest has these disks."""
    for disk in disks:
        guest.check("run", f"until [ -b /dev/{disk} ]; do sleep 0.2; done", timeout=HANG_SECONDS)


@pytest.mark.thorough
def test_xen_disks_work(guest: Guest) -> None:
    for disk in ("xvde", "xvdf"):
        for length in (PAGE, LARGER):
            assert direct_io(guest, disk, length) == WORKS, (disk, length)


@pytest.mark.thorough
def test_a_xen_disk_that_is_attached_later_works_or_fails(driver_host: XenHost, guest: Guest) -> None:
    """QEMU has no persistent grants. Without them, and without a copy through RAM, Xen refuses the grant."""
    driver_host.check(
        f"{operator.VIRSH} attach-disk {NAME} /tmp/direct-later xvdg --driver qemu --subdriver raw --live"
    )
    wait_for_disks(guest, "xvdg")
    assert direct_io(guest, "xvdg", PAGE) == FAILS


def disk_of(guest: Guest, driver: str) -> str:
    """Return the name of the only disk of a driver of libata."""
    return guest.check("run", f"ls /sys/bus/pci/drivers/{driver}/*/ata*/host*/target*/*/block")


@pytest.mark.thorough
def test_ide_fails_and_ahci_loses_bytes_unless_linux_copies(guest: Guest) -> None:
    """IDE has 32-bit addresses, and the NVDIMM is above 4 GiB."""
    copies = "swiotlb=force" in guest.report().cmdline
    for length in (PAGE, LARGER):
        assert direct_io(guest, disk_of(guest, "ata_piix"), length) == (WORKS if copies else FAILS)
        assert direct_io(guest, disk_of(guest, "ahci"), length) == (WORKS if copies else wrong(length))


@pytest.mark.thorough
def test_emulated_disks_lose_bytes_unless_linux_copies(driver_host: XenHost, guest: Guest) -> None:
    """If a later QEMU or Xen does better, the guide's table and the advice of plan have to change."""
    for number, device in enumerate(("virtio-blk-pci", "nvme,serial=direct")):
        name = device.split("-")[0].split(",")[0]
        for command in (
            f"drive_add 0 file=/tmp/direct-{name},if=none,id=d{number},format=raw",
            f"device_add {device},drive=d{number}",
        ):
            driver_host.check(f"xl qemu-monitor-command {NAME} '{command}'")
    guest.check("run", "echo 1 >/sys/bus/pci/rescan")
    wait_for_disks(guest, "vdb", "nvme0n1")
    copies = "swiotlb=force" in guest.report().cmdline
    assert direct_io(guest, "nvme0n1", LARGER) == (WORKS if copies else wrong(LARGER))
    assert direct_io(guest, "vdb", PAGE) == (WORKS if copies else wrong(PAGE))
    assert direct_io(guest, "vdb", LARGER) == (WORKS if copies else HANGS)
