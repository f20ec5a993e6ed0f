# SPDX-License-Identifier: Apache-2.0
"""The extents of a file, from two sources: FIEMAP (the file system) and pagemap (the CPU's page tables).

Neither is trusted alone: a mapping of the wrong frames would give a guest another guest's data. FIEMAP does not show
machine addresses. Pagemap does not show what the file system may do next with an extent.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# Only the C half of cffi: it loads in 2 ms; cffi itself, which parses C, takes 55.
from _cffi_backend import FFI

from nvdimm_driver.errors import BackingError, UnwrittenError
from nvdimm_driver.model import GIB, PAGE, Extent
from nvdimm_driver.shell import command, repair_of
from nvdimm_driver.sizes import human

# include/uapi/linux/fs.h, include/uapi/linux/fiemap.h
FS_IOC_FIEMAP = 0xC020660B
FIEMAP_FLAG_SYNC = 0x1
_UNKNOWN_CALL = (errno.ENOTTY, errno.EOPNOTSUPP)
LAST = 0x1
SHARED = 0x2000
UNWRITTEN = 0x800
MERGED = 0x1000
FLAG_NAMES = {
    LAST: "LAST",
    0x2: "UNKNOWN",
    0x4: "DELALLOC",
    0x8: "ENCODED",
    0x80: "DATA_ENCRYPTED",
    0x100: "NOT_ALIGNED",
    0x200: "DATA_INLINE",
    0x400: "DATA_TAIL",
    UNWRITTEN: "UNWRITTEN",
    MERGED: "MERGED",
    SHARED: "SHARED",
}
_COPY = "as its owner, make a plain copy of it: cp --reflink=never --sparse=never"
_REASONS = {
    "UNKNOWN": ("has no fixed place on the device", "it is not on a plain block device"),
    "DELALLOC": ("is not allocated yet", "run 'sync' and try again"),
    "ENCODED": ("is compressed or encoded on the device", _COPY + ", in a directory without compression"),
    "DATA_ENCRYPTED": ("is encrypted by the file system", _COPY + ", into a directory without encryption"),
    "NOT_ALIGNED": ("is not aligned to blocks", _COPY),
    "DATA_INLINE": ("is inside the file system's metadata", _COPY),
    "DATA_TAIL": ("shares a block with another file's tail", _COPY),
    "SHARED": (
        "shares its blocks with another file (reflink) or a snapshot",
        "of a domain's file, 'nvdimmctl check' says how to go on; of another, copy what is shared, as its owner, with "
        "'cp --reflink=never --sparse=never'",
    ),
}

_HEADER = struct.Struct("=QQIIII")  # struct fiemap: start, length, flags, mapped extents, extent count, reserved
_EXTENT = struct.Struct("=QQQ16xI12x")  # struct fiemap_extent: logical, physical, length, flags
_BATCH = 1024

_ONLY_ROOT = "only root may see physical addresses"
_PRESENT = 1 << 63  # Documentation/admin-guide/mm/pagemap.rst
_PFN = (1 << 55) - 1
_FFI = FFI()


@dataclass(frozen=True)
class FileExtent:
    """An extent as the file system reports it: offset in the file, offset on the block device, length, in bytes.

    :ivar flags: FIEMAP_EXTENT_*.
    """

    offset: int
    physical: int
    length: int
    flags: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def flag_names(self) -> tuple[str, ...]:
        """Names of the flags, in order of bits; a hexadecimal number for a flag that this module does not know."""
        bits = (1 << bit for bit in range(self.flags.bit_length()) if self.flags >> bit & 1)
        return tuple(FLAG_NAMES.get(bit, f"{bit:#x}") for bit in bits)


def fiemap(fd: int, length: int, *, batch: int = _BATCH) -> tuple[FileExtent, ...]:
    """Return the extents of a file's first ``length`` bytes, after the file system has written back dirty data.

    The last one may reach beyond ``length``. A hole has no extent.

    :param batch: extents to ask for in one call.
    :raises BackingError: when the file system does not support FIEMAP (Documentation/filesystems/fiemap.rst).
    """
    found: list[FileExtent] = []
    start = 0
    while start < length:
        buffer = bytearray(_HEADER.size + batch * _EXTENT.size)
        _HEADER.pack_into(buffer, 0, start, length - start, FIEMAP_FLAG_SYNC, 0, batch, 0)
        try:
            fcntl.ioctl(fd, FS_IOC_FIEMAP, buffer)
        except OSError as error:
            raise BackingError(
                f"the file system does not show the file's extents: FIEMAP: {error.strerror}",
                hint="use ext4 or XFS" if error.errno in _UNKNOWN_CALL else "",
            ) from error
        count = _HEADER.unpack_from(buffer)[3]
        end = _HEADER.size + count * _EXTENT.size
        found += (FileExtent(*fields) for fields in _EXTENT.iter_unpack(buffer[_HEADER.size : end]))
        if not count or found[-1].flags & LAST:
            break
        if found[-1].end <= start:
            raise BackingError("the file changed while its extents were read", hint="stop what else writes to it")
        start = found[-1].end
    return tuple(found)


def holes(extents: Sequence[FileExtent], length: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of each hole in the first ``length`` bytes."""
    end = 0
    for extent in extents:
        if min(extent.offset, length) > end:
            yield end, min(extent.offset, length) - end
        end = max(end, extent.end)
    if end < length:
        yield end, length - end


