# SPDX-License-Identifier: Apache-2.0
"""Label areas as ndctl's init-labels makes them (ndctl/lib/libndctl.c, util/fletcher.c), for labels of 256 bytes."""

from __future__ import annotations

import struct

LABEL = 256
PAGE = 256


def checksum(block: bytes) -> int:
    low = high = 0
    for (word,) in struct.iter_unpack("<I", block):
        low = (low + word) % 2**32
        high = (high + low) % 2**32
    return (high << 32) + low


def index_size(area: int) -> int:
    """Bytes of an index block, with a bit for each label that could be in the area."""
    return -(-(72 + -(-(area // LABEL) // 8)) // PAGE) * PAGE


def index(area: int, own: int, sequence: int, used: int = 0) -> bytes:
    """An index block; `own` is where it is in the area, and the first `used` labels are in use."""
    size = index_size(area)
    slots = (area - 2 * size) // LABEL
    free = ((1 << slots) - 1 >> used << used).to_bytes(-(-slots // 8), "little")

    def block(checked: int) -> bytes:
        head = b"NAMESPACE_INDEX\0" + b"\0\0\0\1" + struct.pack("<I", sequence)
        head += struct.pack("<QQQQ", own, size, size - own, 2 * size)
        head += struct.pack("<IHHQ", slots, 1, 2, checked)
        return (head + free).ljust(size, b"\0")

    return block(checksum(block(0)))


def cookie(slot: int, *, version: int = 2) -> int:
    """The interleave-set cookie of a namespace on QEMU's NVDIMM in a slot (Linux: struct nfit_set_info, …_info2)."""
    serial = (0x123456 + slot).to_bytes(4, "little")
    return checksum(bytes(8) + serial + (b"\x86\x80".ljust(36, b"\0") if version == 2 else bytes(4)))


def area_with_namespaces(area: int, *cookies: int) -> bytes:
    """An area with a label for each cookie, which the newer index block lists; the older one lists none."""
    size = index_size(area)
    labels = [
        bytes([number + 1]) * 16 + bytes(72) + value.to_bytes(8, "little") + bytes(LABEL - 96)
        for number, value in enumerate(cookies)
    ]
    blocks = index(area, 0, 1, used=len(cookies)) + index(area, size, 3)
    return (blocks + b"".join(labels)).ljust(area, b"\0")


def label_area(area: int, *, valid: tuple[bool, bool] = (True, True)) -> bytes:
    """An area without namespaces; of a block that is not valid, one byte is wrong."""
    size = index_size(area)
    blocks = [index(area, 0, 3), index(area, size, 2)]
    broken = [block if good else block[:40] + b"\x55" + block[41:] for block, good in zip(blocks, valid, strict=True)]
    return b"".join(broken).ljust(area, b"\0")
