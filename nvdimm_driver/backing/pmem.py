# SPDX-License-Identifier: Apache-2.0
"""Raw pmem block devices: /dev/pmemN of namespaces in raw mode, and partitions of them."""

from __future__ import annotations

import os
import stat

from nvdimm_driver.backing import inventory
from nvdimm_driver.backing.byteranges import DirectBytes
from nvdimm_driver.backing.device import DeviceBacking
from nvdimm_driver.backing.identity import check_identity
from nvdimm_driver.backing.inventory import Volume
from nvdimm_driver.backing.paths import open_resolved
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import BackingIdentity, Extent, NvdimmSpec
from nvdimm_driver.plugins import ByteRange

_WHY = {
    "fsdax": "the kernel keeps an info block, 4 KiB behind its start, and page structures in it",
    "sector": "the kernel moves its sectors about in it (btt)",
}


class PmemBacking(DeviceBacking):
    """An NVDIMM in a raw pmem block device.

    Only sysfs shows its address: without page structures there is no mapping to check it against.
    """

    name = "pmem"
    mode = "raw"

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
                hint=f"if a guest has had it raw: {inventory.raw_again(namespace.name)}; "
                f"else, this deletes all that is on it: ndctl create-namespace -f -e {namespace.name} -m raw"
                + ("; or name a file on a file system on it" if namespace.mode == "fsdax" else ""),
            )
        return volume

    def check(self, path: str, fd: int, volume: Volume, extent: Extent) -> None:
        """Accept every open device: O_EXCL has shown that nothing in the host but a holder uses it."""

    def open_range(self, path: str, size: int, *, write: bool) -> ByteRange:
        # not O_EXCL: the next check, with O_EXCL, would find the device in use
        fd = open_resolved(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_DIRECT)
        return DirectBytes(fd, 0, size)

    def check_labels(self, spec: NvdimmSpec) -> None:
        """Accept every device: writes with O_DIRECT are durable."""

    def open_labels(self, spec: NvdimmSpec, identity: BackingIdentity) -> ByteRange:
        path = spec.path
        check_identity(path, self.locate(spec).identity, identity)
        try:
            fd = open_resolved(path, os.O_RDWR | os.O_DIRECT)
        except OSError as error:
            raise BackingError(f"{path}: cannot be opened to write labels: {error.strerror}") from error
        return DirectBytes(fd, spec.size - spec.label_size, spec.label_size)
