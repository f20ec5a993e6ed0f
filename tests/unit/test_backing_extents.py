# SPDX-License-Identifier: Apache-2.0
import itertools
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvdimm_driver.backing import extents
from nvdimm_driver.backing.extents import LAST, MERGED, UNWRITTEN, FileExtent
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import GIB, PAGE, Extent

SPA = 0x1_4020_0000
SIZE = 1 << 40


def to_machine(found: list[FileExtent], length: int, spa: int = SPA, device_size: int = SIZE) -> tuple[Extent, ...]:
    return extents.to_machine("/f", found, length, spa=spa, device_size=device_size)


@pytest.mark.parametrize(
    ("flags", "names"),
    [(0, ()), (LAST | MERGED, ("LAST", "MERGED")), (0x2008, ("ENCODED", "SHARED")), (0x4000, ("0x4000",))],
)
def test_flag_names(flags: int, names: tuple[str, ...]) -> None:
    assert FileExtent(0, 0, PAGE, flags).flag_names == names


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (0x2, "has no fixed place"),
        (0x6, "is not allocated yet .*UNKNOWN, DELALLOC"),
        (0x8, "is compressed"),
        (0x88, "is encrypted .*ENCODED, DATA_ENCRYPTED"),
        (0x100, "is not aligned"),
        (0x300, "inside the file system's metadata .*NOT_ALIGNED, DATA_INLINE"),
        (0x500, "another file's tail"),
        (UNWRITTEN, "is allocated and not written"),
        (0x2000, "shares its blocks .*SHARED"),
        (0x8000, r"flag that this driver does not know \(FIEMAP flags 0x8000\)"),
    ],
)
def test_refused_flags(flag: int, message: str) -> None:
    found = [FileExtent(0, 0, PAGE, MERGED), FileExtent(PAGE, PAGE, 2 * PAGE, flag | LAST)]
    with pytest.raises(BackingError, match=rf"/f: its extent at 0x1000 \(8 KiB\) .*{message}"):
        extents.check_flags("/f", found)


def test_allowed_flags() -> None:
    found = [FileExtent(0, 0, PAGE, MERGED), FileExtent(PAGE, PAGE, PAGE, LAST | UNWRITTEN)]
    extents.check_flags("/f", found, allowed=LAST | MERGED | UNWRITTEN)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], [(0, 10)]),
        ([FileExtent(0, 0, 10, 0)], []),
        ([FileExtent(0, 0, 20, 0)], []),
        ([FileExtent(2, 0, 3, 0), FileExtent(7, 0, 1, 0)], [(0, 2), (5, 2), (8, 2)]),
        ([FileExtent(12, 0, 3, 0)], [(0, 10)]),
    ],
)
def test_holes(found: list[FileExtent], expected: list[tuple[int, int]]) -> None:
    assert list(extents.holes(found, 10)) == expected


def test_sparse_files_are_refused() -> None:
    with pytest.raises(BackingError, match="/f: is sparse: 4 KiB at 0x1000 are not allocated; holes: 2, 12 KiB in all"):
        to_machine([FileExtent(0, 0, PAGE, 0), FileExtent(2 * PAGE, 0, PAGE, 0)], 5 * PAGE)


def test_translation_merges_what_is_contiguous_on_both_sides() -> None:
    found = [
        FileExtent(0, 0x10000, 2 * PAGE, 0),
        FileExtent(2 * PAGE, 0x12000, PAGE, 0),
        FileExtent(3 * PAGE, 0x20000, 8 * PAGE, LAST),
    ]
    assert to_machine(found, 4 * PAGE) == (Extent(0, SPA + 0x10000, 3 * PAGE), Extent(3 * PAGE, SPA + 0x20000, PAGE))


@pytest.mark.parametrize(
    ("extent", "spa", "device_size", "message"),
    [
        (FileExtent(0, 0x10200, PAGE, 0), SPA, SIZE, r"not on whole pages .*\(SPA 0x140210200, 4 KiB\)"),
        (FileExtent(0, 0x10000, PAGE, 0), SPA + 512, SIZE, "not on whole pages"),
        (FileExtent(0, 0x10000, PAGE, 0), SPA, 0x10000, "ends at 0x11000 of the device, beyond its end at 0x10000"),
    ],
)
def test_places_that_cannot_be_mapped(extent: FileExtent, spa: int, device_size: int, message: str) -> None:
    with pytest.raises(BackingError, match=message):
        to_machine([extent], PAGE, spa, device_size)


