# SPDX-License-Identifier: Apache-2.0
"""The processes that have a file open, or mapped, so that they may write it: for people, who have to end them."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from nvdimm_driver.errors import InUseError
from nvdimm_driver.lock_files import describe

_PROC = Path("/proc")


def find(fd: int) -> set[int]:
    """Return the ids of the processes that may write an open file or block device, as far as /proc tells it."""
    return {int(process.name) for process in _PROC.glob("[0-9]*") if _may_write(process, os.fstat(fd))}


def refusal(path: str, found: Collection[int]) -> InUseError:
    """Return the error for a backing at a path that a program may write, with what :func:`find` has found."""
    return InUseError(
        f"{path}: {_named(found)} may write it, by what it has opened or mapped before, and so change or truncate it "
        "under the guest",
        hint="end that program, or have it close the file",
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


def _may_write(process: Path, file: os.stat_result) -> bool:
    with suppress(OSError, ValueError):  # it has ended
        return any(_writes(process, each.name, file) for each in (process / "fd").iterdir()) or any(
            _is_same(os.stat(each), file) for each in _shared_mappings(process)
        )
    return False


def _writes(process: Path, number: str, file: os.stat_result) -> bool:
    """Return True for a descriptor of the file with which a process can write."""
    with suppress(OSError, ValueError):  # it is closed
        if _is_same(os.stat(process / "fd" / number), file):
            lines = (process / "fdinfo" / number).read_text(encoding="ascii").splitlines()
            flags = next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))
            return flags & os.O_ACCMODE != os.O_RDONLY
    return False


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    """Return True for one file, or for one block device, which may have several nodes."""
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)


def _shared_mappings(process: Path) -> Iterator[Path]:
    """Yield the files that a process has mapped, writable and shared (proc(5): maps, map_files)."""
    for line in (process / "maps").read_bytes().splitlines():
        addresses, mode = line.split(b" ", 2)[:2]
        if mode.startswith(b"rw") and mode.endswith(b"s"):
            start, end = (int(each, 16) for each in addresses.split(b"-"))
            file = process / "map_files" / f"{start:x}-{end:x}"
            if file.exists():
                yield file