def check_holes(path: str, extents: Sequence[FileExtent], length: int) -> None:
    """Refuse a file that is sparse in its first ``length`` bytes.

    :raises UnwrittenError: naming the first hole, and the number and size of all.
    """
    found = list(holes(extents, length))
    if found:
        raise UnwrittenError(
            f"{path}: is sparse: {human(found[0][1])} at {found[0][0]:#x} are not allocated; "
            f"holes: {len(found)}, {human(sum(size for _, size in found))} in all",
            hint=f"allocate all of it: {command('nvdimmctl', 'import', path)}; or, if it is a domain's file from a "
            f"backup: {repair_of(path)}",
        )


def check_flags(path: str, extents: Sequence[FileExtent], *, allowed: int = LAST | MERGED) -> None:
    """Refuse extents whose bytes are not plain bytes that stay where FIEMAP says.

    :raises UnwrittenError: when the first one with a flag that is not allowed is not written.
    :raises BackingError: naming that one, and the reason, when it has another flag.
    """
    for extent in extents:
        if not extent.flags & ~allowed:
            continue
        refused = FileExtent(extent.offset, extent.physical, extent.length, extent.flags & ~allowed)
        # The last one says most: DATA_ENCRYPTED comes with ENCODED, DELALLOC with UNKNOWN.
        reason, hint = _REASONS.get(refused.flag_names[-1], ("has a flag that this driver does not know", ""))
        which = f"{path}: its extent at {extent.offset:#x} ({human(extent.length)})"
        if refused.flags == UNWRITTEN:
            raise UnwrittenError(
                f"{which} is allocated and not written",
                hint=f"define the domain again; or, if it is a domain's file from a backup: {repair_of(path)}",
            )
        raise BackingError(f"{which} {reason} (FIEMAP flags {', '.join(refused.flag_names)})", hint=hint)


def in_machine(extents: Sequence[FileExtent], length: int, spa: int) -> tuple[Extent, ...]:
    """Return where a file's first ``length`` bytes are in the machine's memory, as few extents as possible.

    :param spa: SPA of the block device's first byte.
    """
    result: list[Extent] = []
    for extent in extents:
        if extent.offset >= length:
            break
        size = min(extent.length, length - extent.offset)
        last = result[-1] if result else None
        if last and (last.offset + last.length, last.spa + last.length) == (extent.offset, spa + extent.physical):
            result[-1] = Extent(last.offset, last.spa, last.length + size)
        else:
            result.append(Extent(extent.offset, spa + extent.physical, size))
    return tuple(result)


