# SPDX-License-Identifier: Apache-2.0
"""Guests whose NVDIMMs are cached, on a Xen with the change of contrib/xen-write-back, and uncached ones on stock Xen.

The nested page tables are read from outside. The changed Xen is Debian 12's: of Debian 13's, no source was to be had.
"""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import xen_write_back
from tests.lab import image, npt, operator, served
from tests.lab.guest import Guest, install_guest, xl_config
from tests.lab.host import XenHost
from tests.lab.release import RELEASES

pytestmark = [pytest.mark.lab, pytest.mark.thorough]
NAME, FILE, DEVICE = "cached", "/mnt/pmem0/cached.img", "/dev/pmem1"
FILE_MIB, DEVICE_MIB, LABEL_KIB, ALIGN_MIB = 34, 32, 128, 16
MIB, PAGE = 1 << 20, 4096
BASE_GIB = 5
"""Of the first NVDIMM; a save goes through all frames up to the guest's last one."""
SAVE = f"/tmp/{NAME}.save"
RAM = (0x100, 0x4000)
"""Guest frames (first, count) of its RAM, above the first MiB, which has other types."""
STARTED = """\
import json, sqlite3
ledger = sqlite3.connect("file:/var/lib/nvdimm-driver/ledger.sqlite?mode=ro", uri=True)
print(json.dumps([ledger.execute(f"SELECT {columns}").fetchall() for columns in (
    "gfn, mfn, count FROM mapping ORDER BY gfn", "gfn, count FROM uncached")]))
"""
REMAP = """\
import sys
from nvdimm_driver.xen.libxenctrl import Xen
domid, gfn, mfn, add = map(int, sys.argv[1:])
with Xen() as xen:
    xen.memory_mapping(domid, gfn, mfn, 1, bool(add))
"""
PIN_DEVICE = """\
import glob, sys
from nvdimm_driver.xen.libxenctrl import WRITE_BACK, Xen
domid, gfn = map(int, sys.argv[1:])
bars = [
    (int(first, 16), int(last, 16))
    for path in glob.glob("/sys/bus/pci/devices/*/resource")
    for first, last, flags in map(str.split, open(path))
    if int(flags, 16) & 0x200 and int(last, 16) - int(first, 16) >= 4095
]
mfn = bars[0][0] >> 12
with Xen() as xen:
    assert xen.pin_memory_cacheattr(domid, gfn, 1, WRITE_BACK)
    xen.iomem_permission(domid, mfn, 1, True)
    xen.memory_mapping(domid, gfn, mfn, 1, True)
print(hex(mfn))
"""


def nvdimms() -> list[str]:
    """Return a file with a label area, which the guest itself writes, and a device without."""
    labelled = operator.nvdimm(FILE, FILE_MIB, label_kib=LABEL_KIB)
    labelled = labelled.replace("</source>", f"<alignsize unit='MiB'>{ALIGN_MIB}</alignsize></source>")
    both = (labelled, operator.nvdimm(DEVICE, DEVICE_MIB))
    return [
        each.replace("</target>", f"</target><address type='dimm' slot='{slot}' base='{(BASE_GIB + slot) << 30:#x}'/>")
        for slot, each in enumerate(both)
    ]


def define(host: XenHost, cache: str | None = None) -> None:
    """Define the domain; with `cache`, it overrides the host's option."""
    host.write(f"/root/{NAME}.xml", operator.domain_xml(NAME, nvdimms(), dsm="aml", cache=cache).encode())
    host.check(f"{operator.VIRSH} define /root/{NAME}.xml")


def python(host: XenHost, script: str, *arguments: int) -> str:
    """Run a script in dom0 with the driver; return its output."""
    host.write("/root/script.py", script.encode())
    return host.check(f"/usr/bin/python3 /root/script.py {' '.join(map(str, arguments))}").stdout


def domid(host: XenHost) -> int:
    """Return the domid of the guest."""
    return int(host.check(f"xl domid {NAME}").stdout)


