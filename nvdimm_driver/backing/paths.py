# SPDX-License-Identifier: Apache-2.0
"""Paths of backings: resolved once, when somebody names one, and opened without symbolic links ever after.

A user can own a symbolic link that leads into a pool, and turn it at any moment. So the path that the ledger keeps, and
that libvirt's definition has, is the one that the link led to when the domain was defined.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from nvdimm_driver.errors import BackingError, TurnedError
from nvdimm_driver.host_files import MAX_LINKS, PATH_MAX, followed, real_path

T = TypeVar("T")

HINTS = {
    errno.ENOENT: "is its file system mounted?",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.EPERM: "is it immutable or append-only (lsattr, chattr -ia)?",
    errno.EACCES: "only root may use backings",
    errno.ENOSPC: "make room, or ask for less",
    errno.EROFS: "mount it read-write",
    errno.ELOOP: "a part of the path has become a symbolic link: put back what was there, or define the domain again",
    errno.EAGAIN: "another program has a lease on it (fcntl F_SETLEASE), which the kernel ends within "
    "/proc/sys/fs/lease-break-time seconds: try again then",
    errno.ETXTBSY: "a process runs from it: end that",
    errno.EIO: "look at the kernel's log; 'nvdimmctl show' and 'pool show' list bad blocks",
}
"""Hints for errors of the system, by errno."""

_OPENAT2 = 437  # the same on every architecture (include/uapi/asm-generic/unistd.h)
_NO_LINKS = 0x04 | 0x08  # RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH (include/uapi/linux/openat2.h)
_RENAME_NOREPLACE = 1  # include/uapi/linux/fs.h


@cache
def libc() -> Any:
    """Return the C library. ctypes is imported when it is needed, and not by programs that have to start quickly."""
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def last_errno() -> int:
    """Return the errno of this thread's last call of :func:`libc`."""
    import ctypes

    return ctypes.get_errno()


def check_length(path: str) -> None:
    """Check that the kernel takes a path of that length.

    :raises BackingError: when it does not.
    """
    length = len(os.fsencode(path))
    if length > PATH_MAX:
        raise BackingError(
            f"{path[:80]}…: the path has {length} bytes, and may have {PATH_MAX}", hint="take a shorter path"
        )


def check_not_read_only(path: str) -> None:
    """Check that the file system of a path, if it is there, is not mounted read-only.

    :raises BackingError: when it is.
    """
    with suppress(OSError):
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            raise BackingError(f"{path}: {os.strerror(errno.EROFS)}", hint=HINTS[errno.EROFS])


def same_file_system(one: str, other: str) -> bool:
    """Return True when two paths are on one file system; of a path that is not there, the folder above counts.

    :param one: resolved, as the other is.
    """
    return _device(one) == _device(other)


def _device(path: str) -> int:
    while True:
        try:
            return os.stat(path).st_dev
        except OSError:
            path = os.path.dirname(path)


def resolve(path: str) -> str:
    """Return the path that a path leads to: absolute, without symbolic links, ``..`` and double slashes.

    Nothing needs to be there. Call this where a path comes in, and pass on only what it returns. A path through more
    links than the kernel follows keeps them and its ``..``, and is refused when it is opened; so whoever has a folder
    on the way of one path keeps nobody from others.

    :raises BackingError: when it is too long.
    """
    check_length(path)
    with reporting(path):
        return real_path(path)


def resolve_strictly(path: str) -> str:
    """Return what :func:`resolve` does.

    :raises BackingError: when it is too long, or leads through more symbolic links than the kernel follows.
    """
    check_length(path)
    try:
        with reporting(path):
            return followed(path)
    except TurnedError:
        raise BackingError(
            f"{path}: leads through more than {MAX_LINKS} symbolic links, or one that leads back to itself",
            hint="name the file itself",
        ) from None


