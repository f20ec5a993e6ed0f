# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from nvdimm_driver.xml import direct_io
from nvdimm_driver.xml.parse_domain import extract
from tests.unit.test_xml import NVDIMM, domain


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["-device", "virtio-blk-pci,drive=a,bootindex=1"], ["virtio-blk-pci"]),
        (["-device", "nvme,serial=1", "-device", "ahci,id=ahci0"], ["nvme", "ahci"]),
        (["-device", "driver=pvscsi,id=a"], ["pvscsi"]),
        (["-device", "lsi"], ["lsi"]),
        (["-drive", "file=/a,if=virtio"], ["virtio-blk"]),
        (["-drive", "if=scsi,file=/a"], ["lsi53c895a"]),
        (["-drive", "file=/a,if=none,id=a", "-device", "ide-hd,drive=a"], []),
        (["-drive", "if=ide,file=/a"], ["piix3-ide"]),
        (["-device", "lsi53c810"], ["lsi53c810"]),
        (["-device", "id=a,driver=nvme,serial=1"], ["nvme"]),
        (["--device", '{"driver":"nvme","drive":"a"}'], ["nvme"]),
        (["-device", '{"driver":'], []),
        (["-device", '["nvme"]'], []),
        (["-device", '{"driver":' * 100_000], []),
        (["-hda", "/a", "-hdd", "/b"], ["piix3-ide", "piix3-ide"]),
        (["-drive", "file=/a,format=raw"], ["piix3-ide"]),
        (["-device", "am53c974,id=a", "-device", "dc390"], ["am53c974", "dc390"]),
        (["-name", "nvme"], []),
        (["-device"], []),
    ],
)
def test_devices_that_do_not_reach_the_nvdimms(arguments: list[str], names: list[str]) -> None:
    assert [*direct_io.devices(arguments)] == names


def test_the_advice_names_the_devices_once_and_what_to_do() -> None:
    assert [*direct_io.advice([])] == []
    (line,) = direct_io.advice(["nvme", "virtio-blk-pci", "nvme"])
    assert "QEMU emulates nvme, virtio-blk-pci and" in line
    assert "bus='xen'" in line
    assert "swiotlb=force" in line


def test_the_advice_tells_lost_bytes_from_errors() -> None:
    lost, failed = direct_io.advice(["piix3-ide", "ahci", "lsi53c810"])
    assert "QEMU emulates ahci and" in lost
    assert "loses bytes without an error" in lost
    assert "QEMU emulates piix3-ide, lsi53c810 with 32-bit addresses and" in failed
    assert "fails with EIO" in failed
    assert [*direct_io.advice(["piix3-ide"])] == [failed.replace(", lsi53c810", "")]


@pytest.mark.parametrize(
    ("target", "device", "names"),
    [("hda", "disk", ("piix3-ide",)), ("hdc", "cdrom", ()), ("sda", "cdrom", ("lsi53c895a",)), ("xvda", "disk", ())],
)
def test_disks_that_do_not_reach_the_nvdimms(target: str, device: str, names: tuple[str, ...]) -> None:
    found = extract(domain(f"{NVDIMM}<disk type='file' device='{device}'><target dev='{target}'/></disk>"))
    assert found is not None
    assert found.emulated == names
