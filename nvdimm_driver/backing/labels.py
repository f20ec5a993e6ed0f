"""A label storage area in its backing: the last bytes of an NVDIMM, where QEMU keeps them too.

What is written here is in the persistent memory when the call returns, and no byte outside of the area is ever touched.
"""

from __future__ import annotations

import mmap
import os

from nvdimm_driver.errors import BackingError, UnsupportedError
from nvdimm_driver.model import PAGE, BackingIdentity
from nvdimm_driver.plugins import LabelArea


class MappedLabels(LabelArea):
    """In a file on a DAX file system: a mapping of the persistent memory itself.

    :param fd: open for reading and writing; may be closed afterwards.
    :param start: where the area begins in the file, bytes.
    """

    def __init__(self, fd: int, start: int, size: int) -> None:
        self.size = size
        self._skip = start % mmap.PAGESIZE
        self._memory = mmap.mmap(fd, self._skip + size, mmap.MAP_SHARED, offset=start - self._skip)

    def read(self) -> bytes:
        return self._memory[self._skip : self._skip + self.size]

    def _write(self, offset: int, data: bytes) -> None:
        begin = self._skip + offset
        self._memory[begin : begin + len(data)] = data
        start = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._memory.flush(start, begin + len(data) - start)  # msync: writes back the caches (fs/dax.c)


class DirectLabels(LabelArea):
    """In a raw pmem block device: past the page cache, and past the device's write cache.

    :param fd: opened with O_DIRECT and O_DSYNC; the area's own from now on.
    """

    def __init__(self, fd: int, start: int, size: int) -> None:
        self.size = size
        self._fd = fd
        self._start = start

    def read(self) -> bytes:
        return self._read_pages(0, self.size)[1]

    def _write(self, offset: int, data: bytes) -> None:
        first, pages = self._read_pages(offset, len(data), whole=True)
        skip = self._start + offset - first
        with mmap.mmap(-1, len(pages)) as buffer:  # O_DIRECT wants memory that is aligned
            buffer[:] = pages
            buffer[skip : skip + len(data)] = data
            if os.pwrite(self._fd, buffer, first) != len(pages):
                raise OSError("a label was not written whole")

    def _read_pages(self, offset: int, length: int, *, whole: bool = False) -> tuple[int, bytes]:
        """Return where the pages with these bytes of the area begin, and the bytes; ``whole``: all of the pages."""
        begin = self._start + offset
        first = begin // PAGE * PAGE
        with mmap.mmap(-1, -(-(begin + length - first) // PAGE) * PAGE) as buffer:
            if os.preadv(self._fd, [buffer], first) != len(buffer):
                raise BackingError(f"the device ends within its label area of {self.size} bytes")
            return first, buffer[:] if whole else buffer[begin - first : begin - first + length]


def check_identity(path: str, found: BackingIdentity, expected: BackingIdentity | None) -> None:
    """Refuse a backing that is not the one that was expected.

    :raises BackingError: naming both.
    """
    if found != expected:
        raise BackingError(
            f"{path} is not what was provisioned: was {expected}, is {found}",
            hint="put the old file back, or take the new one by defining the domain anew",
        )


def no_label_server(path: str) -> UnsupportedError:
    """What is wrong with a device-dax device as backing of an NVDIMM whose labels a label server writes."""
    return UnsupportedError(
        f"{path}: the labels of a device-dax device cannot be served by a QEMU (dsm = qemu): Linux gives programs no "
        "way to make its bytes durable (no fsync)",
        hint="take dsm 'aml', whose stores are durable at once, or a file or raw namespace",
    )
