# SPDX-License-Identifier: Apache-2.0
"""Detection of the label area at the end of an NVDIMM."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvdimm_driver.labels.index_block import label_area_size
from nvdimm_driver.model import KIB, MIB
from tests.unit.label_areas import label_area

DATA = os.urandom(3 * MIB)


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
