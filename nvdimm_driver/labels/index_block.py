# SPDX-License-Identifier: Apache-2.0
"""Label areas: found at the end of an NVDIMM by their namespace index block, and the labels in them. Pure.

UEFI 2.10 §13.19.2: a label storage area starts with two index blocks, one of which is valid; the labels follow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from nvdimm_driver.model import KIB, MIB, MIN_LABEL_SIZE

SIGNATURE = b"NAMESPACE_INDEX\0"
TAIL = 64 * MIB
"""Bytes at the end of an NVDIMM to search. Label areas in use have 128 KiB to 2 MiB."""
_ALIGN = 256  # of index blocks
# signature, flags, label size (128 << n), sequence number, own offset, own size, offset of the other one, offset of the
# labels, number of labels, major and minor version, checksum
_INDEX = struct.Struct("<16s3sBIQQQQIHHQ")
_CHECKSUM_AT = _INDEX.size - 8
_MAX_INDEX = 64 * KIB


def label_area_size(tail: bytes) -> int:
    """Return the size in bytes of the label area that ends ``tail``, the last bytes of an NVDIMM; 0 without one.

    An index block counts only if it and its labels would fill more than half of the area: a guest may store images of
    other NVDIMMs in its own.
    """
    sizes = [size for start in _found(tail) if (size := _area_size(tail, start))]
    return min(sizes, default=0)


def used_labels(area: bytes) -> Iterator[bytes]:
    """Yield the labels of namespaces in a label area: those that its current index block says are in use."""
    blocks = [start for start in _found(area[: 2 * _MAX_INDEX]) if _area_size(area, start) == len(area)]
    if not blocks:
        return
    start = max(blocks, key=lambda each: _sequence(area, each, blocks))
    _, _, power, _, _, _, _, labels, count, *_ = _INDEX.unpack_from(area, start)
    size = 128 << power
    for number in range(count):
        free = area[start + _INDEX.size + number // 8] >> number % 8 & 1
        if not free:
            yield area[labels + number * size : labels + (number + 1) * size]


def _sequence(area: bytes, start: int, blocks: list[int]) -> int:
    """Return 1 for the current one of two index blocks: the numbers go 1, 2, 3, 1 (Linux: label.c:best_seq)."""
    own, *others = [_INDEX.unpack_from(area, each)[3] for each in (start, *(set(blocks) - {start}))]
    return int(all(own == other % 3 + 1 for other in others))


def _found(tail: bytes) -> Iterator[int]:
    start = tail.find(SIGNATURE)
    while start >= 0:
        yield start
        start = tail.find(SIGNATURE, start + 1)


def _area_size(tail: bytes, start: int) -> int:
    """Return the size in bytes of the area that has a valid index block at ``start``, or 0."""
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
    """Return the UEFI 2.10 §13.19.2 checksum of a multiple of 4 bytes (Linux: drivers/nvdimm/core.c:nd_fletcher64)."""
    low = high = 0
    for (word,) in struct.iter_unpack("<I", data):
        low = (low + word) & 0xFFFFFFFF
        high = (high + low) & 0xFFFFFFFF
    return high << 32 | low
