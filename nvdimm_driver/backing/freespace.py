# SPDX-License-Identifier: Apache-2.0
"""Free space of a file system: the GETFSMAP ioctl of ext4 and XFS (linux/fsmap.h)."""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Iterator
from typing import NamedTuple

FS_IOC_GETFSMAP = 0xC0C0583B
OWN_FREE = 1  # FMR_OWN_FREE
_SPECIAL_OWNER = 0x10
_LAST = 0x20
_HEAD = struct.Struct("=IIII48x")  # struct fsmap_head: iflags, oflags, records that fit, records returned
_RECORD = struct.Struct("=IIQQQQ24x")  # struct fsmap: device, flags, physical, owner, offset, length
_BATCH = 1024
_MAX = (1 << 64) - 1


class _Record(NamedTuple):
    """A run of a device and its use."""

    device: int
    flags: int
    physical: int
    owner: int
    offset: int
    length: int


def largest_free(fd: int) -> int:
    """Return the bytes of the longest free run of the file system that an open file or directory is on.

    :raises OSError: when the file system does not support it.
    """
    largest = run = end = 0
    for record in _records(fd):
        if record.owner != OWN_FREE or not record.flags & _SPECIAL_OWNER:
            continue
        run = run + record.length if record.physical == end else record.length
        end = record.physical + record.length
        largest = max(largest, run)
    return largest


def _records(fd: int) -> Iterator[_Record]:
    """Yield all records, by device and offset on it."""
    low = _Record(0, 0, 0, 0, 0, 0)
    high = _Record(0xFFFFFFFF, 0xFFFFFFFF, _MAX, _MAX, _MAX, 0)
    while True:
        buffer = bytearray(_HEAD.pack(0, 0, _BATCH, 0) + _RECORD.pack(*low) + _RECORD.pack(*high))
        first = len(buffer)
        buffer += bytes(_BATCH * _RECORD.size)
        fcntl.ioctl(fd, FS_IOC_GETFSMAP, buffer)
        count = _HEAD.unpack_from(buffer)[3]
        for index in range(count):
            low = _Record._make(_RECORD.unpack_from(buffer, first + index * _RECORD.size))
            yield low
        if not count or low.flags & _LAST:
            return
