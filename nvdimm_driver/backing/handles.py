# SPDX-License-Identifier: Apache-2.0
"""Ask a file system whether it has a file still, whatever its name is now (open_by_handle_at(2))."""

from __future__ import annotations

import errno
import os
import struct

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
