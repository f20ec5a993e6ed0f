# SPDX-License-Identifier: Apache-2.0
"""Ask about files and paths of the host, and write the driver's own files durably. Imports nothing heavy.

What cannot be looked at is an error, and not a file that is not there.

``Path.exists``, ``is_file`` and ``is_dir`` of Python 3.14, and ``os.path.exists`` of any, say False then, too.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

PATH_MAX = 4095
"""Bytes in a path (limits.h, without the terminating 0)."""
MAX_LINKS = 40
"""Symbolic links in one path, as in the kernel (include/linux/namei.h:MAXSYMLINKS)."""

_MAX_NAMES = 4096
"""Names on a path's way, those in its links included: twice what the longest path has."""
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
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
        at a time, in whose place the next one puts what a killed one has left. In a folder whose files others run or
        read whatever their names are, it must be in another one of the same file system.
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
        _remove(new)
        raise
    sync_folder(folder)


def _remove(path: str | Path) -> None:
    """Remove what was written in part, if that can be done; importing contextlib would take a device model's time."""
    try:
        os.unlink(path)
    except OSError:
        return


def sync_folder(path: str | Path) -> None:
    """Make changes of the names in a folder durable."""
    fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def real_path(path: str) -> str:
    """Return the path that :func:`followed` does; one that it does not follow is returned as it is written, absolute.

    That keeps its ``..``: without, it would be the path of something else.
    """
    try:
        return followed(path)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        return "/" + "/".join(reversed(_names(absolute(path))))


def absolute(path: str) -> str:
    """Return a path that does not depend on the current folder, and leads where this one does: ``..`` stays in it."""
    return path if os.path.isabs(path) else os.path.join(os.getcwd(), path)


def followed(path: str) -> str:
    """Return the path that a path leads to: absolute, without symbolic links, ``..`` and double slashes.

    Nothing needs to be there. Python's realpath follows any number of links, and takes time by the square of the
    length: a user can keep it busy for hours.

    :raises OSError: ENAMETOOLONG when the kernel takes no path of that length; ELOOP when it leads through more links
        than the kernel follows, or more names than any use has.
    """
    if len(os.fsencode(path)) > PATH_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
    left = _names(absolute(path))
    at: list[str] = []
    lost, links, names = 0, 0, len(left)  # lost: how many names at the end of `at` are not there, or no folders
    folder = os.open("/", _FOLDER)
    try:
        while left:
            name = left.pop()
            if name == ".." and not lost:
                folder = _entered(folder, name)
            if name == "..":
                lost = max(0, lost - 1)
                del at[-1:]
                continue
            try:
                if left and not lost:
                    folder = _entered(folder, name)
                    at.append(name)
                    continue
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise
            target = "" if lost else _target(folder, name)
            if not target:
                at.append(name)
                lost += 1
                continue
            links, names = links + 1, names + target.count("/") + 1
            if links > MAX_LINKS or names > _MAX_NAMES:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            left += _names(target)
            if target.startswith("/"):
                folder = _entered(folder, "/")
                at.clear()
    finally:
        os.close(folder)
    return "/" + "/".join(at)


def _names(path: str) -> list[str]:
    """Return the names in a path, the last one first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _entered(folder: int, name: str) -> int:
    """Return a descriptor of a folder in an open one, which is closed."""
    found = os.open(name, _FOLDER, dir_fd=folder)
    os.close(folder)
    return found


def _target(folder: int, name: str) -> str:
    """Return where a symbolic link in an open folder leads; empty for what is none, or cannot be looked at."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError:
        return ""


def _mode(path: str | Path) -> int:
    """Return the mode of what is at a path; 0 for nothing."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return 0
