# SPDX-License-Identifier: Apache-2.0
"""Device-dax: character devices /dev/daxX.Y of namespaces in devdax mode."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from nvdimm_driver.backing import extents, inventory
from nvdimm_driver.backing.byteranges import MappedBytes
from nvdimm_driver.backing.device import DeviceBacking
from nvdimm_driver.backing.inventory import Volume
from nvdimm_driver.backing.locks import Locks
from nvdimm_driver.backing.paths import open_resolved
from nvdimm_driver.errors import BackingError, UnsupportedError
from nvdimm_driver.model import SUPERPAGE, Extent, NvdimmSpec
from nvdimm_driver.plugins import ByteRange


class DevdaxBacking(DeviceBacking):
    """An NVDIMM in a device-dax device.

    :param cross_check: compares the extent of an open device with the page tables, given the device's alignment; raises
        BackingError. Not called for devices with an alignment of 1 GiB: pagemap does not show mappings of that size
        (mm/pagewalk.c: walk_pud_range).
    """

    name = "devdax"
    mode = "devdax"

    def __init__(
        self,
        *,
        sysfs: Path = inventory.SYSFS,
        locks: Locks | None = None,
        cross_check: Callable[[int, Sequence[Extent], int], None] = extents.cross_check,
    ) -> None:
        super().__init__(sysfs=sysfs, locks=locks)
        self.cross_check = cross_check

    def describe(self) -> str:
        return "a device-dax device, /dev/daxX.Y of a namespace in devdax mode"

    def is_kind(self, mode: int) -> bool:
        return stat.S_ISCHR(mode)

    def volume(self, path: str, number: int) -> Volume:
        name = (self.sysfs / f"dev/char/{os.major(number)}:{os.minor(number)}").resolve().name
        for namespace in inventory.namespaces(self.sysfs):
            if namespace.mode == "devdax" and namespace.device == name:
                return Volume(namespace, 0, namespace.data_size)
        raise BackingError(
            f"{path}: is not the device-dax device of a pmem namespace",
            hint="'ndctl list -N -m devdax' lists them; "
            "'daxctl reconfigure-device --mode=devdax' takes one back from system RAM",
        )

    def check(self, path: str, fd: int, volume: Volume, extent: Extent) -> None:
        alignment = inventory.dax_alignment(volume.namespace, self.sysfs)
        if alignment > SUPERPAGE:
            return
        try:
            self.cross_check(fd, (extent,), alignment)
        except BackingError as error:
            raise BackingError(f"{path}: {error.message}", hint=error.hint) from error

    def open_range(self, path: str, size: int, *, write: bool) -> ByteRange:
        """Map the device, which has neither read nor write."""
        persist = None
        if write:
            from nvdimm_driver.backing.pmdk import Pmdk

            persist = Pmdk().persist
        fd = open_resolved(path, os.O_RDWR if write else os.O_RDONLY)
        try:
            namespace = self.volume(path, os.fstat(fd).st_rdev).namespace
            step = inventory.dax_alignment(namespace, self.sysfs)
            return MappedBytes(fd, 0, size, write=write, step=step, persist=persist)
        finally:
            os.close(fd)

    def check_labels(self, spec: NvdimmSpec) -> None:
        raise no_label_server(spec.path)


def no_label_server(path: str) -> UnsupportedError:
    """Return the error for a device-dax device whose NVDIMM is to have a label server."""
    return UnsupportedError(
        f"{path}: a QEMU cannot serve the labels of a device-dax device (dsm = qemu): Linux gives programs no way to "
        "make its bytes durable (no fsync)",
        hint="take dsm 'aml', whose stores are durable at once, or a file or raw namespace",
    )
