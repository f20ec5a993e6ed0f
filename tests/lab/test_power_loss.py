"""A host that loses power in the middle of a guest's life."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab import operator
from tests.lab.conftest import MakeHost
from tests.lab.guest import install_guest
from tests.lab.host import Nvdimm

pytestmark = pytest.mark.lab
MIB = 1 << 20
NVDIMMS = (("/mnt/pmem0/db1.img", 48), ("/dev/dax1.0", 32))


def test_a_guests_bytes_are_there_after_the_host_lost_power(fresh_host: MakeHost, tmp_path: Path) -> None:
    """The same pmem and dom0 disk, booted again; on XFS and device-dax, where other tests have ext4 and raw."""
    nvdimms = [Nvdimm(tmp_path / "pmem0.img"), Nvdimm(tmp_path / "pmem1.img", 256 * MIB)]
    host = fresh_host(nvdimms=nvdimms, keep_disk=True)
    host.start()
    operator.install_driver(host)
    operator.make_pmem(host, "xfs", "devdax")
    operator.define(host, "db1", [operator.nvdimm(*each) for each in NVDIMMS])
    guest = operator.start(host, "db1")
    before = operator.disks(host, "db1", guest.wait_report())
    for seed, disk in enumerate(before):
        guest.write(disk, seed * MIB, 8 * MIB, seed)
    seen = [guest.sha256(disk, 0, 16 * MIB) for disk in before]
    host.check("sync")
    host.power_cut()
    host.start()
    host.check("mount -o dax /dev/pmem0 /mnt/pmem0")
    assert operator.show(host, "db1")["state"] == "off"
    install_guest(host)
    again = operator.start(host, "db1")
    report = again.wait_report()
    assert report.problems == ()
    assert [again.sha256(disk, 0, 16 * MIB) for disk in operator.disks(host, "db1", report)] == seen
    assert [operator.host_sha256(host, path, 0, 16 * MIB) for path, _ in NVDIMMS] == seen
