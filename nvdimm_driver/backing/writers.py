# SPDX-License-Identifier: Apache-2.0
"""The processes that have a file open, or mapped, so that they may write it: for people, who have to end them."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from nvdimm_driver.errors import InUseError
from nvdimm_driver.lock_files import describe

_PROC = Path("/proc")


def find(*fds: int) -> set[int]:
    """Return the ids of the processes that may write one of these files or block devices, as far as /proc tells."""
    files = [os.fstat(fd) for fd in fds]
    return {int(process.name) for process in _PROC.glob("[0-9]*") if _may_write(process, files)}


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


def _may_write(process: Path, files: Sequence[os.stat_result]) -> bool:
    with suppress(OSError, ValueError):  # it has ended
        return any(_writes(process, each.name, files) for each in (process / "fd").iterdir()) or any(
            _is_one_of(each, files) for each in _shared_mappings(process, files)
        )
    return False


def _writes(process: Path, number: str, files: Sequence[os.stat_result]) -> bool:
    """Return True for a descriptor of one of these files with which a process can write."""
    descriptor = process / "fd" / number
    with suppress(OSError, ValueError):  # it is closed
        lines = (process / "fdinfo" / number).read_text(encoding="ascii").splitlines()
        found = {name: value for name, _, value in (line.partition(":") for line in lines)}
        if int(found["flags"], 8) & os.O_ACCMODE == os.O_RDONLY:
            return False
        return _can_be(found.get("ino"), os.readlink(descriptor), files) and _is_one_of(descriptor, files)
    return False


def _shared_mappings(process: Path, files: Sequence[os.stat_result]) -> Iterator[Path]:
    """Yield what a process has mapped, writable and shared, and what can be one of these (proc(5): maps, map_files).

    Of a block device, each mapping counts: the kernel keeps its pages, and writes them whole once dom0 changes a part.
    """
    for line in (process / "maps").read_bytes().splitlines():
        addresses, mode, _, _, inode, *name = line.split(None, 5)
        writes = (mode.startswith(b"rw") and mode.endswith(b"s")) or any(stat.S_ISBLK(each.st_mode) for each in files)
        if writes and _can_be(inode, os.fsdecode(b"".join(name)), files):
            start, end = (int(each, 16) for each in addresses.split(b"-"))
            file = process / "map_files" / f"{start:x}-{end:x}"
            if os.path.lexists(file):
                yield file


def _can_be(inode: str | bytes | None, path: str, files: Sequence[os.stat_result]) -> bool:
    """Return True when what a process has open can be one of these files, as far as is known without asking for it.

    Who asks for a file of a server that does not answer, waits for ever. A block device may have several nodes: another
    one counts if it is in /dev.

    :param inode: as /proc has it; None on a kernel before 5.14, which does not tell.
    """
    number = None if inode is None else int(inode)
    return any(number in (None, each.st_ino) or (stat.S_ISBLK(each.st_mode) and path[:5] == "/dev/") for each in files)


def _is_one_of(path: Path, files: Sequence[os.stat_result]) -> bool:
    """Return True for one of these files or block devices; a block device may have several nodes."""
    found = os.stat(path)
    return any(
        os.path.samestat(found, each)
        or (stat.S_ISBLK(found.st_mode) and stat.S_ISBLK(each.st_mode) and found.st_rdev == each.st_rdev)
        for each in files
    )
