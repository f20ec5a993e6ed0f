"""Finding the label area at the end of an NVDIMM, by the index block of its namespace labels. Pure.

UEFI 2.10 §13.19.2: a label storage area has two index blocks, one of which is valid, and the labels behind them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from nvdimm_driver.model import KIB, MIB, MIN_LABEL_SIZE

SIGNATURE = b"NAMESPACE_INDEX\0"
TAIL = 64 * MIB
"""How much of an NVDIMM's end is looked at. What is in use has 128 KiB to 2 MiB."""
_ALIGN = 256  # of index blocks
# signature, flags, label size (128 << n), sequence number, own offset, own size, offset of the other one, offset of the
# labels, how many there are, major and minor version, checksum
_INDEX = struct.Struct("<16s3sBIQQQQIHHQ")
_CHECKSUM_AT = _INDEX.size - 8
_MAX_INDEX = 64 * KIB


def label_area_size(tail: bytes) -> int:
    """Bytes of the label area that these bytes, the last ones of an NVDIMM, end with; 0 when they have none.

    An index block that is found counts when the labels that it tells of fill more than half of what would be the
    area: a guest may have images of other NVDIMMs in its own.
    """
    sizes = [size for start in _found(tail) if (size := _area_size(tail, start))]
    return min(sizes, default=0)


def _found(tail: bytes) -> Iterator[int]:
    start = tail.find(SIGNATURE)
    while start >= 0:
        yield start
        start = tail.find(SIGNATURE, start + 1)


def _area_size(tail: bytes, start: int) -> int:
    """Size of the area that has a valid index block there, or 0."""
    if len(tail) - start < _INDEX.size:
        return 0
    _, _, power, _, own, size, other, labels, count, major, _, checksum = _INDEX.unpack_from(tail, start)
    if major != 1 or power > 3 or not _INDEX.size <= size <= _MAX_INDEX or size % _ALIGN:
        return 0
    if {own, other} != {0, size} or labels < 2 * size:
        return 0
    block = bytearray(tail[start : start + size])
    block[_CHECKSUM_AT : _CHECKSUM_AT + 8] = bytes(8)
    area = len(tail) - start + own
    used = labels + count * (128 << power)
    if len(block) != size or fletcher64(block) != checksum or area < MIN_LABEL_SIZE:
        return 0
    return area if area // 2 < used <= area else 0


def fletcher64(data: bytes | bytearray) -> int:
    """The checksum of UEFI 2.10 §13.19.2, of a multiple of 4 bytes (Linux: drivers/nvdimm/core.c:nd_fletcher64)."""
    low = high = 0
    for (word,) in struct.iter_unpack("<I", data):
        low = (low + word) & 0xFFFFFFFF
        high = (high + low) & 0xFFFFFFFF
    return high << 32 | low
