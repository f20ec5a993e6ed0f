# SPDX-License-Identifier: Apache-2.0
"""The active pmem namespaces, as sysfs of libnvdimm and device-dax has them.

See drivers/nvdimm/namespace_devs.c, pfn_devs.c and pmem.c, and drivers/dax/bus.c, of Linux 6.1.

Imports nothing heavy: the device model, which has to start fast, uses it. All others use :mod:`.inventory`.
"""

from __future__ import annotations

import errno
import os
import time

from nvdimm_driver import host_text
from nvdimm_driver.errors import BackingError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SYSFS = "/sys"
_NULL_UUID = "00000000-0000-0000-0000-000000000000"


class ActiveNamespace:
    """A namespace with a driver.

    :ivar holder: folder of the device that has the driver.
    :ivar uid: as in :class:`.model.Namespace`, as the others.
    """

    __slots__ = ("data_size", "data_spa", "device", "holder", "mode", "name", "uid")

    def __init__(self, name: str, mode: str, device: str, holder: str, uid: str, data_spa: int, data_size: int) -> None:
        self.name = name
        self.mode = mode
        self.device = device
        self.holder = holder
        self.uid = uid
        self.data_spa = data_spa
        self.data_size = data_size


def active(sysfs: str = SYSFS) -> list[ActiveNamespace]:
    """Return the active pmem namespaces; not device-dax that the kernel uses as RAM (driver kmem).

    :raises BackingError: when sysfs cannot be read, as by a user other than root.
    """
    disks = [each for each in _entries(f"{sysfs}/class/block") if os.path.basename(each).startswith("pmem")]
    found = [_while_there(_of_disk, sysfs, each) for each in disks]
    found += [_while_there(_of_dax, sysfs, each) for each in _entries(f"{sysfs}/bus/dax/devices")]
    return [each for each in found if each is not None]


def _while_there(look: Callable[[str, str], ActiveNamespace | None], sysfs: str, device: str) -> ActiveNamespace | None:
    """Return what a look at a device finds; None if the device goes away meanwhile, which begins with its attributes.

    :raises BackingError: when it is there, or there again, and cannot be read.
    """
    deadline = time.monotonic() + 0.1
    while True:
        try:
            return look(sysfs, device)
        except BackingError as error:
            if not os.path.exists(device):
                return None
            if not _is_gone(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _entries(folder: str) -> Iterator[str]:
    """Yield what the links in a folder lead to, in the order of their names; nothing if there is no such folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in sorted(names):
        yield os.path.realpath(f"{folder}/{name}")


def _of_disk(sysfs: str, disk: str) -> ActiveNamespace | None:
    if os.path.exists(f"{disk}/partition"):
        return None
    holder = os.path.realpath(f"{disk}/device")
    name, device = os.path.basename(holder), os.path.basename(disk)
    if name.startswith("namespace"):
        # No info block. `memory` without a holder: a region whose page structures the kernel itself keeps
        # (memmap=size!start, pmem_should_map_pages). ndctl lists it as fsdax.
        mode = "fsdax" if text(f"{holder}/mode") == "memory" else "raw"
        return _active(sysfs, name, mode, device, holder, holder)
    is_btt, name = name.startswith("btt"), text(f"{holder}/namespace")
    if not name:
        return None
    if is_btt:
        return _active(sysfs, name, "sector", device, holder, f"{sysfs}/bus/nd/devices/{name}")
    return _active(sysfs, name, "fsdax", device, holder, holder)


def _of_dax(sysfs: str, dax: str) -> ActiveNamespace | None:
    # drivers/dax/pmem.c makes the device below the nd_dax device, whose name may differ: the device is named after the
    # namespace. A device of other memory (hmem, cxl) has no such parent.
    holder = os.path.dirname(dax)
    name = text(f"{holder}/namespace")
    if not name or os.path.basename(os.path.realpath(f"{dax}/driver")) != "device_dax":
        return None
    return _active(sysfs, name, "devdax", os.path.basename(dax), holder, dax)


def _active(sysfs: str, name: str, mode: str, device: str, holder: str, area: str) -> ActiveNamespace | None:
    spa, size = number(f"{area}/resource"), number(f"{area}/size")
    if spa is None or not size:
        return None
    uuids = [text(f"{sysfs}/bus/nd/devices/{name}/uuid"), text(f"{holder}/uuid")]
    uid = next((uuid for uuid in uuids if uuid not in ("", _NULL_UUID)), f"spa-{spa:#x}")
    return ActiveNamespace(name, mode, device, holder, uid, spa, size)


def number(attribute: str | Path) -> int | None:
    """Read a number, decimal or with 0x; return None for an idle device, for which the kernel returns ENXIO."""
    found = read(attribute)
    if found is None:
        return None
    try:
        return int(found, 0)
    except ValueError:
        raise BackingError(f"{attribute}: expected a number, found {found[:40]!r}") from None


def text(attribute: str | Path) -> str:
    """Read an attribute that not every device has; return an empty string without it."""
    try:
        return read(attribute) or ""
    except BackingError as error:
        if _is_gone(error):
            return ""
        raise


def _is_gone(error: BackingError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOENT, errno.ENODEV)


def read(attribute: str | Path) -> str | None:
    """Read an attribute; return None for an idle device.

    :raises BackingError: when it cannot be read.
    """
    try:
        return host_text.read(attribute).strip()
    except PermissionError as error:
        raise BackingError(f"{attribute}: {error.strerror}", hint="only root may see physical addresses") from error
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise BackingError(f"{attribute}: cannot be read: {error.strerror}") from error
