# SPDX-License-Identifier: Apache-2.0
"""Byte ranges of files, mappings and block devices.

Bytes that were written are in the persistent memory when ``sync`` returns. No byte outside the range changes.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import PAGE, BackingIdentity
from nvdimm_driver.plugins import ByteRange
from nvdimm_driver.sizes import align_up, human

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE (madvise(2), since Linux 5.14); Python's mmap does not name it."""


def give_own_blocks(fd: int, path: str, offset: int, length: int) -> None:
    """Give a file blocks of its own: zeros where it is unwritten, and a copy where it shares blocks with another file.

    Each page is touched as by a store, but nothing is stored: the file system looks at a block and replaces it in one
    step. So what any program has written, or writes meanwhile, stays. The caller has to sync the file.

    :param fd: opened to read and write.
    :param path: of the file, for the error.
    :raises BackingError: when the file does not reach that far any more.
    :raises OSError: when that cannot be done.
    """
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        with mmap.mmap(fd, offset + length - start, offset=start) as pages:
            pages.madvise(_POPULATE_WRITE)
    except ValueError as error:  # of mmap's own look at the size
        raise _without_blocks(path, offset + length) from error
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        raise _without_blocks(path, offset + length) from error


def _without_blocks(path: str, end: int) -> BackingError:
    return BackingError(
        f"{path}: cannot get its own blocks up to {end:#x}: the file ends before, its file system is full, or its "
        "memory is faulty",
        hint="has it been truncated? 'df' shows what is free, 'nvdimmctl doctor' bad blocks",
    )


class FileBytes(ByteRange):
    """A byte range of any file, from its start, through read and write.

    :param fd: owned by the range, which closes it.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self._fd = fd

    def sync(self) -> None:
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)  # later reads come from the medium

    def close(self) -> None:
        os.close(self._fd)

    def _read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise BackingError(
                    f"the file ends at {offset + len(data):#x}, it had {human(self.size)} or more when it was opened",
                    hint="has it been truncated?",
                )
            data += more
        return data

    def _write(self, offset: int, data: bytes) -> None:
        left = memoryview(data)
        while left:
            written = os.pwrite(self._fd, left, offset)
            left, offset = left[written:], offset + written


class MappedBytes(ByteRange):
    """A byte range of persistent memory, through a mapping.

    :param fd: file or device to map; may be closed afterwards.
    :param start: offset of the range in it, bytes.
    :param step: alignment that a mapping needs, bytes.
    :param persist: makes stores durable, for devices without msync; takes mapping, offset in it and length. Called for
        what is written, and for what is read: a copy that was interrupted may have stored it, and the CPU's caches
        alone have it.
    """

    def __init__(
        self,
        fd: int,
        start: int,
        size: int,
        *,
        write: bool = True,
        step: int = mmap.PAGESIZE,
        persist: Callable[[mmap.mmap, int, int], None] | None = None,
    ) -> None:
        self.size = size
        self._skip = start % step
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        length = align_up(self._skip + size, step) if persist else self._skip + size
        self._memory = mmap.mmap(fd, length, mmap.MAP_SHARED, protection, offset=start - self._skip)
        self._persist = persist

    def sync(self) -> None:
        if self._persist is None:
            self._memory.flush()  # msync: writes back the caches of written pages (fs/dax.c)

    def close(self) -> None:
        self._memory.close()

    def _read(self, offset: int, length: int) -> bytes:
        begin = self._skip + offset
        if self._persist is not None:
            self._persist(self._memory, begin, length)
        return self._memory[begin : begin + length]

    def _write(self, offset: int, data: bytes) -> None:
        begin = self._skip + offset
        self._memory[begin : begin + len(data)] = data
        if self._persist is not None:
            self._persist(self._memory, begin, len(data))


class DirectBytes(ByteRange):
    """A byte range of a raw pmem block device, past the page cache.

    :param fd: opened with O_DIRECT; owned by the range, which closes it.
    :param start: offset of the range on the device, bytes.
    """

    def __init__(self, fd: int, start: int, size: int) -> None:
        self.size = size
        self._fd = fd
        self._start = start

    def sync(self) -> None:
        os.fdatasync(self._fd)  # flushes the device's write cache

    def close(self) -> None:
        os.close(self._fd)

    def _read(self, offset: int, length: int) -> bytes:
        return self._read_pages(offset, length)[1]

    def _write(self, offset: int, data: bytes) -> None:
        first, pages = self._read_pages(offset, len(data), whole=True)
        skip = self._start + offset - first
        with mmap.mmap(-1, len(pages)) as buffer:  # O_DIRECT needs aligned memory
            buffer[:] = pages
            buffer[skip : skip + len(data)] = data
            if os.pwrite(self._fd, buffer, first) != len(pages):
                raise OSError(errno.EIO, f"only a part of {human(len(pages))} at {first:#x} was written")

    def _read_pages(self, offset: int, length: int, *, whole: bool = False) -> tuple[int, bytes]:
        """Return the offset of the first page with these bytes, and the bytes; with ``whole``, the whole pages."""
        begin = self._start + offset
        first = begin // PAGE * PAGE
        with mmap.mmap(-1, align_up(begin + length - first, PAGE)) as buffer:
            if os.preadv(self._fd, [buffer], first) != len(buffer):
                raise BackingError(f"the device is smaller than {human(self._start + self.size)}")
            return first, buffer[:] if whole else buffer[begin - first : begin - first + length]


class LockedBytes(ByteRange):
    """Another byte range, which is locked until it is closed.

    :param unlock: called after the other range is closed.
    """

    def __init__(self, content: ByteRange, unlock: Callable[[], None], identity: BackingIdentity | None = None) -> None:
        self.size = content.size
        self.identity = identity
        self._content = content
        self._unlock = unlock

    def sync(self) -> None:
        self._content.sync()

    def close(self) -> None:
        try:
            self._content.close()
        finally:
            self._unlock()

    def _read(self, offset: int, length: int) -> bytes:
        return self._content.read(offset, length)

    def _write(self, offset: int, data: bytes) -> None:
        self._content.write(offset, data)