def to_machine(
    path: str, extents: Sequence[FileExtent], length: int, *, spa: int, device_size: int
) -> tuple[Extent, ...]:
    """Translate the extents of a file's first ``length`` bytes to machine addresses.

    :param spa: SPA of the block device's first byte.
    :param device_size: size of the block device, bytes.
    :returns: extents in order of offset, from 0 to ``length`` without gaps, as few as possible.
    :raises BackingError: when there is a hole, or an extent overlaps another or is not on whole pages of the device.
    """
    check_holes(path, extents, length)
    end = 0
    for extent in extents:
        if extent.offset >= length:
            break
        if extent.offset != end:
            raise BackingError(f"{path}: two extents overlap at {extent.offset:#x}", hint="stop what changes the file")
        size = min(extent.length, length - extent.offset)
        end = extent.offset + size
        if (extent.offset | extent.physical | size | spa) % PAGE:
            raise BackingError(
                f"{path}: its extent at {extent.offset:#x} is not on whole pages of the machine's memory "
                f"(SPA {spa + extent.physical:#x}, {human(size)})",
                hint="partitions have to start at a multiple of 4 KiB, and file systems need blocks of 4 KiB",
            )
        if extent.physical + size > device_size:
            raise BackingError(
                f"{path}: its extent at {extent.offset:#x} ends at {extent.physical + size:#x} of the device, beyond "
                f"its end at {device_size:#x}",
                hint="is the file system on more than one device, or the file on a realtime device?",
            )
    return in_machine(extents, length, spa)


def spa_of(fd: int, offset: int, window: int = PAGE) -> int:
    """Return the SPA of a byte of a DAX file or device, according to the page tables.

    A read fault populates the page. It does not change the file and is allowed on a frozen one. On DAX it maps the page
    itself where the extent is written, and the shared zero page where it is not (fs/dax.c: dax_fault_iter): an
    unwritten page shows as a wrong address. Without DAX it maps a page of the page cache.

    :param window: bytes to map at once; for device-dax its alignment (drivers/dax/device.c:check_vma).
    :raises BackingError: when the page cannot be mapped, or this process may not see its address.
    """
    with _opened_pagemap() as pagemap:
        return _look_up(pagemap, fd, offset, window)


def samples(extent: Extent) -> Iterator[int]:
    """Yield offsets in the backing: of an extent's first and last page, and of one page in each GiB between."""
    last = extent.offset + extent.length - PAGE
    yield from range(extent.offset, last, GIB)
    yield last


def cross_check(fd: int, extents: Sequence[Extent], window: int = PAGE) -> None:
    """Check that the page tables agree with the extents, for some pages of each.

    :raises BackingError: naming the offset and both addresses.
    """
    with _opened_pagemap() as pagemap:
        for extent in extents:
            for offset in samples(extent):
                told = extent.spa + offset - extent.offset
                seen = _look_up(pagemap, fd, offset, window)
                if seen != told:
                    raise BackingError(
                        f"byte {offset:#x} is at SPA {seen:#x} by the page tables, at {told:#x} by the file system "
                        "or sysfs",
                        hint="is the file system mounted with -o dax? If not, does 'lsattr' show an x for the file?",
                    )


@contextmanager
def _opened_pagemap() -> Iterator[int]:
    path = "/proc/self/pagemap"
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        hint = _ONLY_ROOT if isinstance(error, PermissionError) else ""
        raise BackingError(f"{path}: {error.strerror}", hint=hint) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _look_up(pagemap: int, fd: int, offset: int, window: int) -> int:
    start = offset // window * window
    try:
        memory = mmap.mmap(fd, window, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ, offset=start)
    except (OSError, ValueError) as error:
        raise BackingError(f"byte {offset:#x} cannot be mapped: {error}") from error
    with memory:
        with _FFI.from_buffer(memory) as view:
            address = int(_FFI.cast("uintptr_t", view)) + offset - start
        entry = int.from_bytes(os.pread(pagemap, 8, address // PAGE * 8), "little")
    if not entry & _PRESENT:
        raise BackingError(f"byte {offset:#x} cannot be read into memory", hint="look for media errors: dmesg")
    if not entry & _PFN:
        raise BackingError(f"the address of byte {offset:#x} is hidden", hint=_ONLY_ROOT)
    return (entry & _PFN) * PAGE + offset % PAGE
