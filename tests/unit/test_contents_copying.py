# SPDX-License-Identifier: Apache-2.0
"""Copies that continue where they stopped."""

from __future__ import annotations

import os
from hashlib import sha256

import pytest

from nvdimm_driver.contents import copying
from nvdimm_driver.errors import BackingError
from nvdimm_driver.model import KIB, MIB
from nvdimm_driver.plugins import unwatched
from tests.unit.doubles import MemoryBytes

SIZE = 4 * MIB + 64 * KIB
CONTENT = os.urandom(MIB) + bytes(2 * MIB) + os.urandom(SIZE - 3 * MIB)


def test_a_copy_writes_what_differs_and_syncs() -> None:
    target = MemoryBytes(bytes(SIZE))
    progress: list[tuple[int, int]] = []
    digest = copying.copy(MemoryBytes(CONTENT), target, lambda done, total: progress.append((done, total)))
    assert target.content == CONTENT
    assert digest == sha256(CONTENT).hexdigest()
    assert target.writes == [(0, MIB), (3 * MIB, MIB), (4 * MIB, 64 * KIB)]
    assert target.synced == 3
    assert progress == [(done, SIZE) for done in (MIB, 2 * MIB, 3 * MIB, 4 * MIB, SIZE)]
    copying.copy(MemoryBytes(CONTENT), target, unwatched)
    assert len(target.writes) == 3


def test_an_interrupted_copy_goes_on() -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 4 * MIB:
            raise KeyboardInterrupt

    target = MemoryBytes(bytes(SIZE))
    with pytest.raises(KeyboardInterrupt):
        copying.copy(MemoryBytes(CONTENT), target, interrupt)
    target.content[MIB - 1] ^= 1
    target.writes.clear()
    copying.copy(MemoryBytes(CONTENT), target, unwatched)
    assert target.content == CONTENT
    assert target.writes == [(0, MIB), (4 * MIB, 64 * KIB)], "what was damaged meanwhile, and what was missing"


def test_behind_a_shorter_source_are_zeros() -> None:
    target = MemoryBytes(b"x" * SIZE)
    digest = copying.copy(MemoryBytes(b"abc"), target, unwatched)
    assert target.content == b"abc" + bytes(SIZE - 3)
    assert digest == sha256(target.content).hexdigest()


def test_wiping_reads_zeros_and_writes_the_rest() -> None:
    target = MemoryBytes(CONTENT)
    progress: list[tuple[int, int]] = []
    copying.wipe(target, lambda done, total: progress.append((done, total)))
    assert target.content == bytes(SIZE)
    assert target.writes == [(0, MIB), (3 * MIB, MIB), (4 * MIB, 64 * KIB)]
    assert target.synced == 3
    assert progress[-1] == (SIZE, SIZE)


def test_a_copy_with_other_bytes_is_found() -> None:
    copied = MemoryBytes(CONTENT)
    digest = sha256(CONTENT).hexdigest()
    copying.verify(copied, digest, unwatched)
    copied.content[-1] ^= 1
    found = sha256(copied.content).hexdigest()
    with pytest.raises(BackingError, match=f"the copy differs from what was copied: .* is {found}, not {digest}"):
        copying.verify(copied, digest, unwatched)


def test_what_cannot_be_written_is_an_error() -> None:
    target = MemoryBytes(bytes(SIZE))
    target.broken = OSError(5, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        copying.copy(MemoryBytes(CONTENT), target, unwatched)
