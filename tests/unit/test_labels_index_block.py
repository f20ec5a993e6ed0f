# SPDX-License-Identifier: Apache-2.0
"""Detection of the label area at the end of an NVDIMM."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvdimm_driver.labels.index_block import fletcher64, label_area_size, used_labels
from nvdimm_driver.model import KIB, MIB
from tests.unit.label_areas import area_with_namespaces, cookie, index, index_size, label_area

DATA = os.urandom(3 * MIB)


class Sums:
    """A checksum that counts the bytes it was computed of."""

    def __init__(self) -> None:
        self.summed = 0

    def __call__(self, data: bytes | bytearray) -> int:
        self.summed += len(data)
        return fletcher64(data)


def full_of_blocks(size: int, every: int, block: int = 64 * KIB) -> bytes:
    """Bytes that begin like the largest index block at each place that a guest may choose."""
    head = b"NAMESPACE_INDEX\0" + b"\0\0\0\1" + struct.pack("<IQQQQ", 1, 0, block, block, 2 * block)
    count = (size - 2 * block) // 256
    head += struct.pack("<IHHQ", count if count > 0 else 1, 1, 2, 0)
    return (head[:every].ljust(every, b"\0") * (size // every + 1))[:size]


def plausible_blocks(size: int) -> bytes:
    """Bytes in which each place that can be that of an index block has one whose area, up to the end, is possible."""
    blocks = [index(size - start, 0, 1) for start in range(0, size - 128 * KIB + 1, 256)]
    return b"".join(block[:16] + b"\1" + block[17:72] + bytes(184) for block in blocks).ljust(size, b"\0")


@pytest.mark.parametrize("size", [128 * KIB, 129 * KIB, 256 * KIB, 2 * MIB])
@pytest.mark.parametrize("valid", [(True, True), (True, False), (False, True)])
def test_an_area_is_found_by_either_index_block(size: int, valid: tuple[bool, bool]) -> None:
    assert label_area_size(DATA + label_area(size, valid=valid)) == size
    assert label_area_size(label_area(size, valid=valid)) == size


def test_no_area_is_found_where_there_is_none() -> None:
    for tail in (b"", DATA, bytes(MIB), DATA + label_area(128 * KIB, valid=(False, False))):
        assert label_area_size(tail) == 0


def test_an_area_in_the_middle_is_none() -> None:
    """A guest can have an image of an NVDIMM in its own file system."""
    assert label_area_size(label_area(128 * KIB) + DATA) == 0
    assert label_area_size(DATA + label_area(2 * MIB) + bytes(MIB) + label_area(128 * KIB)) == 128 * KIB


def test_an_area_that_is_cut_off_is_none() -> None:
    area = label_area(2 * MIB)
    assert label_area_size(area[512:]) == 2 * MIB, "the first of its two index blocks is gone"
    assert label_area_size(area[:100]) == 0
    assert label_area_size(area[: 64 * KIB]) == 0


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.integers(0, 128 * KIB))
def test_nothing_breaks_it(at: int, byte: int, cut: int) -> None:
    area = bytearray(label_area(128 * KIB))
    area[at] = byte
    assert label_area_size(bytes(area)) in (0, 128 * KIB)
    assert label_area_size(bytes(area[:cut])) in range(cut + 1)


@pytest.mark.parametrize("every", [64, 72, 256])
@pytest.mark.parametrize("size", [128 * KIB, 2 * MIB])
def test_what_a_guest_writes_into_its_area_is_summed_once_at_most(size: int, every: int) -> None:
    """In a define, a plan and a start: they know where the area is."""
    for area in (full_of_blocks(size, every), plausible_blocks(size), bytes(size)):
        sums = Sums()
        assert list(used_labels(area, sums)) == []
        assert sums.summed <= size


@pytest.mark.parametrize("every", [64, 72, 256])
def test_what_a_guest_writes_into_its_tail_is_summed_in_small_part(every: int) -> None:
    """In an import: it searches the area."""
    for tail in (full_of_blocks(4 * MIB, every), plausible_blocks(4 * MIB), DATA + plausible_blocks(128 * KIB)):
        sums = Sums()
        assert label_area_size(tail, sums) == 0
        assert sums.summed <= 256 * KIB
    assert sums.summed, "the last of them is looked at"


def test_an_area_and_its_labels_are_found_among_what_looks_like_it() -> None:
    area = bytearray(area_with_namespaces(2 * MIB, cookie(3), cookie(4)))
    size = index_size(2 * MIB)
    assert label_area_size(full_of_blocks(2 * MIB, 256) + area) == 2 * MIB
    area[-MIB:] = full_of_blocks(MIB, 256)
    assert len(list(used_labels(bytes(area)))) == 2
    area[:size] = bytes(size)
    assert label_area_size(bytes(area)) == 2 * MIB
    assert list(used_labels(bytes(area))) == [], "the older block lists none"


def test_a_block_that_lists_more_labels_than_it_has_bits_for_is_none() -> None:
    area = bytearray(label_area(2 * MIB))
    size = index_size(2 * MIB)
    for own in (0, size):
        area[own + 19] = 0  # labels of 128 bytes
        struct.pack_into("<I", area, own + 56, (2 * MIB - 2 * size) // 128)
        area[own + 64 : own + 72] = bytes(8)
        struct.pack_into("<Q", area, own + 64, fletcher64(area[own : own + size]))
    assert label_area_size(bytes(area)) == 0
    assert list(used_labels(bytes(area))) == []
