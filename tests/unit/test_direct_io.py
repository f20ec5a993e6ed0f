# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from nvdimm_driver.xml import direct_io


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
        (["-device", "lsi53c810"], []),
        (["-name", "nvme"], []),
        (["-device"], []),
    ],
)
def test_devices_that_transfer_to_any_address(arguments: list[str], names: list[str]) -> None:
    assert [*direct_io.devices(arguments)] == names


def test_the_advice_names_the_devices_once_and_what_to_do() -> None:
    assert [*direct_io.advice([])] == []
    (line,) = direct_io.advice(["nvme", "virtio-blk-pci", "nvme"])
    assert "QEMU emulates nvme, virtio-blk-pci and" in line
    assert "bus='xen'" in line
    assert "swiotlb=force" in line