def check_leaves(host: XenHost, *, cached: bool) -> None:
    """Check each entry of the guest's NVDIMMs: where it leads, and that it is cached, but for label areas; and RAM."""
    mappings, holes = json.loads(python(host, STARTED))
    labels = {gfn + n for gfn, count in holes for n in range(count)}
    assert len(labels) == LABEL_KIB * 1024 // PAGE
    number, sizes = domid(host), set()
    for gfn, mfn, count in mappings:
        found = npt.of_guest(host, number, gfn, count)
        assert sum(leaf.count for leaf in found) == count
        for leaf in found:
            sizes.add((leaf.count, leaf.gfn in labels))
            assert leaf.mfn - leaf.gfn == mfn - gfn
            assert leaf.is_cached == (cached and leaf.gfn not in labels), f"{leaf}"
    assert sizes == {(512, False), (1, True)}
    ram = npt.of_guest(host, number, *RAM)
    assert ram
    assert all(leaf.is_cached for leaf in ram)


@pytest.fixture(scope="module")
def changed_xen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the hypervisor with the change, out of its package."""
    package = xen_write_back.load("build").build("bookworm", 2)
    folder = tmp_path_factory.mktemp("xen")
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    (found,) = folder.glob("boot/xen-*-nvdimm.gz")
    unpacked = folder / "xen"
    unpacked.write_bytes(gzip.decompress(found.read_bytes()))
    return unpacked


@pytest.fixture(scope="module")
def changed(changed_xen: Path, shared_hosts: list[XenHost]) -> Iterator[XenHost]:
    """Yield a host with the changed Xen and the driver."""
    for shared in shared_hosts:
        shared.stop()
    with XenHost(image.build(RELEASES["bookworm"]), xen=changed_xen, xen_args="mmio-relax") as host:
        operator.install_driver(host)
        operator.make_pmem(host)
        served.serve(host)
        yield host


@pytest.fixture(scope="module")
def guest(changed: XenHost) -> Guest:
    """Return a guest with two NVDIMMs that are cached."""
    install_guest(changed)
    define(changed)
    return operator.start(changed, NAME)


def test_the_host_can(changed: XenHost) -> None:
    assert "direct-mmio-wb" in changed.check("xl info xen_caps").stdout.split()
    assert "nvdimm" in changed.check("xl info xen_extra").stdout
    (found,) = (
        each
        for each in json.loads(changed.run(f"{operator.NVDIMMCTL} doctor -f json").stdout)
        if each["Check"] == "memory type"
    )
    assert found["Result"] == "PASS"


def test_data_is_cached_and_label_areas_are_not(changed: XenHost, guest: Guest) -> None:
    assert guest.wait_report().problems == ()
    assert operator.show(changed, NAME)["cache"] == "write-back"
    assert "cache=write-back" in changed.get(operator.LOG).decode()
    check_leaves(changed, cached=True)


def test_both_sides_read_what_the_other_wrote(changed: XenHost, guest: Guest) -> None:
    on_file, on_device = operator.disks(guest.wait_report())
    guest.write(on_file, 5 * MIB, 20 * MIB, 11)
    guest.write(on_device, 3 * MIB, 4 * MIB, 12)
    for disk, path in ((on_file, FILE), (on_device, DEVICE)):
        assert guest.sha256(disk, 0, 32 * MIB) == operator.host_sha256(changed, path, 0, 32 * MIB)


def test_an_entry_that_is_split_later(changed: XenHost, guest: Guest) -> None:
    guest.wait_report()
    number = domid(changed)
    mappings, _ = json.loads(python(changed, STARTED))
    gfn, mfn = next(
        (leaf.gfn, leaf.mfn)
        for gfn, _, count in mappings
        for leaf in npt.of_guest(changed, number, gfn, count)
        if leaf.count == 512
    )
    python(changed, REMAP, number, gfn + 7, mfn + 7, 0)
    rest = npt.of_guest(changed, number, gfn, 512)
    assert [(leaf.gfn, leaf.count) for leaf in rest] == [(gfn + n, 1) for n in range(512) if n != 7]
    assert all(leaf.is_cached for leaf in rest)
    python(changed, REMAP, number, gfn + 7, mfn + 7, 1)
    again = npt.of_guest(changed, number, gfn, 512)
    assert [leaf.mfn for leaf in again] == [mfn + n for n in range(512)]
    assert all(leaf.is_cached for leaf in again)


def test_a_device_that_is_pinned_stays_uncached(changed: XenHost) -> None:
    changed.write("/root/device.cfg", xl_config("device").encode())
    changed.check("xl create -p /root/device.cfg")
    try:
        number = int(changed.check("xl domid device").stdout)
        mfn = int(python(changed, PIN_DEVICE, number, 0x300000), 16)
        (leaf,) = npt.of_guest(changed, number, 0x300000, 1)
        assert (leaf.mfn, leaf.count) == (mfn, 1)
        assert not leaf.is_cached
    finally:
        changed.check("xl destroy device")


def test_after_a_reboot_of_the_guest(changed: XenHost, guest: Guest) -> None:
    guest.wait_report()
    before = operator.host_sha256(changed, DEVICE, 0, 32 * MIB)
    guest.reboot()
    _, on_device = operator.disks(guest.wait_report())
    check_leaves(changed, cached=True)
    assert guest.sha256(on_device, 0, 32 * MIB) == before


def test_after_a_save_and_a_restore(changed: XenHost, guest: Guest) -> None:
    _, on_device = operator.disks(guest.wait_report())
    guest.write(on_device, 3 * MIB, 8 * MIB, 13)
    seen = guest.sha256(on_device, 0, 32 * MIB)
    changed.check(f"{operator.VIRSH} save {NAME} {SAVE}")
    assert operator.host_sha256(changed, DEVICE, 0, 32 * MIB) == seen
    changed.check(f"{operator.VIRSH} restore {SAVE} && rm {SAVE}")
    check_leaves(changed, cached=True)
    assert operator.show(changed, NAME)["cache"] == "write-back"
    assert guest.sha256(on_device, 0, 32 * MIB) == seen
    guest.poweroff()


def test_a_domain_can_be_uncached(changed: XenHost, guest: Guest) -> None:
    assert not guest.exists()
    define(changed, "uncached")
    operator.start(changed, NAME).wait_report()
    assert operator.show(changed, NAME)["cache"] == "uncached"
    check_leaves(changed, cached=False)
    changed.check(f"{operator.VIRSH} destroy {NAME}")


@pytest.fixture
def stock(driver_host: XenHost) -> Iterator[XenHost]:
    """Yield the shared host, whose Xen is the distribution's, with the domain defined."""
    install_guest(driver_host)
    define(driver_host)
    yield driver_host
    driver_host.run(f"{operator.VIRSH} destroy {NAME}")
    operator.remove(driver_host, NAME)
    driver_host.check(f"rm {FILE}")