def resolve_new(path: str) -> str:
    """Return the path that a path leads to, at which a backing will be made if there is none.

    :raises BackingError: as for :func:`resolve_strictly`, and when it is a symbolic link to nothing: its file system
        may not be mounted.
    """
    real = resolve_strictly(path)
    if os.path.islink(path) and not os.path.lexists(real):
        raise BackingError(
            f"{path}: is a symbolic link to {real}, and nothing is there",
            hint="mount the file system of that path, or name the path itself to make a new file",
        )
    return real


def resolve_folder(path: str) -> str:
    """Return the path in the folder that its folder leads to; its last part stays, also if it is a symbolic link.

    :raises BackingError: as for :func:`resolve`.
    """
    folder, name = os.path.split(path.rstrip("/"))
    return resolve(path) if name in ("", ".", "..") else os.path.join(resolve(folder or "."), name)


def steps(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the path and status of each folder and symbolic link on an absolute path's way, and what it leads to.

    :raises OSError: when a step is not there.
    """
    at, left, links = "/", path.split("/"), 0
    while left:
        name = left.pop(0)
        if name == "..":
            at = os.path.dirname(at)
        elif name not in ("", "."):
            at = os.path.join(at, name)
        info = os.lstat(at)
        yield at, info
        if stat.S_ISLNK(info.st_mode):
            links += 1
            target = os.readlink(at)
            left = [*target.split("/"), *left]
            at = "/" if os.path.isabs(target) else os.path.dirname(at)
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def others_can_turn(path: str) -> bool:
    """Return True when others than root can lead an absolute path elsewhere: a folder on its way is not root's alone.

    A program that follows symbolic links must not be run by root on such a path.
    """
    folder: os.stat_result | None = None
    try:
        for _, info in steps(path):
            if folder is not None and _others_can_replace(folder, info):
                return True
            folder = info if stat.S_ISDIR(info.st_mode) else folder
    except FileNotFoundError:
        return folder is None or _others_can_replace(folder, None)
    except OSError:
        return True
    return False


def _others_can_replace(folder: os.stat_result, found: os.stat_result | None) -> bool:
    """Return True when others than root can put something in the place of what a folder has, or make it if it is None.

    In a sticky folder, such as /tmp, nobody else can replace what is root's.
    """
    is_kept = folder.st_mode & stat.S_ISVTX and found is not None and not found.st_uid
    return folder.st_uid != 0 or bool(folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_kept)


def open_resolved(path: str, flags: int, *, folder: int | None = None) -> int:
    """Return a descriptor of what is at a resolved path; it never waits for a FIFO or a device.

    :param folder: descriptor of the folder that a relative path is in.
    :raises OSError: ELOOP when the path is not a resolved one, because a part of it is a symbolic link.
    """
    if ".." in path.split("/"):
        raise OSError(errno.ELOOP, "has '..' in it", path)
    if folder is None:
        root = os.open("/", os.O_PATH)
        try:
            return open_resolved(path.lstrip("/") or ".", flags, folder=root)
        finally:
            os.close(root)
    creates = flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE
    if not flags & os.O_PATH:
        flags |= os.O_NONBLOCK
    import struct

    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0o600 if creates else 0, _NO_LINKS)  # struct open_how
    fd = libc().syscall(_OPENAT2, folder, os.fsencode(path), how, len(how))
    if fd < 0:
        raise _system_error(last_errno(), path)
    return int(fd)


@contextmanager
def opened(path: str, flags: int, *, patience: float = 0.0) -> Iterator[int]:
    """Yield a descriptor of what is at a resolved path; it is closed afterwards.

    :param patience: seconds to wait for another program that has a lease on the file. The first try already makes the
        kernel ask for the lease, and end it after :func:`.files.lease_break_seconds`.
    :raises BackingError: naming the path, for every OSError, also of the block.
    """
    with reporting(path):
        fd = patiently(lambda: open_resolved(path, flags), patience)
        try:
            yield fd
        finally:
            os.close(fd)


def open_again(fd: int, flags: int) -> int:
    """Return another descriptor of an open file, with other flags.

    :raises BlockingIOError: while another program has a lease on the file that is in the way. The kernel asks for the
        lease then, and ends it after :func:`.files.lease_break_seconds`.
    :raises OSError: when the file cannot be opened like that.
    """
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC)


def patiently(attempt: Callable[[], T], patience: float) -> T:
    """Return what an attempt returns. While it fails for a lease of another program on a file, repeat it.

    :param patience: seconds after which it is not repeated any more.
    :raises BlockingIOError: when there still is a lease.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return attempt()
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


@contextmanager
def reporting(path: str) -> Iterator[None]:
    """Turn an OSError of the block into a BackingError that names the path.

    :raises TurnedError: when a part of the path is a symbolic link.
    :raises BackingError: for every other OSError.
    """
    try:
        yield
    except OSError as error:
        kind = TurnedError if error.errno == errno.ELOOP else BackingError
        raise kind(f"{path}: {error.strerror}", hint=HINTS.get(error.errno or 0, "")) from error


def status(path: str) -> os.stat_result | None:
    """Return the status of what is at a resolved path, without opening it; None when nothing is.

    :raises OSError: when it cannot be determined, or the path has a symbolic link in it.
    """
    try:
        fd = open_resolved(path, os.O_PATH)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def is_gone(path: str) -> bool:
    """Return True when nothing is at a resolved path any more, or a symbolic link leads elsewhere."""
    try:
        return status(path) is None
    except OSError as error:
        return error.errno == errno.ELOOP


@dataclass(frozen=True)
class Entry:
    """A name in an open folder, and so in this folder, whatever is at the folder's path by now.

    All methods raise OSError as the system call does.

    :ivar folder: descriptor of the folder.
    """

    folder: int
    name: str

    def status(self) -> os.stat_result | None:
        """Return the status of what has the name, also of a symbolic link; None when nothing has."""
        try:
            return os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open(self, flags: int) -> int:
        """Return a descriptor of what has the name, which must not be a symbolic link."""
        return open_resolved(self.name, flags, folder=self.folder)

    @contextmanager
    def opened(self, flags: int) -> Iterator[int]:
        """Yield a descriptor of what has the name, as :meth:`open` returns it; it is closed afterwards."""
        fd = self.open(flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def unlink(self) -> None:
        """Delete the name."""
        os.unlink(self.name, dir_fd=self.folder)

    def link(self, fd: int) -> None:
        """Give the name to an open file without a name; fail if the name exists."""
        os.link(f"/proc/self/fd/{fd}", self.name, dst_dir_fd=self.folder, follow_symlinks=True)

    def rename_new(self, target: Entry) -> None:
        """Give the file another name, in one step; unlike rename(2), fail when that exists.

        Between link(2) and unlink(2), a file would have two names, and be refused if the process were killed there.
        """
        names = self.folder, os.fsencode(self.name), target.folder, os.fsencode(target.name)
        if libc().renameat2(*names, _RENAME_NOREPLACE):
            raise _system_error(last_errno(), self.name)

    def replace(self, target: Entry) -> None:
        """Give the file another name, in one step, which it takes from another file."""
        os.replace(self.name, target.name, src_dir_fd=self.folder, dst_dir_fd=target.folder)

    def beside(self, name: str) -> Entry:
        """Return another name in the same folder."""
        return Entry(self.folder, name)

    def sync(self) -> None:
        """Make changes of names in the folder durable."""
        os.fsync(self.folder)


@contextmanager
def entry(path: str) -> Iterator[Entry]:
    """Yield the entry of a resolved path, which need not exist, in its folder, which must.

    :raises BackingError: naming the path, for every OSError, also of the block.
    """
    folder, name = os.path.split(path)
    with reporting(path):
        fd = open_resolved(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield Entry(fd, name)
        finally:
            os.close(fd)


def _system_error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)
