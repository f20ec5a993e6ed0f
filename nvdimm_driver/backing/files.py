"""Files that are backings, or are to be: opened, looked at, named."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from nvdimm_driver.backing import extents
from nvdimm_driver.backing.extents import FileExtent
from nvdimm_driver.errors import BackingError

HINTS = {
    errno.EPERM: "is it immutable (lsattr, chattr -i)?",
    errno.EACCES: "only root may use backings",
    errno.ENOSPC: "make room, or ask for less",
    errno.EROFS: "mount it read-write",
    errno.EIO: "look at the kernel's log; 'nvdimmctl show' and 'pool show' tell of bad blocks",
}
"""What to do about what the system says, by errno."""


class ExaminedFile(NamedTuple):
    """An existing file that was found fit: its extents, and the runs (offset, length) to fill with zeros."""

    found: tuple[FileExtent, ...]
    unwritten: tuple[tuple[int, int], ...]


def is_new(path: str) -> bool:
    """True when there is no such file, or an empty one."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return True
    return stat.S_ISREG(status.st_mode) and status.st_size == 0 and status.st_nlink == 1


def look(fd: int, path: str, size: int) -> ExaminedFile:
    """Look at an open file, and refuse what can never be a backing of that size."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BackingError(f"{path}: is not a regular file")
    if status.st_nlink != 1:
        raise BackingError(
            f"{path}: has {status.st_nlink} names (hard links), and must have one",
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
    if size < needed:
        raise BackingError(
            f"{path}: has {size} bytes, the NVDIMM needs {needed}",
            hint="size it to fit, or name a path without a file to have one made",
        )


def hidden_name(path: str) -> str:
    directory, name = os.path.split(os.path.realpath(path))
    return os.path.join(directory, f".{name}.partial")


def unlink(path: str) -> bool:
    """Delete a file; False when there is none."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise BackingError(f"{path}: cannot be deleted: {error.strerror}") from error
    return True


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """A descriptor of a path without symbolic links; what the system says of it is reported with the path."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise BackingError(f"{path}: {error.strerror}", hint=HINTS.get(error.errno or 0, "")) from error


def sync_directory(path: str) -> None:
    with opened(os.path.dirname(path), os.O_DIRECTORY) as fd:
        os.fsync(fd)
