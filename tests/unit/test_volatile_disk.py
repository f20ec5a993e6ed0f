# SPDX-License-Identifier: Apache-2.0
"""The disk that the lab's power cuts lose writes of."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.volatile_disk import SECTOR, Disk, flush

SECTORS = 64


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    file = tmp_path / "disk"
    file.write_bytes(b"a" * SECTORS * SECTOR)
    descriptor = os.open(file, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def content(fd: int) -> str:
    """Return the first byte of each sector; all sectors are whole."""
    sectors = [os.pread(fd, SECTOR, at * SECTOR) for at in range(SECTORS)]
    assert all(len(set(sector)) == 1 for sector in sectors)
    return "".join(chr(sector[0]) for sector in sectors)


def after_loss(fd: int, seed: int, *, flushed: bool) -> str:
    """Write b to all sectors, flush or not, write c to the first half, and lose power."""
    disk = Disk(fd, random.Random(seed))
    os.pwrite(fd, b"a" * SECTORS * SECTOR, 0)
    disk.write(b"b" * SECTORS * SECTOR, 0)
    if flushed:
        flush(disk, 0)
    disk.write(b"c" * (SECTORS // 2) * SECTOR, 0)
    newest = content(fd)
    older = disk.lose_power()
    found = content(fd)
    assert older == sum(new != left for new, left in zip(newest, found, strict=True))
    assert disk.lose_power() == 0
    return found


def test_what_was_flushed_is_kept(fd: int) -> None:
    found = [after_loss(fd, seed, flushed=True) for seed in range(20)]
    assert set("".join(each[: SECTORS // 2] for each in found)) == {"b", "c"}
    assert {each[SECTORS // 2 :] for each in found} == {"b" * (SECTORS // 2)}


def test_any_content_since_the_last_flush_can_be_left(fd: int) -> None:
    found = [after_loss(fd, seed, flushed=False) for seed in range(20)]
    assert set("".join(each[: SECTORS // 2] for each in found)) == {"a", "b", "c"}
    assert set("".join(each[SECTORS // 2 :] for each in found)) == {"a", "b"}
    assert len(set(found)) == len(found)