def test_on_stock_xen_all_is_uncached_and_nothing_else_is_refused(stock: XenHost) -> None:
    define(stock, "write-back")
    refused = stock.run(f"{operator.VIRSH} start {NAME}")
    assert refused.returncode != 0
    assert "this Xen maps NVDIMMs uncached" in refused.stderr
    assert operator.show(stock, NAME)["state"] == "off"
    define(stock)
    operator.start(stock, NAME).wait_report()
    assert operator.show(stock, NAME)["cache"] == "uncached"
    check_leaves(stock, cached=False)


def test_without_mmio_relax_the_changed_xen_gives_nothing_cached(
    changed_xen: Path, shared_hosts: list[XenHost]
) -> None:
    for shared in shared_hosts:
        shared.stop()
    with XenHost(image.build(RELEASES["bookworm"]), xen=changed_xen) as host:
        operator.install_driver(host)
        operator.make_pmem(host)
        install_guest(host)
        define(host, "write-back")
        refused = host.run(f"{operator.VIRSH} start {NAME}")
        assert refused.returncode != 0
        assert "mmio-relax is not on Xen's command line" in refused.stderr
        define(host)
        operator.start(host, NAME).wait_report()
        assert operator.show(host, NAME)["cache"] == "uncached"
        check_leaves(host, cached=False)
