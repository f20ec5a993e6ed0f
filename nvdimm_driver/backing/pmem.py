# SPDX-License-Identifier: Apache-2.0
"""Raw pmem block devices: /dev/pmemN of namespaces in raw mode, and partitions of them."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

from nvdimm_driver.backing import inventory, kernel_users, writers
from nvdimm_driver.backing.byteranges import DirectBytes
from nvdimm_driver.backing.device import DeviceBacking
from nvdimm_driver.backing.identity import check_identity
from nvdimm_driver.backing.inventory import Volume
from nvdimm_driver.backing.paths import open_resolved, opened, reporting
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import BackingIdentity, Extent, NvdimmSpec
from nvdimm_driver.plugins import ByteRange

LOG = logging.getLogger(__name__)

_BLKFLSBUF = 0x1261  # include/uapi/linux/fs.h
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

    def check_unwritten(
        self, path: str, identity: BackingIdentity | None = None, allowed: Collection[int] = ()
    ) -> None:
        """Check that nothing may write the device or has it mapped, and have the kernel write its page cache.

        It does so by itself when the last program closes the device, or some seconds later: over what a guest has
        stored since.
        """
        with self._nodes(path) as nodes:
            if others := writers.find(*nodes) - {*allowed}:
                raise writers.refusal_of_device(path, others)
            if users := kernel_users.find(*nodes):
                raise kernel_users.refusal(path, users)
            for fd in nodes:
                _empty_cache(fd, path)

    def thaw(self, path: str, identity: BackingIdentity | None = None) -> None:
        """Let programs of the host read what the guest has stored: the page cache may have what was there before."""
        if self.handles(path):
            try:
                with self._nodes(path) as nodes:
                    for fd in nodes:
                        _empty_cache(fd, path)
            except BackingError as error:  # it is another device now, or has errors: nothing was frozen
                LOG.warning("%s", error)

    @contextmanager
    def _nodes(self, path: str) -> Iterator[list[int]]:
        """Yield descriptors of a device, and of its disk or its partitions: of all that share bytes with it.

        Each has a page cache of its own (block/bdev.c).
        """
        with ExitStack() as stack, reporting(path):
            own = stack.enter_context(opened(path, os.O_RDONLY))
            volume = self.volume(path, os.fstat(own).st_rdev)
            disk = volume.namespace.device
            names = [f"{os.path.dirname(path)}/{each}" for each in (disk, *inventory.partitions(disk, self.sysfs))]
            nodes = [own]
            for each in filter(self.handles, names):
                fd = stack.enter_context(opened(each, os.O_RDONLY))
                if self._identity(self.volume(each, os.fstat(fd).st_rdev)).shares_bytes(self._identity(volume)):
                    nodes.append(fd)
            yield nodes

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


def _empty_cache(fd: int, path: str) -> None:
    """Write and forget what the kernel has of a block device in its page cache.

    :raises BackingError: when that fails.
    """
    try:
        os.fsync(fd)
        fcntl.ioctl(fd, _BLKFLSBUF)
    except OSError as error:
        raise BackingError(f"{path}: its page cache cannot be written: {error.strerror}") from error
