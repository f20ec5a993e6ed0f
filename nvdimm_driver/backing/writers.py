# SPDX-License-Identifier: Apache-2.0
"""The processes that have a file open, or mapped, so that they may write it: for people, who have to end them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Sequence
from contextlib import suppress

from nvdimm_driver.errors import InUseError
from nvdimm_driver.lock_files import describe

_FDINFO = re.compile(rb"flags:\t(\d+)\nmnt_id:\t\d+\n(?:ino:\t(\d+)\n)?")  # fs/proc/fd.c:seq_show


def find(*fds: int) -> set[int]:
    """Return the ids of the processes that may write one of these files or block devices, as far as /proc tells."""
    files = [os.fstat(fd) for fd in fds]
    mapping = _mapping(files)
    return {int(each) for each in os.listdir("/proc") if each.isdigit() and _may_write(f"/proc/{each}", files, mapping)}


def refusal(path: str, found: Collection[int]) -> InUseError:
    """Return the error for a backing at a path that a program may write, with what :func:`find` has found."""
    return InUseError(
        f"{path}: {_named(found)} may write it, by what it has opened or mapped before, and so change or truncate it "
        "under the guest",
        hint="end that program, or have it close the file",
    )


def refusal_of_device(path: str, found: Collection[int]) -> InUseError:
    """Return the error for a block device that a program may write or has mapped."""
    return InUseError(
        f"{path}: {_named(found)} may write it, or has it mapped: what the page cache of dom0 has could come over what "
        "the guest stores",
        hint="end that program, or have it close the device",
    )


def still_written(path: str, found: Collection[int]) -> InUseError:
    """Return the error for a file that is unwritten in parts, and that a program may be about to write."""
    return InUseError(
        f"{path}: parts of it are unwritten, and {_named(found)} has it open or mapped to write it: no zeros were "
        "written there",
        hint="wait until the file is complete, or end that program; then repeat this",
    )


def _named(found: Collection[int]) -> str:
    return " and ".join(describe(each) for each in sorted(found)) or "a program, which /proc does not show,"


def _may_write(process: str, files: Sequence[os.stat_result], mapping: re.Pattern[bytes]) -> bool:
    with suppress(OSError):  # it has ended
        return any(_writes(process, each, files) for each in os.listdir(f"{process}/fd")) or _has_mapped(
            process, files, mapping
        )
    return False


def _writes(process: str, number: str, files: Sequence[os.stat_result]) -> bool:
    """Return True for a descriptor of one of these files with which a process can write."""
    descriptor = f"{process}/fd/{number}"
    with suppress(OSError):  # it is closed
        path = os.readlink(descriptor)
        if path[0] != "/":  # a socket or the like: most of what QEMU has
            return False
        info = os.open(f"{process}/fdinfo/{number}", os.O_RDONLY)
        try:
            found = _FDINFO.search(os.read(info, 256))
        finally:
            os.close(info)
        if found is None or int(found[1], 8) & os.O_ACCMODE == os.O_RDONLY:
            return False
        return _can_be(found[2], path, files) and _is_one_of(descriptor, files)
    return False


def _can_be(inode: bytes | None, path: str, files: Sequence[os.stat_result]) -> bool:
    """Return True when what a process has open can be one of these files, as far as is known without asking for it.

    Who asks for a file of a server that does not answer, waits for ever. A block device may have several nodes: another
    one counts if it is in /dev.

    :param inode: as /proc has it; None on a kernel before 5.14, which does not tell.
    """
    number = None if inode is None else int(inode)
    return any(number in (None, each.st_ino) or (stat.S_ISBLK(each.st_mode) and path[:5] == "/dev/") for each in files)


def _mapping(files: Sequence[os.stat_result]) -> re.Pattern[bytes]:
    """Return the pattern of a line of maps, with addresses and file, of what :func:`_can_be` would say True (proc(5)).

    Of files, only what is writable and shared counts. Of a block device, each mapping does: the kernel keeps its pages,
    and writes them whole once dom0 changes a part.
    """
    mode, file = "rw.s", "|".join(f"{each.st_ino} .*" for each in files)
    if any(stat.S_ISBLK(each.st_mode) for each in files):
        mode, file = "....", rf"{file}|\d+ +/dev/.*"
    return re.compile(rf"^(\w+)-(\w+) {mode} \w+ (\S+ (?:{file}))$".encode(), re.MULTILINE)


def _has_mapped(process: str, files: Sequence[os.stat_result], mapping: re.Pattern[bytes]) -> bool:
    with open(f"{process}/maps", "rb", buffering=0) as maps:
        text = maps.read()
    if not any(each in text for each in (b"/dev/", *(b" %d " % each.st_ino for each in files))):
        return False
    others = set()
    for start, end, name in (line.groups() for line in mapping.finditer(text)):
        file = f"{process}/map_files/{int(start, 16):x}-{int(end, 16):x}"
        with suppress(OSError):  # it is unmapped
            if name not in others and _is_one_of(file, files):
                return True
            others.add(name)
    return False


def _is_one_of(path: str, files: Sequence[os.stat_result]) -> bool:
    """Return True for one of these files or block devices; a block device may have several nodes."""
    found = os.stat(path)
    return any(
        os.path.samestat(found, each)
        or (stat.S_ISBLK(found.st_mode) and stat.S_ISBLK(each.st_mode) and found.st_rdev == each.st_rdev)
        for each in files
    )
