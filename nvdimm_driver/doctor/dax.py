# SPDX-License-Identifier: Apache-2.0
"""Check that a file system really uses DAX."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    ffi: Any
else:
    from nvdimm_driver.xen._xen import ffi

AT_EMPTY_PATH = 0x1000
STATX_ATTR_DAX = 0x200000
STRUCT_STATX_SIZE = 256
_ATTRIBUTES = struct.Struct("=8xQ")  # struct statx (include/uapi/linux/stat.h): mask, blksize, attributes


def has_dax(folder: str) -> bool:
    """Return True when a new file in the folder is in persistent memory itself, not in the page cache (statx(2)).

    The mount option ``-o dax`` does not prove that. The file has no name, and is gone when this returns.

    :raises OSError: when no file can be made.
    """
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        answer = ffi.new("char[]", STRUCT_STATX_SIZE)
        if ffi.dlopen(None).statx(fd, b"", AT_EMPTY_PATH, 0, ffi.cast("struct statx *", answer)):
            raise OSError(ffi.errno, os.strerror(ffi.errno), folder)
        (attributes,) = _ATTRIBUTES.unpack_from(ffi.buffer(answer))
        return bool(attributes & STATX_ATTR_DAX)
    finally:
        os.close(fd)