def test_two_extents_for_one_byte() -> None:
    with pytest.raises(BackingError, match="two extents overlap at 0x1000"):
        to_machine([FileExtent(0, 0, 2 * PAGE, 0), FileExtent(PAGE, 0, 2 * PAGE, 0)], 3 * PAGE)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=20), st.data())
def test_every_page_keeps_its_place(runs: list[tuple[int, int]], data: st.DataObject) -> None:
    found = []
    offset = physical = 0
    for pages, gap in runs:
        physical += gap * PAGE
        found.append(FileExtent(offset, physical, pages * PAGE, 0))
        offset += pages * PAGE
        physical += pages * PAGE
    length = data.draw(st.integers(1, offset // PAGE)) * PAGE
    located = to_machine(found, length)
    places = [each.spa + page for each in located for page in range(0, each.length, PAGE)]
    expected = [SPA + each.physical + page for each in found for page in range(0, each.length, PAGE)]
    assert places == expected[: length // PAGE]
    assert [each.offset for each in located] == [sum(e.length for e in located[:i]) for i in range(len(located))]
    assert all(one.spa + one.length != two.spa for one, two in itertools.pairwise(located))


@pytest.mark.parametrize(
    ("length", "expected"),
    [(PAGE, [0]), (2 * PAGE, [0, PAGE]), (GIB + PAGE, [0, GIB]), (2 * GIB, [0, GIB, 2 * GIB - PAGE])],
)
def test_samples(length: int, expected: list[int]) -> None:
    assert list(extents.samples(Extent(3 * PAGE, 0, length))) == [3 * PAGE + offset for offset in expected]


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[int]:
    """Yield a file of 16 written pages; without DAX, its addresses are those of the page cache."""
    path = tmp_path / "pages"
    path.write_bytes(b"".join(bytes([i]) * PAGE for i in range(16)))
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_fiemap_where_the_file_system_has_none() -> None:
    with open("/proc/self/stat", "rb") as file, pytest.raises(BackingError, match="FIEMAP: "):
        extents.fiemap(file.fileno(), PAGE)


def test_addresses_are_those_of_the_memory(pages: int) -> None:
    """Two mappings of a page, and a window over many, have the same address; /proc/kpageflags shows a page there."""
    found = [extents.spa_of(pages, i * PAGE) for i in range(16)]
    assert len(set(found)) == 16
    assert [extents.spa_of(pages, i * PAGE, 16 * PAGE) for i in range(16)] == found
    assert extents.spa_of(pages, 5 * PAGE + 7) == found[5] + 7
    with open("/proc/kpageflags", "rb", buffering=0) as kernel:
        for spa in found:
            (flags,) = struct.unpack("=Q", os.pread(kernel.fileno(), 8, spa // PAGE * 8))
            assert flags & 1 << 20 == 0, "KPF_NOPAGE"


def test_cross_check_agrees(pages: int) -> None:
    extents.cross_check(pages, [Extent(i * PAGE, extents.spa_of(pages, i * PAGE), PAGE) for i in range(16)])


@pytest.mark.parametrize("wrong", [0, 1, 15])
def test_cross_check_disagrees(pages: int, wrong: int) -> None:
    told = [Extent(i * PAGE, extents.spa_of(pages, i * PAGE), PAGE) for i in range(16)]
    seen = told[wrong].spa
    told[wrong] = Extent(wrong * PAGE, seen + PAGE, PAGE)
    with pytest.raises(BackingError, match=f"byte {wrong * PAGE:#x} is at SPA {seen:#x} by the .* at {seen + PAGE:#x}"):
        extents.cross_check(pages, told)


def test_cross_check_looks_at_the_last_page_too(pages: int) -> None:
    with pytest.raises(BackingError, match="byte 0x10000 cannot be mapped"):
        extents.cross_check(pages, [Extent(0, extents.spa_of(pages, 0), 17 * PAGE)])


def test_addresses_are_hidden_without_the_capability(tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_bytes(bytes(PAGE))
    code = "import os, sys; from nvdimm_driver.backing import extents; extents.spa_of(os.open(sys.argv[1], 0), 0)"
    root = str(Path(extents.__file__).parents[2])
    command = ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": root})
    assert "BackingError: the address of byte 0x0 is hidden (only root may see" in result.stderr


def test_addresses_are_hidden_from_other_users(pages: int) -> None:
    os.seteuid(65534)
    try:
        with pytest.raises(BackingError, match=r"/proc/self/pagemap: Permission denied \(only root may see"):
            extents.spa_of(pages, 0)
    finally:
        os.seteuid(0)
