# SPDX-License-Identifier: Apache-2.0
"""Files that are backings or will be: how they are opened, checked and named."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from nvdimm_driver.backing import extents
from nvdimm_driver.backing.extents import FileExtent
from nvdimm_driver.errors import BackingError, InUseError
from nvdimm_driver.host_text import escaped
from nvdimm_driver.sizes import human

NAME_MAX = 255
"""Bytes in the name of a file (limits.h)."""
PATH_MAX = 4095
"""Bytes in a path."""
_AT_FDCWD = -100  # fcntl.h
_RENAME_NOREPLACE = 1  # linux/fs.h

HINTS = {
    errno.ENOENT: "is its file system mounted?",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.EPERM: "is it immutable (lsattr, chattr -i)?",
    errno.EACCES: "only root may use backings",
    errno.ENOSPC: "make room, or ask for less",
    errno.EROFS: "mount it read-write",
    errno.EAGAIN: "another program has a lease on it (fcntl F_SETLEASE), which the kernel ends within "
    "/proc/sys/fs/lease-break-time seconds: try again then",
    errno.EIO: "look at the kernel's log; 'nvdimmctl show' and 'pool show' list bad blocks",
}
"""Hints for errors of the system, by errno."""


class ExaminedFile(NamedTuple):
    """An existing file that is fit: its extents, and its unwritten runs (offset, length), to be filled with zeros."""

    found: tuple[FileExtent, ...]
    unwritten: tuple[tuple[int, int], ...]


def is_new(path: str) -> bool:
    """Return True when there is no such file, or an empty one.

    :raises BackingError: when there cannot be one.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise BackingError(f"{path}: {error.strerror}", hint=HINTS.get(error.errno or 0, "")) from error
    return stat.S_ISREG(status.st_mode) and status.st_size == 0 and status.st_nlink == 1


def look(fd: int, path: str, size: int) -> ExaminedFile:
    """Examine an open file for an NVDIMM of that size.

    :raises BackingError: when the file cannot be its backing.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BackingError(f"{path}: is not a regular file")
    if status.st_nlink != 1:
        raise BackingError(
            f"{path}: has {status.st_nlink} hard links, and must have one",
            hint=f"find the others: find -xdev -inum {status.st_ino}",
        )
    check_size(path, status.st_size, size)
    found = extents.fiemap(fd, size)
    extents.check_flags(path, found, allowed=extents.LAST | extents.MERGED | extents.UNWRITTEN)
    extents.check_holes(path, found, size)
    unwritten = tuple(
        (each.offset, min(each.end, size) - each.offset) for each in found if each.flags & extents.UNWRITTEN
    )
    return ExaminedFile(found, unwritten)


def check_size(path: str, size: int, needed: int) -> None:
    """Check that a file is large enough.

    :raises BackingError: when it is not.
    """
    if size < needed:
        raise BackingError(
            f"{path}: has {human(size)}, the NVDIMM needs {human(needed)} ({human(needed - size)} more)",
            hint="make the file larger, or name a path where no file is: it is created",
        )


def hidden_name(path: str) -> str:
    """Return the path of a file until it is complete: ``.NAME.partial`` beside it, symbolic links resolved."""
    directory, name = os.path.split(os.path.realpath(path))
    return os.path.join(directory, f".{name}.partial")


def check_copy_name(path: str) -> None:
    """Check that a file's :func:`hidden_name` is not too long.

    :raises BackingError: when it is.
    """
    name = os.path.basename(os.path.realpath(path))
    longest = NAME_MAX - len("..partial")
    _check_length(path, name, longest, ": the file is .NAME.partial until it is complete")


def check_name(path: str) -> None:
    """Check that a backing can have a path.

    It must not be a :func:`hidden_name`: an import of the other name would take it for its own.

    :raises InUseError: when it is one.
    :raises BackingError: when it is too long, or is not UTF-8, which domain XML is.
    """
    name = os.path.basename(path)
    _check_length(path, name, NAME_MAX)
    if escaped(path) != path:
        raise BackingError(f"{path}: is not UTF-8, and domain XML has to be", hint="rename it")
    if len(name) > len("..partial") and name.startswith(".") and name.endswith(".partial"):
        raise InUseError(f"{path}: is the name of a file whose import is not finished", hint="take another name")


def _check_length(path: str, name: str, longest: int, reason: str = "") -> None:
    length = len(os.fsencode(name))
    if length > longest:
        raise BackingError(
            f"{path}: its name has {length} bytes, and may have {longest}{reason}", hint="take a shorter name"
        )
    if len(os.fsencode(path)) > PATH_MAX:
        raise BackingError(
            f"{path[:80]}…: the path has {len(os.fsencode(path))} bytes, and may have {PATH_MAX}",
            hint="take a shorter path",
        )


def unlink(path: str) -> bool:
    """Delete a file; return False when there is none.

    :raises BackingError: when it cannot be deleted.
    """
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise BackingError(f"{path}: cannot be deleted: {error.strerror}") from error
    return True


def lease_break_seconds() -> int:
    """Return a time in which the kernel ends a lease of another program (fcntl F_SETLEASE) that is in the way."""
    try:
        seconds = int(Path("/proc/sys/fs/lease-break-time").read_text(encoding="ascii"))
    except (OSError, ValueError):
        seconds = 45  # the kernel's default
    return seconds + 2  # it counts in ticks, and looks only at the next open (fs/locks.c:__break_lease)


def rename_new(source: str, target: str) -> None:
    """Rename a file, in one step; unlike rename(2), fail when the target exists.

    Between link(2) and unlink(2), a file would have two names, and be refused if the process were killed there.

    :raises OSError: when the target exists, or the file cannot be renamed.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), source, None, target)


@contextmanager
def opened(path: str, flags: int, *, patience: float = 0.0) -> Iterator[int]:
    """Yield a descriptor of a path that is not a symbolic link; it is closed afterwards.

    :param patience: seconds to wait for another program that has a lease on the file. The first try already makes the
        kernel ask for the lease, and end it after :func:`lease_break_seconds`.
    :raises BackingError: naming the path, for every OSError, also of the block.
    """
    try:
        fd = _open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, patience)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise BackingError(f"{path}: {error.strerror}", hint=HINTS.get(error.errno or 0, "")) from error


def _open(path: str, flags: int, patience: float) -> int:
    deadline = time.monotonic() + patience
    while True:
        try:
            return os.open(path, flags, 0o600)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def sync_directory(path: str) -> None:
    """Make changes of the directory that a file is in durable."""
    with opened(os.path.dirname(path), os.O_DIRECTORY) as fd:
        os.fsync(fd)
