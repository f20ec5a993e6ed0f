# SPDX-License-Identifier: Apache-2.0
"""Questions about files of the host, and writing of the driver's own. Imports nothing heavy.

What cannot be looked at is an error, and not a file that is not there.

``Path.exists``, ``is_file`` and ``is_dir`` of Python 3.14, and ``os.path.exists`` of any, say False then, too.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


def exists(path: str | Path) -> bool:
    """Return True when there is something at a path.

    :raises OSError: when nobody can say, as from every function here.
    """
    return bool(_mode(path))


def is_file(path: str | Path) -> bool:
    """Return True when there is an ordinary file at a path."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: str | Path) -> bool:
    """Return True when there is a folder at a path."""
    return stat.S_ISDIR(_mode(path))


def write(path: str | Path, content: bytes, mode: int = 0o600, *, new: str | Path = "") -> None:
    """Write a file durably: whatever fails, also the power, it has all of its content, or is as it was before.

    :param new: what it is called until it is whole; by default ``.NAME.new``, for a file that only one process writes
        at a time, in whose place the next one puts what a killed one has left.
    """
    folder, name = os.path.split(path)
    new = new or os.path.join(folder, f".{name}.new")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(fd, left) :]
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(new, path)
    except OSError:
        with suppress(OSError):
            os.unlink(new)
        raise
    sync_folder(folder)


def sync_folder(path: str | Path) -> None:
    """Make changes of the names in a folder durable."""
    fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _mode(path: str | Path) -> int:
    """Return the mode of what is at a path; 0 for nothing."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return 0
