# SPDX-License-Identifier: Apache-2.0
"""The users of block devices in the kernel that are no process, and open them like one that only looks: not O_EXCL.

See drivers/block/loop.c and xen-blkback/xenbus.c, and drivers/nvme/target and drivers/target, of Linux 6.1. Mounts,
swap, device-mapper and md open them with O_EXCL. Not seen are exports by rnbd and by USB, and the heartbeat of ocfs2.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from nvdimm_driver.backing.sysfs import text
from nvdimm_driver.errors import InUseError
from nvdimm_driver.shell import command

SYSFS = Path("/sys")

# include/uapi/linux/loop.h; the flags are the last of these
_LOOP_GET_STATUS64 = 0x4C05
_READ_ONLY = 1
_LOOP_INFO = struct.Struct("=QQQQQIIII168x")

_EXPORTS = {"nvmet/subsystems/*/namespaces/*/device_path": "(.*)", "target/core/fileio_*/*/info": " File: (.*)  Size: "}
"""Attributes that name the device of an export, and where in its text."""


def find(*fds: int) -> dict[str, str]:
    """Return what may write one of these block devices, and how to end it, both for people."""
    numbers = {os.fstat(fd).st_rdev for fd in fds}
    paths = {os.readlink(f"/proc/self/fd/{fd}") for fd in fds}
    return dict([*_loops(numbers, paths), *_disks(numbers), *_exports(numbers)])


def refusal(path: str, found: Mapping[str, str]) -> InUseError:
    """Return the error for a block device, with what :func:`find` has found."""
    return InUseError(
        f"{path}: {' and '.join(found)} may write it, over what the guest stores", hint="; ".join(found.values())
    )


def _loops(numbers: Collection[int], paths: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the loop devices; one of a file is not asked, as the file's server may not answer."""
    for each in sorted(SYSFS.glob("block/loop*/loop/backing_file")):
        loop, path = f"/dev/{each.parent.parent.name}", text(each)
        if (path.startswith("/dev/") or path in paths) and _writes(loop, numbers):
            yield loop, f"unmount what is on it, then: {command('losetup', '--detach', loop)}"


def _writes(loop: str, numbers: Collection[int]) -> bool:
    """Return True for a loop device that writes one of these devices, and for one that cannot be asked."""
    try:
        fd = os.open(loop, os.O_RDONLY)
        try:
            _, _, number, *_, flags = _LOOP_INFO.unpack(fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO.size)))
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno != errno.ENXIO  # it was detached
    return number in numbers and not flags & _READ_ONLY


def _disks(numbers: Collection[int]) -> Iterator[tuple[str, str]]:
    """Yield the guests that have one as a disk."""
    for each in sorted(SYSFS.glob("bus/xen-backend/devices/vbd-*")):
        major, _, minor = text(each / "physical_device").partition(":")
        if minor and os.makedev(int(major, 16), int(minor, 16)) in numbers and "w" in text(each / "mode"):
            guest = f"the guest with domid {each.name.split('-')[1]}, which has it as a disk,"
            yield guest, "detach that disk, or shut that guest down"


def _exports(numbers: Collection[int]) -> Iterator[tuple[str, str]]:
    """Yield what is exported to other hosts by NVMe, SCSI or iSCSI."""
    for pattern, path in _EXPORTS.items():
        for each in sorted((SYSFS / "kernel/config").glob(pattern)):
            found = re.search(path, text(each))
            if found and found[1].startswith("/dev/") and text(each.parent / "enable") != "0":
                with suppress(OSError):  # it is gone
                    if os.stat(found[1]).st_rdev in numbers:
                        yield f"the export {each.parent}", "end that export (nvmetcli, targetcli)"
