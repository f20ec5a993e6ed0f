# SPDX-License-Identifier: Apache-2.0
"""The lab's walk through a nested page table."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.lab.npt import ENTRIES, LARGE, PCD, PRESENT, PWT, Leaf, leaves

GFN = (3 << 27) + (2 << 18) + (1 << 9)
"""A guest frame whose entries are the fourth, third, second and first of their tables."""


class Tables:
    """Tables at addresses of a host, and which of them were read."""

    def __init__(self) -> None:
        self.tables: dict[int, list[int]] = {}
        self.was_read: list[int] = []

    def put(self, table: int, index: int, entry: int) -> None:
        self.tables.setdefault(table, [0] * ENTRIES)[index] = entry

    def read(self, table: int) -> list[int]:
        self.was_read.append(table)
        return self.tables[table]


def tables() -> Tables:
    """Return tables that map a page, then nothing, and behind that 2 MiB and 1 GiB."""
    made = Tables()
    made.put(0x1000, 3, 0x2000 | PRESENT | 6)
    made.put(0x2000, 2, 0x3000 | PRESENT | 6)
    made.put(0x3000, 1, 0x4000 | PRESENT | 6)
    made.put(0x4000, 0, 0x5000 | PRESENT | PCD)
    made.put(0x4000, 511, 0x12345_6000 | PRESENT | PWT | 1 << 63)
    made.put(0x3000, 2, (0x140000 << 12) | PRESENT | LARGE)
    made.put(0x2000, 3, (1 << 18 << 12) | PRESENT | LARGE | PCD)
    return made


def test_entries_of_each_size_are_found() -> None:
    found = list(leaves(tables().read, 0x1000, GFN, 2 << 18))
    assert found == [
        Leaf(GFN, 1, 5, PRESENT | PCD),
        Leaf(GFN + 511, 1, 0x123456, PRESENT | PWT | 1 << 63),
        Leaf(GFN + 512, 512, 0x140000, PRESENT | LARGE),
        Leaf(GFN - 512 + (1 << 18), 1 << 18, 1 << 18, PRESENT | LARGE | PCD),
    ]
    assert [each.is_cached for each in found] == [False, False, True, False]


@given(st.integers(0, 520), st.integers(1, 520))
def test_only_what_maps_the_frames_is_looked_at(skipped: int, count: int) -> None:
    made = tables()
    found = list(leaves(made.read, 0x1000, GFN + skipped, count))
    assert all(each.gfn < GFN + skipped + count and GFN + skipped < each.gfn + each.count for each in found)
    assert (0x4000 in made.was_read) == (skipped < 512)
    assert (GFN + 512 in [each.gfn for each in found]) == (skipped + count > 512)
