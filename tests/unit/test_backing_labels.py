"""Label areas, on a file where the lab has persistent memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvdimm_driver.backing.labels import DirectLabels, MappedLabels, check_identity
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import KIB, MIB, BackingIdentity
from nvdimm_driver.plugins import LabelArea

FILE_SIZE = 2 * MIB
SIZES = (128 * KIB, 129 * KIB)
CONTENT = bytes(range(251)) * (FILE_SIZE // 251 + 1)


def opened(kind: str, path: Path, size: int) -> LabelArea:
    path.write_bytes(CONTENT[:FILE_SIZE])
    if kind == "mapped":
        fd = os.open(path, os.O_RDWR)
        area = MappedLabels(fd, FILE_SIZE - size, size)
        os.close(fd)
        return area
    return DirectLabels(os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC), FILE_SIZE - size, size)


@pytest.fixture
def file() -> Path:
    """On a disk: there is no O_DIRECT on tmpfs."""
    folder = Path(__file__).parent / "__pycache__"
    folder.mkdir(exist_ok=True)
    return folder / f"labels-{os.getpid()}"


@pytest.mark.parametrize("kind", ["mapped", "direct"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.sampled_from(SIZES), where=st.floats(0, 1), data=st.binary(min_size=1, max_size=9000))
def test_what_is_written_is_there_and_nothing_else_changes(
    file: Path, kind: str, size: int, where: float, data: bytes
) -> None:
    try:
        area = opened(kind, file, size)
        assert area.read() == CONTENT[FILE_SIZE - size : FILE_SIZE]
        offset = int(where * (size - len(data)))
        area.write(offset, data)
        begin = FILE_SIZE - size + offset
        wanted = CONTENT[:begin] + data + CONTENT[begin + len(data) : FILE_SIZE]
        assert file.read_bytes() == wanted
        assert area.read() == wanted[FILE_SIZE - size :]
    finally:
        file.unlink()


@pytest.mark.parametrize("kind", ["mapped", "direct"])
@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (SIZES[0], 1), (SIZES[0] - 1, 2), (0, SIZES[0] + 1)])
def test_outside_of_the_area_nothing_is_written(file: Path, kind: str, offset: int, length: int) -> None:
    try:
        area = opened(kind, file, SIZES[0])
        with pytest.raises(BackingError, match=f"not in a label area of {SIZES[0]} bytes"):
            area.write(offset, bytes(length))
        assert file.read_bytes() == CONTENT[:FILE_SIZE]
    finally:
        file.unlink()


def test_another_backing_is_refused_by_name() -> None:
    one = BackingIdentity("fsdax", "ns", 0, 12, 1, FILE_SIZE)
    check_identity("/p", one, one)
    with pytest.raises(BackingError, match=r"/p is not what was provisioned.*inode=12.*inode=13"):
        check_identity("/p", BackingIdentity("fsdax", "ns", 0, 13, 1, FILE_SIZE), one)
