# SPDX-License-Identifier: Apache-2.0
"""Label areas: found at the end of an NVDIMM by their namespace index block, and the labels in them. Pure.

UEFI 2.10 §13.19.2: a label storage area starts with two index blocks, one of which is valid; the labels follow.
A guest writes what it likes into them, so the work on them does not depend on what it is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from nvdimm_driver.model import KIB, MIB, MIN_LABEL_SIZE, SUPERPAGE

SIGNATURE = b"NAMESPACE_INDEX\0"
TAIL = 64 * MIB
"""Bytes at the end of an NVDIMM to search. Label areas in use have 128 KiB to 2 MiB."""
_ALIGN = 256  # of index blocks
# signature, flags, label size (128 << n), sequence number, own offset, own size, offset of the other one, offset of the
# labels, number of labels, major and minor version, checksum
_INDEX = struct.Struct("<16s3sBIQQQQIHHQ")
_CHECKSUM_AT = _INDEX.size - 8
_MAX_INDEX = 64 * KIB
HEAD = _INDEX.size
"""Bytes that :func:`first_end` needs."""
MAX_CHECKSUMS = 4
"""Index blocks to sum in one search. A label area has two, and no other place near it looks like one by chance."""


def fletcher64(data: bytes | bytearray) -> int:
    """Return the UEFI 2.10 §13.19.2 checksum of a multiple of 4 bytes (Linux: drivers/nvdimm/core.c:nd_fletcher64)."""
    low = high = 0
    for (word,) in struct.iter_unpack("<I", data):
        low = (low + word) & 0xFFFFFFFF
        high = (high + low) & 0xFFFFFFFF
    return high << 32 | low


Checksum = Callable[[bytes | bytearray], int]


def label_area_size(tail: bytes, checksum: Checksum = fletcher64) -> int:
    """Return the size in bytes of the label area that ends ``tail``, the last bytes of an NVDIMM; 0 without one.

    An index block counts only if it and its labels would fill more than half of the area, and all but less than 2 MiB:
    a guest may store images of other NVDIMMs in its own. The area nearest to the end is taken.
    """
    return next((_area_size(tail, start) for start in _valid(tail, _places(tail), checksum)), 0)


def _places(tail: bytes) -> Iterator[int]:
    """Yield the places at which an index block can begin, the last first: those that have its first byte."""
    first = len(tail) % _ALIGN
    bytes_there = tail[first::_ALIGN]
    number = len(bytes_there)
    while (number := bytes_there.rfind(SIGNATURE[:1], 0, number)) >= 0:
        yield first + number * _ALIGN


def used_labels(area: bytes, checksum: Checksum = fletcher64) -> Iterator[bytes]:
    """Yield the labels of namespaces in a label area: those that its current index block says are in use."""
    starts = (start for start in range(0, _MAX_INDEX + 1, _ALIGN) if _area_size(area, start) == len(area))
    blocks = list(_valid(area, starts, checksum))
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


def _valid(content: bytes, starts: Iterable[int], checksum: Checksum) -> Iterator[int]:
    """Yield those of the places at which there is a whole index block. No more than MAX_CHECKSUMS are summed.

    A guest may have written something like an index block to each of them.
    """
    for start in islice((start for start in starts if _area_size(content, start)), MAX_CHECKSUMS):
        *_, size, _, _, _, _, _, wanted = _INDEX.unpack_from(content, start)
        block = bytearray(content[start : start + size])
        block[_CHECKSUM_AT : _CHECKSUM_AT + 8] = bytes(8)
        if checksum(block) == wanted:
            yield start


def _area_size(content: bytes, start: int) -> int:
    """Return the size in bytes of the label area, up to the end, that an index block at ``start`` describes.

    :returns: 0 when it describes none that can be. Its checksum is not looked at.
    """
    own, size, used = _parse(content, start)
    area = len(content) - start + own
    if not size or len(content) - start < size or area < MIN_LABEL_SIZE:
        return 0
    return area if area // 2 < used <= area < used + SUPERPAGE else 0


def first_end(head: bytes) -> int:
    """Return the end of the label area that begins with the index block in ``head``, bytes from its start; 0 without.

    NVDIMMs have multiples of 2 MiB, so what remains of the last 2 MiB has to be added. No checksum is looked at.
    """
    own, _, used = _parse(head, 0)
    return max(used, MIN_LABEL_SIZE) if used and not own else 0


def _parse(content: bytes, start: int) -> tuple[int, int, int]:
    """Return the place of an index block in its area, its size, and the end of the area's labels, all in bytes.

    :returns: zeros when there is none that can be. Its checksum is not looked at.
    """
    if not content.startswith(SIGNATURE, start) or len(content) - start < _INDEX.size:
        return 0, 0, 0
    _, _, power, _, own, size, other, labels, count, major, _, _ = _INDEX.unpack_from(content, start)
    if major != 1 or power > 3 or not _INDEX.size + count / 8 <= size <= _MAX_INDEX or size % _ALIGN:
        return 0, 0, 0
    if {own, other} != {0, size} or labels < 2 * size:
        return 0, 0, 0
    return own, size, labels + count * (128 << power)
