# SPDX-License-Identifier: Apache-2.0
"""Label areas in what is imported and provisioned: none becomes data, and none is hidden."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nvdimm_driver.errors import BackingError
from nvdimm_driver.labels.index_block import first_end
from nvdimm_driver.model import KIB, MIB
from nvdimm_driver.sizes import human
from tests.unit.label_areas import label_area
from tests.unit.test_contents import SIZE, A, B, Host, host, watch

__all__ = ["host"]
SIZES = [128 * KIB, 192 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB, 6 * MIB]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("behind", [2 * MIB, 4 * MIB, 6 * MIB])
def test_labels_in_the_middle_do_not_become_data(host: Host, tmp_path: Path, size: int, behind: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(8 * MIB - size) + label_area(size) + bytes(behind))
    host.backing.files[B], host.backing.contents[B] = (1, 8 * MIB + behind), bytearray(source.read_bytes())
    attempts: list[Callable[[], object]] = [
        lambda: host.importer.import_copy(str(source), A, None, None, watch),
        lambda: host.importer.import_in_place(B, None, None, watch),
    ]
    for attempt in attempts:
        with pytest.raises(BackingError, match=f"one of {human(size)} that ends at 8 MiB.*--size {8 * MIB}"):
            attempt()


def test_labels_among_what_looks_like_them_are_no_long_search(host: Host, tmp_path: Path) -> None:
    """The bytes are a guest's: it may write the head of an index block to each place."""
    head = label_area(128 * KIB)[:72]
    assert first_end(head) == 128 * KIB
    source = tmp_path / "source"
    source.write_bytes(head.ljust(64 * KIB, b"\1") * 64)
    assert host.importer.import_copy(str(source), A, None, None, watch).label_size == 0


@pytest.mark.parametrize("label_size", [128 * KIB, 2 * MIB])
def test_labels_are_not_hidden_behind_the_end_of_a_smaller_nvdimm(host: Host, label_size: int) -> None:
    size = SIZE // 2
    host.backing.files[A] = (1, SIZE)
    host.backing.contents[A] = bytearray(os.urandom(SIZE - label_size) + label_area(label_size))
    attempts: list[Callable[[], object]] = [
        lambda: host.importer.default_label_size(A, size, 0),
        lambda: host.importer.default_label_size(A, size, 128 * KIB),
        lambda: host.importer.import_in_place(A, size, None, watch),
    ]
    for attempt in attempts:
        with pytest.raises(
            BackingError, match=f"a label area at its end, and cannot become .* of 2 MiB.*--size {SIZE}"
        ):
            attempt()
    assert host.importer.import_in_place(A, SIZE, None, watch).label_size == label_size


def test_what_has_no_labels_at_its_end_becomes_a_smaller_nvdimm(host: Host) -> None:
    host.backing.files[A], host.backing.contents[A] = (1, SIZE), bytearray(os.urandom(SIZE))
    assert host.importer.default_label_size(A, SIZE // 2, 128 * KIB) == 0
    assert host.importer.import_in_place(A, SIZE // 2, None, watch).label_size == 0
