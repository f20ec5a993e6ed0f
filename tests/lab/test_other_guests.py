"""Guests of other kinds: many NVDIMMs, another kernel, and one that knows nothing of NVDIMMs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab import operator
from tests.lab.guest import Guest, Report, install_guest
from tests.lab.host import XenHost
from tests.lab.image import make_guest_disk

pytestmark = pytest.mark.lab
MIB = 1 << 20
DISK = "/tmp/kind.img"


@contextmanager
def reports(host: XenHost, servers: Sequence[str], disk: str, count: int = 1) -> Iterator[list[Report]]:
    """What guests that start side by side, one for each label server, see of so many NVDIMMs of 16 MiB with labels."""
    guests: list[Guest] = []
    try:
        for dsm in servers:
            name = f"kind-{dsm}"
            nvdimms = [operator.nvdimm(f"/mnt/pmem0/{name}-{slot}.img", 18, label_kib=2048) for slot in range(count)]
            xml = operator.domain_xml(name, nvdimms, ram_mib=192, disk=disk, dsm=dsm)
            host.write(f"/root/{name}.xml", xml.encode())
            host.check(f"{operator.VIRSH} define /root/{name}.xml")
            guests.append(Guest(host, name))
        together(host, "virsh -q -c xen:///system start {}", guests)
        yield [guest.wait_report() for guest in guests]
    finally:
        together(host, "virsh -q -c xen:///system destroy {}", [guest for guest in guests if guest.exists()])
        for guest in guests:
            operator.remove(host, guest.name)
        host.check("rm -f /mnt/pmem0/kind-*.img")


def together(host: XenHost, command: str, guests: Sequence[Guest]) -> None:
    """Run a command for all guests at once; LabError when one fails."""
    started = " ".join(f"{command.format(guest.name)} & pids+=($!);" for guest in guests)
    host.check(f"pids=(); {started} failed=0; for pid in ${{pids[@]}}; do wait $pid || failed=1; done; exit $failed")


@pytest.mark.parametrize("dsm", ["aml", "qemu"])
def test_sixteen_nvdimms_with_labels(driver_host: XenHost, dsm: str) -> None:
    with reports(driver_host, [dsm], install_guest(driver_host), 16) as (report,):
        assert sorted(dimm.handle for dimm in report.dimms) == list(range(1, 17))
        assert [dimm.available_slots for dimm in report.dimms] == [report.dimms[0].available_slots] * 16
        assert report.dimms[0].available_slots
        assert [region.size for region in report.regions] == [16 * MIB] * 16
        assert report.problems == ()


def test_the_kernel_of_another_release(driver_host: XenHost) -> None:
    driver_host.put(driver_host.images.other_guest_disk, DISK)
    servers = ("none", "aml", "qemu")
    with reports(driver_host, servers, DISK) as seen:
        for dsm, report in zip(servers, seen, strict=True):
            assert [region.size for region in report.regions] == [16 * MIB]
            assert [bool(dimm.available_slots) for dimm in report.dimms] == [dsm != "none"]
            assert report.problems == ()


def test_guests_that_do_not_look_at_their_nfit(driver_host: XenHost, tmp_path: Path) -> None:
    make_guest_disk(driver_host.images, tmp_path / "disk", "module_blacklist=nfit")
    driver_host.put(tmp_path / "disk", DISK)
    with reports(driver_host, ("aml", "qemu"), DISK) as seen:
        for report in seen:
            assert "module_blacklist=nfit" in report.cmdline
            assert (report.regions, report.dimms, report.disks) == ((), (), ())
            assert report.problems == ()
