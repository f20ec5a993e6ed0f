# SPDX-License-Identifier: Apache-2.0
"""Open files by their handles: whether a file system has one still, whatever its name is now (open_by_handle_at(2)),
and to write one of XFS without changing its times (fs/xfs/xfs_handle.c)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

from nvdimm_driver.backing.paths import last_errno, libc
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import BackingIdentity
from nvdimm_driver.shell import repair_of

_HEADER = struct.Struct("=Ii")  # struct file_handle: handle_bytes, handle_type; the handle follows
_AT_EMPTY_PATH = 0x1000  # include/uapi/linux/fcntl.h
_HANDLE_MAX = 128  # MAX_HANDLE_SZ
_FORMATS = {1: struct.Struct("=II"), 0x81: struct.Struct("=QI")}
"""Inode and generation, by the type of a handle: FILEID_INO32_GEN (include/linux/exportfs.h), and with a wide inode
XFS_FILEID_TYPE_64FLAG (fs/xfs/xfs_export.h)."""

_XFS_IOC_FD_TO_HANDLE = 0xC038586A
_XFS_IOC_OPEN_BY_HANDLE = 0xC038586B
_REQUEST = struct.Struct("=I4xQI4xQI4xQQ")
"""struct xfs_fsop_handlereq (fs/xfs/libxfs/xfs_fs.h): descriptor, path, flags, address and length of the handle that is
given, addresses of the one that is asked for and of its length."""


@contextmanager
def opened_untimed(fd: int, folder: int) -> Iterator[int]:
    """Yield a descriptor with which an open file of XFS can be written, and keeps its times.

    What others write changes them as ever. xfs_fsr(8) moves the blocks of files so.

    :param folder: descriptor of any folder on that file system.
    :raises OSError: when the file cannot be opened so.
    """
    handle, length = array("B", bytes(_HANDLE_MAX)), array("I", [0])
    where, count = handle.buffer_info()[0], length.buffer_info()[0]
    fcntl.ioctl(fd, _XFS_IOC_FD_TO_HANDLE, bytearray(_REQUEST.pack(fd, 0, 0, 0, 0, where, count)))
    request = _REQUEST.pack(0, 0, os.O_RDWR, where, length[0], 0, 0)
    untimed = fcntl.ioctl(folder, _XFS_IOC_OPEN_BY_HANDLE, bytearray(request))
    try:
        os.set_inheritable(untimed, False)
        if not os.path.samestat(os.fstat(untimed), os.fstat(fd)):  # the folder is on another file system
            raise _system_error(errno.EXDEV)
        yield untimed
    finally:
        os.close(untimed)


def check_deleted(folder: int, path: str, identity: BackingIdentity) -> None:
    """Check that a file which is not at its path is nowhere else on its file system: somebody may have moved it.

    :param folder: descriptor of any folder on that file system.
    :raises BackingError: when the file system has it still, or does not say.
    """
    try:
        fd = _open(folder, identity.inode, identity.generation)
    except OSError as error:
        if error.errno == errno.ESTALE:
            return
        raise BackingError(
            f"{path}: it is not there, and the file system does not say whether it was deleted: {error.strerror}"
        ) from error
    links = os.fstat(fd).st_nlink
    os.close(fd)
    if links:
        raise BackingError(
            f"{path}: it was moved: its file system has it still, under another name",
            hint=f"if it is in a pool, this moves it back: {repair_of(path)}; else move it back yourself: find "
            f"WHERE-IT-IS-MOUNTED -xdev -inum {identity.inode}",
        )


def _open(folder: int, inode: int, generation: int) -> int:
    """Open a file by its inode; ESTALE is raised when its file system has no such file."""
    import ctypes

    sample = ctypes.create_string_buffer(_HEADER.pack(_HANDLE_MAX, 0), _HEADER.size + _HANDLE_MAX)
    if libc().name_to_handle_at(folder, b"", sample, ctypes.byref(ctypes.c_int()), _AT_EMPTY_PATH) < 0:
        raise _system_error(last_errno())
    kind = _HEADER.unpack_from(sample)[1]
    if kind not in _FORMATS:
        raise _system_error(errno.EOPNOTSUPP)
    body = _FORMATS[kind].pack(inode, generation)
    handle = ctypes.create_string_buffer(_HEADER.pack(len(body), kind) + body)
    fd = libc().open_by_handle_at(folder, handle, os.O_PATH | os.O_CLOEXEC)
    if fd < 0:
        raise _system_error(last_errno())
    return int(fd)


def _system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
