# SPDX-License-Identifier: Apache-2.0
"""Other guests: one with many NVDIMMs, one with another kernel, one that ignores its NVDIMMs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import tried
from tests.lab import operator
from tests.lab.guest import Guest, Report, install_guest
from tests.lab.host import XenHost
from tests.lab.image import make_guest_disk
from tests.lab.release import GUESTS

pytestmark = [pytest.mark.lab, pytest.mark.thorough]
MIB = 1 << 20
LABEL_KIB = 128
NAME, DISK = "kind", "/tmp/kind.img"


@contextmanager
def reports(host: XenHost, dsm: str, disk: str, labels: Sequence[int]) -> Iterator[Report]:
    """Start a guest with NVDIMMs of 16 MiB whose label areas have these sizes in KiB; yield its report."""
    files = [f"/mnt/pmem0/kind-{slot}.img" for slot in range(len(labels))]
    nvdimms = [operator.nvdimm(file, 16, label_kib=label) for file, label in zip(files, labels, strict=True)]
    host.write(f"/root/{NAME}.xml", operator.domain_xml(NAME, nvdimms, ram_mib=192, disk=disk, dsm=dsm).encode())
    host.check(f"{operator.VIRSH} define /root/{NAME}.xml")
    guest = Guest(host, NAME)
    try:
        host.check(f"{operator.VIRSH} start {NAME}")
        yield guest.wait_report()
    finally:
        if guest.exists():
            host.check(f"{operator.VIRSH} destroy {NAME}")
        operator.remove(host, NAME)
        host.check(f"rm {' '.join(files)}")


@pytest.mark.parametrize("dsm", ["aml", "qemu"])
def test_sixteen_nvdimms_with_labels(driver_host: XenHost, dsm: str) -> None:
    with reports(driver_host, dsm, install_guest(driver_host), [LABEL_KIB] * 16) as report:
        assert sorted(dimm.handle for dimm in report.dimms) == list(range(1, 17))
        assert [dimm.available_slots for dimm in report.dimms] == [report.dimms[0].available_slots] * 16
        assert report.dimms[0].available_slots
        assert [region.size for region in report.regions] == [16 * MIB - LABEL_KIB * 1024] * 16
        assert report.problems == ()


@pytest.mark.parametrize("dsm", ["aml", "qemu"])
@pytest.mark.parametrize("kernel", GUESTS)
def test_the_kernels_of_all_releases(
    driver_host: XenHost, kernel: str, dsm: str, record_property: tried.Record
) -> None:
    driver_host.put(driver_host.images.guest_disk_of(kernel), DISK)
    with reports(driver_host, dsm, DISK, [LABEL_KIB, 0]) as report:
        version = Guest(driver_host, NAME).check("run", "uname -r").strip()
        tried.record(record_property, lambda command: driver_host.check(command).stdout, (), guests=version)
        assert sorted(region.size for region in report.regions) == [16 * MIB - LABEL_KIB * 1024, 16 * MIB]
        assert sorted((dimm.handle, bool(dimm.available_slots)) for dimm in report.dimms) == [(1, True), (2, False)]
        assert report.problems == ()


def test_a_guest_that_does_not_look_at_its_nfit(driver_host: XenHost, tmp_path: Path) -> None:
    """Its label server gets no requests."""
    make_guest_disk(driver_host.images, tmp_path / "disk", "module_blacklist=nfit")
    driver_host.put(tmp_path / "disk", DISK)
    with reports(driver_host, "qemu", DISK, [LABEL_KIB]) as report:
        assert "module_blacklist=nfit" in report.cmdline
        assert (report.regions, report.dimms, report.disks) == ((), (), ())
        assert report.problems == ()
