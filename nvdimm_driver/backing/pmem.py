"""Raw pmem block devices: /dev/pmemN of namespaces in raw mode, and partitions of them."""

from __future__ import annotations

import stat

from nvdimm_driver.backing import inventory
from nvdimm_driver.backing.device import DeviceBacking
from nvdimm_driver.backing.inventory import Volume
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import Extent

_WHY = {
    "fsdax": "the kernel keeps an info block, 4 KiB behind its start, and page structures in it",
    "sector": "the kernel moves its sectors about in it (btt)",
}


class PmemBacking(DeviceBacking):
    """Keeps an NVDIMM in a raw pmem block device.

    Its address is known from sysfs alone: without page structures there is no mapping to look it up in.
    """

    name = "pmem"

    def describe(self) -> str:
        return "a pmem block device, /dev/pmemN of a namespace in raw mode, or a partition of it"

    def is_kind(self, mode: int) -> bool:
        return stat.S_ISBLK(mode)

    def volume(self, path: str, number: int) -> Volume:
        volume = inventory.volume_of(number, path, self.sysfs)
        namespace = volume.namespace
        if namespace.mode != "raw":
            raise BackingError(
                f"{path}: namespace {namespace.name} is in {namespace.mode} mode, a block device has to be raw: "
                + _WHY[namespace.mode],
                hint=f"this deletes all that is on it: ndctl create-namespace -f -e {namespace.name} -m raw"
                + ("; or name a file on a file system on it" if namespace.mode == "fsdax" else ""),
            )
        return volume

    def check(self, path: str, fd: int, volume: Volume, extent: Extent) -> None:
        """Nothing more than that it was opened: O_EXCL has shown that nobody uses it."""
