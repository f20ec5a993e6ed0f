# SPDX-License-Identifier: Apache-2.0
"""Byte ranges, on a file of a disk; the lab runs them on persistent memory."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvdimm_driver.backing.byteranges import DirectBytes, FileBytes, MappedBytes
from nvdimm_driver.backing.pmdk import Pmdk
from nvdimm_driver.contents import copying
from nvdimm_driver.errors import BackingError, UnsupportedError
from nvdimm_driver.model import KIB, MIB
from nvdimm_driver.plugins import ByteRange, unwatched
from tests.unit.doubles import MemoryBytes

FILE_SIZE = 2 * MIB
SIZES = (128 * KIB, 129 * KIB)
CONTENT = bytes(range(251)) * (FILE_SIZE // 251 + 1)


def opened(kind: str, path: Path, size: int) -> ByteRange:
    path.write_bytes(CONTENT[:FILE_SIZE])
    if kind == "direct":
        return DirectBytes(os.open(path, os.O_RDWR | os.O_DIRECT), FILE_SIZE - size, size)
    fd = os.open(path, os.O_RDWR)
    try:
        if kind == "mapped":
            return MappedBytes(fd, FILE_SIZE - size, size)
        return MappedBytes(fd, FILE_SIZE - size, size, step=64 * KIB, persist=Pmdk().persist)
    finally:
        os.close(fd)


@pytest.fixture
def file() -> Path:
    """Return a path on a disk: tmpfs has no O_DIRECT."""
    folder = Path(__file__).parent / "__pycache__"
    folder.mkdir(exist_ok=True)
    return folder / f"bytes-{os.getpid()}"


@pytest.mark.parametrize("kind", ["mapped", "persisted", "direct"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.sampled_from(SIZES), where=st.floats(0, 1), data=st.binary(min_size=1, max_size=9000))
def test_what_is_written_is_there_and_nothing_else_changes(
    file: Path, kind: str, size: int, where: float, data: bytes
) -> None:
    try:
        area = opened(kind, file, size)
        assert area.read(0, size) == CONTENT[FILE_SIZE - size : FILE_SIZE]
        offset = int(where * (size - len(data)))
        area.write(offset, data)
        area.sync()
        begin = FILE_SIZE - size + offset
        wanted = CONTENT[:begin] + data + CONTENT[begin + len(data) : FILE_SIZE]
        assert file.read_bytes() == wanted
        assert area.read(0, size) == wanted[FILE_SIZE - size :]
        assert area.read(offset, len(data)) == data
        area.close()
    finally:
        file.unlink()


@pytest.mark.parametrize("kind", ["mapped", "persisted", "direct"])
@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (SIZES[0], 1), (SIZES[0] - 1, 2), (0, SIZES[0] + 1)])
def test_outside_of_the_area_nothing_is_written(file: Path, kind: str, offset: int, length: int) -> None:
    try:
        area = opened(kind, file, SIZES[0])
        with pytest.raises(BackingError, match="not in a range of 128 KiB"):
            area.write(offset, bytes(length))
        with pytest.raises(BackingError, match="not in a range of 128 KiB"):
            area.read(offset, length)
        assert file.read_bytes() == CONTENT[:FILE_SIZE]
    finally:
        file.unlink()


def test_a_file_that_becomes_shorter(file: Path) -> None:
    file.write_bytes(CONTENT[:FILE_SIZE])
    with FileBytes(os.open(file, os.O_RDWR), FILE_SIZE) as content:
        assert content.read(MIB, MIB) == CONTENT[MIB:FILE_SIZE]
        content.write(1, b"new")
        content.sync()
        os.truncate(file, MIB)
        assert content.read(0, 4) == CONTENT[:1] + b"new"
        with pytest.raises(BackingError, match="the file ends at 0x100000, it had 2 MiB or more"):
            content.read(MIB - 1, 2)
    file.unlink()


def test_each_write_is_made_durable(file: Path) -> None:
    """The mapping begins with the page before the range; no sync follows."""
    file.write_bytes(CONTENT[:FILE_SIZE])
    durable: list[tuple[int, bytes]] = []
    fd = os.open(file, os.O_RDWR)
    area = MappedBytes(fd, 100, 8000, persist=lambda memory, at, length: durable.append((at, memory[at : at + length])))
    os.close(fd)
    area.write(5, b"one")
    area.write(7997, b"two")
    assert durable == [(105, b"one"), (8097, b"two")]
    area.close()
    file.unlink()


@pytest.mark.parametrize("what", ["wipe", "copy"])
def test_what_an_interrupted_copy_has_stored_is_made_durable_when_it_is_repeated(file: Path, what: str) -> None:
    """A Ctrl-C comes after a store, which only the CPU's caches have from then on."""

    def work(interrupted_at: int) -> bool:
        """Return True if it was interrupted there."""
        calls = 0

        def persist(memory: mmap.mmap, at: int, length: int) -> None:
            nonlocal calls
            calls += 1
            if calls == interrupted_at:
                raise KeyboardInterrupt
            medium[at : at + length] = memory[at : at + length]

        fd = os.open(file, os.O_RDWR)
        with MappedBytes(fd, 0, FILE_SIZE, persist=persist) as content, suppress(KeyboardInterrupt):
            os.close(fd)
            if what == "wipe":
                copying.wipe(content, unwatched)
            else:
                copying.copy(MemoryBytes(b"new" * (FILE_SIZE // 3)), content, unwatched)
        return calls == interrupted_at

    point, is_interrupted = 0, True
    while is_interrupted:
        point += 1
        file.write_bytes(CONTENT[:FILE_SIZE])
        medium = bytearray(CONTENT[:FILE_SIZE])
        is_interrupted = work(point)
        work(0)
        assert medium == file.read_bytes() != CONTENT[:FILE_SIZE]
    assert point > FILE_SIZE // MIB
    file.unlink()


def test_without_libpmem() -> None:
    with pytest.raises(UnsupportedError, match=r"libpmem.so.0 cannot be loaded.*libpmem1"):
        Pmdk("libpmem.so.0")
