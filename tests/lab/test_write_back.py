# SPDX-License-Identifier: Apache-2.0
"""Guests whose NVDIMMs are cached, on a Xen with the change of contrib/xen-write-back.

It is Debian 12's: of Debian 13's, no source was to be had.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab import image, npt, operator, served
from tests.lab.cached_guest import DEVICE, FILE, NAME, STARTED, check_leaves, define, domid, python, unpack_changed_xen
from tests.lab.guest import Guest, xl_config
from tests.lab.host import XenHost
from tests.lab.release import RELEASES

pytestmark = [pytest.mark.lab, pytest.mark.thorough]
MIB = 1 << 20
SAVE = f"/tmp/{NAME}.save"
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


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory, shared_hosts: list[XenHost]) -> Iterator[XenHost]:
    """Yield a host with the changed Xen and the driver."""
    for shared in shared_hosts:
        shared.stop()
    xen = unpack_changed_xen(tmp_path_factory.mktemp("xen"))
    with XenHost(image.build(RELEASES["bookworm"]), xen=xen, xen_args="mmio-relax") as host:
        operator.install_driver(host)
        operator.make_pmem(host)
        served.serve(host)
        yield host


@pytest.fixture(scope="module")
def guest(changed: XenHost) -> Guest:
    """Return a guest with two NVDIMMs that are cached."""
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
    if guest.exists():
        changed.check(f"{operator.VIRSH} destroy {NAME}")
    define(changed, "uncached")
    operator.start(changed, NAME).wait_report()
    assert operator.show(changed, NAME)["cache"] == "uncached"
    check_leaves(changed, cached=False)
    changed.check(f"{operator.VIRSH} destroy {NAME}")
