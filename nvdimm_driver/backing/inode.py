# SPDX-License-Identifier: Apache-2.0
"""A file's attributes beyond stat(2): flags, generation, extended attributes of XFS and ext4 (ioctl_iflags(2),
ioctl_xfs_fsgetxattr(2), include/uapi/linux/fs.h).

All functions take a descriptor, which may be read-only, and raise OSError as the system call does. Of those that freeze
and thaw, only one may work on a file at a time.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nvdimm_driver.backing.paths import open_again
from nvdimm_driver.model import Touch

LOG = logging.getLogger(__name__)

IMMUTABLE = 0x10  # FS_IMMUTABLE_FL
_APPEND_ONLY = 0x20  # FS_APPEND_FL
XFLAG_REALTIME = 0x1
XFLAG_EXTSIZE = 0x800
XFLAG_DAX = 0x8000
XFLAG_COWEXTSIZE = 0x10000

# Their numbers encode a long; the argument is an int (fs/ioctl.c: ioctl_getflags).
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_IOC_GETVERSION = 0x80087601
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
_FSXATTR = struct.Struct("=IIIII8x")  # struct fsxattr: xflags, extsize, nextents, projid, cowextsize
_FROZEN = "trusted.nvdimm_driver.frozen"
_RUN = "trusted.nvdimm_driver.run"  # apart: an earlier version takes a file with more in _FROZEN for one that is not
_OWNER = "trusted.nvdimm_driver.owner"
_DOUBTFUL = "trusted.nvdimm_driver.doubtful"
_GIVEN = "trusted.nvdimm_driver.given."  # and the inode number of a file in this folder
NO_RUN = 0
"""Number of no run."""
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def generation(fd: int) -> int:
    """Return the inode generation, which distinguishes the file from an earlier one with the same inode number."""
    return _get_int(fd, _FS_IOC_GETVERSION)


def is_frozen(fd: int) -> bool:
    """Return True when :func:`freeze` has made this file immutable, also while it is :func:`append_only`.

    ``cp -a`` copies the attribute that says so, but not the flag. An earlier version did not write on which file it
    was: there, the flag counts.
    """
    written_on = _attribute(fd, _FROZEN)
    if written_on is None:
        return False
    return written_on == _itself(fd) if written_on else bool(_flags(fd) & (IMMUTABLE | _APPEND_ONLY))


def frozen_for(fd: int) -> int | None:
    """Return the number of the run that a frozen file was frozen for; None when it is not known."""
    found = _attribute(fd, _RUN)
    return int(found) if found is not None and found.isdigit() and is_frozen(fd) else None


def is_immutable(fd: int) -> bool:
    """Return True when the file is immutable, whoever made it so."""
    return bool(_flags(fd) & IMMUTABLE)


def is_unflagged(fd: int) -> bool:
    """Return True when a file has been frozen, and its flag is gone: somebody may have written it since.

    The operator has removed that (chattr), or a process was killed while it froze or thawed the file.
    """
    return is_frozen(fd) and not _flags(fd) & (IMMUTABLE | _APPEND_ONLY)


def has_others_flag(fd: int) -> bool:
    """Return True when somebody else, such as the operator, has made the file immutable or append-only.

    So has xfsrestore, which gives the copy of a frozen file the flag: the attribute says that it is a copy.
    """
    return bool(_flags(fd) & (IMMUTABLE | _APPEND_ONLY)) and not is_frozen(fd)


def freeze(fd: int, run: int | None = None) -> None:
    """Make the file root's alone and immutable, unless it is frozen. The caller has asked :func:`has_others_flag`.

    It gets a mark, which only root can see and set, and stays root's alone. Once it is, nobody else can take a lease
    on it (fcntl(2)), and the open for writing makes the kernel end those that there are: none is left that
    :func:`opened_to_write` would wait for.

    :param run: number of the run that a file is frozen for from now on; one that is frozen already keeps its own.
    :raises BlockingIOError: while a program has a lease on the file, which is not frozen then: try again.
    :raises PermissionError: if it has another's flag, and is not root's alone or not to be opened for writing.
    """
    if not is_frozen(fd):
        _make_roots_alone(fd)
        os.close(open_again(fd, os.O_RDWR))
        _set_run(fd, run)
        os.setxattr(fd, _FROZEN, _itself(fd))
    elif is_immutable(fd):
        return
    else:
        if others_may_write(fd):  # an earlier version has frozen it, and was killed in its :func:`opened_to_write`
            _make_roots_alone(fd)
        if is_unflagged(fd):  # somebody may have put an older copy in its place: it is not as its guest has left it
            _set_run(fd, NO_RUN if run is None else run)
    _set_immutable(fd, True)


def others_may_write(fd: int) -> bool:
    """Return True when others than root may open the file for writing while it is :func:`append_only`.

    The group's bits are the most that an access control list allows anybody but the owner (acl(5), the mask). A file
    that runs as its owner or group counts, too: its contents are a guest's.
    """
    found = os.fstat(fd)
    return found.st_uid != 0 or bool(found.st_mode & (_OTHERS_WRITE | stat.S_ISUID | stat.S_ISGID))


def _make_roots_alone(fd: int) -> None:
    """Take the file from all others: mode 0600 takes it from an access control list, too (acl(5), the mask).

    Who may read it could make a reflink of it on XFS, which would keep the domain from its next start.
    """
    found = os.fstat(fd)
    if (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o600):
        return
    os.fchown(fd, 0, -1)
    os.fchmod(fd, 0o600)
    LOG.warning(
        "%s was made root's, and nobody else may read or write it from now on: its owner was user %d, its mode %o",
        os.readlink(f"/proc/self/fd/{fd}"),
        found.st_uid,
        stat.S_IMODE(found.st_mode),
    )


def thaw(fd: int, touch: Touch | None = None, *, unmark: bool = False) -> None:
    """Undo :func:`freeze`; leave a file without its mark as it is. The caller has to sync the file.

    :param fd: opened to read only.
    :param touch: sets the modification time. Nobody can have written the file before: who opens it meanwhile, waits.
        One whose flag was gone already gets the present time: who has removed the flag may have written it since.
    :param unmark: removes the owner's record, too, while the file counts as frozen still: what is killed in between is
        repeated.
    """
    if not is_frozen(fd):
        return
    leased, was_flagged = touch is not None and _take_lease(fd), not is_unflagged(fd)
    try:
        _set_immutable(fd, False)
        if touch is not None:
            _touch(fd, touch, leased and was_flagged)
        if unmark and owner(fd) is not None:
            os.removexattr(fd, _OWNER)
        os.removexattr(fd, _FROZEN)
        _set_run(fd, None)
    finally:
        if leased:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _touch(fd: int, touch: Touch, alone: bool) -> None:
    """Set the modification time of a file that is mutable again, as the kernel does when a program writes to it.

    A file that another process has left mutable may have been written since: it keeps the time of that.

    :param alone: nobody can have written the file. If not, it gets the present time, which is not that of ``touch``.
    """
    found = os.fstat(fd)
    if found.st_mtime_ns == touch.after or (touch.before and found.st_mtime_ns not in touch.before):
        return
    if alone:
        os.utime(fd, ns=(found.st_atime_ns, touch.after))
    if not alone or fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
        os.utime(fd, ns=(found.st_atime_ns, time.time_ns()))


@contextmanager
def append_only(fd: int) -> Iterator[None]:
    """Make a frozen file append-only meanwhile, instead of immutable: it can be opened for writing, with O_APPEND.

    It still cannot be truncated, renamed or deleted: who owns its folder could do that to a mutable file, whoever owns
    the file. One call changes both flags. The mark stays: if a process is killed here, the next one freezes it.
    """
    frozen = is_frozen(fd)
    try:
        if frozen:
            _set_flag(fd, _APPEND_ONLY)
        yield
    finally:
        if frozen:
            _set_immutable(fd, True)


@contextmanager
def opened_to_write(fd: int) -> Iterator[int]:
    """Yield a descriptor with which a file, frozen or not, can be mapped to write; it is closed afterwards.

    A frozen file is immutable again by then: an append-only one cannot be mapped so (mm/mmap.c:do_mmap).

    :raises BlockingIOError: while a program has a lease on the file.
    """
    with append_only(fd):
        writable = open_again(fd, os.O_RDWR | os.O_APPEND)
    try:
        yield writable
    finally:
        os.close(writable)


def has_writer(fd: int) -> bool:
    """Return True while a descriptor or a mapping exists through which a process may write the file.

    XFS lets such a process change and truncate a file that was made immutable since.

    :param fd: opened to read only.
    :raises OSError: EINVAL when leases are turned off (/proc/sys/fs/leases-enable).
    """
    if not _take_lease(fd):
        return True
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _take_lease(fd: int) -> bool:
    """Take a lease to read. The kernel grants it only if nobody may write the file (fs/locks.c:check_conflicting_open).

    An open for writing then waits until the lease ends. The kernel tells us of it by SIGURG, which does nothing: SIGIO,
    which it sends by default, would end this process.

    :returns: False when somebody may write it.
    """
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return False
    return True


def owner(fd: int) -> bytes | None:
    """Return the owner that :func:`mark` has recorded; None without one."""
    return _attribute(fd, _OWNER)


def mark(fd: int, text: bytes | None) -> None:
    """Record the owner on the file, where only root sees it; None removes the record. The caller has to sync the file.

    A frozen file keeps the record that it has until it is thawed: whoever thawed it for that, and was killed, would
    leave a running guest's file mutable. One that was left :func:`append_only` is frozen again.
    """
    if is_frozen(fd):
        freeze(fd)
    elif text is not None:
        os.setxattr(fd, _OWNER, text)
    elif owner(fd) is not None:
        os.removexattr(fd, _OWNER)


def note_given(folder: int, number: int, when: int | None) -> None:
    """Note on a folder when its file with that inode number got its owner, while :func:`mark` cannot: it is frozen.

    :param when: nanoseconds since 1970; None removes the note. The caller has to sync the folder.
    """
    if when is not None:
        os.setxattr(folder, f"{_GIVEN}{number}", str(when).encode())
    elif _attribute(folder, f"{_GIVEN}{number}") is not None:
        os.removexattr(folder, f"{_GIVEN}{number}")


def given_at(folder: int, number: int) -> int:
    """Return the time that :func:`note_given` has noted for the file with that inode number; 0 without one."""
    return int(_attribute(folder, f"{_GIVEN}{number}") or 0)


def is_doubtful(fd: int) -> bool:
    """Return True for a file that :func:`doubt` has marked, and for a copy of it by ``cp -a``."""
    try:
        return _attribute(fd, _DOUBTFUL) is not None
    except OSError as error:
        if error.errno == errno.ENOTSUP:  # its file system keeps no attributes
            return False
        raise


def doubt(fd: int) -> None:
    """Mark a file to which a guest may have written that does not have it, and give it the present time.

    No guest that was saved before goes on over it then. Somebody else may have made it immutable or append-only. The
    caller has to sync the file.
    """
    flag = _flags(fd) & (IMMUTABLE | _APPEND_ONLY)
    if flag:
        _set_flag(fd, 0)
    try:
        os.utime(fd)
        os.setxattr(fd, _DOUBTFUL, b"")
    finally:
        if flag:
            _set_flag(fd, flag)


def trust(fd: int) -> None:
    """Undo :func:`doubt`. The caller has to sync the file."""
    if is_doubtful(fd):
        os.removexattr(fd, _DOUBTFUL)


def xflags(fd: int) -> int:
    """Return FS_XFLAG_* of a file or directory."""
    return int(_FSXATTR.unpack(_get_xattr(fd))[0])


def set_extent_size(fd: int, size: int) -> None:
    """Ask the file system to allocate in aligned pieces of ``size`` bytes; the file must have no extents yet."""
    flags, _, extents, project, cow = _FSXATTR.unpack(_get_xattr(fd))
    fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, _FSXATTR.pack(flags | XFLAG_EXTSIZE, size, extents, project, cow))


def set_copy_size(fd: int, size: int) -> None:
    """Ask XFS to copy shared extents in aligned pieces of ``size`` bytes, when they are written."""
    flags, extent_size, extents, project, _ = _FSXATTR.unpack(_get_xattr(fd))
    fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, _FSXATTR.pack(flags | XFLAG_COWEXTSIZE, extent_size, extents, project, size))


def _set_run(fd: int, run: int | None) -> None:
    if run is not None:
        os.setxattr(fd, _RUN, str(run).encode())
    elif _attribute(fd, _RUN) is not None:
        os.removexattr(fd, _RUN)


def _attribute(fd: int, name: str) -> bytes | None:
    """Return an extended attribute; None without it. Who may write the file can give it more than can be listed."""
    try:
        return os.getxattr(fd, name)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        raise


def _itself(fd: int) -> bytes:
    """Return inode and generation of the file."""
    return f"{os.fstat(fd).st_ino} {generation(fd)}".encode()


def _flags(fd: int) -> int:
    return _get_int(fd, _FS_IOC_GETFLAGS)


def _set_immutable(fd: int, immutable: bool) -> None:
    """Make the file immutable, or neither that nor append-only."""
    _set_flag(fd, IMMUTABLE if immutable else 0)


def _set_flag(fd: int, flag: int) -> None:
    others = _flags(fd) & ~(IMMUTABLE | _APPEND_ONLY)
    fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("=I", others | flag))


def _get_int(fd: int, request: int) -> int:
    return int(struct.unpack("=I4x", fcntl.ioctl(fd, request, bytes(8)))[0])


def _get_xattr(fd: int) -> bytes:
    return fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))
